"""Generations on their way to a client over HTTP, for as long as there is one."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from colrow.errors import ServiceError
from coordinator.engine import Engine
from coordinator.http.answers import Answer
from coordinator.http.errors import ClientGone, http_error, internal_error
from coordinator.request import Output, Request

log = logging.getLogger(__name__)

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; ClientGone, with the work cancelled, when the client leaves first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_outputs(
    engine: Engine, requests: Sequence[Request], at_once: int
) -> AsyncGenerator[tuple[int, Output], None]:
    """The outputs of all requests with their places, as they come; `at_once` of them run."""
    if len(requests) == 1:
        async with aclosing(engine.generate(requests[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return
    news: asyncio.Queue[tuple[int, Output] | asyncio.Task[None]] = asyncio.Queue()
    left = iter(enumerate(requests))

    async def work() -> None:
        for place, request in left:
            async with aclosing(engine.generate(request)) as outputs:
                async for output in outputs:
                    news.put_nowait((place, output))

    workers = [asyncio.create_task(work()) for _ in range(min(at_once, len(requests)))]
    for worker in workers:
        worker.add_done_callback(news.put_nowait)
    try:
        num_running = len(workers)
        while num_running:
            item = await news.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises what it ended with
                num_running -= 1
            else:
                yield item
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events, until they end or the client leaves; then `call` is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], call: contextlib.ExitStack) -> None:
        # A proxy that collects an answer before it hands it on would make a stream pointless.
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            async with aclosing(self._events):
                await self.stream_response(send)

        with self._call, contextlib.suppress(ClientGone):
            await until_gone(receive, write())


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


async def first_of(outputs: AsyncGenerator[tuple[int, Output], None]) -> tuple[int, Output]:
    return await anext(outputs)


async def events(
    answer: Answer,
    first: tuple[int, Output],
    outputs: AsyncGenerator[tuple[int, Output], None],
    ends_with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs):
        try:
            for chunk in answer.chunks(*first):
                yield _event(chunk)
            async for place, output in outputs:
                for chunk in answer.chunks(place, output):
                    yield _event(chunk)
        except ServiceError as error:
            yield b"data: " + http_error(error).body + b"\n\n"
            return
        except Exception:
            log.exception("a stream failed")
            yield b"data: " + internal_error().body + b"\n\n"
            return
    if ends_with_usage:
        yield _event(answer.usage_chunk())
    yield b"data: [DONE]\n\n"
