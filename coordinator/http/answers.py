"""From the engine's outputs to answers of the HTTP API."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel

from coordinator.http.requests import Prompt
from coordinator.http.schema import (
    AssistantMessage,
    CachedTokens,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprob,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    GenerationRequest,
    PromptLogprob,
    PromptLogprobs,
    Usage,
)
from coordinator.request import Output
from coordinator.sequence import FinishReason, TokenLogprobs
from coordinator.tokenizer import LOOK_BACK, TextStream, Tokenizer

UNLIKELY = -9999.0  # JSON has no minus infinity; this is what OpenAI writes for it

FINISH_REASONS = {None: None, FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Frame:
    """What every chunk of an answer says; `created` is in seconds since 1970."""

    id: str
    created: int
    model: str


class Answer(Protocol):
    """Makes an answer of outputs, whole or in chunks. Takes each output once."""

    def chunks(self, place: int, output: Output) -> Iterable[BaseModel]:
        """What is to be sent of an output of the prompt at `place`."""

    def usage_chunk(self) -> BaseModel:
        """The last chunk, where usage was asked for."""

    def whole(self, outputs: Sequence[Sequence[Output]]) -> BaseModel:
        """The answer of all outputs of each prompt."""


class TokenNames:
    """How answers name tokens: as text, or as their ids where that is asked for or there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int] | None:
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))

    def top(self, item: TokenLogprobs, count: int) -> dict[str, float]:
        """The `count` likeliest tokens and the one that is there; of equal names the likelier one's."""
        named: dict[str, float] = {}
        for token_id, logprob in (*item.top[:count], (item.token_id, item.logprob)):
            named.setdefault(self.name(token_id), finite(logprob))
        return named

    def prompt_logprobs(self, items: Sequence[TokenLogprobs], count: int) -> PromptLogprobs:
        """As vLLM has them: by token id, with the place of each among all."""
        shown: PromptLogprobs = [None]
        for item in items:
            ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(item.top, 1)}
            kept = dict(list(ranked.items())[:count])
            kept[item.token_id] = item.logprob, item.rank
            shown.append(
                {
                    token: PromptLogprob(
                        logprob=finite(logprob), rank=rank, decoded_token=self.name(token)
                    )
                    for token, (logprob, rank) in kept.items()
                }
            )
        return shown


def finite(logprob: float) -> float:
    return logprob if logprob > UNLIKELY else UNLIKELY


def _joined(outputs: Sequence[Output]) -> Output:
    """All that came of one continuation."""
    if len(outputs) == 1:
        return outputs[0]
    chain = itertools.chain.from_iterable
    return replace(
        outputs[-1],
        text="".join([output.text for output in outputs]),
        token_ids=tuple(chain(output.token_ids for output in outputs)),
        logprobs=tuple(chain(output.logprobs for output in outputs)),
        prompt_logprobs=tuple(chain(output.prompt_logprobs for output in outputs)),
    )


class _Answer:
    """What answers of both kinds have in common."""

    def __init__(
        self,
        asked: GenerationRequest,
        prompts: Sequence[Prompt],
        frame: Frame,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._prompts = prompts
        self._frame = frame
        self._names = TokenNames(tokenizer, as_ids=bool(asked.return_tokens_as_token_ids))
        self._n = 1 if asked.n is None else asked.n
        self._shows_ids = bool(asked.return_token_ids)
        self._prompt_top = asked.prompt_logprobs
        options = asked.stream_options
        self._ends_with_usage = options is not None and bool(options.include_usage)
        self._always_usage = options is not None and bool(options.continuous_usage_stats)
        self._num_tokens = 0
        self._num_cached = 0
        self._begun: set[int] = set()

    def _count(self, output: Output) -> None:
        self._num_tokens += len(output.token_ids)
        if output.usage is not None:
            self._num_cached += output.usage.cached_prompt_tokens

    def _usage(self) -> Usage:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=num_prompt_tokens + self._num_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=self._num_cached),
        )

    def _chunk_usage(self) -> dict[str, Any]:
        """The field of a chunk. Null, as OpenAI has it, where usage comes at the end."""
        if self._always_usage:
            return {"usage": self._usage()}
        return {"usage": None} if self._ends_with_usage else {}

    def _framed(self, kind: str) -> dict[str, Any]:
        frame = self._frame
        return {"id": frame.id, "object": kind, "created": frame.created, "model": frame.model}

    def _begins(self, index: int) -> bool:
        """Whether nothing of the choice was shown before."""
        begins = index not in self._begun
        self._begun.add(index)
        return begins

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "index": index,
            "finish_reason": FINISH_REASONS[output.finish_reason],
            "stop_reason": output.stop_reason,
        }
        if self._shows_ids:
            fields["token_ids"] = list(output.token_ids)
        return fields


def _by_choice(outputs: Sequence[Output]) -> list[Output]:
    """All that came of each continuation, in their order."""
    choices = defaultdict(list)
    for output in outputs:
        choices[output.index].append(output)
    return [_joined(choices[index]) for index in sorted(choices)]


class CompletionAnswer(_Answer):
    """Choices are counted through all prompts: prompt times n, and the continuation's own."""

    def __init__(
        self,
        asked: CompletionRequest,
        prompts: Sequence[Prompt],
        frame: Frame,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(asked, prompts, frame, tokenizer)
        self._tokenizer = tokenizer
        self._echo = bool(asked.echo)
        self._top = asked.logprobs
        self._shows_special = asked.skip_special_tokens is False
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        self._held: dict[int, list[Output]] = defaultdict(list)
        self._places: dict[int, _Places] = {}

    def chunks(self, place: int, output: Output) -> Iterable[Completion]:
        if output.index == 0:
            self._prompt_logprobs.setdefault(place, output.prompt_logprobs)
        elif self._echo and self._top is not None and place not in self._prompt_logprobs:
            # A prompt's log-probabilities come with the first continuation and begin all of them.
            self._held[place].append(output)
            return
        for ready in (output, *self._held.pop(place, ())):
            self._count(ready)
            yield Completion(
                **self._framed("text_completion"),
                choices=[self._completion_choice(place, ready)],
                **self._chunk_usage(),
            )

    def usage_chunk(self) -> Completion:
        return Completion(**self._framed("text_completion"), choices=[], usage=self._usage())

    def whole(self, outputs: Sequence[Sequence[Output]]) -> Completion:
        choices = []
        for place, of_prompt in enumerate(outputs):
            for output in _by_choice(of_prompt):
                if output.index == 0:
                    self._prompt_logprobs[place] = output.prompt_logprobs
                self._count(output)
                choices.append(self._completion_choice(place, output))
        return Completion(**self._framed("text_completion"), choices=choices, usage=self._usage())

    def _completion_choice(self, place: int, output: Output) -> CompletionChoice:
        index = place * self._n + output.index
        prompt = self._prompts[place]
        begins = self._begins(index)
        echoes = begins and self._echo
        fields = self._choice(index, output)
        fields["text"] = (self._prompt_text(prompt) if echoes else "") + output.text
        fields["logprobs"] = None
        if self._top is not None:
            fields["logprobs"] = self._logprobs(index, place, output, echoes=echoes)
        if begins and self._shows_ids:
            fields["prompt_token_ids"] = list(prompt.token_ids)
        if begins and self._prompt_top is not None:
            fields["prompt_logprobs"] = self._names.prompt_logprobs(
                self._prompt_logprobs[place], self._prompt_top
            )
        return CompletionChoice(**fields)

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=not self._shows_special)

    def _logprobs(
        self, index: int, place: int, output: Output, *, echoes: bool
    ) -> CompletionLogprobs:
        assert self._top is not None
        prompt = self._prompts[place]
        items: list[TokenLogprobs | None] = [*output.logprobs]
        token_ids = output.token_ids
        offsets: list[int] = []
        if index not in self._places:
            places = self._places[index] = _Places(self._tokenizer, self._shows_special)
            if echoes:
                length = len(self._prompt_text(prompt))
                offsets = [min(places.next(token), length) for token in prompt.token_ids]
                items = [None, *self._prompt_logprobs[place], *items]
                token_ids = prompt.token_ids + token_ids
                places.move_to(length)
            else:
                places.begin_after(prompt.token_ids)
        offsets += [self._places[index].next(token) for token in output.token_ids]
        assert len(items) == len(token_ids), f"{len(items)} logprobs of {len(token_ids)} tokens"
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[None if item is None else finite(item.logprob) for item in items],
            tokens=[self._names.name(token) for token in token_ids],
            top_logprobs=[
                None if item is None else self._names.top(item, self._top) for item in items
            ],
        )


class _Places:
    """Where in a text its tokens begin, in characters."""

    def __init__(self, tokenizer: Tokenizer | None, shows_special: bool) -> None:
        self._length = 0
        self._stream: TextStream | None = None
        if tokenizer is not None:
            self._stream = tokenizer.stream(show_special_tokens=shows_special)

    def next(self, token_id: int) -> int:
        """Where the next token begins: after all characters that the ones before it completed."""
        place = self._length
        if self._stream is not None:
            self._length += len(self._stream.feed(token_id))
        return place

    def move_to(self, length: int) -> None:
        """The text so far is as long as this, whatever its tokens would make of it."""
        self._length = length

    def begin_after(self, token_ids: Sequence[int]) -> None:
        """The text begins after these tokens."""
        for token_id in token_ids[-LOOK_BACK:]:
            self.next(token_id)
        self._length = 0


class ChatAnswer(_Answer):
    """The answer to one conversation."""

    def __init__(
        self,
        asked: ChatCompletionRequest,
        prompt: Prompt,
        frame: Frame,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(asked, (prompt,), frame, tokenizer)
        self._top = (asked.top_logprobs or 0) if asked.logprobs else None

    def chunks(self, place: int, output: Output) -> Iterable[ChatCompletionChunk]:
        self._count(output)
        further: dict[str, Any] = self._chunk_usage()
        if self._shows_ids and not self._begun:
            further["prompt_token_ids"] = list(self._prompts[place].token_ids)
        delta = Delta(content=output.text)
        if self._begins(output.index):
            delta = Delta(role="assistant", content=output.text)
        yield ChatCompletionChunk(
            **self._framed("chat.completion.chunk"),
            choices=[
                ChatChunkChoice(
                    **self._choice(output.index, output),
                    delta=delta,
                    logprobs=self._logprobs(output),
                )
            ],
            **further,
        )

    def usage_chunk(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            **self._framed("chat.completion.chunk"), choices=[], usage=self._usage()
        )

    def whole(self, outputs: Sequence[Sequence[Output]]) -> ChatCompletion:
        (of_prompt,) = outputs
        choices = _by_choice(of_prompt)
        further: dict[str, Any] = {}
        for output in choices:
            self._count(output)
        if self._shows_ids:
            further["prompt_token_ids"] = list(self._prompts[0].token_ids)
        if self._prompt_top is not None:
            further["prompt_logprobs"] = self._names.prompt_logprobs(
                choices[0].prompt_logprobs, self._prompt_top
            )
        return ChatCompletion(
            **self._framed("chat.completion"),
            choices=[
                ChatChoice(
                    **self._choice(output.index, output),
                    message=AssistantMessage(role="assistant", content=output.text, refusal=None),
                    logprobs=self._logprobs(output),
                )
                for output in choices
            ],
            usage=self._usage(),
            **further,
        )

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if self._top is None:
            return None
        return ChatLogprobs(
            content=[
                ChatTokenLogprob(
                    **self._entry(item.token_id, item.logprob),
                    top_logprobs=[
                        ChatLogprob(**self._entry(token_id, logprob))
                        for token_id, logprob in item.top[: self._top]
                    ],
                )
                for item in output.logprobs
            ],
            refusal=None,
        )

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._names.name(token_id),
            "logprob": finite(logprob),
            "bytes": self._names.bytes(token_id),
        }
