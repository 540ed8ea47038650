"""A worker behind its stub: the coordinator's edge towards `ShardWorkerService`."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np

from colrow.errors import FailedPrecondition, ServiceError, Unavailable
from colrow.memory import MemoryLedger
from colrow.rpc import aio_channel, error_of
from colrow.tls import Tls, explain
from colrow.v1 import shard_worker_service_pb2, shard_worker_service_pb2_grpc
from coordinator.convert import descriptions, tensors, workers
from coordinator.scheduler import Step
from coordinator.shard_group import Joined, Partial, StepAnswer
from coordinator.shard_plan import ShardPlan
from coordinator.worker_status import (
    STREAM_ENDED,
    UNREACHABLE,
    Link,
    LoadProgress,
    WorkerDescription,
)

_pb = shard_worker_service_pb2

T = TypeVar("T")

SERVICE = _pb.DESCRIPTOR.services_by_name["ShardWorkerService"].full_name
CALL_TIMEOUT_S = 60.0
WHY_TIMEOUT_S = 0.5


def _error_of(error: grpc.aio.AioRpcError) -> ServiceError:
    """The error of a call; of one that no worker answered, gRPC says only what became of a socket."""
    made = error_of(error)
    if (made.code, made.reason) == (Unavailable.code, Unavailable.reason):
        made.message = f"the connection to it is lost ({made.message})"
        made.args = (made.message,)
    return made


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _error_of(error) from error


class WorkerClient:
    """Implements `shard_group.Worker` over one channel."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        self.address = address
        self._encrypted = tls is not None
        self._channel = aio_channel(address, tls)
        self._stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(self._channel)
        # The stub's own would turn a message into bytes for each worker again.
        self._execute_steps: Any = self._channel.stream_stream(
            f"/{SERVICE}/ExecuteSteps", response_deserializer=_pb.ExecuteStepsResponse.FromString
        )
        self._steps: Any = None

    async def describe(self, timeout_s: float) -> WorkerDescription:
        """Waits up to `timeout_s` for a worker that is not up yet."""
        call = self._stub.Describe(_pb.DescribeRequest(), timeout=timeout_s, wait_for_ready=True)
        try:
            return descriptions.worker_description((await _answer(call)).worker)
        except ServiceError as error:
            if error.code != "DEADLINE_EXCEEDED":
                raise
            why = await self._why_unreachable()
            raise Unavailable(
                f"does not answer within {timeout_s:g} s{why}", reason=UNREACHABLE
            ) from error

    async def _why_unreachable(self) -> str:
        """A call that waits does not tell what it waited for; one that does not wait does."""
        try:
            await self._stub.Describe(_pb.DescribeRequest(), timeout=WHY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            why = explain(error.details() or "", encrypted=self._encrypted)
            return f": {why}" if why else ""
        return ""

    async def join(
        self,
        *,
        epoch: int,
        rank: int,
        size: int,
        transport: str,
        communicator_id: bytes,
        timeout_s: float,
    ) -> Joined:
        request = _pb.JoinGroupRequest(
            epoch=epoch,
            rank=rank,
            size=size,
            transport=descriptions.transport_value(transport),
            communicator_id=communicator_id,
            timeout_s=timeout_s,
        )
        response = await _answer(self._stub.JoinGroup(request, timeout=timeout_s + 5))
        return Joined(response.communicator_id, response.peer_memory)

    async def connect_peers(
        self, *, epoch: int, peer_memories: Sequence[bytes], timeout_s: float
    ) -> tuple[Link, ...]:
        request = _pb.ConnectPeersRequest(
            epoch=epoch, peer_memories=peer_memories, timeout_s=timeout_s
        )
        response = await _answer(self._stub.ConnectPeers(request, timeout=timeout_s + 5))
        return descriptions.links(response.links)

    async def load(
        self,
        *,
        epoch: int,
        folder: Path,
        config_json: str,
        plan: ShardPlan,
        load_format: str,
        progress: Callable[[LoadProgress], None],
    ) -> int:
        request = workers.load_request(epoch, folder, config_json, plan, load_format)
        response = None
        try:
            async for response in self._stub.LoadShard(request):
                progress(LoadProgress(response.bytes_read, response.bytes_to_read))
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from error
        if response is None:
            raise Unavailable("LoadShard ended without an answer")
        return response.weight_bytes

    async def allocate(
        self,
        *,
        epoch: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        planned: MemoryLedger,
    ) -> int:
        request = _pb.AllocateKvCacheRequest(
            epoch=epoch,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            graph_bytes=planned.graphs.planned,
            workspace_bytes=planned.workspace.planned,
        )
        response = await _answer(self._stub.AllocateKvCache(request, timeout=CALL_TIMEOUT_S))
        return response.kv_cache_bytes

    async def compute_partial(
        self, *, epoch: int, module: str, activation: np.ndarray, max_output_bytes: int
    ) -> Partial:
        request = _pb.ComputePartialRequest(
            epoch=epoch,
            module=module,
            activation=tensors.tensor_message(activation),
            max_output_bytes=max_output_bytes,
        )
        return workers.partial(
            await _answer(self._stub.ComputePartial(request, timeout=CALL_TIMEOUT_S))
        )

    async def abort(self, *, epoch: int, timeout_s: float) -> None:
        if self._steps is not None:
            self._steps.cancel()
            self._steps = None
        call = self._stub.AbortGroup(_pb.AbortGroupRequest(epoch=epoch), timeout=timeout_s)
        try:
            await _answer(call)
        except ServiceError as error:
            if error.code != "DEADLINE_EXCEEDED":
                raise
            raise Unavailable(
                f"does not leave the group within {timeout_s:g} s", reason=UNREACHABLE
            ) from error

    def open_steps(self) -> None:
        """Opens the stream that carries the steps of one epoch."""
        self._steps = self._execute_steps()

    def encode(self, epoch: int, step: Step) -> bytes:
        return workers.step_request(epoch, step).SerializeToString()

    async def send(self, message: bytes) -> None:
        try:
            await self._open_stream().write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._stream_error() from error

    async def receive(self) -> StepAnswer:
        """The answer to the oldest step that was not received."""
        try:
            response = await self._open_stream().read()
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from error
        if response is grpc.aio.EOF:
            raise await self._stream_error()
        return workers.step_answer(response)

    def _open_stream(self) -> Any:
        if self._steps is None:
            raise FailedPrecondition("no step stream is open")
        return self._steps

    async def _stream_error(self) -> ServiceError:
        """Why the stream ended: a write into a closed one does not say."""
        try:
            await self._steps.read()
        except grpc.aio.AioRpcError as error:
            return _error_of(error)
        except asyncio.InvalidStateError:
            pass
        return Unavailable("the step stream ended", reason=STREAM_ENDED)

    async def close(self) -> None:
        if self._steps is not None:
            self._steps.cancel()
        await self._channel.close()
