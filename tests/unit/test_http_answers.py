"""What answers look like: the same whole or in chunks, each token where it belongs."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest
import tokenizers
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import ChatCompletionChunk as OpenAIChunk
from tokenizers import decoders, models

from coordinator.http.answers import ChatAnswer, CompletionAnswer, Frame, TokenNames
from coordinator.http.requests import Prompt, chat_request, completion_requests
from coordinator.http.schema import ChatCompletionRequest, CompletionRequest
from coordinator.request import Output, Request, Usage
from coordinator.sequence import FinishReason, TokenLogprobs
from coordinator.tokenizer import Tokenizer
from tests.unit.test_http_server import ANSWER, b_ids, byte_tokenizer, outputs_of

FRAME = Frame("the-id", 123, "the-model")
TOKENIZER = byte_tokenizer()
PROMPTS = ("Grüße, ", "日本 ")


def prompts_of(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(tuple(TOKENIZER.encode(text)), text) for text in texts]


def in_turns(requests: Sequence[Request]) -> list[tuple[int, Output]]:
    """The outputs of all requests, each with its place, the requests in turns."""
    streams = [[*outputs_of(request, TOKENIZER, ANSWER)] for request in requests]
    most = max(map(len, streams))
    return [
        (place, stream[step])
        for step in range(most)
        for place, stream in enumerate(streams)
        if step < len(stream)
    ]


def dump(answer: Any) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude_unset=True)


def completion_of(
    texts: Sequence[str] = PROMPTS, **body: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer to the prompts, whole and in chunks."""
    prompts = prompts_of(texts)
    asked = CompletionRequest(prompt=[*texts], **body)
    requests = completion_requests(asked, prompts, "id", {}, 64)
    outputs = in_turns(requests)
    whole = CompletionAnswer(asked, prompts, FRAME, TOKENIZER).whole(
        [[output for at, output in outputs if at == place] for place in range(len(texts))]
    )
    if asked.prompt_logprobs is not None:
        return dump(whole), []  # they are not there in chunks
    answer = CompletionAnswer(asked, prompts, FRAME, TOKENIZER)
    chunks = [chunk for place, output in outputs for chunk in answer.chunks(place, output)]
    return dump(whole), [*map(dump, chunks), dump(answer.usage_chunk())]


def chat_of(**body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    asked = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": "Hi"}], **body}
    )
    prompt = Prompt(tuple(b_ids("<user>Hi</>")))
    outputs = [*outputs_of(chat_request(asked, prompt, "id", {}), TOKENIZER, ANSWER)]
    whole = ChatAnswer(asked, prompt, FRAME, TOKENIZER).whole([outputs])
    answer = ChatAnswer(asked, prompt, FRAME, TOKENIZER)
    chunks = [chunk for output in outputs for chunk in answer.chunks(0, output)]
    return dump(whole), [*map(dump, chunks), dump(answer.usage_chunk())]


def merged(parts: Sequence[Any]) -> Any:
    """What parts of one field come to: texts and lists are joined, of the rest the last counts."""
    if isinstance(parts[0], str) and len(parts) > 1:
        return "".join(parts)
    if isinstance(parts[0], list):
        return [item for part in parts for item in part]
    if isinstance(parts[0], dict):
        return {name: merged([part[name] for part in parts if name in part]) for name in parts[0]}
    return parts[-1]


def by_index(chunks: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    choices = defaultdict(list)
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices[choice["index"]].append(choice)
    return choices


FINAL = {"finish_reason", "stop_reason", "index"}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"echo": True},
    {"logprobs": 0},
    {"logprobs": 2, "n": 2},
    {"logprobs": 2, "n": 2, "echo": True},
    {"logprobs": 1, "echo": True, "return_tokens_as_token_ids": True},
    {"echo": True, "max_tokens": 0, "n": 2},
    {"echo": True, "max_tokens": 0, "logprobs": 2},
    {"return_token_ids": True, "n": 2, "echo": True},
    {"max_tokens": 3},  # ends within a character
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_of_completions_come_to_the_whole(options: dict[str, Any]) -> None:
    whole, chunks = completion_of(**options)
    if not options.get("echo"):  # OpenAI's types forget that a first token has no log-probability
        OpenAICompletion.model_validate(whole)
    choices = by_index(chunks)
    assert [choice["index"] for choice in whole["choices"]] == sorted(choices)
    for choice in whole["choices"]:
        parts = choices[choice["index"]]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for name, value in choice.items():
            values = [part[name] for part in parts if name in part]
            assert value == (values[-1] if name in FINAL else merged(values)), name
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"return_token_ids": True, "n": 2},
        {"max_completion_tokens": 3},
    ],
    ids=str,
)
def test_chunks_of_chats_come_to_the_whole(options: dict[str, Any]) -> None:
    whole, chunks = chat_of(**options)
    OpenAIChatCompletion.model_validate(whole)
    for chunk in chunks:
        OpenAIChunk.model_validate(chunk)
    choices = by_index(chunks)
    assert [choice["index"] for choice in whole["choices"]] == sorted(choices)
    for choice in whole["choices"]:
        parts = choices[choice["index"]]
        # The role rides on the first chunk, the reason on the last: there is none for either alone.
        assert [part["delta"].get("role") for part in parts] == (
            ["assistant"] + [None] * (len(parts) - 1)
        )
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        text = "".join(part["delta"]["content"] for part in parts)
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        if options.get("logprobs"):
            assert choice["logprobs"]["content"] == merged(
                [part["logprobs"]["content"] for part in parts]
            )
        if options.get("return_token_ids"):
            assert choice["token_ids"] == merged([part["token_ids"] for part in parts])
    assert len(chunks) - 1 == sum(len(parts) for parts in choices.values())
    assert chunks[-1]["usage"] == whole["usage"]
    if options.get("return_token_ids"):
        assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == b_ids("<user>Hi</>")
        assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])


def test_the_frame_and_the_counts_are_those_of_the_whole_request() -> None:
    whole, chunks = completion_of(n=2, max_tokens=4)
    usage = {
        "prompt_tokens": 10 + 8,
        "completion_tokens": 2 * 2 * 4,
        "total_tokens": 18 + 16,
        "prompt_tokens_details": {"cached_tokens": 2 * 3},
    }
    assert whole["usage"] == usage
    for part in (whole, *chunks):
        assert part["id"] == "the-id" and part["created"] == 123 and part["model"] == "the-model"
        assert part["object"] == "text_completion"
    assert chunks[-1] == {key: whole[key] for key in ("id", "object", "created", "model")} | {
        "choices": [],
        "usage": usage,
    }
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_usage_comes_with_every_chunk_where_that_is_asked_for() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, chunks = chat_of(**options)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    options["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    _, chunks = chat_of(**options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [*range(1, len(b_ids(ANSWER)) + 1), len(b_ids(ANSWER))]
    assert all(chunk["usage"]["prompt_tokens"] == 11 for chunk in chunks)


@pytest.mark.parametrize("echo", [False, True])
def test_every_token_is_where_its_offset_says(echo: bool) -> None:
    whole, _ = completion_of(echo=echo, logprobs=1)
    for prompt, choice in zip(PROMPTS, whole["choices"], strict=True):
        text, shown = choice["text"], choice["logprobs"]
        assert text == (prompt if echo else "") + ANSWER
        # Bytes of one character begin where it does; the special token in front takes no room.
        expected = [0] if echo else []
        for place, character in enumerate(text):
            expected += [place] * len(character.encode())
        assert shown["text_offset"] == expected
        names = shown["tokens"][1:] if echo else shown["tokens"]
        assert shown["tokens"][:1] == ["<|begin|>"] or not echo
        assert names == [
            name
            for character in text
            for name in (
                [character]
                if character.isascii()
                else [f"bytes:\\x{byte:02x}" for byte in character.encode()]
            )
        ]


def test_the_first_token_of_a_prompt_has_no_logprob_and_the_others_do() -> None:
    whole, _ = completion_of(["ab"], echo=True, logprobs=2, max_tokens=1)
    shown = whole["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == [None, -1.5, -2.5, -0.5]
    assert shown["top_logprobs"][0] is None
    assert shown["top_logprobs"][1:3] == [{"b": -0.25, "a": -1.5}, {"c": -0.25, "b": -2.5}]


def test_prompts_and_continuations_show_their_token_ids() -> None:
    whole, chunks = completion_of(["ab"], return_token_ids=True, max_tokens=2, n=2)
    assert len(whole["choices"]) == 2
    for choice in whole["choices"]:
        assert choice["prompt_token_ids"] == [256, *b_ids("ab")]
        assert choice["token_ids"] == b_ids(ANSWER)[:2]
    for _, parts in groupby(chunks[:-1], key=lambda chunk: chunk["choices"][0]["index"]):
        first, *others = list(parts)
        assert ("prompt_token_ids" in first["choices"][0]) or others == []


def test_prompt_logprobs_are_by_token_id_with_ranks() -> None:
    whole, _ = completion_of(["ab"], prompt_logprobs=1, max_tokens=1, n=2)
    (a,), (b,) = b_ids("a"), b_ids("b")
    for choice in whole["choices"]:
        first, second, third = choice["prompt_logprobs"]
        assert first is None
        assert second == {
            str(b): {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
            str(a): {"logprob": -1.5, "rank": 2, "decoded_token": "a"},
        }
        assert [*third] == [str(b + 1), str(b)]
    # Each has its own number of alternatives, where a prompt is echoed as well.
    whole, _ = completion_of(["ab"], prompt_logprobs=0, echo=True, logprobs=2, max_tokens=1)
    (choice,) = whole["choices"]
    assert [*map(len, choice["prompt_logprobs"][1:])] == [1, 1]
    assert [*map(len, choice["logprobs"]["top_logprobs"][1:])] == [2, 2, 2]

    whole, _ = chat_of(prompt_logprobs=1, n=2)
    assert len(whole["prompt_logprobs"]) == 11
    assert whole["prompt_logprobs"][0] is None


def test_chats_show_the_true_bytes_of_tokens() -> None:
    whole, _ = chat_of(logprobs=True, top_logprobs=3)
    content = whole["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(item["bytes"]) for item in content).decode() == ANSWER
    assert content[0]["token"] == "G"
    assert content[2]["token"] == "bytes:\\xc3"
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -0.5, -9999.0]
    assert whole["choices"][0]["logprobs"]["refusal"] is None


def test_what_is_infinitely_unlikely_has_a_number_in_json() -> None:
    names = TokenNames(TOKENIZER, as_ids=False)
    item = TokenLogprobs(97, -math.inf, 300, ((98, 0.0),))
    assert names.top(item, 1) == {names.name(98): 0.0, names.name(97): -9999.0}
    shown = names.prompt_logprobs([item], 1)[1]
    assert shown is not None and shown[97].logprob == -9999.0


def test_of_tokens_with_one_text_the_likelier_is_named() -> None:
    # As a byte and as a letter of its own.
    pieces = ["<unk>", "a", "<0x61>", "b"]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    names = TokenNames(Tokenizer(backend, None, {}), as_ids=False)
    top = ((2, -0.5), (3, -1.0), (1, -2.0))
    assert names.top(TokenLogprobs(3, -1.0, 2, top), 3) == {"a": -0.5, "b": -1.0}
    assert names.top(TokenLogprobs(1, -2.0, 3, top), 1) == {"a": -0.5}
    # The likeliest one's number is exactly what the token has when it is that one.
    assert max(names.top(TokenLogprobs(2, -0.5, 1, top), 1).values()) == -0.5


def test_a_stop_is_told() -> None:
    asked = CompletionRequest(prompt=["a"])
    prompts = prompts_of(["a"])
    for reason in ("end", 5, None):
        output = Output("x", (97,), FinishReason.STOP, stop_reason=reason, usage=Usage(2, 1, 0))
        choice = dump(CompletionAnswer(asked, prompts, FRAME, TOKENIZER).whole([[output]]))[
            "choices"
        ][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
