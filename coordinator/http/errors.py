"""Errors of the HTTP API, in OpenAI's form, whatever they come from."""

import math
import reprlib
from collections.abc import Mapping

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from colrow.errors import InvalidArgument, ServiceError
from coordinator.http.schema import UNKNOWN, UNSUPPORTED, ErrorAnswer, ErrorBody

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_S = 1.0  # where an error that passes does not say itself

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "ABORTED": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""Of the codes of `ServiceError`; others are 500."""

TYPES = {429: "rate_limit_error"}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class HttpError(HTTPException):
    """An error with its HTTP status. `param` names a field of the request, `code` the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kind = INVALID_REQUEST if status < 500 else SERVER_ERROR
        self.answer = ErrorAnswer(
            error=ErrorBody(message=message, type=TYPES.get(status, kind), param=param, code=code)
        )

    @property
    def body(self) -> bytes:
        return self.answer.model_dump_json().encode()


def http_error(error: ServiceError, names: Mapping[str, str] | None = None) -> HttpError:
    """`names` are those of the engine's fields in the request, where they differ."""
    message, param = error.message, None
    if isinstance(error, InvalidArgument):
        param = error.field.removeprefix("sampling.").partition("[")[0]
        param = (names or {}).get(param, param)
        message = f"{param}{message.removeprefix(error.field)}"
    status = STATUSES.get(error.code, 500)
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        # In whole seconds, and at least one: a client that gets 0 is there again at once.
        seconds = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(seconds)))
    return HttpError(status, message, param=param, code=error.reason.lower(), headers=headers)


def internal_error() -> HttpError:
    return HttpError(500, "an internal error; the server's log says more", code="internal")


def _path(parts: tuple[object, ...]) -> str:
    """A place in a body, as in `messages[0].content`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


def validation_error(error: RequestValidationError) -> HttpError:
    """Of a body that is no such request; of several wrong fields the first."""
    first = error.errors()[0]
    parts = tuple(first["loc"][1:])
    if first["type"] == UNKNOWN:
        path = _path((*parts, first["ctx"]["name"]))
        return HttpError(
            400, f"Unrecognized request argument supplied: {path}", param=path, code=UNKNOWN
        )
    path = _path(parts)
    if not path:
        return HttpError(400, "the body is no JSON object", code="invalid_body")
    if first["type"] == "missing":
        return HttpError(
            400,
            f"Missing required parameter: {path!r}",
            param=path,
            code="missing_required_parameter",
        )
    problem = first["ctx"]["problem"] if "problem" in first.get("ctx", {}) else first["msg"]
    problem = problem[:1].lower() + problem[1:]
    code = UNSUPPORTED if first["type"] == UNSUPPORTED else "invalid_value"
    value = first["input"]
    # Of what is larger the name has to be enough.
    shown = "" if isinstance(value, dict | list) else f" = {reprlib.repr(value)}"
    return HttpError(400, f"{path}{shown}: {problem}", param=path, code=code)


def response(error: HttpError) -> Response:
    return Response(
        error.body, error.status_code, headers=error.headers, media_type="application/json"
    )


# Handlers, for FastAPI


async def on_http_error(request: Request, error: Exception) -> Response:
    """Those of this module, and the framework's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    if isinstance(error, HttpError):
        return response(error)
    where = f"{request.method} {request.url.path}"
    return response(HttpError(error.status_code, f"{where}: {error.detail}", headers=error.headers))


async def on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return response(validation_error(error))


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return response(http_error(error))


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; 499 is what proxies log for this."""
    return Response(status_code=499)


async def on_bug(request: Request, error: Exception) -> Response:
    """The log says what it was; see `server.Outermost`."""
    return response(internal_error())
