"""Log-probabilities over HTTP as evaluation harnesses ask for them, compared with transformers."""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(120)

VARIATION = "qwen2"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(VARIATION, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(worker_pool: WorkerPool, folder: Path) -> Iterator[RunningCluster]:
    with cluster(worker_pool, folder, 2, "--max-running", "4") as started:
        yield started


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return checkpoints.oracle(folder)


def logprobs_of(oracle: Any, ids: list[int]) -> torch.Tensor:
    """[token, vocabulary]: of each next token, after each of these."""
    with torch.inference_mode():
        return torch.log_softmax(oracle(torch.tensor([ids])).logits[0].double(), dim=-1)


def complete(running: RunningCluster, **body: Any) -> dict[str, Any]:
    response = httpx2.post(f"{running.http_url}/v1/completions", json=body, timeout=60.0)
    assert response.status_code == 200, response.text
    return response.json()


def random_ids(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, vocab_size, (count, length), generator=generator).tolist()


def harness_payload(batch: Sequence[str | list[int]]) -> dict[str, Any]:
    """What lm-evaluation-harness sends for a batch of contexts with their continuations."""
    return {
        "prompt": batch,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def harness_results(answer: dict[str, Any], ctxlens: list[int]) -> list[tuple[float, bool]]:
    """What it takes from the answer: a continuation's log-likelihood, and whether it is greedy."""
    results = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, ctxlen in zip(choices, ctxlens, strict=True):
        tokens = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        tops = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        is_greedy = all(t == max(top.values()) for t, top in zip(tokens, tops, strict=True))
        results.append((sum(tokens), is_greedy))
    return results


def test_a_harness_gets_likelihoods_and_what_is_greedy(
    running: RunningCluster, oracle: Any
) -> None:
    contexts = random_ids(9, 20, oracle.config.vocab_size)
    batch, ctxlens, expected = [], [], []
    for place, context in enumerate(contexts):
        context = context[: 3 + 2 * place]
        continuation = checkpoints.greedy(oracle, context, 1 + place % 4)
        if place % 3 == 0:  # one token is another one
            continuation[-1] = (continuation[-1] + 1) % oracle.config.vocab_size
        ids = context + continuation
        logprobs = logprobs_of(oracle, ids)[len(context) - 1 : -1]
        likelihood = logprobs.gather(1, torch.tensor([continuation]).T).sum().item()
        expected.append((likelihood, place % 3 != 0))
        batch.append(ids)
        ctxlens.append(len(context))
    for _ in range(2):  # once more, when the cache knows the prompts
        results = harness_results(complete(running, **harness_payload(batch)), ctxlens)
        for (got, is_greedy), (likelihood, should_be) in zip(results, expected, strict=True):
            assert got == pytest.approx(likelihood, abs=TOLERANCE * 4)
            assert is_greedy == should_be


def test_every_logprob_of_a_prompt_is_that_of_transformers(
    running: RunningCluster, oracle: Any
) -> None:
    (ids,) = random_ids(1, 40, oracle.config.vocab_size)
    expected = logprobs_of(oracle, ids)
    scored = complete(running, prompt=ids, max_tokens=0, echo=True, logprobs=5)
    longer = complete(running, prompt=ids, max_tokens=2, temperature=0, echo=True, logprobs=5)
    prompt_only = scored["choices"][0]["logprobs"]
    assert scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["finish_reason"] == "length"
    assert len(prompt_only["tokens"]) == 40
    for shown in (prompt_only, longer["choices"][0]["logprobs"]):
        assert shown["token_logprobs"][0] is None and shown["top_logprobs"][0] is None
        for place in range(1, 40):
            after = expected[place - 1]
            assert shown["tokens"][place] == f"token_id:{ids[place]}"
            assert shown["token_logprobs"][place] == pytest.approx(
                after[ids[place]].item(), abs=TOLERANCE
            )
            likeliest = after.topk(5)
            top = shown["top_logprobs"][place]
            assert [*top][:5] == [f"token_id:{token}" for token in likeliest.indices.tolist()]
            assert [*top.values()][:5] == pytest.approx(likeliest.values.tolist(), abs=TOLERANCE)
            assert len(top) == 5 + (f"token_id:{ids[place]}" not in [*top][:5])


def test_generated_logprobs_and_ranks_are_those_of_transformers(
    running: RunningCluster, oracle: Any
) -> None:
    (ids,) = random_ids(1, 10, oracle.config.vocab_size)
    further = {"return_token_ids": True, "prompt_logprobs": 1, "seed": 5, "temperature": 1.5}
    answer = complete(running, prompt=ids, max_tokens=20, logprobs=2, **further)
    (choice,) = answer["choices"]
    every = logprobs_of(oracle, ids + choice["token_ids"])
    assert choice["prompt_token_ids"] == ids
    for place, token in enumerate(choice["token_ids"], len(ids)):
        # The model's own, before temperature.
        assert choice["logprobs"]["token_logprobs"][place - len(ids)] == pytest.approx(
            every[place - 1, token].item(), abs=TOLERANCE
        )
    assert choice["prompt_logprobs"][0] is None
    for place, entry in enumerate(choice["prompt_logprobs"][1:], 1):
        after = every[place - 1]
        own = entry[str(ids[place])]
        assert own["rank"] == 1 + int((after > after[ids[place]]).sum())
        assert str(after.argmax().item()) in entry


def test_streamed_logprobs_are_those_of_the_whole(running: RunningCluster, oracle: Any) -> None:
    prompts = random_ids(3, 12, oracle.config.vocab_size)
    body = {
        "prompt": prompts,
        "max_tokens": 6,
        "echo": True,
        "logprobs": 2,
        "n": 2,
        "seed": 1,
        "return_token_ids": True,
    }
    whole = complete(running, **body)
    url = f"{running.http_url}/v1/completions"
    parts: dict[int, list[Any]] = {}
    with httpx2.stream("POST", url, json=body | {"stream": True}, timeout=60.0) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        (choice,) = httpx2.Response(200, content=event).json()["choices"]
        parts.setdefault(choice["index"], []).append(choice)
    for choice in whole["choices"]:
        mine = parts[choice["index"]]
        assert [t for part in mine for t in part["token_ids"]] == choice["token_ids"]
        for name in ("tokens", "token_logprobs"):
            streamed = [item for part in mine for item in part["logprobs"][name]]
            assert len(streamed) == 18
            if name == "tokens":
                assert streamed == choice["logprobs"][name]
            else:
                assert streamed[1:] == pytest.approx(choice["logprobs"][name][1:], abs=TOLERANCE)
