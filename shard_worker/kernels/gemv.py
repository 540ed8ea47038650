"""One token's product with a weight: as fast as the weight can be read.

cuBLAS's kernels are for tiles of tokens; at one token the smaller weights of a layer reach two thirds of
what the memory gives (`benchmarks/decode_products.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gemv(
    w_ptr, x_ptr, bias_ptr, out_ptr, outputs, inputs,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    w = w_ptr + rows[:, None].to(tl.int64) * inputs + columns[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, inputs, COLUMNS):
        # A weight is read once a step: other data may stay in the cache instead.
        if WHOLE:
            part = tl.load(w + first, eviction_policy="evict_first")
            x = tl.load(x_ptr + first + columns)
        else:
            inside = first + columns < inputs
            valid = (rows < outputs)[:, None] & inside[None, :]
            part = tl.load(w + first, mask=valid, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + first + columns, mask=inside, other=0.0)
        acc += part.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=rows < outputs, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out, mask=rows < outputs)


def gemv(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """weight [outputs, inputs], x [1, inputs] -> x weightᵀ + bias, [1, outputs], added in float32"""
    outputs, inputs = weight.shape
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    # Four rows a program: best, or within 7 %, for all shapes of an 8B model at tp 1 and 2 on an H200.
    rows = 4
    columns, warps = (2048, 4) if inputs % 2048 == 0 else (1024, 2)
    whole = outputs % rows == 0 and inputs % columns == 0
    _gemv[(triton.cdiv(outputs, rows),)](
        weight, x, x if bias is None else bias, out, outputs, inputs,
        bias is not None, whole, rows, columns, num_warps=warps,
    )  # fmt: skip
    return out
