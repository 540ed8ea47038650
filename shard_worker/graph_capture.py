"""Capturing CUDA graphs: what is launched operation by operation once, and as one from then on."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shard_worker.memory_meter import MemoryMeter
from shard_worker.tensor_parallel import OpStats, TensorParallel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Graph:
    """Operations on fixed memory, among them what ranks communicate."""

    _graph: torch.cuda.CUDAGraph
    _result: Tensor
    _tp: TensorParallel
    _communicates: Sequence[OpStats]
    """What each replay does."""

    def replay(self) -> Tensor:
        """Queues all of it -> the result, always in the same memory: the next replay of any graph may
        write there."""
        self._graph.replay()
        self._tp.count(self._communicates)
        return self._result


class GraphCapture:
    """Captures graphs that share one pool of memory, so no two of them may run at once."""

    def __init__(self, device: torch.device, tp: TensorParallel, meter: MemoryMeter) -> None:
        self._device, self._tp, self._meter = device, tp, meter
        # Libraries keep memory for each stream that they ever worked on.
        self._side = torch.cuda.Stream(device)
        self._pool: Any = None

    def capture(self, name: str, launch: Callable[[], Tensor]) -> Graph:
        """A graph of what `launch` launches, and of its result. `launch` is called twice: it must be
        one that does no harm now. name: "a decode step of 8"; for the log."""
        began = time.monotonic()
        # Once outside: kernels are compiled and libraries set up by their first call.
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            launch()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        torch.cuda.synchronize(self._device)
        # The peak so far is that of steps; from here on it is the pool's.
        self._meter.look()
        counted = self._tp.all_stats()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls can spoil the capture. By default those of any thread can, and others
        # wait for results, watch NCCL and abort it meanwhile, whenever that is.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = launch()
        self._pool = graph.pool()
        self._meter.captured(self._pool)
        communicates = self._tp.take_back(counted)
        log.info("captured %s in %.2f s", name, time.monotonic() - began)
        return Graph(graph, result, self._tp, communicates)
