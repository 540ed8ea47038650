"""How ranks come to trust each other's memory, and that all of them take NCCL where one can't.

GPUs are stand-ins, a thread each (`thread_gpus`); `test_peer_all_reduce` simulates the kernel itself.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest
import torch

from shard_worker.communicator import (
    DEFAULT_OP_TIMEOUT_S,
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorTimeout,
    peer_sums,
)
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.peer import PeerCommunicator, Reach
from shard_worker.communicator.peer_sums import PeerMemory
from tests.unit import thread_gpus
from tests.unit.thread_gpus import CPU, SLOT_BYTES, Gpus

T = TypeVar("T")

HOST = "127.0.0.1"
TIMEOUT_S = 10.0
SIZE = 3
KIB = 1024


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    gpus = thread_gpus.install(monkeypatch)
    yield gpus
    assert gpus.opened == [], "a peer's memory is still open"


Carry = Callable[[PeerCommunicator, Sequence[bytes]], Sequence[bytes]]
"""What a rank is given of the ranks' offers."""


def form(
    gpus: Gpus,
    use: Callable[[PeerCommunicator], T],
    *,
    size: int = SIZE,
    carry: Carry = lambda comm, offers: offers,
    timeout_s: float = TIMEOUT_S,
) -> list[Future[T]]:
    """What comes of `use` on each rank, connected."""
    communicator_id, store = NcclCommunicator.create_id(HOST)
    offers = [b""] * size
    all_offered = threading.Barrier(size, timeout=TIMEOUT_S)

    def one(rank: int) -> T:
        comm = PeerCommunicator.join(
            communicator_id,
            rank,
            size,
            device=CPU,
            timeout_s=TIMEOUT_S,
            interface_host=HOST,
            store=store if rank == 0 else None,
        )
        memory = PeerMemory.allocate(size, CPU)
        try:
            offers[rank] = comm.offer(memory)
            all_offered.wait()
            comm.connect(carry(comm, offers), timeout_s)
            return use(comm)
        finally:
            comm.close()
            all_offered.wait()
            memory.free()

    return gpus.outcomes(size, one)


def results(futures: list[Future[T]]) -> list[T]:
    return [future.result() for future in futures]


def sums_over_nccl(comm: PeerCommunicator) -> str:
    """Asserts that this rank takes NCCL for all, and that this works; the notes of its links."""
    assert {link.path for link in comm.links} == {"nccl"}
    assert all(link.note for link in comm.links)
    assert comm.reach == Reach()
    x = torch.full((4096,), comm.rank + 1.0)
    assert comm.all_reduce_path(x.nbytes) == "nccl"
    assert comm.norm_fusing(x.view(1, -1)) is None
    assert comm.all_reduce(x).eq(sum(range(1, comm.size + 1))).all()
    assert comm.failure() is None
    comm.barrier(TIMEOUT_S)
    return "; ".join(link.note for link in comm.links)


def test_peers_that_reach_each_other_choose_alike(gpus: Gpus) -> None:
    """Each rank measures other times; the slowest rank's count."""
    slow = {("one_shot", SLOT_BYTES): 1}  # only this rank finds it slow
    gpus.microseconds = lambda rank, path, num_bytes: (
        {"one_shot": 3.0, "two_shot": 6.0, "nccl": 20.0}[path]
        + 10.0 * (slow.get((path, num_bytes)) == rank)
    )

    def use(comm: PeerCommunicator) -> Reach:
        assert {(link.path, link.note) for link in comm.links} == {("peer", "")}
        comm.barrier(TIMEOUT_S)
        return comm.reach

    assert results(form(gpus, use)) == [Reach(8 * KIB, SLOT_BYTES, True)] * SIZE
    # Other threads may call CUDA while it is captured.
    assert gpus.capture_modes == {"thread_local"}


TROUBLES = {
    "malloc": "cpu refuses .* bytes for peers: cudaErrorMemoryAllocation",
    "handle": "cpu refuses .* bytes for peers: cudaErrorNotSupported",
    "open": "its CUDA IPC handle can't be opened: cudaErrorMapBufferObjectFailed",
    "write": "it can't be written to: cudaErrorIllegalAddress",
    "compile": r"CompileException: kernel\.cu\(1\): error: no such thing(;|$)",
    "sum": "sums are wrong: 512 numbers in one shot",
    "capture": "RuntimeError: CUDA error: operation not permitted when capturing",
}


@pytest.mark.parametrize("what", TROUBLES)
def test_where_one_rank_fails_all_take_nccl_and_say_why(gpus: Gpus, what: str) -> None:
    gpus.fails[what] = {1}
    notes = results(form(gpus, sums_over_nccl))
    assert re.search(TROUBLES[what], notes[1]), notes[1]
    for rank in (0, 2):
        assert "rank 1 can't reach its peers" in notes[rank] or "offers no memory" in notes[rank]


def test_memory_that_others_could_not_open_is_given_back(gpus: Gpus) -> None:
    gpus.fails["handle"] = {0}
    (memory,) = results(gpus.outcomes(1, lambda rank: PeerMemory.allocate(SIZE, CPU)))
    assert memory.problem and gpus.allocated == {}
    memory.free()  # there is none


def test_who_is_not_heard_of_is_told_by_those_who_looked(gpus: Gpus) -> None:
    gpus.fails["arrive"] = {1}
    notes = results(form(gpus, sums_over_nccl))
    for rank in (0, 2):
        assert "what it wrote did not come" in notes[rank]
    assert notes[1].split("; ") == ["rank 0, 2 can't reach its peers"] * 2


def test_who_waits_on_the_device_for_a_rank_that_can_not_launch_gives_up_in_time(
    gpus: Gpus,
) -> None:
    gpus.fails["launch"] = {1}
    began = time.monotonic()
    notes = results(form(gpus, sums_over_nccl, timeout_s=2.0))
    assert time.monotonic() - began < TIMEOUT_S
    assert "RuntimeError: CUDA_ERROR_LAUNCH_FAILED" in notes[1]
    for rank in (0, 2):
        assert "all_reduce: rank 1 not there within" in notes[rank]


@pytest.mark.parametrize(
    ("offer", "note"),
    [
        (lambda offer: b"", "it offers no memory"),
        (lambda offer: offer[:-1], "it offers no memory"),
        (lambda offer: offer[:64] + b"\1" + bytes(7), "it offers 1 bytes, not "),
        (lambda offer: bytes(64) + offer[64:], "its CUDA IPC handle can't be opened"),
    ],
    ids=["empty", "cut off", "of another size", "with no handle"],
)
def test_an_offer_that_is_no_use_is_told(
    gpus: Gpus, offer: Callable[[bytes], bytes], note: str
) -> None:
    def carry(comm: PeerCommunicator, offers: Sequence[bytes]) -> Sequence[bytes]:
        return [*offers[:2], offer(offers[2])] if comm.rank == 0 else offers

    notes = results(form(gpus, sums_over_nccl, carry=carry))
    assert note in notes[0]
    for rank in (1, 2):
        assert notes[rank] == "; ".join(["rank 0 can't reach its peers"] * 2)


def test_what_an_earlier_group_left_does_not_pass_for_what_a_peer_writes(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.fails["arrive"] = {1}
    allocate = gpus.malloc

    def used_before(num_bytes: int) -> int:
        address = allocate(num_bytes)
        memory = thread_gpus.tensor_at(address, num_bytes // 4, torch.int32)
        for source in range(SIZE):
            memory[source * SLOT_BYTES // 4 :][:4] = peer_sums.PeerSums._pattern(source, gpus.rank)
        return address

    monkeypatch.setattr(sys.modules["cupy.cuda"].runtime, "malloc", used_before)
    assert "what it wrote did not come" in results(form(gpus, sums_over_nccl))[0]


# What ends the group instead


def test_an_abort_ends_the_trials(gpus: Gpus) -> None:
    """No rank takes NCCL in a group that is over."""
    gpus.fails["launch"] = {1}  # so that the others wait
    comms: list[PeerCommunicator] = []

    def carry(comm: PeerCommunicator, offers: Sequence[bytes]) -> Sequence[bytes]:
        comms.append(comm)
        return offers

    def abort() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while len(gpus.kernel_calls) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        for comm in comms:
            comm.abort()

    aborting = threading.Thread(target=abort)
    aborting.start()
    began = time.monotonic()
    errors = [future.exception() for future in form(gpus, str, carry=carry, timeout_s=60.0)]
    assert time.monotonic() - began < TIMEOUT_S
    aborting.join()
    # A rank may see that a peer has gone before it is told itself.
    assert all(isinstance(error, CommunicatorError) for error in errors), errors
    assert any(isinstance(error, CommunicatorAborted) for error in errors), errors


def test_a_rank_that_does_not_take_part_is_named_and_ends_it(gpus: Gpus) -> None:
    def carry(comm: PeerCommunicator, offers: Sequence[bytes]) -> Sequence[bytes]:
        if comm.rank == 1:  # is alive and silent, for longer than the others wait
            time.sleep(1.0)
            raise InterruptedError
        return offers

    errors = [future.exception() for future in form(gpus, str, carry=carry, timeout_s=0.3)]
    assert isinstance(errors.pop(1), InterruptedError)
    # Who gave up first is gone for the other.
    assert all(isinstance(error, CommunicatorError) for error in errors), errors
    timeouts = [error for error in errors if isinstance(error, CommunicatorTimeout)]
    assert timeouts and all(1 in error.ranks for error in timeouts), errors


def test_nccl_that_fails_while_it_is_measured_ends_it(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to take instead."""

    def fails(*arguments: Any) -> None:
        raise thread_gpus.NcclError("NCCL_ERROR_SYSTEM_ERROR: no")

    monkeypatch.setattr(thread_gpus._ThreadNccl, "allReduce", fails)
    for future in form(gpus, lambda comm: None):
        error = future.exception()
        assert type(error) is CommunicatorError
        assert str(error).startswith("all_reduce: NCCL failed: NCCL_ERROR_SYSTEM_ERROR")


def test_a_failure_of_nccls_ends_sums_that_wait_for_a_peer(gpus: Gpus) -> None:
    """Not only their deadline, which is far, and not only an abort, which comes later."""

    def use(comm: PeerCommunicator) -> float:
        comm.barrier(TIMEOUT_S)
        if comm.rank == 1:  # which never comes
            gpus.nccl_comms[0].async_error = "NCCL_ERROR_REMOTE_ERROR: a peer is gone"
            return 0.0
        began = time.monotonic()
        comm.all_reduce(torch.ones(4096))
        assert "NCCL_ERROR_REMOTE_ERROR" in str(comm.failure())
        return time.monotonic() - began

    assert max(results(form(gpus, use, size=2))) < DEFAULT_OP_TIMEOUT_S / 4


def test_memory_of_a_peer_that_can_not_be_closed_keeps_none_open(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a process which has ended may be."""
    refused = set(range(SIZE))

    def close(address: int) -> None:
        gpus.opened.remove(address)
        if gpus.rank in refused:
            refused.remove(gpus.rank)
            raise thread_gpus.CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid")

    monkeypatch.setattr(sys.modules["cupy.cuda"].runtime, "ipcCloseMemHandle", close)
    results(form(gpus, lambda comm: comm.barrier(TIMEOUT_S)))
    assert not refused and gpus.opened == []


# Which way


def test_a_sum_beyond_a_slot_goes_in_pieces_each_by_its_own_way(gpus: Gpus) -> None:
    gpus.microseconds = lambda rank, path, num_bytes: (
        {"one_shot": 3.0, "two_shot": 6.0, "nccl": 20.0}[path]
        + 10.0 * (path == "one_shot" and num_bytes > 8 * KIB)
    )
    num_bytes = 2 * SLOT_BYTES + 4 * KIB

    def use(comm: PeerCommunicator) -> list[tuple[int, str, int]]:
        assert comm.all_reduce_path(num_bytes) == "peer"
        x = torch.arange(num_bytes // 2, dtype=torch.bfloat16).remainder(7) + comm.rank
        expected = x * SIZE - SIZE * comm.rank + sum(range(SIZE))
        comm.barrier(TIMEOUT_S)
        called = len(gpus.kernel_calls)
        comm.barrier(TIMEOUT_S)
        assert torch.equal(comm.all_reduce(x), expected)
        comm.barrier(TIMEOUT_S)
        return [call for call in gpus.kernel_calls[called:] if call[0] == comm.rank]

    for rank, calls in enumerate(results(form(gpus, use))):
        assert calls == [
            (rank, "two_shot", SLOT_BYTES),
            (rank, "two_shot", SLOT_BYTES),
            (rank, "one_shot", 4 * KIB),
        ]


@pytest.mark.parametrize(
    ("nccl_us", "num_bytes", "path", "fuses"),
    [
        (20.0, 16, "peer", True),
        (20.0, SLOT_BYTES, "peer", True),
        (20.0, SLOT_BYTES + 16, "peer", False),
        (20.0, 24, "nccl", False),  # no whole vectors
        (1.0, 16, "nccl", False),
    ],
)
def test_which_sums_go_to_peers_and_which_with_the_norm(
    gpus: Gpus, nccl_us: float, num_bytes: int, path: str, fuses: bool
) -> None:
    gpus.microseconds = lambda rank, path, num_bytes: nccl_us if path == "nccl" else 5.0

    def use(comm: PeerCommunicator) -> tuple[str, bool]:
        comm.barrier(TIMEOUT_S)
        x = torch.ones(1, num_bytes // 2, dtype=torch.bfloat16)
        assert comm.all_gather_path == "nccl"
        return comm.all_reduce_path(num_bytes), comm.norm_fusing(x) is comm

    assert results(form(gpus, use, size=2)) == [(path, fuses)] * 2


def test_a_sum_before_it_is_connected_is_nccls(gpus: Gpus) -> None:
    def one(rank: int) -> None:
        comm = PeerCommunicator.join(
            communicator_id,
            rank,
            2,
            device=CPU,
            timeout_s=TIMEOUT_S,
            interface_host=HOST,
            store=store if rank == 0 else None,
        )
        assert comm.links == () and comm.all_reduce_path(16) == "nccl"
        assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
        comm.barrier(TIMEOUT_S)
        comm.close()

    communicator_id, store = NcclCommunicator.create_id(HOST)
    results(gpus.outcomes(2, one))
