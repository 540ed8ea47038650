"""The paged KV cache (Kwon et al., PagedAttention, 2023): blocks of tokens, shared by all sequences."""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from shard_worker import kernels


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer: [num_blocks, block_size, kv_heads of this rank, head_dim] each."""

    keys: Tensor
    values: Tensor

    def write(self, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores [num_tokens, kv_heads, head_dim] at slots [num_tokens] (block · size + offset).

        On a GPU a negative slot is none: a row that only pads the batch.
        """
        if keys.is_cuda:
            kernels.attention.write_kv(keys, values, self.keys, self.values, slot_mapping)
            return
        self.keys.flatten(0, 1).index_copy_(0, slot_mapping, keys)
        self.values.flatten(0, 1).index_copy_(0, slot_mapping, values)

    def read(self, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [n] -> keys and values, [n · block_size, kv_heads, head_dim] each (copies)."""
        return (
            self.keys.index_select(0, block_ids).flatten(0, 1),
            self.values.index_select(0, block_ids).flatten(0, 1),
        )


@dataclass(frozen=True, slots=True)
class KvCache:
    """One `LayerCache` a layer, `num_blocks` blocks of `block_size` tokens each."""

    layers: tuple[LayerCache, ...]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KvCache":
        """MemoryError when the system has not that much memory to promise."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        num_bytes = prod(shape) * dtype.itemsize

        def zeros() -> Tensor:
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            # NumPy's zeros come lazily from the system, so a block takes memory once it is written;
            # torch would write them. They must be finite: what a mask hides is multiplied by zero.
            lazy = np.zeros(num_bytes, dtype=np.uint8)
            return torch.from_numpy(lazy).view(dtype).view(shape)

        try:
            layers = tuple(LayerCache(zeros(), zeros()) for _ in range(num_layers))
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            raise MemoryError(
                f"num_blocks = {num_blocks}: of {block_size} tokens each they take "
                f"{2 * num_layers * num_bytes} bytes of KV cache, more than there are"
            ) from error
        return cls(layers, num_blocks, block_size)

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
