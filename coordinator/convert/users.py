"""For `InferenceService`: requests and what comes of them."""

from collections.abc import Iterable, Mapping, Sequence

from colrow.errors import InvalidArgument
from colrow.v1 import inference_service_pb2, sampling_pb2
from coordinator.cluster import Cluster
from coordinator.convert.tensors import DTYPE_VALUES
from coordinator.prompts import Text
from coordinator.request import Output, Request, SamplingRequest
from coordinator.sequence import FinishReason, TokenLogprobs
from coordinator.tokenizer import ChatMessage

_pb = inference_service_pb2

_FINISH_VALUES = {
    None: _pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: _pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: _pb.FINISH_REASON_LENGTH,
}


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


def text(message: _pb.GenerateRequest | _pb.TokenizeRequest) -> Text | None:
    """What is to be tokenized; None where it is no text."""
    if message.HasField("chat"):
        return tuple(ChatMessage(m.role, m.content) for m in message.chat.messages)
    return message.text if message.HasField("text") else None


def token_ids(message: _pb.GenerateRequest) -> list[int]:
    """Of a prompt that is no text. InvalidArgument where there is none."""
    if not message.HasField("token_ids"):
        raise InvalidArgument("prompt", None, "set text, token_ids or chat")
    return list(message.token_ids.ids)


def generate_request(
    message: _pb.GenerateRequest,
    prompt: Sequence[int],
    request_id: str,
    trace: Mapping[str, str],
) -> Request:
    """InvalidArgument naming the field that can't be so."""
    names = ("max_tokens", "n", "logprobs", "prompt_logprobs")
    return Request(
        request_id=request_id,
        prompt=tuple(prompt),
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


def score_requests(
    message: _pb.ScoreRequest, request_id: str, trace: Mapping[str, str]
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


def token_scores(logprobs: Sequence[TokenLogprobs]) -> _pb.TokenScores:
    return _pb.TokenScores(
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


def generate_response(request_id: str, output: Output) -> _pb.GenerateResponse:
    response = _pb.GenerateResponse(
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


def model_response(cluster: Cluster) -> _pb.GetModelResponse:
    spec, tokenizer = cluster.model.spec, cluster.model.tokenizer
    return _pb.GetModelResponse(
        model=cluster.config.served_model_name,
        family=spec.family,
        architecture=spec.architecture,
        data_type=DTYPE_VALUES[cluster.config.dtype or spec.dtype],
        context_length=cluster.context_length,
        vocab_size=spec.vocab_size,
        tp_size=cluster.group.size,
        eos_token_ids=spec.eos_token_ids,
        has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
        num_parameters=sum(parameter.numel for parameter in spec.parameters),
    )
