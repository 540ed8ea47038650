"""Rotary positions of all heads of a batch, in place."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    token_stride,
    head_stride,
    num_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    inside = (heads < num_heads) & (pairs < half)
    x = x_ptr + token * token_stride + heads * head_stride + pairs
    first = tl.load(x, mask=inside, other=0.0)
    second = tl.load(x + half, mask=inside, other=0.0)
    # Both are stored twice over, for each half of a head; the sine of the first half is negative.
    cos = tl.load(cos_ptr + token * 2 * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    sin = -tl.load(sin_ptr + token * 2 * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    a, b = first.to(tl.float32), second.to(tl.float32)
    tl.store(x, a * cos - b * sin, mask=inside)
    tl.store(x + half, b * cos + a * sin, mask=inside)


def rotate_(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """[num_tokens, heads, head_dim] -> x itself, rotated IN PLACE

    cos, signed_sin: [num_tokens, 1, head_dim] as `RotaryEmbedding` gives them. A token's heads may lie
    among others; each head is contiguous.
    """
    num_tokens, num_heads, head_dim = x.shape
    half = head_dim // 2
    pairs = triton.next_power_of_2(half)
    heads = max(1, min(triton.next_power_of_2(num_heads), 512 // pairs))
    _rotate[(num_tokens, triton.cdiv(num_heads, heads))](
        x, cos, signed_sin, x.stride(0), x.stride(1), num_heads, half, heads, pairs, num_warps=4
    )
    return x
