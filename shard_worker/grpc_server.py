"""`ShardWorkerService`: a thin edge over the executor."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from colrow.rpc import MAX_TENSOR_BYTES, Server
from colrow.rpc_access import PeerInterceptor
from colrow.tls import Tls
from colrow.v1 import shard_worker_service_pb2, shard_worker_service_pb2_grpc
from shard_worker import convert
from shard_worker.executor import Executor
from shard_worker.model_runner import StepResult

_pb = shard_worker_service_pb2

SERVICE = _pb.DESCRIPTOR.services_by_name["ShardWorkerService"].full_name


class ShardWorkerServicer(shard_worker_service_pb2_grpc.ShardWorkerServiceServicer):
    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def Describe(
        self, request: _pb.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> _pb.DescribeResponse:
        with self._executor.lease.call():
            return _pb.DescribeResponse(worker=convert.description(self._executor.describe()))

    async def JoinGroup(
        self, request: _pb.JoinGroupRequest, context: grpc.aio.ServicerContext
    ) -> _pb.JoinGroupResponse:
        group = convert.group(request)
        with self._executor.lease.call():
            if not request.communicator_id and group.transport != "single":
                communicator_id = await self._executor.create_communicator_id(group.transport)
                return _pb.JoinGroupResponse(communicator_id=communicator_id)
            peer_memory = await self._executor.join(
                group, request.communicator_id, request.timeout_s
            )
            return _pb.JoinGroupResponse(
                communicator_id=request.communicator_id, peer_memory=peer_memory
            )

    async def ConnectPeers(
        self, request: _pb.ConnectPeersRequest, context: grpc.aio.ServicerContext
    ) -> _pb.ConnectPeersResponse:
        with self._executor.lease.call():
            links = await self._executor.connect_peers(
                request.epoch, request.peer_memories, request.timeout_s
            )
        return _pb.ConnectPeersResponse(links=convert.links(links))

    async def LoadShard(
        self, request: _pb.LoadShardRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[_pb.LoadShardResponse]:
        updates: asyncio.Queue[_pb.LoadShardResponse | None] = asyncio.Queue()
        loading = asyncio.ensure_future(
            self._executor.load(
                request.epoch,
                convert.load_request(request),
                lambda progress: updates.put_nowait(convert.load_progress(progress)),
            )
        )

        def end(done: asyncio.Future[int]) -> None:
            if not done.cancelled():
                done.exception()  # is seen, also when the caller has gone
            updates.put_nowait(None)

        loading.add_done_callback(end)
        last = _pb.LoadShardResponse()
        with self._executor.lease.call():
            while (update := await updates.get()) is not None:
                last = update
                yield update
            last.weight_bytes = await loading
            yield last

    async def AllocateKvCache(
        self, request: _pb.AllocateKvCacheRequest, context: grpc.aio.ServicerContext
    ) -> _pb.AllocateKvCacheResponse:
        with self._executor.lease.call():
            num_bytes = await self._executor.allocate(
                request.epoch,
                request.num_blocks,
                request.block_size,
                request.max_model_len,
                **convert.planned_memory(request),
            )
        return _pb.AllocateKvCacheResponse(kv_cache_bytes=num_bytes)

    async def ExecuteSteps(
        self,
        request_iterator: AsyncIterator[_pb.ExecuteStepsRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[_pb.ExecuteStepsResponse]:
        # Requests are read and queued on the device while earlier steps still run.
        results: asyncio.Queue[tuple[int, asyncio.Future[StepResult]] | Exception | None] = (
            asyncio.Queue()
        )

        async def read() -> None:
            try:
                async for request in request_iterator:
                    step = self._executor.execute(request.epoch, convert.step(request))
                    # A stream that has ended asks for no results; none of them is a fault to report.
                    step.add_done_callback(lambda done: done.cancelled() or done.exception())
                    results.put_nowait((request.epoch, step))
            except Exception as error:
                results.put_nowait(error)
            else:
                results.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (item := await results.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                epoch, step = item
                yield convert.step_response(epoch, await step)
        finally:
            reader.cancel()

    async def ComputePartial(
        self, request: _pb.ComputePartialRequest, context: grpc.aio.ServicerContext
    ) -> _pb.ComputePartialResponse:
        limit = MAX_TENSOR_BYTES
        if request.HasField("max_output_bytes"):
            limit = min(limit, request.max_output_bytes)
        activation = convert.tensor(request.activation, "activation")
        rank, partial = await self._executor.compute_partial(
            request.epoch, request.module, activation, limit
        )
        return convert.partial_response(partial, rank)

    async def AbortGroup(
        self, request: _pb.AbortGroupRequest, context: grpc.aio.ServicerContext
    ) -> _pb.AbortGroupResponse:
        await self._executor.abort(request.epoch)
        return _pb.AbortGroupResponse()


def build(executor: Executor, tls: Tls | None = None, client: str = "") -> Server:
    """A server with the worker's service, not started; with `tls` only `client` may call it."""
    server = Server(
        [SERVICE],
        tls=tls,
        client_certificates=True,
        interceptors=[PeerInterceptor(client)] if tls else [],
    )
    shard_worker_service_pb2_grpc.add_ShardWorkerServiceServicer_to_server(
        ShardWorkerServicer(executor), server.grpc_server
    )
    return server
