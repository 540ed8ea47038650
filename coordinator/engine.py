"""The step loop, and a request's view of it.

The loop keeps `run_ahead` steps sent: while the workers compute one, the next is already with them,
so they never wait for the coordinator. What a step samples stays in the workers and feeds the next
one; the coordinator reads it a step later. A sequence that turns out to have ended costs at most
`run_ahead - 1` steps of its one token.
"""

import asyncio
import contextlib
import itertools
import math
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Protocol

from colrow.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)
from coordinator.request import ModelLimits, Output, Request, RequestRecord
from coordinator.scheduler import Scheduler, Step, StepOutput
from coordinator.sequence import Sequence, TokenLogprobs
from coordinator.step_times import StepTimes
from coordinator.stream import Choice, Stream
from coordinator.tokenizer import Tokenizer

QUEUE_RETRY_S = 1.0
LOST_RETRY_S = 1.0

_REFUSED_SEQUENCE = re.compile(r"(?:new_sequences|chunks)\[(\d+)\]")


class Steps(Protocol):
    """Where steps are executed: the shard group."""

    async def send(self, step: Step) -> None:
        """Hands a step to every worker; does not wait for its result."""

    async def receive(self) -> StepOutput:
        """What the oldest unread step gave."""


class Observer(Protocol):
    """Told of what happens, for metrics, logs and traces. Must not block nor raise."""

    def step(self, num_tokens: int) -> None:
        """A step of so many tokens was sent."""

    def first_token(self, seconds: float) -> None:
        """A request's first token came, so long after the request."""

    def next_token(self, seconds: float) -> None:
        """Another token of a continuation came, so long after the one before it."""

    def ended(self, record: RequestRecord) -> None:
        """A request ended, whichever way."""

    def rejected(self, request: Request, error: ServiceError) -> None:
        """A request was refused before it began."""


class NoObserver:
    """Nobody listens."""

    def step(self, num_tokens: int) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def ended(self, record: RequestRecord) -> None: ...
    def rejected(self, request: Request, error: ServiceError) -> None: ...


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
        max_waiting: int = 1024,
        observer: Observer | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self.max_waiting = max_waiting
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_steps = 0
        """Whose results were read, in all epochs."""
        self.idle = asyncio.Event()
        """Set while the loop runs and has nothing to do."""
        self._steps = steps
        self._tokenizer = tokenizer
        self._run_ahead = run_ahead
        self._observer = observer or NoObserver()
        self._in_flight: deque[Step] = deque()
        self._timing: list[StepTimes] = []
        self._choices: dict[int, tuple[Choice, Stream]] = {}  # by sequence id
        self._ids = itertools.count(1)
        self._work = asyncio.Event()
        self._error: ServiceError | None = None

    async def run(self) -> None:
        """Steps until cancelled or until a step fails.

        Requests outlive it: `run` again, on workers that know nothing, continues them from the tokens
        that were read. `fail` ends them. One that the workers refuse by name ends at once, since they
        would refuse it again, and with it every step that the others are part of.
        """
        self._in_flight.clear()
        self.scheduler.restart()
        self._error = None
        try:
            while True:
                await self._turn()
        except ServiceError as error:
            self._end_refused(error)
            raise
        finally:
            self.idle.clear()
            lost = Unavailable(
                "the group of workers ended while its steps were timed",
                reason="STEPS_LOST",
                retry_after_s=LOST_RETRY_S,
            )
            for times in self._timing:
                times.fail(lost)

    async def _turn(self) -> None:
        """Sends what can be sent, and reads one result or waits for work."""
        while len(self._in_flight) < self._run_ahead and (step := self.scheduler.schedule()):
            for times in self._timing:
                if times.num_wanted:
                    step = times.mark(step)
            self._in_flight.append(step)
            self._note_sent(step)
            await self._steps.send(step)
        if self._in_flight:
            self._apply(self._in_flight.popleft(), await self._steps.receive())
        else:
            self._work.clear()
            self.idle.set()
            await self._work.wait()
            self.idle.clear()

    @contextlib.contextmanager
    def timing(self, times: StepTimes) -> Iterator[None]:
        """Within it steps are timed, as many as that wants; it fails when the group of workers does."""
        if self._error is not None:
            raise self._error
        self._timing.append(times)
        try:
            yield
        finally:
            self._timing.remove(times)

    @property
    def has_requests(self) -> bool:
        return bool(self._choices)

    def fail(self, error: ServiceError) -> None:
        """Ends every request with an error, and refuses new ones with it until `run` runs again."""
        self._error = error
        for times in self._timing:
            times.fail(error)
        self.drop(error)

    def drop(self, error: ServiceError) -> None:
        """Ends every request with an error."""
        for _, stream in self._choices.values():
            stream.error = error
            stream.ready.set()

    def _end_refused(self, error: ServiceError) -> None:
        """Ends the request of the sequence that a worker's refusal names, if it names one."""
        if error.code != InvalidArgument.code:
            return
        named = _REFUSED_SEQUENCE.match(error.metadata.get("field", ""))
        _, stream = self._choices.get(int(named[1]) if named else 0, (None, None))
        if stream is None:
            return
        stream.error = Internal(f"the workers refuse the request: {error}", reason="STEP_FAILED")
        stream.ready.set()
        # At once: a slow reader hears of it when the next steps have long been made.
        for choice in stream.choices:
            self.scheduler.remove(choice.sequence)

    def _note_sent(self, step: Step) -> None:
        self._observer.step(sum([chunk.num_tokens for chunk in step.chunks]))
        for new in step.new_sequences:
            _, stream = self._choices[new.sequence.sequence_id]
            if math.isnan(stream.record.scheduled):
                stream.record.scheduled = time.monotonic()
                stream.record.num_cached_tokens = new.sequence.num_prefix_hits

    def _apply(self, step: Step, output: StepOutput) -> None:
        """Hands tokens and log-probabilities to the streams, and ends the sequences that are done."""
        self.num_steps += 1
        for times in self._timing:
            times.take(step, output)
        now = time.monotonic()
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        for item in output.logprobs:
            choice, stream = self._choices.get(item.sequence_id, (None, None))
            if choice is None or stream is None:
                continue
            of_prompt = max(0, len(choice.sequence.prompt) - item.start)
            if of_prompt:
                stream.take_prompt_logprobs(item.start, item.tokens[:of_prompt])
            if len(item.tokens) > of_prompt:
                logprobs[item.sequence_id] = item.tokens[of_prompt:]
        for chunk in step.chunks:
            if not chunk.samples:
                continue
            sequence = chunk.sequence
            choice, stream = self._choices.get(sequence.sequence_id, (None, None))
            if choice is None or stream is None or sequence.finish_reason is not None:
                continue  # a token of a sequence that has ended meanwhile
            token = output.tokens[sequence.sequence_id]
            sequence.append(token)
            choice.take(token, logprobs.get(sequence.sequence_id, ()))
            stream.ready.set()
            self._note_token(choice, stream.record, now)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)

    def _note_token(self, choice: Choice, record: RequestRecord, now: float) -> None:
        if not record.max_tokens:
            return  # it looked at its prompt only
        self.num_generated_tokens += 1
        record.num_generated_tokens += 1
        record.last_token = now
        if choice.last_token_at is not None:
            self._observer.next_token(now - choice.last_token_at)
        elif math.isnan(record.first_token):
            record.first_token = now
            self._observer.first_token(now - record.arrived)
        choice.last_token_at = now

    def check(self, request: Request) -> int:
        """The number of tokens to generate.

        InvalidArgument where the request can't be served, ResourceExhausted where too many wait,
        Unavailable when a step has failed.
        """
        try:
            return self._check(request)
        except ServiceError as error:
            self._observer.rejected(request, error)
            raise

    def _check(self, request: Request) -> int:
        max_tokens = request.check(self.limits)
        if request.stop and self._tokenizer is None:
            raise FailedPrecondition(
                "stop: the model has no tokenizer and so no text", reason="NO_TOKENIZER"
            )
        if self._error is not None:
            raise self._error
        waiting = len(self.scheduler.waiting)
        if waiting + request.n > self.max_waiting:
            raise ResourceExhausted(
                f"{waiting} continuations of at most {self.max_waiting} wait already",
                reason="QUEUE_FULL",
                retry_after_s=QUEUE_RETRY_S,
            )
        return max_tokens

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Continues the prompt. Leaving the iteration ends the request and frees its blocks at once.

        Raises as `check` does, before anything comes; Unavailable when a step fails.
        """
        max_tokens = self.check(request)
        stream = Stream(
            RequestRecord(
                request_id=request.request_id,
                trace=request.trace,
                num_prompt_tokens=len(request.prompt),
                n=request.n,
                max_tokens=max_tokens,
                arrived=time.monotonic(),
            )
        )
        for index, sampling in enumerate(request.samplings(self.limits)):
            sequence = Sequence(
                sequence_id=next(self._ids),
                prompt=request.prompt,
                sampling=sampling,
                max_tokens=max(1, max_tokens),
                stop_token_ids=request.stop_ids(self.limits) if max_tokens else frozenset(),
                min_tokens=request.min_tokens,
                priority=request.priority,
            )
            text = None
            if self._tokenizer is not None:
                text = self._tokenizer.stream(
                    request.prompt, show_special_tokens=request.show_special_tokens
                )
            choice = Choice(index, sequence, text, request)
            stream.choices.append(choice)
            self._choices[sequence.sequence_id] = choice, stream
            self.scheduler.add(sequence)
        self.num_prompt_tokens += len(request.prompt)
        self._work.set()
        try:
            unfinished = request.n
            while unfinished:
                for output in await stream.read():
                    if output.finish_reason is not None:
                        unfinished -= 1
                        if not unfinished:
                            stream.record.outcome = output.finish_reason.value
                            output = replace(output, usage=stream.record.usage)
                    yield output
        except Exception as error:
            stream.record.outcome = "error"
            stream.record.error = str(error)
            stream.record.error_type = getattr(error, "reason", type(error).__name__)
            raise
        finally:
            for choice in stream.choices:
                del self._choices[choice.sequence.sequence_id]
                if choice.sequence.finish_reason is None:
                    self.scheduler.remove(choice.sequence)
            stream.record.ended = time.monotonic()
            self._observer.ended(stream.record)
