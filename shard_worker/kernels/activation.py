"""silu(gate) · up over a merged projection."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded between the two, as two operations of torch do.
    active = (wide * tl.sigmoid(wide)).to(gate.dtype)
    out = active.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + columns, out, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Contiguous [num_tokens, 2 · width] -> silu of the first half times the second, [.., width]"""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(width), 1024)
    _silu_mul[(rows, triton.cdiv(width, block))](gate_up, out, width, block, num_warps=4)
    return out
