"""A small client over the stubs of `colrow.v1`, for those who need not see protobuf."""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np

from colrow.errors import ServiceError, Unavailable
from colrow.rpc import CHANNEL_OPTIONS, error_of
from colrow.v1 import (
    control_service_pb2,
    control_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    tensor_pb2,
)

_inference_pb = inference_service_pb2
_control_pb = control_service_pb2

T = TypeVar("T")

FINISH_REASONS = {
    _inference_pb.FINISH_REASON_UNSPECIFIED: None,
    _inference_pb.FINISH_REASON_STOP: "stop",
    _inference_pb.FINISH_REASON_LENGTH: "length",
}

CONTROL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that came, and its tokens. The last piece has a finish reason and the token counts."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


class Colrow:
    """A connection to a coordinator at `target` (host:port). Errors are `colrow.errors`."""

    def __init__(self, target: str = "localhost:50051") -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
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

    def generate(
        self,
        prompt: str | Iterable[int] | Iterable[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
    ) -> Generator[Piece, None, None]:
        """Streams the continuation of a text, of token ids, or of chat messages with role and content.

        Settings that are not given take the server's defaults. Leaving the iteration cancels.
        """
        request = _inference_pb.GenerateRequest()
        if isinstance(prompt, str):
            request.text = prompt
        else:
            items: list[Any] = list(prompt)
            if items and isinstance(items[0], Mapping):
                for message in items:
                    request.chat.messages.add(role=message["role"], content=message["content"])
            else:
                request.token_ids.ids.extend(items)
                request.token_ids.SetInParent()
        if max_tokens is not None:
            request.max_tokens = max_tokens
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        for name, value in settings.items():
            if value is not None:
                setattr(request.sampling, name, value)
        call = self.inference.Generate(request, timeout=timeout_s)
        try:
            for response in call:
                yield Piece(
                    text=response.text,
                    token_ids=tuple(response.token_ids),
                    finish_reason=FINISH_REASONS[response.finish_reason],
                    prompt_tokens=response.usage.prompt_tokens,
                    completion_tokens=response.usage.completion_tokens,
                )
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def tokenize(self, text: str) -> list[int]:
        request = _inference_pb.TokenizeRequest(text=text)
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
        activation: np.ndarray | None = None,
        num_tokens: int = 4,
        seed: int = 0,
    ) -> _control_pb.RunLayerResponse:
        """Runs one module, or a whole layer, piece by piece; `activation` is noise when not given."""
        request = _control_pb.RunLayerRequest(module=module, num_tokens=num_tokens, seed=seed)
        if layer is not None:
            request.layer = layer
        if activation is not None:
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

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=CONTROL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_of(error) from error


def array(message: tensor_pb2.Tensor) -> np.ndarray:
    """A tensor message as an array."""
    kind = "<i8" if message.data_type == tensor_pb2.DATA_TYPE_INT64 else "<f4"
    return np.frombuffer(message.data, dtype=kind).reshape(tuple(message.shape))


__all__ = ["Colrow", "Piece", "ServiceError", "array"]
