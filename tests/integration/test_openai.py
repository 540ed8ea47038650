"""The HTTP API of a real cluster, as its users drive it: the official client, and lm-eval's requests."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(120)

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "Name the capital of France."}]
STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and the sea."}]
PROMPT = "The three primary colours are"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def served(demo_model_folder: Path, worker_pool: WorkerPool) -> Iterator[RunningCluster]:
    with cluster(worker_pool, demo_model_folder, 2, "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.http_url}/v1", api_key="none", max_retries=0, timeout=60
    ) as made:
        yield made


def wait_until_idle(served: RunningCluster) -> None:
    deadline = time.monotonic() + 5
    while True:
        state = served.client.cluster().scheduler
        if (state.running, state.waiting, state.kv_blocks_used) == (0, 0, 0):
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.01)


def grpc_text(served: RunningCluster, prompt: Any, **settings: Any) -> str:
    return "".join(piece.text for piece in served.client.generate(prompt, **settings))


# The official client


def test_the_model_is_listed_and_found_by_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "colrow"


def test_a_chat_is_answered_as_over_grpc(client: openai.OpenAI, served: RunningCluster) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=32
    )
    (choice,) = answer.choices
    assert choice.message.content == grpc_text(served, QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in (choice.message.content or "")
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_chat_says_the_same_in_chunks_that_each_have_tokens(
    client: openai.OpenAI, served: RunningCluster, include_usage: bool
) -> None:
    settings: dict[str, Any] = {"temperature": 1, "seed": 5}
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=STORY,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": include_usage},
            extra_body={"return_token_ids": True, "ignore_eos": True},
            **settings,
        )
    )
    if include_usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None and last.usage.completion_tokens == 24
    choices = [chunk.choices[0] for chunk in chunks]
    # None for the role alone and none for the end alone: they would spoil a client's token times.
    assert all(choice.model_extra and choice.model_extra["token_ids"] for choice in choices)
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == grpc_text(served, STORY, max_tokens=24, ignore_eos=True, **settings)


def test_completions_of_text_and_of_its_token_ids_are_equal_also_in_a_batch(
    client: openai.OpenAI, served: RunningCluster
) -> None:
    ids = served.client.tokenize(PROMPT)
    prompts: list[Any] = [PROMPT, ids, [PROMPT, PROMPT], [ids, ids]]
    texts = []
    for prompt in prompts:
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        texts += [choice.text for choice in answer.choices]
    assert len(texts) == 6
    assert set(texts) == {grpc_text(served, PROMPT, temperature=0, max_tokens=12)}


def test_n_stop_echo_and_the_seed(client: openai.OpenAI, served: RunningCluster) -> None:
    settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 7}
    three = client.completions.create(n=3, **settings)
    again = client.completions.create(n=3, **settings)
    assert [c.text for c in three.choices] == [c.text for c in again.choices]
    assert len({c.text for c in three.choices}) > 1
    whole = client.completions.create(temperature=0, echo=True, **settings)
    text = whole.choices[0].text
    assert text.startswith(PROMPT)
    stop = text[len(PROMPT) + 6 : len(PROMPT) + 10]
    stopped = client.completions.create(temperature=0, stop=[stop, "never"], **settings)
    answer = text[len(PROMPT) :]
    assert stopped.choices[0].text == answer[: answer.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_extensions_reach_the_sampler(client: openai.OpenAI, served: RunningCluster) -> None:
    extra = {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2, "min_tokens": 5}
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=20,
        seed=3,
        temperature=0.9,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={"28": -100},
        extra_body=extra,
    )
    assert answer.choices[0].text == grpc_text(
        served,
        PROMPT,
        max_tokens=20,
        seed=3,
        temperature=0.9,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={28: -100.0},
        **extra,
    )


def test_a_second_request_with_the_prompt_of_the_first_finds_it_cached(
    client: openai.OpenAI,
) -> None:
    long = "A text of its own that nobody else sends. " * 12
    usages = [
        client.completions.create(model=MODEL, prompt=long, max_tokens=1).usage for _ in range(2)
    ]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]  # type: ignore[union-attr]
    assert cached[0] == 0
    assert cached[1] > 50  # type: ignore[operator]


def test_chat_logprobs_name_the_likeliest_tokens_with_their_bytes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    shown = b"".join(bytes(item.bytes or ()) for item in choice.logprobs.content)
    assert shown.decode().startswith(choice.message.content or "?")
    for item in choice.logprobs.content:
        assert len(item.top_logprobs) == 3
        assert item.logprob == item.top_logprobs[0].logprob <= 0
        assert item.token == item.top_logprobs[0].token


async def test_many_at_once_from_the_asynchronous_client(served: RunningCluster) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{served.http_url}/v1", api_key="none", max_retries=0, timeout=100
    ) as client:

        async def ask(seed: int) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=PROMPT, seed=seed % 4, max_tokens=16, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(ask(seed) for seed in range(24)))
    assert len(set(texts)) == 4
    for seed in range(4):
        assert len(set(texts[seed::4])) == 1


# lm-eval's local-completions


def test_lm_evals_batched_token_ids_get_the_log_probabilities_of_transformers(
    served: RunningCluster, demo_model_folder: Path
) -> None:
    contexts = ["The capital of France is", "Two plus two equals"]
    continuations = [" Paris.", " seven million"]
    encode = served.client.tokenize
    whole = [encode(a + b) for a, b in zip(contexts, continuations, strict=True)]
    lengths = [len(encode(context)) for context in contexts]
    answer = post(
        served,
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": whole,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    )
    oracle = checkpoints.oracle(demo_model_folder)
    for choice, tokens, length in zip(answer["choices"], whole, lengths, strict=True):
        logprobs = choice["logprobs"]
        given = logprobs["token_logprobs"][length:-1]
        tops = logprobs["top_logprobs"][length:-1]
        with torch.inference_mode():
            reference = oracle(torch.tensor([tokens])).logits[0].log_softmax(-1)
        greedy = True
        for place, value, top in zip(range(length, len(tokens)), given, tops, strict=True):
            row = reference[place - 1]
            assert value == pytest.approx(float(row[tokens[place]]), abs=TOLERANCE)
            assert (value == max(top.values())) == (int(row.argmax()) == tokens[place])
            greedy &= value == max(top.values())
        assert logprobs["token_logprobs"][0] is None
        assert greedy == (reference[length - 1 : -1].argmax(-1).tolist() == tokens[length:])
    assert [c["index"] for c in answer["choices"]] == [0, 1]


def test_a_prompt_can_be_scored_without_a_new_token(served: RunningCluster) -> None:
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = post(served, "/v1/completions", body)
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT
    (score,) = served.client.score([served.client.tokenize(PROMPT)])
    given = choice["logprobs"]["token_logprobs"]
    assert given[0] is None
    assert sum(given[1:]) == pytest.approx(score.logprob, abs=1e-3)
    assert answer["usage"]["completion_tokens"] == 0


# The rest of the routes


def call(
    served: RunningCluster, path: str, data: bytes | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(f"{served.http_url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


JSON = {"Content-Type": "application/json"}


def post(served: RunningCluster, path: str, body: Any) -> Any:
    status, content, _ = call(served, path, json.dumps(body).encode(), **JSON)
    assert status == 200, content
    return json.loads(content)


def test_text_becomes_tokens_and_text_again(served: RunningCluster) -> None:
    text = "Grüße aus Köln, 你好!"
    tokens = post(served, "/tokenize", {"prompt": text})
    assert tokens["tokens"] == served.client.tokenize(text)
    assert tokens["count"] == len(tokens["tokens"])
    assert post(served, "/detokenize", {"tokens": tokens["tokens"]}) == {"prompt": text}
    chat = post(served, "/tokenize", {"messages": QUESTION})
    assert chat["count"] > tokens["count"]


def test_operators_find_health_version_metrics_and_the_schema(served: RunningCluster) -> None:
    assert call(served, "/health")[0] == 200
    assert json.loads(call(served, "/version")[1])["version"]
    metrics = call(served, "/metrics")[1].decode()
    assert f'vllm:num_requests_running{{model_name="{MODEL}"}}' in metrics
    assert 'module="model.layers.0"' in metrics
    assert "/v1/chat/completions" in json.loads(call(served, "/openapi.json")[1])["paths"]


def test_a_request_id_is_kept_from_the_header_to_the_log(served: RunningCluster) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2}).encode()
    headers = {**JSON, "X-Request-Id": "my-own-id"}
    _, content, answered = call(served, "/v1/completions", body, **headers)
    assert answered["X-Request-Id"] == "my-own-id"
    assert json.loads(content)["id"] == "cmpl-my-own-id"
    assert "request_id=my-own-id" in served.coordinator.log.read_text()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(served: RunningCluster, stream: bool) -> None:
    with openai.OpenAI(
        base_url=f"{served.http_url}/v1", api_key="none", max_retries=0, timeout=1.0
    ) as client:
        settings: dict[str, Any] = {"model": MODEL, "messages": STORY, "max_tokens": 4000}
        settings["extra_body"] = {"ignore_eos": True}
        if stream:
            chunks = iter(client.chat.completions.create(stream=True, **settings))
            next(chunks)
            assert served.client.cluster().scheduler.kv_blocks_used > 0
            chunks.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(**settings)
    wait_until_idle(served)


# Bad input

GOOD: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1}
CHAT: dict[str, Any] = {"messages": QUESTION, "max_tokens": 1}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

BAD: list[tuple[str, Any, int, str | None]] = [
    (COMPLETIONS, GOOD | {"temperature": -1}, 400, "temperature"),
    (COMPLETIONS, GOOD | {"temperature": "0.5"}, 400, "temperature"),
    (COMPLETIONS, GOOD | {"top_p": 0}, 400, "top_p"),
    (COMPLETIONS, GOOD | {"max_tokens": True}, 400, "max_tokens"),
    (COMPLETIONS, GOOD | {"max_tokens": 10**30}, 400, "max_tokens"),
    (COMPLETIONS, GOOD | {"n": 0}, 400, "n"),
    (COMPLETIONS, GOOD | {"n": 128, "max_tokens": 8000}, 400, "n"),
    (COMPLETIONS, GOOD | {"temprature": 1}, 400, "temprature"),
    (COMPLETIONS, GOOD | {"suffix": "x"}, 400, "suffix"),
    (COMPLETIONS, GOOD | {"logit_bias": {"99999999": 1}}, 400, None),
    (COMPLETIONS, GOOD | {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, GOOD | {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, GOOD | {"prompt": [[1], []]}, 400, "prompt"),
    (COMPLETIONS, GOOD | {"prompt": [10**6]}, 400, "prompt"),
    (COMPLETIONS, GOOD | {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, GOOD | {"prompt": "word " * 9000}, 400, "prompt"),
    (COMPLETIONS, GOOD | {"model": "gpt-5"}, 404, "model"),
    (COMPLETIONS, b'{"prompt": ', 400, None),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, None),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, None),
    (COMPLETIONS, b"[" * 100_000, 400, None),
    (COMPLETIONS, b'{"prompt": "' + b"a" * (17 * 2**20) + b'"}', 413, None),
    (CHATS, CHAT | {"messages": []}, 400, "messages"),
    (CHATS, CHAT | {"messages": [{"role": "user"}]}, 400, None),
    (CHATS, CHAT | {"messages": "hello"}, 400, "messages"),
    (CHATS, CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
    (CHATS, CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    (CHATS, CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    (CHATS, CHAT | {"logprobs": True, "top_logprobs": 1000}, 400, "top_logprobs"),
    (CHATS, CHAT | {"stream": True, "n": 1000}, 400, "n"),
    ("/tokenize", {}, 400, None),
    ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
    ("/v1/nothing", GOOD, 404, None),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    BAD,
    ids=[f"{i}-{path}" for i, (path, *_) in enumerate(BAD)],
)
def test_bad_input_gets_its_status_and_openais_form_and_a_good_request_is_answered_right_after(
    served: RunningCluster, path: str, body: Any, status: int, param: str | None
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, content, headers = call(served, path, data, **JSON)
    assert got == status, content
    assert headers["Content-Type"].startswith("application/json")
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param
    assert post(served, COMPLETIONS, GOOD)["choices"][0]["finish_reason"] == "length"
