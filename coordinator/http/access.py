"""Who may call the HTTP API: those who show a key."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from colrow.errors import Unauthenticated
from coordinator.http import errors

OPEN_PATHS = frozenset(
    {
        # Probes and scrapers carry no key.
        *("/health", "/live", "/metrics"),
        # These say what any copy of the software says.
        *("/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"),
    }
)

Authorize = Callable[[str, str], None]
"""Of what is called and the Authorization header, "" without one: Unauthenticated refuses."""


class Guarded:
    """Around an app: 401, before anything of the body is read, where no right key is shown."""

    def __init__(self, app: ASGIApp, authorize: Authorize) -> None:
        self._app = app
        self._authorize = authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._authorize(
                    f"{scope['method']} {scope['path']}",
                    Headers(scope=scope).get("authorization", ""),
                )
            except Unauthenticated as error:
                await errors.response(errors.http_error(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)
