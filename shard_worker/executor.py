"""The one thread that owns the device, and the worker's way from idle to ready.

Everything that computes, allocates or communicates runs on the device thread, in the order in which
it was asked for. The event loop only asks and waits, so a collective that hangs never blocks health
checks or `abort`.
"""

import asyncio
import contextlib
import ctypes
import enum
import faulthandler
import gc
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from colrow.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from colrow.memory import GraphSizes, MemoryLedger, MemoryUse
from shard_worker import checkpoint, cuda_libraries, models
from shard_worker.communicator import (
    Communicator,
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorTimeout,
    Link,
)
from shard_worker.communicator.peer import PeerCommunicator
from shard_worker.config import WorkerConfig
from shard_worker.device import device_name, device_uuid
from shard_worker.joining import Group, Joiner
from shard_worker.kv_cache import KvCache
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_roots import ModelRoots
from shard_worker.model_runner import ModelRunner, Step, StepResult
from shard_worker.partial import Partial, compute_partial
from shard_worker.sampler import Sampler
from shard_worker.sharding import Parameter, ShardLayout, ShardTensors
from shard_worker.step_graphs import GRAPH_SIZES
from shard_worker.tensor_parallel import OpStats, TensorParallel

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_HUNG = 70
"""The exit code of a worker whose device thread hangs."""
MAX_EPOCH = 2**63 - 1
MAX_WEIGHT_BYTES = 2**63 - 1


class State(enum.Enum):
    """How far the worker is. Each state needs the one before it."""

    IDLE = "idle"
    JOINED = "joined"
    LOADING = "loading"
    LOADED = "loaded"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load: a checkpoint folder, its config, the plan's parameters and ranges."""

    model_path: Path
    config: dict[str, Any]
    dtype: torch.dtype
    parameters: Sequence[Parameter]
    ranks: Sequence[dict[str, tuple[int, int]]]
    ignored_keys: Sequence[str]
    optional_prefix: str
    is_dummy: bool = False
    """Weights are random, and no file is read."""


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


@dataclass(frozen=True, slots=True)
class _Shard:
    """A loaded model and what it was loaded from."""

    model: models.Model
    tensors: ShardTensors
    weight_bytes: int
    request: LoadRequest
    files: checkpoint.FileVersions

    @property
    def vocab_size(self) -> int:
        return sum(self.model.lm_head.rank_sizes)


def _give_memory_back() -> None:
    """To the system, what is free: glibc keeps it, for it might be wanted again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def host_id() -> str:
    """Equal for processes that can share memory: one kernel, one /dev/shm."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = os.stat("/dev/shm")
        return f"{boot}:{shm.st_dev}:{shm.st_ino}"
    except OSError:
        return socket.gethostname()


class Executor:
    """Runs a coordinator's calls on the device thread and keeps them in order."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._device = torch.device(config.device)
        if self._device.type == "cuda":
            self._device = torch.device("cuda", self._device.index or 0)
        self._model_roots = ModelRoots.of(config.model_roots)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        self._memory = (0, 0)  # of a GPU: available, total; as the device thread last saw it
        self._meter = MemoryMeter(self._device)
        self._is_looking = False
        self._state = State.IDLE
        self._last_epoch = 0
        self._calls = 0
        self._called_at = time.monotonic()
        self._abandoned = threading.Event()  # set to end a join that is under way
        self._leaving: asyncio.Task[None] | None = None
        self._group: Group | None = None
        self._tp: TensorParallel | None = None
        self._joiner = Joiner(config, self._device)
        self._shard: _Shard | None = None
        self._runner: ModelRunner | None = None
        self._last_step_id = 0
        self._file_bytes_read = 0

    async def _on_device(
        self, function: Callable[[], T], thread: ThreadPoolExecutor | None = None
    ) -> T:
        """Runs `function` on the device thread; what the device refuses becomes the caller's error."""

        def run() -> T:
            try:
                return function()
            except (torch.OutOfMemoryError, MemoryError) as error:
                traceback.clear_frames(error.__traceback__)
                self._meter.look()
                raise ResourceExhausted(
                    f"{self._device} is out of memory ({self._meter.ledger}): {error}",
                    reason="OUT_OF_MEMORY",
                ) from error
            except Exception as error:
                # An error that somebody keeps must not keep the tensors of its frames.
                traceback.clear_frames(error.__traceback__)
                raise

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(thread or self._thread, run)
        except CommunicatorTimeout as error:
            raise DeadlineExceeded(str(error), reason="PEER_TIMEOUT") from error
        except CommunicatorAborted as error:
            raise Aborted(str(error), reason="GROUP_ABORTED") from error
        except CommunicatorError as error:
            raise Unavailable(str(error), reason="COMMUNICATOR_FAILED") from error

    def _take_device(self) -> None:
        """Makes the GPU this thread's own."""
        torch.cuda.set_device(self._device)
        self._measure_memory()

    def _measure_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            self._memory = torch.cuda.mem_get_info(self._device)

    def _look_at_peak(self) -> None:
        """Has the device thread do so when it is next free. What it sees is told from then on."""
        # One at a time: a device that hangs is not to find a queue of them.
        if self._device.type != "cuda" or self._runner is None or self._is_looking:
            return
        self._is_looking = True

        def look() -> None:
            self._meter.look()
            self._is_looking = False

        self._thread.submit(look)

    async def open(self) -> None:
        """Takes the device. InvalidArgument when it is not there, or can't be used as it is set up."""
        if self._device.type != "cuda":
            return
        if self._config.expandable_segments is not None:
            variable, value = self._config.expandable_segments
            raise InvalidArgument(
                variable,
                value,
                "memory in expandable segments can't be shared between workers' GPUs; leave "
                f"expandable_segments out for a worker on {self._device}",
            )
        problem = cuda_libraries.torch_problem(torch.__version__, torch.version.cuda)
        problem = problem or cuda_libraries.device_problem(
            self._device.index, torch.cuda.device_count()
        )
        if problem:
            raise InvalidArgument("device", str(self._device), problem)
        try:
            await self._on_device(self._take_device)
        except RuntimeError as error:
            # What CUDA says first; advice on debugging kernels follows.
            said = str(error).partition("\n")[0]
            raise InvalidArgument("device", str(self._device), said) from error

    def describe(self) -> Description:
        """Answers at once, whatever the device does."""
        self._look_at_peak()
        memory = psutil.virtual_memory()
        available, total = memory.available, memory.total
        if self._device.type == "cuda":
            available, total = self._memory
        return Description(
            host_id=host_id(),
            pid=os.getpid(),
            device=str(self._device),
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
            device_name=device_name(self._device),
            device_uuid=device_uuid(self._device),
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
        return self._device.type == "cuda" and self._config.cuda_graphs

    def create_communicator_id(self, transport: str) -> bytes:
        """An id for `join`, made by rank 0 and carried to all ranks by the coordinator."""
        return self._joiner.create_id(transport)

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
            comm, offer = await self._on_device(
                lambda: self._join(group, communicator_id, timeout_s, abandoned)
            )
        except BaseException:
            # Also when the caller is gone: nobody waits for the others then.
            abandoned.set()
            if self._group is group:
                self._group = None
            raise
        if self._group is not group:
            comm.close()
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
        await self._on_device(lambda: comm.connect(offers, timeout_s))
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
        loop = asyncio.get_running_loop()

        abandoned = self._abandoned

        def report(now: checkpoint.LoadProgress) -> None:
            if abandoned.is_set():
                raise CommunicatorAborted(f"epoch {epoch} was aborted while it loaded")
            loop.call_soon_threadsafe(progress, now)

        self._state, self._runner = State.LOADING, None
        try:
            shard = await self._on_device(lambda: self._load(group, request, report))
        except BaseException:
            if self._group is group:
                self._state = State.JOINED
            raise
        self._check(epoch, State.LOADING)
        self._shard, self._state = shard, State.LOADED
        log.info("loaded %d bytes from %s", shard.weight_bytes, request.model_path)
        return shard.weight_bytes

    def _load(
        self,
        group: Group,
        request: LoadRequest,
        progress: Callable[[checkpoint.LoadProgress], None],
    ) -> _Shard:
        if len(request.ranks) != group.size:
            raise InvalidArgument("ranks", len(request.ranks), f"the group has {group.size} ranks")
        assert self._tp is not None
        layout = ShardLayout(
            {parameter.name: parameter for parameter in request.parameters},
            group.rank,
            tuple(request.ranks),
        )
        if (planned := layout.numel * request.dtype.itemsize) > MAX_WEIGHT_BYTES:
            raise InvalidArgument("parameters", f"{planned} bytes", "no device has so many")
        opened = None
        if not request.is_dummy:
            opened = checkpoint.Checkpoint.open(request.model_path, self._model_roots)
        files: checkpoint.FileVersions = ()
        if opened is not None:
            self._file_bytes_read += opened.bytes_read
            files = opened.files
        held = self._shard
        if held and (held.request, held.files) == (request, files):
            return held
        self._shard = None  # its memory is free before the new one is allocated
        self._tp.forget_stats()
        stored: Mapping[str, checkpoint.StoredTensor] = {}
        if opened is not None:
            stored = checkpoint.match_keys(
                layout, opened, request.ignored_keys, request.optional_prefix
            )
        self._meter.loading(planned)
        tensors = ShardTensors(layout, self._tp, request.dtype, self._device)
        model = models.build(request.config, tensors)
        if opened is not None:
            self._file_bytes_read += checkpoint.load(layout, stored, tensors.destinations, progress)
        else:
            checkpoint.fill_randomly(layout, tensors.destinations, progress)
        weight_bytes = tensors.num_bytes
        self._meter.loaded(tensors.finish())
        self._measure_memory()
        return _Shard(model, tensors, weight_bytes, request, files)

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
        self._runner = await self._on_device(
            lambda: self._allocate(num_blocks, block_size, most, planned)
        )
        self._check(epoch, State.LOADED)
        self._last_step_id = 0
        self._state = State.READY
        return self._runner.kv_cache.num_bytes

    def _allocate(
        self,
        num_blocks: int,
        block_size: int,
        max_blocks: int,
        planned: tuple[int | None, int | None],
    ) -> ModelRunner:
        shard, tp = self._shard, self._tp
        assert shard is not None and tp is not None
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        self._meter.allocating()
        cache = KvCache.allocate(
            num_layers=shard.model.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=shard.model.num_kv_heads,
            head_dim=shard.model.head_dim,
            dtype=shard.tensors.dtype,
            device=self._device,
        )
        head = shard.model.lm_head
        sampler = Sampler(tp, head.rank_sizes, head.start, self._device)
        self._measure_memory()
        self._meter.allocated(cache.num_bytes, *planned)
        runner = ModelRunner(
            shard.model,
            sampler,
            cache,
            shard.vocab_size,
            device=self._device,
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
        runner = self._runner
        assert runner is not None
        return asyncio.ensure_future(self._execute(runner, step))

    async def _execute(self, runner: ModelRunner, step: Step) -> StepResult:
        assert self._tp is not None
        comm = self._tp.comm
        launched = await self._on_device(lambda: runner.launch(step))

        def read() -> StepResult:
            result = launched.result()
            if (failure := comm.failure()) is not None:
                raise failure
            return result

        if launched.is_done:
            return read()
        # Another thread waits, so that the device's goes on to launch the next step.
        return await self._on_device(read, self._reader)

    async def compute_partial(self, epoch: int, module: str, activation: Tensor) -> Partial:
        """One module alone, between steps."""
        self._check(epoch, State.LOADED, State.READY)
        shard = self._shard
        assert shard is not None
        dtype = shard.tensors.dtype if activation.is_floating_point() else activation.dtype

        def compute() -> Partial:
            x = activation.to(self._device, dtype)
            partial = compute_partial(shard.model, shard.tensors.layout, module, x)
            return replace(partial, output=partial.output.cpu())

        return await self._on_device(compute)

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
        """Ends what the device runs, and gives up the communicator and the runner.

        A thread can't be ended from outside, and one that hangs, in a driver or a collective that
        heeds no abort, holds the device for good. So after `abort_timeout_s` the process ends, and its
        supervisor starts another.
        """
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
            # Who joins next sizes its cache by what is free now.
            self._measure_memory()

        async def leave() -> None:
            try:
                async with asyncio.timeout(self._config.abort_timeout_s):
                    await self._on_device(give_up)
                    await self._on_device(lambda: None, self._reader)
            except TimeoutError:
                self._end_hung_process()

        self._leaving = asyncio.create_task(leave())
        return self._leaving

    def _end_hung_process(self) -> None:
        faulthandler.dump_traceback(all_threads=True)  # for the log: where it hangs
        log.critical(
            "the device thread hangs: %g s after an abort it has not ended what it runs; ending the "
            "process",
            self._config.abort_timeout_s,
        )
        os._exit(EXIT_HUNG)

    async def keep_lease(self) -> None:
        """Frees the device when no coordinator has called for `lease_s`; returns never.

        A coordinator that steps asks for a sign of life all the time. One that is gone, or cut off, must
        not keep memory that another could use.
        """
        lease_s = self._config.lease_s
        while True:
            left_s = self._called_at + lease_s - time.monotonic()
            if self._calls or left_s > 0:
                await asyncio.sleep(max(left_s, lease_s / 10))
                continue
            if self._group is not None or self._shard is not None:
                log.warning("no coordinator has called for %g s: freeing the device", lease_s)
                if self._group is not None:
                    await self.abort(self._group.epoch)
                self._tp = self._shard = None
                _give_memory_back()
                await self._on_device(self._joiner.free)
                await self._on_device(self._measure_memory)
            self._called_at = time.monotonic()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around each call of a coordinator: as long as there is one, the lease is kept."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._called_at = time.monotonic()

    async def close(self) -> None:
        """Frees the device and ends its thread; the whole process where that hangs."""
        self._abandoned.set()
        await self._leave(self._runner)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._reader.shutdown(wait=False, cancel_futures=True)

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
