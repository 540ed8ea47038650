"""`InferenceService` and `ControlService`: thin edges over the cluster and its engine."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc

from colrow.errors import InvalidArgument, NotFound, shown
from colrow.rpc import MAX_TENSOR_BYTES, Server
from colrow.rpc_access import AuthorizeInterceptor
from colrow.tls import Tls
from colrow.v1 import (
    control_service_pb2,
    control_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from coordinator import prompts, run_layer, time_communication, tracing
from coordinator.access import Access
from coordinator.cluster import Cluster
from coordinator.convert import operators, plans, tensors, users
from coordinator.cost_model import predicted_step
from coordinator.families import model_spec
from coordinator.model_folder import parse_config
from coordinator.request import Request, checked_id
from coordinator.shard_plan import make_plan

_inference_pb = inference_service_pb2
_control_pb = control_service_pb2

SERVICES = (
    _inference_pb.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    _control_pb.DESCRIPTOR.services_by_name["ControlService"].full_name,
)

MAX_SCORED = 2048  # sequences of one call
MAX_PLANNED_TP_SIZE = 1024
MAX_PLANNED_SLICES = 2_000_000  # parameters times ranks: seconds of planning
MAX_CONFIG_CHARACTERS = 2**20
MIN_WATCH_INTERVAL_S = 0.05


def _check_count(request: _inference_pb.ScoreRequest) -> None:
    """InvalidArgument where there are none or too many sequences to be looked at."""
    if not request.sequences:
        raise InvalidArgument("sequences", [], "is empty")
    if len(request.sequences) > MAX_SCORED:
        raise InvalidArgument(
            "sequences", f"{len(request.sequences)} sequences", f"are more than {MAX_SCORED}"
        )


def _trace(context: grpc.aio.ServicerContext) -> dict[str, str]:
    metadata = dict(context.invocation_metadata() or ())
    return {name: str(metadata[name]) for name in tracing.HEADERS if name in metadata}


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def _check_model(self, model: str) -> None:
        served = self._cluster.config.served_model_name
        if model and model != served:
            raise NotFound(
                f"model = {shown(model)}: served is {served!r}",
                reason="UNKNOWN_MODEL",
                metadata={"field": "model", "value": model, "served": served},
            )

    def _check_context(self, tokens: _inference_pb.TokenIds) -> None:
        """The engine would say so too, but only once all of them are Python's: there may be millions."""
        if len(tokens.ids) > (context := self._cluster.context_length):
            raise InvalidArgument(
                "prompt", f"{len(tokens.ids)} tokens", f"the context holds {context}"
            )

    async def Generate(
        self, request: _inference_pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[_inference_pb.GenerateResponse]:
        self._check_model(request.model)
        request_id = checked_id(request.request_id or uuid.uuid4().hex, "request_id")
        trace = _trace(context)
        tokenizer = self._cluster.model.tokenizer
        with self._cluster.call() as engine:
            self._check_context(request.token_ids)
            text = users.text(request)

            def asked_for() -> Request:
                ids = users.token_ids(request) if text is None else prompts.encode(text, tokenizer)
                return users.generate_request(request, ids, request_id, trace)

            asked = await prompts.aside(text or "", tokenizer, asked_for)
            outputs = engine.generate(asked)
            try:
                async for output in outputs:
                    yield users.generate_response(request_id, output)
            finally:
                await outputs.aclose()

    async def Score(
        self, request: _inference_pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> _inference_pb.ScoreResponse:
        self._check_model(request.model)
        with self._cluster.call() as engine:
            _check_count(request)
            for sequence in request.sequences:
                self._check_context(sequence)
            requests = users.score_requests(request, uuid.uuid4().hex, _trace(context))
            for one in requests:
                engine.check(one)
                await asyncio.sleep(0)  # which takes a while where there are many
            # Not all at once: a batch should not fill the queue and turn others away.
            turns = asyncio.Semaphore(self._cluster.config.max_running)

            async def score(one: Request) -> _inference_pb.TokenScores:
                async with turns:
                    async for output in engine.generate(one):
                        return users.token_scores(output.prompt_logprobs)
                raise AssertionError("a request ends with an output")

            tasks = [asyncio.create_task(score(one)) for one in requests]
            try:
                return _inference_pb.ScoreResponse(sequences=await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def Tokenize(
        self, request: _inference_pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> _inference_pb.TokenizeResponse:
        self._check_model(request.model)
        tokenizer = prompts.need(self._cluster.model.tokenizer)
        text = users.text(request)
        if text is None:
            raise InvalidArgument("input", None, "set text or chat")

        def tokenize() -> _inference_pb.TokenizeResponse:
            ids = prompts.encode(text, tokenizer)
            return _inference_pb.TokenizeResponse(
                token_ids=ids,
                tokens=[tokenizer.decode([token], skip_special_tokens=False) for token in ids],
            )

        return await prompts.aside(text, tokenizer, tokenize)

    async def Detokenize(
        self, request: _inference_pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> _inference_pb.DetokenizeResponse:
        self._check_model(request.model)
        tokenizer = prompts.need(self._cluster.model.tokenizer)
        tokenizer.check_length("token_ids", len(request.token_ids), "tokens")
        vocab_size = self._cluster.model.spec.vocab_size
        for token in request.token_ids:
            if token >= vocab_size:
                raise InvalidArgument("token_ids", token, f"the vocabulary has {vocab_size} ids")
        skip = request.skip_special_tokens
        text = await tokenizer.aside(
            len(request.token_ids),
            lambda: tokenizer.decode(request.token_ids, skip_special_tokens=skip),
        )
        return _inference_pb.DetokenizeResponse(text=text)

    async def GetModel(
        self, request: _inference_pb.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> _inference_pb.GetModelResponse:
        self._check_model(request.model)
        return users.model_response(self._cluster)


class ControlServicer(control_service_pb2_grpc.ControlServiceServicer):
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def GetCluster(
        self, request: _control_pb.GetClusterRequest, context: grpc.aio.ServicerContext
    ) -> _control_pb.GetClusterResponse:
        await self._cluster.refresh()
        return _control_pb.GetClusterResponse(cluster=operators.cluster_message(self._cluster))

    async def WatchCluster(
        self, request: _control_pb.WatchClusterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[_control_pb.WatchClusterResponse]:
        interval_s = request.interval_s
        if interval_s and not MIN_WATCH_INTERVAL_S <= interval_s < float("inf"):
            raise InvalidArgument(
                "interval_s", interval_s, f"is neither 0 nor at least {MIN_WATCH_INTERVAL_S}"
            )
        async for _ in self._cluster.changes(interval_s or None):
            yield _control_pb.WatchClusterResponse(cluster=operators.cluster_message(self._cluster))

    async def PlanShards(
        self, request: _control_pb.PlanShardsRequest, context: grpc.aio.ServicerContext
    ) -> _control_pb.PlanShardsResponse:
        # A config may come from anybody, and a plan of a large model takes a while.
        return await asyncio.to_thread(self._plan, request)

    def _plan(self, request: _control_pb.PlanShardsRequest) -> _control_pb.PlanShardsResponse:
        spec = self._cluster.model.spec
        if len(request.config_json) > MAX_CONFIG_CHARACTERS:
            raise InvalidArgument(
                "config_json",
                f"{len(request.config_json)} characters",
                f"is longer than {MAX_CONFIG_CHARACTERS}",
            )
        if request.config_json:
            spec = model_spec(parse_config(request.config_json))
        tp_size = request.tp_size
        if not 1 <= tp_size <= MAX_PLANNED_TP_SIZE:
            raise InvalidArgument("tp_size", tp_size, f"is not in [1, {MAX_PLANNED_TP_SIZE}]")
        if tp_size * len(spec.parameters) > MAX_PLANNED_SLICES:
            raise InvalidArgument(
                "tp_size",
                tp_size,
                f"times {len(spec.parameters)} parameters is more than {MAX_PLANNED_SLICES}",
            )
        if len(request.memory_weights) > tp_size:
            raise InvalidArgument(
                "memory_weights", f"{len(request.memory_weights)} weights", f"tp_size is {tp_size}"
            )
        plan = make_plan(
            spec,
            tp_size,
            dtype=tensors.dtype(request.data_type),
            memory_weights=list(request.memory_weights) or None,
        )
        return _control_pb.PlanShardsResponse(
            plan=plans.plan_message(plan),
            prediction=operators.prediction_message(predicted_step(plan)),
        )

    async def RunLayer(
        self, request: _control_pb.RunLayerRequest, context: grpc.aio.ServicerContext
    ) -> _control_pb.RunLayerResponse:
        with self._cluster.call():  # Unavailable while the cluster does not serve
            activation = None
            if request.HasField("activation"):
                activation = tensors.array(request.activation, "activation")
            layer_run = await run_layer.run(
                self._cluster.model.spec,
                self._cluster.compute_partial,
                layer=request.layer if request.HasField("layer") else None,
                module=request.module,
                activation=activation,
                num_tokens=request.num_tokens or 4,
                seed=request.seed,
                max_bytes=MAX_TENSOR_BYTES,
            )
        return operators.layer_response(layer_run)

    async def TimeCommunication(
        self, request: _control_pb.TimeCommunicationRequest, context: grpc.aio.ServicerContext
    ) -> _control_pb.TimeCommunicationResponse:
        with self._cluster.call() as engine:
            return operators.times_response(
                await time_communication.run(
                    engine, request.num_steps, request.tokens_per_step or 1
                )
            )

    async def Drain(
        self, request: _control_pb.DrainRequest, context: grpc.aio.ServicerContext
    ) -> _control_pb.DrainResponse:
        await self._cluster.drain()
        return _control_pb.DrainResponse()


def build(
    cluster: Cluster,
    access: Access | None = None,
    *,
    tls: Tls | None = None,
    client_certificates: bool = False,
) -> Server:
    """A server with the coordinator's services, not started; open to everyone without `access`."""
    server = Server(
        SERVICES,
        tls=tls,
        client_certificates=client_certificates,
        interceptors=[AuthorizeInterceptor(access.to_grpc)] if access else [],
    )
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(cluster), server.grpc_server
    )
    control_service_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlServicer(cluster), server.grpc_server
    )
    return server
