"""What a worker refuses before it computes anything, and who may change what it knows."""

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from coordinator.convert import workers
from coordinator.model_folder import ModelFolder
from coordinator.shard_plan import make_plan
from shard_worker import __main__, convert, device_thread
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.config import expandable_segments, parse
from shard_worker.device_thread import DeviceThread
from shard_worker.executor import Executor, State
from shard_worker.joining import Group, Joiner
from shard_worker.kv_cache import KvCache
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_runner import Chunk, ModelRunner, NewSequence, Step, StepResult
from shard_worker.sampling import Sampling
from shard_worker.shard import LoadRequest
from tests import checkpoints


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
async def test_every_address_of_a_machine_is_none_to_give_to_other_hosts(host: str) -> None:
    executor = Executor(parse(["--host", host]))
    for refused in (
        executor.create_communicator_id("gloo"),
        executor.join(Group(1, 1, 2, "gloo"), b"127.0.0.1:1", 1.0),
    ):
        with pytest.raises(InvalidArgument, match="--advertise-host") as caught:
            await refused
        assert caught.value.field == "advertise_host"
    assert await executor.create_communicator_id("shm"), "which shares memory, and has no address"


def test_workers_advertise_where_they_listen_unless_told_otherwise() -> None:
    assert parse(["--host", "[fd00::7]"]).advertise_host == "fd00::7"
    assert parse(["--host", "0.0.0.0", "--advertise-host", "gpu1"]).advertise_host == "gpu1"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_wait_for_peers_is_a_time(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--peer-timeout", value])
    assert "--peer-timeout" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    "value", ["expandable_segments:True", " max_split_size_mb : 64 , expandable_segments : True "]
)
def test_expandable_segments_are_found_in_either_variable(variable: str, value: str) -> None:
    assert expandable_segments({variable: value}) == (variable, value)


@pytest.mark.parametrize("value", ["", "expandable_segments:False", "max_split_size_mb:64"])
def test_other_settings_of_the_allocator_are_no_expandable_segments(value: str) -> None:
    assert expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": value}) is None


def test_a_worker_on_a_gpu_refuses_expandable_segments_and_one_on_a_cpu_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(InvalidArgument, match="can't be shared") as caught:
        asyncio.run(Executor(parse(["--device", "cuda:0"])).open())
    assert caught.value.field == "PYTORCH_CUDA_ALLOC_CONF"
    asyncio.run(Executor(parse(["--device", "cpu"])).open())


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidArgument, match=r"'cuda:99': .*torch") as caught:
        asyncio.run(Executor(parse(["--device", "cuda:99"])).open())
    assert caught.value.field == "device"


def test_cuda_alone_is_the_first_gpu() -> None:
    assert Executor(parse(["--device", "cuda"])).describe().device == "cuda:0"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
async def test_a_torch_without_cuda_has_no_nccl_and_says_what_to_install() -> None:
    with pytest.raises(Unavailable, match=r"nccl: .* is a build without CUDA; install") as caught:
        await Executor(parse([])).create_communicator_id("nccl")
    assert caught.value.reason == "COMMUNICATOR_FAILED"


async def test_what_nccl_itself_says_of_an_id_is_told_as_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def create_id(host: str) -> Any:
        assert threading.current_thread() is not threading.main_thread(), "the event loop"
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: no socket interface found")

    monkeypatch.setattr(NcclCommunicator, "create_id", create_id)
    with pytest.raises(Unavailable, match=r"nccl: .*no socket interface found"):
        await Executor(parse([])).create_communicator_id("nccl")


def test_a_worker_is_usable_or_gone_ten_seconds_after_an_abort() -> None:
    assert parse([]).abort_timeout_s < 10


# The device thread


async def test_a_driver_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_thread, "SLOW_OPEN_S", 0.05)
    monkeypatch.setattr(DeviceThread, "_take", lambda self: time.sleep(0.3))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2))
    executor = Executor(parse(["--device", "cuda:3"]))
    with caplog.at_level(logging.WARNING):
        await executor.open()
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for cuda:3: its driver has not answered for 0.05 s; `colrow doctor` says more"
    ]
    assert executor.describe().memory_total == 2


async def test_the_peak_is_looked_at_again_after_a_look_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []

    def look(self: MemoryMeter) -> None:
        looked.append(1)
        raise ValueError("the allocator has nothing to say")

    monkeypatch.setattr(MemoryMeter, "look", look)
    device = torch.device("cuda:0")
    thread = DeviceThread(device, MemoryMeter(device))
    for _ in range(2):
        thread.look_at_peak()
        await thread.run(lambda: None)
    assert len(looked) == 2


# An executor that is led by hand


class Gate:
    """A place on the device thread where `hold` waits until `open`ed; `reached` when it is there."""

    def __init__(self) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()

    def hold(self) -> None:
        self._reached.set()
        assert self._opened.wait(20)

    def open(self) -> None:
        self._opened.set()

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 20)


class WatchedExecutor(Executor):
    """Fails where another thread than the event loop's writes what the executor knows."""

    def __setattr__(self, name: str, value: Any) -> None:
        assert threading.current_thread() is threading.main_thread(), name
        super().__setattr__(name, value)


ALONE = Group(1, 0, 1, "single")
GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def request_of_one(folder: Path) -> LoadRequest:
    model = ModelFolder.open(folder)
    plan = make_plan(model.spec, 1)
    return convert.load_request(
        workers.load_request(1, folder, model.config_json, plan, "safetensors")
    )


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    made = WatchedExecutor(parse(["--lease", "0.2"]))
    yield made
    await made.close()


def ignore(progress: object) -> None:
    pass


async def load(executor: Executor, request: LoadRequest, epoch: int = 1) -> None:
    await executor.join(Group(epoch, 0, 1, "single"), b"", 1.0)
    await executor.load(epoch, request, ignore)


def step(step_id: int) -> Step:
    new = (NewSequence(1, [5, 17, 200], 3, GREEDY),) if step_id == 1 else ()
    return Step(step_id, (), new, (Chunk(1, 3 if new else 1, [0] if new else []),))


@contextlib.asynccontextmanager
async def keeping_the_lease(executor: Executor) -> AsyncIterator[None]:
    keeping = asyncio.create_task(executor.keep_lease())
    try:
        yield
        assert not keeping.done()
    finally:
        keeping.cancel()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_the_event_loop_alone_writes_what_a_worker_knows(
    executor: Executor, request_of_one: LoadRequest
) -> None:
    read = []
    for epoch in (1, 2):
        await load(executor, request_of_one, epoch)
        await executor.allocate(epoch, 4, 16, 64)
        assert (await executor.execute(epoch, step(1))).token_ids
        read.append(executor.describe().file_bytes_read)
        await executor.abort(epoch)
    assert read[1] - read[0] < read[0] / 10, "headers again, and no weights"
    async with keeping_the_lease(executor):
        await until(lambda: not executor.describe().weight_bytes)


class Recorded(SingleCommunicator):
    """Which thread closed it."""

    def __init__(self) -> None:
        super().__init__()
        self.closed_by: list[str] = []

    def close(self) -> None:
        self.closed_by.append(threading.current_thread().name)
        super().close()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorded, Gate]:
    """What a join makes, however little it is still wanted, once the gate is open."""
    comm, gate = Recorded(), Gate()

    def join(self: Joiner, *args: object) -> Recorded:
        gate.hold()
        return comm

    monkeypatch.setattr(Joiner, "join", join)
    return comm, gate


async def assert_closed_on_device(comm: Recorded) -> None:
    await until(lambda: bool(comm.closed_by))
    assert [name.rstrip("_0") for name in comm.closed_by] == ["device"]


async def test_what_a_cancelled_join_makes_is_closed_on_the_device_thread(
    executor: Executor, joined: tuple[Recorded, Gate]
) -> None:
    comm, gate = joined
    joining = asyncio.create_task(executor.join(ALONE, b"", 1.0))
    await gate.reached()
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    gate.open()
    await assert_closed_on_device(comm)


async def test_so_it_is_where_the_caller_goes_just_when_it_is_made(
    executor: Executor, joined: tuple[Recorded, Gate]
) -> None:
    comm, gate = joined
    joining = asyncio.create_task(executor.join(ALONE, b"", 1.0))
    await gate.reached()
    gate.open()
    time.sleep(0.3)  # the event loop does not hear that it is done
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    await assert_closed_on_device(comm)


async def test_what_an_aborted_join_makes_is_closed_on_the_device_thread(
    executor: Executor, joined: tuple[Recorded, Gate]
) -> None:
    comm, gate = joined
    joining = asyncio.create_task(executor.join(ALONE, b"", 1.0))
    await gate.reached()
    aborting = asyncio.create_task(executor.abort(1))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(Aborted):
        await joining
    await aborting
    await assert_closed_on_device(comm)
    assert executor.describe().state is State.IDLE


async def test_a_lease_that_ends_takes_nothing_from_a_group_that_forms_meanwhile(
    executor: Executor, request_of_one: LoadRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(executor, request_of_one)
    gate, freed = Gate(), []
    with monkeypatch.context() as patch:
        patch.setattr(SingleCommunicator, "close", lambda self: gate.hold())
        patch.setattr(Joiner, "free", lambda self: freed.append(1))
        async with keeping_the_lease(executor):
            await gate.reached()
            joining = asyncio.create_task(executor.join(Group(2, 0, 1, "single"), b"", 1.0))
            await asyncio.sleep(0)
            with executor.lease.call():  # as all calls of a coordinator do
                gate.open()
                await joining
                await asyncio.sleep(0.5)
                assert not freed
                assert executor.describe().weight_bytes, "held for the new group"
                await executor.load(2, request_of_one, ignore)


async def test_an_abort_while_a_cache_is_allocated_leaves_none(
    executor: Executor, request_of_one: LoadRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(executor, request_of_one)
    gate, closed = Gate(), []
    allocate, close = KvCache.allocate, ModelRunner.close

    def slowly(**settings: Any) -> KvCache:
        gate.hold()
        return allocate(**settings)

    def watched(self: ModelRunner) -> None:
        closed.append(threading.current_thread().name.rstrip("_0"))
        close(self)

    monkeypatch.setattr(KvCache, "allocate", slowly)
    monkeypatch.setattr(ModelRunner, "close", watched)
    allocating = asyncio.create_task(executor.allocate(1, 4, 16, 64))
    await gate.reached()
    aborting = asyncio.create_task(executor.abort(1))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(FailedPrecondition) as caught:
        await allocating
    assert caught.value.reason == "STALE_EPOCH"
    await aborting
    await until(lambda: bool(closed))
    assert closed == ["device"]
    assert executor.describe().kv_cache_bytes == 0


async def test_a_partial_output_of_a_group_that_is_gone_is_no_answer(
    executor: Executor, request_of_one: LoadRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(executor, request_of_one)
    x = torch.zeros(1, request_of_one.config["hidden_size"])
    rank, partial = await executor.compute_partial(1, "model.layers.0.mlp.gate_proj", x, 2**20)
    assert (rank, partial.combine) == (0, "concat")
    computing = asyncio.create_task(
        executor.compute_partial(1, "model.layers.0.mlp.gate_proj", x, 2**20)
    )
    await asyncio.sleep(0)
    aborting = asyncio.create_task(executor.abort(1))
    with pytest.raises(FailedPrecondition, match="there is no group"):
        await computing
    await aborting


class Launched:
    """A step that a device has queued; its result is there when the gate opens."""

    is_done = False

    def __init__(self, step_id: int, gate: Gate) -> None:
        self._step_id, self._gate = step_id, gate

    def result(self) -> StepResult:
        self._gate.hold()
        return StepResult(self._step_id, (), (), 0)


async def test_a_step_is_launched_before_the_result_of_the_one_before_is_there(
    executor: Executor, request_of_one: LoadRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(executor, request_of_one)
    await executor.allocate(1, 4, 16, 64)
    gates = [Gate(), Gate()]
    launched: list[int] = []

    def launch(self: ModelRunner, step: Step) -> Launched:
        launched.append(step.step_id)
        return Launched(step.step_id, gates[step.step_id - 1])

    monkeypatch.setattr(ModelRunner, "launch", launch)
    first, second = executor.execute(1, step(1)), executor.execute(1, step(2))
    await gates[0].reached()
    await until(lambda: launched == [1, 2])
    assert not first.done() and not second.done()
    for gate, result in zip(gates, (first, second), strict=True):
        gate.open()
        await result
    assert (first.result().step_id, second.result().step_id) == (1, 2)


# The process


@pytest.fixture
def own_settings() -> Iterator[None]:
    """Those of the interpreter that a worker changes are this process's again."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("own_settings")
async def test_a_worker_whose_lease_can_not_be_kept_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def keep_lease(self: Executor) -> None:
        raise RuntimeError("nobody would free the device")

    monkeypatch.setattr(Executor, "keep_lease", keep_lease)
    async with asyncio.timeout(20):
        with pytest.raises(RuntimeError, match="nobody would free the device"):
            await __main__.serve(parse(["--port", "0"]))
