"""A small client over the stubs of `colrow.v1`, for those who need not see protobuf."""

from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colrow.errors import ServiceError, Unavailable
from colrow.rpc import LIVENESS, aio_channel, channel, error_of
from colrow.rpc_access import KeySender, key_metadata
from colrow.tls import read_user
from colrow.v1 import (
    control_service_pb2,
    control_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    sampling_pb2,
    tensor_pb2,
)

if TYPE_CHECKING:
    import numpy as np

_inference_pb = inference_service_pb2
_control_pb = control_service_pb2

FINISH_REASONS = {
    _inference_pb.FINISH_REASON_UNSPECIFIED: None,
    _inference_pb.FINISH_REASON_STOP: "stop",
    _inference_pb.FINISH_REASON_LENGTH: "length",
}

CONTROL_TIMEOUT_S = 60.0

Prompt = str | Iterable[int] | Iterable[Mapping[str, str]]
"""A text, token ids, or chat messages with `role` and `content`."""


class Settings(TypedDict, total=False):
    """What `generate` takes beside the prompt. What is left out, or None, is the server's default.

    `GenerateRequest` and `SamplingParams` of the contract say what each does, its range and default.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    priority: int | None
    request_id: str | None
    show_special_tokens: bool | None


_SAMPLING_FIELDS = frozenset(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and the natural logarithm of its probability; `rank` 1 is the likeliest.

    `top` are the likeliest tokens with theirs, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of continuation `index`: text, its tokens, and their log-probabilities if asked for.

    The last piece of each continuation has a finish reason, and a stop reason where a text or a token
    of the request ended it. Token counts come with the last piece of all, `completion_tokens` of all
    continuations together. `prompt_logprobs` come with the first piece.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: str | int | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a sequence is: its tokens but the first, and the sum of their log-probabilities."""

    tokens: tuple[TokenLogprobs, ...]
    logprob: float


class Colrow:
    """A connection to a coordinator at `target` (host:port). Errors are `colrow.errors`.

    Args:
        tls: for one that serves over TLS: a folder with `ca.crt`, by which it is checked, and with
            `tls.crt` and `tls.key` where it asks for certificates (`colrow certs` makes such folders);
            or a file of CA certificates. ValueError where it can't be used.
        api_key: where it asks for one. Without `tls` it travels in the clear.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        tls: Path | str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.target = target
        self._tls = None if tls is None else read_user(Path(tls))
        self._api_key = api_key
        self._channel = channel(target, self._tls)
        if api_key is not None:
            self._channel = grpc.intercept_channel(self._channel, KeySender(api_key))
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self.control = control_service_pb2_grpc.ControlServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def asynchronous(self) -> "AsyncColrow":
        """A connection like this one for asyncio."""
        tls = None if self._tls is None else self._tls.path
        return AsyncColrow(self.target, tls=tls, api_key=self._api_key)

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> Generator[Piece, None, None]:
        """Streams the continuation of a text, of token ids, or of chat messages with role and content.

        With n > 1 the pieces of all continuations come as they are made; `Piece.index` tells them
        apart. Leaving the iteration cancels.
        """
        call = self.inference.Generate(_generate_request(prompt, settings), timeout=timeout_s)
        try:
            for response in call:
                yield _piece(response)
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def score(
        self,
        sequences: Iterable[Iterable[int]],
        top_logprobs: int = 0,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> list[Score]:
        """How likely the model holds each sequence of token ids; nothing is generated.

        `top_logprobs` is how many of the likeliest tokens to name beside each given one.
        """
        request = _inference_pb.ScoreRequest(top_logprobs=top_logprobs, priority=priority)
        for sequence in sequences:
            request.sequences.add(ids=sequence)
        response = self._call(self.inference.Score, request, timeout_s)
        return [
            Score(tuple(map(_token_logprobs, scores.tokens)), scores.logprob)
            for scores in response.sequences
        ]

    def tokenize(self, prompt: str | Iterable[Mapping[str, str]]) -> list[int]:
        """The token ids of a text as it is, or of chat messages in the model's template."""
        request = _inference_pb.TokenizeRequest()
        if isinstance(prompt, str):
            request.text = prompt
        else:
            _add_messages(request.chat, prompt)
        return list(self._call(self.inference.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        request = _inference_pb.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return self._call(self.inference.Detokenize, request).text

    def model(self) -> _inference_pb.GetModelResponse:
        """What is served, and its limits."""
        return self._call(self.inference.GetModel, _inference_pb.GetModelRequest())

    def cluster(self) -> _control_pb.Cluster:
        """The state of the cluster and of every rank, now."""
        return self._call(self.control.GetCluster, _control_pb.GetClusterRequest()).cluster

    def watch(self, *, interval_s: float = 0.0) -> Generator[_control_pb.Cluster, None, None]:
        """The cluster now, whenever it changes, and every `interval_s` seconds."""
        call = self.control.WatchCluster(_control_pb.WatchClusterRequest(interval_s=interval_s))
        try:
            for response in call:
                yield response.cluster
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def run_layer(
        self,
        *,
        layer: int | None = None,
        module: str = "",
        activation: "np.ndarray | None" = None,
        num_tokens: int = 4,
        seed: int = 0,
    ) -> _control_pb.RunLayerResponse:
        """Runs one module, or a whole layer, piece by piece; `activation` is noise when not given."""
        request = _control_pb.RunLayerRequest(module=module, num_tokens=num_tokens, seed=seed)
        if layer is not None:
            request.layer = layer
        if activation is not None:
            import numpy as np

            integers = activation.dtype.kind == "i"
            data = np.ascontiguousarray(activation, dtype="<i8" if integers else "<f4")
            request.activation.CopyFrom(
                tensor_pb2.Tensor(
                    data_type=tensor_pb2.DATA_TYPE_INT64
                    if integers
                    else tensor_pb2.DATA_TYPE_FLOAT32,
                    shape=data.shape,
                    data=data.tobytes(),
                )
            )
        return self._call(self.control.RunLayer, request)

    def time_communication(
        self, num_steps: int, *, tokens_per_step: int = 1, timeout_s: float | None = None
    ) -> _control_pb.TimeCommunicationResponse:
        """Has the collectives of the next steps timed, and waits for it.

        `tokens_per_step` are those of requests that the coordinator makes where nothing else runs.
        """
        request = _control_pb.TimeCommunicationRequest(
            num_steps=num_steps, tokens_per_step=tokens_per_step
        )
        return self._call(self.control.TimeCommunication, request, timeout_s)

    def healthy(self, timeout_s: float, *, live: bool = False) -> bool:
        """What the standard health service says: whether the coordinator, or a worker, serves now.

        With `live`, whether it runs at all. Unavailable where nothing answers in time.
        """
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            request = health_pb2.HealthCheckRequest(service=LIVENESS if live else "")
            response = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            reason = error_of(error)
            raise Unavailable(f"{self.target} does not answer: {reason.message}") from error
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_serving(self, timeout_s: float) -> _control_pb.Cluster:
        """Waits for the cluster to serve. Unavailable when it failed, or did not in time."""
        last = "no answer"
        call = self.control.WatchCluster(
            _control_pb.WatchClusterRequest(), timeout=timeout_s, wait_for_ready=True
        )
        try:
            for response in call:
                cluster = response.cluster
                if cluster.state == _control_pb.CLUSTER_STATE_SERVING:
                    return cluster
                if cluster.state == _control_pb.CLUSTER_STATE_FAILED:
                    raise Unavailable(f"the cluster failed: {cluster.error}")
                last = _control_pb.ClusterState.Name(cluster.state)
        except grpc.RpcError as error:
            reason = error_of(error)
            raise Unavailable(f"{self.target} does not serve ({last}): {reason.message}") from error
        finally:
            call.cancel()
        raise Unavailable(f"{self.target} ended before it served ({last})")

    def _call(self, method: Any, request: Any, timeout_s: float | None = CONTROL_TIMEOUT_S) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error) from error


class AsyncColrow:
    """Like `Colrow`, for asyncio: many streams in one thread, at half the processor time of each.

    It connects when it is first used, and belongs to the event loop that runs then.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        tls: Path | str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.target = target
        self._metadata = key_metadata(api_key)
        self._channel = aio_channel(target, None if tls is None else read_user(Path(tls)))
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_service_pb2_grpc.ControlServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> AsyncGenerator[Piece, None]:
        """As `Colrow.generate`. Whoever leaves early closes the generator, and that cancels."""
        call = self._inference.Generate(
            _generate_request(prompt, settings), timeout=timeout_s, metadata=self._metadata
        )
        try:
            async for response in call:
                yield _piece(response)
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def cluster_as_known(self) -> _control_pb.Cluster:
        """The cluster as the coordinator knows it, without asking the workers.

        State, scheduler and steps are those of now; what workers hold and have communicated is what
        they said last. `Colrow.cluster` asks them, which costs a call to each.
        """
        call = self._control.WatchCluster(
            _control_pb.WatchClusterRequest(), timeout=CONTROL_TIMEOUT_S, metadata=self._metadata
        )
        try:
            async for response in call:
                return response.cluster
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()
        raise Unavailable(f"{self.target} ended the call without an answer")


def _generate_request(prompt: Prompt, settings: Settings) -> _inference_pb.GenerateRequest:
    request = _inference_pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        items: list[Any] = list(prompt)
        if items and isinstance(items[0], Mapping):
            _add_messages(request.chat, items)
        else:
            request.token_ids.ids.extend(items)
            request.token_ids.SetInParent()
    for name, value in settings.items():
        if name not in Settings.__annotations__:  # a type checker says so, but not everyone has one
            raise TypeError(f"generate() has no setting {name!r}")
        if value is None:
            continue
        if name == "stop" and isinstance(value, str):
            value = (value,)
        into: Any = request.sampling if name in _SAMPLING_FIELDS else request
        try:
            if name in ("stop", "stop_token_ids"):
                getattr(into, name).extend(value)
            elif name == "logit_bias":
                into.logit_bias.update(value)
            else:
                setattr(into, name, value)
        except (TypeError, ValueError) as error:  # protobuf does not say which field it is
            raise type(error)(f"{name} = {value!r}: {error}") from error
    return request


def _add_messages(chat: _inference_pb.Chat, messages: Iterable[Mapping[str, str]]) -> None:
    for message in messages:
        chat.messages.add(role=message["role"], content=message["content"])
    chat.SetInParent()


def _piece(response: _inference_pb.GenerateResponse) -> Piece:
    reason = response.WhichOneof("stop_reason")
    return Piece(
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=FINISH_REASONS[response.finish_reason],
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        cached_prompt_tokens=response.usage.cached_prompt_tokens,
        index=response.index,
        logprobs=tuple(map(_token_logprobs, response.logprobs)),
        prompt_logprobs=tuple(map(_token_logprobs, response.prompt_logprobs)),
        stop_reason=getattr(response, reason) if reason else None,
        request_id=response.request_id,
    )


def _token_logprobs(message: sampling_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)),
    )


def array(message: tensor_pb2.Tensor) -> "np.ndarray":
    """A tensor message as an array."""
    import numpy as np

    kind = "<i8" if message.data_type == tensor_pb2.DATA_TYPE_INT64 else "<f4"
    return np.frombuffer(message.data, dtype=kind).reshape(tuple(message.shape))


__all__ = [
    "AsyncColrow",
    "Colrow",
    "Piece",
    "Prompt",
    "Score",
    "ServiceError",
    "Settings",
    "TokenLogprobs",
    "array",
]
