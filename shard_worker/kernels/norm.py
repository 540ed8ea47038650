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
    eps,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual = tl.load(residual_ptr + row * width + columns, mask=inside, other=0.0)
        # Rounded as the stored sum is, so that who normalises that gets the same.
        x = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * width + columns, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, x * scale * weight, mask=inside)


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, IN PLACE -> the sum, normalised: [num_tokens, hidden]

    x, residual: contiguous [num_tokens, hidden]; computed in float32, the sum rounded once.
    """
    out = torch.empty_like(x)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x, residual, weight, out, width, width, eps, True, block, num_warps=_num_warps(block)
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., features] -> the same shape, normalised over the last dimension, which is contiguous"""
    width = x.shape[-1]
    if x.dim() == 3 and x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous()  # heads that lie beside others: rows of unequal distance
    flat = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(flat.shape[0],)](
        flat, flat, weight, out, width, flat.stride(0), eps, False, block,
        num_warps=_num_warps(block),
    )  # fmt: skip
    return out
