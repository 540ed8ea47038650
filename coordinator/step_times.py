"""What the collectives of a number of steps take, as the workers time them."""

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace

from colrow.errors import ServiceError
from coordinator.scheduler import Step, StepOutput


@dataclass(slots=True)
class CommunicationTime:
    """A part of the model's calls of one collective by one path, in all steps together.

    `own_ns` takes each call as long as on the rank where it was shortest. The last rank to call waits
    for nobody, so that is what the call costs by itself. `rank_ns` is what each rank took, with waiting.
    """

    operation: str
    module: str
    path: str
    rank_ns: list[int]
    calls: int = 0
    payload_bytes: int = 0
    """Of the largest input among the ranks."""
    own_ns: int = 0


@dataclass(slots=True, eq=False)
class StepTimes:
    """Of `num_steps` steps: marked when they are sent, summed up when they are answered."""

    num_steps: int
    num_tokens: int = 0
    """That they computed."""
    steps_us: int = 0
    """How long they took, each as long as on the slowest rank."""
    _times: dict[tuple[str, str, str], CommunicationTime] = field(default_factory=dict)
    _marked: deque[int] = field(default_factory=deque)
    _num_marked: int = 0
    _num_taken: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _error: ServiceError | None = None

    @property
    def communication(self) -> list[CommunicationTime]:
        """In the order in which the collectives are called; with one rank there are none."""
        return list(self._times.values())

    @property
    def num_wanted(self) -> int:
        """Steps that are still to be marked."""
        return self.num_steps - self._num_marked

    def mark(self, step: Step) -> Step:
        """The step as it is to be sent: one that is timed."""
        assert self.num_wanted
        self._num_marked += 1
        self._marked.append(step.step_id)
        return replace(step, times_collectives=True)

    def take(self, step: Step, output: StepOutput) -> None:
        """What came of a step, which need not be one of these. Steps are answered in order."""
        if not self._marked or self._marked[0] != step.step_id:
            return
        self._marked.popleft()
        self._num_taken += 1
        self.num_tokens += sum(chunk.num_tokens for chunk in step.chunks)
        self.steps_us += max(times.duration_us for times in output.by_rank)
        for calls in zip(*(times.collectives for times in output.by_rank), strict=True):
            first = calls[0]
            key = first.operation, first.module, first.path
            if (time := self._times.get(key)) is None:
                time = self._times[key] = CommunicationTime(*key, [0] * len(calls))
            time.calls += 1
            time.payload_bytes += max(call.payload_bytes for call in calls)
            time.own_ns += min(call.duration_ns for call in calls)
            for rank, call in enumerate(calls):
                time.rank_ns[rank] += call.duration_ns
        if self._num_taken == self.num_steps:
            self._ended.set()

    def fail(self, error: ServiceError) -> None:
        """The steps will not all be answered."""
        self._error = error
        self._ended.set()

    async def wait(self) -> None:
        """Until all steps were answered; raises what it failed with."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
