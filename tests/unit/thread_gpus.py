"""GPUs that are threads of the test: what the communicators ask of CuPy and torch.cuda, on a CPU.

NCCL sums among the threads, memory is the process's own and a handle its address, and the kernel of
`peer_all_reduce.cu` is said in Python. What is to go wrong is said by rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from shard_worker.communicator import peer, peer_sums

T = TypeVar("T")

CUDA = "13.0"
CPU = torch.device("cpu")
WAIT_S = 10.0
SLOT_BYTES = 64 * 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class NcclError(RuntimeError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


class CompileException(Exception):
    pass


def tensor_at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


class Gpus:
    """The GPUs of one host, for as long as a test runs.

    A rank in `fails[what]` fails at it: "malloc", "handle", "open", "write", "compile", "launch",
    "capture" and "init" with an error, "arrive" and "sum" without one.
    """

    def __init__(self) -> None:
        self.fails: dict[str, set[int]] = defaultdict(set)
        self.microseconds: Callable[[int, str, int], float] = lambda rank, path, num_bytes: 10.0
        """Of a sum, as a rank measures it."""
        self.allocated: dict[int, Tensor] = {}
        self.opened: list[int] = []
        self.capture_modes: set[str] = set()
        self.nccl_calls: list[tuple[str, int]] = []
        """What was called of NCCL by which rank, in order."""
        self.nccl_comms: dict[int, Any] = {}
        self.init_may_end = threading.Event()
        """NCCL's initialisation hangs until it is set."""
        self.init_may_end.set()
        self.kernel_calls: list[tuple[int, str, int]] = []
        """Of peers' sums: the rank, the path and the bytes."""
        self._local = threading.local()
        self._meetings: dict[bytes, _Meeting] = {}
        self._ids = itertools.count(1)
        self._terms: dict[Any, dict[int, Tensor]] = defaultdict(dict)
        self._told = threading.Condition()

    @property
    def rank(self) -> int:
        """Of the thread that asks."""
        return int(self._local.rank)

    def outcomes(self, size: int, function: Callable[[int], T]) -> list[Future[T]]:
        """What comes of `function(rank)` on each rank; all are done."""

        def one(rank: int) -> T:
            self._local.rank, self._local.captures = rank, False
            return function(rank)

        with ThreadPoolExecutor(size) as threads:
            return [threads.submit(one, rank) for rank in range(size)]

    def _fail(self, what: str, error: type[Exception], said: str) -> None:
        if self.rank in self.fails[what]:
            raise error(said)

    # cupy.cuda.nccl

    def nccl(self) -> ModuleType:
        module: Any = ModuleType("cupy.cuda.nccl")
        module.NcclError, module.NCCL_SUM, module.NCCL_UINT8 = NcclError, 0, torch.uint8
        module.NCCL_BFLOAT16, module.NCCL_FLOAT16, module.NCCL_FLOAT32 = DTYPES
        module.get_unique_id = lambda: struct.pack("<Q120x", next(self._ids))

        def communicator(size: int, unique_id: bytes, rank: int) -> _ThreadNccl:
            meeting = self._meetings.setdefault(unique_id, _Meeting(size))
            return _ThreadNccl(self, meeting, rank)

        module.NcclCommunicator = communicator
        return module

    # cupy.cuda.runtime

    def runtime(self) -> ModuleType:
        module: Any = ModuleType("cupy.cuda.runtime")
        module.CUDARuntimeError, module.memcpyDefault = CUDARuntimeError, 4
        module.runtimeGetVersion = lambda: 13000
        for function in (self.malloc, self.free, self.memcpy):
            setattr(module, function.__name__, function)
        module.ipcGetMemHandle, module.ipcOpenMemHandle = self.handle, self.open
        module.ipcCloseMemHandle = self.opened.remove
        return module

    def malloc(self, num_bytes: int) -> int:
        self._fail("malloc", CUDARuntimeError, "cudaErrorMemoryAllocation: out of memory")
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.allocated[memory.data_ptr()] = memory
        return memory.data_ptr()

    def free(self, address: int) -> None:
        del self.allocated[address]

    def handle(self, address: int) -> bytes:
        self._fail("handle", CUDARuntimeError, "cudaErrorNotSupported: operation not supported")
        return struct.pack("<Q56x", address)

    def open(self, handle: bytes) -> int:
        self._fail("open", CUDARuntimeError, "cudaErrorMapBufferObjectFailed: mapping failed")
        (address,) = struct.unpack("<Q56x", handle)
        if address not in self.allocated:
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        self.opened.append(address)
        return int(address)

    def memcpy(self, target: int, source: int, num_bytes: int, kind: int) -> None:
        self._fail("write", CUDARuntimeError, "cudaErrorIllegalAddress: an illegal access")
        if self.rank not in self.fails["arrive"]:
            ctypes.memmove(target, source, num_bytes)

    # cupy.RawModule

    def raw_module(self, *, code: str, options: Sequence[str]) -> Any:
        defined = dict(option[2:].split("=") for option in options if option.startswith("-D"))
        dtype = DTYPES[int(defined["ELEMENT"])]

        def kernel(grid: object, block: object, arguments: Sequence[Any], stream: object) -> None:
            self._sum(dtype, int(defined["RANKS"]), [int(a) for a in arguments])

        def get_function(name: str) -> Any:
            self._fail("compile", CompileException, "kernel.cu(1): error: no such thing\nmore")
            return kernel

        return SimpleNamespace(get_function=get_function)

    def _sum(self, dtype: torch.dtype, size: int, arguments: Sequence[int]) -> None:
        """What the kernel does, without residual and norm."""
        self._fail("launch", RuntimeError, "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")
        x, residual, weight, out, vectors, _, _, two_shot, _, *rest = arguments
        buffers, (_, rank, state, mailbox, timeout_ns) = rest[:8], rest[8:]
        assert residual == weight == 0
        count = vectors * peer_sums.VECTOR_BYTES // dtype.itemsize
        states = tensor_at(state, peer_sums.STATE_WORDS, torch.int32)
        words = tensor_at(mailbox, peer_sums.MAILBOX_WORDS, torch.int32)
        path, num_bytes = "two_shot" if two_shot else "one_shot", count * dtype.itemsize
        if self.only_captures(path, num_bytes):
            return
        self.kernel_calls.append((rank, path, num_bytes))
        terms = self._terms[*buffers, int(states[0]), count]
        states[0] += 1
        deadline = time.monotonic() + timeout_ns * 1e-9
        with self._told:
            terms[rank] = tensor_at(x, count, dtype).clone()
            self._told.notify_all()
            while len(terms) < size and not words[peer_sums.ABORTED] and not states[-1]:
                self._told.wait(0.01)
                if time.monotonic() > deadline:
                    states[peer_sums.FAILED] = 1
                    for missing in set(range(size)) - set(terms):
                        words[peer_sums.MISSING + missing] = 1
        total = torch.stack([terms[r].float() for r in sorted(terms)]).sum(0)
        tensor_at(out, count, dtype).copy_(total + (rank in self.fails["sum"]))

    # torch.cuda

    @contextlib.contextmanager
    def graph(self, graph: _Graph, capture_error_mode: str = "global") -> Iterator[None]:
        self.capture_modes.add(capture_error_mode)
        self._fail("capture", RuntimeError, "CUDA error: operation not permitted when capturing")
        self._local.captures = True
        try:
            yield
        finally:
            self._local.captures = False
        graph.does = self._local.did

    def only_captures(self, path: str, num_bytes: int) -> bool:
        """A thread makes such a sum now; whether that is for a graph, where nothing is summed yet."""
        self._local.did = path, num_bytes
        return bool(self._local.captures)

    def event(self, enable_timing: bool) -> Any:
        def elapsed_time(other: object) -> float:
            return self.microseconds(self.rank, *self._local.did) * peer._CALLS_A_GRAPH / 1e3

        return SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=elapsed_time
        )


class _Graph:
    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self.does = ("", 0)

    def replay(self) -> None:
        self._gpus.only_captures(*self.does)


class _Meeting:
    """Where the ranks of an NCCL communicator put what they exchange."""

    def __init__(self, size: int) -> None:
        self.arrivals = threading.Barrier(size, timeout=WAIT_S)
        self.barrier = threading.Barrier(size, timeout=WAIT_S)
        self.pieces: list[Tensor] = [torch.empty(0)] * size


class _ThreadNccl:
    """`cupy.cuda.nccl.NcclCommunicator` of a rank that is a thread."""

    def __init__(self, gpus: Gpus, meeting: _Meeting, rank: int) -> None:
        self._gpus, self._meeting, self._rank = gpus, meeting, rank
        self.async_error = ""
        self._note("init")
        gpus.init_may_end.wait(WAIT_S)
        if rank in gpus.fails["init"]:
            raise NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")
        if not gpus.fails["init"]:
            meeting.arrivals.wait()
        gpus.nccl_comms[rank] = self

    def _note(self, call: str) -> None:
        self._gpus.nccl_calls.append((call, self._rank))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        try:
            self._meeting.pieces[self._rank] = x.clone()
            self._meeting.barrier.wait()
            pieces = list(self._meeting.pieces)
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage") from error
        return pieces

    def allReduce(
        self, source: int, to: int, count: int, dtype: torch.dtype, op: int, stream: int
    ) -> None:
        self._note("allReduce")
        if self._gpus.only_captures("nccl", count * dtype.itemsize):
            return
        pieces = self._exchange(tensor_at(source, count, dtype))
        total = torch.stack([piece.float() for piece in pieces]).sum(0)
        tensor_at(to, count, dtype).copy_(total)

    def allGather(self, source: int, to: int, count: int, dtype: torch.dtype, stream: int) -> None:
        pieces = self._exchange(tensor_at(source, count, dtype))
        tensor_at(to, count * len(pieces), dtype).copy_(torch.cat(pieces))

    def check_async_error(self) -> None:
        if self.async_error:
            raise NcclError(self.async_error)

    def abort(self) -> None:
        self._note("abort")
        self._meeting.barrier.abort()

    def destroy(self) -> None:
        self._note("destroy")


def install(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Has the communicators find GPUs, of small slots, and CuPy for torch's CUDA."""
    gpus = Gpus()
    cuda: Any = ModuleType("cupy.cuda")
    cuda.nccl, cuda.runtime = gpus.nccl(), gpus.runtime()
    cuda.Device = lambda index: SimpleNamespace(use=lambda: None)
    cuda.Stream = SimpleNamespace(from_external=lambda stream: stream)
    cupy: Any = ModuleType("cupy")
    cupy.cuda, cupy.RawModule = cuda, gpus.raw_module
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", CUDA)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(gpus))
    monkeypatch.setattr(torch.cuda, "graph", gpus.graph)
    monkeypatch.setattr(torch.cuda, "Event", gpus.event)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **rest: zeros(*a, **rest))
    monkeypatch.setattr(
        peer_sums.PeerMemory,
        "tensor",
        lambda memory: tensor_at(memory.pointer, memory.num_bytes // 4, torch.int32),
    )
    for module in (peer, peer_sums):
        monkeypatch.setattr(module, "SLOT_BYTES", SLOT_BYTES)
    monkeypatch.setattr(peer, "_MEASURED_BYTES", (8 * 1024, SLOT_BYTES))
    return gpus
