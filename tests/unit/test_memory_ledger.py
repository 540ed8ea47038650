"""The ledger is told in words, over the wire, in a table, and by an error where memory runs out."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from client.views import memory_table
from colrow.errors import ResourceExhausted
from colrow.memory import GraphSizes, MemoryLedger, MemoryUse, StepSize, size_text
from colrow.v1 import control_service_pb2
from coordinator.convert import descriptions, workers
from coordinator.model_folder import ModelFolder
from coordinator.shard_plan import make_plan
from shard_worker import convert, models
from shard_worker.config import parse
from shard_worker.executor import Executor
from shard_worker.joining import Group
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_runner import Chunk, NewSequence, Step, StepResult
from shard_worker.sampling import Sampling
from tests import checkpoints

MIB, GIB = 2**20, 2**30

GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)
LEDGER = MemoryLedger(
    weights=MemoryUse(15 * GIB, 16 * GIB),
    kv_cache=MemoryUse(planned=64 * MIB),
    graphs=MemoryUse(0, 0),
)


# Words


def test_sizes_are_in_the_unit_that_fits() -> None:
    assert [size_text(n) for n in (0, 5 * MIB // 2, GIB - 1, GIB, 150 * GIB)] == [
        *("0.0 MiB", "2.5 MiB", "1024.0 MiB"),
        *("1.00 GiB", "150.00 GiB"),
    ]


def test_a_ledger_says_what_is_known_and_no_more() -> None:
    assert str(LEDGER) == (
        "weights 16.00 GiB of 15.00 GiB planned, KV cache 64.0 MiB planned, graphs 0.0 MiB"
    )
    assert LEDGER.planned_bytes == 15 * GIB + 64 * MIB
    assert str(MemoryLedger(workspace=MemoryUse(actual=MIB))) == "workspace 1.0 MiB"
    assert str(MemoryLedger()) == "nothing is held"


# On the wire


def test_the_coordinator_tells_on_what_the_worker_told() -> None:
    sizes = GraphSizes(
        decode=(StepSize(1, 1), StepSize(2, 2)), prefill=(StepSize(512, 256),), draws=64
    )
    worker = replace(Executor(parse([])).describe(), memory=LEDGER, graph_sizes=sizes)
    told = convert.description(worker)
    assert not told.memory.workspace.HasField("actual_bytes"), "unknown is not zero"
    assert told.memory.graphs.HasField("actual_bytes"), "and zero is known"
    heard = descriptions.worker_description(told)
    assert (heard.memory, heard.graph_sizes) == (LEDGER, sizes)
    assert descriptions.description_message(heard).memory == told.memory


def test_the_contract_has_the_uses_of_the_ledger() -> None:
    names = [field.name for field in convert._pb.MemoryLedger.DESCRIPTOR.fields]
    assert names == [*(field.name for field in fields(MemoryLedger)), "graph_sizes"]


# In a table


def test_the_table_has_held_and_planned_and_a_dash_for_what_is_unknown() -> None:
    cluster = control_service_pb2.Cluster(
        workers=[
            control_service_pb2.WorkerStatus(
                rank=3,
                description=convert.description(
                    replace(Executor(parse([])).describe(), memory=LEDGER)
                ),
            )
        ]
    )
    file = io.StringIO()
    Console(file=file, width=132).print(memory_table(cluster))
    shown = " ".join(file.getvalue().split())
    assert "rank device weights KV cache graphs workspace, at most" in shown
    assert ("3 cpu 16,384.0 MiB / 15,360.0 MiB - / 64.0 MiB 0.0 MiB / 0.0 MiB - / -") in shown


# Measured


class Allocator:
    """What torch tells of a GPU's memory, where there is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        self.segments: list[dict[str, Any]] = []
        for name, answer in {
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: self.take(0),
            "memory_snapshot": lambda: self.segments,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def take(self, num_bytes: int, *, giving_back: int = 0) -> None:
        """Gives out; a peak of nothing more is what `reset_peak_memory_stats` leaves."""
        self.peak = self.allocated if num_bytes == 0 else max(self.peak, self.allocated + num_bytes)
        self.allocated += num_bytes - giving_back


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def serving(allocator: Allocator) -> MemoryMeter:
    """1,000 bytes of weights and 500 of cache, beside 7 that others hold."""
    meter = MemoryMeter(torch.device("cuda:0"))
    allocator.take(7)
    meter.loading(990)
    allocator.take(1000)
    meter.loaded(990)
    meter.allocating()
    allocator.take(500)
    meter.allocated(480, graphs=300, workspace=200)
    return meter


def test_on_a_gpu_what_is_held_is_what_the_allocator_gave_out(allocator: Allocator) -> None:
    assert serving(allocator).ledger == MemoryLedger(
        weights=MemoryUse(990, 1000),
        kv_cache=MemoryUse(480, 500),
        graphs=MemoryUse(300, 0),
        workspace=MemoryUse(200),
    )


def test_workspace_is_the_most_that_steps_took(allocator: Allocator) -> None:
    meter = serving(allocator)
    for num_bytes in (40, 120, 60):
        allocator.take(num_bytes, giving_back=num_bytes)
        meter.look()
    assert meter.ledger.workspace == MemoryUse(200, 120)


def test_what_graphs_keep_is_no_workspace(allocator: Allocator) -> None:
    meter = serving(allocator)
    allocator.take(50, giving_back=50)
    meter.look()
    allocator.take(90, giving_back=60)  # a capture: its pool keeps all, and has 30 in use
    pool = (0, 1)
    allocator.segments = [
        {"segment_pool_id": pool, "total_size": 64, "allocated_size": 30},
        {"segment_pool_id": pool, "total_size": 32, "allocated_size": 0},
        {"segment_pool_id": (0, 0), "total_size": 5000, "allocated_size": 1500},
    ]
    meter.captured(pool)
    meter.look()
    assert meter.ledger.graphs == MemoryUse(300, 96)
    assert meter.ledger.workspace == MemoryUse(200, 50), "what was before the capture counts on"
    allocator.take(55, giving_back=55)
    meter.look()
    assert meter.ledger.workspace == MemoryUse(200, 55)


def test_when_a_group_is_left_weights_are_all_that_is_held(allocator: Allocator) -> None:
    meter = serving(allocator)
    meter.left()
    meter.look()
    assert meter.ledger == MemoryLedger(weights=MemoryUse(990, 1000))


def test_on_a_cpu_what_can_not_be_counted_is_unknown() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    meter.loading(100)
    meter.loaded(130)
    meter.allocating()
    meter.allocated(50, graphs=0, workspace=None)
    meter.look()
    assert meter.ledger == MemoryLedger(
        weights=MemoryUse(100, 130), kv_cache=MemoryUse(50), graphs=MemoryUse(0, 0)
    )


# Out of memory


class LedWorker:
    """An executor that is led by hand, alone in its group."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.executor = Executor(parse(flags))
        model = ModelFolder.open(folder)
        self.plan = make_plan(model.spec, 1)
        self.request = convert.load_request(
            workers.load_request(1, folder, model.config_json, self.plan, "safetensors")
        )

    async def join(self) -> None:
        await self.executor.open()
        await self.executor.join(Group(1, 0, 1, "single"), b"", 1.0)

    async def load(self) -> None:
        await self.executor.load(1, self.request, lambda progress: None)

    async def allocate(self, num_blocks: int = 64) -> int:
        return await self.executor.allocate(
            1, num_blocks, 16, 128, graph_bytes=10 * GIB, workspace_bytes=20 * GIB
        )

    async def step(self, step_id: int, num_tokens: int, *, is_new: bool = False) -> StepResult:
        """The prompt, of so many tokens, or one more token."""
        new = NewSequence(1, list(range(num_tokens)), num_tokens, GREEDY)
        blocks = list(range(8)) if is_new else []
        chunk = Chunk(1, num_tokens if is_new else 1, blocks)
        return await self.executor.execute(1, Step(step_id, (), (new,) if is_new else (), (chunk,)))

    @property
    def ledger(self) -> MemoryLedger:
        return self.executor.describe().memory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.build("smollm2", tmp_path / "model")


@pytest.fixture
async def worker(folder: Path) -> AsyncIterator[LedWorker]:
    led = LedWorker(folder, "--lease", "0.2")
    await led.join()
    yield led
    await led.executor.close()


def out_of_memory(*args: object, **kwargs: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


async def test_out_of_memory_while_loading_tells_what_was_to_be_loaded(
    worker: LedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = worker.plan.ranks[0].weight_bytes
    with monkeypatch.context() as patch:
        patch.setattr(models, "FAMILIES", {"LlamaForCausalLM": out_of_memory})
        with pytest.raises(ResourceExhausted) as raised:
            await worker.load()
    assert raised.value.reason == "OUT_OF_MEMORY"
    assert raised.value.message == (
        f"cpu is out of memory (weights {size_text(planned)} planned): "
        "CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert worker.ledger == MemoryLedger(), "of which nothing is left"
    await worker.load()
    assert worker.ledger.weights.planned == planned


async def test_out_of_memory_for_the_cache_tells_what_is_held(worker: LedWorker) -> None:
    await worker.load()
    held = worker.ledger
    with pytest.raises(ResourceExhausted, match=r"^cpu is out of memory \(weights .*num_blocks"):
        await worker.allocate(num_blocks=2**60)
    assert worker.ledger == held
    num_bytes = await worker.allocate()
    assert num_bytes == 64 * 16 * worker.plan.ranks[0].kv_bytes_per_token
    assert worker.ledger == replace(
        held,
        kv_cache=MemoryUse(num_bytes),
        graphs=MemoryUse(10 * GIB, 0),
        workspace=MemoryUse(20 * GIB),
    )


async def test_out_of_memory_in_a_step_tells_the_whole_ledger(
    worker: LedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.load()
    await worker.allocate()
    with monkeypatch.context() as patch:
        patch.setattr("shard_worker.model_runner.ModelRunner.launch", out_of_memory)
        with pytest.raises(ResourceExhausted) as raised:
            await worker.step(1, 5, is_new=True)
    assert raised.value.reason == "OUT_OF_MEMORY"
    for words in (
        "weights ",
        "KV cache ",
        "graphs 0.0 MiB of 10.00 GiB planned",
        "workspace 20.00 GiB planned",
        "Tried to allocate 2.00 GiB",
    ):
        assert words in raised.value.message
    await worker.executor.abort(1)
    assert worker.ledger.kv_cache == worker.ledger.workspace == MemoryUse()


async def test_the_ledger_follows_what_is_given_up(worker: LedWorker) -> None:
    await worker.load()
    await worker.allocate()
    for step_id in (1, 2):
        result = await worker.step(step_id, 5, is_new=step_id == 1)
        assert len(result.token_ids) == 1
    ready = worker.ledger
    await worker.executor.abort(1)
    assert worker.ledger == MemoryLedger(weights=ready.weights), "kept for the next group"
    lease = asyncio.create_task(worker.executor.keep_lease())
    async with asyncio.timeout(20):
        while worker.ledger != MemoryLedger():
            await asyncio.sleep(0.05)
    lease.cancel()
