"""Rotary positions of all heads of a batch, in place, and what is cached of them into the KV cache.

One launch for both: with few tokens it is launches that cost, and what is cached has just been read.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    heads_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, slots_ptr,
    token_stride, head_stride, num_rotated, num_kv_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    # Queries, keys, then as many values; where nothing is written, heads that are rotated only.
    is_rotated = head < num_rotated
    inside = (head < num_rotated + num_kv_heads) & (pairs < half)
    x = heads_ptr + token * token_stride + head * head_stride + pairs
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    # Both are stored twice over, for each half of a head; the sine of the first half is negative.
    cos = tl.load(cos_ptr + token * 2 * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    sin = -tl.load(sin_ptr + token * 2 * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    first = tl.where(is_rotated, a * cos - b * sin, a)
    second = tl.where(is_rotated, b * cos + a * sin, b)
    if WRITES:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        written = inside & (slot >= 0)
        key, value = head - (num_rotated - num_kv_heads), head - num_rotated
        keys = keys_ptr + (slot * num_kv_heads + key) * 2 * half + pairs
        values = values_ptr + (slot * num_kv_heads + value) * 2 * half + pairs
        tl.store(keys, first, mask=written & is_rotated & (key >= 0))
        tl.store(keys + half, second, mask=written & is_rotated & (key >= 0))
        tl.store(values, first, mask=written & (value >= 0))
        tl.store(values + half, second, mask=written & (value >= 0))
    tl.store(x, first, mask=inside & is_rotated)
    tl.store(x + half, second, mask=inside & is_rotated)


def rotate_(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """[num_tokens, heads, head_dim] -> x itself, rotated IN PLACE

    cos, signed_sin: [num_tokens, 1, head_dim] as `RotaryEmbedding` gives them. A token's heads may lie
    among others; each head is contiguous.
    """
    _launch(x, cos, signed_sin, None)
    return x


def rotate_and_write_(
    heads: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Rotates q and k of `heads` IN PLACE, as `rotate_`; stores that k, and v, as `write_kv`.

    heads: [num_tokens, q and k and v heads, head_dim], side by side in this order. A token whose slot is
    negative is rotated and not stored.
    """
    _launch(heads, cos, signed_sin, (keys, values, slot_mapping))


def _launch(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, cache: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    num_tokens, num_heads, head_dim = heads.shape
    num_kv_heads = 0 if cache is None else cache[0].shape[2]
    pairs = triton.next_power_of_2(head_dim // 2)
    # Some 512 pairs a program: few tokens still spread over several multiprocessors.
    per_program = max(1, min(triton.next_power_of_2(num_heads), 512 // pairs))
    _rotate[(num_tokens, triton.cdiv(num_heads, per_program))](
        heads, cos, signed_sin, *(cache or (heads, heads, heads)),
        heads.stride(0), heads.stride(1), num_heads - num_kv_heads, num_kv_heads, head_dim // 2,
        per_program, pairs, cache is not None, num_warps=4,
    )  # fmt: skip
