"""Collectives over NCCL: how ranks come together, what ends them, and what is said of a NCCL that does
not fit. NCCL is a stand-in that sums among threads; the Gloo beside it is real."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from shard_worker import cuda_libraries
from shard_worker.communicator import (
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorTimeout,
    nccl,
)
from shard_worker.communicator.gloo import GlooCommunicator
from shard_worker.communicator.nccl import NcclCommunicator
from tests.unit import thread_gpus
from tests.unit.thread_gpus import CPU, Gpus

T = TypeVar("T")

HOST = "127.0.0.1"
TIMEOUT_S = 10.0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    gpus = thread_gpus.install(monkeypatch)
    yield gpus
    gpus.init_may_end.set()
    # Neither a watch nor a join that was given up outlives its test, and its stand-ins.
    deadline = time.monotonic() + TIMEOUT_S
    while left := [t.name for t in threading.enumerate() if t.name.startswith("nccl-")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def form(
    gpus: Gpus, size: int, use: Callable[[NcclCommunicator], T], **options: Any
) -> list[Future[T]]:
    """What comes of `use` on each rank of a group."""
    communicator_id, store = NcclCommunicator.create_id(HOST)
    options = {"timeout_s": TIMEOUT_S, **options}

    def one(rank: int) -> T:
        comm = NcclCommunicator.join(
            communicator_id,
            rank,
            size,
            device=CPU,
            interface_host=HOST,
            store=store if rank == 0 else None,
            **options,
        )
        try:
            return use(comm)
        finally:
            comm.close()

    return gpus.outcomes(size, one)


def results(futures: list[Future[T]]) -> list[T]:
    return [future.result() for future in futures]


def failures(futures: list[Future[Any]]) -> list[BaseException]:
    found = [future.exception() for future in futures]
    assert None not in found
    return [error for error in found if error is not None]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Collectives


def test_sums_and_uneven_gathers_go_through_nccl(gpus: Gpus) -> None:
    def use(comm: NcclCommunicator) -> tuple[list[float], list[float]]:
        total = comm.all_reduce(torch.full((2,), comm.rank + 1.0))
        whole = comm.all_gather(torch.full((1, comm.rank), float(comm.rank)), [0, 1, 2])
        comm.barrier(TIMEOUT_S)
        return total.tolist(), whole.flatten().tolist()

    assert results(form(gpus, 3, use)) == [([6.0, 6.0], [1.0, 2.0, 2.0])] * 3
    # Each rank's is destroyed by close, and none aborted.
    assert sorted(call for call in gpus.nccl_calls if call[0] in ("destroy", "abort")) == [
        ("destroy", rank) for rank in range(3)
    ]


def test_a_closed_communicator_says_so(gpus: Gpus) -> None:
    def use(comm: NcclCommunicator) -> None:
        comm.barrier(TIMEOUT_S)
        comm.close()
        comm.close()
        with pytest.raises(CommunicatorError, match="all_reduce: the communicator is closed"):
            comm.all_reduce(torch.ones(1))
        comm.abort()
        assert comm.failure() is None

    results(form(gpus, 2, use))


# Joining


def test_nobody_enters_nccl_before_all_ranks_have_met(gpus: Gpus) -> None:
    communicator_id, store = NcclCommunicator.create_id(HOST)
    with pytest.raises(CommunicatorTimeout, match="join: rank 1 not there"):
        NcclCommunicator.join(
            communicator_id,
            0,
            2,
            device=CPU,
            timeout_s=0.1,
            interface_host=HOST,
            store=store,
        )
    assert gpus.nccl_calls == []


def test_an_initialisation_that_takes_too_long_names_the_other_ranks(gpus: Gpus) -> None:
    gpus.init_may_end.clear()
    for rank, error in enumerate(failures(form(gpus, 3, lambda comm: None, timeout_s=1.0))):
        assert isinstance(error, CommunicatorTimeout)
        assert error.ranks == tuple({0, 1, 2} - {rank})
        assert "within NCCL's initialisation" in str(error)


def test_what_nccl_says_when_it_fails_is_the_error(gpus: Gpus) -> None:
    gpus.fails["init"] = {0, 1}
    for rank, error in enumerate(failures(form(gpus, 2, lambda comm: None))):
        assert type(error) is CommunicatorError
        assert str(error).startswith(f"join: NCCL on rank {rank}: NCCL_ERROR_SYSTEM_ERROR")


def test_a_join_that_is_abandoned_ends_at_once_and_what_comes_late_is_aborted(gpus: Gpus) -> None:
    gpus.init_may_end.clear()
    abandoned = threading.Event()

    def abandon() -> None:
        wait_until(lambda: len(gpus.nccl_calls) == 2)
        abandoned.set()

    abandoning = threading.Thread(target=abandon)
    abandoning.start()
    began = time.monotonic()
    errors = failures(
        form(gpus, 2, lambda comm: None, timeout_s=10 * TIMEOUT_S, abandoned=abandoned)
    )
    assert time.monotonic() - began < TIMEOUT_S
    abandoning.join()
    assert all(isinstance(error, CommunicatorAborted) for error in errors), errors
    gpus.init_may_end.set()  # too late
    wait_until(lambda: len(gpus.nccl_comms) == 2)
    wait_until(lambda: {("abort", 0), ("abort", 1)} <= set(gpus.nccl_calls))


def test_a_join_that_is_abandoned_as_it_ends_leaves_nothing(gpus: Gpus) -> None:
    abandoned = threading.Event()
    comm = SimpleNamespace(aborted=0)
    comm.abort = lambda: setattr(comm, "aborted", 1)

    def connect() -> Any:
        abandoned.set()
        return comm

    with pytest.raises(CommunicatorAborted):
        nccl._initialise(connect, time.monotonic() + TIMEOUT_S, abandoned)
    wait_until(lambda: comm.aborted == 1)


# What ends a group


def test_an_abort_from_another_thread_ends_a_sum_that_waits(gpus: Gpus) -> None:
    done = threading.Event()

    def use(comm: NcclCommunicator) -> None:
        if comm.rank == 1:  # which never comes
            done.wait(TIMEOUT_S)
            return

        def abort() -> None:
            wait_until(lambda: ("allReduce", 0) in gpus.nccl_calls)
            comm.abort()
            comm.abort()

        aborting = threading.Thread(target=abort)
        aborting.start()
        with pytest.raises(CommunicatorAborted, match="all_reduce: the group was aborted"):
            comm.all_reduce(torch.ones(4))
        assert isinstance(comm.failure(), CommunicatorAborted)
        with pytest.raises(CommunicatorAborted, match="barrier"):
            comm.barrier(TIMEOUT_S)
        aborting.join()
        done.set()

    results(form(gpus, 2, use))
    assert ("destroy", 0) not in gpus.nccl_calls  # the abort has freed it
    assert gpus.nccl_calls.count(("abort", 0)) == 1


def test_close_waits_for_an_abort_that_has_only_begun(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    start = threading.Thread.start

    def start_slowly(thread: threading.Thread) -> None:
        if thread.name == "nccl-abort":
            begun.set()
            time.sleep(0.1)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_slowly)

    def use(comm: NcclCommunicator) -> None:
        comm.barrier(TIMEOUT_S)
        if comm.rank == 0:
            aborting = threading.Thread(target=comm.abort)
            aborting.start()
            begun.wait(TIMEOUT_S)
            comm.close()
            assert ("abort", 0) in gpus.nccl_calls
            aborting.join()

    results(form(gpus, 2, use))
    assert ("destroy", 0) not in gpus.nccl_calls


def test_a_link_that_fails_is_found_and_told(gpus: Gpus) -> None:
    def use(comm: NcclCommunicator) -> str:
        gpus.nccl_comms[comm.rank].async_error = "NCCL_ERROR_REMOTE_ERROR: a link is down"
        wait_until(lambda: comm.failure() is not None)
        with pytest.raises(CommunicatorError, match=r"all_reduce: NCCL failed: .*a link is down"):
            comm.all_reduce(torch.ones(1))
        return str(comm.failure())

    told = results(form(gpus, 2, use))
    assert told == ["NCCL failed: NCCL_ERROR_REMOTE_ERROR: a link is down"] * 2
    assert ("abort", 0) in gpus.nccl_calls and ("abort", 1) in gpus.nccl_calls


def test_close_frees_nccl_before_it_leaves_the_other_processes(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: gpus.nccl_calls.append(("synchronize", -1))
    )
    close = GlooCommunicator.close

    def leave(comm: GlooCommunicator) -> None:
        gpus.nccl_calls.append(("leave", comm.rank))
        close(comm)

    monkeypatch.setattr(GlooCommunicator, "close", leave)
    results(form(gpus, 2, lambda comm: comm.barrier(TIMEOUT_S)))
    calls = gpus.nccl_calls
    for rank in range(2):
        assert calls.index(("destroy", rank)) < calls.index(("leave", rank))
    assert calls.index(("synchronize", -1)) < min(calls.index(("destroy", rank)) for rank in (0, 1))


# NCCL that does not fit


def test_nccl_that_fits_has_no_problem(gpus: Gpus) -> None:
    assert nccl._nccl() is sys.modules["cupy.cuda"].nccl


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("torch without CUDA", "is a build without CUDA"),
        ("two packages", "cupy-cuda12x and cupy-cuda13x are installed at once"),
        ("no CuPy", r"CuPy can't be imported.*pip install 'colrow\[cuda13\]'"),
        ("CuPy of another CUDA", r"CuPy is for CUDA 12\.8, torch for CUDA 13\.0"),
        ("CuPy without NCCL", r"CuPy finds no libnccl\.so\.2.*pip install nvidia-nccl-cu13"),
        ("two NCCLs", "2 NCCL libraries are loaded"),
    ],
)
def test_what_does_not_fit_is_said_with_what_to_do(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, case: str, said: str
) -> None:
    cuda: Any = sys.modules["cupy.cuda"]
    match case:
        case "torch without CUDA":
            monkeypatch.setattr(torch.version, "cuda", None)
        case "two packages":
            both = ("cupy-cuda12x", "cupy-cuda13x")
            monkeypatch.setattr(cuda_libraries, "cupy_packages", lambda: both)
        case "no CuPy":
            monkeypatch.setitem(sys.modules, "cupy.cuda", None)
        case "CuPy of another CUDA":
            monkeypatch.setattr(cuda.runtime, "runtimeGetVersion", lambda: 12080)
        case "CuPy without NCCL":
            monkeypatch.setattr(cuda.nccl, "available", False, raising=False)
        case "two NCCLs":
            line = "7f00-7f01 r--p 00000000 fe:01 77 /{}/libnccl.so.2\n"
            maps = line.format("torch") + line.format("other")
            monkeypatch.setattr(Path, "read_text", lambda path: maps)
    with pytest.raises(CommunicatorError, match=f"^nccl: .*{said}"):
        nccl._nccl()
