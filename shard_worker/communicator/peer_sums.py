"""Sums over the GPUs of a host by stores into each other's memory, without NCCL.

A rank's memory is a buffer that the others open by its CUDA IPC handle. Every pair is written to, and
sums are verified, before any is relied upon (`PeerSums.connect`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from colrow import MAX_PEERS

from . import CommunicatorError, CommunicatorTimeout, Link
from .gloo import GlooCommunicator
from .nccl import use_device

__all__ = ["SLOT_BYTES", "VECTOR_BYTES", "PeerMemory", "PeerSums", "plan_launch"]

SLOT_BYTES = 16 * 2**20
"""What a rank can be sent by one other at a time."""
VECTOR_BYTES = 16
"""What is summed are whole vectors: what a thread loads and stores at once."""
TURNS = 3
"""Calls that a buffer has room for: see the kernel's source."""
EMPTY = -0x7FFF8000
"""0x80008000, the mark of a place that nothing was written to."""
# Words (int32) of the kernel's State and Mailbox.
STATE_WORDS, FAILED = 6, 5
MAILBOX_WORDS, ABORTED, MISSING = 9, 0, 1

_SOURCE = Path(__file__).with_name("peer_all_reduce.cu")
_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_MAX_THREADS = 1024
_PLAIN_WIDTH = 512  # vectors of a block when rows mean nothing
_OFFER = struct.Struct("<64sQ")


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is launched; `items` are the vectors of a thread, which it is compiled for."""

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

    x, out: contiguous, whole vectors of 16 bytes, no more than fit a slot. residual, weight: both or
    neither. buffers: the address of each rank's memory. state, mailbox: int32, this rank's.
    """
    vectors = x.nbytes // VECTOR_BYTES
    assert 0 < x.nbytes <= SLOT_BYTES and x.nbytes % VECTOR_BYTES == 0, x.nbytes
    width = _PLAIN_WIDTH if weight is None else weight.nbytes // VECTOR_BYTES
    threads = min(-(-width // 32) * 32, _MAX_THREADS)
    arguments = (
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        out.data_ptr(),
        np.uint32(vectors),
        np.uint32(width),
        np.float32(eps),
        np.int32(two_shot),
        buffers[rank],
        *buffers,
        *[0] * (MAX_PEERS - len(buffers)),
        np.uint32(SLOT_BYTES // VECTOR_BYTES),
        np.int32(rank),
        state.data_ptr(),
        mailbox.data_ptr(),
        np.uint64(timeout_s * 1e9),
    )
    return Launch(-(-vectors // width), threads, -(-width // threads), arguments)


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


class PeerSums:
    """This rank's side of sums over `control`'s ranks, one GPU each (or, to test it, one for all).

    control: connects their processes. op_timeout_s: how long a sum waits for a peer, in seconds.
    """

    def __init__(
        self, control: GlooCommunicator, memory: PeerMemory, *, op_timeout_s: float
    ) -> None:
        assert control.size == memory.size <= MAX_PEERS, control.size
        self.rank, self.size, self.device = control.rank, control.size, memory.device
        self.op_timeout_s = op_timeout_s
        self._control, self._memory = control, memory
        self._state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=self.device)
        self._mailbox = torch.zeros(MAILBOX_WORDS, dtype=torch.int32, pin_memory=True)
        self._words = self._mailbox.numpy()
        self._opened: list[int] = []
        self._buffers: tuple[int, ...] = ()
        self._kernels: dict[tuple[torch.dtype, int], Any] = {}
        self._streams: dict[int, Any] = {}

    @property
    def offer(self) -> bytes:
        """What the other ranks need for `connect`."""
        return _OFFER.pack(self._memory.handle, self._memory.num_bytes)

    def connect(self, offers: Sequence[bytes], timeout_s: float) -> tuple[Link, ...]:
        """Opens the other ranks' memory and tries it -> the links to them, by "peer", or by "nccl" all.

        offers: of all ranks, in order; an empty one is of a rank that has none. Every rank calls it at
        the same time, and all come to the same decision.

        Raises as collectives do; CommunicatorTimeout when a rank does not take part.
        """
        problems = self._open(offers)
        for try_out in (self._try_pairs, self._try_sums):
            links = self._agree(problems)
            if any(link.note for link in links):
                self.close()
                return links
            problems = try_out(timeout_s)
        links = self._agree(problems)
        if any(link.note for link in links):
            self.close()
        return links

    def _agree(self, problems: Mapping[int, str]) -> tuple[Link, ...]:
        """What it comes to, when every rank tells which peers it can't reach."""
        mine = torch.zeros(self.size)
        for peer in problems:
            mine[peer] = 1
        everyone = self._control.all_gather(mine, [self.size] * self.size).view(self.size, -1)
        troubled = [str(rank) for rank in range(self.size) if everyone[rank].any()]
        peers = (peer for peer in range(self.size) if peer != self.rank)
        if not troubled:
            return tuple(Link(peer, "peer") for peer in peers)
        elsewhere = f"rank {', '.join(troubled)} can't reach its peers"
        return tuple(Link(peer, "nccl", problems.get(peer, elsewhere)) for peer in peers)

    def _open(self, offers: Sequence[bytes]) -> dict[int, str]:
        """Problems by rank."""
        runtime = use_device(self.device).cuda.runtime
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
        """The kernel against what the processes tell each other, of whole numbers, which are exact."""
        generator = torch.Generator().manual_seed(self.rank)
        wrong: list[str] = []
        for count in (512, 32 * 1024 - 8):
            x = torch.randint(-9, 10, (count,), generator=generator).to(torch.bfloat16)
            everyone = self._control.all_gather(x, [count] * self.size).view(self.size, -1)
            expected = everyone.float().sum(0).to(torch.bfloat16)
            for two_shot in (False, True):
                got = x.to(self.device)
                self.launch(got, got, two_shot=two_shot)
                if not torch.equal(got.cpu(), expected):
                    wrong.append(f"{count} numbers in {'two shots' if two_shot else 'one shot'}")
        if (error := self.failure()) is not None:
            wrong.append(str(error))
        self._control.barrier(timeout_s)
        if not wrong:
            return {}
        problem = f"sums are wrong: {'; '.join(wrong)}"
        return {peer: problem for peer in range(self.size) if peer != self.rank}

    def launch(
        self,
        x: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        *,
        two_shot: bool,
    ) -> None:
        """Queues a sum of x into `out`, which may be x; with residual and weight as `NormFusing` says.

        Tensors are contiguous and begin at whole vectors; see `plan_launch`.
        """
        assert all(
            t is None or t.data_ptr() % VECTOR_BYTES == 0 for t in (x, out, residual, weight)
        )
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

    def failure(self) -> CommunicatorTimeout | None:
        """Which ranks a sum has waited for in vain; any thread may ask."""
        missing = [rank for rank in range(self.size) if self._words[MISSING + rank]]
        return CommunicatorTimeout("all_reduce", missing, self.op_timeout_s) if missing else None

    def abort(self) -> None:
        """Ends sums that wait for a peer, and all that are still to come; from any thread."""
        self._words[ABORTED] = 1

    def close(self) -> None:
        """Leaves the other ranks' memory, once the device is done. This rank's stays."""
        runtime = use_device(self.device).cuda.runtime
        torch.cuda.synchronize(self.device)
        self._buffers = ()
        while self._opened:
            runtime.ipcCloseMemHandle(self._opened.pop())
