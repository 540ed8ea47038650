"""RMSNorm, alone and together with the addition to the residual stream before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    width,
    x_stride,
    out_stride,
    head_stride,
    eps,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    # A row is one, or has heads, which are normalised each by itself.
    within = tl.program_id(1) * head_stride + columns
    x = tl.load(x_ptr + row * x_stride + within, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual = tl.load(residual_ptr + row * width + columns, mask=inside, other=0.0)
        # Rounded as the stored sum is, so that who normalises that gets the same.
        x = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * width + columns, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + within, x * scale * weight, mask=inside)


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, IN PLACE -> the sum, normalised: [num_tokens, hidden]

    x, residual: contiguous [num_tokens, hidden]; computed in float32, the sum rounded once.
    """
    out = torch.empty_like(x)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows, 1)](
        x, residual, weight, out, width, width, width, 0, eps, True, block,
        num_warps=_num_warps(block),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., features] -> the same shape, normalised over the last dimension, which is contiguous"""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(flat.shape[0], 1)](
        flat, flat, weight, out, width, flat.stride(0), width, 0, eps, False, block,
        num_warps=_num_warps(block),
    )  # fmt: skip
    return out


def rms_norm_heads_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[num_tokens, heads, head_dim] -> x itself, each head normalised, IN PLACE

    A token's heads may lie among others; each head is contiguous.
    """
    num_tokens, num_heads, head_dim = x.shape
    block = triton.next_power_of_2(head_dim)
    _add_rms_norm[(num_tokens, num_heads)](
        x, x, weight, x, head_dim, x.stride(0), x.stride(0), x.stride(1), eps, False, block,
        num_warps=_num_warps(block),
    )  # fmt: skip
    return x
