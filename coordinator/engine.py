"""The step loop and the token streams.

The loop keeps `run_ahead` steps sent: while the workers compute one, the next is already with them,
so they never wait for the coordinator. What a step samples stays in the workers and feeds the next
one; the coordinator reads it a step later. A sequence that turns out to have ended costs at most
`run_ahead - 1` steps of its one token.
"""

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from colrow.errors import InvalidArgument, ServiceError, Unavailable
from coordinator.scheduler import Scheduler, Step
from coordinator.sequence import FinishReason, Sampling, Sequence
from coordinator.tokenizer import TextStream, Tokenizer

log = logging.getLogger(__name__)

MAX_TEMPERATURE = 100.0


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request is checked against."""

    vocab_size: int
    context_length: int
    """Tokens of prompt and completion together: the model's, or what the cache holds if less."""
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Sampling as a client asks for it; `seed` None is drawn by the engine."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:  # also refuses NaN
            raise InvalidArgument(
                "sampling.temperature", self.temperature, f"is not in [0, {MAX_TEMPERATURE:g}]"
            )
        if not 0 < self.top_p <= 1:
            raise InvalidArgument("sampling.top_p", self.top_p, "is not in (0, 1]")

    def resolve(self) -> Sampling:
        seed = random.getrandbits(64) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_k, self.top_p, seed)


@dataclass(frozen=True, slots=True)
class Output:
    """What came since the last one. `finish_reason` is set on the last."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


class Steps(Protocol):
    """Where steps are executed: the shard group."""

    async def send(self, step: Step) -> None:
        """Hands a step to every worker; does not wait for its result."""

    async def receive(self) -> dict[int, int]:
        """The tokens that the oldest unread step sampled, by sequence id."""


class _Stream:
    """Tokens on their way to one reader. A slow one finds them together; it holds up nobody."""

    def __init__(self, sequence: Sequence, text: TextStream | None) -> None:
        self.sequence = sequence
        self.text = text
        self.tokens: list[int] = []
        self.error: ServiceError | None = None
        self.ready = asyncio.Event()

    async def read(self) -> Output:
        await self.ready.wait()
        self.ready.clear()
        tokens, self.tokens = tuple(self.tokens), []
        if not tokens and self.error is not None:
            raise self.error
        text = ""
        if self.text:
            # A token that ends the sequence says so and nothing else.
            stopped = self.sequence.finish_reason is FinishReason.STOP
            shown = tokens[:-1] if stopped else tokens
            text = "".join(self.text.feed(token) for token in shown)
        if self.error is not None:
            self.ready.set()
        return Output(text, tokens, self.sequence.finish_reason)


class Engine:
    """Runs the schedule on the workers. `run` is the loop; `generate` is a request's view of it."""

    def __init__(
        self,
        steps: Steps,
        scheduler: Scheduler,
        limits: ModelLimits,
        tokenizer: Tokenizer | None,
        *,
        run_ahead: int = 2,
    ) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._steps = steps
        self._tokenizer = tokenizer
        self._run_ahead = run_ahead
        self._in_flight: deque[Step] = deque()
        self._streams: dict[int, _Stream] = {}
        self._ids = itertools.count(1)
        self._work = asyncio.Event()
        self._error: ServiceError | None = None

    async def run(self) -> None:
        """Steps until cancelled or until a step fails; then every stream fails with that error."""
        error: ServiceError = Unavailable("the engine has stopped", reason="STOPPED")
        try:
            while True:
                while len(self._in_flight) < self._run_ahead and (
                    step := self.scheduler.schedule()
                ):
                    self._in_flight.append(step)
                    await self._steps.send(step)
                if self._in_flight:
                    self._apply(self._in_flight.popleft(), await self._steps.receive())
                else:
                    self._work.clear()
                    await self._work.wait()
        except ServiceError as failure:
            error = Unavailable(
                f"a step failed: {failure}", reason="STEP_FAILED", retry_after_s=5.0
            )
            raise
        finally:
            self._error = error
            for stream in list(self._streams.values()):
                stream.error = error
                stream.ready.set()

    def _apply(self, step: Step, tokens: dict[int, int]) -> None:
        for chunk in step.chunks:
            sequence = chunk.sequence
            stream = self._streams.get(sequence.sequence_id)
            if not chunk.samples or stream is None or sequence.finish_reason is not None:
                continue  # a chunk of a prompt, or a token of a sequence that has ended meanwhile
            token = tokens[sequence.sequence_id]
            sequence.append(token)
            self.num_generated_tokens += 1
            stream.tokens.append(token)
            stream.ready.set()
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)

    def check(self, prompt: SequenceOf[int], max_tokens: int | None) -> int:
        """The number of tokens to generate; InvalidArgument where the request can't be served."""
        limits = self.limits
        if not prompt:
            raise InvalidArgument("prompt", "", "is empty")
        for token in prompt:
            if not 0 <= token < limits.vocab_size:
                raise InvalidArgument(
                    "prompt.token_ids", token, f"the vocabulary has {limits.vocab_size} ids"
                )
        room = limits.context_length - len(prompt)
        if room < 1:
            raise InvalidArgument(
                "prompt",
                f"{len(prompt)} tokens",
                f"the context holds {limits.context_length} with at least one new token",
            )
        if max_tokens is None:
            return room
        if not 1 <= max_tokens <= room:
            raise InvalidArgument(
                "max_tokens",
                max_tokens,
                f"is not in [1, {room}]: the context holds {limits.context_length} tokens, the "
                f"prompt has {len(prompt)}",
            )
        return max_tokens

    async def generate(
        self, prompt: SequenceOf[int], sampling: SamplingRequest, max_tokens: int | None
    ) -> AsyncGenerator[Output, None]:
        """Continues `prompt`. Leaving the iteration ends the request and frees its blocks at once.

        InvalidArgument where the request can't be served; Unavailable when a step fails.
        """
        max_tokens = self.check(prompt, max_tokens)
        if self._error is not None:
            raise self._error
        sequence = Sequence(
            sequence_id=next(self._ids),
            prompt=tuple(prompt),
            sampling=sampling.resolve(),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(self.limits.eos_token_ids),
        )
        stream = _Stream(sequence, self._tokenizer.stream(prompt) if self._tokenizer else None)
        self._streams[sequence.sequence_id] = stream
        self.scheduler.add(sequence)
        self.num_prompt_tokens += len(prompt)
        self._work.set()
        try:
            while True:
                output = await stream.read()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            del self._streams[sequence.sequence_id]
            if sequence.finish_reason is None:
                self.scheduler.remove(sequence)
