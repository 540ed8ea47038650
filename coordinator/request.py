"""What a user asks of the engine, checked as far as it can be without the state of the cluster."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from colrow.errors import InvalidArgument
from coordinator.sequence import FinishReason, Sampling, TokenLogprobs

MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_CONTINUATIONS = 128
MAX_LOGPROBS = 100
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 4096
MAX_REQUEST_ID_LENGTH = 128
MAX_SEED = 2**64 - 1

# Numbers go to the workers as float32. What would become 0 there, where 0 has no meaning, becomes the
# least normal number instead: of a top-p and of a penalty it means the same.
_LEAST_FLOAT32 = 2.0**-126

_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far from one another for any n


def _check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """InvalidArgument unless `value` is in [low, high], or in (low, high] when `above`."""
    if not (low < value if above else low <= value) or not value <= high:  # also refuses NaN
        raise InvalidArgument(name, value, f"is not in {'(' if above else '['}{low:g}, {high:g}]")


def checked_id(request_id: str, field: str) -> str:
    """It goes into headers and logs. InvalidArgument where it is not fit for them."""
    printable = request_id.isascii() and request_id.isprintable()
    if not printable or not 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH:
        raise InvalidArgument(
            field, request_id, f"does not have 1 to {MAX_REQUEST_ID_LENGTH} printable characters"
        )
    return request_id


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request is checked against."""

    vocab_size: int
    context_length: int
    """Tokens of prompt and completion together: the model's, or what the cache holds if less."""
    eos_token_ids: tuple[int, ...]
    cache_tokens: int
    """Tokens that the KV cache holds, of all sequences together."""


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Sampling as a client asks for it; `seed` None is drawn by the engine."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_range("sampling.temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_range("sampling.top_k", self.top_k, 0, 2**32 - 1)
        _check_range("sampling.top_p", self.top_p, 0, 1, above=True)
        _check_range("sampling.min_p", self.min_p, 0, 1)
        _check_range(
            "sampling.repetition_penalty",
            self.repetition_penalty,
            0,
            MAX_REPETITION_PENALTY,
            above=True,
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check_range(f"sampling.{name}", getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        for token, bias in self.logit_bias.items():
            _check_range(f"sampling.logit_bias[{token}]", bias, -MAX_BIAS, MAX_BIAS)
        if self.seed is not None:
            _check_range("sampling.seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be continued `n` times.

    `max_tokens` None is as many as there is room for; 0 only looks at the prompt. `logprobs` and
    `prompt_logprobs` say how many of the likeliest tokens to name; None wants no log-probabilities.
    `trace` are W3C trace context headers of the caller.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingRequest = field(default_factory=SamplingRequest)
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    show_special_tokens: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, MAX_CONTINUATIONS)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        _check_range("priority", self.priority, -(2**31), 2**31 - 1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidArgument("stop", len(self.stop), f"are more than {MAX_STOP_STRINGS} texts")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidArgument(
                "stop_token_ids", len(self.stop_token_ids), f"are more than {MAX_STOP_TOKENS}"
            )
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidArgument(
                    "stop", text, f"does not have 1 to {MAX_STOP_CHARACTERS} characters"
                )

    def check(self, limits: ModelLimits) -> int:
        """The number of tokens to generate; InvalidArgument where the model can't serve it."""
        if not self.prompt:
            raise InvalidArgument("prompt", "", "is empty")
        max_tokens = self._check_length(limits)  # before each token is looked at
        vocabulary = f"the vocabulary has {limits.vocab_size} ids"
        for name, tokens in (
            ("prompt.token_ids", self.prompt),
            ("stop_token_ids", self.stop_token_ids),
            ("sampling.logit_bias", self.sampling.logit_bias),
        ):
            for token in tokens:
                if not 0 <= token < limits.vocab_size:
                    raise InvalidArgument(name, token, vocabulary)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > limits.vocab_size:
                raise InvalidArgument(name, count, vocabulary)
        if not 0 <= self.min_tokens <= max_tokens:
            raise InvalidArgument("min_tokens", self.min_tokens, f"is not in [0, {max_tokens}]")
        return max_tokens

    def _check_length(self, limits: ModelLimits) -> int:
        context, length = limits.context_length, len(self.prompt)
        if self.max_tokens == 0 and self.prompt_logprobs is not None:
            if length > context:
                raise InvalidArgument("prompt", f"{length} tokens", f"the context holds {context}")
            return 0
        room = context - length
        if room < 1:
            raise InvalidArgument(
                "prompt",
                f"{length} tokens",
                f"the context holds {context} with at least one new token",
            )
        if self.max_tokens is None:
            return max(1, min(room, limits.cache_tokens // self.n - length))
        if not 1 <= self.max_tokens <= room:
            raise InvalidArgument(
                "max_tokens",
                self.max_tokens,
                f"is not in [1, {room}]: the context holds {context} tokens, the prompt has "
                f"{length}",
            )
        if self.n * self.max_tokens > limits.cache_tokens:
            raise InvalidArgument(
                "n",
                self.n,
                f"times max_tokens = {self.max_tokens} is more than the {limits.cache_tokens} "
                "tokens that the KV cache holds",
            )
        return self.max_tokens

    def stop_ids(self, limits: ModelLimits) -> frozenset[int]:
        """The tokens that end a continuation."""
        # A model may name an end that its vocabulary does not have: it never comes.
        eos = [token for token in limits.eos_token_ids if token < limits.vocab_size]
        return frozenset((*(() if self.ignore_eos else eos), *self.stop_token_ids))

    def samplings(self, limits: ModelLimits) -> list[Sampling]:
        """How each of the n continuations samples. Only the first looks at the prompt's tokens."""
        asked = self.sampling
        seed = random.getrandbits(64) if asked.seed is None else asked.seed
        return [
            Sampling(
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=max(asked.top_p, _LEAST_FLOAT32),
                min_p=asked.min_p,
                repetition_penalty=max(asked.repetition_penalty, _LEAST_FLOAT32),
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                logit_bias=tuple(asked.logit_bias.items()),
                seed=(seed + index * _SEED_STEP) % 2**64,
                min_tokens=self.min_tokens,
                suppressed=tuple(self.stop_ids(limits)) if self.min_tokens else (),
                logprobs=self.logprobs,
                prompt_logprobs=self.prompt_logprobs if index == 0 else None,
            )
            for index in range(self.n)
        ]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; `completion_tokens` are those of all its continuations."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """What came of one continuation since its last one. `finish_reason` is set on its last.

    `stop_reason` is the text or the token that the request named and that ended it, if one did.
    `prompt_logprobs` come with the first output of the first continuation, one for each token of the
    prompt but the first. `usage` is set on the last output of all.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(slots=True)
class RequestRecord:
    """What is told of a request that has ended. Times are in seconds of the monotonic clock.

    `outcome` is "stop" or "length" (of the continuation that ended last), "abort" where the client went
    away, or "error"; then `error` is its text and `error_type` its reason. Times that were not reached
    are NaN, and so is what follows from them.
    """

    request_id: str
    trace: Mapping[str, str]
    num_prompt_tokens: int
    n: int
    max_tokens: int
    arrived: float
    scheduled: float = math.nan
    first_token: float = math.nan
    last_token: float = math.nan
    ended: float = math.nan
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    outcome: str = "abort"
    error: str = ""
    error_type: str = ""

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_generated_tokens, self.num_cached_tokens)

    @property
    def queue_s(self) -> float:
        """Until the first step that computes some of it."""
        return self.scheduled - self.arrived

    @property
    def time_to_first_token_s(self) -> float:
        return self.first_token - self.arrived

    @property
    def prefill_s(self) -> float:
        return self.first_token - self.scheduled

    @property
    def decode_s(self) -> float:
        return self.last_token - self.first_token

    @property
    def time_per_token_s(self) -> float:
        """From one token of a continuation to the next, on average; NaN where none has two."""
        following = self.num_generated_tokens - self.n
        return self.decode_s * self.n / following if following > 0 else math.nan

    @property
    def total_s(self) -> float:
        return self.ended - self.arrived
