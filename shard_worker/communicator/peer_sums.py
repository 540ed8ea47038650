"""Sums over the GPUs of a host by stores into each other's memory, without NCCL.

A rank's memory is a buffer that the others open by its CUDA IPC handle. Every pair is written to, and
sums are verified, before any is relied upon (`PeerSums.connect`).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping, Sequence
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

__all__ = [
    "SLOT_BYTES",
    "VECTOR_BYTES",
    "PeerMemory",
    "PeerSums",
    "plan_launch",
    "takes_nccl",
    "trial_timeout_s",
]

log = logging.getLogger(__name__)

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


def trial_timeout_s(timeout_s: float) -> float:
    """How long a sum that is tried waits for a peer, which may have failed to launch its own: less than
    the ranks wait for each other, so that they still agree on what it comes to."""
    return timeout_s / 2


def takes_nccl(links: Sequence[Link]) -> bool:
    """Some rank can't reach another one, so that all take NCCL."""
    return any(link.note for link in links)


def _said(error: Exception) -> str:
    """The first line of it: compilers say a page."""
    return str(error).strip().partition("\n")[0]


class PeerMemory:
    """This rank's buffer that its peers write to.

    It outlives the groups that use it: memory that another process still has open must not be freed.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """For `allocate`."""
        self.size, self.device = size, device
        self.pointer, self.handle = 0, b""
        self.problem = ""
        """Why the device refuses it; then there is none."""

    @property
    def num_bytes(self) -> int:
        return TURNS * self.size * SLOT_BYTES

    @classmethod
    def allocate(cls, size: int, device: torch.device) -> Self:
        """Room for a group of `size` ranks. Where the device refuses it, it says why (`problem`), which
        is for `PeerSums.connect` to tell: the other ranks have to know."""
        runtime = use_device(device).cuda.runtime
        memory = cls(size, device)
        try:
            memory.pointer = runtime.malloc(memory.num_bytes)
            memory.handle = bytes(runtime.ipcGetMemHandle(memory.pointer))
        except runtime.CUDARuntimeError as error:
            memory.free()
            memory.problem = f"{device} refuses {memory.num_bytes} bytes for peers: {error}"
        return memory

    def free(self) -> None:
        """When no other process uses it any more."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            use_device(self.device).cuda.runtime.free(pointer)

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
        self._peers = tuple(peer for peer in range(self.size) if peer != self.rank)
        self._state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=self.device)
        self._mailbox = torch.zeros(MAILBOX_WORDS, dtype=torch.int32, pin_memory=True)
        self._words = self._mailbox.numpy()
        self._opened: list[int] = []
        self._buffers: tuple[int, ...] = ()
        self._kernels: dict[tuple[torch.dtype, int], Any] = {}
        self._streams: dict[int, Any] = {}
        self._waits_s = op_timeout_s  # of the last launch

    @property
    def offer(self) -> bytes:
        """What the other ranks need for `connect`; b"" of a rank without memory."""
        if self._memory.problem:
            return b""
        return _OFFER.pack(self._memory.handle, self._memory.num_bytes)

    def connect(self, offers: Sequence[bytes], timeout_s: float) -> tuple[Link, ...]:
        """Opens the other ranks' memory and tries it -> the links to them, by "peer", or by "nccl" all.

        offers: of all ranks, in order; an empty one is of a rank that has none. Every rank calls it at
        the same time, and all come to the same decision. Where that is "nccl" it is closed then.
        timeout_s: how long it waits for a rank that does not take part, at each step.

        Raises as collectives do; CommunicatorTimeout when a rank does not take part.
        """
        trials: Sequence[Callable[[], Mapping[int, str]]] = (
            lambda: self._open(offers),
            self._write,
            self._look,
            self._compile,
            lambda: self._try_sums(trial_timeout_s(timeout_s)),
        )
        links: tuple[Link, ...] = ()
        for trial in trials:
            links = self.agree(trial, timeout_s)
            if takes_nccl(links):
                self.close()
                break
        return links

    def agree(self, trial: Callable[[], Mapping[int, str]], timeout_s: float) -> tuple[Link, ...]:
        """What it comes to when every rank has done `trial` and tells which peers it can't reach.

        trial: its problems by rank. It must not wait for other ranks, but on the device and for
        `trial_timeout_s`, so that all get here. What it raises is a problem with all peers, save a
        CommunicatorError: that ends the group.
        """
        try:
            problems = dict(trial())
        except CommunicatorError:
            raise
        except Exception as error:
            problems = self._with_all(f"{type(error).__name__}: {_said(error)}")
        if (failure := self.failure()) is not None:
            problems = self._with_all(str(failure))
        self._control.barrier(timeout_s)
        mine = torch.zeros(self.size)
        for peer in problems:
            mine[peer] = 1
        everyone = self._control.all_gather(mine, [self.size] * self.size).view(self.size, -1)
        troubled = [str(rank) for rank in range(self.size) if everyone[rank].any()]
        if not troubled:
            return tuple(Link(peer, "peer") for peer in self._peers)
        elsewhere = f"rank {', '.join(troubled)} can't reach its peers"
        return tuple(Link(peer, "nccl", problems.get(peer, elsewhere)) for peer in self._peers)

    def _with_all(self, problem: str) -> dict[int, str]:
        return dict.fromkeys(self._peers, problem)

    def _open(self, offers: Sequence[bytes]) -> dict[int, str]:
        """Problems by rank."""
        if self._memory.problem:
            return self._with_all(self._memory.problem)
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
                problems[rank] = f"its CUDA IPC handle can't be opened: {_said(error)}"
        self._buffers = tuple(buffers)
        self._empty()  # what an earlier group left is not to be taken for what comes now
        return problems

    def _empty(self) -> None:
        """This rank's memory as it is before the first call."""
        self._memory.tensor().fill_(EMPTY)
        torch.cuda.synchronize(self.device)

    def _write(self) -> dict[int, str]:
        """To each peer. Problems by rank."""
        runtime = use_device(self.device).cuda.runtime
        problems: dict[int, str] = {}
        for peer in self._peers:
            sent = torch.full((4,), self._pattern(self.rank, peer), dtype=torch.int32)
            sent = sent.to(self.device)
            try:
                to = self._buffers[peer] + self.rank * SLOT_BYTES
                runtime.memcpy(to, sent.data_ptr(), sent.nbytes, runtime.memcpyDefault)
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                problems[peer] = f"it can't be written to: {_said(error)}"
        return problems

    def _look(self) -> dict[int, str]:
        """At what came from each peer. Problems by rank."""
        memory = self._memory.tensor()
        problems: dict[int, str] = {}
        for peer in self._peers:
            at = peer * SLOT_BYTES // 4
            if memory[at : at + 4].tolist() != [self._pattern(peer, self.rank)] * 4:
                problems[peer] = "what it wrote did not come"
        self._empty()
        return problems

    @staticmethod
    def _pattern(source: int, target: int) -> int:
        return 0x5A000000 + source * 256 + target

    def _compile(self) -> dict[int, str]:
        """A step of its own: who compiles for long, or can't, is waited for here and not on a device."""
        self._kernel(torch.bfloat16, 1)
        return {}

    def _try_sums(self, timeout_s: float) -> dict[int, str]:
        """The kernel, of whole numbers, whose sums are exact. Problems by rank."""
        wrong: list[str] = []
        for count in (512, 32 * 1024 - 8):
            numbers = torch.arange(count)
            terms = [(numbers * (2 * rank + 3) + 7 * rank) % 19 - 9 for rank in range(self.size)]
            expected = torch.stack(terms).sum(0).to(torch.bfloat16)
            for two_shot in (False, True):
                got = terms[self.rank].to(self.device, torch.bfloat16)
                self.launch(got, got, two_shot=two_shot, timeout_s=timeout_s)
                if not torch.equal(got.cpu(), expected):
                    wrong.append(f"{count} numbers in {'two shots' if two_shot else 'one shot'}")
        return self._with_all(f"sums are wrong: {'; '.join(wrong)}") if wrong else {}

    def launch(
        self,
        x: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        *,
        two_shot: bool,
        timeout_s: float | None = None,
    ) -> None:
        """Queues a sum of x into `out`, which may be x; with residual and weight as `NormFusing` says.

        Tensors are contiguous and begin at whole vectors; see `plan_launch`. timeout_s: how long it
        waits for a peer, where that is not `op_timeout_s`.
        """
        assert all(
            t is None or t.data_ptr() % VECTOR_BYTES == 0 for t in (x, out, residual, weight)
        )
        self._waits_s = self.op_timeout_s if timeout_s is None else timeout_s
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
            timeout_s=self._waits_s,
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
        return CommunicatorTimeout("all_reduce", missing, self._waits_s) if missing else None

    def abort(self) -> None:
        """Ends sums that wait for a peer, and all that are still to come; from any thread."""
        self._words[ABORTED] = 1

    def close(self) -> None:
        """Leaves the other ranks' memory, once the device is done. This rank's stays."""
        runtime = use_device(self.device).cuda.runtime
        torch.cuda.synchronize(self.device)
        self._buffers = ()
        while self._opened:
            try:
                runtime.ipcCloseMemHandle(self._opened.pop())
            except runtime.CUDARuntimeError as error:  # of a process that has ended
                log.warning("memory of a peer could not be closed: %s", _said(error))
