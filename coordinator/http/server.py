"""The HTTP API as a server, in the coordinator's event loop."""

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from colrow import __version__
from colrow.errors import InvalidArgument, ServiceError
from colrow.tls import Tls
from coordinator.cluster import Cluster
from coordinator.http import errors
from coordinator.http.access import Authorize, Guarded
from coordinator.http.api import REQUEST_ID, Api, RenderMetrics
from coordinator.request import checked_id

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 2**10  # of a request line and its headers; more is answered with 400
REQUEST_TIMEOUT_S = 60.0
KEEP_ALIVE_S = 65  # longer than clients keep unused connections, so that none dies under a request


class Outermost:
    """Around the whole app: names every request, and logs bugs under its name."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def send_named(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                request_id = scope.setdefault(REQUEST_ID, uuid.uuid4().hex)
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            asked = Request(scope).headers.get("x-request-id")
            if asked is not None:
                scope[REQUEST_ID] = checked_id(asked, "X-Request-Id")
            await self._app(scope, receive, send_named)
        except InvalidArgument as error:
            await errors.response(errors.http_error(error))(scope, receive, send_named)
        except Exception:
            log.exception(
                "%s %s (request %s) failed",
                scope["method"],
                scope["path"],
                scope.get(REQUEST_ID, ""),
            )
            if not is_answered:
                raise  # and the connection is closed


def build(
    cluster: Cluster, render_metrics: RenderMetrics, authorize: Authorize | None = None
) -> ASGIApp:
    """The API as an ASGI app; open to everyone without `authorize`."""
    app = FastAPI(
        title="Colrow",
        summary="Tensor-parallel LLM inference",
        version=__version__,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(Api(cluster, render_metrics).router())
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    app.add_exception_handler(ServiceError, errors.on_service_error)
    app.add_exception_handler(errors.ClientGone, errors.on_client_gone)
    app.add_exception_handler(Exception, errors.on_bug)
    return Outermost(app if authorize is None else Guarded(app, authorize))


class _Patient(H11Protocol):
    """Hangs up on a client that does not send the whole of a request in time.

    uvicorn waits for ever for the rest of one, so that a few clients that send slowly, or stop, could
    hold every file that the process may open.
    """

    def __init__(self, *arguments: Any, request_timeout_s: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._request_timeout_s = request_timeout_s
        self._giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()  # what came of the next request already

    def _follow(self) -> None:
        state, (rest, _) = self.conn.their_state, self.conn.trailing_data
        if state is not h11.SEND_BODY and not (state is h11.IDLE and rest):
            self._stop_waiting()  # between two requests uvicorn's own patience counts
        elif self._giving_up is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._giving_up = self.loop.call_later(self._request_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None


class _Server(uvicorn.Server):
    """One that leaves signals to the process that it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An ASGI app on a port, in the running event loop; over TLS where it is given some.

    With `client_certificates` only those are heard whose certificate is of a CA in `tls`.
    `request_timeout_s` is how long a client may take to send a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        stop_grace_s: int,
        tls: Tls | None = None,
        client_certificates: bool = False,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        context = tls and tls.server_context(client_certificates=client_certificates)
        config = uvicorn.Config(
            app,
            http=partial(_Patient, request_timeout_s=request_timeout_s),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",  # of its own loggers
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=stop_grace_s,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ssl_context_factory=(lambda config, default: context) if context else None,
        )
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int) -> int:
        """Takes a port, any for 0, and returns it. InvalidArgument where it can't be had."""
        bare = host.strip("[]")
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        every = bare == "::" and socket.has_dualstack_ipv6()  # of IPv4 too, as gRPC takes it
        try:
            self._socket = socket.create_server((bare, port), family=family, dualstack_ipv6=every)
        except OSError as error:
            raise InvalidArgument(
                "http_port", port, f"can't be bound on {host} ({error.strerror})"
            ) from error
        return self._socket.getsockname()[1]

    async def start(self) -> None:
        """Serves the port that is bound."""
        assert self._socket is not None, "bind it first"
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        """Takes no new requests and gives running ones their grace."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        elif self._socket is not None:
            self._socket.close()
