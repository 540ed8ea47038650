"""What the routes of the HTTP API do: OpenAI's completions and chats, and what operators look at."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from colrow import __version__
from colrow.errors import FailedPrecondition, InvalidArgument, ServiceError, Unavailable, shown
from coordinator import request as engine_request
from coordinator import tracing
from coordinator.cluster import Cluster, State
from coordinator.engine import Engine
from coordinator.http.answers import Answer, ChatAnswer, CompletionAnswer, Frame
from coordinator.http.body import StrictRoute
from coordinator.http.errors import HttpError, http_error
from coordinator.http.requests import (
    Prompt,
    chat_messages,
    chat_options,
    chat_request,
    completion_requests,
)
from coordinator.http.schema import (
    ChatCompletion,
    ChatCompletionRequest,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    GenerationRequest,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
    Version,
)
from coordinator.http.stream import EventStream, all_outputs, events, first_of, until_gone
from coordinator.request import Output, checked_id
from coordinator.tokenizer import Tokenizer, chat_length

REQUEST_ID = "colrow.request_id"  # in the scope of a request

RenderMetrics = Callable[[str], Awaitable[tuple[bytes, str]]]
"""From the Accept header of a scrape to the metrics and their content type."""

# What the engine calls otherwise than a request does.
COMPLETION_NAMES = {"prompt.token_ids": "prompt"}
CHAT_NAMES = {"prompt": "messages", "prompt.token_ids": "messages", "logprobs": "top_logprobs"}

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is wrong, or there are too many."},
    "5XX": {"model": ErrorAnswer, "description": "The cluster does not serve, or failed."},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "string",
                    "description": "With stream = true: a `data:` line for each chunk, or for an "
                    "error that ends the stream, and `data: [DONE]`.",
                }
            }
        }
    }
}


def _json(answer: BaseModel) -> Response:
    return Response(
        answer.model_dump_json(exclude_unset=True).encode(), media_type="application/json"
    )


@contextlib.contextmanager
def _fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields of the request and not the engine's."""
    try:
        yield
    except ServiceError as error:
        raise http_error(error, names) from error


class Api:
    """What the routes do."""

    def __init__(self, cluster: Cluster, render_metrics: RenderMetrics) -> None:
        self._cluster = cluster
        self._render_metrics = render_metrics
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(route_class=StrictRoute, responses=ERRORS)
        post, get = router.post, router.get
        post("/v1/completions", response_model=Completion, responses=STREAMED)(self.completions)
        post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)(
            self.chat_completions
        )
        get("/v1/models", response_model=ModelList)(self.models)
        get("/v1/models/{model:path}", response_model=ModelCard)(self.model)
        post("/tokenize", response_model=Tokens)(self.tokenize)
        post("/detokenize", response_model=Text)(self.detokenize)
        get("/health", response_model=Health)(self.health)
        get("/live", response_model=Health)(self.live)
        get("/version", response_model=Version)(self.version)
        get("/metrics", response_class=Response)(self.metrics)
        return router

    async def completions(self, asked: CompletionRequest, http: Request) -> Response:
        """Continues one prompt or several."""
        self._check_model(asked.model)
        with contextlib.ExitStack() as call:
            engine = call.enter_context(self._cluster.call())
            request_id = self._request_id(asked, http)
            prompts = await self._prompts(asked)
            with _fields_named(COMPLETION_NAMES):
                requests = completion_requests(
                    asked, prompts, request_id, _trace(http), self._cluster.context_length
                )
            frame = self._frame(f"cmpl-{request_id}")
            answer = CompletionAnswer(asked, prompts, frame, self._cluster.model.tokenizer)
            return await self._answer(http, engine, call, asked, requests, answer, COMPLETION_NAMES)

    async def chat_completions(self, asked: ChatCompletionRequest, http: Request) -> Response:
        """Answers a conversation."""
        self._check_model(asked.model)
        with contextlib.ExitStack() as call:
            engine = call.enter_context(self._cluster.call())
            request_id = self._request_id(asked, http)
            token_ids = await self._chat_ids(
                asked, add_special_tokens=bool(asked.add_special_tokens)
            )
            prompt = Prompt(token_ids)
            names = dict(CHAT_NAMES)
            if asked.max_completion_tokens is not None:
                names["max_tokens"] = "max_completion_tokens"
            with _fields_named(names):
                request = chat_request(asked, prompt, request_id, _trace(http))
            frame = self._frame(f"chatcmpl-{request_id}")
            answer = ChatAnswer(asked, prompt, frame, self._cluster.model.tokenizer)
            return await self._answer(http, engine, call, asked, (request,), answer, names)

    async def _answer(
        self,
        http: Request,
        engine: Engine,
        call: contextlib.ExitStack,
        asked: GenerationRequest,
        requests: Sequence[engine_request.Request],
        answer: Answer,
        names: Mapping[str, str],
    ) -> Response:
        """`call` ends with the answer: a stream takes it over."""
        config = self._cluster.config
        # Not all at once: a batch should not fill the queue and turn others away.
        at_once = max(1, min(config.max_running, config.max_waiting) // requests[0].n)
        outputs = all_outputs(engine, requests, at_once)
        with _fields_named(names):
            if len(requests) > 1:  # one alone is checked when it runs
                for request in requests:
                    engine.check(request)
                    await asyncio.sleep(0)  # which takes a while where there are many
            if asked.stream:
                # An error that comes before anything else is to have its status.
                first = await until_gone(http.receive, first_of(outputs))
                ends_with_usage = asked.stream_options and asked.stream_options.include_usage
                chunks = events(answer, first, outputs, bool(ends_with_usage))
                return EventStream(chunks, call.pop_all())

            async def collect() -> list[list[Output]]:
                collected: list[list[Output]] = [[] for _ in requests]
                async with aclosing(outputs):
                    async for place, output in outputs:
                        collected[place].append(output)
                return collected

            return _json(answer.whole(await until_gone(http.receive, collect())))

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._cluster.config.served_model_name:
            raise HttpError(
                404,
                f"The model {shown(model)} does not exist",
                param="model",
                code="model_not_found",
            )

    def _request_id(self, asked: GenerationRequest, http: Request) -> str:
        """That of the header, else of the body, else a new one; the answer's header says it too."""
        if asked.request_id is not None and REQUEST_ID not in http.scope:
            http.scope[REQUEST_ID] = checked_id(asked.request_id, "request_id")
        return http.scope.setdefault(REQUEST_ID, uuid.uuid4().hex)

    def _frame(self, id: str) -> Frame:
        return Frame(id, int(time.time()), self._cluster.config.served_model_name)

    def _tokenizer(self, field: str) -> Tokenizer:
        tokenizer = self._cluster.model.tokenizer
        if tokenizer is None:
            raise FailedPrecondition(
                f"{field}: the model has no tokenizer; it takes token ids only",
                reason="NO_TOKENIZER",
            )
        return tokenizer

    async def _prompts(self, asked: CompletionRequest) -> list[Prompt]:
        texts = [prompt for prompt in asked.prompt if isinstance(prompt, str)]
        if not texts:
            return [Prompt(tuple(prompt)) for prompt in asked.prompt if isinstance(prompt, list)]
        tokenizer = self._tokenizer("prompt")
        special = asked.add_special_tokens is not False
        for text in texts:
            tokenizer.check_length("prompt", len(text))

        def encode() -> list[Prompt]:
            return [
                Prompt(tuple(tokenizer.encode(text, add_special_tokens=special)), text)
                for text in texts
            ]

        return await tokenizer.aside(sum(map(len, texts)), encode)

    async def _chat_ids(
        self, asked: ChatRequest | TokenizeRequest, *, add_special_tokens: bool
    ) -> tuple[int, ...]:
        if not asked.messages:
            raise InvalidArgument("messages", [], "is empty")
        tokenizer = self._tokenizer("messages")
        options = chat_options(asked, add_special_tokens=add_special_tokens)
        messages = chat_messages(asked.messages)
        length = chat_length(messages)
        tokenizer.check_length("messages", length)
        try:
            ids = await tokenizer.aside(
                length,
                lambda: tokenizer.encode_chat(messages, options),
            )
        except ValueError as error:
            raise HttpError(400, str(error), param="messages", code="invalid_messages") from error
        return tuple(ids)

    async def models(self) -> Response:
        """The one model that is served."""
        return _json(ModelList(object="list", data=[self._card()]))

    async def model(self, model: str) -> Response:
        self._check_model(model)
        return _json(self._card())

    def _card(self) -> ModelCard:
        return ModelCard(
            id=self._cluster.config.served_model_name,
            object="model",
            created=self._created,
            owned_by="colrow",
            max_model_len=self._cluster.context_length,
        )

    async def tokenize(self, asked: TokenizeRequest) -> Response:
        """Token ids of a text or a conversation."""
        self._check_model(asked.model)
        tokenizer = self._tokenizer("prompt")
        if (asked.prompt is None) == (not asked.messages):
            raise InvalidArgument("prompt", asked.prompt, "send prompt or messages, one of them")
        if asked.prompt is None:
            ids = await self._chat_ids(asked, add_special_tokens=bool(asked.add_special_tokens))
        else:
            text, special = asked.prompt, asked.add_special_tokens is not False
            tokenizer.check_length("prompt", len(text))
            ids = await tokenizer.aside(
                len(text), lambda: tuple(tokenizer.encode(text, add_special_tokens=special))
            )
        return _json(
            Tokens(
                tokens=list(ids),
                count=len(ids),
                max_model_len=self._cluster.context_length,
                token_strs=list(map(tokenizer.token_piece, ids))
                if asked.return_token_strs
                else None,
            )
        )

    async def detokenize(self, asked: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        self._check_model(asked.model)
        tokenizer = self._tokenizer("tokens")
        vocab_size = self._cluster.model.spec.vocab_size
        for token in asked.tokens:
            if not 0 <= token < vocab_size:
                raise InvalidArgument("tokens", token, f"the vocabulary has {vocab_size} ids")
        text = await tokenizer.aside(
            len(asked.tokens), lambda: tokenizer.decode(asked.tokens, skip_special_tokens=False)
        )
        return _json(Text(prompt=text))

    async def health(self) -> Response:
        """Readiness: 200 while the cluster serves, with all its ranks, 503 with its state else."""
        state = self._cluster.state
        if state is not State.SERVING:
            raise Unavailable(
                f"the cluster is {state.value}", reason="NOT_SERVING", retry_after_s=1.0
            )
        return _json(Health(status=state.value))

    async def live(self) -> Response:
        """Liveness: 200 with the cluster's state whatever that is, as long as the process answers."""
        return _json(Health(status=self._cluster.state.value))

    async def version(self) -> Response:
        return _json(Version(version=__version__))

    async def metrics(self, http: Request) -> Response:
        """For Prometheus."""
        content, content_type = await self._render_metrics(http.headers.get("accept", ""))
        return Response(content, media_type=content_type)


def _trace(http: Request) -> dict[str, str]:
    return {name: http.headers[name] for name in tracing.HEADERS if name in http.headers}
