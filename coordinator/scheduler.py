"""Continuous batching (Yu et al., Orca, 2022): which tokens each step computes. Pure, no I/O.

Every running sequence that decodes gets its token in every step. What is left of the step's budget of
tokens goes to prompts, in chunks, in the order of `Sequence.rank`: so a stream of long prompts holds up
neither those that decode nor those that came before it. When blocks run out, the last running
sequence in that order gives its own up and is computed anew later.

Steps run in order on the workers, so a block may be given to another sequence while a sent step still
writes to it for the last one: the new owner writes each slot before it reads it. For the same reason a
block may be found in the prefix cache as soon as the step that fills it is made.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.block_manager import BlockManager
from coordinator.sequence import Sequence, TokenLogprobs


class Chunk(NamedTuple):
    """The next `num_tokens` of a sequence; `samples` when they reach the end of what is known.

    A tuple, since one is made for every running sequence in every step.
    """

    sequence: Sequence
    num_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the workers are told of, with the tokens it has by now.

    `cached_block_ids` are full blocks of the cache that hold its first tokens already.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    cached_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step changes and computes; `finished` are sequence ids that the workers forget."""

    step_id: int
    finished: tuple[int, ...]
    new_sequences: tuple[NewSequence, ...]
    chunks: tuple[Chunk, ...]
    times_collectives: bool = False


@dataclass(frozen=True, slots=True)
class SequenceLogprobs:
    """Of consecutive tokens of one sequence; `start` is the position of the first, prompt included."""

    sequence_id: int
    start: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class TimedCollective:
    """One call of a collective on one rank; the time includes waiting for the other ranks."""

    operation: str
    module: str
    path: str
    payload_bytes: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class RankTimes:
    """How long a rank took for a step, and where it was to say so for its collectives, in order."""

    duration_us: int
    collectives: tuple[TimedCollective, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step sampled, by sequence id, and the log-probabilities that were asked for."""

    tokens: Mapping[int, int]
    logprobs: tuple[SequenceLogprobs, ...] = ()
    by_rank: tuple[RankTimes, ...] = ()


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class Scheduler:
    """Holds the waiting and running sequences, both in the order of rank, and makes steps of them."""

    def __init__(self, blocks: BlockManager, *, max_batched_tokens: int, max_running: int) -> None:
        assert max_running <= max_batched_tokens, "not every running sequence would get its token"
        self.blocks = blocks
        self.max_batched_tokens = max_batched_tokens
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_steps = 0
        self._last_step_id = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._to_forget: list[int] = []
        # The first that waits, and how many blocks were free when they were too few for it.
        self._blocked: tuple[Sequence, int] | None = None

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, finished or not, and frees its blocks. Once more does nothing."""
        for queue in (self.running, self.waiting):
            place = bisect.bisect_left(queue, sequence.rank, key=_rank)
            if place < len(queue) and queue[place] is sequence:
                del queue[place]
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        # What it had computed may be the beginning of another one, or of itself, later on.
        self._cache(sequence)
        self.blocks.release(sequence.table)
        sequence.num_scheduled = 0
        if sequence.is_known_to_workers:
            self._to_forget.append(sequence.sequence_id)
            sequence.is_known_to_workers = False

    def schedule(self) -> Step | None:
        """The next step, or None when no sequence can use one now."""
        preemptions = self.num_preemptions
        chunks, budget = self._continue_running()
        new: list[NewSequence] = []
        # Where one had just to give way, another would have to do so soon.
        if preemptions == self.num_preemptions:
            while budget and self.waiting and len(self.running) < self.max_running:
                sequence = self.waiting[0]
                admitted = self._admit(sequence)
                if admitted is None:
                    break
                new.append(admitted)
                num_tokens = min(sequence.num_unscheduled, budget)
                new_blocks = sequence.table.block_ids[len(admitted.cached_block_ids) :]
                chunks.append(self._take(sequence, num_tokens, new_blocks))
                budget -= num_tokens
        if not chunks:
            return None
        self.num_steps += 1
        self._last_step_id += 1
        finished, self._to_forget = tuple(self._to_forget), []
        return Step(self._last_step_id, finished, tuple(new), tuple(chunks))

    def restart(self) -> None:
        """The workers know nothing any more: all is computed anew, from the tokens that were read.

        Steps are counted from 1 again.
        """
        self.blocks.clear()
        self.waiting = sorted((*self.running, *self.waiting), key=_rank)
        self.running = []
        for sequence in self.waiting:
            sequence.restart()
        self._to_forget = []
        self._blocked = None
        self._last_step_id = 0

    def _continue_running(self) -> tuple[list[Chunk], int]:
        """Chunks of the running sequences, and how many tokens the step has left."""
        chunks: list[Chunk] = []
        budget = self.max_batched_tokens
        reserved = sum([s.num_tokens - s.num_scheduled == 1 for s in self.running])
        block_size = self.blocks.block_size
        place = 0
        # By place: sequences that give way go from the end, where none has a chunk yet.
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            num_tokens = sequence.num_tokens - sequence.num_scheduled
            decodes = num_tokens == 1
            if decodes:
                reserved -= 1
            else:
                num_tokens = min(num_tokens, budget - reserved)
            if not num_tokens or sequence.num_tokens >= sequence.max_num_tokens:
                continue
            budget -= num_tokens
            stop = sequence.num_scheduled + num_tokens
            if decodes and stop <= len(sequence.table.block_ids) * block_size:
                # What `_take` does, for the many that decode: their blocks are cached when the next
                # one is needed.
                sequence.num_scheduled = stop
                sequence.num_tokens += 1
                chunks.append(Chunk(sequence, 1, (), True))
                continue
            new_blocks = self._grow(sequence, stop)
            if new_blocks is None:
                break
            chunks.append(self._take(sequence, num_tokens, new_blocks))
        return chunks, budget

    def _grow(self, sequence: Sequence, num_tokens: int) -> list[int] | None:
        """New blocks of a running sequence; None when it had to give way itself."""
        while True:
            blocks = self.blocks.grow(sequence.table, num_tokens)
            if blocks is not None:
                return blocks
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return None

    def _admit(self, sequence: Sequence) -> NewSequence | None:
        """Moves the first waiting sequence to the running ones, if there are blocks for all of it."""
        if not sequence.wants_step or self._is_blocked(sequence):
            return None
        table, tokens = sequence.table, sequence.known_tokens
        hits = 0
        # What is not computed has no logits, so one that wants them for its prompt takes nothing over.
        if sequence.sampling.prompt_logprobs is None:
            hits = self.blocks.attach(table, tokens)
        cached = tuple(table.block_ids)
        if self.blocks.grow(table, len(tokens)) is None:
            self.blocks.release(table)
            self._blocked = sequence, self.blocks.num_free
            return None
        self._blocked = None
        del self.waiting[0]
        bisect.insort(self.running, sequence, key=_rank)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_prefix_hits = hits
            self.num_prefix_queries += len(tokens)
            self.num_prefix_hits += hits
        sequence.num_scheduled = hits
        sequence.is_known_to_workers = True
        return NewSequence(sequence, tokens, cached)

    def _is_blocked(self, sequence: Sequence) -> bool:
        """There were too few blocks for it, and there are not more since.

        To find that out anew in every step would be to look its whole prefix up each time. More of that
        may be found meanwhile, but only in blocks that running ones have taken from the free ones.
        """
        if self._blocked is None or self._blocked[0] is not sequence:
            return False
        return self.blocks.num_free <= self._blocked[1]

    def _take(self, sequence: Sequence, num_tokens: int, new_block_ids: list[int]) -> Chunk:
        """The chunk of so many more tokens; what it fills can be found by others from now on."""
        sequence.num_scheduled += num_tokens
        samples = sequence.num_scheduled == sequence.num_tokens
        if samples:
            sequence.num_tokens += 1
        self._cache(sequence)
        return Chunk(sequence, num_tokens, tuple(new_block_ids), samples)

    def _cache(self, sequence: Sequence) -> None:
        """Makes its new blocks findable that are full with known and computed tokens."""
        size = self.blocks.block_size
        start = sequence.table.num_cached * size
        stop = min(sequence.num_known, sequence.num_scheduled) // size * size
        if self.blocks.prefix_caching and start < stop:
            self.blocks.cache(sequence.table, sequence.tokens(start, stop))

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed anew from its tokens."""
        self.running.remove(sequence)
        self._forget(sequence)
        bisect.insort(self.waiting, sequence, key=_rank)
        self.num_preemptions += 1
