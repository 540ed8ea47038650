"""What every gRPC server and client of the contract has in common.

Servers: health, reflection and channelz beside their own services, TLS, one set of limits, and errors
as canonical codes with `google.rpc.ErrorInfo` and `RetryInfo`. Clients: channels, and the same errors
back as exceptions. See the gRPC health checking protocol and AIP-193; who may call is in `rpc_access`.
"""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from colrow.errors import BY_CODE, DOMAIN, Internal, InvalidArgument, ServiceError
from colrow.tls import Tls

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_TENSOR_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
"""Of all tensors in a message: names and shapes take less than what is left."""
MAX_METADATA_BYTES = 16 * 1024  # of one call, as gRPC counts it: 32 bytes an entry come on top
MAX_ERROR_BYTES = 1200  # of an error's message, which is sent twice and once with escapes
MAX_DETAIL_BYTES = 300  # of a value in an ErrorInfo

LIVENESS = "liveness"
"""A name for health checks: SERVING as long as the process answers, ready or not."""

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Below the first all is taken and above the second nothing; gRPC refuses at random in between.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # A second server on a port that is in use must fail instead of sharing it.
    ("grpc.so_reuseport", 0),
    # The default allows one ping in five minutes on a quiet stream and cuts off who pings as ours do.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that is gone without a word is noticed within seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # One that is back is found at once, not after gRPC's growing pauses of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name how long an attempt to connect may take, at least: two round trips, on a busy
    # machine or over a long way. A network that healed is found by the attempt after it, so not longer.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Its name may stand for another address by then, which gRPC would ask for twice a minute.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)


def channel(target: str, tls: Tls | None = None) -> grpc.Channel:
    """To a server at host:port; plain without `tls`."""
    if tls is None:
        return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(target, _credentials(tls), options=CHANNEL_OPTIONS)


def aio_channel(target: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """The same for asyncio."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, _credentials(tls), options=CHANNEL_OPTIONS)


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def _cut(text: str, num_bytes: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= num_bytes else data[:num_bytes].decode(errors="ignore") + "…"


def status_of(error: ServiceError) -> Any:
    """The `google.rpc.Status` of an error, as grpc_status carries it in trailing metadata.

    Long texts are cut: clients drop metadata of more than 8 KiB, and the error with it.
    """
    metadata = {key: _cut(value, MAX_DETAIL_BYTES) for key, value in error.metadata.items()}
    message = _cut(error.message, MAX_ERROR_BYTES)
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(
        status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message, details=packed)
    )


def error_of(error: Any) -> ServiceError:
    """The `ServiceError` that a failed call (`grpc.RpcError`) carries.

    Codes of other servers keep their message.
    """
    code: grpc.StatusCode = error.code()
    message = error.details() or code.name
    kind = BY_CODE.get(code.name, ServiceError)
    result = kind(message)
    result.code = code.name
    status = _status_of(error)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            result.reason, result.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            result.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return result


def _status_of(error: Any) -> status_pb2.Status | None:
    # Read here and not with rpc_status.from_call, which refuses the metadata of grpc.aio errors.
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return status_pb2.Status.FromString(value)
    return None


def wrapped(handler: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """A method's handler with something around what it does."""
    kind = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behaviour = handler.stream_stream or handler.unary_stream or handler.unary_unary
    return kind(wrap(behaviour), handler.request_deserializer, handler.response_serializer)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls that raise a `ServiceError` with its status, and bugs with INTERNAL and a log.

    Requests are parsed in here too: gRPC answers bytes that are no such message with UNKNOWN, and theirs
    is INVALID_ARGUMENT.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        behaviour = handler.stream_stream or handler.unary_stream or handler.unary_unary
        yields = inspect.isasyncgenfunction(behaviour)
        if handler.response_streaming and not yields and method.startswith("/colrow."):
            raise TypeError(f"{method}: a streaming response must be an async generator")
        guard = _guard_stream if yields else _guard_unary
        parse = partial(
            _parsed_stream if handler.request_streaming else _parsed, handler.request_deserializer
        )
        as_it_comes = handler._replace(request_deserializer=None)
        return wrapped(as_it_comes, lambda behaviour: guard(behaviour, method, parse))


def _parsed(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        raise InvalidArgument("request", f"{len(data)} bytes", str(error)) from error


async def _parsed_stream(
    deserialize: Callable[[bytes], Any], stream: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for data in stream:
        yield _parsed(deserialize, data)


async def _abort(context: grpc.aio.ServicerContext, method: str, error: Exception) -> None:
    if isinstance(error, ValueError) and not isinstance(error, ServiceError):
        # By the project's rule a ValueError names a field and a value that the caller chose.
        named = {
            name: str(getattr(error, name)) for name in ("field", "value") if hasattr(error, name)
        }
        refused = ServiceError(str(error), reason="INVALID_FIELD", metadata=named)
        refused.code = "INVALID_ARGUMENT"
        error = refused
    if not isinstance(error, ServiceError):
        log.exception("%s failed", method)
        error = Internal(f"{type(error).__name__}: {error}")
    await context.abort_with_status(status_of(error))


def _guard_unary(
    behaviour: Callable[..., Any], method: str, parse: Callable[[Any], Any]
) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(parse(request), context)
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the call was ended in there already, or its client has gone
        except Exception as error:
            await _abort(context, method, error)

    return guarded


def _guard_stream(
    behaviour: Callable[..., Any], method: str, parse: Callable[[Any], Any]
) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            # Closed now and not when the garbage collector comes by: what it holds is freed.
            async with aclosing(behaviour(parse(request), context)) as responses:
                async for response in responses:
                    yield response
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the call was ended in there already, or its client has gone
        except Exception as error:
            await _abort(context, method, error)

    return guarded


class Server:
    """A gRPC server with the contract's standard services; the caller adds its own servicers.

    `grpc_server` takes the servicers, then `start` binds and serves. Health, of the whole server ("")
    and of each of its services, is NOT_SERVING until `set_serving(True)`: that is readiness. The name
    `liveness` is SERVING from the start: who waits for others is not to be killed for it. Without `tls`
    anyone may read what travels; with `client_certificates` only those are heard whose certificate is
    of a CA in `tls`.
    """

    def __init__(
        self,
        service_names: Sequence[str],
        *,
        tls: Tls | None = None,
        client_certificates: bool = False,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._service_names = ("", *service_names)
        self._tls = tls
        self._client_certificates = client_certificates
        self._health = health.aio.HealthServicer()
        self.grpc_server = grpc.aio.server(
            interceptors=(*interceptors, ErrorInterceptor()), options=SERVER_OPTIONS
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        channelz.add_channelz_servicer(self.grpc_server)
        reflection.enable_server_reflection(
            (
                *service_names,
                health.SERVICE_NAME,
                "grpc.channelz.v1.Channelz",
                reflection.SERVICE_NAME,
            ),
            self.grpc_server,
        )

    async def start(self, address: str) -> int:
        """Binds `host:port` and serves; returns the port. InvalidArgument where it can't bind."""
        await self.set_serving(False)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        try:
            if self._tls is None:
                port = self.grpc_server.add_insecure_port(address)
            else:
                assert self._tls.key is not None and self._tls.certificate is not None
                credentials = grpc.ssl_server_credentials(
                    [(self._tls.key, self._tls.certificate)],
                    root_certificates=self._tls.ca,
                    require_client_auth=self._client_certificates,
                )
                port = self.grpc_server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InvalidArgument(
                "address", address, "can't be bound; is the port in use?"
            ) from error
        await self.grpc_server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in self._service_names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives running ones `grace_s` seconds, then ends them."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_s)
