"""Column- and row-parallel linear layers (Shoeybi et al., Megatron-LM, 2019, section 3)."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from shard_worker.forward_batch import ForwardBatch
from shard_worker.sharding import ShardTensors


class _Linear:
    """y = x Wᵀ + b on this rank's slice; `parts` names the checkpoint modules merged in W's rows."""

    def __init__(
        self, tensors: ShardTensors, prefix: str, names: tuple[str, ...], transposed: bool
    ) -> None:
        modules = [f"{prefix}.{name}" for name in names]
        self.tp = tensors.tp
        self.weight = tensors.take_merged(
            [f"{module}.weight" for module in modules], transposed=transposed
        )
        biases = [f"{module}.bias" for module in modules]
        self.bias = tensors.take_merged(biases) if tensors.has(biases[0]) else None
        rows = [
            tensors.layout.local_shape(f"{module}.weight")[1 if transposed else 0]
            for module in modules
        ]
        self.part_sizes = tuple(rows)
        self._packed: Tensor | None = None
        tensors.preparations.append(self.pack)

    def pack(self) -> None:
        """Brings a loaded weight into the layout that the device multiplies fastest.

        oneDNN reorders a plain bfloat16 weight at every call, which costs half of a small-batch
        decode on a CPU; it takes a reordered one as it is. The plain weight is given up.
        """
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)
            self.weight = torch.empty(0, dtype=torch.bfloat16)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[num_tokens, inputs] -> [num_tokens, outputs of this rank]"""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return F.linear(x, self.weight, bias)


class ColumnParallelLinear(_Linear):
    """The output dimension is split: a rank's output is a piece of the whole.

    Several modules with the same input merge into one product (`names`); the output is then their
    outputs side by side, `part_sizes` wide each.
    """

    def __init__(
        self,
        tensors: ShardTensors,
        prefix: str,
        names: tuple[str, ...],
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(tensors, prefix, names, transposed)
        self.parts = names

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, inputs] -> [num_tokens, outputs of this rank]"""
        return self.matmul(x, self.bias)

    def part(self, name: str, x: Tensor) -> Tensor:
        """The output of one of the merged modules."""
        return self(x).split(self.part_sizes, dim=-1)[self.parts.index(name)]


class RowParallelLinear(_Linear):
    """The input dimension is split: the ranks' outputs are terms of a sum."""

    def __init__(
        self, tensors: ShardTensors, prefix: str, name: str, *, transposed: bool = False
    ) -> None:
        super().__init__(tensors, prefix, (name,), transposed)
        weight = f"{prefix}.{name}.weight"
        (self._columns,) = tensors.layout.slices(weight)
        self._whole_inputs = tensors.layout.parameters[weight].shape[0 if transposed else 1]

    def partial(self, x: Tensor) -> Tensor:
        """This rank's term: [num_tokens, inputs of this rank] -> [num_tokens, outputs]"""
        # The bias is part of the sum once.
        return self.matmul(x, self.bias if self.tp.rank == 0 else None)

    def reduce(self, partial: Tensor) -> Tensor:
        """Sums the ranks' terms in place: [num_tokens, outputs]"""
        return self.tp.comm.all_reduce(partial)

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, inputs of this rank] -> [num_tokens, outputs], equal on all ranks"""
        return self.reduce(self.partial(x))

    def select(self, x: Tensor) -> Tensor:
        """This rank's columns of a whole input: [num_tokens, inputs] -> [.., inputs of this rank]"""
        start, stop = self._columns
        return x[:, start:stop].contiguous()

    @property
    def whole_inputs(self) -> int:
        return self._whole_inputs


class RowParallelBlock(ABC):
    """What a layer adds to its residual stream: column-parallel work that ends row parallel.

    A rank's `partial` output is a term of a sum; calling the block gives the sum.
    """

    last: RowParallelLinear

    @abstractmethod
    def partial(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> this rank's term of [num_tokens, hidden]"""

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> [num_tokens, hidden], equal on all ranks"""
        return self.last.reduce(self.partial(x, batch))
