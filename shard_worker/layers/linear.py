"""Column- and row-parallel linear layers (Shoeybi et al., Megatron-LM, 2019, section 3)."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from shard_worker import kernels
from shard_worker.forward_batch import ForwardBatch
from shard_worker.layers.norm import RMSNorm
from shard_worker.sharding import ShardTensors


def padded_rows(num_rows: int) -> int:
    """The next number of rows that products are made with, at most a quarter more.

    oneDNN compiles a product anew for each number of rows and keeps the code, 0.4 MiB of it for every
    weight's shape; steps of mixed load have hundreds of them.
    """
    step = 1 if num_rows <= 16 else 4 if num_rows <= 64 else 16 if num_rows <= 256 else 64
    return -(-num_rows // step) * step


class Weight:
    """A [outputs, inputs] weight and the product with it.

    Once loaded, it goes into the layout that the device multiplies fastest: oneDNN reorders a plain
    bfloat16 weight at every call, which is half the time of a small batch on a CPU, and takes a
    reordered one as it is. The plain one is given up here; a tied embedding still holds
    it, so its slice is in memory twice.
    """

    def __init__(self, tensors: ShardTensors, plain: Tensor) -> None:
        self.shape = plain.shape
        self._plain: Tensor | None = plain
        self._packed: Tensor | None = None
        tensors.preparations.append(self._pack)

    def _pack(self) -> int:
        """The bytes of the layout that was made."""
        assert self._plain is not None
        if self._plain.device.type != "cpu" or self._plain.dtype != torch.bfloat16:
            return 0
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._plain, 1)
        self._plain = None
        # With what the layout pads, which `nbytes` leaves out.
        return int(torch.ops.mkldnn._nbytes(self._packed))

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias: [num_tokens, inputs] -> [num_tokens, outputs]"""
        if self._packed is not None:
            num_tokens = len(x)
            if more := padded_rows(num_tokens) - num_tokens:
                x = F.pad(x, (0, 0, 0, more))
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
            return y[:num_tokens]
        assert self._plain is not None
        if x.is_cuda and x.shape[0] == 1:
            return kernels.gemv.gemv(self._plain, x, bias)
        return F.linear(x, self._plain, bias)


class _Linear:
    """y = x Wᵀ + b on this rank's slice; `names` are checkpoint modules merged in the rows of W."""

    def __init__(
        self, tensors: ShardTensors, prefix: str, names: tuple[str, ...], transposed: bool
    ) -> None:
        modules = [f"{prefix}.{name}" for name in names]
        weights = [f"{module}.weight" for module in modules]
        biases = [f"{module}.bias" for module in modules]
        self.tp = tensors.tp
        self.weight = Weight(tensors, tensors.take_merged(weights, transposed=transposed))
        self.bias = tensors.take_merged(biases) if tensors.has(biases[0]) else None
        outputs = 1 if transposed else 0
        self.part_sizes = tuple(tensors.layout.local_shape(name)[outputs] for name in weights)


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
        return self.weight.multiply(x, self.bias)

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
        # Communication is counted by layer: "model.layers.3" for "model.layers.3.mlp".
        self._collectives = tensors.tp.collectives(prefix.rpartition(".")[0] or prefix)
        (self._columns,) = tensors.layout.slices(weight)
        self._whole_inputs = tensors.layout.parameters[weight].shape[0 if transposed else 1]

    def partial(self, x: Tensor) -> Tensor:
        """This rank's term: [num_tokens, inputs of this rank] -> [num_tokens, outputs]"""
        # The bias is part of the sum once.
        return self.weight.multiply(x, self.bias if self.tp.rank == 0 else None)

    def reduce(self, partial: Tensor) -> Tensor:
        """Sums the ranks' terms in place: [num_tokens, outputs]"""
        return self._collectives.all_reduce(partial)

    def reduce_onto(self, partial: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor:
        """Adds the sum of the ranks' terms to the residual stream, IN PLACE -> the stream, normalised
        (all [num_tokens, outputs])"""
        x = self._collectives.all_reduce_rms_norm(partial, residual, norm.weight, norm.eps)
        return norm.add(self.reduce(partial), residual) if x is None else x

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

    def add_to(self, residual: Tensor, norm: RMSNorm, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Adds the block's output for x to the residual stream, IN PLACE -> the stream, normalised
        (all [num_tokens, hidden])"""
        return self.last.reduce_onto(self.partial(x, batch), residual, norm)
