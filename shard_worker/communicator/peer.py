"""Collectives between the GPUs of one host: NCCL, and for small sums stores into each other's memory.

NCCL takes about 20 µs for a sum of 8 KB, which a decoding step asks for twice a layer. The kernel in
`peer_all_reduce.cu` takes one hop over NVLink, and adds to the residual stream and normalises as well.

The memory is a buffer of each rank that the others open by its CUDA IPC handle. Handles travel over
gRPC (`offer`, then `connect` with those of all ranks). Whether each pair can be written to is tried
before it is relied upon, and which path is the faster one for how many bytes is measured then. Where
peers can't be reached everything goes over NCCL, and `links` says why.
"""

from __future__ import annotations

import statistics
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from . import CommunicatorError, CommunicatorTimeout, Link, NormFusing, check_all_reduce
from .nccl import NcclCommunicator, use_device

__all__ = [
    "MAX_RANKS",
    "PeerCommunicator",
    "PeerMemory",
    "Reach",
    "choose_reach",
    "plan_launch",
]

MAX_RANKS = 8
SLOT_BYTES = 16 * 2**20
"""What a rank can be sent by one other at a time."""
TURNS = 3
"""Calls that a buffer has room for: see the kernel's source."""
EMPTY = -0x7FFF8000
"""0x80008000, the mark of a place that nothing was written to."""
# Words (int32) of the kernel's State and Mailbox.
STATE_WORDS, FAILED = 6, 5
MAILBOX_WORDS, ABORTED, MISSING = 9, 0, 1

_SOURCE = Path(__file__).with_name("peer_all_reduce.cu")
_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CHUNK_BYTES = 16
_MAX_THREADS = 1024
_PLAIN_WIDTH = 512  # chunks of a block when rows mean nothing
_OFFER = struct.Struct("<64sQ")
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


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is launched; `items` are the chunks of a thread, which it is compiled for."""

    blocks: int
    threads: int
    items: int
    arguments: tuple[Any, ...]


def plan_launch(
    x: Tensor,
    out: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    two_shot: bool,
    buffers: Sequence[int],
    rank: int,
    state: Tensor,
    mailbox: Tensor,
    timeout_s: float,
) -> Launch:
    """A launch of `peer_all_reduce`, whose source says what it does.

    x, out: contiguous, whole chunks of 16 bytes, no more than fit a slot. residual, weight: both or
    neither. buffers: the address of each rank's memory. state, mailbox: int32, this rank's.
    """
    chunks = x.nbytes // _CHUNK_BYTES
    assert 0 < x.nbytes <= SLOT_BYTES and x.nbytes % _CHUNK_BYTES == 0, x.nbytes
    width = _PLAIN_WIDTH if weight is None else weight.nbytes // _CHUNK_BYTES
    threads = min(-(-width // 32) * 32, _MAX_THREADS)
    arguments = (
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        out.data_ptr(),
        np.uint32(chunks),
        np.uint32(width),
        np.float32(eps),
        np.int32(two_shot),
        buffers[rank],
        *buffers,
        *[0] * (MAX_RANKS - len(buffers)),
        np.uint32(SLOT_BYTES // _CHUNK_BYTES),
        np.int32(rank),
        state.data_ptr(),
        mailbox.data_ptr(),
        np.uint64(timeout_s * 1e9),
    )
    return Launch(-(-chunks // width), threads, -(-width // threads), arguments)


class PeerMemory:
    """This rank's buffer that its peers write to.

    It outlives the groups that use it: memory that another process still has open must not be freed.
    """

    def __init__(self, pointer: int, size: int, handle: bytes, device: torch.device) -> None:
        """For `allocate`."""
        self.pointer, self.size, self.handle, self.device = pointer, size, handle, device

    @property
    def num_bytes(self) -> int:
        return TURNS * self.size * SLOT_BYTES

    @classmethod
    def allocate(cls, size: int, device: torch.device) -> Self:
        """Room for a group of `size` ranks. CommunicatorError where the device refuses it."""
        runtime = use_device(device).cuda.runtime
        memory = cls(0, size, b"", device)
        try:
            memory.pointer = runtime.malloc(memory.num_bytes)
            memory.handle = bytes(runtime.ipcGetMemHandle(memory.pointer))
        except runtime.CUDARuntimeError as error:
            raise CommunicatorError(f"peer memory: {memory.num_bytes} bytes: {error}") from error
        return memory

    def free(self) -> None:
        """When no other process uses it any more."""
        runtime = use_device(self.device).cuda.runtime
        runtime.free(self.pointer)

    def tensor(self) -> Tensor:
        """int32 [num_bytes / 4], the memory itself."""

        view = SimpleNamespace(
            __cuda_array_interface__={
                "data": (self.pointer, False),
                "shape": (self.num_bytes // 4,),
                "typestr": "<i4",
                "version": 3,
            }
        )
        return torch.as_tensor(view, device=self.device)


class PeerCommunicator(NcclCommunicator):
    """Ranks on the GPUs of one host. Made by `join`; small sums are NCCL's until `connect`."""

    transport = "peer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """For `join`."""
        super().__init__(*args, **kwargs)
        assert self.size <= MAX_RANKS, self.size
        self.reach = Reach()
        self._memory: PeerMemory | None = None
        self._opened: list[int] = []
        self._buffers: tuple[int, ...] = ()
        self._kernels: dict[tuple[torch.dtype, int], Any] = {}
        self._streams: dict[int, Any] = {}

    # --- before it is used

    def offer(self, memory: PeerMemory) -> bytes:
        """What the other ranks need to write to this one's memory."""
        self._memory = memory
        self._state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=self.device)
        self._mailbox = torch.zeros(MAILBOX_WORDS, dtype=torch.int32, pin_memory=True)
        self._words = self._mailbox.numpy()
        return _OFFER.pack(memory.handle, memory.num_bytes)

    def connect(self, offers: Sequence[bytes], timeout_s: float) -> None:
        """Opens the other ranks' memory, tries it, and measures what to use it for.

        offers: of all ranks, in order; an empty one is of a rank that has none. Every rank calls it at
        the same time, and all come to the same decision: peers, or NCCL for everything.

        Raises as collectives do; CommunicatorTimeout when a rank does not take part.
        """
        assert self._memory is not None, "connect comes after offer"
        problems = self._open(offers)
        if self._agree(problems, timeout_s):
            problems = self._try_pairs(timeout_s)
        if self._agree(problems, timeout_s):
            problems = self._try_sums(timeout_s)
        if not self._agree(problems, timeout_s):
            self.reach = Reach()
            self._close_peers()
            return
        self.reach = choose_reach(self._measure(timeout_s))

    def _agree(self, problems: Mapping[int, str], timeout_s: float) -> bool:
        """Whether no rank has a problem; `links` are set to say which ones this rank has."""
        mine = torch.zeros(self.size)
        for peer in problems:
            mine[peer] = 1
        everyone = self._control.all_gather(mine, [self.size] * self.size).view(self.size, -1)
        self._control.barrier(timeout_s)
        is_well = not bool(everyone.any())
        peers = [peer for peer in range(self.size) if peer != self.rank]
        elsewhere = [rank for rank in range(self.size) if everyone[rank].any()]
        self.links = tuple(
            Link(peer, "peer")
            if is_well
            else Link(
                peer,
                "nccl",
                problems.get(peer)
                or f"rank {', '.join(map(str, elsewhere))} can't reach its peers",
            )
            for peer in peers
        )
        return is_well

    def _open(self, offers: Sequence[bytes]) -> dict[int, str]:
        """Problems by rank."""
        runtime = use_device(self.device).cuda.runtime
        assert self._memory is not None
        problems: dict[int, str] = {}
        buffers = []
        for rank, offer in enumerate(offers):
            if rank == self.rank:
                buffers.append(self._memory.pointer)
                continue
            buffers.append(0)
            if len(offer) != _OFFER.size:
                problems[rank] = "it offers no memory"
                continue
            handle, num_bytes = _OFFER.unpack(offer)
            if num_bytes != self._memory.num_bytes:
                problems[rank] = f"it offers {num_bytes} bytes, not {self._memory.num_bytes}"
                continue
            try:
                buffers[rank] = runtime.ipcOpenMemHandle(handle)
                self._opened.append(buffers[rank])
            except runtime.CUDARuntimeError as error:
                problems[rank] = f"its CUDA IPC handle can't be opened: {error}"
        self._buffers = tuple(buffers)
        return problems

    def _empty(self) -> None:
        """This rank's memory as it is before the first call."""
        assert self._memory is not None
        self._memory.tensor().fill_(EMPTY)
        torch.cuda.synchronize(self.device)

    def _try_pairs(self, timeout_s: float) -> dict[int, str]:
        """Each rank writes to each other one, which looks at what came. Problems by rank."""
        runtime = use_device(self.device).cuda.runtime
        problems: dict[int, str] = {}
        for peer, pointer in enumerate(self._buffers):
            if peer == self.rank:
                continue
            sent = torch.full((4,), self._pattern(self.rank, peer), dtype=torch.int32)
            sent = sent.to(self.device)
            try:
                to = pointer + self.rank * SLOT_BYTES
                runtime.memcpy(to, sent.data_ptr(), sent.nbytes, runtime.memcpyDefault)
                torch.cuda.synchronize(self.device)
            except (runtime.CUDARuntimeError, RuntimeError) as error:
                problems[peer] = f"it can't be written to: {error}"
        self._control.barrier(timeout_s)
        assert self._memory is not None
        memory = self._memory.tensor()
        for peer in range(self.size):
            at = peer * SLOT_BYTES // 4
            got = memory[at : at + 4].tolist()
            if peer != self.rank and got != [self._pattern(peer, self.rank)] * 4:
                problems.setdefault(peer, "what it wrote did not come")
        self._empty()
        self._control.barrier(timeout_s)
        return problems

    @staticmethod
    def _pattern(source: int, target: int) -> int:
        return 0x5A000000 + source * 256 + target

    def _try_sums(self, timeout_s: float) -> dict[int, str]:
        """The kernel against NCCL, on whole numbers, whose sums have no rounding."""
        generator = torch.Generator().manual_seed(self.rank)
        wrong: list[str] = []
        for count in (512, 32 * 1024 - 8):
            x = torch.randint(-9, 10, (count,), generator=generator)
            x = x.to(self.device, torch.bfloat16)
            expected = super().all_reduce(x.clone())
            for two_shot in (False, True):
                got = x.clone()
                self._launch(got, got, two_shot=two_shot)
                if not torch.equal(got, expected):
                    wrong.append(f"{count} numbers in {'two shots' if two_shot else 'one shot'}")
        if (error := self.failure()) is not None:
            wrong.append(str(error))
        if not wrong:
            return {}
        problem = f"sums are wrong: {'; '.join(wrong)}"
        return {peer: problem for peer in range(self.size) if peer != self.rank}

    def _measure(self, timeout_s: float) -> dict[int, dict[str, float]]:
        """Microseconds of a sum by bytes and path; of the slowest rank, equal on all of them."""
        paths: Mapping[str, Callable[[Tensor], object]] = {
            "one_shot": lambda x: self._launch(x, x, two_shot=False),
            "two_shot": lambda x: self._launch(x, x, two_shot=True),
            "nccl": super().all_reduce,
        }
        measured: dict[int, dict[str, float]] = {}
        for num_bytes in _MEASURED_BYTES:
            x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=self.device)
            own = torch.tensor([self._time(path, x, timeout_s) for path in paths.values()])
            everyone = self._control.all_gather(own, [len(paths)] * self.size)
            slowest = everyone.view(self.size, -1).amax(0).tolist()
            measured[num_bytes] = dict(zip(paths, slowest, strict=True))
        return measured

    def _time(self, path: Callable[[Tensor], object], x: Tensor, timeout_s: float) -> float:
        """Microseconds a call, in a graph, the median of some replays."""
        path(x)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS_A_GRAPH):
                path(x)
        times = []
        self._control.barrier(timeout_s)
        for _ in range(_REPLAYS):
            began = torch.cuda.Event(enable_timing=True)
            ended = torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) * 1e3 / _CALLS_A_GRAPH)
        return statistics.median(times)

    # --- serving

    def all_reduce(self, x: Tensor) -> Tensor:
        """IN PLACE, queued; see `Communicator.all_reduce`. Terms are added in rank order where peers do
        it; where NCCL does, in its own."""
        check_all_reduce(x, "cuda")
        if self.all_reduce_path(x.nbytes) == "nccl":
            return super().all_reduce(x)
        self._alive("all_reduce")
        assert x.data_ptr() % _CHUNK_BYTES == 0, x.data_ptr()
        for piece in x.view(-1).split(SLOT_BYTES // x.itemsize):
            self._launch(piece, piece, two_shot=self.reach.path(piece.nbytes) != "one_shot")
        return x

    def norm_fusing(self, x: Tensor) -> NormFusing | None:
        """Itself, for what goes to peers in one piece."""
        row_bytes = x.shape[-1] * x.itemsize
        is_whole = row_bytes % _CHUNK_BYTES == 0 and x.data_ptr() % _CHUNK_BYTES == 0
        return self if is_whole and self.reach.path(x.nbytes) != "nccl" else None

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """One kernel, queued; see `NormFusing`. x: one that `norm_fusing` takes."""
        check_all_reduce(x, "cuda")
        for other in (residual, weight):
            assert other.dtype == x.dtype and other.is_contiguous(), other.dtype
            assert other.data_ptr() % _CHUNK_BYTES == 0, other.data_ptr()
        assert residual.shape == x.shape, residual.shape
        self._alive("all_reduce")
        out = torch.empty_like(x)
        two_shot = self.reach.path(x.nbytes) == "two_shot"
        self._launch(x, out, residual, weight, eps, two_shot=two_shot)
        return out

    def all_reduce_path(self, num_bytes: int) -> str:
        """ "peer" or "nccl" """
        is_peer = self.reach.is_unbounded or self.reach.path(num_bytes) != "nccl"
        return "peer" if is_peer and num_bytes % _CHUNK_BYTES == 0 else "nccl"

    def _launch(
        self,
        x: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        *,
        two_shot: bool,
    ) -> None:
        """Queues the kernel; see `plan_launch`."""
        launch = plan_launch(
            x,
            out,
            residual,
            weight,
            eps,
            two_shot=two_shot,
            buffers=self._buffers,
            rank=self.rank,
            state=self._state,
            mailbox=self._mailbox,
            timeout_s=self.op_timeout_s,
        )
        kernel = self._kernel(x.dtype, launch.items)
        kernel((launch.blocks,), (launch.threads,), launch.arguments, stream=self._stream())

    def _kernel(self, dtype: torch.dtype, items: int) -> Any:
        if (kernel := self._kernels.get((dtype, items))) is None:
            defined = {"RANKS": self.size, "ELEMENT": _ELEMENTS[dtype], "ITEMS": items}
            module = use_device(self.device).RawModule(
                code=_SOURCE.read_text(),
                options=("-std=c++17", *(f"-D{name}={value}" for name, value in defined.items())),
            )
            kernel = self._kernels[dtype, items] = module.get_function("peer_all_reduce")
        return kernel

    def _stream(self) -> Any:
        """torch's current stream as CuPy knows it."""
        stream = torch.cuda.current_stream(self.device)
        if (known := self._streams.get(stream.cuda_stream)) is None:
            known = use_device(self.device).cuda.Stream.from_external(stream)
            self._streams[stream.cuda_stream] = known
        return known

    # --- the end

    def failure(self) -> CommunicatorError | None:
        """Also a peer that did not come within `op_timeout_s`; see `Communicator.failure`."""
        if self._buffers:
            missing = [rank for rank in range(self.size) if self._words[MISSING + rank]]
            if missing:
                return CommunicatorTimeout("all_reduce", missing, self.op_timeout_s)
        return super().failure()

    def abort(self) -> None:
        """Also ends the kernels that wait for peers; see `Communicator.abort`."""
        if self._buffers:
            self._words[ABORTED] = 1
        super().abort()

    def close(self) -> None:
        """Leaves the other ranks' memory; see `Communicator.close`. This rank's stays (`PeerMemory`)."""
        super().close()
        self._close_peers()

    def _close_peers(self) -> None:
        self._buffers = ()
        runtime = use_device(self.device).cuda.runtime
        torch.cuda.synchronize(self.device)
        while self._opened:
            runtime.ipcCloseMemHandle(self._opened.pop())
