"""The errors that Colrow's services answer with, free of gRPC and protobuf.

Each is a canonical gRPC code with the reason and metadata of a `google.rpc.ErrorInfo`;
`colrow.rpc` puts them on the wire and takes them off.
"""

from collections.abc import Mapping

DOMAIN = "colrow"

MAX_SHOWN = 200  # characters


def shown(value: object) -> str:
    """A value as errors show it: of a long one the beginning."""
    text = repr(value)
    return f"{text[:MAX_SHOWN]}…" if len(text) > MAX_SHOWN else text


class ServiceError(Exception):
    """An error with a canonical code, for the caller of a service.

    `code` is the name of a `grpc.StatusCode`, `reason` a constant in UPPER_SNAKE_CASE, and
    `retry_after_s` is set where trying again later helps.
    """

    code = "INTERNAL"
    reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidArgument(ServiceError, ValueError):
    """A field has a value that no state of the service makes acceptable."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, field: str, value: object, problem: str) -> None:
        text = shown(value)
        super().__init__(f"{field} = {text}: {problem}", metadata={"field": field, "value": text})
        self.field = field


class Unauthenticated(ServiceError):
    """The caller does not say who it is, or is not who it says."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(ServiceError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    reason = "FORBIDDEN"


class NotFound(ServiceError):
    """What the call names does not exist here."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class FailedPrecondition(ServiceError):
    """The service is not in the state that the call needs."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_STATE"


class ResourceExhausted(ServiceError):
    """Memory, blocks or queue places are used up."""

    code = "RESOURCE_EXHAUSTED"
    reason = "EXHAUSTED"


class AnswerTooLarge(ResourceExhausted):
    """An answer would take more than a message carries, or than the caller takes."""

    reason = "ANSWER_TOO_LARGE"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the answer takes over {max_bytes} bytes; send fewer tokens")


class Unavailable(ServiceError):
    """The service can't answer now and may do so later."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """Something did not happen in its time."""

    code = "DEADLINE_EXCEEDED"
    reason = "TIMEOUT"


class DataLoss(ServiceError):
    """A checkpoint is truncated or malformed."""

    code = "DATA_LOSS"
    reason = "CORRUPT_CHECKPOINT"


class Aborted(ServiceError):
    """What ran was ended from outside."""

    code = "ABORTED"
    reason = "ABORTED"


class Internal(ServiceError):
    """A bug, or a machine that misbehaves."""


BY_CODE: dict[str, type[ServiceError]] = {
    kind.code: kind
    for kind in (
        Unauthenticated,
        PermissionDenied,
        NotFound,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        DataLoss,
        Aborted,
        Internal,
    )
}
