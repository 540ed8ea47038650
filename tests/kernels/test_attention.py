"""Attention of a whole batch, prefill chunks beside decoding sequences, against float64."""

from dataclasses import replace

import pytest
import torch

from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PackedSpan, PrefillSpan
from shard_worker.kv_cache import KvCache
from shard_worker.layers.attention import Attention
from shard_worker.layers.rotary import RotaryEmbedding, rotate
from tests.kernels.numbers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    TOLERANCE,
    attend,
    error,
    large,
    normal,
)

pytestmark = pytest.mark.timeout(300)

BLOCK_SIZE = 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"),
    [pytest.param(32, 8, 128, marks=large), (9, 3, 64), (4, 4, 40), (8, 2, 12), (8, 1, 16)],
)
@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 23)],
        [(37, 23)],
        [(0, 23), (64, 30), (5, 37)],
        [(0, 1), (0, 16), (15, 17), (48, 32), (16, 15)],
    ],
    ids=str,
)
# Launched apart, they are kernels on a GPU alone: a CPU has torch's attention.
@pytest.mark.parametrize("is_packed", [True] if INTERPRETED else [False, True])
def test_a_batch_of_chunks_and_decodes(
    is_packed: bool,
    chunks: list[tuple[int, int]],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """A chunk is of some tokens after those that are computed already."""
    lengths = [*(length for _, length in chunks), 1, 1]
    starts = [*(computed for computed, _ in chunks), 70, 3]
    num_blocks = 8
    cache = KvCache.allocate(
        num_layers=1,
        num_blocks=num_blocks * len(lengths),
        block_size=BLOCK_SIZE,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    layer = cache.layers[0]
    tables = torch.randperm(num_blocks * len(lengths), device=DEVICE).view(-1, num_blocks)
    slots = (tables[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=DEVICE)).flatten(1)
    rotary = RotaryEmbedding({}, head_dim, dtype, DEVICE)
    contexts = []  # queries, keys and values of each sequence: as projected, and as attended to
    for start, length, row in zip(starts, lengths, slots, strict=True):
        heads = normal(start + length, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
        ids = torch.arange(start + length, device=DEVICE)
        rotation = rotary(ForwardBatch(token_ids=ids, positions=ids, slot_mapping=ids))
        q_and_k = rotate(heads[:, :-kv_heads].clone(), rotation)
        turned = torch.cat((q_and_k, heads[:, -kv_heads:]), dim=1)
        _, k, v = turned.split((q_heads, kv_heads, kv_heads), dim=1)
        layer.write(row[:start], k[:start], v[:start])
        contexts.append((heads, turned))
    new = torch.cat([heads[s:] for s, (heads, _) in zip(starts, contexts, strict=True)])
    places = [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    batch = ForwardBatch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64, device=DEVICE),
        positions=torch.cat(
            [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        ).to(DEVICE),
        slot_mapping=torch.cat(
            [slots[r, s : s + n] for r, (s, n) in enumerate(zip(starts, lengths, strict=True))]
        ),
        prefills=tuple(
            PrefillSpan(places[row], places[row + 1], starts[row], tables[row])
            for row in range(len(chunks))
        ),
        decode=DecodeSpan(
            start=places[len(chunks)],
            block_ids=tables[len(chunks) :],
            context_lens=torch.tensor(starts[len(chunks) :], device=DEVICE) + 1,
            block_size=BLOCK_SIZE,
        ),
        kv_cache=cache,
    )
    if is_packed:
        tiles = [
            (row, first)
            for row, length in enumerate(lengths)
            for first in range(0, length, PackedSpan.TILE)
        ]
        sequences = [places[:-1], lengths, [s + n for s, n in zip(starts, lengths, strict=True)]]
        packed = PackedSpan(
            tiles=torch.tensor([*tiles, (-1, 0)], device=DEVICE, dtype=torch.int32)
            .t()
            .contiguous(),
            sequences=torch.tensor(sequences, device=DEVICE, dtype=torch.int32),
            block_ids=tables.int(),
        )
        batch = replace(batch, prefills=(), decode=None, packed=packed)
    attention = Attention(
        layer=0, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, window=window
    )
    out = attention(new, batch, rotary(batch)).unflatten(1, (q_heads, head_dim))
    for row, (start, (_, turned)) in enumerate(zip(starts, contexts, strict=True)):
        q, k, v = attention.split(turned)
        for token in range(lengths[row]):
            at = start + token
            expected = attend(q[at], k[: at + 1], v[: at + 1], window, head_dim**-0.5)
            assert error(out[places[row] + token], expected) < 2 * TOLERANCE[dtype], (row, token)
