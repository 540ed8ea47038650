"""Attention over the paged KV cache, and writing to it.

Flash-decoding (Dao et al., 2023): a sequence's context is divided over several programs, which then are
merged. How much of it each takes is worked out from the context length on the device, so that one CUDA
graph serves every length; FlashInfer needs a plan of the host for each step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shard_worker.forward_batch import PackedSpan

_TARGET_PROGRAMS = 528  # four for each of the 132 multiprocessors of a large GPU
_MAX_SPLITS = 64
_NO_WINDOW = 2**31 - 1


@triton.jit
def _write(
    k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    head_dim, width, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        head, element = columns // head_dim, columns % head_dim
        k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + element, mask=inside)
        v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + element, mask=inside)
        tl.store(keys_ptr + slot * width + columns, k, mask=inside)
        tl.store(values_ptr + slot * width + columns, v, mask=inside)


def write_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Stores k and v [num_tokens, kv_heads, head_dim] at slots [num_tokens]; a negative one is none.

    keys, values: contiguous [num_blocks, block_size, kv_heads, head_dim].
    """
    num_tokens, num_heads, head_dim = k.shape
    width = num_heads * head_dim
    _write[(num_tokens,)](
        k, v, keys, values, slot_mapping,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        head_dim, width, triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


@triton.jit
def _decode(
    q_ptr, keys_ptr, values_ptr, tables_ptr, lens_ptr, out_ptr, partial_ptr, norms_ptr,
    scale, window,
    q_row_stride, out_row_stride, table_row_stride, table_column_stride,
    num_kv_heads, head_dim,
    block_size: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens_ptr + sequence).to(tl.int32)
    begin = tl.maximum(length - window, 0)
    # Whole blocks of TOKENS for each split, as evenly as that goes.
    share = tl.cdiv(tl.cdiv(length - begin, TOKENS), SPLITS) * TOKENS
    start = begin + split * share
    stop = tl.minimum(start + share, length)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    q_heads = kv_head * GROUP + rows
    q_inside = (rows[:, None] < GROUP) & (dims[None, :] < head_dim)
    within = q_heads[:, None] * head_dim + dims[None, :]
    q_at = q_ptr + sequence.to(tl.int64) * q_row_stride + within
    q = tl.load(q_at, mask=q_inside, other=0.0)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(start, stop, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        valid = tokens < stop
        table = tables_ptr + sequence.to(tl.int64) * table_row_stride
        block = tl.load(table + (tokens // block_size) * table_column_stride, mask=valid, other=0)
        slot = block.to(tl.int64) * block_size + tokens % block_size
        kv = (slot * num_kv_heads + kv_head)[:, None] * head_dim + dims[None, :]
        kv_inside = valid[:, None] & (dims[None, :] < head_dim)
        k = tl.load(keys_ptr + kv, mask=kv_inside, other=0.0)
        v = tl.load(values_ptr + kv, mask=kv_inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = higher

    if SPLITS == 1:
        # A row that pads the batch has no context: it gets zeros.
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + sequence.to(tl.int64) * out_row_stride + within, out, mask=q_inside)
    else:
        num_heads = num_kv_heads * GROUP
        row = ((sequence * num_heads + q_heads) * SPLITS + split).to(tl.int64)
        tl.store(partial_ptr + row[:, None] * head_dim + dims[None, :], acc, mask=q_inside)
        tl.store(norms_ptr + row * 2, best, mask=rows < GROUP)
        tl.store(norms_ptr + row * 2 + 1, total, mask=rows < GROUP)


@triton.jit
def _merge(
    partial_ptr, norms_ptr, out_ptr, out_row_stride, num_heads, head_dim,
    DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    row = (sequence * num_heads + head) * SPLITS + splits
    best = tl.load(norms_ptr + row * 2)
    total = tl.load(norms_ptr + row * 2 + 1)
    highest = tl.max(best, 0)
    weight = tl.where(total > 0, tl.exp(best - highest), 0.0)
    parts = tl.load(
        partial_ptr + row[:, None] * head_dim + dims[None, :],
        mask=dims[None, :] < head_dim,
        other=0.0,
    )
    mass = tl.sum(total * weight, 0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    at = sequence * out_row_stride + head * head_dim + dims
    tl.store(out_ptr + at, out, mask=dims < head_dim)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_ids: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """One token of each sequence: q [num_sequences, q_heads, head_dim] -> the same shape

    keys, values: [num_blocks, block_size, kv_heads, head_dim]. block_ids: [num_sequences, blocks].
    context_lens: [num_sequences], the newest token included; a row of length 0 gets zeros.
    """
    num_sequences, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    dim = max(triton.next_power_of_2(head_dim), 16)
    longest = block_ids.shape[1] * block_size
    splits = _TARGET_PROGRAMS // (num_sequences * num_kv_heads)
    splits = max(1, min(splits, _MAX_SPLITS, triton.cdiv(longest, 64)))
    splits = 1 << (splits.bit_length() - 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = norms = q
    if splits > 1:
        shape = (num_sequences, num_heads, splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        norms = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    _decode[(num_sequences, num_kv_heads, splits)](
        q, keys, values, block_ids, context_lens, out, partial, norms,
        scale, window or _NO_WINDOW,
        q.stride(0), out.stride(0), block_ids.stride(0), block_ids.stride(1),
        num_kv_heads, head_dim,
        block_size, group, max(triton.next_power_of_2(group), 16), dim,
        64 if q.element_size() < 4 else 32, splits,
        "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge[(num_sequences, num_heads)](
            partial, norms, out, out.stride(0), num_heads, head_dim, dim, splits, num_warps=2
        )
    return out


@triton.jit
def _packed(
    q_ptr, keys_ptr, values_ptr, tables_ptr, tiles_ptr, sequences_ptr, out_ptr,
    scale, window, num_tiles, num_sequences,
    q_row_stride, out_row_stride, table_row_stride, table_column_stride,
    num_kv_heads, head_dim,
    block_size: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tiles_ptr + tile)
    if sequence >= 0:
        first = tl.load(tiles_ptr + num_tiles + tile)
        first_row = tl.load(sequences_ptr + sequence)
        count = tl.load(sequences_ptr + num_sequences + sequence)
        length = tl.load(sequences_ptr + 2 * num_sequences + sequence)
        computed = length - count

        # The query heads of the group stand beside each other: a key is read once for all of them.
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, DIM)
        tokens = first + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        q_inside = (rows < TILE * GROUP) & (tokens < count)
        inside = q_inside[:, None] & (dims[None, :] < head_dim)
        row = (first_row + tokens).to(tl.int64)[:, None]
        within = heads[:, None] * head_dim + dims[None, :]
        q = tl.load(q_ptr + row * q_row_stride + within, mask=inside, other=0.0)
        positions = computed + tokens

        best = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DIM), tl.float32)
        stop = tl.minimum(computed + first + TILE, length)
        table = tables_ptr + sequence.to(tl.int64) * table_row_stride
        for begin in range(tl.maximum(computed + first + 1 - window, 0), stop, TOKENS):
            keys = begin + tl.arange(0, TOKENS)
            valid = keys < stop
            block = tl.load(table + (keys // block_size) * table_column_stride, mask=valid, other=0)
            slot = block.to(tl.int64) * block_size + keys % block_size
            kv = (slot * num_kv_heads + kv_head)[:, None] * head_dim + dims[None, :]
            kv_inside = valid[:, None] & (dims[None, :] < head_dim)
            k = tl.load(keys_ptr + kv, mask=kv_inside, other=0.0)
            v = tl.load(values_ptr + kv, mask=kv_inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = (keys[None, :] <= positions[:, None]) & (
                keys[None, :] > positions[:, None] - window
            )
            scores = tl.where(seen & valid[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            # A row that has seen no key yet.
            known = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(scores - known[:, None])
            shrink = tl.exp(best - known)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            best = higher
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + row * out_row_stride + within, out, mask=inside)


def packed_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: PackedSpan,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Chunks of any length, causal: q [num_tokens, q_heads, head_dim] -> the same shape

    keys, values: [num_blocks, block_size, kv_heads, head_dim], the chunks' own among them. What is in no
    tile is undefined.
    """
    _, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    rows = max(triton.next_power_of_2(group * packed.TILE), 16)
    num_tiles, num_sequences = packed.tiles.shape[1], packed.sequences.shape[1]
    tables = packed.block_ids
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _packed[(num_tiles, num_kv_heads)](
        q, keys, values, tables, packed.tiles, packed.sequences, out,
        scale, window or _NO_WINDOW, num_tiles, num_sequences,
        q.stride(0), out.stride(0), tables.stride(0), tables.stride(1),
        num_kv_heads, head_dim,
        block_size, group, packed.TILE, rows, max(triton.next_power_of_2(head_dim), 16),
        64 if q.element_size() < 4 else 32, "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4 if rows <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return out
