"""The HTTP API over an engine that follows a script: what is refused, and how; who leaves, and when."""

import asyncio
import contextlib
import json
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import openai
import pytest
import pytest_asyncio
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from colrow import __version__
from colrow.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from coordinator.cluster import Cluster, State
from coordinator.config import parse
from coordinator.http.access import Authorize
from coordinator.http.body import MAX_BODY_BYTES
from coordinator.http.server import MAX_HEAD_BYTES, HttpServer, build
from coordinator.request import ModelLimits, Output, Request, Usage
from coordinator.sequence import FinishReason, TokenLogprobs
from coordinator.tokenizer import MAX_TEXT_CHARACTERS, Tokenizer

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]

MODEL = "org/scripted"
CONTEXT = 64
VOCAB_SIZE = 300  # more than the tokenizer has, as models do
ANSWER = "Größe 😀!"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}{{ ' ' + m.name if m.name is defined }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Each byte is a token, and there is one special token, which begins every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|begin|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 256)]
    )
    return Tokenizer(backend, template, {})


BEGIN = 256


def logprobs_of(token_id: int, place: int, count: int) -> TokenLogprobs:
    """Some, of which the second of the likeliest is the token itself."""
    likeliest = ((token_id + 1) % 256, -0.25), (token_id, -0.5 - place), (7, -math.inf)
    return TokenLogprobs(token_id, -0.5 - place, 2, likeliest[:count])


def outputs_of(request: Request, tokenizer: Tokenizer | None, text: str) -> Iterator[Output]:
    """Each continuation says `text`, a token at a time, the continuations in turns."""
    ids = [97, 98, 99]
    if tokenizer is not None:
        ids = tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: request.max_tokens]
    streams = [
        tokenizer.stream(request.prompt) if tokenizer is not None else None
        for _ in range(request.n)
    ]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    if request.prompt_logprobs is not None:
        prompt_logprobs = tuple(
            logprobs_of(token, place, request.prompt_logprobs)
            for place, token in enumerate(request.prompt[1:], 1)
        )
    usage = Usage(len(request.prompt), len(ids) * request.n, 3)
    if not ids:
        for index in range(request.n):
            yield Output("", (), FinishReason.LENGTH, index, (), () if index else prompt_logprobs)
        return
    for place, token in enumerate(ids):
        # The first continuation is not always the first to have something.
        for index in reversed(range(request.n)):
            stream = streams[index]
            is_last = place == len(ids) - 1
            yield Output(
                text=stream.feed(token) if stream is not None else "",
                token_ids=(token,),
                finish_reason=FinishReason.LENGTH if is_last else None,
                index=index,
                logprobs=()
                if request.logprobs is None
                else (logprobs_of(token, place, request.logprobs),),
                prompt_logprobs=() if index or place else prompt_logprobs,
                usage=usage if is_last and not index else None,
            )


@dataclass
class Script:
    """An engine. `say` gives a request's outputs; an error among them is raised."""

    tokenizer: Tokenizer | None
    say: Callable[[Request], Iterator[Output | Exception]]
    error: ServiceError | None = None
    requests: list[Request] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most_running: int = 0
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, nothing comes after the first output."""
    held_first: bool = False

    def check(self, request: Request) -> int:
        if self.error is not None:
            raise self.error
        return request.check(ModelLimits(VOCAB_SIZE, CONTEXT, (), 1024))

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        self.check(request)
        self.requests.append(request)
        self.running.add(request.request_id)
        self.most_running = max(self.most_running, len(self.running))
        try:
            for place, output in enumerate(self.say(request)):
                if place or self.held_first:
                    await self.held.wait()
                await asyncio.sleep(0)
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            self.running.discard(request.request_id)

    async def until(self, count: int) -> None:
        """Waits for so many requests to run."""
        async with asyncio.timeout(10.0):
            while len(self.running) != count:
                await asyncio.sleep(0.001)


@dataclass
class Served:
    engine: Script
    cluster: Any
    url: str
    http: httpx2.AsyncClient
    openai: openai.AsyncOpenAI

    async def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(
            path, content=content, headers={"content-type": "application/json"} | headers
        )

    async def complete(self, prompt: object = "Hi", **body: object) -> dict[str, Any]:
        response = await self.post("/v1/completions", {"prompt": prompt} | body)
        assert response.status_code == 200, response.text
        return response.json()

    async def chunks(self, path: str, body: dict[str, object]) -> list[Any]:
        """The data of a stream's events; the last is "[DONE]" or an error."""
        async with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = [line async for line in response.aiter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


@asynccontextmanager
async def serving(
    tokenizer: Tokenizer | None = None,
    *,
    bare: bool = False,
    max_running: int = 4,
    authorize: Authorize | None = None,
) -> AsyncGenerator[Served, None]:
    """The API on a free port; `bare` without a tokenizer."""
    tokenizer = None if bare else tokenizer or byte_tokenizer()
    script = Script(tokenizer, lambda request: outputs_of(request, tokenizer, ANSWER))
    script.held.set()

    class FakeCluster:
        config = SimpleNamespace(served_model_name=MODEL, max_running=max_running, max_waiting=100)
        model = SimpleNamespace(tokenizer=tokenizer, spec=SimpleNamespace(vocab_size=VOCAB_SIZE))
        context_length = CONTEXT
        state = State.SERVING

        @property
        def engine(self) -> Script:
            if self.state is not State.SERVING:
                raise Unavailable(f"the cluster is {self.state.value}", reason="NOT_SERVING")
            return script

        @contextmanager
        def call(self) -> Iterator[Script]:
            yield self.engine

    async def render(accept: str) -> tuple[bytes, str]:
        return f"# {accept}\n".encode(), "text/plain; version=0.0.4"

    cluster = FakeCluster()
    server = HttpServer(build(cast(Cluster, cluster), render, authorize), stop_grace_s=1)
    url = f"http://127.0.0.1:{server.bind('127.0.0.1', 0)}"
    await server.start()
    try:
        async with httpx2.AsyncClient(base_url=url, timeout=10.0) as http:
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            async with client:
                yield Served(script, cluster, url, http, client)
    finally:
        await server.stop()


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error that an answer carries, in OpenAI's form."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
USER: Any = {"role": "user", "content": "Hi"}

# The body's further fields, the field that is named, and words of the message.
BAD_COMPLETIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no field that is known": ({"foo": 1}, "foo", "Unrecognized request argument supplied: foo"),
    "an empty name": ({"": 1}, "", "Unrecognized request argument supplied"),
    "guided decoding": ({"guided_json": {}}, "guided_json", "Unrecognized request argument"),
    "a text for a number": (
        {"temperature": "0.5"},
        "temperature",
        "'0.5': input should be a valid",
    ),
    "true for an integer": ({"n": True}, "n", "valid integer"),
    "true for a number": ({"top_p": True}, "top_p", "valid number"),
    "one for true": ({"stream": 1}, "stream", "valid boolean"),
    "a fraction of a token": ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    "too hot": ({"temperature": 101}, "temperature", "temperature = 101.0: is not in [0, 100]"),
    "too cold": ({"temperature": -1}, "temperature", "is not in"),
    "no nucleus": ({"top_p": 0}, "top_p", "is not in (0, 1]"),
    "top_k": ({"top_k": -2}, "top_k", "top_k = -2"),
    "min_p": ({"min_p": 1.1}, "min_p", "min_p = 1.1"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty", "is not in"),
    "presence_penalty": ({"presence_penalty": 2.1}, "presence_penalty", "is not in [-2, 2]"),
    "frequency_penalty": ({"frequency_penalty": -2.1}, "frequency_penalty", "is not in [-2, 2]"),
    "a seed that is too large": ({"seed": 2**64}, "seed", "seed = 18446744073709551616"),
    "a seed that is too small": ({"seed": -(2**63) - 1}, "seed", "seed = -"),
    "a seed without end": ({"seed": 10**4000}, "seed", "is not in"),
    "a float without end": ({"temperature": 10**400}, "temperature", "valid number"),
    "a bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
    "a bias of less than no token": ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is no token"),
    "a bias of a token beyond": ({"logit_bias": {"300": 1}}, "logit_bias", "300 ids"),
    "a bias too large": ({"logit_bias": {"5": 101}}, "logit_bias", "is not in [-100, 100]"),
    "a bias that is a text": ({"logit_bias": {"5": "1"}}, "logit_bias", "is no number"),
    "biases as a list": ({"logit_bias": [5]}, "logit_bias", "is no object"),
    "no continuation": ({"n": 0}, "n", "n = 0: is not in [1, 128]"),
    "too many continuations": ({"n": 129}, "n", "is not in [1, 128]"),
    "more than the cache holds": ({"n": 100, "max_tokens": 20}, "n", "that the KV cache holds"),
    "best_of": ({"best_of": 2}, "best_of", "only n = 1 is supported"),
    "suffix": ({"suffix": "x"}, "suffix", "is not supported"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    "too many tokens": ({"max_tokens": 62}, "max_tokens", "max_tokens = 62: is not in [1, 61]"),
    "no token": ({"max_tokens": 0}, "max_tokens", "max_tokens = 0"),
    "less than no token": ({"max_tokens": -1, "echo": True}, "max_tokens", "max_tokens = -1"),
    "min above max": ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "is not in [0, 2]"),
    "logprobs": ({"logprobs": 101}, "logprobs", "logprobs = 101: is not in [0, 100]"),
    "logprobs as a chat has them": ({"logprobs": True}, "logprobs", "valid integer"),
    "prompt_logprobs": ({"prompt_logprobs": -1}, "prompt_logprobs", "is not in [0, 100]"),
    "prompt_logprobs of a stream": (
        {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs",
        "is not there with stream = true",
    ),
    "an empty stop": ({"stop": ""}, "stop", "does not have 1 to 1024 characters"),
    "a stop that is a number": ({"stop": [1]}, "stop", "is neither a text nor a list of texts"),
    "too many stops": ({"stop": ["x"] * 65}, "stop", "more than 64"),
    "a stop token beyond": ({"stop_token_ids": [300]}, "stop_token_ids", "has 300 ids"),
    "a stop token as text": ({"stop_token_ids": ["1"]}, "stop_token_ids", "no list of token ids"),
    "priority": ({"priority": 2**31}, "priority", "is not in"),
    "stream options for no stream": (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "is only for stream = true",
    ),
    "a stream option": (
        {"stream": True, "stream_options": {"foo": 1}},
        "stream_options.foo",
        "Unrecognized request argument supplied: stream_options.foo",
    ),
    "a request id with a line break": ({"request_id": "a\nb"}, "request_id", "printable"),
    "a request id without end": ({"request_id": "a" * 129}, "request_id", "1 to 128"),
    "no prompt": ({"prompt": None}, "prompt", "prompt = None: is neither a text, nor token ids"),
    "a prompt that is a number": ({"prompt": 5}, "prompt", "prompt = 5"),
    "no prompts": ({"prompt": []}, "prompt", "does not have 1 to 2048 prompts"),
    "too many prompts": ({"prompt": ["x"] * 2049}, "prompt", "does not have 1 to 2048 prompts"),
    "text among token ids": ({"prompt": [1, "x"]}, "prompt", "is neither"),
    "token ids among texts": ({"prompt": ["x", [1]]}, "prompt", "is neither"),
    "true among token ids": ({"prompt": [1, True]}, "prompt", "is neither"),
    "an empty prompt of several": ({"prompt": [[1], []]}, "prompt", "is empty"),
    "a token beyond": ({"prompt": [1, 300]}, "prompt", "prompt = 300: the vocabulary has 300 ids"),
    "a token below": ({"prompt": [-1]}, "prompt", "prompt = -1"),
    "a token without end": ({"prompt": [10**4000]}, "prompt", "the vocabulary has 300 ids"),
    "a prompt without room": ({"prompt": [1] * 64}, "prompt", "prompt = '64 tokens': the context"),
    "a prompt too long": ({"prompt": "x" * 100}, "prompt", "prompt = '101 tokens'"),
}

BAD_CHATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "messages", "messages = []: is empty"),
    "messages as text": ({"messages": "Hi"}, "messages", "valid list"),
    "a message as text": ({"messages": ["Hi"]}, "messages[0]", "valid dictionary"),
    "no role": (
        {"messages": [{"content": "Hi"}]},
        "messages[0].role",
        "Missing required parameter",
    ),
    "no content": ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "Missing"),
    "null": ({"messages": [USER | {"content": None}]}, "messages[0].content", "is neither"),
    "a number": ({"messages": [USER | {"content": 5}]}, "messages[0].content", "is neither"),
    "no parts": ({"messages": [USER | {"content": []}]}, "messages[0].content", "is neither"),
    "a part as text": ({"messages": [USER | {"content": ["Hi"]}]}, "messages[0].content", "part 0"),
    "an image": (
        {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "part 0 is of type 'image_url'; only text is supported",
    ),
    "a part with more": (
        {"messages": [USER | {"content": [{"type": "text", "text": "x", "more": 1}]}]},
        "messages[0].content",
        "nothing else",
    ),
    "a field of a message": (
        {"messages": [USER | {"foo": 1}]},
        "messages[0].foo",
        "Unrecognized request argument supplied: messages[0].foo",
    ),
    "tool calls": (
        {"messages": [USER | {"tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "is not supported",
    ),
    "a role that the template refuses": (
        {"messages": [USER | {"role": "nobody"}]},
        "messages",
        "no such role",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
    "a tool choice": ({"tool_choice": "auto"}, "tool_choice", "is not supported"),
    "functions": ({"functions": [{}]}, "functions", "is not supported"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities", "is not supported"),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format",
        "is not supported",
    ),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort", "is not supported"),
    "the web": ({"web_search_options": {}}, "web_search_options", "is not supported"),
    "logprobs as completions have them": ({"logprobs": 5}, "logprobs", "valid boolean"),
    "top_logprobs alone": ({"top_logprobs": 5}, "top_logprobs", "only for logprobs = true"),
    "too many top_logprobs": (
        {"logprobs": True, "top_logprobs": 101},
        "top_logprobs",
        "top_logprobs = 101: is not in",
    ),
    "two limits": (
        {"max_tokens": 5, "max_completion_tokens": 6},
        "max_completion_tokens",
        "max_tokens says 5",
    ),
    "too many tokens": (
        {"max_completion_tokens": 60},
        "max_completion_tokens",
        "max_completion_tokens = 60: is not in",
    ),
    "a chat too long": ({"messages": [USER | {"content": "x" * 99}]}, "messages", "tokens'"),
    "two ends": (
        {"continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "can't be with continue_final_message",
    ),
    "the template's own": (
        {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
        "is not for the caller to set",
    ),
    "echo": ({"echo": True}, "echo", "Unrecognized request argument"),
    "a prompt": ({"prompt": "Hi"}, "prompt", "Unrecognized request argument"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncGenerator[Served, None]:
    async with serving() as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """One server for all tests; each leaves nothing running on it."""
    engine = shared.engine
    engine.say = lambda request: outputs_of(request, engine.tokenizer, ANSWER)
    engine.error = None
    engine.requests.clear()
    engine.most_running = 0
    engine.held.set()
    engine.held_first = False
    shared.cluster.state = State.SERVING
    yield shared
    assert not engine.running


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
async def test_a_bad_completion_is_refused_by_field_and_the_next_is_answered(
    served: Served, case: str
) -> None:
    further, param, words = BAD_COMPLETIONS[case]
    response = await served.post(COMPLETIONS, {"prompt": "Hi"} | further)
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert len(error["message"]) < 500
    assert not served.engine.requests
    await served.complete()


@pytest.mark.parametrize("case", BAD_CHATS)
async def test_a_bad_chat_is_refused_by_field_and_the_next_is_answered(
    served: Served, case: str
) -> None:
    further, param, words = BAD_CHATS[case]
    response = await served.post(CHATS, {"messages": [USER]} | further)
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert not served.engine.requests
    assert (await served.post(CHATS, {"messages": [USER]})).status_code == 200


BODIES = {
    "nothing": (b"", "Missing required parameter|no JSON object"),
    "no JSON": (b"prompt=Hi", "no JSON"),
    "half of it": (b'{"prompt": "Hi"', "no JSON"),
    "something after it": (b'{"prompt": "Hi"} x', "no JSON"),
    "a list": (b"[]", "no JSON object"),
    "a text": (b'"Hi"', "no JSON object"),
    "null": (b"null", "no JSON object|Missing"),
    "no UTF-8": (b'{"prompt": "\xff"}', "no JSON"),
    "UTF-16": ('{"prompt": "Hi"}'.encode("utf-16"), "no JSON"),
    "NaN": (b'{"prompt": "Hi", "temperature": NaN}', "no JSON"),
    "Infinity": (b'{"prompt": "Hi", "temperature": Infinity}', "no JSON"),
    "an overflow": (b'{"prompt": "Hi", "temperature": 1e999}', "finite"),
    "too many digits": (b'{"prompt": [' + b"1" * 100_000 + b"]}", "no JSON"),
    "lists in lists": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no JSON"),
    "objects in objects": (b'{"user": ' + b'{"a":' * 50_000, "no JSON"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d"}', "no JSON"),
    "half a pair as a name": (b'{"\\udc00": 1}', "no JSON"),
    "a line break in a text": (b'{"prompt": "a\nb"}', "no JSON"),
    "many fields": (
        b"{" + b",".join(b'"f%d":0' % i for i in range(300_000)) + b"}",
        "Unrecognized request argument supplied: f0",
    ),
    "many wrong biases": (
        b'{"prompt":"","logit_bias":{' + b",".join(b'"a%d":0' % i for i in range(250_000)) + b"}}",
        "'a0' is no token id",
    ),
    "many wrong tokens": (b'{"prompt": [1' + b',""' * 1_000_000 + b"]}", "is neither"),
}


@pytest.mark.parametrize("case", BODIES)
async def test_a_body_that_is_no_request_is_refused_and_the_next_is_answered(
    served: Served, case: str
) -> None:
    body, words = BODIES[case]
    response = await served.post(COMPLETIONS, body)
    assert response.status_code == 400
    message = error_of(response)["message"]
    assert any(word in message for word in words.split("|")), message
    await served.complete()


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonl"]
)
async def test_what_is_not_declared_as_json_is_refused(
    served: Served, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await served.http.post(COMPLETIONS, content=b'{"prompt":""}', headers=headers)
    assert response.status_code == 415
    assert "send application/json" in error_of(response)["message"]
    for good in ("application/json; charset=utf-8", "Application/JSON"):
        response = await served.post(COMPLETIONS, {"prompt": "Hi"}, **{"content-type": good})
        assert response.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused(served: Served, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * (MAX_BODY_BYTES + 1) + b'"}'

    async def parts() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), 2**20):
            yield body[start : start + 2**20]

    response = await served.http.post(
        COMPLETIONS,
        content=parts() if chunked else body,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    await served.complete()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/%FF%00", 404),
    ],
)
async def test_errors_of_the_framework_have_the_same_form(
    served: Served, method: str, path: str, status: int
) -> None:
    response = await served.http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize"])
async def test_another_model_is_not_found(served: Served, path: str) -> None:
    prompts: dict[str, dict[str, object]] = {
        COMPLETIONS: {"prompt": "Hi"},
        CHATS: {"messages": [USER]},
        "/tokenize": {"prompt": "Hi"},
        "/detokenize": {"tokens": [1]},
    }
    for model, status in (("other", 404), (MODEL, 200), (None, 200)):
        response = await served.post(path, prompts[path] | {"model": model})
        assert response.status_code == status
        if status == 404:
            assert error_of(response)["code"] == "model_not_found"
            assert error_of(response)["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (ResourceExhausted("full", retry_after_s=0.2), 429, "rate_limit_error", "1"),
        (ResourceExhausted("full", retry_after_s=2.1), 429, "rate_limit_error", "3"),
        (Unavailable("later"), 503, "server_error", "1"),
        (Unavailable("later", retry_after_s=5.0), 503, "server_error", "5"),
        (DeadlineExceeded("late"), 504, "server_error", None),
        (Internal("broken"), 500, "server_error", None),
    ],
)
async def test_an_error_of_the_engine_has_its_status_before_anything_was_sent(
    served: Served,
    error: ServiceError,
    status: int,
    kind: str,
    retry_after: str | None,
    stream: bool,
) -> None:
    for place in ("check", "generate"):
        if place == "check":
            served.engine.error = error
        else:
            served.engine.error = None
            served.engine.say = lambda request: iter([error])
        response = await served.post(COMPLETIONS, {"prompt": "Hi", "stream": stream})
        assert response.status_code == status
        assert error_of(response)["type"] == kind
        assert error_of(response)["code"] == error.reason.lower()
        assert response.headers.get("retry-after") == retry_after


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
@pytest.mark.parametrize("is_bug", [False, True])
async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    served: Served, path: str, is_bug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    error = RuntimeError("secret") if is_bug else Unavailable("a rank fell over")
    say = served.engine.say

    def fail_later(request: Request) -> Iterator[Output | Exception]:
        outputs = say(request)
        yield from (next(outputs), next(outputs), error)

    served.engine.say = fail_later
    events = await served.chunks(path, {"prompt": "Hi"} if path == COMPLETIONS else CHAT)
    assert len(events) == 3
    message = events[-1]["error"]["message"]
    assert ("a rank fell over" in message) == (not is_bug)
    assert "secret" not in message
    assert ("secret" in caplog.text) == is_bug
    # As the official client sees it.
    with pytest.raises(openai.APIError, match=message):
        stream = await served.openai.chat.completions.create(
            model=MODEL, messages=[USER], stream=True
        )
        async for _ in stream:
            pass


CHAT: dict[str, object] = {"messages": [USER]}


async def test_a_bug_is_an_error_without_its_details_and_goes_to_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.engine.say = lambda request: iter([RuntimeError("secret")])
    response = await served.post(COMPLETIONS, {"prompt": "Hi"})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert response.headers["x-request-id"]


async def test_while_the_cluster_does_not_serve_only_what_needs_it_is_unavailable(
    served: Served,
) -> None:
    assert (await served.http.get("/health")).json() == {"status": "serving"}
    served.cluster.state = State.LOADING
    for response in (
        await served.http.get("/health"),
        await served.post(COMPLETIONS, {"prompt": "Hi"}),
        await served.post(CHATS, CHAT),
    ):
        assert response.status_code == 503
        assert "the cluster is loading" in error_of(response)["message"]
        assert response.headers["retry-after"] == "1"
    for path in ("/v1/models", "/version", "/metrics", "/openapi.json"):
        assert (await served.http.get(path)).status_code == 200
    # Who kills what is not alive must not kill what waits for a worker.
    assert (await served.http.get("/live")).json() == {"status": "loading"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("held_first", [False, True])
async def test_a_client_that_leaves_ends_its_generations(
    served: Served, stream: bool, prompts: int, held_first: bool
) -> None:
    served.engine.held.clear()
    served.engine.held_first = held_first
    body = {"prompt": ["Hi"] * prompts, "stream": stream}

    async def ask() -> None:
        async with served.http.stream("POST", COMPLETIONS, json=body) as response:
            await response.aread()

    asking = asyncio.create_task(ask())
    await served.engine.until(prompts)
    asking.cancel()
    await served.engine.until(0)
    served.engine.held.set()
    await served.complete()


async def test_a_client_that_leaves_between_chunks_ends_its_generation(served: Served) -> None:
    served.engine.held.clear()
    body = {"messages": [USER], "stream": True}
    async with served.http.stream("POST", CHATS, json=body) as response:
        lines = cast(AsyncGenerator[str], response.aiter_lines())
        async with aclosing(lines):
            assert (await anext(lines)).startswith("data: ")
        assert len(served.engine.running) == 1
    await served.engine.until(0)


async def test_a_client_that_reads_slowly_gets_everything(served: Served) -> None:
    text = "x" * 40
    served.engine.say = lambda request: outputs_of(request, byte_tokenizer(), text)
    request = json.dumps({"prompt": "Hi", "max_tokens": 40, "stream": True}).encode()
    port = int(served.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(request), request)
    )
    received = b""
    while part := await reader.read(64):
        received += part
        await asyncio.sleep(0.0005)
    writer.close()
    assert received.count(b'"text":"x"') == 40
    assert b"data: [DONE]" in received


async def test_a_batch_runs_in_turns_and_its_choices_are_in_the_order_of_its_prompts() -> None:
    async with serving(max_running=4) as served:
        served.engine.say = lambda request: outputs_of(
            request, served.engine.tokenizer, bytes(request.prompt).hex()
        )
        prompts = [[place, place + 1] for place in range(20)]
        answer = await served.complete(prompts, max_tokens=4, n=2)
        assert [choice["index"] for choice in answer["choices"]] == [*range(40)]
        assert [choice["text"] for choice in answer["choices"]] == [
            bytes(prompt).hex() for prompt in prompts for _ in range(2)
        ]
        assert served.engine.most_running == 2  # of two continuations each
        assert len({request.request_id for request in served.engine.requests}) == 20
        assert answer["usage"] == {
            "prompt_tokens": 40,
            "completion_tokens": 160,
            "total_tokens": 200,
            "prompt_tokens_details": {"cached_tokens": 60},
        }
        events = await served.chunks(COMPLETIONS, {"prompt": prompts, "max_tokens": 4, "n": 2})
        texts = [""] * 40
        for event in events[:-1]:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in answer["choices"]]


async def test_a_batch_with_a_wrong_prompt_is_refused_before_any_of_it_runs(served: Served) -> None:
    response = await served.post(COMPLETIONS, {"prompt": [[1]] * 9 + [[999]]})
    assert response.status_code == 400
    assert not served.engine.requests


async def test_a_batch_of_which_one_fails_ends_the_others(served: Served) -> None:
    served.engine.held.clear()
    say = served.engine.say

    def fail_one(request: Request) -> Iterator[Output | Exception]:
        return iter([Unavailable("gone")]) if request.prompt == (2,) else say(request)

    served.engine.say = fail_one
    response = await served.post(COMPLETIONS, {"prompt": [[1], [2], [3]]})
    assert response.status_code == 503
    await served.engine.until(0)


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize"])
async def test_a_long_text_does_not_hold_up_others(path: str) -> None:
    tokenizer = byte_tokenizer()
    encode = tokenizer.encode

    def slowly(text: str, **options: bool) -> list[int]:
        if len(text) > 10_000:
            time.sleep(0.5)
        return encode(text, **options)

    tokenizer.encode = slowly  # type: ignore[method-assign]
    async with serving(tokenizer) as served:
        await served.http.get("/health")
        text = "x" * 20_000
        body = {"messages": [USER | {"content": text}]} if path == CHATS else {"prompt": text}
        asking = asyncio.create_task(served.post(path, body))
        worst = 0.0
        while not asking.done():
            start = time.monotonic()
            await served.http.get("/health")
            worst = max(worst, time.monotonic() - start)
        assert (await asking).status_code == (200 if path == "/tokenize" else 400)
        assert worst < 0.3


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize"])
async def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(path: str) -> None:
    tokenizer = byte_tokenizer()
    async with serving(tokenizer) as served:
        text = "x" * (MAX_TEXT_CHARACTERS + 1)
        body = {"messages": [USER | {"content": text}]} if path == CHATS else {"prompt": text}
        tokenizer.encode = None  # type: ignore[method-assign, assignment]
        response = await served.post(path, body)
        assert response.status_code == 400
        error = error_of(response)
        assert error["param"] == ("messages" if path == CHATS else "prompt")
        assert f"are more than {MAX_TEXT_CHARACTERS}" in error["message"]


async def test_headers_are_bounded(served: Served) -> None:
    port = int(served.url.rpartition(":")[2])
    for size, status in ((MAX_HEAD_BYTES // 2, b"200"), (2 * MAX_HEAD_BYTES, b"400")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * size + b"\r\n\r\n")
        assert (await reader.readline()).split()[1] == status
        writer.close()
    # Nor may they go on for ever.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        writer.write(b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES)
        await writer.drain()
    assert (await reader.readline()).split()[1] == b"400"
    writer.close()
    await served.complete()


async def test_who_shows_no_right_key_is_told_so_before_the_body_is_read() -> None:
    def authorize(called: str, authorization: str) -> None:
        if authorization != "Bearer right":
            raise Unauthenticated("no", reason="INVALID_API_KEY")

    async with serving(authorize=authorize) as served:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
            for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize", "/nothing"):
                response = await served.post(path, b"no JSON", **headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                error = error_of(response)
                assert error["type"] == "invalid_request_error"
                assert error["code"] == "invalid_api_key"
            assert (await served.http.get("/v1/models", headers=headers)).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            await served.openai.models.list()
        right = served.openai.with_options(api_key="right")
        assert (await right.models.list()).data[0].id == MODEL
        for path in ("/health", "/metrics", "/version", "/docs", "/openapi.json"):
            assert (await served.http.get(path)).status_code == 200

        # One that sends a large body all the same gets its answer, and the connection serves on.
        large = b"x" * MAX_BODY_BYTES
        for _ in range(2):
            assert (await served.post(COMPLETIONS, large)).status_code == 401
        assert (
            await served.post(COMPLETIONS, b"", authorization="Bearer right")
        ).status_code == 400
        assert not served.engine.requests


async def test_requests_have_ids_that_the_engine_and_the_answer_share(served: Served) -> None:
    trace = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "tracestate": "x=y"}
    response = await served.post(COMPLETIONS, {"prompt": "Hi"}, **{"x-request-id": "mine"} | trace)
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["id"] == "cmpl-mine"
    assert served.engine.requests[-1].request_id == "mine"
    assert served.engine.requests[-1].trace == trace

    response = await served.post(CHATS, CHAT | {"request_id": "its"})
    assert response.headers["x-request-id"] == "its"
    assert response.json()["id"] == "chatcmpl-its"
    assert served.engine.requests[-1].trace == {}

    fresh = {(await served.post(CHATS, CHAT)).headers["x-request-id"] for _ in range(3)}
    assert len(fresh) == 3
    assert (await served.http.get("/nothing")).headers["x-request-id"]

    response = await served.post(COMPLETIONS, {"prompt": "Hi"}, **{"x-request-id": "a" * 129})
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Request-Id"


async def test_fields_reach_the_engine_as_they_are_meant(served: Served) -> None:
    await served.complete(
        [1, 2],
        frequency_penalty=1,
        presence_penalty=-1,
        logit_bias={"5": -100, "7": 0.5},
        n=2,
        seed=-1,
        stop="end",
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.5,
        ignore_eos=True,
        min_tokens=1,
        stop_token_ids=[9],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        priority=-3,
        logprobs=2,
        prompt_logprobs=4,
        max_tokens=5,
        best_of=2,
        suffix=None,
        user="me",
        metadata={"a": "b"},
    )
    request = served.engine.requests[-1]
    assert request.prompt == (1, 2)
    sampling = request.sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (1, -1)
    assert sampling.logit_bias == {5: -100, 7: 0.5}
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.5)
    assert sampling.seed == 2**64 - 1
    assert (request.n, request.min_tokens, request.max_tokens) == (2, 1, 5)
    assert (request.stop, request.stop_token_ids) == (("end",), (9,))
    assert request.ignore_eos and request.include_stop and request.show_special_tokens
    assert (request.priority, request.logprobs, request.prompt_logprobs) == (-3, 2, 4)

    # Null is the default, and the default is OpenAI's.
    names = (
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "logit_bias",
        "max_tokens",
        "logprobs",
    )
    for body in ({}, dict.fromkeys(names)):
        await served.complete("Hi", **body)
        request = served.engine.requests[-1]
        assert request == Request(request.request_id, (BEGIN, *b_ids("Hi")), max_tokens=16, stop=())
    await served.complete("x" * 60)
    assert served.engine.requests[-1].max_tokens == 3  # what the context leaves


def b_ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


async def test_fields_of_a_chat_reach_the_engine_as_they_are_meant(served: Served) -> None:

    async def prompt_of(messages: list[Any], **body: object) -> str:
        response = await served.post(CHATS, {"messages": messages} | body)
        assert response.status_code == 200, response.text
        ids = served.engine.requests[-1].prompt
        return byte_tokenizer().decode(ids, skip_special_tokens=False)

    assert await prompt_of([USER]) == "<user>Hi</><assistant>"
    assert await prompt_of([USER], add_generation_prompt=False) == "<user>Hi</>"
    assert await prompt_of([USER], add_special_tokens=True) == ("<|begin|><user>Hi</><assistant>")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert await prompt_of([USER | {"content": parts}]) == "<user>a\nb</><assistant>"
    assert await prompt_of([USER | {"name": "Al"}]) == "<user Al>Hi</><assistant>"
    assert await prompt_of([USER | {"role": "developer"}]) == "<system>Hi</><assistant>"
    assert await prompt_of([USER], chat_template_kwargs={"extra": "+"}) == (
        "<user>Hi</><assistant>+"
    )
    begun: dict[str, Any] = {
        "role": "assistant",
        "content": "It is ",
        "refusal": None,
        "tool_calls": [],
    }
    assert await prompt_of([USER, begun], continue_final_message=True) == (
        "<user>Hi</><assistant>It is "
    )

    assert served.engine.requests[-1].max_tokens is None
    for name in ("max_tokens", "max_completion_tokens"):
        await prompt_of([USER], **{name: 3})
        assert served.engine.requests[-1].max_tokens == 3
    await prompt_of([USER], logprobs=True, top_logprobs=2)
    assert served.engine.requests[-1].logprobs == 2
    await prompt_of([USER], logprobs=True)
    assert served.engine.requests[-1].logprobs == 0
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "functions": None,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "store": False,
        "service_tier": "auto",
        "metadata": {},
        "user": "me",
        "prediction": {"type": "content", "content": "x"},
        "logprobs": False,
        "top_logprobs": 0,
    }
    assert await prompt_of([USER], **harmless) == "<user>Hi</><assistant>"


async def test_a_model_without_tokenizer_takes_and_gives_token_ids() -> None:
    async with serving(bare=True) as served:
        for path, body in (
            (COMPLETIONS, {"prompt": "Hi"}),
            (CHATS, CHAT),
            ("/tokenize", {"prompt": "Hi"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            response = await served.post(path, body)
            assert response.status_code == 400
            assert error_of(response)["code"] == "no_tokenizer"
        answer = await served.complete(
            [1, 2], max_tokens=3, logprobs=1, echo=True, return_token_ids=True
        )
        (choice,) = answer["choices"]
        assert choice["token_ids"] == [97, 98, 99]
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in (1, 2, 97, 98, 99)]
        assert choice["text"] == ""


async def test_a_model_without_a_template_refuses_chats() -> None:
    async with serving(byte_tokenizer(None)) as served:
        response = await served.post(CHATS, CHAT)
        assert response.status_code == 400
        assert "has no chat template" in error_of(response)["message"]
        assert error_of(response)["param"] == "messages"


async def test_models_are_listed_and_found(served: Served) -> None:
    (model,) = (await served.openai.models.list()).data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "colrow")
    assert model.to_dict()["max_model_len"] == CONTEXT
    assert abs(model.created - time.time()) < 60
    assert await served.openai.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        await served.openai.models.retrieve("other")


async def test_texts_and_chats_are_tokenized_and_back(served: Served) -> None:

    async def tokens(**body: object) -> dict[str, Any]:
        response = await served.post("/tokenize", body)
        assert response.status_code == 200, response.text
        return response.json()

    ids = b_ids("Grüße")
    assert await tokens(prompt="Grüße") == {
        "tokens": [BEGIN, *ids],
        "count": 8,
        "max_model_len": CONTEXT,
        "token_strs": None,
    }
    answer = await tokens(prompt="a b", add_special_tokens=False, return_token_strs=True)
    assert answer["tokens"] == b_ids("a b")
    assert answer["token_strs"] == ["a", "Ġ", "b"]
    assert (await tokens(messages=[USER]))["tokens"] == b_ids("<user>Hi</><assistant>")
    chat = await tokens(messages=[USER], add_generation_prompt=False, add_special_tokens=True)
    assert chat["tokens"] == [BEGIN, *b_ids("<user>Hi</>")]

    response = await served.post("/detokenize", {"tokens": [BEGIN, *ids]})
    assert response.json() == {"prompt": "<|begin|>Grüße"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"text": "a"}, "text"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ):
        response = await served.post(path, body)
        assert response.status_code == 400
        assert error_of(response)["param"] == param


async def test_operators_see_version_metrics_and_a_schema(served: Served) -> None:
    assert (await served.http.get("/version")).json() == {"version": __version__}
    metrics = await served.http.get("/metrics", headers={"accept": "text/plain"})
    assert metrics.text == "# text/plain\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await served.http.get("/docs")).status_code == 200
    schema = (await served.http.get("/openapi.json")).json()
    for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize"):
        answers = schema["paths"][path]["post"]["responses"]
        assert answers.keys() == {"200", "4XX", "5XX"}
        for status in ("4XX", "5XX"):
            content = answers[status]["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
    shapes = schema["components"]["schemas"]
    assert {"prompt", "echo", "top_k"} <= shapes["CompletionRequest"]["properties"].keys()
    assert shapes["CompletionRequest"]["additionalProperties"] is False
    text = json.dumps(schema)
    for reference in set(re_refs(text)):
        assert reference in shapes


def re_refs(text: str) -> Sequence[str]:
    return [part.split('"')[0] for part in text.split("#/components/schemas/")[1:]]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", b""),
        (b"GET /version HTTP/1.1\r\nHost:", b" x"),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"}"),
        (b"GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /v", b"e"),
    ],
    ids=["nothing", "half a head", "half a body", "one request and half of another"],
)
async def test_a_client_that_does_not_finish_its_request_is_hung_up_on(
    first: bytes, then: bytes
) -> None:
    async def render(accept: str) -> tuple[bytes, str]:
        return b"", "text/plain"

    app = build(cast(Cluster, None), render)
    server = HttpServer(app, stop_grace_s=1, request_timeout_s=0.5)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        await asyncio.sleep(0.3)
        writer.write(then)  # a little more gains no time
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        assert 0.4 < time.monotonic() - began < 4
        writer.close()
        url = f"http://127.0.0.1:{port}/version"
        async with httpx2.AsyncClient() as http:  # one that waits between two requests is not
            for _ in range(2):
                assert (await http.get(url)).status_code == 200
                await asyncio.sleep(0.7)
    finally:
        await server.stop()


async def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = HttpServer(cast(Any, None), stop_grace_s=1)
        with pytest.raises(InvalidArgument, match=rf"http_port = {port}: can't be bound on 127"):
            server.bind("127.0.0.1", port)


async def test_the_ports_flag_has_a_default_and_a_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--model", ".", "--workers", "unused:1")
    assert parse(flags).http_port == 8000
    with pytest.raises(SystemExit):
        parse((*flags, "--http-port", "65536"))
    assert "--http-port 65536: is not in [0, 65535]" in capsys.readouterr().err


async def test_the_server_leaves_signals_and_logging_to_its_process(served: Served) -> None:
    root = logging.getLogger()
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], root.handlers[:]
    await served.complete()
    now = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], root.handlers[:]
    assert now == before


async def test_stopping_ends_streams_and_frees_the_port() -> None:
    async with serving() as served:
        port = int(served.url.rpartition(":")[2])
        served.engine.held.clear()

        async def ask() -> httpx2.Response:
            return await served.post(COMPLETIONS, {"prompt": "Hi", "stream": True})

        asking = asyncio.create_task(ask())
        await served.engine.until(1)
        start = time.monotonic()
    # The grace is a second.
    assert time.monotonic() - start < 2.5
    assert not served.engine.running
    with pytest.raises(httpx2.HTTPError):
        await asking
    socket.create_server(("127.0.0.1", port)).close()


async def test_scripted_outputs_are_what_an_engine_gives() -> None:
    request = Request("", (1, 2), n=2, logprobs=1, prompt_logprobs=1, max_tokens=3)
    outputs = [*outputs_of(request, byte_tokenizer(), ANSWER)]
    assert [output.index for output in outputs] == [1, 0] * 3
    assert outputs[-1] == replace(outputs[-1], usage=Usage(2, 6, 3))
