"""Which device a worker has.

torch reads a GPU's properties once and keeps them, so asking again never waits for what the GPU does.
"""

import torch

from colrow.processor import processor_name


def device_name(device: torch.device) -> str:
    """A GPU's, or the processor's. Empty for a GPU that was not taken yet."""
    if device.type == "cpu":
        return processor_name()
    return torch.cuda.get_device_properties(device).name if _is_taken(device) else ""


def device_uuid(device: torch.device) -> str:
    """A GPU's own, which is the same in every process. Empty for a CPU, and before it was taken."""
    return str(torch.cuda.get_device_properties(device).uuid) if _is_taken(device) else ""


def _is_taken(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_initialized()
