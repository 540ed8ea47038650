"""The worker's way from idle to ready: its group, its weights, its cache and its steps.

Calls are checked and kept in order here, on the event loop; what they do is done by the device thread
(`device_thread.py`).
"""

import asyncio
import enum
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch
from torch import Tensor

from colrow.errors import Aborted, FailedPrecondition, InvalidArgument
from colrow.memory import GraphSizes, MemoryLedger, MemoryUse
from shard_worker import checkpoint, shard
from shard_worker.communicator import (
    Communicator,
    CommunicatorAborted,
    CommunicatorError,
    Link,
    check_wanted,
)
from shard_worker.communicator.peer import PeerCommunicator
from shard_worker.config import WorkerConfig
from shard_worker.device import device_name, device_uuid
from shard_worker.device_thread import DeviceThread
from shard_worker.host import give_memory_back, host_id
from shard_worker.joining import Group, Joiner
from shard_worker.kv_cache import KvCache
from shard_worker.lease import Lease
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_roots import ModelRoots
from shard_worker.model_runner import ModelRunner, Step, StepResult
from shard_worker.partial import Partial, compute_partial
from shard_worker.sampler import Sampler
from shard_worker.shard import LoadRequest, Shard, Source
from shard_worker.step_graphs import GRAPH_SIZES
from shard_worker.tensor_parallel import OpStats, TensorParallel

log = logging.getLogger(__name__)

MAX_EPOCH = 2**63 - 1


class State(enum.Enum):
    """How far the worker is. Each state needs the one before it."""

    IDLE = "idle"
    JOINED = "joined"
    LOADING = "loading"
    LOADED = "loaded"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Description:
    """What the worker says of itself. Bytes everywhere."""

    host_id: str
    pid: int
    device: str
    memory_total: int
    memory_available: int
    state: State
    epoch: int
    """The last one that the worker was in, or tried to be in."""
    group: Group | None
    weight_bytes: int
    kv_cache_bytes: int
    resident_bytes: int
    file_bytes_read: int
    communication: Sequence[OpStats]
    links: Sequence[Link]
    memory: MemoryLedger = field(default_factory=MemoryLedger)
    graph_sizes: GraphSizes = field(default_factory=GraphSizes)
    device_name: str = ""
    device_uuid: str = ""


class Executor:
    """Takes a coordinator's calls, each in the state that it needs, and has the device run them."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        device = torch.device(config.device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
        self._meter = MemoryMeter(device)
        self._device = DeviceThread(device, self._meter)
        self._model_roots = ModelRoots.of(config.model_roots)
        self.lease = Lease(config.lease_s)
        self._state = State.IDLE
        self._last_epoch = 0
        self._abandoned = threading.Event()  # set to end a join or a load that is under way
        self._leaving: asyncio.Task[None] | None = None
        self._group: Group | None = None
        self._tp: TensorParallel | None = None
        self._joiner = Joiner(config, device)
        self._shard: Shard | None = None
        self._runner: ModelRunner | None = None
        self._last_step_id = 0
        self._file_bytes_read = 0

    async def open(self) -> None:
        """Takes the device. InvalidArgument when it is not there, or can't be used as it is set up."""
        device = self._device.device
        if device.type == "cuda" and self._config.expandable_segments is not None:
            variable, value = self._config.expandable_segments
            raise InvalidArgument(
                variable,
                value,
                "memory in expandable segments can't be shared between workers' GPUs; leave "
                f"expandable_segments out for a worker on {device}",
            )
        await self._device.open()

    def describe(self) -> Description:
        """Answers at once, whatever the device does."""
        if self._runner is not None:
            self._device.look_at_peak()
        available, total = self._device.memory()
        return Description(
            host_id=host_id(),
            pid=os.getpid(),
            device=str(self._device.device),
            memory_total=total,
            memory_available=available,
            state=self._state,
            epoch=self._last_epoch,
            group=self._group,
            weight_bytes=self._shard.weight_bytes if self._shard else 0,
            kv_cache_bytes=self._runner.kv_cache.num_bytes if self._runner else 0,
            resident_bytes=psutil.Process().memory_info().rss,
            file_bytes_read=self._file_bytes_read,
            # One rank has nobody to communicate with.
            communication=self._tp.all_stats() if self._tp and self._tp.size > 1 else (),
            links=self._tp.comm.links if self._tp and self._group else (),
            memory=self._ledger(),
            graph_sizes=GRAPH_SIZES if self._captures_graphs else GraphSizes(),
            device_name=device_name(self._device.device),
            device_uuid=device_uuid(self._device.device),
        )

    def _ledger(self) -> MemoryLedger:
        """Of what is there: what was measured may have been given up since."""
        ledger = self._meter.ledger
        if self._runner is None:
            ledger = MemoryLedger(weights=ledger.weights)
        if self._shard is None and self._state is not State.LOADING:
            ledger = replace(ledger, weights=MemoryUse())
        return ledger

    @property
    def _captures_graphs(self) -> bool:
        return self._device.device.type == "cuda" and self._config.cuda_graphs

    async def create_communicator_id(self, transport: str) -> bytes:
        """An id for `join`, made by rank 0 and carried to all ranks by the coordinator.

        InvalidArgument for a transport that is none; Unavailable, with what to install, where this
        worker has not what it takes.
        """

        def create() -> bytes:
            try:
                return self._joiner.create_id(transport)
            except CommunicatorError:
                raise
            except RuntimeError as error:  # of CuPy, or of torch's store
                raise CommunicatorError(f"{transport}: no communicator id: {error}") from error

        return await self._device.run(create)

    async def join(self, group: Group, communicator_id: bytes, timeout_s: float) -> bytes:
        """Joins the other ranks of `group`; weights of the same rank and size stay in memory.

        Returns what other ranks need for `connect_peers`, if that is the transport; else b"".
        """
        if group.epoch <= self._last_epoch:
            raise FailedPrecondition(
                f"epoch = {group.epoch}: this worker has seen epoch {self._last_epoch}",
                reason="STALE_EPOCH",
            )
        if self._group is not None:
            raise FailedPrecondition(
                f"epoch = {group.epoch}: still in the group of epoch {self._group.epoch}; "
                "abort it first"
            )
        if group.epoch > MAX_EPOCH:  # else there would be none after it
            raise InvalidArgument("epoch", group.epoch, f"is greater than {MAX_EPOCH}")
        if not 0 <= group.rank < group.size:
            raise InvalidArgument("rank", group.rank, f"the size is {group.size}")
        if not 0 <= timeout_s < float("inf"):  # also refuses NaN
            raise InvalidArgument("timeout_s", timeout_s, "is no time to wait")
        self._last_epoch, self._group = group.epoch, group
        self._abandoned = abandoned = threading.Event()
        try:
            comm, offer = await self._device.run(
                lambda: self._join(group, communicator_id, timeout_s, abandoned),
                unwanted=lambda made: made[0].close(),
            )
        except BaseException:
            # Also when the caller is gone: nobody waits for the others then.
            abandoned.set()
            if self._group is group:
                self._group = None
            raise
        if self._group is not group:
            self._device.queue(comm.close)
            raise Aborted(f"epoch {group.epoch} was aborted while it formed")
        if self._tp and (self._tp.rank, self._tp.size) == (group.rank, group.size):
            self._tp.renew(comm)
        else:
            self._tp, self._shard = TensorParallel(group.rank, group.size, comm), None
        self._state = State.JOINED
        log.info("joined epoch %d as rank %d of %d over %s", *_fields(group))
        return offer

    def _join(
        self, group: Group, communicator_id: bytes, timeout_s: float, abandoned: threading.Event
    ) -> tuple[Communicator, bytes]:
        comm = self._joiner.join(group, communicator_id, timeout_s, abandoned)
        try:
            check_wanted(abandoned)
            return comm, self._joiner.offer(comm)
        except BaseException:
            comm.close()
            raise

    async def connect_peers(
        self, epoch: int, offers: Sequence[bytes], timeout_s: float
    ) -> Sequence[Link]:
        """Tries how the ranks reach each other; `offers[r]` is what rank r's `join` returned."""
        group = self._check(epoch, State.JOINED)
        assert self._tp is not None
        comm = self._tp.comm
        if not isinstance(comm, PeerCommunicator):
            raise FailedPrecondition(f"the group's transport is {group.transport}, not peer")
        if len(offers) != group.size:
            raise InvalidArgument("peer_memories", len(offers), f"the size is {group.size}")
        if not 0 <= timeout_s < float("inf"):
            raise InvalidArgument("timeout_s", timeout_s, "is no time to wait")
        await self._device.run(lambda: comm.connect(offers, timeout_s))
        for link in comm.links:
            log.info(
                "rank %d is reached by %s%s", link.rank, link.path, link.note and ": " + link.note
            )
        return comm.links

    async def load(
        self,
        epoch: int,
        request: LoadRequest,
        progress: Callable[[checkpoint.LoadProgress], None],
    ) -> int:
        """Loads this rank's shard and returns its bytes; `progress` is called on the event loop.

        A shard that is held since an earlier epoch and is still the same is not read again.
        """
        self._model_roots.check(request.model_path)
        try:
            exists = request.model_path.is_dir()
        except OSError:  # a name that is too long, or a way that is closed
            exists = False
        if not exists:
            raise InvalidArgument(
                "model_path", str(request.model_path), "is no folder on this worker"
            )
        group = self._check(epoch, State.JOINED)
        if len(request.ranks) != group.size:
            raise InvalidArgument("ranks", len(request.ranks), f"the group has {group.size} ranks")
        loop = asyncio.get_running_loop()
        abandoned = self._abandoned

        def report(now: checkpoint.LoadProgress) -> None:
            if abandoned.is_set():
                raise CommunicatorAborted(f"epoch {epoch} was aborted while it loaded")
            loop.call_soon_threadsafe(progress, now)

        self._state = State.LOADING
        try:
            loaded = await self._load(group, request, report)
        except BaseException:
            if self._group is group:
                self._state = State.JOINED
            raise
        self._shard, self._state = loaded, State.LOADED
        log.info("loaded %d bytes from %s", loaded.weight_bytes, request.model_path)
        return loaded.weight_bytes

    async def _load(
        self,
        group: Group,
        request: LoadRequest,
        report: Callable[[checkpoint.LoadProgress], None],
    ) -> Shard:
        source = await self._device.run(lambda: Source.open(request, group.rank, self._model_roots))
        self._check(group.epoch, State.LOADING)
        self._file_bytes_read += source.bytes_read
        if self._shard is not None and self._shard.is_of(source):
            return self._shard
        self._shard = None  # its memory is free before the new one is allocated
        tp = self._tp
        assert tp is not None
        tp.forget_stats()
        loaded = await self._device.run(
            lambda: shard.load(source, tp, self._device.device, self._meter, report)
        )
        await self._device.measure_memory()
        self._file_bytes_read += loaded.bytes_read
        self._check(group.epoch, State.LOADING)
        return loaded

    async def allocate(
        self,
        epoch: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        *,
        graph_bytes: int | None = None,
        workspace_bytes: int | None = None,
    ) -> int:
        """Allocates the KV cache and returns its bytes; forgets all sequences and starts at step 1.

        max_model_len: the longest that a sequence gets, in tokens; 0 is what the cache holds.
        graph_bytes, workspace_bytes: what is planned beside, for the ledger.
        """
        self._check(epoch, State.LOADED)
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise InvalidArgument(name, value, "is not positive")
        most = min(num_blocks, -(-max_model_len // block_size) or num_blocks)
        planned = (graph_bytes, workspace_bytes)
        held, tp = self._shard, self._tp
        assert held is not None and tp is not None
        runner = await self._device.run(
            lambda: self._allocate(held, tp, num_blocks, block_size, most, planned),
            unwanted=ModelRunner.close,
        )
        try:
            self._check(epoch, State.LOADED)
        except FailedPrecondition:
            self._device.queue(runner.close)
            raise
        self._runner, self._last_step_id = runner, 0
        self._state = State.READY
        await self._device.measure_memory()
        return runner.kv_cache.num_bytes

    def _allocate(
        self,
        held: Shard,
        tp: TensorParallel,
        num_blocks: int,
        block_size: int,
        max_blocks: int,
        planned: tuple[int | None, int | None],
    ) -> ModelRunner:
        device = self._device.device
        self._meter.allocating()
        cache = KvCache.allocate(
            num_layers=held.model.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=held.model.num_kv_heads,
            head_dim=held.model.head_dim,
            dtype=held.tensors.dtype,
            device=device,
        )
        head = held.model.lm_head
        sampler = Sampler(tp, head.rank_sizes, head.start, device)
        self._meter.allocated(cache.num_bytes, *planned)
        runner = ModelRunner(
            held.model,
            sampler,
            cache,
            held.vocab_size,
            device=device,
            max_blocks=max_blocks if self._captures_graphs else None,
            meter=self._meter,
        )
        self._meter.prepared()
        return runner

    def execute(self, epoch: int, step: Step) -> "asyncio.Future[StepResult]":
        """Queues a step behind those before it. FailedPrecondition on a gap or a stale epoch."""
        self._check(epoch, State.READY)
        if step.step_id != self._last_step_id + 1:
            raise FailedPrecondition(
                f"step_id = {step.step_id}: the next step is {self._last_step_id + 1}",
                reason="STEP_GAP",
            )
        self._last_step_id = step.step_id
        assert self._runner is not None and self._tp is not None
        return asyncio.ensure_future(self._execute(self._runner, self._tp.comm, step))

    async def _execute(self, runner: ModelRunner, comm: Communicator, step: Step) -> StepResult:
        launched = await self._device.run(lambda: runner.launch(step))

        def read() -> StepResult:
            result = launched.result()
            if (failure := comm.failure()) is not None:
                raise failure
            return result

        if launched.is_done:
            return read()
        return await self._device.read(read)

    async def compute_partial(
        self, epoch: int, module: str, activation: Tensor, max_bytes: int
    ) -> tuple[int, Partial]:
        """One module alone, between steps -> this rank and its output, of at most `max_bytes`."""
        group = self._check(epoch, State.LOADED, State.READY)
        held, device = self._shard, self._device.device
        assert held is not None
        dtype = held.tensors.dtype if activation.is_floating_point() else activation.dtype

        def compute() -> Partial:
            x = activation.to(device, dtype)
            partial = compute_partial(held.model, held.tensors.layout, module, x, max_bytes)
            return replace(partial, output=partial.output.cpu())

        partial = await self._device.run(compute)
        self._check(epoch, State.LOADED, State.READY)  # or it is of no group any more
        return group.rank, partial

    async def abort(self, epoch: int) -> None:
        """Leaves the group: what waits in a collective fails, weights stay, sequences go."""
        if self._group is None:
            return
        if epoch != self._group.epoch:
            raise FailedPrecondition(
                f"epoch = {epoch}: the group's is {self._group.epoch}", reason="STALE_EPOCH"
            )
        log.info("aborting epoch %d", epoch)
        self._abandoned.set()
        runner, self._runner = self._runner, None
        self._group = None
        self._state = State.IDLE
        # Whoever asked for it may be gone before it is done.
        await asyncio.shield(self._leave(runner))

    def _leave(self, runner: ModelRunner | None) -> "asyncio.Task[None]":
        """Ends what the device runs, and gives up the communicator and the runner."""
        comm = self._tp.comm if self._tp else None
        if comm is not None:
            comm.abort()

        def give_up() -> None:
            # First the CUDA graphs, which hold the communicator.
            if runner is not None:
                runner.close()
            if comm is not None:
                comm.close()
            self._meter.left()

        self._leaving = asyncio.create_task(self._device.end(give_up, self._config.abort_timeout_s))
        return self._leaving

    async def keep_lease(self) -> None:
        """Frees the device whenever the lease has ended; returns never."""
        while True:
            await self.lease.ended()
            if self._group is not None or self._shard is not None:
                log.warning(
                    "no coordinator has called for %g s: freeing the device", self.lease.duration_s
                )
                await self._free()
            self.lease.renew()

    async def _free(self) -> None:
        """Leaves the group and gives up the weights, unless a coordinator comes meanwhile."""
        if self._group is not None:
            await self.abort(self._group.epoch)
        if self._group is not None or not self.lease.has_ended:
            return
        self._tp = self._shard = None

        def free() -> None:
            give_memory_back()
            self._joiner.free()

        await self._device.run(free)
        await self._device.measure_memory()

    async def close(self) -> None:
        """Frees the device and ends its thread; the whole process where that hangs."""
        self._abandoned.set()
        await self._leave(self._runner)
        self._device.close()

    def _check(self, epoch: int, *allowed: State) -> Group:
        if self._group is None or epoch != self._group.epoch:
            now = f"the group's is {self._group.epoch}" if self._group else "there is no group"
            raise FailedPrecondition(f"epoch = {epoch}: {now}", reason="STALE_EPOCH")
        if self._state not in allowed:
            wanted = " or ".join(state.value for state in allowed)
            raise FailedPrecondition(
                f"the worker is {self._state.value}; this call needs it {wanted}",
                metadata={"state": self._state.value},
            )
        return self._group


def _fields(group: Group) -> tuple[int, int, int, str]:
    return group.epoch, group.rank, group.size, group.transport
