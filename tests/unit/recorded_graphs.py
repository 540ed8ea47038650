"""CUDA graphs where there is no GPU: operations on the CPU, recorded as a stream captures them.

A recorded graph runs the same operations on the same memory again and writes results to where they were
first: numbers of the host are those of the capture, numbers of tensors those of now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a capture refuses: to bring numbers from the host, and to wait for those of the device.
_WAITS = ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero")


class RecordedGraph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`; operations within it as a context are captured."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self.own_pool: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in _WAITS, f"{func} in a graph"
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, kept in self._operations:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(kept), tree_leaves(again), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(value)

    def pool(self) -> Any:
        return self.own_pool


class RecordingCuda:
    """What of `torch.cuda` graphs need. `calls` are those that matter, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.num_captured = 0
        self.num_pools = 0
        self._main = _Stream(self, "main")
        empty = torch.empty
        for target, name, stand_in in (
            (torch.cuda, "Stream", lambda device: _Stream(self, "side")),
            (torch.cuda, "current_stream", lambda device: self._main),
            (torch.cuda, "stream", self._on),
            (torch.cuda, "synchronize", lambda device: self.calls.append("synchronize")),
            (torch.cuda, "CUDAGraph", RecordedGraph),
            (torch.cuda, "graph", self._graph),
            (torch.cuda, "Event", lambda: _Event(self)),
            (torch, "empty", lambda *sizes, pin_memory=False, **rest: empty(*sizes, **rest)),
        ):
            monkeypatch.setattr(target, name, stand_in)

    @contextlib.contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        self.calls.append(f"on {stream.name}")
        yield

    @contextlib.contextmanager
    def _graph(self, graph: RecordedGraph, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.calls.append(f"capture, {capture_error_mode}")
        if pool is None:
            self.num_pools += 1
            pool = (0, self.num_pools)
        graph.own_pool = pool
        with graph:
            yield
        self.num_captured += 1
        self.calls.append("captured")


class _Stream:
    def __init__(self, cuda: RecordingCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: _Stream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")


class _Event:
    def __init__(self, cuda: RecordingCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.calls.append(f"record {id(self)}")

    def synchronize(self) -> None:
        self.cuda.calls.append(f"wait {id(self)}")
