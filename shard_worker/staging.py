"""Pinned host memory that small copies to a GPU are made from, again and again."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_STAGES = 4  # more than steps that are in flight


@dataclass(frozen=True, slots=True)
class _Stage:
    memory: Tensor
    copied: torch.cuda.Event


class Staging:
    """Room for `size` elements of `dtype`, several times over, taken in turn."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size, self._dtype = size, dtype
        self._stages: list[_Stage] = []
        self._next = 0

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[Tensor]:
        """The first `count` elements of memory that no copy reads from any more. The copy of what is
        written there is to be queued, on the current stream, before the context ends."""
        if len(self._stages) < _STAGES:
            memory = torch.empty(self._size, dtype=self._dtype, pin_memory=True)
            self._stages.append(_Stage(memory, torch.cuda.Event()))
        stage = self._stages[self._next % len(self._stages)]
        self._next += 1
        stage.copied.synchronize()
        yield stage.memory[:count]
        stage.copied.record()
