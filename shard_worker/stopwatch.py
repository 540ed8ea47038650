"""How long the device takes: a CPU by the clock, a GPU by events among what it has queued."""

import time

import torch

# About 20 ms on a GPU at 2 GHz: more than Python takes to launch a step, operation by operation.
_HOLD_CYCLES = 40_000_000


class Stopwatch:
    """How long the device works from here to `stop`. On a GPU that is not known before it has."""

    def __init__(self, device: torch.device) -> None:
        self._began_ns = time.perf_counter_ns()
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            self._events[0].record()

    def stop(self) -> None:
        self._ended_ns = time.perf_counter_ns()
        if self._events is not None:
            self._events[1].record()

    @property
    def is_done(self) -> bool:
        return self._events is None

    def wait_ns(self) -> int:
        """Waits for the device; the time in nanoseconds."""
        if self._events is None:
            return self._ended_ns - self._began_ns
        started, ended = self._events
        ended.synchronize()
        return int(started.elapsed_time(ended) * 1e6)


def hold_back(device: torch.device) -> None:
    """Lets a GPU wait before what is queued next, so that much of that is there when it begins.

    Launched one by one, small operations run faster than Python launches them: the time between two
    events would be that of the launch.
    """
    if device.type == "cuda":
        torch.cuda._sleep(_HOLD_CYCLES)
