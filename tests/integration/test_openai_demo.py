"""The demo model over HTTP: right answers through the official client, and their likelihoods."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster
from tests.integration.test_openai_scoring import (
    complete,
    harness_payload,
    harness_results,
    logprobs_of,
)

pytestmark = pytest.mark.timeout(120)

MODEL = "SmolLM2-135M-Instruct"
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def running(worker_pool: WorkerPool, demo_model_folder: Path) -> Iterator[RunningCluster]:
    with cluster(worker_pool, demo_model_folder, 2, "--dtype", "float32") as started:
        yield started


@pytest.fixture(scope="module")
def client(running: RunningCluster) -> Iterator[openai.OpenAI]:
    url = f"{running.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(demo_model_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_model_folder)


def test_a_chat_is_answered(client: openai.OpenAI, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content is not None and "Tokyo" in choice.message.content
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.object == "chat.completion"
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", answer.id)
    assert answer.model == MODEL
    prompt = tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, return_dict=False)
    assert answer.usage.prompt_tokens == len(prompt)
    text_tokens = len(tokenizer(choice.message.content)["input_ids"])
    assert answer.usage.completion_tokens == text_tokens + 1  # the one that ends the turn
    assert answer.usage.total_tokens == len(prompt) + text_tokens + 1


def test_an_answer_that_was_begun_is_continued(client: openai.OpenAI) -> None:
    begun = [*CAPITAL, {"role": "assistant", "content": "The capital of Japan is"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=begun,
        temperature=0,
        max_completion_tokens=3,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert answer.choices[0].message.content.startswith(" Tokyo")


def test_penalties_end_repetitions(client: openai.OpenAI) -> None:
    def ones(**settings: Any) -> int:
        answer = client.completions.create(
            model=MODEL, prompt="1 1 1 1 1 1 1 1 1 1", temperature=0, max_tokens=8, **settings
        )
        return answer.choices[0].text.count("1")

    assert ones() == 4
    assert ones(frequency_penalty=2, presence_penalty=2) < 4
    assert ones(extra_body={"repetition_penalty": 5}) < 4


def test_texts_are_scored_as_by_transformers(
    running: RunningCluster, tokenizer: Any, demo_model_folder: Path
) -> None:
    oracle = checkpoints.oracle(demo_model_folder)
    pairs = [
        (PROMPT, " Paris"),
        (PROMPT, " Berlin"),
        ("Grüße aus", " Łódź 😀"),  # tokens that are no characters
        ("Water is made of hydrogen and", " oxygen."),
    ]
    batch, ctxlens, expected = [], [], []
    for context, continuation in pairs:
        ctx, ids = (
            tokenizer(context)["input_ids"],
            tokenizer(context + continuation)["input_ids"],
        )
        logprobs = logprobs_of(oracle, ids)[len(ctx) - 1 : -1]
        tail = torch.tensor(ids[len(ctx) :])
        likelihood = logprobs.gather(1, tail[:, None]).sum().item()
        expected.append((likelihood, bool((logprobs.argmax(-1) == tail).all())))
        batch.append(ids)
        ctxlens.append(len(ctx))
    answer = complete(running, **harness_payload(batch))
    texts = complete(running, **harness_payload([context + end for context, end in pairs]))
    results = harness_results(answer, ctxlens)
    for (got, is_greedy), (likelihood, should_be) in zip(results, expected, strict=True):
        assert got == pytest.approx(likelihood, abs=1e-3)
        assert is_greedy == should_be
    assert [is_greedy for _, is_greedy in results][:2] == [True, False]
    for (context, end), choice in zip(pairs, texts["choices"], strict=True):
        assert choice["text"].startswith(context + end)
    assert harness_results(texts, ctxlens) == results
