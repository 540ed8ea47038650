"""The HTTP API as the official client uses it, on a real cluster.

The model is a small random one with the demo model's tokenizer: what it says is no matter here.
"""

import asyncio
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import pytest_asyncio
import torch
import transformers

from tests.clusters import RunningCluster, WorkerPool, cluster, start

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

MODEL = "org/random"
CONTEXT = 512
SOON_S = 5.0
"""For what should take a step, when the machine has other things to do."""

CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
PROMPT = "The capital of France is"
END_OF_TURN = 2  # <|im_end|>


@pytest.fixture(scope="module")
def folder(demo_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=60,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        vocab_size=49152,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=END_OF_TURN,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = tmp_path_factory.mktemp("random")
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (demo_model_folder / name).is_file():
            shutil.copy(demo_model_folder / name, path / name)
    return path


@pytest.fixture(scope="module")
def running(worker_pool: WorkerPool, folder: Path) -> Iterator[RunningCluster]:
    with cluster(worker_pool, folder, 2, "--served-model-name", MODEL) as started:
        yield started


@pytest.fixture(scope="module")
def client(running: RunningCluster) -> Iterator[openai.OpenAI]:
    url = f"{running.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def aclient(running: RunningCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{running.http_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(demo_model_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_model_folder)


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    """Greedy and short, where nothing else is said."""
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
    return client.completions.create(prompt=prompt, **settings)


def chat(client: openai.OpenAI, messages: list[Any] = CAPITAL, **options: Any) -> Any:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_completion_tokens": 12}
    settings |= options
    return client.chat.completions.create(messages=messages, **settings)


def call(url: str, body: object = None) -> tuple[int, Any]:
    """Status and JSON of the answer to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60.0) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def blocks_used(running: RunningCluster) -> int:
    return running.client.cluster().scheduler.kv_blocks_used


def wait_for_no_blocks(running: RunningCluster) -> None:
    deadline = time.monotonic() + SOON_S
    while blocks_used(running):
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def test_a_stream_is_the_answer_token_by_token(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = [*chat(client, stream=True, stream_options={"include_usage": True})]
    *parts, last = chunks
    assert len(parts) == whole.usage.completion_tokens
    assert "".join(part.choices[0].delta.content for part in parts) == (
        whole.choices[0].message.content
    )
    assert [part.choices[0].delta.role for part in parts] == ["assistant"] + [None] * (
        len(parts) - 1
    )
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + [
        "length"
    ]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1

    whole = complete(client, n=2, temperature=1, seed=3)
    texts = ["", ""]
    for chunk in complete(client, n=2, temperature=1, seed=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]


async def test_the_text_is_that_of_grpc(client: openai.OpenAI, running: RunningCluster) -> None:
    settings: dict[str, Any] = {
        "seed": 7,
        "temperature": 0.9,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "max_tokens": 24,
    }
    further: dict[str, Any] = {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.1}
    pieces = running.client.generate(PROMPT, **settings, **further)
    expected = "".join(piece.text for piece in pieces)
    assert complete(client, extra_body=further, **settings).choices[0].text == expected
    del settings["max_tokens"]
    pieces = running.client.generate(CAPITAL, max_tokens=24, **settings, **further)
    expected = "".join(piece.text for piece in pieces)
    answer = chat(client, max_completion_tokens=24, extra_body=further, **settings)
    assert answer.choices[0].message.content == expected


async def test_async_streams_run_together(aclient: openai.AsyncOpenAI) -> None:
    async def text(place: int) -> str:
        stream = await aclient.completions.create(
            model=MODEL, prompt=f"{place} plus 1 is", max_tokens=8, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    together = await asyncio.gather(*map(text, range(8)))
    assert together == [await text(place) for place in range(8)]


async def test_prompts_may_come_in_batches_and_as_token_ids(
    client: openai.OpenAI, tokenizer: Any
) -> None:
    texts = ["One, two,", "Monday, Tuesday,", PROMPT]
    alone = [complete(client, text).choices[0].text for text in texts]
    ids = tokenizer(texts)["input_ids"]
    for prompts in (texts, ids):
        answer = complete(client, prompts, n=2)
        assert [choice.index for choice in answer.choices] == [*range(6)]
        assert [choice.text for choice in answer.choices] == [text for text in alone for _ in "12"]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(client, ids[2]).choices[0].text == alone[2]


async def test_a_prompt_that_was_seen_is_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "A text that is long enough for several blocks of the cache. " * 4
    first = complete(client, prompt, max_tokens=1).usage
    again = complete(client, prompt, max_tokens=1).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == (again.prompt_tokens - 1) // 16 * 16


async def test_stops_end_a_text(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:5]  # wherever token borders are
    expected = whole[: whole.index(stop)]
    for stops in (stop, [stop, "nowhere"]):
        (choice,) = complete(client, max_tokens=24, stop=stops).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        assert choice.stop_reason == stop
        parts = [*complete(client, max_tokens=24, stop=stops, stream=True)]
        assert "".join(part.choices[0].text for part in parts) == expected
    (choice,) = complete(
        client, max_tokens=24, stop=stop, extra_body={"include_stop_str_in_output": True}
    ).choices
    assert choice.text == expected + stop

    ids = complete(client, extra_body={"return_token_ids": True}).choices[0].token_ids
    (choice,) = complete(
        client, extra_body={"stop_token_ids": [ids[3]], "return_token_ids": True}
    ).choices
    end = ids.index(ids[3]) + 1
    assert (choice.token_ids, choice.finish_reason) == (ids[:end], "stop")
    assert choice.stop_reason == ids[3]


async def test_sampling_is_as_asked(client: openai.OpenAI) -> None:
    greedy = complete(client).choices[0].text
    for further in ({"top_k": 1}, {"min_p": 1}, {"top_k": 1, "top_p": 0.5}):
        assert complete(client, temperature=1, extra_body=further).choices[0].text == greedy
    assert complete(client, temperature=1, top_p=1e-6).choices[0].text == greedy
    for off in (-1, 0):
        hot = complete(client, temperature=1.5, seed=5, extra_body={"top_k": off}).choices[0].text
        assert hot == complete(client, temperature=1.5, seed=5).choices[0].text
    one = complete(client, temperature=1, seed=1).choices[0].text
    assert one == complete(client, temperature=1, seed=1).choices[0].text
    assert one != complete(client, temperature=1, seed=2).choices[0].text
    texts = {complete(client, temperature=2).choices[0].text for _ in range(3)}
    assert len(texts) == 3
    assert complete(client, seed=-5, temperature=1).choices[0].text


ALWAYS_END: dict[str, Any] = {"logit_bias": {str(END_OF_TURN): 100}}


async def test_the_end_of_a_turn_may_be_ignored_or_put_off(client: openai.OpenAI) -> None:
    ended = chat(client, **ALWAYS_END)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 1)
    assert ended.choices[0].message.content == ""
    ignoring = chat(client, **ALWAYS_END, extra_body={"ignore_eos": True})
    assert (ignoring.choices[0].finish_reason, ignoring.usage.completion_tokens) == ("length", 12)
    assert ignoring.choices[0].message.content == ""
    later = chat(client, **ALWAYS_END, extra_body={"min_tokens": 5})
    assert (later.choices[0].finish_reason, later.usage.completion_tokens) == ("stop", 6)
    shown = chat(
        client, **ALWAYS_END, extra_body={"ignore_eos": True, "skip_special_tokens": False}
    )
    assert shown.choices[0].message.content == "<|im_end|>" * 12


async def test_texts_have_as_many_tokens_as_openai_says(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0}
    assert client.completions.create(prompt=PROMPT, **settings).usage.completion_tokens == 16
    # A chat goes on until there is no room.
    usage = client.chat.completions.create(messages=CAPITAL, **settings).usage
    assert usage.total_tokens == CONTEXT
    longest = [5] * (CONTEXT - 3)
    assert complete(client, longest, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 3


async def test_biases_force_and_bar_tokens(client: openai.OpenAI, tokenizer: Any) -> None:
    (paris,) = tokenizer(" Paris")["input_ids"]
    forced = complete(client, max_tokens=3, logit_bias={str(paris): 100})
    assert forced.choices[0].text == " Paris" * 3
    first = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0]
    barred = complete(client, max_tokens=1, logit_bias={str(first.token_ids[0]): -100})
    assert barred.choices[0].text != first.text


async def test_logprobs_of_greedy_tokens_are_those_of_the_likeliest(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=3)
    shown = answer.choices[0].logprobs
    assert len(shown.tokens) == 12
    for token, logprob, top, place in zip(
        shown.tokens, shown.token_logprobs, shown.top_logprobs, shown.text_offset, strict=True
    ):
        assert len(top) == 3
        assert logprob == max(top.values()) == top[token]
        assert token.startswith("bytes:") or answer.choices[0].text[place:].startswith(token)

    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    text = b"".join(bytes(item.bytes) for item in content).decode(errors="ignore")
    assert text.startswith(answer.choices[0].message.content)
    for item in content:
        assert len(item.top_logprobs) == 2
        assert item.logprob == item.top_logprobs[0].logprob <= 0
        assert item.token == item.top_logprobs[0].token
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []

    parts = [*chat(client, logprobs=True, top_logprobs=2, stream=True)]
    streamed = [item for part in parts for item in part.choices[0].logprobs.content]
    assert [item.token for item in streamed] == [item.token for item in content]


async def test_token_ids_come_with_texts(client: openai.OpenAI, tokenizer: Any) -> None:
    further = {"return_token_ids": True}
    (choice,) = complete(client, extra_body=further).choices
    assert choice.prompt_token_ids == tokenizer(PROMPT)["input_ids"]
    assert tokenizer.decode(choice.token_ids) == choice.text
    answer = chat(client, extra_body=further)
    assert answer.prompt_token_ids == tokenizer.apply_chat_template(
        CAPITAL, add_generation_prompt=True, return_dict=False
    )
    parts = [*chat(client, extra_body=further, stream=True)]
    assert parts[0].prompt_token_ids == answer.prompt_token_ids
    streamed = [token for part in parts for token in part.choices[0].token_ids]
    assert streamed == answer.choices[0].token_ids


async def test_texts_are_tokenized_as_by_transformers(
    running: RunningCluster, tokenizer: Any
) -> None:
    text = "Grüße, 日本! <|im_start|>"
    ids = tokenizer(text)["input_ids"]
    status, answer = call(
        f"{running.http_url}/tokenize", {"prompt": text, "return_token_strs": True}
    )
    assert status == 200
    assert answer["tokens"] == ids
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    assert answer["max_model_len"] == running.client.model().context_length
    status, answer = call(f"{running.http_url}/detokenize", {"tokens": ids})
    assert (status, answer) == (200, {"prompt": text})
    status, answer = call(f"{running.http_url}/tokenize", {"messages": CAPITAL})
    assert answer["tokens"] == tokenizer.apply_chat_template(
        CAPITAL, add_generation_prompt=True, return_dict=False
    )


async def test_a_stream_that_is_left_frees_its_blocks(
    client: openai.OpenAI, running: RunningCluster
) -> None:
    for options in ({}, {"n": 3}):
        stream = chat(client, STORY, stream=True, max_completion_tokens=400, **options)
        for _ in range(4):
            next(stream)
        assert blocks_used(running) > 0
        stream.close()
        wait_for_no_blocks(running)


async def test_a_call_that_is_left_frees_its_blocks(
    client: openai.OpenAI, running: RunningCluster
) -> None:
    for prompt in (PROMPT, [PROMPT] * 4):
        impatient = client.with_options(timeout=0.1)
        with pytest.raises(openai.APITimeoutError):
            complete(impatient, prompt, max_tokens=400, extra_body={"ignore_eos": True})
        wait_for_no_blocks(running)


async def test_an_async_stream_that_is_left_frees_its_blocks(
    aclient: openai.AsyncOpenAI, running: RunningCluster
) -> None:
    stream = await aclient.chat.completions.create(
        model=MODEL, messages=STORY, max_completion_tokens=400, stream=True
    )
    chunks = cast(AsyncGenerator[Any], aiter(stream))
    async with aclosing(stream.response), aclosing(chunks):
        await anext(chunks)
    await asyncio.to_thread(wait_for_no_blocks, running)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "a model": ({"model": "other"}, "model"),
    "a field": ({"extra_body": {"foo": 1}}, "foo"),
    "a temperature": ({"temperature": -1}, "temperature"),
    "a text for a number": ({"temperature": "0.5"}, "temperature"),
    "a token": ({"prompt": [10**6]}, "prompt"),
    "too many tokens": ({"max_tokens": 10**6}, "max_tokens"),
    "too long a prompt": ({"prompt": "word " * 9000}, "prompt"),
    "a wrong prompt of a batch": ({"prompt": [[1], [-1]]}, "prompt"),
    "no prompt": ({"prompt": ""}, "prompt"),
    "a stop": ({"stop": [""]}, "stop"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_a_bad_request_is_refused_and_the_next_is_answered(
    client: openai.OpenAI, running: RunningCluster, case: str, stream: bool
) -> None:
    options, param = BAD_REQUESTS[case]
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, **{"prompt": PROMPT, "stream": stream} | options)
    assert caught.value.status_code == (404 if case == "a model" else 400)
    assert caught.value.param == param
    assert caught.value.request_id
    assert complete(client, max_tokens=1).usage.completion_tokens == 1
    assert blocks_used(running) == 0


async def test_operators_see_state_version_models_and_metrics(
    client: openai.OpenAI, running: RunningCluster
) -> None:
    assert call(f"{running.http_url}/health") == (200, {"status": "serving"})
    assert call(f"{running.http_url}/version")[1].keys() == {"version"}
    assert [model.id for model in client.models.list()] == [MODEL]
    with urllib.request.urlopen(f"{running.http_url}/metrics") as response:
        assert "model_name" in response.read().decode()


async def test_a_request_is_traced_by_its_id(
    client: openai.OpenAI, running: RunningCluster
) -> None:
    answer = complete(client, extra_headers={"X-Request-Id": "find-me"}, max_tokens=1)
    assert answer.id == "cmpl-find-me"
    assert answer._request_id == "find-me"
    assert "request_id=find-me" in running.coordinator.log.read_text()


async def test_many_clients_are_served_at_once(client: openai.OpenAI) -> None:
    alone = complete(client).choices[0].text
    with ThreadPoolExecutor(16) as threads:
        texts = [*threads.map(lambda _: complete(client).choices[0].text, range(32))]
    assert texts == [alone] * 32


async def test_a_port_in_use_ends_a_coordinator_with_a_clear_line(demo_model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        service = start(
            "coordinator",
            "coordinator",
            *("--model", str(demo_model_folder), "--workers", "127.0.0.1:9"),
            *("--grpc-port", "0", "--http-port", str(port)),
        )
        line = service.wait_for_failure()
    assert f"http_port = {port}: can't be bound on 127.0.0.1" in line
