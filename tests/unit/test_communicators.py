"""The CPU communicators, between real processes.

Ranks are processes forked from a server that has imported torch, so that a group starts in
milliseconds. Each runs one function of this module and sends back what it returned or raised.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shard_worker.communicator import (
    Communicator,
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorTimeout,
    sum_in_rank_order,
)
from shard_worker.communicator.gloo import GlooCommunicator
from shard_worker.communicator.shm import ShmCommunicator
from shard_worker.communicator.single import SingleCommunicator

HOST = "127.0.0.1"
TRANSPORTS = ("shm", "gloo")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE = 4096  # the smallest slot: a few thousand elements already go in chunks
JOIN_TIMEOUT_S = 20.0

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "torch", "torch.distributed"])


# Running ranks


@dataclass
class Outcome:
    """What a rank returned or the exception that ended it, and when."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    seconds: float = 0.0


class Rank:
    """A process that runs function(*args) and is killed at the latest when the test ends."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self._results, theirs = processes.Pipe(duplex=False)
        self.process = processes.Process(target=_run, args=(theirs, function, args), daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self, timeout_s: float = 30.0) -> Outcome:
        assert self._results.poll(timeout_s), f"a rank hangs: nothing within {timeout_s} s"
        outcome: Outcome = self._results.recv()
        return outcome

    def value(self) -> Any:
        outcome = self.outcome()
        assert outcome.error is None, outcome.trace
        return outcome.value

    def error(self) -> BaseException:
        outcome = self.outcome()
        assert outcome.error is not None, f"no error, but {outcome.value}"
        return outcome.error

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def memory_map(self) -> str:
        return Path(f"/proc/{self.process.pid}/maps").read_text()


def _run(results: Connection, function: Callable[..., Any], args: Sequence[object]) -> None:
    torch.set_num_threads(1)
    began = time.monotonic()
    outcome = Outcome()
    try:
        outcome.value = function(*args)
    except BaseException as error:
        outcome.error, outcome.trace = error, traceback.format_exc()
    outcome.seconds = time.monotonic() - began
    results.send(outcome)


Meeting = bytes | list[Connection] | Connection


def join(
    transport: str, meeting: Meeting, rank: int, size: int, **options: Any
) -> ShmCommunicator | GlooCommunicator:
    """meeting: the id; for Gloo, where rank 0 makes it, the pipes by which the others get it."""
    options.setdefault("timeout_s", JOIN_TIMEOUT_S)
    if transport == "shm":
        assert isinstance(meeting, bytes)
        options.setdefault("capacity_bytes", PAGE)
        return ShmCommunicator.join(meeting, rank, size, **options)
    store = None
    if isinstance(meeting, list):
        communicator_id, store = GlooCommunicator.create_store(HOST)
        for pipe in meeting:
            pipe.send(communicator_id)
    elif isinstance(meeting, Connection):
        communicator_id = meeting.recv()
    return GlooCommunicator.join(
        communicator_id, rank, size, store=store, interface_host=HOST, **options
    )


def meetings(transport: str, size: int) -> list[Meeting]:
    if transport == "shm":
        communicator_id = ShmCommunicator.create_id()
        return [communicator_id] * size
    pipes = [processes.Pipe(duplex=False) for _ in range(size - 1)]
    return [[send for _, send in pipes], *(receive for receive, _ in pipes)]


@contextlib.contextmanager
def ranks(
    transport: str,
    size: int,
    function: Callable[..., Any],
    *args: object,
    absent: int | None = None,
) -> Iterator[list[Rank]]:
    """`size` processes that run function(transport, meeting, rank, size, *args)."""
    met = meetings(transport, size)
    started = [
        Rank(function, transport, met[r], r, size, *args) for r in range(size) if r != absent
    ]
    try:
        yield started
    finally:
        for rank in started:
            rank.process.kill()
            rank.process.join(10)
        if transport == "shm":
            assert not has_segment(met[0]), "a segment is left behind"


def has_segment(communicator_id: Meeting) -> bool:
    assert isinstance(communicator_id, bytes)
    return Path("/dev/shm", communicator_id.decode()).exists()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for does not happen"
        time.sleep(0.002)


# What the collectives compute


def tensor(key: str, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A rank's input, which every rank can make: values of very different magnitudes, so that
    another order of adding them, or another rounding, gives other bits."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{rank}".encode()))
    if not dtype.is_floating_point:
        return torch.randint(-100, 100, tuple(shape), dtype=dtype, generator=generator)
    exponents = torch.randint(-6, 7, tuple(shape), generator=generator)
    return (torch.randn(tuple(shape), generator=generator) * 2.0**exponents).to(dtype)


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def check_sum(key: str, result: Tensor, size: int) -> None:
    """result is the sum in rank order in float32, rounded once, and near the float64 sum."""
    parts = [tensor(key, r, result.shape, result.dtype) for r in range(size)]
    in_order = parts[0].float()
    for part in parts[1:]:
        in_order = in_order + part.float()
    assert bits(result) == bits(in_order.to(result.dtype)), key
    exact = torch.stack([part.double() for part in parts]).sum(0)
    magnitude = torch.stack([part.double().abs() for part in parts]).sum(0)
    error = (result.double() - exact).abs()
    assert bool((error <= magnitude * (size / 2 * torch.finfo(result.dtype).eps)).all()), key


def reduce_many(transport: str, meeting: Meeting, rank: int, size: int) -> list[bytes]:
    """All-reduces of many shapes and dtypes; returns the bits of each result."""
    communicator = join(transport, meeting, rank, size)
    page = PAGE // 4
    shapes = [(1,), (2,), (1, 576), (3, 1, 7), (page - 1,), (page,), (page + 1,), (2 * page,)]
    shapes += [(2 * page + 1,), (5, 1237), (), (0,), (40_000,)]
    results = []
    for dtype in DTYPES:
        for shape in shapes:
            key = f"{dtype}{shape}"
            x = tensor(key, rank, shape, dtype)
            assert communicator.all_reduce(x) is x
            check_sum(key, x, size)
            results.append(bits(x))
    communicator.close()
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_reduce_gives_every_rank_the_bits_of_the_float32_sum_in_rank_order(
    transport: str, size: int
) -> None:
    with ranks(transport, size, reduce_many) as group:
        results = [rank.value() for rank in group]
    assert all(result == results[0] for result in results[1:])


def test_a_sum_of_three_bfloat16_is_rounded_once() -> None:
    parts = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    assert (parts[0] + parts[1] + parts[2]).item() == 256.0, "rounding twice loses the ones"
    out = torch.empty(1, dtype=torch.bfloat16)
    sum_in_rank_order([part.float() for part in parts], out)
    assert out.item() == 258.0
    with pytest.raises(AssertionError):
        sum_in_rank_order(parts, out)


def test_a_sum_keeps_the_order_of_the_ranks() -> None:
    parts = [torch.tensor([v]) for v in (1.0, 1e8, -1e8)]
    out = torch.empty(1)
    sum_in_rank_order(parts, out)
    assert out.item() == 0.0
    sum_in_rank_order(parts[::-1], out)
    assert out.item() == 1.0


def check_gather(
    communicator: Communicator, key: str, lead: Sequence[int], sizes: Sequence[int], dtype: Any
) -> Tensor:
    parts = [tensor(key, r, (*lead, s), dtype) for r, s in enumerate(sizes)]
    x = parts[communicator.rank].clone()
    result = communicator.all_gather(x, sizes)
    assert (result.is_contiguous() and result.data_ptr() != x.data_ptr()) or not x.numel()
    assert bits(result) == bits(torch.cat(parts, dim=-1)), key
    assert bits(x) == bits(parts[communicator.rank]), "the input is left alone"
    return result


def gather_many(transport: str, meeting: Meeting, rank: int, size: int) -> list[bytes]:
    communicator = join(transport, meeting, rank, size)
    results = []
    for dtype in (torch.bfloat16, torch.int64):
        for unit in (0, 1, 7, 500, 3000):  # 3000 elements of a row alone exceed a slot
            for lead in ((), (1,), (3,), (2, 5)):
                for order in (1, -1):
                    sizes = [unit * (r + 1) if r != 1 else 0 for r in range(size)][::order]
                    key = f"{dtype}{lead}{sizes}"
                    results.append(bits(check_gather(communicator, key, lead, sizes, dtype)))
    strided = torch.arange(12.0).view(3, 4).t() + rank
    expected = torch.cat([torch.arange(12.0).view(3, 4).t() + r for r in range(size)], dim=-1)
    assert torch.equal(communicator.all_gather(strided, [3] * size), expected)
    communicator.close()
    return results


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_gather_concatenates_uneven_ranks(transport: str, size: int) -> None:
    with ranks(transport, size, gather_many) as group:
        results = [rank.value() for rank in group]
    assert all(result == results[0] for result in results[1:])


def mixed_sequence(
    transport: str, meeting: Meeting, rank: int, size: int, num_ops: int, seed: int
) -> int:
    """The same random collectives on all ranks, each rank late at moments of its own."""
    communicator = join(transport, meeting, rank, size)
    shared, own = random.Random(seed), random.Random(f"{seed}/{rank}")
    count = 0
    kept: list[tuple[Tensor, bytes]] = []
    for i in range(num_ops):
        op = shared.choice(("all_reduce", "all_reduce", "all_gather", "barrier"))
        dtype = shared.choice(DTYPES)
        lead = shared.choice(((), (1,), (3,)))
        largest = shared.choice((1, 16, 576, 6000))
        sizes = [shared.randint(0, largest) for _ in range(size)]
        if own.random() < 0.05:
            time.sleep(own.choice((0.0002, 0.001, 0.004)))  # the last is beyond the spinning
        key = f"{seed}/{i}"
        if op == "all_reduce":
            x = tensor(key, rank, (*lead, sizes[0]), dtype)
            check_sum(key, communicator.all_reduce(x), size)
        elif op == "all_gather":
            result = check_gather(communicator, key, lead, sizes, dtype)
            kept = [*kept[-8:], (result, bits(result))]
        else:
            communicator.barrier(10.0)
            continue
        count += 1
    assert all(bits(result) == before for result, before in kept), "results are not views of slots"
    communicator.close()
    return count


@pytest.mark.parametrize(
    ("transport", "size", "num_ops"),
    [("shm", 2, 1000), ("shm", 3, 500), ("shm", 4, 300), ("gloo", 2, 200), ("gloo", 3, 100)],
)
def test_long_mixed_sequences_with_late_ranks_stay_right(
    transport: str, size: int, num_ops: int
) -> None:
    with ranks(transport, size, mixed_sequence, num_ops, size) as group:
        assert min(rank.value() for rank in group) > num_ops / 2


def inference_mode_and_after(transport: str, meeting: Meeting, rank: int, size: int) -> None:
    communicator = join(transport, meeting, rank, size)
    for _ in range(4):  # both slots, twice
        with torch.inference_mode():
            x = communicator.all_reduce(torch.ones(5))
            assert x.tolist() == [size] * 5
        assert communicator.all_reduce(torch.ones(5)).tolist() == [size] * 5
        assert communicator.all_gather(torch.ones(1), [1] * size).tolist() == [1] * size
    communicator.close()


def test_the_same_shapes_work_in_and_out_of_inference_mode() -> None:
    with ranks("shm", 2, inference_mode_and_after) as group:
        for rank in group:
            rank.value()


def refuse_bad_arguments(transport: str, meeting: Meeting, rank: int, size: int) -> None:
    communicator = join(transport, meeting, rank, size)
    communicator.all_reduce(torch.ones(2, 2))  # of the same shape as the bad ones below
    bad: list[Callable[[], Tensor]] = [
        lambda: communicator.all_reduce(torch.ones(2, 2).t()[:1].t()),
        lambda: communicator.all_reduce(torch.ones(4, 2)[::2]),
        lambda: communicator.all_reduce(torch.ones(2, 2, dtype=torch.int64)),
        lambda: communicator.all_reduce(torch.ones(2, 2, requires_grad=True)),
        lambda: communicator.all_reduce(torch.ones(2, 2, device="meta")),
        lambda: communicator.all_gather(torch.ones(2, 2), [2]),
        lambda: communicator.all_gather(torch.ones(2, 2), [3, 3]),
        lambda: communicator.all_gather(torch.ones(2, 2), [2, -2][:: 1 - 2 * rank]),
        lambda: communicator.all_gather(torch.tensor(1.0), [1, 1]),
        lambda: communicator.all_gather(torch.ones(2, 2, requires_grad=True), [2, 2]),
    ]
    for call in bad:
        with pytest.raises(ValueError, match=r"^(x|sizes): "):
            call()
    assert communicator.all_reduce(torch.ones(3)).tolist() == [size] * 3
    communicator.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bad_arguments_are_refused_before_anything_is_sent(transport: str) -> None:
    with ranks(transport, 2, refuse_bad_arguments) as group:
        for rank in group:
            rank.value()


def test_a_group_of_one_is_the_identity_and_says_so() -> None:
    communicator = SingleCommunicator()
    x = torch.randn(2, 3)
    before = x.clone()
    assert communicator.all_reduce(x) is x and torch.equal(x, before)
    assert communicator.all_gather(x, [3]) is x
    communicator.barrier(0.0)
    with pytest.raises(ValueError, match="sizes"):
        communicator.all_gather(x, [4])
    with pytest.raises(ValueError, match="contiguous"):
        communicator.all_reduce(x.t())
    communicator.abort()
    with pytest.raises(CommunicatorAborted):
        communicator.all_reduce(x)
    communicator.close()
    with pytest.raises(CommunicatorError, match="closed"):
        communicator.all_reduce(x)


# Waiting


def wait_for_a_late_peer(
    transport: str, meeting: Meeting, rank: int, size: int
) -> tuple[float, float]:
    communicator = join(transport, meeting, rank, size)
    communicator.barrier(5.0)
    began, cpu = time.monotonic(), time.thread_time()
    if rank == 1:
        time.sleep(0.5)
    communicator.all_reduce(torch.ones(4))
    seconds = time.monotonic() - began, time.thread_time() - cpu
    communicator.barrier(5.0)
    communicator.close()
    return seconds


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_long_wait_gives_the_core_back(transport: str) -> None:
    with ranks(transport, 2, wait_for_a_late_peer) as group:
        waited_s, cpu_s = group[0].value()
    assert waited_s > 0.4
    assert cpu_s < waited_s / 4


def late_at_barriers(transport: str, meeting: Meeting, rank: int, size: int) -> float:
    communicator = join(transport, meeting, rank, size)
    communicator.barrier(5.0)
    began = time.monotonic()
    time.sleep(0.15 * rank)
    communicator.barrier(5.0)
    waited_s = time.monotonic() - began
    if rank == 0:
        with pytest.raises(CommunicatorTimeout, match=r"barrier: ranks 1, 2 not there"):
            communicator.barrier(0.2)
    else:
        time.sleep(0.4)
    communicator.close()
    return waited_s


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_barrier_waits_for_the_last_and_names_who_is_missing(transport: str) -> None:
    with ranks(transport, 3, late_at_barriers) as group:
        assert all(rank.value() > 0.28 for rank in group)


def join_briefly(transport: str, meeting: Meeting, rank: int, size: int, **options: Any) -> None:
    join(transport, meeting, rank, size, timeout_s=0.5).close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_join_names_the_ranks_that_did_not_come(transport: str) -> None:
    with ranks(transport, 4, join_briefly, absent=2) as group:
        outcomes = [rank.outcome() for rank in group]
    for outcome in outcomes:
        assert isinstance(outcome.error, CommunicatorTimeout), outcome.trace
        assert outcome.error.op == "join"
        assert outcome.error.ranks == (2,)
        assert outcome.seconds < 2.0


def test_a_join_without_rank_0_names_it() -> None:
    with pytest.raises(CommunicatorTimeout, match=r"join: rank 0 not there within 0.2 s"):
        ShmCommunicator.join(ShmCommunicator.create_id(), 1, 2, timeout_s=0.2)


@pytest.mark.parametrize("listening", ["nobody", "a stranger who hangs up", "a stranger"])
def test_a_gloo_join_without_a_store_names_rank_0_in_time(listening: str) -> None:
    with socket.socket() as server:
        server.bind((HOST, 0))
        port = server.getsockname()[1]
        if listening != "nobody":
            server.listen(8)
        if listening == "a stranger who hangs up":

            def hang_up() -> None:
                with contextlib.suppress(OSError):  # the test is over
                    while True:
                        server.accept()[0].close()

            threading.Thread(target=hang_up, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(CommunicatorTimeout) as caught:
            GlooCommunicator.join(
                f"{HOST}:{port}".encode(), 1, 2, timeout_s=0.5, interface_host=HOST
            )
        assert caught.value.ranks == (0,)
        assert time.monotonic() - began < 2.0


def join_and_report(transport: str, meeting: Meeting, rank: int, size: int, pipe: Any) -> None:
    """Do one all_reduce, tell the test, and start another one; rank 1 goes to sleep instead."""
    communicator = join(transport, meeting, rank, size, op_timeout_s=0.5)
    communicator.all_reduce(torch.ones(4))
    pipe.send(rank)
    if rank == 1:
        time.sleep(60)
    began = time.monotonic()
    try:
        communicator.all_reduce(torch.ones(4))
    finally:
        pipe.send(time.monotonic() - began)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_is_killed_or_hangs_ends_the_wait(
    transport: str, number: signal.Signals
) -> None:
    receive, send = processes.Pipe(duplex=False)
    with ranks(transport, 2, join_and_report, send) as group:
        assert {receive.recv(), receive.recv()} == {0, 1}
        group[1].signal(number)
        error = group[0].error()
        waited_s = receive.recv()
    if transport == "gloo" and number == signal.SIGKILL:
        # The kernel closes a dead process's connections, so the deadline is not needed.
        assert isinstance(error, CommunicatorError) and "lost rank 1" in str(error)
        assert waited_s < 0.6
    else:
        assert isinstance(error, CommunicatorTimeout)
        assert (error.op, error.ranks, error.timeout_s) == ("all_reduce", (1,), 0.5)
        assert 0.4 < waited_s < 1.5


# Ending


def abort_while_waiting(
    transport: str, meeting: Meeting, rank: int, size: int
) -> tuple[float, str]:
    """The last rank stays away; rank 0 aborts from another thread. Returns the time from the abort
    (or from the call, for the last rank, which comes after it) to the error, and the error."""
    communicator = join(transport, meeting, rank, size)
    communicator.all_reduce(torch.ones(4))
    aborted_at = 0.0
    if rank == size - 1:
        time.sleep(0.5)
    if rank == 0:

        def abort() -> None:
            nonlocal aborted_at
            time.sleep(0.25)
            aborted_at = time.monotonic()
            communicator.abort()

        threading.Thread(target=abort).start()
    error_type = CommunicatorAborted if rank == 0 or transport == "shm" else CommunicatorError
    began = time.monotonic()
    with pytest.raises(error_type) as caught:
        communicator.all_reduce(torch.ones(4))
    ended = time.monotonic()
    with pytest.raises(CommunicatorAborted):
        communicator.all_gather(torch.ones(4), [4] * size)
    with pytest.raises(CommunicatorAborted):
        communicator.barrier(1.0)
    communicator.abort()
    communicator.close()
    assert time.monotonic() - ended < 0.5, "closing after an abort does not wait"
    if rank == size - 1:
        return ended - began, str(caught.value)  # it came after the abort
    if rank == 0:
        return ended - aborted_at, str(caught.value)
    return ended - began - 0.25, str(caught.value)


@pytest.mark.parametrize(("transport", "size"), [("shm", 2), ("shm", 3), ("gloo", 2)])
def test_abort_frees_this_rank_and_its_peers(transport: str, size: int) -> None:
    with ranks(transport, size, abort_while_waiting) as group:
        results = [rank.value() for rank in group]
    for rank, (seconds, _) in enumerate(results):
        assert seconds < (0.1 if rank in (0, size - 1) else 0.3)
    if transport == "shm":
        assert f"rank 0 aborted the group while rank 0 waited for {size - 1}" in results[0][1]
        assert "rank 0 aborted the group" in results[size - 1][1]


def leave_early(transport: str, meeting: Meeting, rank: int, size: int) -> None:
    communicator = join(transport, meeting, rank, size)
    communicator.all_reduce(torch.ones(4))
    if rank == 0:
        began = time.monotonic()
        with pytest.raises(CommunicatorError, match="rank 1"):
            communicator.all_reduce(torch.ones(4))
        assert time.monotonic() - began < 3.0
    communicator.close()
    communicator.close()
    communicator.abort()
    with pytest.raises(CommunicatorError, match="closed"):
        communicator.all_reduce(torch.ones(4))
    with pytest.raises(CommunicatorError, match="closed"):
        communicator.barrier(1.0)
    assert "/dev/shm/colrow-" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_closed_communicator_frees_its_memory_and_tells_its_peers(transport: str) -> None:
    with ranks(transport, 2, leave_early) as group:
        for rank in group:
            rank.value()


def diverge(transport: str, meeting: Meeting, rank: int, size: int) -> None:
    communicator = join(transport, meeting, rank, size, op_timeout_s=0.5)
    x = torch.ones(4)
    with pytest.raises(CommunicatorError):
        if rank == 0:
            communicator.all_reduce(x)
        else:
            communicator.all_gather(x, [4] * size)
    communicator.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_run_different_collectives_get_an_error_instead_of_garbage(
    transport: str,
) -> None:
    with ranks(transport, 2, diverge) as group:
        for rank in group:
            rank.value()


def test_nothing_is_left_in_dev_shm_when_ranks_are_killed() -> None:
    receive, send = processes.Pipe(duplex=False)
    with ranks("shm", 2, join_and_report, send) as group:
        assert {receive.recv(), receive.recv()} == {0, 1}
        segment = [line for line in group[0].memory_map().splitlines() if "/colrow-" in line]
        assert segment, "the ranks share a segment"
        assert all(line.endswith(" (deleted)") for line in segment), "that has lost its name"


def test_nothing_is_left_in_dev_shm_when_rank_0_is_killed_while_joining() -> None:
    communicator_id = ShmCommunicator.create_id()
    rank_0 = Rank(join_briefly, "shm", communicator_id, 0, 2)
    wait_until(lambda: has_segment(communicator_id))
    rank_0.process.kill()
    rank_0.process.join(10)
    assert has_segment(communicator_id)
    with pytest.raises(CommunicatorTimeout) as caught:
        ShmCommunicator.join(communicator_id, 1, 2, timeout_s=0.2, capacity_bytes=PAGE)
    assert caught.value.ranks == (0,)
    assert not has_segment(communicator_id)


# Meeting


@pytest.mark.parametrize(
    "communicator_id",
    [
        b"",
        b"colrow-",
        b"../../etc/passwd",
        b"colrow-" + b"0" * 31,
        b"colrow-" + b"0" * 33,
        b"colrow-" + b"0" * 32 + b"\n",
        b"colrow-" + b"0" * 31 + b"/",
        b"colrow-" + b"0" * 31 + b"\0",
        b"colrow-" + b"A" * 32,
        b"/dev/shm/colrow-" + b"0" * 32,
        b"127.0.0.1:1234",
    ],
)
def test_only_an_id_of_its_own_making_becomes_a_segment_name(communicator_id: bytes) -> None:
    for rank in (0, 1):
        with pytest.raises(ValueError, match="communicator_id"):
            ShmCommunicator.join(communicator_id, rank, 2, timeout_s=0.1)


@pytest.mark.parametrize("communicator_id", [b"", b"host", b":1", b"h:0", b"h:65536", b"h:1x"])
def test_a_gloo_id_is_host_and_port(communicator_id: bytes) -> None:
    with pytest.raises(ValueError, match="communicator_id"):
        GlooCommunicator.join(communicator_id, 1, 2, timeout_s=0.1, interface_host=HOST)


def test_ids_differ() -> None:
    assert len({ShmCommunicator.create_id() for _ in range(100)}) == 100


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 1), (0, 0)])
def test_impossible_memberships_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"^(rank|size): "):
        ShmCommunicator.join(ShmCommunicator.create_id(), rank, size, timeout_s=0.1)
    with pytest.raises(ValueError, match=r"^(rank|size): "):
        GlooCommunicator.join(b"h:1", rank, size, timeout_s=0.1, interface_host=HOST)


def test_addresses_that_are_not_of_this_machine_are_refused() -> None:
    with pytest.raises(ValueError, match="host"):
        GlooCommunicator.create_store("192.0.2.1")  # RFC 5737: nobody's
    with pytest.raises(ValueError, match="interface_host"):
        GlooCommunicator.join(b"127.0.0.1:1", 1, 2, timeout_s=0.1, interface_host="192.0.2.1")


def test_a_store_listens_on_its_host_only() -> None:
    communicator_id, store = GlooCommunicator.create_store(HOST)
    port = int(communicator_id.rpartition(b":")[2])
    assert port == store.port
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # fails if the store had all of the loopback's addresses
    with pytest.raises(ValueError, match="store"):
        GlooCommunicator.join(communicator_id, 0, 2, timeout_s=0.1, interface_host=HOST)


def test_no_rank_follows_a_planted_link(tmp_path: Path) -> None:
    communicator_id = ShmCommunicator.create_id()
    planted = Path("/dev/shm", communicator_id.decode())
    target = tmp_path / "target"
    planted.symlink_to(target)
    try:
        for rank in (0, 1):
            with pytest.raises(CommunicatorError, match="join"):
                ShmCommunicator.join(communicator_id, rank, 2, timeout_s=0.1)
        assert planted.is_symlink() and not target.exists()
    finally:
        planted.unlink()


def test_a_segment_larger_than_dev_shm_is_refused() -> None:
    communicator_id = ShmCommunicator.create_id()
    with pytest.raises(CommunicatorError, match="no room for"):
        ShmCommunicator.join(communicator_id, 0, 2, timeout_s=0.1, capacity_bytes=1 << 50)
    assert not has_segment(communicator_id)


def join_of_size(
    transport: str, meeting: Meeting, rank: int, size: int, options: list[dict[str, Any]]
) -> None:
    mine = dict(options[rank])
    join(transport, meeting, rank, mine.pop("size", size), timeout_s=5.0, **mine)


@pytest.mark.parametrize(
    ("transport", "options", "message"),
    [
        ("shm", [{"size": 2}, {"size": 3}], "size 2 on rank 0 and 3 on rank 1"),
        (
            "shm",
            [{}, {"capacity_bytes": 2 * PAGE}],
            f"capacity_bytes {PAGE} on rank 0 and {2 * PAGE} on rank 1",
        ),
        ("gloo", [{"size": 2}, {"size": 3}], "size 2 on rank 0 and 3 on rank 1"),
    ],
)
def test_ranks_that_disagree_are_told_how_and_at_once(
    transport: str, options: list[dict[str, Any]], message: str
) -> None:
    with ranks(transport, 2, join_of_size, options) as group:
        first, second = [rank.outcome() for rank in group]
    assert isinstance(second.error, CommunicatorError) and message in str(second.error)
    assert isinstance(first.error, CommunicatorError)
    assert max(first.seconds, second.seconds) < 3.0


def test_a_rank_that_joins_twice_is_refused_and_the_group_is_unharmed() -> None:
    communicator_id = ShmCommunicator.create_id()
    group = [Rank(reduce_many, "shm", communicator_id, r, 3) for r in (0, 1)]
    wait_until(lambda: all("/dev/shm/colrow-" in rank.memory_map() for rank in group))
    time.sleep(0.05)  # from the mapping to the check-in
    for again in (0, 1):
        with pytest.raises(CommunicatorError, match=f"rank {again} is there already"):
            ShmCommunicator.join(communicator_id, again, 3, timeout_s=1.0, capacity_bytes=PAGE)
    group.append(Rank(reduce_many, "shm", communicator_id, 2, 3))
    results = [rank.value() for rank in group]
    assert results[0] == results[1] == results[2]


def test_errors_survive_a_trip_between_processes() -> None:
    error = CommunicatorTimeout("all_reduce", [3, 1], 2.5, "why")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "all_reduce: ranks 1, 3 not there within 2.5 s (why)"
    assert (copy.op, copy.ranks, copy.timeout_s) == ("all_reduce", (1, 3), 2.5)
