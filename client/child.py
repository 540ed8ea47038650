"""Runs one service as a child that can't outlive its parent: `python -P child.py MODULE ARGUMENTS…`.

It is `python -m MODULE ARGUMENTS…`, and a thread that ends it when stdin does. The parent holds the
other end of that pipe and never writes to it, so that it ends when the parent does, killed or not:
the system closes the pipes of a process that is gone.

Linux could kill the child instead (prctl PR_SET_PDEATHSIG). But that fires when the *thread* that
forked ends, which would rule out starting a cluster from a thread; it is Linux alone; and a worker
that is killed can't leave its group and give back what it shares with the others.

Started as a file and not as a module of `client`, or every child would import the client's packages.
"""

import os
import runpy
import signal
import sys
import threading
import time

STOP_TIMEOUT_S = 5.0
_STDIN = 0


def _end_with_stdin() -> None:
    # os.read and not sys.stdin: a lock of the latter, held here, would make the exit fail.
    while os.read(_STDIN, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # nobody is left for whom requests should finish
    time.sleep(STOP_TIMEOUT_S)
    os._exit(1)  # it hangs, and nobody is left who could kill it


def main() -> None:
    threading.Thread(target=_end_with_stdin, name="parent-watch", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
