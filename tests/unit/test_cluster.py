"""A drain waits for calls, requests that fail workers end in time, a cache fits what is left."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colrow import __version__
from colrow.errors import (
    Aborted,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ServiceError,
    Unavailable,
)
from colrow.memory import MemoryLedger, MemoryUse
from coordinator.block_manager import BlockManager
from coordinator.cluster import MAX_REFUSALS, Cluster, State
from coordinator.config import DEFAULT_GPU_BATCHED_TOKENS, parse
from coordinator.engine import Engine
from coordinator.families import model_spec
from coordinator.memory_plan import StepLimits, workspace_bytes
from coordinator.model_folder import ModelFolder
from coordinator.request import ModelLimits, Request
from coordinator.scheduler import Scheduler
from coordinator.shard_group import ShardGroup
from coordinator.shard_plan import ShardPlan, make_plan
from coordinator.worker_status import WorkerDescription
from tests.unit.test_worker_status import DESCRIPTION

MIB, GIB = 2**20, 2**30

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster(clock: Clock) -> Cluster:
    """One that serves, with workers that nobody calls."""
    config = parse(["--model", "m", "--workers", "a:1"])
    model = ModelFolder(Path("m"), json.dumps(CONFIG), model_spec(CONFIG), None)
    made = Cluster(config, model, ShardGroup([], step_timeout_s=1), clock=clock)
    steps: Any = None
    made.scheduler = Scheduler(BlockManager(8, 16), max_batched_tokens=8, max_running=1)
    made.engine_or_none = Engine(steps, made.scheduler, ModelLimits(32, 64, (), 128), None)
    made._set_state(State.SERVING)
    return made


async def test_a_drain_waits_for_calls_that_have_not_asked_the_engine_yet(
    cluster: Cluster,
) -> None:
    with cluster.call():
        with cluster.call():  # one of them reads its prompts
            draining = asyncio.create_task(cluster.drain())
            await asyncio.sleep(0)
            assert cluster.state is State.DRAINING
            with pytest.raises(Unavailable, match="takes nothing new"), cluster.call():
                pass
        await asyncio.sleep(0.01)
        assert not draining.done()
    async with asyncio.timeout(10):
        await draining


async def test_a_call_that_fails_or_is_cancelled_holds_no_drain_up(cluster: Cluster) -> None:
    with pytest.raises(ValueError), cluster.call():
        raise ValueError

    async def call() -> None:
        with cluster.call():
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    draining = asyncio.create_task(cluster.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    task.cancel()
    async with asyncio.timeout(10):
        await draining


# What fails: a worker, or what it is asked for


@dataclass
class Failing:
    """A cluster whose group always forms; it and a request that waits."""

    cluster: Cluster
    request: "asyncio.Task[list[Any]]"

    async def fails(self, error: ServiceError) -> None:
        assert self.cluster.engine_or_none is not None
        await self.cluster._recover(self.cluster.engine_or_none, error)
        await asyncio.sleep(0)


@pytest.fixture
async def failing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Failing]:
    async def form(timeout_s: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(cluster, "_form", form)

    async def ask() -> list[Any]:
        request = Request("r", (1, 2), max_tokens=4)
        assert cluster.engine_or_none is not None
        return [output async for output in cluster.engine_or_none.generate(request)]

    task = asyncio.create_task(ask())
    await asyncio.sleep(0)
    yield Failing(cluster, task)
    task.cancel()


async def test_a_request_that_every_worker_refuses_ends(failing: Failing) -> None:
    for _ in range(MAX_REFUSALS):
        assert not failing.request.done()
        await failing.fails(Internal("a kernel does not compile"))
    with pytest.raises(Internal, match="can't execute the step: a kernel does not compile"):
        await failing.request
    assert failing.cluster.engine._check(Request("next", (1,), max_tokens=1)) == 1


async def test_lost_workers_end_no_request_before_its_time(failing: Failing) -> None:
    for _ in range(3 * MAX_REFUSALS):
        await failing.fails(Unavailable("lost"))
    assert not failing.request.done()


async def test_a_step_that_comes_through_starts_the_count_anew(failing: Failing) -> None:
    for _ in range(3 * MAX_REFUSALS):
        await failing.fails(Internal("once"))
        failing.cluster.engine_or_none.num_steps += 1  # type: ignore[union-attr]
    assert not failing.request.done()


async def test_the_time_that_requests_wait_spans_groups_that_form_and_fail(
    failing: Failing, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    limit_s = failing.cluster.config.recovery_timeout_s
    await failing.fails(Unavailable("lost"))
    clock.now += limit_s - 1
    await failing.fails(Unavailable("lost again"))
    assert not failing.request.done()
    clock.now += 1
    await failing.fails(Unavailable("lost once more"))
    with pytest.raises(Unavailable, match="has not recovered"):
        await failing.request
    assert caplog.text.count("requests fail") == 1, "they are given up once"


# One module alone, while workers come and go


class Lost:
    """A group whose workers answer what `answers` say, by turns."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def compute_partial(self, module: str, x: np.ndarray, max_output_bytes: int) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, ServiceError):
            raise answer
        return answer


def computing(cluster: Cluster, *answers: Any) -> "asyncio.Task[list[Any]]":
    group: Any = Lost(*answers)
    cluster.group = group
    return asyncio.create_task(cluster.compute_partial("m", np.zeros(1), 100))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


STALE = FailedPrecondition("there is no group", reason="STALE_EPOCH")


@pytest.mark.parametrize("error", [Unavailable("gone"), Aborted("left"), STALE])
async def test_a_module_is_computed_anew_when_the_group_has_recovered(
    error: ServiceError, cluster: Cluster
) -> None:
    task = computing(cluster, error, error, ["output"])
    await turns()
    assert not task.done()
    for _ in range(2):
        cluster._set_state(State.RECOVERING)
        await turns()
        assert not task.done()
        cluster._set_state(State.SERVING)
        await turns()
    assert await task == ["output"]


async def test_it_is_asked_again_where_the_watch_finds_nothing_amiss(cluster: Cluster) -> None:
    cluster.config = replace(cluster.config, heartbeat_timeout_s=0.01)
    async with asyncio.timeout(10):
        assert await computing(cluster, Unavailable("a moment"), ["output"]) == ["output"]


async def test_it_is_given_up_in_the_time_that_requests_have(cluster: Cluster) -> None:
    cluster.config = replace(cluster.config, recovery_timeout_s=0.05, heartbeat_timeout_s=0.01)
    with pytest.raises(Unavailable) as raised:
        await computing(cluster, *[Unavailable("gone")] * 100)
    assert raised.value.reason == "NOT_RECOVERED"
    cluster._set_state(State.RECOVERING)
    with pytest.raises(Unavailable) as raised:
        await computing(cluster, ["never asked for"])
    assert raised.value.reason == "NOT_RECOVERED"


async def test_what_is_refused_is_not_asked_again(cluster: Cluster) -> None:
    with pytest.raises(InvalidArgument):
        await computing(cluster, InvalidArgument("module", "m", "is none"), ["never"])
    cluster._set_state(State.FAILED)
    with pytest.raises(Unavailable) as raised:
        await computing(cluster, ["never"])
    assert raised.value.reason == "NOT_SERVING"


# What is left of a GPU's memory


class Gpu:
    """A worker on a GPU that takes everything, and notes it."""

    def __init__(self, total: int, free: int = 0) -> None:
        self.address = "gpu:1"
        self.calls: list[str] = []
        self.allocated: dict[str, Any] = {}
        self.description = replace(
            DESCRIPTION,
            version=__version__,
            device="cuda:0",
            size=0,
            memory_total_bytes=total,
            memory_available_bytes=free,
            supported_architectures=("LlamaForCausalLM",),
            memory=MemoryLedger(weights=MemoryUse(MIB, 2 * MIB)),
        )

    async def describe(self, timeout_s: float) -> WorkerDescription:
        return self.description

    async def join(self, **request: Any) -> bytes:
        self.calls.append("join")
        return b""

    async def load(self, plan: ShardPlan, **request: Any) -> int:
        self.calls.append("load")
        return plan.ranks[0].weight_bytes

    async def allocate(self, **request: Any) -> int:
        self.calls.append("allocate")
        self.allocated = request
        return 0

    def open_steps(self) -> None: ...


async def serve_on(gpu: Gpu, *flags: str) -> None:
    config = parse(["--model", "m", "--workers", gpu.address, *flags])
    model = ModelFolder(Path("m"), json.dumps(CONFIG), model_spec(CONFIG), None)
    worker: Any = gpu
    await Cluster(config, model, ShardGroup([worker], step_timeout_s=1))._start()


BLOCK_BYTES = 16 * 2 * 2 * 4 * 4  # keys and values of two heads of four float32
PLAN = make_plan(model_spec(CONFIG), 1)
LIMITS = StepLimits(tokens=DEFAULT_GPU_BATCHED_TOKENS, sequences=256, context=64)
BESIDE = workspace_bytes(PLAN, 0, LIMITS)


async def test_the_cache_gets_what_steps_leave_of_a_gpu() -> None:
    gpu = Gpu(10 * GIB, GIB + BESIDE + 9 * BLOCK_BYTES + 1)
    await serve_on(gpu)
    assert gpu.allocated["num_blocks"] == 9
    assert gpu.allocated["planned"].workspace == MemoryUse(BESIDE)
    assert gpu.allocated["planned"].graphs == MemoryUse(0), "it captures none"


async def test_a_model_that_does_not_fit_is_not_loaded() -> None:
    gpu = Gpu(BESIDE)
    with pytest.raises(InvalidArgument, match=r"tp_size = 1: rank 0 \(cuda:0\) needs .*weights "):
        await serve_on(gpu)
    assert gpu.calls == []


@pytest.mark.parametrize(("num_blocks", "flags"), [(0, ()), (3, ("--max-model-len", "64"))])
async def test_without_room_for_a_block_or_the_context_asked_for_there_is_no_cache(
    num_blocks: int, flags: tuple[str, ...]
) -> None:
    gpu = Gpu(10 * GIB, GIB + BESIDE + num_blocks * BLOCK_BYTES)
    with pytest.raises(InvalidArgument) as raised:
        await serve_on(gpu, *flags)
    assert gpu.calls == ["join", "load"]
    tokens = 64 if flags else 16
    assert f"left for the KV cache, which is to hold {tokens} tokens: " in raised.value.message
    assert "weights 2.0 MiB of 1.0 MiB planned" in raised.value.message


async def test_a_context_that_nobody_asked_for_is_cut_to_what_there_is_room_for() -> None:
    gpu = Gpu(10 * GIB, GIB + BESIDE + 3 * BLOCK_BYTES)
    await serve_on(gpu)
    assert (gpu.allocated["num_blocks"], gpu.allocated["max_model_len"]) == (3, 48)
