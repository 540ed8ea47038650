"""A drain waits for calls, whether a request of theirs runs at the moment or not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from colrow.errors import Unavailable
from coordinator.block_manager import BlockManager
from coordinator.cluster import Cluster, ModelFolder, State
from coordinator.config import parse
from coordinator.engine import Engine
from coordinator.families import model_spec
from coordinator.request import ModelLimits
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
