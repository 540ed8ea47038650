"""`python -m tests.broken_worker FILE [--once] FLAGS…`: a shard worker whose device breaks in the next
all-reduce once FILE is there, as a GPU does by an illegal access: it refuses every later call as well.

It takes FILE away, so that one of the workers that see it breaks. With `--once` only that call fails.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from shard_worker.__main__ import main
from shard_worker.communicator.shm import ShmCommunicator
from shard_worker.device_thread import DeviceThread

_all_reduce = ShmCommunicator.all_reduce


def refuse() -> None:
    raise torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable Device-side assertions.\n"
    )


def break_when_told(trigger: Path, *, once: bool) -> None:
    def all_reduce(self: ShmCommunicator, x: Tensor) -> Tensor:
        try:
            trigger.unlink()
        except FileNotFoundError:
            return _all_reduce(self, x)
        if not once:
            DeviceThread.synchronize = lambda self: refuse()  # type: ignore[method-assign]
        refuse()
        return x

    ShmCommunicator.all_reduce = all_reduce  # type: ignore[method-assign]


if __name__ == "__main__":
    trigger, *flags = sys.argv[1:]
    once = "--once" in flags
    break_when_told(Path(trigger), once=once)
    sys.exit(main([flag for flag in flags if flag != "--once"]))
