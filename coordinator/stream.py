"""Tokens on their way from the step loop to the reader of a request.

Text is made as tokens arrive and not when the reader comes for them: a stop string has to end its
sequence whether anybody reads or not. A slow reader finds what came meanwhile together, which is never
more than the request's `max_tokens`; it holds up nobody.
"""

import asyncio
from collections.abc import Sequence as SequenceOf

from colrow.errors import ServiceError
from coordinator.request import Output, Request, RequestRecord
from coordinator.sequence import FinishReason, Sequence, TokenLogprobs
from coordinator.stop_strings import StopStrings
from coordinator.tokenizer import TextStream


class Choice:
    """One continuation: its sequence, its text so far, and what is not read of it yet."""

    def __init__(
        self, index: int, sequence: Sequence, text: TextStream | None, request: Request
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.last_token_at: float | None = None
        self._text = text
        self._only_prompt = request.max_tokens == 0
        self._shows_stop = request.include_stop
        self._named_stops = request.stop_token_ids
        self._stops = (
            StopStrings(request.stop, include=request.include_stop) if request.stop else None
        )
        self._stop_reason: str | int | None = None
        self._new_text: list[str] = []
        self._new_tokens: list[int] = []
        self._new_logprobs: list[TokenLogprobs] = []
        self._is_told = False

    def take(self, token_id: int, logprobs: SequenceOf[TokenLogprobs]) -> None:
        """The sequence's newest token; a stop string may end the sequence with it."""
        sequence = self.sequence
        if self._only_prompt:
            return
        self._new_tokens.append(token_id)
        self._new_logprobs += logprobs
        is_stop = sequence.finish_reason is FinishReason.STOP
        if is_stop and token_id in self._named_stops:
            self._stop_reason = token_id
        if self._text is None:
            return
        # A token that ends the sequence says so and nothing else.
        text = self._text.feed(token_id) if not is_stop or self._shows_stop else ""
        if self._stops is not None and not is_stop and len(sequence.output) > sequence.min_tokens:
            text, self._stop_reason = self._stops.feed(text)
            if self._stop_reason is not None:
                sequence.finish_reason = FinishReason.STOP
            elif sequence.finish_reason is not None:
                text += self._stops.flush()
        elif self._stops is not None and is_stop:
            text = self._stops.flush() + text
        self._new_text.append(text)

    def read(self, prompt_logprobs: tuple[TokenLogprobs, ...]) -> Output | None:
        """What came since the last time, if anything did."""
        finished = self.sequence.finish_reason is not None and not self._is_told
        if not self._new_tokens and not finished:
            return None
        self._is_told = finished
        output = Output(
            text="".join(self._new_text),
            token_ids=tuple(self._new_tokens),
            finish_reason=self.sequence.finish_reason,
            index=self.index,
            logprobs=tuple(self._new_logprobs),
            prompt_logprobs=prompt_logprobs,
            stop_reason=self._stop_reason,
        )
        self._new_text.clear()
        self._new_tokens.clear()
        self._new_logprobs.clear()
        return output


class Stream:
    """The choices of one request, for one reader."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.choices: list[Choice] = []
        self.error: ServiceError | None = None
        self.ready = asyncio.Event()
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_prompt_logprobs = 1  # the first token has none

    @property
    def is_finished(self) -> bool:
        return all(choice.sequence.finish_reason is not None for choice in self.choices)

    def take_prompt_logprobs(self, start: int, logprobs: SequenceOf[TokenLogprobs]) -> None:
        """Those of the prompt's tokens from `start` on; one that is preempted has them twice."""
        have = self._num_prompt_logprobs
        assert start <= have, f"logprobs of tokens {have} to {start} are missing"
        new = logprobs[have - start :]
        self._prompt_logprobs += new
        self._num_prompt_logprobs += len(new)

    async def read(self) -> list[Output]:
        """What came since the last time, of every choice that has something; at least one."""
        while True:
            await self.ready.wait()
            self.ready.clear()
            outputs = []
            for choice in self.choices:
                first = () if choice.index else tuple(self._prompt_logprobs)
                output = choice.read(first)
                if output is not None:
                    outputs.append(output)
                    if first:
                        self._prompt_logprobs.clear()
            if self.error is not None and not self.is_finished:
                if not outputs:
                    raise self.error
                self.ready.set()
            if outputs:
                return outputs
