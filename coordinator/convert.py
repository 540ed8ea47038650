"""Between the contract's messages and the coordinator's own types; protobuf stops here."""

import time
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from colrow import __version__
from colrow.errors import FailedPrecondition, InvalidArgument
from colrow.memory import GraphSizes, MemoryLedger, MemoryUse, StepSize
from colrow.v1 import (
    control_service_pb2,
    inference_service_pb2,
    sampling_pb2,
    shard_plan_pb2,
    shard_worker_service_pb2,
    tensor_pb2,
)
from coordinator.cluster import Cluster, State
from coordinator.cost_model import H200_NVLINK, SHORT_CONTEXT, predicted_step
from coordinator.model_spec import Axis, Combine, ParameterSpec
from coordinator.request import Output, Request, SamplingRequest
from coordinator.run_layer import LayerRun, ModuleRun
from coordinator.scheduler import (
    NewSequence,
    RankTimes,
    SequenceLogprobs,
    Step,
    StepOutput,
    TimedCollective,
)
from coordinator.sequence import FinishReason, TokenLogprobs
from coordinator.shard_group import Partial, StepAnswer
from coordinator.shard_plan import ShardPlan
from coordinator.step_times import StepTimes
from coordinator.tokenizer import ChatMessage, Tokenizer, chat_length
from coordinator.worker_status import Link, OpStats, Phase, WorkerDescription, WorkerStatus

_worker_pb = shard_worker_service_pb2
_control_pb = control_service_pb2
_inference_pb = inference_service_pb2

MAX_SCORED = 2048

K = TypeVar("K")
V = TypeVar("V")


def _inverse(values: dict[K, V]) -> dict[V, K]:
    return {value: key for key, value in values.items()}


_DTYPE_VALUES = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": tensor_pb2.DATA_TYPE_BFLOAT16,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
}
_DTYPES = _inverse(_DTYPE_VALUES)
_ARRAY_TYPES: dict[tensor_pb2.DataType, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
_AXIS_VALUES = {
    Axis.Q_HEADS: shard_plan_pb2.AXIS_Q_HEADS,
    Axis.KV_HEADS: shard_plan_pb2.AXIS_KV_HEADS,
    Axis.MLP: shard_plan_pb2.AXIS_MLP,
    Axis.VOCAB: shard_plan_pb2.AXIS_VOCAB,
}
_COMBINE_VALUES = {
    Combine.CONCAT: shard_plan_pb2.COMBINE_CONCAT,
    Combine.SUM: shard_plan_pb2.COMBINE_SUM,
    Combine.REPLICATE: shard_plan_pb2.COMBINE_REPLICATE,
}
_COMBINES = _inverse(_COMBINE_VALUES)
_TRANSPORT_VALUES = {
    "single": _worker_pb.TRANSPORT_SINGLE,
    "shm": _worker_pb.TRANSPORT_SHARED_MEMORY,
    "gloo": _worker_pb.TRANSPORT_GLOO,
    "nccl": _worker_pb.TRANSPORT_NCCL,
    "peer": _worker_pb.TRANSPORT_PEER,
}
_LOAD_FORMAT_VALUES = {
    "safetensors": _worker_pb.LOAD_FORMAT_SAFETENSORS,
    "dummy": _worker_pb.LOAD_FORMAT_DUMMY,
}
_TRANSPORTS = _inverse(_TRANSPORT_VALUES)
_WORKER_STATE_VALUES = {
    "idle": _worker_pb.WORKER_STATE_IDLE,
    "joined": _worker_pb.WORKER_STATE_JOINED,
    "loading": _worker_pb.WORKER_STATE_LOADING,
    "loaded": _worker_pb.WORKER_STATE_LOADED,
    "ready": _worker_pb.WORKER_STATE_READY,
}
_WORKER_STATES = _inverse(_WORKER_STATE_VALUES)
_PHASE_VALUES = {
    Phase.CONNECTING: _control_pb.WORKER_PHASE_CONNECTING,
    Phase.WAITING: _control_pb.WORKER_PHASE_WAITING,
    Phase.JOINING: _control_pb.WORKER_PHASE_JOINING,
    Phase.LOADING: _control_pb.WORKER_PHASE_LOADING,
    Phase.ALLOCATING: _control_pb.WORKER_PHASE_ALLOCATING,
    Phase.SERVING: _control_pb.WORKER_PHASE_SERVING,
    Phase.LOST: _control_pb.WORKER_PHASE_LOST,
}
_STATE_VALUES = {
    State.CONNECTING: _control_pb.CLUSTER_STATE_CONNECTING,
    State.JOINING: _control_pb.CLUSTER_STATE_JOINING,
    State.LOADING: _control_pb.CLUSTER_STATE_LOADING,
    State.SERVING: _control_pb.CLUSTER_STATE_SERVING,
    State.RECOVERING: _control_pb.CLUSTER_STATE_RECOVERING,
    State.DRAINING: _control_pb.CLUSTER_STATE_DRAINING,
    State.FAILED: _control_pb.CLUSTER_STATE_FAILED,
    State.STOPPED: _control_pb.CLUSTER_STATE_STOPPED,
}
_FINISH_VALUES = {
    None: _inference_pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: _inference_pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: _inference_pb.FINISH_REASON_LENGTH,
}


# Users' side


def sampling(message: sampling_pb2.SamplingParams) -> SamplingRequest:
    """Unset fields take the defaults of `SamplingRequest`; those are the contract's."""
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    )
    return SamplingRequest(
        **{name: getattr(message, name) for name in names if message.HasField(name)},
        logit_bias=dict(message.logit_bias),
    )


def generate_request(
    message: _inference_pb.GenerateRequest,
    request_id: str,
    tokenizer: Tokenizer | None,
    trace: Mapping[str, str],
) -> Request:
    """InvalidArgument naming the field that can't be so."""
    names = ("max_tokens", "n", "logprobs", "prompt_logprobs")
    return Request(
        request_id=request_id,
        prompt=tuple(prompt(message, tokenizer)),
        sampling=sampling(message.sampling),
        **{name: getattr(message, name) for name in names if message.HasField(name)},
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop=message.include_stop,
        priority=message.priority,
        show_special_tokens=message.show_special_tokens,
        trace=trace,
    )


def check_count(message: _inference_pb.ScoreRequest) -> None:
    """InvalidArgument where there are none or too many sequences to be looked at."""
    if not message.sequences:
        raise InvalidArgument("sequences", [], "is empty")
    if len(message.sequences) > MAX_SCORED:
        raise InvalidArgument(
            "sequences", f"{len(message.sequences)} sequences", f"are more than {MAX_SCORED}"
        )


def score_requests(
    message: _inference_pb.ScoreRequest, request_id: str, trace: Mapping[str, str]
) -> list[Request]:
    """One request a sequence, which looks at its prompt only."""
    return [
        Request(
            request_id=f"{request_id}-{place}",
            prompt=tuple(sequence.ids),
            sampling=SamplingRequest(temperature=0),
            max_tokens=0,
            prompt_logprobs=message.top_logprobs,
            priority=message.priority,
            trace=trace,
        )
        for place, sequence in enumerate(message.sequences)
    ]


def token_scores(logprobs: Sequence[TokenLogprobs]) -> _inference_pb.TokenScores:
    return _inference_pb.TokenScores(
        tokens=_logprobs_messages(logprobs),
        logprob=sum(item.logprob for item in logprobs),
    )


def _logprobs_messages(items: Iterable[TokenLogprobs]) -> list[sampling_pb2.TokenLogprobs]:
    return [
        sampling_pb2.TokenLogprobs(
            token_id=item.token_id,
            logprob=item.logprob,
            rank=item.rank,
            top_token_ids=[token for token, _ in item.top],
            top_logprobs=[logprob for _, logprob in item.top],
        )
        for item in items
    ]


def prompt(request: _inference_pb.GenerateRequest, tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of a request's prompt."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return list(request.token_ids.ids)
    if kind == "text":
        return text_ids(request.text, tokenizer)
    if kind == "chat":
        return chat_ids(request.chat, tokenizer)
    raise InvalidArgument("prompt", None, "set text, token_ids or chat")


def text_length(text: str, chat: _inference_pb.Chat | None, tokenizer: Tokenizer | None) -> int:
    """Characters that are to be tokenized. InvalidArgument where they are too many."""
    length = chat_length(_messages(chat)) if chat is not None else len(text)
    if tokenizer is not None:
        tokenizer.check_length("text" if chat is None else "chat", length)
    return length


def _messages(chat: _inference_pb.Chat) -> list[ChatMessage]:
    return [ChatMessage(m.role, m.content) for m in chat.messages]


def text_ids(text: str, tokenizer: Tokenizer | None) -> list[int]:
    return need(tokenizer).encode(text)


def chat_ids(chat: _inference_pb.Chat, tokenizer: Tokenizer | None) -> list[int]:
    if not chat.messages:
        raise InvalidArgument("chat.messages", [], "is empty")
    return need(tokenizer).encode_chat(_messages(chat))


def need(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of the model; FailedPrecondition where it has none."""
    if tokenizer is None:
        raise FailedPrecondition(
            "the model has no tokenizer: it takes and gives token ids only", reason="NO_TOKENIZER"
        )
    return tokenizer


def generate_response(request_id: str, output: Output) -> _inference_pb.GenerateResponse:
    response = _inference_pb.GenerateResponse(
        request_id=request_id,
        text=output.text,
        token_ids=output.token_ids,
        finish_reason=_FINISH_VALUES[output.finish_reason],
        index=output.index,
    )
    if output.logprobs:
        response.logprobs.extend(_logprobs_messages(output.logprobs))
    if output.prompt_logprobs:
        response.prompt_logprobs.extend(_logprobs_messages(output.prompt_logprobs))
    if isinstance(output.stop_reason, str):
        response.stop_text = output.stop_reason
    elif output.stop_reason is not None:
        response.stop_token_id = output.stop_reason
    if output.usage is not None:
        response.usage.prompt_tokens = output.usage.prompt_tokens
        response.usage.completion_tokens = output.usage.completion_tokens
        response.usage.cached_prompt_tokens = output.usage.cached_prompt_tokens
    return response


def model_response(cluster: Cluster) -> _inference_pb.GetModelResponse:
    spec, tokenizer = cluster.model.spec, cluster.model.tokenizer
    return _inference_pb.GetModelResponse(
        model=cluster.config.served_model_name,
        family=spec.family,
        architecture=spec.architecture,
        data_type=_DTYPE_VALUES[cluster.config.dtype or spec.dtype],
        context_length=cluster.context_length,
        vocab_size=spec.vocab_size,
        tp_size=cluster.group.size,
        eos_token_ids=spec.eos_token_ids,
        has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
        num_parameters=sum(parameter.numel for parameter in spec.parameters),
    )


# Operators' side


def dtype(value: tensor_pb2.DataType) -> str | None:
    """The name of a model's data type; None where it is not set."""
    if value == tensor_pb2.DATA_TYPE_UNSPECIFIED:
        return None
    if value not in _DTYPES:
        raise InvalidArgument("data_type", value, f"is none of {', '.join(_DTYPE_VALUES)}")
    return _DTYPES[value]


def plan_message(plan: ShardPlan) -> shard_plan_pb2.ShardPlan:
    spec = plan.spec
    return shard_plan_pb2.ShardPlan(
        family=spec.family,
        architecture=spec.architecture,
        tp_size=plan.tp_size,
        data_type=_DTYPE_VALUES[plan.dtype],
        ranks=_rank_messages(plan),
        checkpoint_bytes=plan.checkpoint_bytes,
        replicated_bytes=plan.replicated_bytes,
        all_reduce_bytes_per_token=plan.all_reduce_bytes_per_token,
        all_reduce_bytes_per_token_per_layer=plan.all_reduce_bytes_per_token_per_layer,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
    )


def prediction_message(plan: ShardPlan) -> _control_pb.StepPrediction | None:
    """None where nothing can be predicted."""
    step = predicted_step(plan)
    if step is None:
        return None
    return _control_pb.StepPrediction(
        hardware=H200_NVLINK.name,
        context_tokens=SHORT_CONTEXT,
        step_s=step.seconds,
        communication_s=step.communication_s,
        num_all_reduces=step.num_all_reduces,
        all_reduce_s=step.all_reduce.seconds,
        all_reduce_algorithm=step.all_reduce.algorithm or "",
    )


def _rank_messages(plan: ShardPlan) -> list[shard_plan_pb2.RankShard]:
    return [
        shard_plan_pb2.RankShard(
            rank=shard.rank,
            ranges=[
                shard_plan_pb2.AxisRange(axis=_AXIS_VALUES[axis], start=r.start, stop=r.stop)
                for axis, r in shard.ranges.items()
            ],
            weight_bytes=shard.weight_bytes,
            kv_bytes_per_token=shard.kv_bytes_per_token,
        )
        for shard in plan.ranks
    ]


def _parameter_message(parameter: ParameterSpec) -> shard_plan_pb2.Parameter:
    return shard_plan_pb2.Parameter(
        name=parameter.name,
        shape=parameter.shape,
        split_dim=parameter.split_dim,
        sections=[
            shard_plan_pb2.Section(axis=_AXIS_VALUES[s.axis], units=s.units, unit_size=s.unit_size)
            for s in parameter.sections
        ],
        combine=_COMBINE_VALUES[parameter.combine],
    )


def cluster_message(cluster: Cluster) -> _control_pb.Cluster:
    now = time.monotonic()
    message = _control_pb.Cluster(
        state=_STATE_VALUES[cluster.state],
        error=cluster.error,
        epoch=cluster.group.epoch,
        model=cluster.config.served_model_name,
        version=__version__,
        transport=transport_value(cluster.group.transport),
        workers=[_status_message(status, now) for status in cluster.group.statuses],
        state_age_s=cluster.state_age_s,
        recoveries=cluster.num_recoveries,
        last_recovery_s=cluster.last_recovery_s,
    )
    if cluster.plan is not None:
        message.plan.CopyFrom(plan_message(cluster.plan))
    if cluster.scheduler is not None:
        scheduler, engine = cluster.scheduler, cluster.engine_or_none
        message.scheduler.CopyFrom(
            _control_pb.SchedulerStatus(
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                kv_blocks_total=scheduler.blocks.num_blocks,
                kv_blocks_used=scheduler.blocks.num_used,
                block_size=scheduler.blocks.block_size,
                steps=scheduler.num_steps,
                prompt_tokens=engine.num_prompt_tokens if engine else 0,
                generated_tokens=engine.num_generated_tokens if engine else 0,
                preemptions=scheduler.num_preemptions,
                prefix_queries=scheduler.num_prefix_queries,
                prefix_hits=scheduler.num_prefix_hits,
                kv_blocks_cached=scheduler.blocks.num_cached,
            )
        )
    return message


def _status_message(status: WorkerStatus, now: float) -> _control_pb.WorkerStatus:
    message = _control_pb.WorkerStatus(
        address=status.address,
        rank=status.rank,
        bytes_read=status.progress.bytes_read,
        bytes_to_read=status.progress.bytes_to_read,
        last_step_id=status.last_step_id,
        busy_us=status.busy_us,
        phase=_PHASE_VALUES[status.phase],
        phase_age_s=now - status.phase_since,
        heard_age_s=None if status.heard_at is None else now - status.heard_at,
        error=status.error,
        error_age_s=now - status.error_at if status.error else 0.0,
        losses=status.num_losses,
        restarts=status.num_restarts,
    )
    if status.description is not None:
        message.description.CopyFrom(_description_message(status.description))
    return message


# A worker's description has the same fields on both sides, but for these.
_PLAIN_FIELDS = (
    "version",
    "host_id",
    "pid",
    "device",
    "device_name",
    "device_uuid",
    "memory_total_bytes",
    "memory_available_bytes",
    "epoch",
    "rank",
    "size",
    "weight_bytes",
    "kv_cache_bytes",
    "resident_bytes",
    "file_bytes_read",
)
_STATS_FIELDS = tuple(_worker_pb.CommunicationStats.DESCRIPTOR.fields_by_name)


def worker_description(message: _worker_pb.WorkerDescription) -> WorkerDescription:
    return WorkerDescription(
        **{name: getattr(message, name) for name in _PLAIN_FIELDS},
        state=_WORKER_STATES.get(message.state, "unknown"),
        transport=_TRANSPORTS.get(message.transport),
        communication=tuple(
            OpStats(**{name: getattr(s, name) for name in _STATS_FIELDS})
            for s in message.communication
        ),
        supported_architectures=tuple(message.supported_architectures),
        links=links(message.links),
        memory=_ledger(message.memory),
        graph_sizes=GraphSizes(
            _step_sizes(message.memory.graph_sizes.decode),
            _step_sizes(message.memory.graph_sizes.prefill),
            message.memory.graph_sizes.draws,
        ),
    )


def _ledger(message: _worker_pb.MemoryLedger) -> MemoryLedger:
    uses = {name: getattr(message, name) for name, _ in MemoryLedger().entries()}
    return MemoryLedger(
        **{
            name: MemoryUse(
                use.planned_bytes if use.HasField("planned_bytes") else None,
                use.actual_bytes if use.HasField("actual_bytes") else None,
            )
            for name, use in uses.items()
        }
    )


def _step_sizes(messages: Iterable[_worker_pb.StepSize]) -> tuple[StepSize, ...]:
    return tuple(StepSize(message.tokens, message.sequences) for message in messages)


def links(messages: Iterable[_worker_pb.Link]) -> tuple[Link, ...]:
    return tuple(Link(link.rank, link.path, link.note) for link in messages)


def _description_message(worker: WorkerDescription) -> _worker_pb.WorkerDescription:
    return _worker_pb.WorkerDescription(
        **{name: getattr(worker, name) for name in _PLAIN_FIELDS},
        state=_WORKER_STATE_VALUES.get(worker.state, _worker_pb.WORKER_STATE_UNSPECIFIED),
        transport=transport_value(worker.transport),
        communication=[
            _worker_pb.CommunicationStats(**{name: getattr(s, name) for name in _STATS_FIELDS})
            for s in worker.communication
        ],
        supported_architectures=worker.supported_architectures,
        links=[
            _worker_pb.Link(rank=link.rank, path=link.path, note=link.note) for link in worker.links
        ],
        memory=_ledger_message(worker.memory, worker.graph_sizes),
    )


def _ledger_message(ledger: MemoryLedger, sizes: GraphSizes) -> _worker_pb.MemoryLedger:
    return _worker_pb.MemoryLedger(
        **{
            name: _worker_pb.MemoryUse(planned_bytes=use.planned, actual_bytes=use.actual)
            for name, use in ledger.entries()
        },
        graph_sizes=_worker_pb.GraphSizes(
            decode=_step_size_messages(sizes.decode),
            prefill=_step_size_messages(sizes.prefill),
            draws=sizes.draws,
        ),
    )


def _step_size_messages(sizes: Iterable[StepSize]) -> list[_worker_pb.StepSize]:
    return [_worker_pb.StepSize(tokens=size.tokens, sequences=size.sequences) for size in sizes]


def layer_response(layer_run: LayerRun) -> _control_pb.RunLayerResponse:
    return _control_pb.RunLayerResponse(
        runs=[_module_run(run) for run in layer_run.runs],
        output=tensor_message(layer_run.output),
    )


def _module_run(run: ModuleRun) -> _control_pb.ModuleRun:
    return _control_pb.ModuleRun(
        module=run.module,
        combine=_COMBINE_VALUES[run.combine],
        input=tensor_message(run.input),
        partials=[
            _control_pb.PartialOutput(
                rank=partial.rank,
                output=tensor_message(partial.output),
                columns=[_worker_pb.ColumnRange(start=a, stop=b) for a, b in partial.columns],
            )
            for partial in run.partials
        ],
        output=tensor_message(run.output),
    )


def times_response(times: StepTimes) -> _control_pb.TimeCommunicationResponse:
    return _control_pb.TimeCommunicationResponse(
        num_steps=times.num_steps,
        num_tokens=times.num_tokens,
        steps_us=times.steps_us,
        times=[
            _control_pb.CommunicationTime(
                module=time.module,
                operation=time.operation,
                path=time.path,
                calls=time.calls,
                payload_bytes=time.payload_bytes,
                own_us=time.own_ns / 1000,
                rank_us=[ns / 1000 for ns in time.rank_ns],
            )
            for time in times.communication
        ],
    )


# Workers' side


def transport_value(transport: str | None) -> _worker_pb.Transport:
    if transport is None:
        return _worker_pb.TRANSPORT_UNSPECIFIED
    return _TRANSPORT_VALUES[transport]


def load_request(
    epoch: int, folder: Path, config_json: str, plan: ShardPlan, load_format: str
) -> _worker_pb.LoadShardRequest:
    return _worker_pb.LoadShardRequest(
        epoch=epoch,
        model_path=str(folder),
        config_json=config_json,
        data_type=_DTYPE_VALUES[plan.dtype],
        parameters=[_parameter_message(parameter) for parameter in plan.spec.parameters],
        ranks=_rank_messages(plan),
        ignored_keys=plan.spec.ignored,
        optional_prefix=plan.spec.optional_prefix,
        load_format=_LOAD_FORMAT_VALUES[load_format],
    )


def step_request(epoch: int, step: Step) -> _worker_pb.ExecuteStepsRequest:
    return _worker_pb.ExecuteStepsRequest(
        epoch=epoch,
        step_id=step.step_id,
        finished_sequence_ids=step.finished,
        new_sequences=[_new_sequence(new) for new in step.new_sequences],
        chunks=[
            _worker_pb.ScheduledChunk(
                sequence_id=chunk.sequence.sequence_id,
                num_tokens=chunk.num_tokens,
                new_block_ids=chunk.new_block_ids,
            )
            for chunk in step.chunks
        ],
        times_collectives=step.times_collectives,
    )


def _new_sequence(new: NewSequence) -> _worker_pb.NewSequence:
    sampling = new.sequence.sampling
    return _worker_pb.NewSequence(
        sequence_id=new.sequence.sequence_id,
        token_ids=new.token_ids,
        num_prompt_tokens=len(new.sequence.prompt),
        sampling=_worker_pb.StepSampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias),
            seed=sampling.seed,
            min_tokens=sampling.min_tokens,
            stop_token_ids=sampling.suppressed,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
        ),
        cached_block_ids=new.cached_block_ids,
    )


def step_answer(response: _worker_pb.ExecuteStepsResponse) -> StepAnswer:
    return StepAnswer(
        response.step_id,
        StepOutput(
            tokens=dict(zip(response.sequence_ids, response.token_ids, strict=True)),
            logprobs=tuple(
                SequenceLogprobs(
                    item.sequence_id, item.start, tuple(_token_logprobs(t) for t in item.tokens)
                )
                for item in response.logprobs
            ),
        ),
        RankTimes(
            response.duration_us,
            tuple(
                TimedCollective(
                    timed.operation,
                    timed.module,
                    timed.path,
                    timed.payload_bytes,
                    timed.duration_ns,
                )
                for timed in response.collectives
            ),
        ),
    )


def _token_logprobs(message: sampling_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, message.rank, top)


def tensor_message(array: np.ndarray) -> tensor_pb2.Tensor:
    """A float array as float32, an integer one as int64."""
    kind = tensor_pb2.DATA_TYPE_INT64 if array.dtype.kind == "i" else tensor_pb2.DATA_TYPE_FLOAT32
    data = np.ascontiguousarray(array, dtype=_ARRAY_TYPES[kind])
    return tensor_pb2.Tensor(data_type=kind, shape=data.shape, data=data.tobytes())


def array(message: tensor_pb2.Tensor, field: str) -> np.ndarray:
    """The array of a message; InvalidArgument where its bytes don't fit its shape."""
    if message.data_type not in _ARRAY_TYPES:
        raise InvalidArgument(f"{field}.data_type", message.data_type, "send float32 or int64")
    kind = _ARRAY_TYPES[message.data_type]
    expected = prod(message.shape) * kind.itemsize
    if expected == 0 or len(message.data) != expected:
        raise InvalidArgument(
            f"{field}.data",
            f"{len(message.data)} bytes",
            f"shape {list(message.shape)} takes {expected}; it must not be empty",
        )
    return np.frombuffer(message.data, dtype=kind).reshape(tuple(message.shape))


def partial(response: _worker_pb.ComputePartialResponse) -> Partial:
    return Partial(
        rank=response.rank,
        output=array(response.output, "output"),
        combine=_COMBINES[response.combine],
        columns=tuple((c.start, c.stop) for c in response.columns),
    )
