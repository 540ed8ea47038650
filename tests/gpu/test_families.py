"""Through a real cluster on GPUs, greedy tokens are those that transformers generates on the GPU.

Over as many GPUs as there are: no number of heads divides by all of 2 to 8, so plans are uneven too.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from coordinator.model_folder import ModelFolder
from coordinator.shard_plan import fitting_tp_sizes
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(300)

NUM_TOKENS = 48
TRANSPORTS = {"nccl": 4, "peer": 5}


@dataclass
class Family:
    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=sorted(checkpoints.VARIATIONS))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    folder = checkpoints.build(request.param, tmp_path_factory.mktemp(request.param))
    model = checkpoints.oracle(folder).cuda()
    generator = random.Random(7)
    vocab_size = model.config.vocab_size
    prompts = [
        [generator.randrange(vocab_size) for _ in range(length)] for length in (1, 16, 37, 90)
    ]
    expected = [checkpoints.greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    del model
    torch.cuda.empty_cache()
    yield Family(folder, prompts, expected)


def generate(running: RunningCluster, prompt: list[int]) -> list[int]:
    pieces = running.client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0, timeout_s=120)
    return [token for piece in pieces for token in piece.token_ids]


def check(running: RunningCluster, family: Family) -> None:
    """The longest prompt alone, then all of them at once."""
    assert generate(running, family.prompts[-1]) == family.expected[-1]
    with ThreadPoolExecutor(len(family.prompts)) as threads:
        answers = list(threads.map(lambda prompt: generate(running, prompt), family.prompts))
    assert answers == family.expected


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("tp", range(1, max(min(torch.cuda.device_count(), 8), 1) + 1))
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_tokens_on_gpus(
    transport: str, tp: int, graphs: bool, family: Family, gpu_pools: dict[bool, WorkerPool]
) -> None:
    if tp == 1 and transport == "nccl":
        pytest.skip("one rank has no transport")
    if tp not in fitting_tp_sizes(ModelFolder.open(family.folder).spec):
        pytest.skip(f"the model can't be cut over {tp} ranks")
    arguments = ("--max-batched-tokens", "48", "--transport", transport)
    with cluster(gpu_pools[graphs], family.folder, tp, *arguments) as running:
        state = running.client.cluster()
        assert state.transport == (TRANSPORTS[transport] if tp > 1 else 1)
        devices = {worker.description.device for worker in state.workers}
        assert devices == {f"cuda:{index}" for index in range(tp)}
        check(running, family)
        blocks = running.client.cluster().scheduler
        assert (blocks.kv_blocks_used, blocks.running, blocks.waiting) == (0, 0, 0)
