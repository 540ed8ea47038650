"""The workers as one thing: joined, loaded, stepped and aborted together.

Nothing here knows gRPC: a `Worker` is what `worker_client` makes of a stub. An error of one worker is
raised with its rank and address in it.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from colrow import MAX_PEERS, __version__
from colrow.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ServiceError,
    Unavailable,
)
from colrow.memory import MemoryLedger
from coordinator.scheduler import RankTimes, Step, StepOutput
from coordinator.shard_plan import ShardPlan
from coordinator.worker_status import (
    STALE_EPOCH,
    Link,
    LoadProgress,
    Phase,
    WorkerDescription,
    WorkerStatus,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

JOIN_TIMEOUT_S = 30.0
HEARTBEAT_INTERVAL_S = 0.5
TAKEN = "WORKER_TAKEN"


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """One worker's answer to a step, and how long it took."""

    step_id: int
    output: StepOutput
    times: RankTimes


@dataclass(frozen=True, slots=True)
class Partial:
    """One rank's partial output of a module; `columns` [start, stop) for "concat"."""

    rank: int
    output: np.ndarray
    combine: str
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """What a worker answers to `join`: the group's communicator id, and how to open its memory."""

    communicator_id: bytes
    peer_memory: bytes = b""


class Worker(Protocol):
    """One worker's side of the contract. Every method raises `ServiceError`."""

    address: str

    async def describe(self, timeout_s: float) -> WorkerDescription: ...
    async def join(
        self,
        *,
        epoch: int,
        rank: int,
        size: int,
        transport: str,
        communicator_id: bytes,
        timeout_s: float,
    ) -> Joined: ...
    async def connect_peers(
        self, *, epoch: int, peer_memories: Sequence[bytes], timeout_s: float
    ) -> tuple[Link, ...]: ...
    async def load(
        self,
        *,
        epoch: int,
        folder: Path,
        config_json: str,
        plan: ShardPlan,
        load_format: str,
        progress: Callable[[LoadProgress], None],
    ) -> int: ...
    async def allocate(
        self,
        *,
        epoch: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        planned: MemoryLedger,
    ) -> int: ...
    async def compute_partial(
        self, *, epoch: int, module: str, activation: np.ndarray, max_output_bytes: int
    ) -> Partial: ...
    async def abort(self, *, epoch: int, timeout_s: float) -> None: ...
    def open_steps(self) -> None: ...
    def encode(self, epoch: int, step: Step) -> bytes:
        """A step as every worker is to be sent it."""

    async def send(self, message: bytes) -> None: ...
    async def receive(self) -> StepAnswer: ...
    async def close(self) -> None: ...


class ShardGroup:
    """`workers[r]` is rank r. `epoch` counts the lives of the group; 0 is before the first."""

    def __init__(self, workers: Sequence[Worker], *, step_timeout_s: float) -> None:
        self.workers = tuple(workers)
        self.statuses = [WorkerStatus(w.address, rank) for rank, w in enumerate(self.workers)]
        self.epoch = 0
        self._last_epoch = 0  # also of those that did not come to be
        self.transport: str | None = None
        self._step_timeout_s = step_timeout_s

    @property
    def size(self) -> int:
        return len(self.workers)

    async def _all(
        self,
        call: Callable[[int, Worker], Awaitable[T]],
        ranks: Sequence[int] | None = None,
    ) -> list[T]:
        """One call to every worker, or to `ranks`, at a time; the first error, with who raised it."""

        async def guarded(rank: int) -> T:
            status, worker = self.statuses[rank], self.workers[rank]
            try:
                return await call(rank, worker)
            except ServiceError as error:
                where = status.where
                status.failed(error)
                error.message = f"{where}: {error.message}"
                error.args = (error.message,)
                error.metadata |= {"rank": str(rank), "worker": worker.address}
                raise

        asked = range(self.size) if ranks is None else ranks
        tasks = [asyncio.ensure_future(guarded(rank)) for rank in asked]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            # Of the others nobody would hear.
            for task in tasks:
                task.cancel()

    async def _in_phase(
        self,
        phase: Phase,
        call: Callable[[int, Worker], Awaitable[T]],
        ranks: Sequence[int] | None = None,
    ) -> list[T]:
        """`_all`, with every worker in `phase` until it has answered."""

        async def one(rank: int, worker: Worker) -> T:
            self.statuses[rank].enter(phase)
            answer = await call(rank, worker)
            self.statuses[rank].enter(Phase.WAITING)
            return answer

        return await self._all(one, ranks)

    async def describe(self, timeout_s: float) -> list[WorkerDescription]:
        """What every worker says; also kept in `statuses`. Waits for those that still start."""

        async def one(rank: int, worker: Worker) -> WorkerDescription:
            description = await worker.describe(timeout_s)
            self.statuses[rank].heard(description)
            return description

        return await self._all(one)

    async def refresh(self, timeout_s: float) -> None:
        """Brings `statuses` up to date; a worker that does not answer keeps its last one."""

        async def one(rank: int, worker: Worker) -> None:
            try:
                self.statuses[rank].heard(await worker.describe(timeout_s))
            except ServiceError as error:
                log.debug("worker %d (%s): %s", rank, worker.address, error)

        await asyncio.gather(*(one(rank, worker) for rank, worker in enumerate(self.workers)))

    async def watch(self, timeout_s: float) -> None:
        """Asks every worker for a sign of life, again and again; returns never.

        Unavailable, naming the worker, when one does not answer within `timeout_s` or has left the
        group, as one does that was restarted. FailedPrecondition as `check_not_taken` raises it.
        """

        async def one(rank: int, worker: Worker) -> None:
            while True:
                description = await worker.describe(timeout_s)
                self.statuses[rank].heard(description)
                self.check_not_taken()
                if (description.epoch, description.size) != (self.epoch, self.size):
                    raise Unavailable("has left the group", reason="WORKER_LEFT")
                await asyncio.sleep(HEARTBEAT_INTERVAL_S)

        await self._all(one)

    def check_not_taken(self) -> None:
        """FailedPrecondition when a worker has seen an epoch that is none of ours.

        Another coordinator leads it then. The one that came last has it: taking it back would go on
        for ever.
        """
        for status in self.statuses:
            if status.description is not None and status.description.epoch > self._last_epoch:
                raise FailedPrecondition(
                    f"{status.name} was taken by another coordinator",
                    reason=TAKEN,
                    metadata={"rank": str(status.rank), "worker": status.address},
                )

    def check_versions(self) -> None:
        """FailedPrecondition when a worker is of another version than the coordinator."""
        for status in self.statuses:
            assert status.description is not None
            if status.description.version != __version__:
                raise FailedPrecondition(
                    f"{status.name}: version = "
                    f"{status.description.version!r}: the coordinator is {__version__!r}; "
                    "install the same version on both",
                    reason="VERSION_MISMATCH",
                    metadata={"rank": str(status.rank), "worker": status.address},
                )

    def choose_transport(self, wanted: str | None) -> str:
        """Between GPUs peer memory where all ranks share a host, else NCCL; between CPUs shared memory,
        else Gloo.

        `wanted` decides first. FailedPrecondition where the workers can't use it.
        """
        self._check_devices()
        descriptions = [status.description for status in self.statuses if status.description]
        on_gpu = {description.is_gpu for description in descriptions}
        if self.size == 1:
            return "single"
        usable = ("peer", "nccl") if True in on_gpu else ("shm", "gloo")
        if wanted not in (None, *usable):
            device = "GPUs" if True in on_gpu else "CPUs"
            raise FailedPrecondition(
                f"transport = {wanted!r}: the workers are on {device}; it can be "
                f"{' or '.join(usable)}"
            )
        within_host, anywhere = usable
        hosts = {description.host_id for description in descriptions}
        if wanted == within_host and len(hosts) > 1:
            raise FailedPrecondition(
                f"transport = {wanted!r}: the workers are on {len(hosts)} hosts that share no memory"
            )
        if wanted == "peer" and self.size > MAX_PEERS:
            raise FailedPrecondition(f"transport = 'peer': {self.size} ranks are over {MAX_PEERS}")
        is_within = len(hosts) == 1 and not (within_host == "peer" and self.size > MAX_PEERS)
        return wanted or (within_host if is_within else anywhere)

    def _check_devices(self) -> None:
        """FailedPrecondition where some are on GPUs and others on CPUs, or two on one GPU."""
        devices = [(s, s.description) for s in self.statuses if s.description is not None]
        if len({description.is_gpu for _, description in devices}) > 1:
            listed = ", ".join(f"{s.name}: {description.device}" for s, description in devices)
            raise FailedPrecondition(f"workers on GPUs and on CPUs can't be one group ({listed})")
        owners: dict[str, WorkerStatus] = {}
        for status, description in devices:
            if not description.device_uuid:
                continue
            owner = owners.setdefault(description.device_uuid, status)
            if owner is not status:
                used = {d.device for _, d in devices if d.host_id == description.host_id}
                free = next(name for n in itertools.count() if (name := f"cuda:{n}") not in used)
                raise FailedPrecondition(
                    f"{owner.name} and {status.name} are on the same GPU, {description.device} "
                    f"({description.device_name}, {description.device_uuid}); start one of them "
                    f"with --device {free}",
                    reason="GPU_SHARED",
                )

    async def join(self, transport: str) -> None:
        """Forms a group of a new epoch, with a communicator id that rank 0 makes.

        Where that fails some may have joined already: `abort` has them leave.
        """
        seen = [status.description.epoch for status in self.statuses if status.description]
        epoch = self._last_epoch = max([self._last_epoch, *seen]) + 1
        # A worker may still be in the group of a coordinator that is gone.
        await self._all(self._leave_old_group)

        async def one(rank: int, worker: Worker, communicator_id: bytes) -> Joined:
            return await worker.join(
                epoch=epoch,
                rank=rank,
                size=self.size,
                transport=transport,
                communicator_id=communicator_id,
                timeout_s=JOIN_TIMEOUT_S,
            )

        communicator_id = b""
        if transport != "single":
            [made] = await self._in_phase(
                Phase.JOINING, lambda rank, worker: one(rank, worker, b""), ranks=(0,)
            )
            communicator_id = made.communicator_id
        joined = await self._in_phase(
            Phase.JOINING, lambda rank, worker: one(rank, worker, communicator_id)
        )
        if transport == "peer":
            transport = await self._connect_peers(epoch, [each.peer_memory for each in joined])
        self.epoch, self.transport = epoch, transport

    async def _connect_peers(self, epoch: int, peer_memories: Sequence[bytes]) -> str:
        """The transport that it comes to: where one rank can't reach another, nccl for all."""
        links = await self._in_phase(
            Phase.JOINING,
            lambda _, worker: worker.connect_peers(
                epoch=epoch, peer_memories=peer_memories, timeout_s=JOIN_TIMEOUT_S
            ),
        )
        refused = [(rank, link) for rank, own in enumerate(links) for link in own if link.note]
        for rank, link in refused:
            log.warning("rank %d reaches rank %d by %s: %s", rank, link.rank, link.path, link.note)
        return "nccl" if refused else "peer"

    async def _leave_old_group(self, rank: int, worker: Worker) -> None:
        description = self.statuses[rank].description
        if description is not None and description.size:
            await worker.abort(epoch=description.epoch, timeout_s=JOIN_TIMEOUT_S)

    async def load(
        self,
        folder: Path,
        config_json: str,
        plan: ShardPlan,
        load_format: str,
        changed: Callable[[], None],
    ) -> None:
        """Every worker loads its shard; `changed` is called when `statuses` show progress.

        Internal when a worker holds other bytes than the plan says.
        """

        async def one(rank: int, worker: Worker) -> int:
            def progress(now: LoadProgress) -> None:
                self.statuses[rank].progress = now
                changed()

            return await worker.load(
                epoch=self.epoch,
                folder=folder,
                config_json=config_json,
                plan=plan,
                load_format=load_format,
                progress=progress,
            )

        held = await self._in_phase(Phase.LOADING, one)
        for shard, num_bytes in zip(plan.ranks, held, strict=True):
            if num_bytes != shard.weight_bytes:
                raise Internal(
                    f"worker {shard.rank} holds {num_bytes} bytes, the plan says "
                    f"{shard.weight_bytes}"
                )

    async def allocate(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        planned: Sequence[MemoryLedger],
    ) -> None:
        """Every worker allocates the KV cache; then steps can be sent.

        `planned` has by rank what is reckoned with beside the cache.
        """
        await self._in_phase(
            Phase.ALLOCATING,
            lambda rank, worker: worker.allocate(
                epoch=self.epoch,
                num_blocks=num_blocks,
                block_size=block_size,
                max_model_len=max_model_len,
                planned=planned[rank],
            ),
        )
        for worker, status in zip(self.workers, self.statuses, strict=True):
            worker.open_steps()
            status.last_step_id = 0
            status.enter(Phase.SERVING)

    async def send(self, step: Step) -> None:
        """Hands a step to every worker without waiting for its result."""
        # Made once: of many sequences that takes as long as a good part of a step of a GPU.
        message = self.workers[0].encode(self.epoch, step)
        await self._all(lambda rank, worker: worker.send(message))

    async def receive(self) -> StepOutput:
        """What the oldest step gave that was not received.

        All ranks must have sampled the same tokens; rank 0 alone sends log-probabilities.
        DeadlineExceeded names the ranks that lag.
        """

        async def one(rank: int, worker: Worker) -> StepAnswer:
            answer = await worker.receive()
            status = self.statuses[rank]
            status.last_step_id = answer.step_id
            status.busy_us += answer.times.duration_us
            return answer

        try:
            async with asyncio.timeout(self._step_timeout_s):
                answers = await self._all(one)
        except TimeoutError as error:
            least = min(status.last_step_id for status in self.statuses)
            late = [status for status in self.statuses if status.last_step_id == least]
            problem = f"no answer to step {least + 1} within {self._step_timeout_s:g} s"
            for status in late:
                status.note(problem)
            raise DeadlineExceeded(
                f"{' and '.join(status.where for status in late)}: {problem}",
                reason="STEP_TIMEOUT",
                metadata={"rank": ",".join(str(status.rank) for status in late)},
            ) from error
        first = answers[0].output
        for rank, answer in enumerate(answers):
            if answer.output.tokens != first.tokens:
                raise Internal(
                    f"worker {rank} sampled {answer.output.tokens}, worker 0 {first.tokens}: the "
                    "ranks disagree",
                    reason="RANKS_DISAGREE",
                )
        return replace(first, by_rank=tuple([answer.times for answer in answers]))

    async def compute_partial(
        self, module: str, activation: np.ndarray, max_output_bytes: int
    ) -> list[Partial]:
        """Every rank's partial output of one module; AnswerTooLarge where one takes more than that."""
        return await self._all(
            lambda rank, worker: worker.compute_partial(
                epoch=self.epoch,
                module=module,
                activation=activation,
                max_output_bytes=max_output_bytes,
            )
        )

    async def abort(self, timeout_s: float = 2.0) -> None:
        """Ends the last epoch, also one that did not come to be, on every worker that can be reached.

        Weights stay loaded.
        """
        if not self._last_epoch:
            return

        async def one(rank: int, worker: Worker) -> None:
            status = self.statuses[rank]
            try:
                await worker.abort(epoch=self._last_epoch, timeout_s=timeout_s)
            except ServiceError as error:
                log.warning("%s: abort: %s", status.where, error)
                # One that is in a group of another epoch has left this one, as it should.
                if error.reason != STALE_EPOCH:
                    status.failed(error)
                    return
            if status.phase is not Phase.CONNECTING:
                status.enter(Phase.WAITING)

        await asyncio.gather(*(one(rank, worker) for rank, worker in enumerate(self.workers)))

    async def close(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self.workers))
