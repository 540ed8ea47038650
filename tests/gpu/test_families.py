"""Through a real cluster on GPUs, greedy tokens are those that transformers generates on the GPU."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(300)

NUM_TOKENS = 48


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
def test_tokens_on_one_gpu(graphs: bool, family: Family, gpu_pools: dict[bool, WorkerPool]) -> None:
    with cluster(gpu_pools[graphs], family.folder, 1, "--max-batched-tokens", "48") as running:
        state = running.client.cluster()
        assert state.workers[0].description.device.startswith("cuda")
        check(running, family)
        blocks = running.client.cluster().scheduler
        assert (blocks.kv_blocks_used, blocks.running, blocks.waiting) == (0, 0, 0)
