"""How many GPUs a host has, and how many of them its processes may see, without asking CUDA for them.

That would take a context, and a second to import torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
"""The environment's variable that chooses among GPUs:
https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html"""

_IN_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class HostGpus:
    """`visible_devices` is the value of CUDA_VISIBLE_DEVICES, None where it is not set."""

    num_in_driver: int = 0
    visible_devices: str | None = None

    @property
    def num_visible(self) -> int:
        """How many CUDA would show, as cuda:0, cuda:1, …"""
        if self.visible_devices is None:
            return self.num_in_driver
        names = [name.strip() for name in self.visible_devices.split(",")]
        return _num_before_the_first_invalid(names, self.num_in_driver)

    @property
    def what_is_hidden(self) -> str:
        """`CUDA_VISIBLE_DEVICES = '0' shows 1 of 8` where that is so; else ""."""
        if self.num_visible >= self.num_in_driver:
            return ""
        return (
            f"{VISIBLE_DEVICES} = {self.visible_devices!r} shows {self.num_visible} of "
            f"{self.num_in_driver}"
        )


def host_gpus(visible_devices: str | None) -> HostGpus:
    """Of this host; for the meaning of visible_devices see `HostGpus`."""
    return HostGpus(len(list(_IN_DRIVER.glob("*"))), visible_devices)


def _num_before_the_first_invalid(names: Iterable[str], num_in_driver: int) -> int:
    """CUDA reads no further than a name that it does not know, and shows none at all for a repeated one.

    Names are indices, or uuids, whose existence is not looked into.
    """
    known: set[str | int] = set()
    for name in names:
        device = int(name) if name.isdecimal() else name
        if isinstance(device, int):
            valid = device < num_in_driver
        else:
            valid = device.startswith(("GPU-", "MIG-")) and num_in_driver > 0
        if not valid:
            break
        if device in known:
            return 0
        known.add(device)
    return len(known)
