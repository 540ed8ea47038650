"""Where the kernels run, and how what they compute is measured."""

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:  # Triton's interpreter multiplies bfloat16 as if its bits were integers
    DTYPES.append(torch.bfloat16)
large = pytest.mark.skipif(INTERPRETED, reason="of this size the interpreter takes minutes")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖"""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def attend(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
    """One token over its context in float64: q [q_heads, d], keys and values [n, kv_heads, d]"""
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    group = q.shape[0] // keys.shape[1]
    k = keys.double().repeat_interleave(group, 1)
    v = values.double().repeat_interleave(group, 1)
    weights = (torch.einsum("hd,nhd->hn", q.double(), k) * scale).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v)
