"""Ranks that are threads of the test: each a `TensorParallel` whose collectives look at the others'."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from shard_worker.communicator import Communicator
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.tensor_parallel import TensorParallel

T = TypeVar("T")


class Meeting:
    """Where threads that play the ranks of a group put what they exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=10)
        self.pieces: list[tuple[str, Tensor]] = [("", torch.empty(0))] * size


class ThreadCommunicator(Communicator):
    """A rank that is a thread. Ranks that diverge fail here, as over any transport."""

    transport = "threads"

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size, op_timeout_s=10.0)
        self._meeting = meeting

    def _exchange(self, op: str, x: Tensor) -> list[Tensor]:
        self._meeting.pieces[self.rank] = (op, x.clone())
        self._meeting.barrier.wait()
        pieces = list(self._meeting.pieces)
        self._meeting.barrier.wait()
        assert {(o, p.dtype, p.shape[:-1]) for o, p in pieces} == {(op, x.dtype, x.shape[:-1])}
        return [piece for _, piece in pieces]

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        pieces = self._exchange("all_gather", x)
        assert [piece.shape[-1] for piece in pieces] == list(sizes)
        return torch.cat(pieces, dim=-1)

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._exchange("all_reduce", x)
        x.copy_(first)
        for other in others:
            x.add_(other)
        return x

    def barrier(self, timeout_s: float) -> None:
        self._meeting.barrier.wait(timeout_s)

    def abort(self) -> None:
        self._meeting.barrier.abort()

    def close(self) -> None:
        pass


def run_ranks(size: int, function: Callable[[TensorParallel], T]) -> list[T]:
    """What `function` gives on each of `size` ranks."""
    if size == 1:
        return [function(TensorParallel(0, 1, SingleCommunicator()))]
    meeting = Meeting(size)

    def one(rank: int) -> T:
        try:
            return function(TensorParallel(rank, size, ThreadCommunicator(rank, size, meeting)))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(one, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
        # A barrier that broke is what the others see of the first error.
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
