"""Greedy tokens through a real cluster are those of transformers: families, tp sizes, transports."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

NUM_TOKENS = 64


@pytest.fixture(scope="module", params=sorted(checkpoints.VARIATIONS))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[list[int]], list[list[int]]]]:
    """A checkpoint, prompts of different lengths, and what transformers makes of them."""
    folder = checkpoints.build(request.param, tmp_path_factory.mktemp(request.param))
    model = checkpoints.oracle(folder)
    generator = random.Random(7)
    vocab_size = model.config.vocab_size
    prompts = [
        [generator.randrange(vocab_size) for _ in range(length)] for length in (1, 16, 37, 90)
    ]
    yield folder, prompts, [checkpoints.greedy(model, p, NUM_TOKENS) for p in prompts]


def generate(running: RunningCluster, prompt: list[int]) -> list[int]:
    pieces = running.client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0, timeout_s=60)
    return [token for piece in pieces for token in piece.token_ids]


def check(running: RunningCluster, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """The longest prompt alone, then all of them at once."""
    assert generate(running, prompts[-1]) == expected[-1]
    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(lambda prompt: generate(running, prompt), prompts)) == expected


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_greedy_tokens_are_those_of_transformers(
    tp: int,
    family: tuple[Path, list[list[int]], list[list[int]]],
    worker_pool: WorkerPool,
) -> None:
    folder, prompts, expected = family
    # Small steps, so that prompts are computed in chunks beside sequences that decode.
    with cluster(worker_pool, folder, tp, "--max-batched-tokens", "48") as running:
        state = running.client.cluster()
        assert state.transport == (1 if tp == 1 else 2)
        check(running, prompts, expected)
        blocks = running.client.cluster().scheduler
        assert (blocks.kv_blocks_used, blocks.running, blocks.waiting) == (0, 0, 0)


def test_gloo_gives_the_same_tokens(
    family: tuple[Path, list[list[int]], list[list[int]]], worker_pool: WorkerPool
) -> None:
    folder, prompts, expected = family
    with cluster(worker_pool, folder, 3, "--transport", "gloo") as running:
        assert running.client.cluster().transport == 3
        check(running, prompts, expected)


def test_preempted_sequences_give_the_same_tokens(
    family: tuple[Path, list[list[int]], list[list[int]]], worker_pool: WorkerPool
) -> None:
    folder, prompts, expected = family
    # The prompts and what follows are 400 tokens in all; the cache holds 160.
    with cluster(worker_pool, folder, 2, "--num-blocks", "40", "--block-size", "4") as running:
        check(running, prompts, expected)
        state = running.client.cluster().scheduler
        assert state.preemptions > 0
        assert state.kv_blocks_used == 0
