"""`python -m tests.hanging_worker FILE FLAGS…`: a shard worker whose device thread hangs for good in the
next all-reduce once FILE is there, and heeds no abort. It takes the file away, so it hangs once."""

import sys
import time
from pathlib import Path

from torch import Tensor

from shard_worker.__main__ import main
from shard_worker.communicator.shm import ShmCommunicator

_all_reduce = ShmCommunicator.all_reduce


def hang_when_told(trigger: Path) -> None:
    def all_reduce(self: ShmCommunicator, x: Tensor) -> Tensor:
        try:
            trigger.unlink()  # one of the workers that see it can
        except FileNotFoundError:
            return _all_reduce(self, x)
        while True:
            time.sleep(1)

    ShmCommunicator.all_reduce = all_reduce  # type: ignore[method-assign]


if __name__ == "__main__":
    hang_when_told(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
