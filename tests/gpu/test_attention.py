"""Attention of a whole batch on a GPU, prefill chunks beside decoding sequences, against float64."""

from dataclasses import replace

import pytest
import torch

from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PackedSpan, PrefillSpan
from shard_worker.kv_cache import KvCache
from shard_worker.layers.attention import Attention
from tests.gpu.test_kernels import DTYPES, TOLERANCE, attend, error, normal

pytestmark = pytest.mark.timeout(300)

BLOCK_SIZE = 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (4, 4, 40)]
)
@pytest.mark.parametrize("computed", [(0,), (37,), (0, 64, 5)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_of_chunks_and_decodes(
    is_packed: bool,
    computed: tuple[int, ...],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    device = torch.device("cuda")
    lengths = [*(23 + 7 * place for place in range(len(computed))), 1, 1]
    starts = [*computed, 70, 3]
    num_blocks = 8
    cache = KvCache.allocate(
        num_layers=1,
        num_blocks=num_blocks * len(lengths),
        block_size=BLOCK_SIZE,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
    )
    layer = cache.layers[0]
    tables = torch.randperm(num_blocks * len(lengths), device=device).view(-1, num_blocks)
    slots = (tables[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).flatten(1)
    contexts = [
        normal(s + n, 2, kv_heads, head_dim, dtype=dtype)
        for s, n in zip(starts, lengths, strict=True)
    ]
    for row, (start, context) in enumerate(zip(starts, contexts, strict=True)):
        layer.write(slots[row, :start], context[:start, 0], context[:start, 1])
    q = normal(sum(lengths), q_heads, head_dim, dtype=dtype)
    new = torch.cat([context[start:] for start, context in zip(starts, contexts, strict=True)])
    places = [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    batch = ForwardBatch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64, device=device),
        positions=torch.cat(
            [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        ).to(device),
        slot_mapping=torch.cat(
            [slots[r, s : s + n] for r, (s, n) in enumerate(zip(starts, lengths, strict=True))]
        ),
        prefills=tuple(
            PrefillSpan(places[row], places[row + 1], starts[row], tables[row])
            for row in range(len(computed))
        ),
        decode=DecodeSpan(
            start=places[len(computed)],
            block_ids=tables[len(computed) :],
            context_lens=torch.tensor(starts[len(computed) :], device=device) + 1,
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
            tiles=torch.tensor([*tiles, (-1, 0)], device=device, dtype=torch.int32)
            .t()
            .contiguous(),
            sequences=torch.tensor(sequences, device=device, dtype=torch.int32),
            block_ids=tables.int(),
        )
        batch = replace(batch, prefills=(), decode=None, packed=packed)
    attention = Attention(
        layer=0, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, window=window
    )
    out = attention(q, new[:, 0], new[:, 1], batch).unflatten(1, (q_heads, head_dim))
    for row, (start, context) in enumerate(zip(starts, contexts, strict=True)):
        for token in range(lengths[row]):
            seen = context[: start + token + 1]
            expected = attend(
                q[places[row] + token], seen[:, 0], seen[:, 1], window, head_dim**-0.5
            )
            assert error(out[places[row] + token], expected) < 2 * TOLERANCE[dtype], (row, token)
