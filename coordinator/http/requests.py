"""From requests of the HTTP API to the engine's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colrow.errors import InvalidArgument
from coordinator.http.schema import (
    ChatCompletionRequest,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)
from coordinator.http.schema import Message as AskedMessage
from coordinator.request import Request, SamplingRequest
from coordinator.tokenizer import ChatMessage, ChatOptions

DEFAULT_MAX_TOKENS = 16  # of completions; OpenAI's

ROLES = {"developer": "system"}
"""Newer names of roles, which templates know by their older ones."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is as it came, None where token ids did."""

    token_ids: tuple[int, ...]
    text: str | None = None


def sampling_request(asked: GenerationRequest) -> SamplingRequest:
    """Fields that are not set take the defaults of `SamplingRequest`, which are OpenAI's."""
    names = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    given = {name: value for name in names if (value := getattr(asked, name)) is not None}
    if asked.top_k is not None:
        given["top_k"] = 0 if asked.top_k == -1 else asked.top_k
    seed = asked.seed
    if seed is not None and -(2**63) <= seed < 0:
        seed += 2**64  # OpenAI's seeds have a sign
    return SamplingRequest(**given, logit_bias=asked.logit_bias, seed=seed)


def _request(
    asked: GenerationRequest,
    prompt: Prompt,
    request_id: str,
    trace: Mapping[str, str],
    **further: Any,
) -> Request:
    if asked.stream_options is not None and not asked.stream:
        raise InvalidArgument(
            "stream_options", asked.stream_options.model_dump(), "is only for stream = true"
        )
    if asked.stream and asked.prompt_logprobs is not None:
        raise InvalidArgument(
            "prompt_logprobs", asked.prompt_logprobs, "is not there with stream = true"
        )
    return Request(
        request_id=request_id,
        prompt=prompt.token_ids,
        sampling=sampling_request(asked),
        min_tokens=asked.min_tokens or 0,
        ignore_eos=bool(asked.ignore_eos),
        stop=tuple(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids),
        include_stop=bool(asked.include_stop_str_in_output),
        n=1 if asked.n is None else asked.n,
        priority=asked.priority or 0,
        show_special_tokens=asked.skip_special_tokens is False,
        trace=trace,
        **further,
    )


def completion_requests(
    asked: CompletionRequest,
    prompts: Sequence[Prompt],
    request_id: str,
    trace: Mapping[str, str],
    context_length: int,
) -> list[Request]:
    """One for each prompt."""
    n = 1 if asked.n is None else asked.n
    if asked.best_of is not None and asked.best_of != n:
        raise InvalidArgument("best_of", asked.best_of, f"only n = {n} is supported")
    prompt_logprobs = asked.prompt_logprobs
    if asked.echo:
        shown = asked.logprobs
        if asked.max_tokens == 0 and shown is None:
            shown = 0  # the engine looks at a prompt alone for its log-probabilities only
        if shown is not None:
            prompt_logprobs = max(shown, prompt_logprobs or 0)
    requests = []
    for place, prompt in enumerate(prompts):
        max_tokens = asked.max_tokens
        if max_tokens is None:
            # A default does not refuse a prompt that leaves room for less.
            max_tokens = max(1, min(DEFAULT_MAX_TOKENS, context_length - len(prompt.token_ids)))
        requests.append(
            _request(
                asked,
                prompt,
                request_id if len(prompts) == 1 else f"{request_id}-{place}",
                trace,
                max_tokens=max_tokens,
                logprobs=asked.logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        )
    return requests


def chat_request(
    asked: ChatCompletionRequest, prompt: Prompt, request_id: str, trace: Mapping[str, str]
) -> Request:
    max_tokens = asked.max_completion_tokens
    if max_tokens is None:
        max_tokens = asked.max_tokens
    elif asked.max_tokens not in (None, max_tokens):
        raise InvalidArgument(
            "max_completion_tokens", max_tokens, f"max_tokens says {asked.max_tokens}"
        )
    logprobs = None
    if asked.logprobs:
        logprobs = asked.top_logprobs or 0
    elif asked.top_logprobs:
        raise InvalidArgument("top_logprobs", asked.top_logprobs, "is only for logprobs = true")
    return _request(
        asked,
        prompt,
        request_id,
        trace,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=asked.prompt_logprobs,
    )


def chat_messages(messages: Sequence[AskedMessage]) -> list[ChatMessage]:
    return [ChatMessage(ROLES.get(m.role, m.role), m.content, m.name) for m in messages]


def chat_options(asked: ChatRequest | TokenizeRequest, *, add_special_tokens: bool) -> ChatOptions:
    if asked.continue_final_message and asked.add_generation_prompt:
        raise InvalidArgument(
            "add_generation_prompt", True, "can't be with continue_final_message = true"
        )
    return ChatOptions(
        add_generation_prompt=asked.add_generation_prompt is not False,
        continue_final_message=bool(asked.continue_final_message),
        add_special_tokens=add_special_tokens,
        variables=asked.chat_template_kwargs or {},
    )
