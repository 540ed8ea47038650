"""Reading a request's body: bounded while it comes, and JSON that says one thing only."""

import asyncio
import contextlib
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import fastapi
from fastapi.routing import APIRoute
from pydantic_core import from_json

from coordinator.http.errors import ClientGone, HttpError

MAX_BODY_BYTES = 4 * 2**20  # which parse within a fifth of a second, whatever they hold
# A client that still sends when it is answered may never read why; so much more is taken and dropped.
MAX_DROPPED_BYTES = 64 * 2**20
MAX_DROPPING_S = 5.0


class StrictRequest(fastapi.Request):
    """A request whose body FastAPI reads through here."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await self._read()
        return self._body

    async def _read(self) -> bytes:
        # Some clients send forms where they are not told otherwise; so do pages of other sites, which
        # need nobody's leave for it.
        content_type = self.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise HttpError(
                415,
                f"content-type = {content_type!r}: send application/json",
                code="unsupported_media_type",
            )
        length = self.headers.get("content-length", "")
        is_too_large = length.isdecimal() and int(length) > MAX_BODY_BYTES
        chunks: list[bytes] = []
        size = 0
        has_more = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as patience:
                while has_more and size < MAX_BODY_BYTES + MAX_DROPPED_BYTES:
                    if is_too_large and patience.when() is None:
                        chunks.clear()
                        patience.reschedule(asyncio.get_running_loop().time() + MAX_DROPPING_S)
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk = message.get("body", b"")
                    has_more = message.get("more_body", False)
                    size += len(chunk)
                    is_too_large = is_too_large or size > MAX_BODY_BYTES
                    if not is_too_large:
                        chunks.append(chunk)
        if is_too_large:
            raise HttpError(
                413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large"
            )
        return b"".join(chunks)

    async def json(self) -> Any:
        # pydantic's parser refuses what Python's lets through: NaN, half a surrogate pair, nesting
        # that is deeper than anything that follows could bear.
        body = await self.body()
        # In a thread it would hold the event loop up as well: the parser keeps Python's lock. The
        # collector would look through millions of new objects again and again, and find nothing.
        gc.disable()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise HttpError(400, f"the body is no JSON: {error}", code="invalid_json") from error
        finally:
            gc.enable()


class StrictRoute(APIRoute):
    """A route that gets its requests as `StrictRequest`."""

    def get_route_handler(
        self,
    ) -> Callable[[fastapi.Request], Coroutine[Any, Any, fastapi.Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: fastapi.Request) -> fastapi.Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
