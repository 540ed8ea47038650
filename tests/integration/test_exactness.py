"""A request's tokens are its own: alone, in a crowd, in chunks, preempted, on shared prefixes.

Every cluster below is driven so that one thing happens all the time, and has to give each request what
it got when it was alone on a cluster where nothing happens.
"""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from client import Colrow
from client.grpc_client import Piece, TokenLogprobs
from tests import checkpoints
from tests.clusters import WorkerPool, cluster

pytestmark = pytest.mark.timeout(180)

NUM_REQUESTS = 40
CONTEXT = 120
VOCAB_SIZE = 331
TOLERANCE = 2e-4  # of log-probabilities, whose last bits depend on who else is in the batch

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0, "presence_penalty": 1.5, "logit_bias": {7: -100.0, 9: 3.0}},
    {"temperature": 0, "prompt_logprobs": 1, "logprobs": 0},
    {"temperature": 1, "seed": 1},
    {"temperature": 0.8, "top_k": 40, "seed": 2, "n": 2},
    {"temperature": 1.1, "top_p": 0.9, "seed": 3},
    {"temperature": 0.9, "min_p": 0.05, "seed": 4, "logprobs": 1},
    {"temperature": 1, "top_k": 60, "top_p": 0.8, "seed": 5, "repetition_penalty": 1.1},
]


@dataclass(frozen=True)
class Asked:
    """One request, and whether it should come a moment later than the others."""

    prompt: list[int]
    settings: dict[str, Any]
    delay_s: float


@dataclass(frozen=True)
class Got:
    """All that came of a request, by continuation."""

    tokens: dict[int, list[int]]
    finish_reasons: dict[int, str]
    logprobs: dict[int, list[TokenLogprobs]]
    prompt_logprobs: list[TokenLogprobs]


def requests(seed: int) -> list[Asked]:
    """Prompts of all lengths, a third of which begin alike."""
    generator = random.Random(seed)
    prefix = [generator.randrange(VOCAB_SIZE) for _ in range(50)]
    asked = []
    for index in range(NUM_REQUESTS):
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, 60))]
        if index % 3 == 0:
            prompt = prefix[: generator.randint(1, 50)] + prompt[:20]
        settings = dict(SETTINGS[index % len(SETTINGS)])
        settings["max_tokens"] = generator.randint(1, 40)
        if index % 7 == 3:
            settings["stop_token_ids"] = [generator.randrange(VOCAB_SIZE) for _ in range(20)]
            settings["min_tokens"] = generator.randint(0, settings["max_tokens"])
        asked.append(Asked(prompt, settings, generator.choice((0, 0, 0.02, 0.1))))
    return asked


def ask(colrow: Colrow, asked: Asked) -> Got:
    pieces: list[Piece] = list(colrow.generate(asked.prompt, timeout_s=100, **asked.settings))
    indices = range(asked.settings.get("n", 1))
    got = Got(
        tokens={i: [t for p in pieces if p.index == i for t in p.token_ids] for i in indices},
        finish_reasons={p.index: p.finish_reason for p in pieces if p.finish_reason},
        logprobs={i: [t for p in pieces if p.index == i for t in p.logprobs] for i in indices},
        prompt_logprobs=[t for p in pieces for t in p.prompt_logprobs],
    )
    assert pieces[-1].prompt_tokens == len(asked.prompt)
    assert pieces[-1].completion_tokens == sum(map(len, got.tokens.values()))
    return got


def same_logprobs(got: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert [t.token_id for t in got] == [t.token_id for t in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
        assert [t for _, t in a.top] == pytest.approx([t for _, t in b.top], abs=TOLERANCE)


def same(got: Got, expected: Got) -> None:
    assert got.tokens == expected.tokens
    assert got.finish_reasons == expected.finish_reasons
    for index, logprobs in expected.logprobs.items():
        same_logprobs(got.logprobs[index], logprobs)
    same_logprobs(got.prompt_logprobs, expected.prompt_logprobs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path, worker_pool: WorkerPool) -> dict[int, list[tuple[Asked, Got]]]:
    """What each request gets by itself, every token read before the next step is made."""
    plain = ("--run-ahead", "1", "--no-prefix-caching", "--max-model-len", str(CONTEXT))
    with cluster(worker_pool, folder, 2, *plain) as served:
        return {
            seed: [(asked, ask(served.client, asked)) for asked in requests(seed)]
            for seed in (1, 2)
        }


# What happens all the time, the flags that make it happen, and the field that shows that it did.
CROWDS: dict[str, tuple[int, tuple[str, ...], str]] = {
    "in a crowd": (2, (), "steps"),
    "in chunks": (2, ("--max-batched-tokens", "9", "--max-running", "5"), "steps"),
    "preempted": (2, ("--num-blocks", "30", "--block-size", "4"), "preemptions"),
    "on shared prefixes": (2, ("--block-size", "2"), "prefix_hits"),
    "with steps read at once": (2, ("--run-ahead", "1"), "steps"),
    "three steps ahead": (
        2,
        ("--run-ahead", "3", "--num-blocks", "60", "--block-size", "3"),
        "steps",
    ),
    "over three ranks": (3, ("--max-batched-tokens", "40", "--max-running", "20"), "steps"),
    "on one rank": (1, ("--num-blocks", "31", "--block-size", "4"), "preemptions"),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_a_request_gets_the_tokens_that_it_gets_alone(
    crowd: str,
    folder: Path,
    alone: dict[int, list[tuple[Asked, Got]]],
    worker_pool: WorkerPool,
) -> None:
    tp, flags, field = CROWDS[crowd]
    flags = ("--max-model-len", str(CONTEXT), *flags)
    with cluster(worker_pool, folder, tp, *flags) as served, ThreadPoolExecutor(64) as threads:

        def late(pair: tuple[Asked, Got]) -> None:
            asked, expected = pair
            time.sleep(asked.delay_s)
            same(ask(served.client, asked), expected)

        for pairs in alone.values():
            order = random.Random(crowd).sample(pairs, len(pairs))
            for _ in threads.map(late, order):
                pass
        state = served.client.cluster().scheduler
        assert getattr(state, field) > 0
        assert (state.running, state.waiting, state.kv_blocks_used) == (0, 0, 0)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return checkpoints.oracle(folder)


def reference_logprobs(oracle: Any, tokens: list[int]) -> torch.Tensor:
    """float32 [len(tokens) - 1, vocabulary]: of each token but the first, from transformers."""
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


@pytest.fixture(scope="module")
def colrow(folder: Path, worker_pool: WorkerPool) -> Iterator[Colrow]:
    with cluster(worker_pool, folder, 3, "--max-batched-tokens", "50") as served:
        yield served.client


def test_scores_are_the_log_probabilities_of_transformers(colrow: Colrow, oracle: Any) -> None:
    generator = random.Random(0)
    lengths = (2, 3, 17, 120, checkpoints.CONTEXT)
    sequences = [[generator.randrange(VOCAB_SIZE) for _ in range(n)] for n in lengths]
    scores = colrow.score(sequences, top_logprobs=5)
    assert len(scores) == len(sequences)
    for tokens, score in zip(sequences, scores, strict=True):
        reference = reference_logprobs(oracle, tokens)
        assert [t.token_id for t in score.tokens] == tokens[1:]
        for row, item in zip(reference, score.tokens, strict=True):
            assert item.logprob == pytest.approx(float(row[item.token_id]), abs=TOLERANCE)
            assert item.rank == 1 + int((row > row[item.token_id]).sum())
            values, ids = row.topk(5)
            assert [token for token, _ in item.top] == ids.tolist()
            assert [value for _, value in item.top] == pytest.approx(values.tolist(), abs=TOLERANCE)
        assert score.logprob == pytest.approx(sum(t.logprob for t in score.tokens), abs=1e-4)


def test_a_sequence_of_one_token_has_nothing_to_score(colrow: Colrow) -> None:
    (score,) = colrow.score([[5]])
    assert (score.tokens, score.logprob) == ((), 0.0)


def test_scoring_is_the_same_beside_others_and_generates_nothing(colrow: Colrow) -> None:
    sequences = [[i % VOCAB_SIZE for i in range(seed, seed + 30)] for seed in range(40)]
    before = colrow.cluster().scheduler.generated_tokens
    together = colrow.score(sequences)
    assert colrow.cluster().scheduler.generated_tokens == before
    for tokens, score in zip(sequences[:5], together, strict=False):
        same_logprobs(list(colrow.score([tokens])[0].tokens), list(score.tokens))


def test_a_greedy_token_is_the_likeliest_and_its_number_the_very_same(
    colrow: Colrow, oracle: Any
) -> None:
    prompt = [3, 1, 4, 1, 5]
    pieces = list(colrow.generate(prompt, max_tokens=40, temperature=0, logprobs=3))
    items = [item for piece in pieces for item in piece.logprobs]
    assert len(items) == 40
    reference = reference_logprobs(oracle, prompt + [t.token_id for t in items])
    for row, item in zip(reference[len(prompt) - 1 :], items, strict=True):
        assert item.rank == 1
        assert item.top[0] == (item.token_id, item.logprob)
        assert item.logprob == pytest.approx(float(row.max()), abs=TOLERANCE)
