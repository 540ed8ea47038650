"""Long texts over gRPC: bounded, and tokenized where nobody waits for them."""

import asyncio
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from colrow.errors import InvalidArgument
from colrow.v1 import inference_service_pb2 as pb
from coordinator.cluster import Cluster
from coordinator.grpc_server import InferenceServicer
from coordinator.tokenizer import (
    LONG_TEXT,
    LONG_TEXTS_AT_ONCE,
    MAX_TEXT_CHARACTERS,
    Tokenizer,
)
from tests.unit.test_http_server import byte_tokenizer

pytestmark = pytest.mark.timeout(60)

CONTEXT_LENGTH = 100
CONTEXT = cast(grpc.aio.ServicerContext, SimpleNamespace(invocation_metadata=lambda: ()))


def servicer(tokenizer: Tokenizer) -> InferenceServicer:
    model = SimpleNamespace(tokenizer=tokenizer)
    config = SimpleNamespace(served_model_name="model")
    cluster = SimpleNamespace(
        model=model, config=config, call=nullcontext, context_length=CONTEXT_LENGTH
    )
    return InferenceServicer(cast(Cluster, cluster))


def chat(text: str) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role="user", content=text)])


@pytest.mark.parametrize("field", ["text", "chat"])
async def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(field: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.encode = None  # type: ignore[method-assign, assignment]
    text = "x" * (MAX_TEXT_CHARACTERS + 1)
    given: Any = {"text": text} if field == "text" else {"chat": chat(text)}
    services = servicer(tokenizer)
    with pytest.raises(InvalidArgument, match=f"^{field} = .* characters': are more than"):
        await services.Tokenize(pb.TokenizeRequest(**given), CONTEXT)
    with pytest.raises(InvalidArgument, match=f"^{field} = .* characters': are more than"):
        await anext(aiter(services.Generate(pb.GenerateRequest(**given), CONTEXT)))


async def test_too_many_tokens_are_refused_before_they_are_looked_at() -> None:
    services = servicer(byte_tokenizer())
    ids = pb.TokenIds(ids=[2**31] * (CONTEXT_LENGTH + 1))
    with pytest.raises(InvalidArgument, match=r"^prompt = '101 tokens': the context holds 100"):
        await anext(aiter(services.Generate(pb.GenerateRequest(token_ids=ids), CONTEXT)))
    with pytest.raises(InvalidArgument, match=r"^prompt = '101 tokens': the context holds 100"):
        await services.Score(pb.ScoreRequest(sequences=[ids]), CONTEXT)
    with pytest.raises(InvalidArgument, match=r"^token_ids = .* tokens': are more than"):
        many = pb.DetokenizeRequest(token_ids=[2**31] * (MAX_TEXT_CHARACTERS + 1))
        await services.Detokenize(many, CONTEXT)


async def test_very_many_empty_messages_are_a_long_text_too() -> None:
    many = pb.Chat(messages=[pb.ChatMessage()] * (MAX_TEXT_CHARACTERS // 16 + 1))
    with pytest.raises(InvalidArgument, match=r"^chat = "):
        await servicer(byte_tokenizer()).Tokenize(pb.TokenizeRequest(chat=many), CONTEXT)


async def test_long_texts_hold_up_nobody_and_few_are_tokenized_at_once() -> None:
    tokenizer = byte_tokenizer()
    encode, running, most = tokenizer.encode, 0, 0

    def slowly(text: str, **options: bool) -> list[int]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.5)
        running -= 1
        return encode(text, **options)

    tokenizer.encode = slowly  # type: ignore[method-assign]
    services = servicer(tokenizer)
    long = pb.TokenizeRequest(text="x" * (LONG_TEXT + 1))
    asking = asyncio.gather(*(services.Tokenize(long, CONTEXT) for _ in range(6)))
    worst = 0.0
    while not asking.done():
        start = time.monotonic()
        await asyncio.sleep(0.001)
        worst = max(worst, time.monotonic() - start)
    assert [len(answer.token_ids) for answer in await asking] == [LONG_TEXT + 2] * 6
    assert worst < 0.4
    assert most == LONG_TEXTS_AT_ONCE
