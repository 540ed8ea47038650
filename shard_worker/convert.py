"""Between the contract's messages and the worker's own types; protobuf stops here."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from colrow import __version__
from colrow.errors import InvalidArgument
from colrow.memory import GraphSizes, MemoryLedger, StepSize
from colrow.v1 import sampling_pb2, shard_plan_pb2, shard_worker_service_pb2, tensor_pb2
from shard_worker import models
from shard_worker.checkpoint import LoadProgress
from shard_worker.communicator import Link
from shard_worker.executor import Description, State
from shard_worker.joining import Group
from shard_worker.model_runner import Chunk, NewSequence, SequenceLogprobs, Step, StepResult
from shard_worker.partial import Partial
from shard_worker.sampling import Sampling
from shard_worker.shard import LoadRequest
from shard_worker.sharding import Parameter, Section

_pb = shard_worker_service_pb2

_DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_INT64: torch.int64,
}
_AXES = {
    shard_plan_pb2.AXIS_Q_HEADS: "q_heads",
    shard_plan_pb2.AXIS_KV_HEADS: "kv_heads",
    shard_plan_pb2.AXIS_MLP: "mlp",
    shard_plan_pb2.AXIS_VOCAB: "vocab",
}
_COMBINES = {
    shard_plan_pb2.COMBINE_CONCAT: "concat",
    shard_plan_pb2.COMBINE_SUM: "sum",
    shard_plan_pb2.COMBINE_REPLICATE: "replicate",
}
_COMBINE_VALUES = {name: value for value, name in _COMBINES.items()}
_TRANSPORTS = {
    _pb.TRANSPORT_SINGLE: "single",
    _pb.TRANSPORT_SHARED_MEMORY: "shm",
    _pb.TRANSPORT_GLOO: "gloo",
    _pb.TRANSPORT_NCCL: "nccl",
    _pb.TRANSPORT_PEER: "peer",
}
_TRANSPORT_VALUES = {name: value for value, name in _TRANSPORTS.items()}
_STATES = {
    State.IDLE: _pb.WORKER_STATE_IDLE,
    State.JOINED: _pb.WORKER_STATE_JOINED,
    State.LOADING: _pb.WORKER_STATE_LOADING,
    State.LOADED: _pb.WORKER_STATE_LOADED,
    State.READY: _pb.WORKER_STATE_READY,
}


def group(request: _pb.JoinGroupRequest) -> Group:
    if request.transport not in _TRANSPORTS:
        raise InvalidArgument("transport", request.transport, "is not known to this worker")
    return Group(request.epoch, request.rank, request.size, _TRANSPORTS[request.transport])


def load_request(request: _pb.LoadShardRequest) -> LoadRequest:
    try:
        config = json.loads(request.config_json)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("config_json", request.config_json, str(error)) from error
    if not isinstance(config, dict):
        raise InvalidArgument("config_json", request.config_json, "is no JSON object")
    if request.data_type not in _DTYPES or request.data_type == tensor_pb2.DATA_TYPE_INT64:
        raise InvalidArgument("data_type", request.data_type, "no model can be held in it")
    return LoadRequest(
        model_path=Path(request.model_path),
        config=config,
        dtype=_DTYPES[request.data_type],
        parameters=[_parameter(parameter) for parameter in request.parameters],
        ranks=[{_axis(r.axis): (r.start, r.stop) for r in rank.ranges} for rank in request.ranks],
        ignored_keys=list(request.ignored_keys),
        optional_prefix=request.optional_prefix,
        is_dummy=request.load_format == _pb.LOAD_FORMAT_DUMMY,
    )


def _axis(axis: shard_plan_pb2.Axis) -> str:
    if axis not in _AXES:
        raise InvalidArgument("axis", axis, "is not known to this worker")
    return _AXES[axis]


def _parameter(parameter: shard_plan_pb2.Parameter) -> Parameter:
    if parameter.combine not in _COMBINES:
        raise InvalidArgument("combine", parameter.combine, "is not known to this worker")
    return Parameter(
        name=parameter.name,
        shape=tuple(parameter.shape),
        split_dim=parameter.split_dim if parameter.HasField("split_dim") else None,
        sections=tuple(Section(_axis(s.axis), s.units, s.unit_size) for s in parameter.sections),
        combine=_COMBINES[parameter.combine],
    )


def load_progress(progress: LoadProgress) -> _pb.LoadShardResponse:
    return _pb.LoadShardResponse(
        bytes_read=progress.bytes_read,
        bytes_to_read=progress.bytes_to_read,
        parameters_loaded=progress.parameters_loaded,
        parameters_total=progress.parameters_total,
    )


def planned_memory(request: _pb.AllocateKvCacheRequest) -> dict[str, int]:
    """What is planned beside the cache, by the names of the request; without what is not known."""
    names = ("graph_bytes", "workspace_bytes")
    return {name: getattr(request, name) for name in names if request.HasField(name)}


def step(request: _pb.ExecuteStepsRequest) -> Step:
    return Step(
        step_id=request.step_id,
        finished=tuple(request.finished_sequence_ids),
        new_sequences=tuple(
            NewSequence(
                sequence_id=new.sequence_id,
                token_ids=tuple(new.token_ids),
                num_prompt_tokens=new.num_prompt_tokens,
                sampling=_sampling(new.sampling),
                cached_block_ids=tuple(new.cached_block_ids),
            )
            for new in request.new_sequences
        ),
        chunks=tuple(
            Chunk(chunk.sequence_id, chunk.num_tokens, tuple(chunk.new_block_ids))
            for chunk in request.chunks
        ),
        times_collectives=request.times_collectives,
    )


def _sampling(sampling: _pb.StepSampling) -> Sampling:
    return Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=(
            sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None
        ),
    )


def step_response(epoch: int, result: StepResult) -> _pb.ExecuteStepsResponse:
    return _pb.ExecuteStepsResponse(
        epoch=epoch,
        step_id=result.step_id,
        sequence_ids=result.sequence_ids,
        token_ids=result.token_ids,
        duration_us=result.duration_us,
        logprobs=[_sequence_logprobs(sequence) for sequence in result.logprobs],
        collectives=[
            _pb.TimedCollective(
                operation=timed.stats.operation,
                module=timed.stats.module,
                path=timed.stats.path,
                payload_bytes=timed.payload_bytes,
                duration_ns=timed.duration_ns,
            )
            for timed in result.collectives
        ],
    )


def _sequence_logprobs(sequence: SequenceLogprobs) -> _pb.SequenceLogprobs:
    return _pb.SequenceLogprobs(
        sequence_id=sequence.sequence_id,
        start=sequence.start,
        tokens=[
            sampling_pb2.TokenLogprobs(
                token_id=token.token_id,
                logprob=token.logprob,
                rank=token.rank,
                top_token_ids=token.top_token_ids,
                top_logprobs=token.top_logprobs,
            )
            for token in sequence.tokens
        ],
    )


def tensor(message: tensor_pb2.Tensor, field: str) -> Tensor:
    """The tensor of a message; InvalidArgument where its bytes don't fit its shape."""
    if message.data_type not in _DTYPES:
        raise InvalidArgument(f"{field}.data_type", message.data_type, "is not known")
    dtype = _DTYPES[message.data_type]
    shape = tuple(message.shape)
    expected = dtype.itemsize
    for extent in shape:
        expected *= extent
    if len(message.data) != expected or expected == 0:
        raise InvalidArgument(
            f"{field}.data", len(message.data), f"shape {shape} of {dtype} takes {expected} bytes"
        )
    return torch.frombuffer(bytearray(message.data), dtype=dtype).view(shape)


def partial_response(partial: Partial, rank: int) -> _pb.ComputePartialResponse:
    output = partial.output.float().contiguous()
    return _pb.ComputePartialResponse(
        output=tensor_pb2.Tensor(
            data_type=tensor_pb2.DATA_TYPE_FLOAT32,
            shape=list(output.shape),
            data=output.numpy().tobytes(),
        ),
        combine=_COMBINE_VALUES[partial.combine],
        columns=[_pb.ColumnRange(start=start, stop=stop) for start, stop in partial.columns],
        rank=rank,
    )


def description(worker: Description) -> _pb.WorkerDescription:
    group = worker.group
    return _pb.WorkerDescription(
        version=__version__,
        host_id=worker.host_id,
        pid=worker.pid,
        device=worker.device,
        memory_total_bytes=worker.memory_total,
        memory_available_bytes=worker.memory_available,
        state=_STATES[worker.state],
        epoch=worker.epoch,
        rank=group.rank if group else 0,
        size=group.size if group else 0,
        transport=_TRANSPORT_VALUES[group.transport] if group else _pb.TRANSPORT_UNSPECIFIED,
        weight_bytes=worker.weight_bytes,
        kv_cache_bytes=worker.kv_cache_bytes,
        resident_bytes=worker.resident_bytes,
        file_bytes_read=worker.file_bytes_read,
        communication=[
            _pb.CommunicationStats(
                operation=stats.operation,
                calls=stats.calls,
                payload_bytes=stats.payload_bytes,
                module=stats.module,
                path=stats.path,
                timed_calls=stats.timed_calls,
                timed_bytes=stats.timed_bytes,
                timed_us=stats.timed_ns // 1000,
            )
            for stats in worker.communication
        ],
        supported_architectures=sorted(models.FAMILIES),
        links=links(worker.links),
        memory=_memory(worker.memory, worker.graph_sizes),
        device_name=worker.device_name,
        device_uuid=worker.device_uuid,
    )


def _memory(ledger: MemoryLedger, sizes: GraphSizes) -> _pb.MemoryLedger:
    return _pb.MemoryLedger(
        **{
            name: _pb.MemoryUse(planned_bytes=use.planned, actual_bytes=use.actual)
            for name, use in ledger.entries()
        },
        graph_sizes=_pb.GraphSizes(
            decode=_step_sizes(sizes.decode),
            prefill=_step_sizes(sizes.prefill),
            draws=sizes.draws,
        ),
    )


def _step_sizes(sizes: Iterable[StepSize]) -> list[_pb.StepSize]:
    return [_pb.StepSize(tokens=size.tokens, sequences=size.sequences) for size in sizes]


def links(links: Sequence[Link]) -> list[_pb.Link]:
    return [_pb.Link(rank=link.rank, path=link.path, note=link.note) for link in links]
