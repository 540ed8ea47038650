"""What this rank's memory goes to, as its device thread measures it."""

from dataclasses import replace
from typing import Any

import torch

from colrow.memory import MemoryLedger, MemoryUse


class MemoryMeter:
    """Keeps the ledger of one worker. The device thread measures; any thread may read `ledger`.

    On a GPU torch's allocator tells what was given out and the most that ever was. A CPU has no such
    account: what can't be counted there stays unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self.ledger = MemoryLedger()
        self._before = 0  # given out before weights or cache were
        self._kept = 0  # given out for good: what is beyond it a step takes and gives back
        self._without_graphs = 0  # of that
        self._shared = 0  # by graphs, beside their pool
        self._peak = 0

    def _given_out(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._is_gpu else 0

    def loading(self, num_bytes: int) -> None:
        """So many bytes of weights are about to be allocated."""
        self._before = self._given_out()
        self.ledger = MemoryLedger(weights=MemoryUse(num_bytes))

    def loaded(self, num_bytes: int) -> None:
        """Weights are in place; `num_bytes` is what their tensors take, layouts and all."""
        held = self._given_out() - self._before if self._is_gpu else num_bytes
        self.ledger = replace(self.ledger, weights=replace(self.ledger.weights, actual=held))

    def allocating(self) -> None:
        """A KV cache is about to be allocated."""
        self.left()
        self._before = self._given_out()

    def allocated(self, num_bytes: int, graphs: int | None, workspace: int | None) -> None:
        """A KV cache of `num_bytes` is there; what is planned beside it. Steps begin."""
        self._kept = self._without_graphs = self._given_out()
        self._peak = 0
        held = self._kept - self._before if self._is_gpu else None
        self.ledger = replace(
            self.ledger,
            kv_cache=MemoryUse(num_bytes, held),
            graphs=MemoryUse(graphs, 0),
            workspace=MemoryUse(workspace),
        )
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def prepared(self) -> None:
        """What all graphs read from and write to is there."""
        self._shared = self._given_out() - self._kept
        self._kept = self._without_graphs = self._given_out()
        self.ledger = replace(self.ledger, graphs=replace(self.ledger.graphs, actual=self._shared))

    def look(self) -> None:
        """Takes down the most that a step took so far."""
        if not self._is_gpu or self.ledger.kv_cache == MemoryUse():
            return
        most = torch.cuda.max_memory_allocated(self._device) - self._kept
        self._peak = max(self._peak, most)
        workspace = replace(self.ledger.workspace, actual=self._peak)
        self.ledger = replace(self.ledger, workspace=workspace)

    def captured(self, pool: Any) -> None:
        """A graph was captured into this memory pool, which all graphs share. `look` comes before."""
        segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == pool]
        # What capturing gives back the pool keeps, for the next replay to write to.
        held = self._shared + sum(segment["total_size"] for segment in segments)
        self._kept = self._without_graphs + sum(s["allocated_size"] for s in segments)
        self.ledger = replace(self.ledger, graphs=replace(self.ledger.graphs, actual=held))
        # The peak of a capture is the pool's.
        torch.cuda.reset_peak_memory_stats(self._device)

    def left(self) -> None:
        """The cache is given up, and all that steps needed."""
        self.ledger = MemoryLedger(weights=self.ledger.weights)
