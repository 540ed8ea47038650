"""For `ShardWorkerService`: what workers are asked for, and what they answer."""

from pathlib import Path

from colrow.v1 import sampling_pb2, shard_worker_service_pb2
from coordinator.convert.plans import COMBINES, parameter_message, rank_messages
from coordinator.convert.tensors import DTYPE_VALUES, array
from coordinator.scheduler import (
    NewSequence,
    RankTimes,
    SequenceLogprobs,
    Step,
    StepOutput,
    TimedCollective,
)
from coordinator.sequence import TokenLogprobs
from coordinator.shard_group import Partial, StepAnswer
from coordinator.shard_plan import ShardPlan

_pb = shard_worker_service_pb2

_LOAD_FORMAT_VALUES = {
    "safetensors": _pb.LOAD_FORMAT_SAFETENSORS,
    "dummy": _pb.LOAD_FORMAT_DUMMY,
}


def load_request(
    epoch: int, folder: Path, config_json: str, plan: ShardPlan, load_format: str
) -> _pb.LoadShardRequest:
    return _pb.LoadShardRequest(
        epoch=epoch,
        model_path=str(folder),
        config_json=config_json,
        data_type=DTYPE_VALUES[plan.dtype],
        parameters=[parameter_message(parameter) for parameter in plan.spec.parameters],
        ranks=rank_messages(plan),
        ignored_keys=plan.spec.ignored,
        optional_prefix=plan.spec.optional_prefix,
        load_format=_LOAD_FORMAT_VALUES[load_format],
    )


def step_request(epoch: int, step: Step) -> _pb.ExecuteStepsRequest:
    return _pb.ExecuteStepsRequest(
        epoch=epoch,
        step_id=step.step_id,
        finished_sequence_ids=step.finished,
        new_sequences=[_new_sequence(new) for new in step.new_sequences],
        chunks=[
            _pb.ScheduledChunk(
                sequence_id=chunk.sequence.sequence_id,
                num_tokens=chunk.num_tokens,
                new_block_ids=chunk.new_block_ids,
            )
            for chunk in step.chunks
        ],
        times_collectives=step.times_collectives,
    )


def _new_sequence(new: NewSequence) -> _pb.NewSequence:
    sampling = new.sequence.sampling
    return _pb.NewSequence(
        sequence_id=new.sequence.sequence_id,
        token_ids=new.token_ids,
        num_prompt_tokens=len(new.sequence.prompt),
        sampling=_pb.StepSampling(
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


def step_answer(response: _pb.ExecuteStepsResponse) -> StepAnswer:
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


def partial(response: _pb.ComputePartialResponse) -> Partial:
    return Partial(
        rank=response.rank,
        output=array(response.output, "output"),
        combine=COMBINES[response.combine],
        columns=tuple((c.start, c.stop) for c in response.columns),
    )
