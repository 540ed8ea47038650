"""Continuous batching (Yu et al., Orca, 2022): which tokens each step computes. Pure, no I/O.

A step takes tokens from running sequences first, then admits waiting ones, up to a budget of tokens;
a long prompt is computed in chunks. When blocks run out, the youngest running sequence gives its own
up and is computed anew later.

Steps run in order on the workers, so a block may be given to another sequence while a sent step still
writes to it for the last one: the new owner writes each slot before it reads it.
"""

from collections import deque
from dataclasses import dataclass

from coordinator.block_manager import BlockManager
from coordinator.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` of a sequence; `samples` when they reach the end of what is known."""

    sequence: Sequence
    num_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the workers are told of, with the tokens it had at that time."""

    sequence: Sequence
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step changes and computes; `finished` are sequence ids that the workers forget."""

    step_id: int
    finished: tuple[int, ...]
    new_sequences: tuple[NewSequence, ...]
    chunks: tuple[Chunk, ...]


class Scheduler:
    """Holds the waiting and running sequences and makes steps of them."""

    def __init__(self, blocks: BlockManager, *, max_batched_tokens: int, max_running: int) -> None:
        self.blocks = blocks
        self.max_batched_tokens = max_batched_tokens
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self._to_forget: list[int] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, finished or not, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_ids)
        if sequence.is_known_to_workers:
            self._to_forget.append(sequence.sequence_id)
            sequence.is_known_to_workers = False

    def schedule(self) -> Step | None:
        """The next step, or None when no sequence can use one now."""
        budget = self.max_batched_tokens
        chunks: list[Chunk] = []
        new: list[NewSequence] = []
        for sequence in list(self.running):
            # An earlier one may have preempted it within this very step.
            if budget and sequence in self.running and sequence.wants_step:
                chunk = self._chunk(sequence, budget)
                if chunk is not None:
                    chunks.append(chunk)
                    budget -= chunk.num_tokens
        while budget and self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if not sequence.wants_step:
                break
            num_tokens = min(sequence.num_unscheduled, budget)
            blocks = self.blocks.grow(sequence.block_ids, num_tokens)
            if blocks is None:
                break
            self.running.append(self.waiting.popleft())
            sequence.is_known_to_workers = True
            new.append(NewSequence(sequence, (*sequence.prompt, *sequence.output)))
            chunks.append(self._take(sequence, num_tokens, blocks))
            budget -= num_tokens
        if not chunks:
            return None
        self.num_steps += 1
        finished, self._to_forget = tuple(self._to_forget), []
        return Step(self.num_steps, finished, tuple(new), tuple(chunks))

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk | None:
        """The next chunk of a running sequence; None when it had to give way itself."""
        num_tokens = min(sequence.num_unscheduled, budget)
        while True:
            blocks = self.blocks.grow(sequence.block_ids, sequence.num_scheduled + num_tokens)
            if blocks is not None:
                return self._take(sequence, num_tokens, blocks)
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return None

    def _take(self, sequence: Sequence, num_tokens: int, new_block_ids: list[int]) -> Chunk:
        samples = num_tokens == sequence.num_unscheduled
        sequence.num_scheduled += num_tokens
        sequence.num_pending += samples
        return Chunk(sequence, num_tokens, tuple(new_block_ids), samples)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue, to be computed anew from its tokens."""
        self.running.remove(sequence)
        self._forget(sequence)
        sequence.num_scheduled = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
