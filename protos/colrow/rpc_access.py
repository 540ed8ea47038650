"""Who may call: what servers ask before they answer, and what clients show.

A key says who a user is, a certificate which service calls.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health

from colrow.errors import PermissionDenied, ServiceError
from colrow.rpc import status_of, wrapped

log = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"

Authorize = Callable[[str, str], None]
"""Of a method's full name and its call's `authorization`, "" without one: a ServiceError refuses."""


class AuthorizeInterceptor(grpc.aio.ServerInterceptor):
    """Asks, before a call's request is read, whether it may be made."""

    def __init__(self, authorize: Authorize) -> None:
        self._authorize = authorize

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            self._authorize(handler_call_details.method, str(metadata.get(AUTHORIZATION, "")))
        except ServiceError as error:
            return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: ServiceError) -> Any:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort_with_status(status_of(error))

    # As of a stream in both directions it ends a call of any kind, and waits for nothing.
    return grpc.stream_stream_rpc_method_handler(refuse)


class PeerInterceptor(grpc.aio.ServerInterceptor):
    """Lets only the client call whose certificate has this name, as its subject or its DNS name.

    Health is open to everyone with a certificate of the CA: probes of it decide nothing.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        # Who calls is known to the call's context alone, which its handler gets and nobody before.
        return wrapped(handler, lambda behaviour: self._checking(behaviour, method))

    def _checking(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def checked_stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
                await self._check(method, context)
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response

            return checked_stream
        if not inspect.iscoroutinefunction(behaviour):
            raise TypeError(f"{method}: is not asynchronous")

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._check(method, context)
            return await behaviour(request, context)

        return checked

    async def _check(self, method: str, context: grpc.aio.ServicerContext) -> None:
        peer = context.auth_context()
        names = [
            name.decode(errors="replace")
            for key in ("x509_common_name", "x509_subject_alternative_name")
            for name in peer.get(key, ())
        ]
        if self._name in names:
            return
        log.warning("refused", extra={"method": method, "peer": context.peer(), "names": names})
        error = PermissionDenied(
            f"the client's certificate is of {', '.join(names) or 'nobody'}; only "
            f"{self._name!r} may call this",
            reason="WRONG_CLIENT",
        )
        await context.abort_with_status(status_of(error))


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What a call carries to show a key. ValueError, which does not tell it, where it can't be one."""
    if api_key is None:
        return ()
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ValueError("api_key: is empty, or has characters that no key has")
    return ((AUTHORIZATION, f"Bearer {api_key}"),)


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class KeySender(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the key to every call; not a gRPC call credential, which needs TLS on loopback too."""

    def __init__(self, api_key: str) -> None:
        self._metadata = key_metadata(api_key)

    def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), *self._metadata)
        return continuation(
            _CallDetails(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary: Any = _intercept
    intercept_unary_stream: Any = _intercept
    intercept_stream_unary: Any = _intercept
    intercept_stream_stream: Any = _intercept
