"""Turns a step of the schedule into a forward pass, and its logits into tokens.

The runner knows each sequence's prompt, how many tokens it has and how many of them are computed, and
its block table. A sampled token stays on the device, where it is the next step's input: a step can be
launched before the last one's tokens were read, or even exist.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from colrow.errors import InvalidArgument
from shard_worker.adjustments import Adjustment
from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PrefillSpan
from shard_worker.kv_cache import KvCache
from shard_worker.logprobs import TokenLogprobs
from shard_worker.memory_meter import MemoryMeter
from shard_worker.models import Model
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.step_graphs import GraphChunk, StepGraphs
from shard_worker.stopwatch import Stopwatch, hold_back
from shard_worker.tensor_parallel import CollectiveTimes, TimedCollective
from shard_worker.transfer import to_device

# Of a prompt's logits, so that a long one takes no more memory than this: at 128k token ids, 64 MiB.
_LOGPROB_ROWS = 128
_CPU = torch.device("cpu")


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
    """One forward pass of the running batch. Finished sequences are forgotten before it.

    One that `times_collectives` gives the same tokens, and runs without a CUDA graph.
    """

    step_id: int
    finished: Sequence[int]
    new_sequences: Sequence[NewSequence]
    chunks: Sequence[Chunk]
    times_collectives: bool = False


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
    have two entries, of the prompt's tokens and, after it, of the sampled one. `collectives` are all of
    a step that times them, in order.
    """

    step_id: int
    sequence_ids: Sequence[int]
    token_ids: Sequence[int]
    duration_us: int
    logprobs: Sequence[SequenceLogprobs] = ()
    collectives: Sequence[TimedCollective] = ()


class Launched:
    """A step that was queued on the device. `result` waits for it; any thread may call it, once."""

    def __init__(
        self,
        step: Step,
        watch: Stopwatch,
        times: CollectiveTimes,
        sampled: Sequence[int],
        tokens: Tensor,
        logprobs: Sequence[SequenceLogprobs],
    ) -> None:
        """sampled: sequence ids. tokens: int64 [len(sampled)], on the device."""
        self._step, self._watch, self._times = step, watch, times
        self._sampled, self._logprobs = sampled, logprobs
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
        else:
            self._tokens = tokens
        watch.stop()

    @property
    def is_done(self) -> bool:
        """`result` will not wait."""
        return self._watch.is_done

    def result(self) -> StepResult:
        """The tokens, in the order of the step's chunks."""
        duration_us = self._watch.wait_ns() // 1000
        tokens = dict(zip(self._sampled, self._tokens.tolist(), strict=True))
        ordered = [chunk.sequence_id for chunk in self._step.chunks if chunk.sequence_id in tokens]
        return StepResult(
            step_id=self._step.step_id,
            sequence_ids=ordered,
            token_ids=[tokens[sequence_id] for sequence_id in ordered],
            duration_us=duration_us,
            logprobs=self._logprobs,
            collectives=self._times.wait(),
        )


@dataclass(slots=True)
class _Sequence:
    sequence_id: int
    row: int
    """Of `ModelRunner.last_tokens`."""
    token_ids: Sequence[int]
    """Those that the coordinator sent."""
    num_tokens: int
    """Those that were sampled since among them."""
    num_prompt_tokens: int
    sampling: Sampling
    block_ids: "array[int]"
    num_computed: int
    adjustment: Adjustment | None

    @property
    def is_plain(self) -> bool:
        """The likeliest token is all that is asked for."""
        sampling = self.sampling
        return sampling.temperature == 0 and sampling.logprobs is None and self.adjustment is None


@dataclass(slots=True)
class _Span:
    """The tokens [start, stop) of a sequence, in the batch from row `at` on."""

    sequence: _Sequence
    start: int
    stop: int
    at: int

    @property
    def samples(self) -> bool:
        return self.stop == self.sequence.num_tokens

    @property
    def last_row(self) -> int:
        return self.at + self.stop - self.start - 1


class ModelRunner:
    """Executes steps on one shard; every rank runs the same steps and keeps the same sequences.

    `last_tokens` has the newest token of each sequence, in the sequence's row; the last row is nobody's.
    `graphs` run the steps that they fit; for others, and without them, operations are launched one by
    one.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        kv_cache: KvCache,
        vocab_size: int,
        *,
        device: torch.device = _CPU,
        max_blocks: int | None = None,
        meter: MemoryMeter | None = None,
    ) -> None:
        """max_blocks: of one sequence, where steps are to be captured as CUDA graphs; `meter` then
        measures what they keep."""
        self.model = model
        self.sampler = sampler
        self.kv_cache = kv_cache
        self.vocab_size = vocab_size
        self.device = device
        # A sequence that runs has a block of its own, so there are never more of them.
        self.last_tokens = torch.zeros(kv_cache.num_blocks + 1, dtype=torch.int64, device=device)
        self.graphs: StepGraphs | None = None
        if max_blocks is not None:
            assert meter is not None
            self.graphs = StepGraphs(
                model, sampler, kv_cache, self.last_tokens, max_blocks=max_blocks, meter=meter
            )
        self._sequences: dict[int, _Sequence] = {}
        self._free_rows: list[int] = []
        self._num_rows = 0

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Queues one step. InvalidArgument, before anything runs, when it does not fit the sequences."""
        self._check(step)
        if step.times_collectives:
            hold_back(self.device)
        watch = Stopwatch(self.device)
        with self.sampler.tp.timing(step.times_collectives) as times:
            sampled, tokens, logprobs = self._compute(step)
        return Launched(step, watch, times, sampled, tokens, logprobs)

    def _compute(self, step: Step) -> tuple[list[int], Tensor, list[SequenceLogprobs]]:
        """The sequences that sampled, their tokens, and the log-probabilities that are asked for."""
        self._admit(step)
        prefills, decodes = self._spans(step.chunks)
        spans = prefills + decodes
        sampling = [span for span in spans if span.samples]
        if not spans:
            return [], self.last_tokens[:0], []
        self._set_known_tokens(decodes)
        replayed = None
        # What is within a graph can't be timed.
        if not step.times_collectives:
            replayed = self._replay(prefills, decodes, sampling)
        if replayed is not None:
            tokens, logprobs = replayed
        else:
            batch = self._batch(prefills, decodes)
            last_rows = self._to_device([span.last_row for span in sampling])
            hidden = self.model(batch)
            logprobs = self._prompt_logprobs(spans, hidden)
            tokens = self.last_tokens[:0]
            if sampling:
                logits = self.model.lm_head(hidden[last_rows])
                tokens, own = self._sample(sampling, logits)
                logprobs += own
        for span in spans:
            span.sequence.num_computed = span.stop
        for span in sampling:
            span.sequence.num_tokens += 1
        return [span.sequence.sequence_id for span in sampling], tokens, logprobs

    def close(self) -> None:
        """Gives up the cache and all that refers to it, whoever may still refer to this."""
        self.graphs = None
        self.kv_cache = replace(self.kv_cache, layers=())
        self._sequences.clear()

    def _replay(
        self, prefills: list[_Span], decodes: list[_Span], sampling: Sequence[_Span]
    ) -> tuple[Tensor, list[SequenceLogprobs]] | None:
        """The step as one graph, if there is one for it."""
        spans = prefills + decodes
        # A prompt's log-probabilities need its hidden states, which a graph does not give.
        if self.graphs is None or any(self._foretells_prompt(span) for span in spans):
            return None
        chunks = [
            GraphChunk(
                span.sequence.row,
                span.start,
                span.stop,
                token_ids,
                span.sequence.block_ids,
            )
            for span, token_ids in (
                *((span, span.sequence.token_ids) for span in prefills),
                *((span, None) for span in decodes),  # the device has it
            )
        ]
        if not self.graphs.fit(chunks):
            return None
        logits, tokens = self.graphs.run(chunks)
        if len(sampling) < len(spans):
            rows = self._to_device([row for row, span in enumerate(spans) if span.samples])
            logits, tokens = logits[rows], tokens[rows]
        if sampling and not all(span.sequence.is_plain for span in sampling):
            if len(sampling) == len(spans):
                draws = [_draw(span.sequence) for span in spans]
                drawn = self.graphs.draw(draws, [span.sequence.row for span in spans])
                if drawn is not None:
                    return drawn, []
            return self._sample(sampling, logits)
        return tokens, []

    def _set_known_tokens(self, decodes: Sequence[_Span]) -> None:
        """Puts tokens that were sent, not sampled, where the device looks for them."""
        known = [span for span in decodes if span.start < len(span.sequence.token_ids)]
        if known:
            rows = self._to_device([span.sequence.row for span in known])
            self.last_tokens[rows] = self._to_device(
                [span.sequence.token_ids[span.start] for span in known]
            )

    def _to_device(self, values: Sequence[int]) -> Tensor:
        return to_device(values, self.device, torch.int64)

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
        if len(sequences.keys() - finished | fresh.keys()) > self.kv_cache.num_blocks:
            raise InvalidArgument(
                "new_sequences",
                len(fresh),
                f"there are more sequences than the {self.kv_cache.num_blocks} blocks of the cache",
            )
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
                num_tokens, computed = state.num_tokens, state.num_computed
                blocks = len(state.block_ids)
            else:
                raise InvalidArgument(f"chunks[{id}]", id, "is not known")
            if not 0 < chunk.num_tokens <= num_tokens - computed:
                raise InvalidArgument(
                    f"chunks[{id}].num_tokens",
                    chunk.num_tokens,
                    f"{num_tokens - computed} tokens are left to compute",
                )
            longest = self.model.max_positions
            if longest is not None and computed + chunk.num_tokens > longest:
                raise InvalidArgument(
                    f"chunks[{id}].num_tokens",
                    chunk.num_tokens,
                    f"{computed} tokens are computed and the model has {longest} positions",
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
            if (ended := self._sequences.pop(sequence_id, None)) is not None:
                self._free_rows.append(ended.row)
        for new in step.new_sequences:
            if not self._free_rows:
                self._free_rows.append(self._num_rows)
                self._num_rows += 1
            self._sequences[new.sequence_id] = _Sequence(
                new.sequence_id,
                self._free_rows.pop(),
                new.token_ids,
                len(new.token_ids),
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
            used = self._to_device(blocks[: -(-stop // size)])
            prefill_spans.append(PrefillSpan(span.at, span.at + stop - start, start, used))
            token_ids.extend(span.sequence.token_ids[start:stop])
            positions.extend(range(start, stop))
            slots.extend(blocks[p // size] * size + p % size for p in range(start, stop))
        for span in decodes:
            position = span.start
            token_ids.append(0)  # on the device it is known
            positions.append(position)
            block = span.sequence.block_ids[position // size]
            slots.append(block * size + position % size)
        tokens = self._to_device(token_ids)
        decode = None
        if decodes:
            rows = self._to_device([span.sequence.row for span in decodes])
            tokens[decodes[0].at :] = self.last_tokens[rows]
            counts = [span.start // size + 1 for span in decodes]
            tables = np.zeros((len(decodes), max(counts)), dtype=np.int64)
            for table, span, count in zip(tables, decodes, counts, strict=True):
                table[:count] = span.sequence.block_ids[:count]
            decode = DecodeSpan(
                start=decodes[0].at,
                block_ids=to_device(tables, self.device),
                context_lens=self._to_device([span.stop for span in decodes]),
                block_size=size,
            )
        return ForwardBatch(
            token_ids=tokens,
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slots),
            prefills=tuple(prefill_spans),
            decode=decode,
            kv_cache=self.kv_cache,
        )

    def _sample(
        self, spans: Sequence[_Span], logits: Tensor
    ) -> tuple[Tensor, list[SequenceLogprobs]]:
        """The next token of each span's sequence, int64 [num_spans], which are in `last_tokens` then,
        and the log-probabilities that are asked for. Writes to the logits [num_spans, vocabulary]."""
        asked, counts = [], []
        for row, span in enumerate(spans):
            if (count := span.sequence.sampling.logprobs) is not None:
                asked.append(row)
                counts.append(count)
        # The sampler writes to the logits that it is given.
        own = logits[asked] if asked else None
        rows = self._to_device([span.sequence.row for span in spans])
        tokens = self.sampler(logits, [_draw(span.sequence) for span in spans])
        self.last_tokens[rows] = tokens
        adjusted = [row for row, span in enumerate(spans) if span.sequence.adjustment is not None]
        if own is None and not adjusted:
            return tokens, []
        # From here on the device is waited for.
        known = tokens.tolist()
        for row in adjusted:
            spans[row].sequence.adjustment.append(known[row])  # type: ignore[union-attr]
        if own is None:
            return tokens, []
        # There are answers on rank 0 only.
        answers = self.sampler.logprobs(own, [known[row] for row in asked], counts)
        return tokens, [
            SequenceLogprobs(spans[row].sequence.sequence_id, spans[row].stop, (answer,))
            for row, answer in zip(asked, answers, strict=False)
        ]

    @staticmethod
    def _foretells_prompt(span: _Span) -> bool:
        """Its hidden states tell of prompt tokens whose probability is asked for."""
        sequence = span.sequence
        return (
            sequence.sampling.prompt_logprobs is not None
            and span.start + 1 < sequence.num_prompt_tokens
        )

    def _prompt_logprobs(self, spans: Sequence[_Span], hidden: Tensor) -> list[SequenceLogprobs]:
        """Of the prompt tokens that these spans' hidden states foretell, where they are asked for."""
        asked = [
            (span, min(span.stop + 1, span.sequence.num_prompt_tokens))
            for span in spans
            if self._foretells_prompt(span)
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
    num_output = sequence.num_tokens - sequence.num_prompt_tokens
    return Draw(sequence.sampling, num_output, sequence.adjustment)
