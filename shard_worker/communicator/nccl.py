"""Collectives between GPU ranks, by NCCL through CuPy: on torch's tensors, in torch's current stream.

A collective here is queued on the device and returns at once, like any other operation of torch; it is
captured when torch captures a CUDA graph. What waits is the reading of a result, so that is where a
peer that never comes is noticed, and `abort` is what ends that wait.

NCCL's own initialisation waits for its peers without a deadline. The ranks therefore meet over Gloo
first, which has one, and enter NCCL's together.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from pathlib import Path
from typing import Any, Self

# Before CuPy, so that one libnccl is loaded: the one that torch brings.
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .. import cuda_libraries
from . import (
    DEFAULT_OP_TIMEOUT_S,
    Communicator,
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorTimeout,
    check_all_gather,
    check_all_reduce,
    check_membership,
    check_wanted,
)
from .gloo import GlooCommunicator

__all__ = ["NcclCommunicator", "use_device"]

_ID_BYTES = 128
_JOIN_POLL_S = 0.05
_WATCH_INTERVAL_S = 0.1


def _nccl() -> Any:
    """CuPy's NCCL bindings; CommunicatorError that says what to install where they don't fit torch."""
    cuda = torch.version.cuda
    if cuda is None:
        raise CommunicatorError(f"nccl: {cuda_libraries.torch_problem(torch.__version__, cuda)}")
    packages = cuda_libraries.cupy_packages()
    if problem := cuda_libraries.cupy_packages_problem(packages, cuda):
        raise CommunicatorError(f"nccl: {problem}")
    try:
        from cupy.cuda import nccl, runtime
    except ImportError as error:
        problem = cuda_libraries.cupy_import_problem(str(error), cuda)
        raise CommunicatorError(f"nccl: {problem}") from error
    if problem := cuda_libraries.cupy_problem(cuda, runtime.runtimeGetVersion()):
        raise CommunicatorError(f"nccl: {problem}")
    if not getattr(nccl, "available", True):
        raise CommunicatorError(
            f"nccl: CuPy finds no {cuda_libraries.NCCL}.2, which torch's CUDA builds bring: "
            f"pip install nvidia-nccl-cu{cuda.partition('.')[0]}"
        )
    if problem := cuda_libraries.nccl_problem(Path("/proc/self/maps").read_text()):
        raise CommunicatorError(f"nccl: {problem}")
    return nccl


def use_device(device: torch.device) -> Any:
    """CuPy, with this thread's calls going to `device`."""
    _nccl()  # says what is wrong with it
    import cupy

    cupy.cuda.Device(device.index).use()
    return cupy


def _initialise(
    connect: Callable[[], Any], deadline: float, abandoned: threading.Event | None
) -> Any | None:
    """What connect() makes, or None at the deadline. Raises what it raises; CommunicatorAborted once
    `abandoned` is set.

    NCCL's initialisation can't be stopped. It is left behind in a daemon thread, and what it still makes
    there is aborted.
    """
    arriving: Future[Any] = Future()

    def run() -> None:
        try:
            comm = connect()
        except Exception as error:
            with contextlib.suppress(InvalidStateError):
                arriving.set_exception(error)
            return
        try:
            arriving.set_result(comm)
        except InvalidStateError:  # nobody waits for it any more
            comm.abort()

    threading.Thread(target=run, name="nccl-join", daemon=True).start()
    while not arriving.done() and time.monotonic() < deadline:
        wait([arriving], _JOIN_POLL_S)
        if abandoned is not None and abandoned.is_set():
            break
    is_late = arriving.cancel()
    if abandoned is not None and abandoned.is_set():
        if not is_late and arriving.exception() is None:
            arriving.result().abort()
        check_wanted(abandoned)
    return None if is_late else arriving.result()


class NcclCommunicator(Communicator):
    """Ranks on NVIDIA GPUs, one GPU each, on one host or several."""

    transport = "nccl"

    def __init__(self, control: GlooCommunicator, comm: Any, device: torch.device) -> None:
        """For `join`, which connects both."""
        super().__init__(control.rank, control.size, control.op_timeout_s)
        self.device = device
        self._nccl = _nccl()
        self._types = {
            torch.float32: self._nccl.NCCL_FLOAT32,
            torch.float16: self._nccl.NCCL_FLOAT16,
            torch.bfloat16: self._nccl.NCCL_BFLOAT16,
        }
        self._control = control
        self._comm = comm
        self._lifecycle = threading.Lock()  # abort (any thread) against close
        self._failure: CommunicatorError | None = None
        self._aborting: threading.Thread | None = None
        self._closed = threading.Event()

    @staticmethod
    def create_id(host: str) -> tuple[bytes, TCPStore]:
        """The communicator id for all ranks, made by rank 0, and the store to pass to its `join`."""
        address, store = GlooCommunicator.create_store(host)
        return bytes(_nccl().get_unique_id()) + address, store

    @classmethod
    def join(
        cls,
        communicator_id: bytes,
        rank: int,
        size: int,
        *,
        device: torch.device,
        timeout_s: float,
        interface_host: str,
        op_timeout_s: float = DEFAULT_OP_TIMEOUT_S,
        store: TCPStore | None = None,
        abandoned: threading.Event | None = None,
    ) -> Self:
        """Meet the other ranks and connect to them; blocks until all `size` of them have.

        communicator_id: from rank 0's `create_id`. store: its other result, on rank 0 only.
        interface_host, op_timeout_s, abandoned: as for `GlooCommunicator.join`. timeout_s: deadline of
        all of it.

        Raises as `GlooCommunicator.join` does; CommunicatorError with NCCL's words where it fails.
        """
        check_membership(rank, size)
        nccl = _nccl()
        unique_id, address = communicator_id[:_ID_BYTES], communicator_id[_ID_BYTES:]
        deadline = time.monotonic() + timeout_s
        control = GlooCommunicator.join(
            address,
            rank,
            size,
            timeout_s=timeout_s,
            interface_host=interface_host,
            op_timeout_s=op_timeout_s,
            store=store,
            abandoned=abandoned,
        )

        def connect() -> Any:
            with torch.cuda.device(device):
                return nccl.NcclCommunicator(size, unique_id, rank)

        try:
            comm = _initialise(connect, deadline, abandoned)
        except CommunicatorError:
            control.close()
            raise
        except Exception as error:
            control.close()
            raise CommunicatorError(f"join: NCCL on rank {rank}: {error}") from error
        if comm is None:
            control.close()
            others = [peer for peer in range(size) if peer != rank]
            raise CommunicatorTimeout("join", others, timeout_s, "within NCCL's initialisation")
        communicator = cls(control, comm, device)
        threading.Thread(target=communicator._watch, name="nccl-watch", daemon=True).start()
        return communicator

    def all_reduce(self, x: Tensor) -> Tensor:
        """IN PLACE, queued; see `Communicator.all_reduce`. NCCL decides the order of the sum, which is
        the same on all ranks."""
        check_all_reduce(x, self.device.type)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        kind, add = self._types[x.dtype], self._nccl.NCCL_SUM
        at = x.data_ptr()
        with self._calling("all_reduce") as comm:
            comm.allReduce(at, at, x.numel(), kind, add, stream)
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """NOT in place, queued; see `Communicator.all_gather`. NCCL gathers equal pieces: smaller ones
        travel padded."""
        check_all_gather(x, sizes, self.rank, self.size, self.device.type)
        width = max(sizes)
        if x.shape[-1] < width:
            x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        x = x.contiguous()
        whole = x.new_empty((self.size, *x.shape))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        kind = self._nccl.NCCL_UINT8
        with self._calling("all_gather") as comm:
            comm.allGather(x.data_ptr(), whole.data_ptr(), x.nbytes, kind, stream)
        return torch.cat([part[..., :size] for part, size in zip(whole, sizes, strict=True)], -1)

    def failure(self) -> CommunicatorError | None:
        """A link or a peer that failed, or an abort; see `Communicator.failure`."""
        return self._failure

    def barrier(self, timeout_s: float) -> None:
        """Of the processes, not of their devices; see `Communicator.barrier`."""
        self._alive("barrier")
        self._control.barrier(timeout_s)

    def abort(self) -> None:
        """Ends NCCL's kernels, also those that wait for a peer; see `Communicator.abort`."""
        self._fail(CommunicatorAborted("the group was aborted"))

    def close(self) -> None:
        """Frees NCCL's buffers; see `Communicator.close`. CUDA graphs that hold it have to be gone."""
        self._closed.set()
        with self._lifecycle:
            comm, self._comm = self._comm, None
        if comm is not None:
            torch.cuda.synchronize(self.device)
            comm.destroy()
        if self._aborting is not None:
            self._aborting.join()
        self._control.close()

    def _alive(self, op: str) -> Any:
        if self._failure is not None:
            raise type(self._failure)(f"{op}: {self._failure}")
        if self._comm is None:
            raise CommunicatorError(f"{op}: the communicator is closed")
        return self._comm

    @contextlib.contextmanager
    def _calling(self, op: str) -> Iterator[Any]:
        """CuPy's communicator; what NCCL says within it becomes the communicator's error."""
        comm = self._alive(op)
        try:
            yield comm
        except self._nccl.NcclError as error:
            self._alive(op)  # an abort in the midst of it is what it was
            raise CommunicatorError(f"{op}: NCCL failed: {error}") from error

    def _fail(self, error: CommunicatorError) -> None:
        with self._lifecycle:
            if self._failure is not None or self._comm is None:
                return
            self._failure = error
            comm, self._comm = self._comm, None
            # NCCL ends its kernels at once, then waits until no CUDA graph holds the communicator. To
            # destroy them is up to the device's thread, which those kernels keep.
            self._aborting = threading.Thread(
                target=self._abort, args=(comm,), name="nccl-abort", daemon=True
            )
            self._aborting.start()  # here: `close` joins what it finds
        self._control.abort()

    def _abort(self, comm: Any) -> None:
        with torch.cuda.device(self.device), contextlib.suppress(self._nccl.NcclError):
            comm.abort()

    def _watch(self) -> None:
        """A link or a peer that fails shows as an asynchronous error, and only when asked for."""
        while not self._closed.wait(_WATCH_INTERVAL_S):
            with self._lifecycle:
                comm = self._comm
                if comm is None:
                    return
                try:
                    comm.check_async_error()
                    continue
                except self._nccl.NcclError as error:
                    failure = CommunicatorError(f"NCCL failed: {error}")
            self._fail(failure)
            return
