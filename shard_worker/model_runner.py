"""Turns a step of the schedule into a forward pass, and its logits into tokens.

The runner knows each sequence's tokens, how many of them are computed, and its block table. A sampled
token is appended here and is the next step's input, so a step can be sent before the last one's
tokens were read.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colrow.errors import InvalidArgument
from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PrefillSpan
from shard_worker.kv_cache import KvCache
from shard_worker.models import Model
from shard_worker.sampler import Draw, Sampler, Sampling


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the runner does not know: its prompt, and what it had generated before."""

    sequence_id: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sampling: Sampling


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
class StepResult:
    """The sampled token of each sequence that sampled, in the order of the chunks."""

    step_id: int
    sequence_ids: Sequence[int]
    token_ids: Sequence[int]
    duration_us: int


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    block_ids: list[int]
    num_computed: int = 0


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
        self._admit(step)
        # Decoding sequences stand last: their attention is one operation.
        chunks = sorted(step.chunks, key=self._is_decode)
        sampling = [chunk for chunk in chunks if self._reaches_end(chunk)]
        tokens: list[int] = []
        if chunks:
            hidden = self.model(self._batch(chunks))
            if sampling:
                rows = self._last_rows(chunks)
                logits = self.model.lm_head(hidden[rows])
                tokens = self.sampler(logits, [self._draw(chunk) for chunk in sampling])
        for chunk in chunks:
            self._sequences[chunk.sequence_id].num_computed += chunk.num_tokens
        sampled = {chunk.sequence_id: token for chunk, token in zip(sampling, tokens, strict=True)}
        for sequence_id, token in sampled.items():
            self._sequences[sequence_id].token_ids.append(token)
        ordered = [c.sequence_id for c in step.chunks if c.sequence_id in sampled]
        return StepResult(
            step_id=step.step_id,
            sequence_ids=ordered,
            token_ids=[sampled[sequence_id] for sequence_id in ordered],
            duration_us=(time.perf_counter_ns() - began) // 1000,
        )

    def _admit(self, step: Step) -> None:
        """Checks the step and takes over what it changes."""
        known = self._sequences.keys() - set(step.finished)
        fresh: dict[int, NewSequence] = {}
        for new in step.new_sequences:
            field = f"new_sequences[{new.sequence_id}]"
            if new.sequence_id in known or new.sequence_id in fresh:
                raise InvalidArgument(field, new.sequence_id, "is known already")
            if not 0 < new.num_prompt_tokens <= len(new.token_ids):
                raise InvalidArgument(
                    f"{field}.num_prompt_tokens",
                    new.num_prompt_tokens,
                    f"there are {len(new.token_ids)} tokens",
                )
            for token in new.token_ids:
                if not 0 <= token < self.vocab_size:
                    raise InvalidArgument(
                        f"{field}.token_ids", token, f"the vocabulary has {self.vocab_size} ids"
                    )
            fresh[new.sequence_id] = new
        seen = set()
        for chunk in step.chunks:
            field = f"chunks[{chunk.sequence_id}]"
            if chunk.sequence_id in seen:
                raise InvalidArgument(field, chunk.sequence_id, "has two chunks in one step")
            seen.add(chunk.sequence_id)
            if chunk.sequence_id in fresh:
                num_tokens, computed, blocks = len(fresh[chunk.sequence_id].token_ids), 0, 0
            elif chunk.sequence_id in known:
                state = self._sequences[chunk.sequence_id]
                num_tokens, computed = len(state.token_ids), state.num_computed
                blocks = len(state.block_ids)
            else:
                raise InvalidArgument(field, chunk.sequence_id, "is not known")
            if not 0 < chunk.num_tokens <= num_tokens - computed:
                raise InvalidArgument(
                    f"{field}.num_tokens",
                    chunk.num_tokens,
                    f"{num_tokens - computed} tokens are left to compute",
                )
            room = (blocks + len(chunk.new_block_ids)) * self.kv_cache.block_size
            if computed + chunk.num_tokens > room:
                raise InvalidArgument(
                    f"{field}.new_block_ids",
                    list(chunk.new_block_ids),
                    f"{computed + chunk.num_tokens} tokens need more blocks",
                )
            for block in chunk.new_block_ids:
                if not 0 <= block < self.kv_cache.num_blocks:
                    raise InvalidArgument(
                        f"{field}.new_block_ids",
                        block,
                        f"the cache has {self.kv_cache.num_blocks} blocks",
                    )
        for sequence_id in step.finished:
            self._sequences.pop(sequence_id, None)
        for new in step.new_sequences:
            self._sequences[new.sequence_id] = _Sequence(
                list(new.token_ids), new.num_prompt_tokens, new.sampling, []
            )
        for chunk in step.chunks:
            self._sequences[chunk.sequence_id].block_ids.extend(chunk.new_block_ids)

    def _is_decode(self, chunk: Chunk) -> bool:
        return chunk.num_tokens == 1 and self._sequences[chunk.sequence_id].num_computed > 0

    def _reaches_end(self, chunk: Chunk) -> bool:
        sequence = self._sequences[chunk.sequence_id]
        return sequence.num_computed + chunk.num_tokens == len(sequence.token_ids)

    def _draw(self, chunk: Chunk) -> Draw:
        sequence = self._sequences[chunk.sequence_id]
        return Draw(sequence.sampling, len(sequence.token_ids) - sequence.num_prompt_tokens)

    def _last_rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """The batch rows whose next token is sampled, in the order of the chunks."""
        rows, stop = [], 0
        for chunk in chunks:
            stop += chunk.num_tokens
            if self._reaches_end(chunk):
                rows.append(stop - 1)
        return torch.tensor(rows)

    def _batch(self, chunks: Sequence[Chunk]) -> ForwardBatch:
        size = self.kv_cache.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        prefills = []
        decoding: list[_Sequence] = []
        for chunk in chunks:
            sequence = self._sequences[chunk.sequence_id]
            start, stop = sequence.num_computed, sequence.num_computed + chunk.num_tokens
            blocks = sequence.block_ids
            if self._is_decode(chunk):
                decoding.append(sequence)
            else:
                used = torch.tensor(blocks[: -(-stop // size)])
                at = len(token_ids)
                prefills.append(PrefillSpan(at, at + chunk.num_tokens, start, used))
            token_ids.extend(sequence.token_ids[start:stop])
            positions.extend(range(start, stop))
            slots.extend(blocks[p // size] * size + p % size for p in range(start, stop))
        decode = None
        if decoding:
            tables = [s.block_ids[: s.num_computed // size + 1] for s in decoding]
            width = max(map(len, tables))
            decode = DecodeSpan(
                start=len(token_ids) - len(decoding),
                block_ids=torch.tensor([t + [0] * (width - len(t)) for t in tables]),
                context_lens=torch.tensor([s.num_computed + 1 for s in decoding]),
                block_size=size,
            )
        return ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            prefills=tuple(prefills),
            decode=decode,
            kv_cache=self.kv_cache,
        )
