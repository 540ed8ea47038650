"""`python -m tests.dying_worker FLAGS… PHASE`: a shard worker that is killed when it is to join, to load
or to allocate."""

import os
import signal
import sys
from typing import Any

from shard_worker.__main__ import main
from shard_worker.executor import Executor

PHASES = {"joining": "join", "loading": "load", "allocating": "allocate"}


def die_in(phase: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Executor, PHASES[phase], die)


if __name__ == "__main__":
    *flags, phase = sys.argv[1:]
    die_in(phase)
    sys.exit(main(flags))
