"""This rank among the others: what each part of the model communicates, counted and timed.

A step that is timed is like any other, but that the time of each collective in it is taken.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from shard_worker.communicator import Communicator
from shard_worker.stopwatch import Stopwatch


@dataclass(slots=True)
class OpStats:
    """What one part of the model has communicated by one collective since the group was joined.

    Plain integers, each of which one thread increments: other threads may read them at any time.
    """

    module: str
    operation: str
    """"all_reduce" or "all_gather"."""
    path: str
    """By which way: "shm", "gloo", "nccl" and what else a communicator has."""
    calls: int = 0
    payload_bytes: int = 0
    """Of this rank's inputs."""
    timed_calls: int = 0
    """Those among them that were timed, their bytes and how long they took."""
    timed_bytes: int = 0
    timed_ns: int = 0


@dataclass(frozen=True, slots=True)
class TimedCollective:
    """One call of a collective, from before it to after it on this rank's device.

    That includes waiting for the other ranks to make the same call.
    """

    stats: OpStats
    payload_bytes: int
    duration_ns: int


class CollectiveTimes:
    """The collectives of one step, as they were called, with how long each takes."""

    def __init__(self) -> None:
        self._called: list[tuple[OpStats, int, Stopwatch]] = []

    def start(self, stats: OpStats, x: Tensor) -> Stopwatch:
        """One of x is called now; to be stopped when the call returns."""
        watch = Stopwatch(x.device)
        self._called.append((stats, x.nbytes, watch))
        return watch

    def wait(self) -> list[TimedCollective]:
        """Waits for the device and adds the times to the counters; to be called once."""
        timed = [TimedCollective(stats, size, w.wait_ns()) for stats, size, w in self._called]
        for call in timed:
            call.stats.timed_calls += 1
            call.stats.timed_bytes += call.payload_bytes
            call.stats.timed_ns += call.duration_ns
        return timed


@dataclass(slots=True)
class TensorParallel:
    """This rank's place among the ranks, and what each part of the model communicates there.

    The communicator is renewed with each epoch. The model calls it through `collectives`, which count.
    """

    rank: int
    size: int
    comm: Communicator
    _stats: dict[tuple[str, str, str], OpStats] = field(default_factory=dict)
    _times: CollectiveTimes | None = None

    def collectives(self, module: str) -> "Collectives":
        """What a part of the model calls to communicate, in this epoch and those that follow."""
        return Collectives(self, module)

    def all_stats(self) -> list[OpStats]:
        """Copies of all counters, in the order in which they came up; from any thread."""
        return [replace(stats) for stats in list(self._stats.values())]

    def take_back(self, earlier: Iterable[OpStats]) -> list[OpStats]:
        """Sets the counters back to what `all_stats` said earlier, and gives what came since.

        What is captured in a CUDA graph is counted then, and happens when it is replayed (`count`).
        """
        before = {(stats.module, stats.operation, stats.path): stats for stats in earlier}
        since = []
        for key, stats in self._stats.items():
            old = before.get(key, OpStats(*key))
            calls, payload_bytes = stats.calls - old.calls, stats.payload_bytes - old.payload_bytes
            if calls:
                since.append(OpStats(*key, calls, payload_bytes))
            stats.calls, stats.payload_bytes = old.calls, old.payload_bytes
        return since

    def count(self, happened: Iterable[OpStats]) -> None:
        """Adds to the counters."""
        for more in happened:
            stats = self._stats_of(more.module, more.operation, more.path)
            stats.calls += more.calls
            stats.payload_bytes += more.payload_bytes

    @contextlib.contextmanager
    def timing(self, wanted: bool) -> Iterator[CollectiveTimes]:
        """Within it collectives are timed where that is wanted; one rank makes none."""
        times = CollectiveTimes()
        self._times = times if wanted and self.size > 1 else None
        try:
            yield times
        finally:
            self._times = None

    def called(self, module: str, operation: str, path: str, x: Tensor) -> Stopwatch | None:
        """Counts the collective of x that comes now. What to stop after it, where it is timed."""
        stats = self._stats_of(module, operation, path)
        stats.calls += 1
        stats.payload_bytes += x.nbytes
        return None if self._times is None else self._times.start(stats, x)

    def renew(self, comm: Communicator) -> None:
        """A new epoch: its communicator, and counters that start again."""
        self.comm = comm
        self._stats.clear()

    def forget_stats(self) -> None:
        """Another model is built, with other modules."""
        self._stats.clear()

    def _stats_of(self, module: str, operation: str, path: str) -> OpStats:
        """The counters of one collective of a module, the same until the next epoch."""
        key = module, operation, path
        if (stats := self._stats.get(key)) is None:
            stats = self._stats[key] = OpStats(*key)
        return stats


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives of one part of the model: the one place where they are called, counted and timed.

    The communicator's own say what they do and raise (`Communicator`).
    """

    tp: TensorParallel
    module: str
    """What they are counted for: "model.layers.3", "model.embed_tokens", "sampler"."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, IN PLACE; returns x itself."""
        comm = self.tp.comm
        watch = self.tp.called(self.module, "all_reduce", comm.all_reduce_path(x.nbytes), x)
        whole = comm.all_reduce(x)
        if watch is not None:
            watch.stop()
        return whole

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor | None:
        """residual += the sum over the ranks, IN PLACE -> that, RMS-normalised. None, and nothing done,
        where the communicator has no such operation for x."""
        comm = self.tp.comm
        if (fusing := comm.norm_fusing(x)) is None:
            return None
        watch = self.tp.called(self.module, "all_reduce", comm.all_reduce_path(x.nbytes), x)
        normalised = fusing.all_reduce_rms_norm(x, residual, weight, eps)
        if watch is not None:
            watch.stop()
        return normalised

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """[..., sizes[rank]] -> [..., sum(sizes)], the ranks' side by side. NOT in place."""
        comm = self.tp.comm
        watch = self.tp.called(self.module, "all_gather", comm.all_gather_path, x)
        whole = comm.all_gather(x, sizes)
        if watch is not None:
            watch.stop()
        return whole
