"""A drain waits for calls, whatever they do at the moment; requests that fail workers end in time."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from colrow.errors import Internal, ServiceError, Unavailable
from coordinator.block_manager import BlockManager
from coordinator.cluster import MAX_REFUSALS, Cluster, ModelFolder, State
from coordinator.config import parse
from coordinator.engine import Engine
from coordinator.families import model_spec
from coordinator.request import ModelLimits, Request
from coordinator.scheduler import Scheduler
from coordinator.shard_group import ShardGroup

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


@pytest.fixture
def cluster() -> Cluster:
    """One that serves, with workers that nobody calls."""
    config = parse(["--model", "m", "--workers", "a:1"])
    model = ModelFolder(Path("m"), json.dumps(CONFIG), model_spec(CONFIG), None)
    made = Cluster(config, model, ShardGroup([], step_timeout_s=1))
    steps: Any = None
    made.scheduler = Scheduler(BlockManager(8, 16), max_batched_tokens=8, max_running=1)
    made.engine_or_none = Engine(steps, made.scheduler, ModelLimits(32, 64, (), 128), None)
    made.state = State.SERVING
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
    async with asyncio.timeout(1):
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
    async with asyncio.timeout(1):
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
        pass

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
    failing: Failing,
) -> None:
    await failing.fails(Unavailable("lost"))
    failing.cluster._failing_since -= failing.cluster.config.recovery_timeout_s
    await failing.fails(Unavailable("lost again"))
    with pytest.raises(Unavailable, match="has not recovered"):
        await failing.request
