"""What the coordinator knows of a worker: what it says of itself, how far it is, what went wrong."""

import enum
import time
from dataclasses import dataclass, field

from colrow.errors import AnswerTooLarge, DeadlineExceeded, ServiceError, Unavailable
from colrow.memory import GraphSizes, MemoryLedger

UNREACHABLE = "WORKER_UNREACHABLE"
STREAM_ENDED = "STREAM_ENDED"
STALE_EPOCH = "STALE_EPOCH"  # of a worker that is in a group of another epoch, or in none

_LOST = {UNREACHABLE, STREAM_ENDED, Unavailable.reason, DeadlineExceeded.reason}
"""Reasons of errors that no worker sent: nobody was there to do so. A worker that sends one is there."""


def _is_of_the_call(error: ServiceError) -> bool:
    """It says something of what a user has asked for, and nothing of the worker."""
    return error.code in ("INVALID_ARGUMENT", "NOT_FOUND") or error.reason == AnswerTooLarge.reason


class Phase(enum.Enum):
    """How far a worker is on its way into the group, as the coordinator sees it."""

    CONNECTING = "connecting"
    """It has not answered yet."""
    WAITING = "waiting"
    """It answers, has done what it was asked for, and waits for the others."""
    JOINING = "joining"
    LOADING = "loading"
    ALLOCATING = "allocating"
    SERVING = "serving"
    LOST = "lost"
    """It was there and does not answer any more."""


@dataclass(frozen=True, slots=True)
class OpStats:
    """Calls of one collective by one part of the model, and the bytes that a rank put into them.

    `path` is by which way they went. Some of them were timed; that includes waiting for other ranks.
    """

    operation: str
    module: str
    path: str
    calls: int
    payload_bytes: int
    timed_calls: int = 0
    timed_bytes: int = 0
    timed_us: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """How a rank reaches the rank `rank`: "peer" or "nccl", and why not by "peer"."""

    rank: int
    path: str
    note: str


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """What a worker says of itself; bytes everywhere."""

    version: str
    host_id: str
    pid: int
    device: str
    memory_total_bytes: int
    memory_available_bytes: int
    state: str
    epoch: int
    rank: int
    size: int
    transport: str | None
    weight_bytes: int
    kv_cache_bytes: int
    resident_bytes: int
    file_bytes_read: int
    communication: tuple[OpStats, ...]
    supported_architectures: tuple[str, ...]
    links: tuple[Link, ...] = ()
    memory: MemoryLedger = field(default_factory=MemoryLedger)
    graph_sizes: GraphSizes = field(default_factory=GraphSizes)
    device_name: str = ""
    device_uuid: str = ""
    """Of a GPU; the same wherever it is seen."""

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far one worker is with loading."""

    bytes_read: int
    bytes_to_read: int


@dataclass(slots=True)
class WorkerStatus:
    """A worker as the coordinator knows it. Times are of the monotonic clock."""

    address: str
    rank: int
    description: WorkerDescription | None = None
    progress: LoadProgress = LoadProgress(0, 0)
    last_step_id: int = 0
    """The last step that it completed in its last epoch."""
    busy_us: int = 0
    """How long it has executed steps."""
    phase: Phase = Phase.CONNECTING
    phase_since: float = field(default_factory=time.monotonic)
    heard_at: float | None = None
    error: str = ""
    """The last thing that went wrong, and where the worker was then."""
    error_at: float = 0.0
    num_losses: int = 0
    num_restarts: int = 0

    @property
    def name(self) -> str:
        return f"worker {self.rank} ({self.address})"

    @property
    def where(self) -> str:
        """Who it is and how far: the beginning of what is said when something goes wrong with it."""
        return f"{self.name}, {self._progress}"

    @property
    def _progress(self) -> str:
        after = f" after step {self.last_step_id}" if self.phase is Phase.SERVING else ""
        return f"{self.phase.value}{after}"

    def enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase, self.phase_since = phase, time.monotonic()

    def heard(self, description: WorkerDescription) -> None:
        """It has answered. One that was lost waits to be joined, and so does another in its place."""
        before, self.description = self.description, description
        self.heard_at = time.monotonic()
        # In a container a new process may have the same id; but it has seen no epoch.
        is_another = before is not None and (
            description.pid != before.pid or description.epoch < before.epoch
        )
        self.num_restarts += is_another
        if is_another or self.phase in (Phase.CONNECTING, Phase.LOST):
            self.enter(Phase.WAITING)

    def failed(self, error: ServiceError) -> None:
        """A call to it failed. While it is lost that is nothing new: what came first says more."""
        if self.phase is Phase.LOST or _is_of_the_call(error):
            return
        self.note(error.message)
        # One that was never there is no loss: it is waited for.
        if error.reason in _LOST and self.phase is not Phase.CONNECTING:
            self.num_losses += 1
            self.enter(Phase.LOST)

    def note(self, problem: str) -> None:
        """Something went wrong that it is to be named for."""
        self.error, self.error_at = f"{self._progress}: {problem}", time.monotonic()
