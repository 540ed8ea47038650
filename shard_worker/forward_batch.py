"""What one forward pass works on: tokens of several sequences, flattened, and where their context is."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from shard_worker.kv_cache import KvCache

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens [start, stop) of the batch: one sequence's, from position `num_computed` on."""

    start: int
    stop: int
    num_computed: int
    block_ids: Tensor  # int64 [blocks of the context]

    @property
    def context_len(self) -> int:
        return self.num_computed + self.stop - self.start


@dataclass(frozen=True, slots=True)
class DecodeSpan:
    """Tokens from `start` to the batch's end: the newest one of a sequence each."""

    start: int
    block_ids: Tensor  # int64 [num_sequences, most blocks], padded with block 0
    context_lens: Tensor  # int64 [num_sequences], the newest token included
    block_size: int

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[num_sequences, 1, 1, padded context]: 0 for keys that count, -inf for others

        It is added to the scores: a mask of bools would be turned into this in every layer.
        """
        keys = torch.arange(self.block_ids.shape[1] * self.block_size, device=self.block_ids.device)
        lens = self.context_lens.unsqueeze(1)
        hidden = keys >= lens
        if window is not None:
            hidden |= keys < lens - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]


@dataclass(frozen=True, slots=True)
class PackedSpan:
    """All of a batch, as a GPU finds it in its memory: chunks of any length, decoding ones too.

    A tile is up to `TILE` tokens of one chunk.
    """

    TILE: ClassVar[int] = 16

    tiles: (
        Tensor  # int32 [2, num_tiles]: the sequence, or -1; the chunk's token that it begins with
    )
    sequences: (
        Tensor  # int32 [>= 3, num_sequences]: the batch's row of the chunk's first token; how many
    )
    # tokens it has; how many the context has then
    block_ids: Tensor  # int32 [num_sequences, most blocks]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Prefill chunks first, then the decoding sequences; or `packed`, which is all of it.

    Without a `kv_cache` the tokens are one sequence that attends to itself: how a module is looked at
    alone.
    """

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens]
    prefills: tuple[PrefillSpan, ...] = ()
    decode: DecodeSpan | None = None
    packed: PackedSpan | None = None
    kv_cache: KvCache | None = None
    _derived: dict[Hashable, object] = field(default_factory=dict)

    def derive(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What all layers need of this batch, computed by the first that asks."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]  # type: ignore[return-value]
