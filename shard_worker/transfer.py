"""From numbers of the host to tensors of the device, without waiting for it."""

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of nested sequences of numbers.

    On a GPU the copy is only queued. From ordinary memory it would wait for everything before it, and
    no step could be launched ahead of the last one's end.
    """
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
