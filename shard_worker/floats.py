"""float32 numbers as integers that compare as they do."""

import torch
from torch import Tensor


def to_ordered(x: Tensor) -> Tensor:
    """float32 without NaN -> int32, the same shape; minus zero is below zero"""
    return _flip(x.contiguous().view(torch.int32))


def from_ordered(keys: Tensor) -> Tensor:
    """What `to_ordered` was given."""
    return _flip(keys).view(torch.float32)


def _flip(bits: Tensor) -> Tensor:
    """Floats are sign and magnitude: of negative ones the magnitude's order is turned around."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
