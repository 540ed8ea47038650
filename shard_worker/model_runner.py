"""Turns a step of the schedule into a forward pass, and its logits into tokens.

The runner knows each sequence's tokens, how many of them are computed, and its block table. A sampled
token is appended here and is the next step's input, so a step can be sent before the last one's
tokens were read.
"""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from colrow.errors import InvalidArgument
from shard_worker.adjustments import Adjustment
from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PrefillSpan
from shard_worker.kv_cache import KvCache
from shard_worker.logprobs import TokenLogprobs
from shard_worker.models import Model
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling

# Of a prompt's logits, so that a long one takes no more memory than this: at 128k token ids, 64 MiB.
_LOGPROB_ROWS = 128


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the runner does not know: its prompt, and what it had generated before.

    `cached_block_ids` begin its block table: they are full of its first tokens, computed earlier.
    """

    sequence_id: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sampling: Sampling
    cached_block_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a sequence; `new_block_ids` extend its block table first."""

    sequence_id: int
    num_tokens: int
    new_block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of the running batch. Finished sequences are forgotten before it."""

    step_id: int
    finished: Sequence[int]
    new_sequences: Sequence[NewSequence]
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class SequenceLogprobs:
    """Of consecutive tokens of a sequence; `start` is the position of the first, prompt included."""

    sequence_id: int
    start: int
    tokens: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled token of each sequence that sampled, in the order of the chunks.

    `logprobs` are those that were asked for; rank 0 alone has them. A chunk that ends a prompt may
    have two entries, of the prompt's tokens and, after it, of the sampled one.
    """

    step_id: int
    sequence_ids: Sequence[int]
    token_ids: Sequence[int]
    duration_us: int
    logprobs: Sequence[SequenceLogprobs] = ()


@dataclass(slots=True)
class _Sequence:
    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    block_ids: "array[int]"
    num_computed: int
    adjustment: Adjustment | None


@dataclass(slots=True)
class _Span:
    """The tokens [start, stop) of a sequence, in the batch from row `at` on."""

    sequence: _Sequence
    start: int
    stop: int
    at: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.sequence.token_ids)

    @property
    def last_row(self) -> int:
        return self.at + self.stop - self.start - 1


class ModelRunner:
    """Executes steps on one shard; every rank runs the same steps and keeps the same sequences."""

    def __init__(self, model: Model, sampler: Sampler, kv_cache: KvCache, vocab_size: int) -> None:
        self.model = model
        self.sampler = sampler
        self.kv_cache = kv_cache
        self.vocab_size = vocab_size
        self._sequences: dict[int, _Sequence] = {}

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """Runs one step. InvalidArgument, before anything runs, when it does not fit the sequences."""
        began = time.perf_counter_ns()
        self._check(step)
        self._admit(step)
        prefills, decodes = self._spans(step.chunks)
        logprobs: list[SequenceLogprobs] = []
        sampled: dict[int, int] = {}
        if spans := prefills + decodes:
            hidden = self.model(self._batch(prefills, decodes))
            logprobs += self._prompt_logprobs(spans, hidden)
            if sampling := [span for span in spans if span.samples]:
                tokens, own = self._sample(sampling, hidden)
                logprobs += own
                for span, token in zip(sampling, tokens, strict=True):
                    sampled[span.sequence.sequence_id] = token
                    span.sequence.token_ids.append(token)
                    if span.sequence.adjustment is not None:
                        span.sequence.adjustment.append(token)
            for span in spans:
                span.sequence.num_computed = span.stop
        ordered = [c.sequence_id for c in step.chunks if c.sequence_id in sampled]
        return StepResult(
            step_id=step.step_id,
            sequence_ids=ordered,
            token_ids=[sampled[sequence_id] for sequence_id in ordered],
            duration_us=(time.perf_counter_ns() - began) // 1000,
            logprobs=logprobs,
        )

    def _check(self, step: Step) -> None:
        """InvalidArgument when the step does not fit the sequences."""
        sequences, size = self._sequences, self.kv_cache.block_size
        finished = set(step.finished)
        fresh: dict[int, NewSequence] = {}
        for new in step.new_sequences:
            id = new.sequence_id
            if id in fresh or (id in sequences and id not in finished):
                raise InvalidArgument(f"new_sequences[{id}]", id, "is known already")
            self._check_new(new)
            fresh[id] = new
        seen = set()
        for chunk in step.chunks:
            id = chunk.sequence_id
            if id in seen:
                raise InvalidArgument(f"chunks[{id}]", id, "has two chunks in one step")
            seen.add(id)
            if id in fresh:
                num_tokens, blocks = len(fresh[id].token_ids), len(fresh[id].cached_block_ids)
                computed = blocks * size
            elif id in sequences and id not in finished:
                state = sequences[id]
                num_tokens, computed = len(state.token_ids), state.num_computed
                blocks = len(state.block_ids)
            else:
                raise InvalidArgument(f"chunks[{id}]", id, "is not known")
            if not 0 < chunk.num_tokens <= num_tokens - computed:
                raise InvalidArgument(
                    f"chunks[{id}].num_tokens",
                    chunk.num_tokens,
                    f"{num_tokens - computed} tokens are left to compute",
                )
            if computed + chunk.num_tokens > (blocks + len(chunk.new_block_ids)) * size:
                raise InvalidArgument(
                    f"chunks[{id}].new_block_ids",
                    list(chunk.new_block_ids),
                    f"{computed + chunk.num_tokens} tokens need more blocks",
                )
            if chunk.new_block_ids:
                self._check_blocks(f"chunks[{id}].new_block_ids", chunk.new_block_ids)

    def _check_new(self, new: NewSequence) -> None:
        field = f"new_sequences[{new.sequence_id}]"
        if not 0 < new.num_prompt_tokens <= len(new.token_ids):
            raise InvalidArgument(
                f"{field}.num_prompt_tokens",
                new.num_prompt_tokens,
                f"there are {len(new.token_ids)} tokens",
            )
        for token in (min(new.token_ids), max(new.token_ids)):
            if not 0 <= token < self.vocab_size:
                raise InvalidArgument(
                    f"{field}.token_ids", token, f"the vocabulary has {self.vocab_size} ids"
                )
        new.sampling.check(f"{field}.sampling", self.vocab_size)
        if len(new.cached_block_ids) * self.kv_cache.block_size >= len(new.token_ids):
            raise InvalidArgument(
                f"{field}.cached_block_ids",
                list(new.cached_block_ids),
                f"of {len(new.token_ids)} tokens at least one is to be computed",
            )
        self._check_blocks(f"{field}.cached_block_ids", new.cached_block_ids)

    def _check_blocks(self, field: str, block_ids: Sequence[int]) -> None:
        for block in block_ids:
            if not 0 <= block < self.kv_cache.num_blocks:
                raise InvalidArgument(
                    field, block, f"the cache has {self.kv_cache.num_blocks} blocks"
                )

    def _admit(self, step: Step) -> None:
        """Takes over what a step changes."""
        for sequence_id in step.finished:
            self._sequences.pop(sequence_id, None)
        for new in step.new_sequences:
            self._sequences[new.sequence_id] = _Sequence(
                new.sequence_id,
                list(new.token_ids),
                new.num_prompt_tokens,
                new.sampling,
                array("q", new.cached_block_ids),
                len(new.cached_block_ids) * self.kv_cache.block_size,
                self.sampler.adjustment(new.sampling, new.token_ids, new.num_prompt_tokens),
            )
        for chunk in step.chunks:
            if chunk.new_block_ids:
                self._sequences[chunk.sequence_id].block_ids.extend(chunk.new_block_ids)

    def _spans(self, chunks: Sequence[Chunk]) -> tuple[list[_Span], list[_Span]]:
        """Where each chunk stands in the batch, prefilling and decoding ones apart.

        Decoding sequences stand last: their attention is one operation.
        """
        prefilling: list[tuple[_Sequence, int]] = []
        decoding: list[tuple[_Sequence, int]] = []
        for chunk in chunks:
            sequence = self._sequences[chunk.sequence_id]
            is_decode = chunk.num_tokens == 1 and sequence.num_computed > 0
            (decoding if is_decode else prefilling).append((sequence, chunk.num_tokens))
        prefills: list[_Span] = []
        decodes: list[_Span] = []
        at = 0
        for group, spans in ((prefilling, prefills), (decoding, decodes)):
            for sequence, num_tokens in group:
                start = sequence.num_computed
                spans.append(_Span(sequence, start, start + num_tokens, at))
                at += num_tokens
        return prefills, decodes

    def _batch(self, prefills: Sequence[_Span], decodes: Sequence[_Span]) -> ForwardBatch:
        size = self.kv_cache.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        prefill_spans = []
        for span in prefills:
            start, stop, blocks = span.start, span.stop, span.sequence.block_ids
            used = torch.tensor(blocks[: -(-stop // size)])
            prefill_spans.append(PrefillSpan(span.at, span.at + stop - start, start, used))
            token_ids.extend(span.sequence.token_ids[start:stop])
            positions.extend(range(start, stop))
            slots.extend(blocks[p // size] * size + p % size for p in range(start, stop))
        for span in decodes:
            position = span.start
            token_ids.append(span.sequence.token_ids[position])
            positions.append(position)
            block = span.sequence.block_ids[position // size]
            slots.append(block * size + position % size)
        decode = None
        if decodes:
            counts = [span.start // size + 1 for span in decodes]
            tables = np.zeros((len(decodes), max(counts)), dtype=np.int64)
            for table, span, count in zip(tables, decodes, counts, strict=True):
                table[:count] = span.sequence.block_ids[:count]
            decode = DecodeSpan(
                start=decodes[0].at,
                block_ids=torch.from_numpy(tables),
                context_lens=torch.tensor([span.stop for span in decodes]),
                block_size=size,
            )
        return ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            prefills=tuple(prefill_spans),
            decode=decode,
            kv_cache=self.kv_cache,
        )

    def _sample(
        self, spans: Sequence[_Span], hidden: Tensor
    ) -> tuple[list[int], list[SequenceLogprobs]]:
        """The next token of each span's sequence, and the log-probabilities that are asked for."""
        logits = self.model.lm_head(hidden[[span.last_row for span in spans]])
        asked, counts = [], []
        for row, span in enumerate(spans):
            if (count := span.sequence.sampling.logprobs) is not None:
                asked.append(row)
                counts.append(count)
        # The sampler writes to the logits that it is given.
        own = logits[asked] if asked else None
        tokens = self.sampler(logits, [_draw(span.sequence) for span in spans])
        if own is None:
            return tokens, []
        # There are answers on rank 0 only.
        answers = self.sampler.logprobs(own, [tokens[row] for row in asked], counts)
        return tokens, [
            SequenceLogprobs(spans[row].sequence.sequence_id, spans[row].stop, (answer,))
            for row, answer in zip(asked, answers, strict=False)
        ]

    def _prompt_logprobs(self, spans: Sequence[_Span], hidden: Tensor) -> list[SequenceLogprobs]:
        """Of the prompt tokens that these spans' hidden states foretell, where they are asked for."""
        asked = [
            (span, min(span.stop + 1, span.sequence.num_prompt_tokens))
            for span in spans
            if span.sequence.sampling.prompt_logprobs is not None
            and span.start + 1 < span.sequence.num_prompt_tokens
        ]
        if not asked:
            return []
        # A token's probability comes from the hidden state of the one before it.
        rows: list[int] = []
        tokens: list[int] = []
        counts: list[int] = []
        for span, stop in asked:
            length = stop - span.start - 1
            rows += range(span.at, span.at + length)
            tokens += span.sequence.token_ids[span.start + 1 : stop]
            counts += [span.sequence.sampling.prompt_logprobs or 0] * length
        answers: list[TokenLogprobs] = []
        for at in range(0, len(rows), _LOGPROB_ROWS):
            piece = slice(at, at + _LOGPROB_ROWS)
            logits = self.model.lm_head(hidden[rows[piece]])
            answers += self.sampler.logprobs(logits, tokens[piece], counts[piece])
        if not answers:  # which rank 0 has
            return []
        result, at = [], 0
        for span, stop in asked:
            first = span.start + 1
            own = answers[at : at + stop - first]
            result.append(SequenceLogprobs(span.sequence.sequence_id, first, own))
            at += stop - first
        return result


def _draw(sequence: _Sequence) -> Draw:
    num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
    return Draw(sequence.sampling, num_output, sequence.adjustment)
