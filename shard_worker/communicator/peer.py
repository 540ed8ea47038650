"""Collectives between the GPUs of one host: NCCL, and for small sums stores into each other's memory.

NCCL was measured to take about 20 µs for a sum of 8 KB, which a decoding step asks for twice a layer.
The kernel in `peer_all_reduce.cu` takes one hop over NVLink, and adds to the residual stream and
normalises as well.

What each rank needs to open the others' memory travels over gRPC (`offer`, then `connect` with those of
all ranks). Which path is the faster one for how many bytes is measured then. Where peers can't be
reached everything goes over NCCL, and `links` says why.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import CommunicatorError, Link, NormFusing, check_all_reduce
from .nccl import NcclCommunicator
from .peer_sums import SLOT_BYTES, VECTOR_BYTES, PeerMemory, PeerSums, takes_nccl, trial_timeout_s

__all__ = ["PeerCommunicator", "Reach", "choose_reach"]

_MEASURED_BYTES = (8 * 2**10, 64 * 2**10, 256 * 2**10, 2**20, 4 * 2**20, SLOT_BYTES)
_CALLS_A_GRAPH, _REPLAYS = 10, 5


@dataclass(frozen=True, slots=True)
class Reach:
    """Up to how many bytes a sum goes in one shot, and beyond that in two; the rest is NCCL's.

    `is_unbounded`: even the largest sum that was tried is faster in pieces than over NCCL.
    """

    one_shot_bytes: int = 0
    two_shot_bytes: int = 0
    is_unbounded: bool = False

    def path(self, num_bytes: int) -> str:
        """ "one_shot", "two_shot" or "nccl" """
        if num_bytes <= self.one_shot_bytes:
            return "one_shot"
        if num_bytes <= self.two_shot_bytes:
            return "two_shot"
        return "nccl"


@dataclass(frozen=True, slots=True)
class _Captured:
    """Sums as a graph, and the memory that they are of."""

    graph: torch.cuda.CUDAGraph
    x: Tensor


def choose_reach(measured: Mapping[int, Mapping[str, float]]) -> Reach:
    """Where the paths cross, from `measured[num_bytes][path]` in any unit of time, sizes ascending."""
    one_shot = two_shot = 0
    sizes = sorted(measured)
    for size in sizes:
        times = measured[size]
        if one_shot == two_shot and times["one_shot"] == min(times.values()):
            one_shot = two_shot = size
        elif times["two_shot"] <= times["nccl"]:
            two_shot = size
        else:
            break
    return Reach(one_shot, two_shot, bool(sizes) and two_shot == sizes[-1])


class PeerCommunicator(NcclCommunicator):
    """Ranks on the GPUs of one host. Made by `join`; small sums are NCCL's until `connect`."""

    transport = "peer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """For `join`."""
        super().__init__(*args, **kwargs)
        self.reach = Reach()
        self._sums: PeerSums | None = None

    def offer(self, memory: PeerMemory) -> bytes:
        """What the other ranks need to write to `memory`, which is this rank's."""
        self._sums = PeerSums(self._control, memory, op_timeout_s=self.op_timeout_s)
        return self._sums.offer

    def connect(self, offers: Sequence[bytes], timeout_s: float) -> None:
        """Connects to the peers (`PeerSums.connect`) and measures which sums are faster there. Where one
        rank fails at either, every rank takes NCCL for all, and `links` says why."""
        sums = self._sums
        assert sums is not None, "connect comes after offer"
        wait_s = trial_timeout_s(timeout_s)
        paths: Mapping[str, Callable[[Tensor], object]] = {
            "one_shot": lambda x: sums.launch(x, x, two_shot=False, timeout_s=wait_s),
            "two_shot": lambda x: sums.launch(x, x, two_shot=True, timeout_s=wait_s),
            "nccl": super().all_reduce,
        }
        links = sums.connect(offers, timeout_s)
        own: list[float] = []
        for num_bytes, path in product(_MEASURED_BYTES, paths.values()):
            if takes_nccl(links):
                break
            links, microseconds = self._measure(sums, path, num_bytes, timeout_s)
            own.append(microseconds)
        if (failure := super().failure()) is not None:
            raise failure
        if takes_nccl(links):
            self._sums = None  # whom its trials waited for in vain is no failure of NCCL's
            sums.close()
        else:
            self.reach = choose_reach(self._slowest(own, tuple(paths)))
        self.links = links

    def _slowest(self, own: Sequence[float], paths: Sequence[str]) -> dict[int, dict[str, float]]:
        """By bytes and path, of the slowest rank: equal on all ranks, so that they choose alike."""
        everyone = self._control.all_gather(torch.tensor(own), [len(own)] * self.size)
        slowest = everyone.view(self.size, -1, len(paths)).amax(0).tolist()
        return {
            num_bytes: dict(zip(paths, times, strict=True))
            for num_bytes, times in zip(_MEASURED_BYTES, slowest, strict=True)
        }

    def _measure(
        self, sums: PeerSums, path: Callable[[Tensor], object], num_bytes: int, timeout_s: float
    ) -> tuple[tuple[Link, ...], float]:
        """What it comes to (`PeerSums.agree`), and this rank's microseconds of a sum by that path."""
        captured: list[_Captured] = []
        times: list[float] = []

        def capture() -> dict[int, str]:
            captured.append(self._capture(path, num_bytes))
            return {}

        def replay() -> dict[int, str]:
            times.append(self._time(captured[0].graph))
            return {}

        # In two steps, so that nobody waits in NCCL, for ever, for a rank whose capture has failed.
        links = sums.agree(capture, timeout_s)
        if not takes_nccl(links):
            links = sums.agree(replay, timeout_s)
        return links, times[0] if times else 0.0

    def _capture(self, path: Callable[[Tensor], object], num_bytes: int) -> _Captured:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=self.device)
        path(x)  # once outside: libraries are set up by their first call
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # By default a capture fails when any other thread calls CUDA meanwhile, which it may.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_CALLS_A_GRAPH):
                path(x)
        return _Captured(graph, x)

    @staticmethod
    def _time(graph: torch.cuda.CUDAGraph) -> float:
        """Microseconds a call in the graph, the median of some replays after one that warms up."""
        times = []
        for _ in range(1 + _REPLAYS):
            began = torch.cuda.Event(enable_timing=True)
            ended = torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) * 1e3 / _CALLS_A_GRAPH)
        return statistics.median(times[1:])

    def all_reduce(self, x: Tensor) -> Tensor:
        """IN PLACE, queued; see `Communicator.all_reduce`. Terms are added in rank order where peers do
        it; where NCCL does, in its own."""
        check_all_reduce(x, self.device.type)
        if self.all_reduce_path(x.nbytes) == "nccl":
            return super().all_reduce(x)
        self._alive("all_reduce")
        assert self._sums is not None
        for piece in x.view(-1).split(SLOT_BYTES // x.itemsize):
            self._sums.launch(piece, piece, two_shot=self.reach.path(piece.nbytes) != "one_shot")
        return x

    def all_reduce_path(self, num_bytes: int) -> str:
        """ "peer" or "nccl" """
        is_peer = self.reach.is_unbounded or self.reach.path(num_bytes) != "nccl"
        return "peer" if is_peer and num_bytes % VECTOR_BYTES == 0 else "nccl"

    @property
    def all_gather_path(self) -> str:
        """NCCL's: what is gathered is too much, or too seldom, for stores to be worth it."""
        return "nccl"

    def norm_fusing(self, x: Tensor) -> NormFusing | None:
        """Itself, for what goes to peers in one piece."""
        row_bytes = x.shape[-1] * x.itemsize
        return (
            self if row_bytes % VECTOR_BYTES == 0 and self.reach.path(x.nbytes) != "nccl" else None
        )

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """One kernel, queued; see `NormFusing`. x: one that `norm_fusing` takes."""
        check_all_reduce(x, self.device.type)
        assert residual.shape == x.shape, residual.shape
        for other in (residual, weight):
            assert other.dtype == x.dtype and other.is_contiguous(), other.dtype
        self._alive("all_reduce")
        assert self._sums is not None
        out = torch.empty_like(x)
        two_shot = self.reach.path(x.nbytes) == "two_shot"
        self._sums.launch(x, out, residual, weight, eps, two_shot=two_shot)
        return out

    def failure(self) -> CommunicatorError | None:
        """Also a peer that did not come within `op_timeout_s`; see `Communicator.failure`."""
        sums = self._sums
        return (sums.failure() if sums is not None else None) or super().failure()

    def close(self) -> None:
        """Also leaves the peers' memory; see `Communicator.close`."""
        try:
            super().close()
        finally:
            if self._sums is not None:
                self._sums.close()

    def _fail(self, error: CommunicatorError) -> None:
        # An abort or a failure of NCCL's: kernels that wait for a peer must not wait for their deadline.
        sums = self._sums
        if sums is not None:
            sums.abort()
        super()._fail(error)
