"""Sums through each other's memory, by processes that take the GPUs in turn: one GPU is enough.

Ranks that share a GPU run one at a time, for milliseconds each, which is as hard a schedule as any.
"""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ranks import HOST, JOIN_TIMEOUT_S, Exchange, in_rank_order, run_ranks, terms
from shard_worker.communicator import peer_sums
from shard_worker.communicator.gloo import GlooCommunicator
from shard_worker.communicator.peer_sums import PeerMemory, PeerSums

pytestmark = pytest.mark.timeout(300)

SIZES = [2, 3, 4, 8]
USABLE_AGAIN_S = 10.0


def meet(
    rank: int, size: int, exchange: Exchange, op_timeout_s: float
) -> tuple[GlooCommunicator, PeerSums]:
    """This rank among the others, who are not connected yet."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    store = None
    communicator_id = b""
    if rank == 0:
        communicator_id, store = GlooCommunicator.create_store(HOST)
    control = GlooCommunicator.join(
        exchange(communicator_id)[0],
        rank,
        size,
        timeout_s=JOIN_TIMEOUT_S,
        interface_host=HOST,
        store=store,
    )
    memory = PeerMemory.allocate(size, device)
    return control, PeerSums(control, memory, op_timeout_s=op_timeout_s)


def connect(
    rank: int, size: int, exchange: Exchange, op_timeout_s: float = 60.0
) -> tuple[GlooCommunicator, PeerSums]:
    control, sums = meet(rank, size, exchange, op_timeout_s)
    links = sums.connect(exchange(sums.offer), JOIN_TIMEOUT_S)
    assert [link.path for link in links] == ["peer"] * (size - 1), links
    return control, sums


def leave(control: GlooCommunicator, sums: PeerSums) -> None:
    assert sums.failure() is None
    torch.cuda.synchronize()
    control.barrier(JOIN_TIMEOUT_S)
    sums.close()
    control.close()


def plain_sums(rank: int, size: int, exchange: Exchange) -> None:
    control, sums = connect(rank, size, exchange)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_tokens in (1, 3, 130):
            parts = terms(size, (num_tokens, 576), dtype, num_tokens)
            for two_shot in (False, True):
                x = parts[rank].to(sums.device)
                sums.launch(x, x, two_shot=two_shot)
                assert torch.equal(x.cpu(), in_rank_order(parts).to(dtype)), (dtype, num_tokens)
    leave(control, sums)


def both_shots_with_norm(rank: int, size: int, exchange: Exchange) -> None:
    control, sums = connect(rank, size, exchange)
    for hidden in (576, 4096, 8192, 16384):
        for num_tokens in (1, 5, 33):
            parts = terms(size, (num_tokens, hidden), torch.bfloat16, num_tokens)
            stream, weight = terms(2, (num_tokens, hidden), torch.bfloat16, 77)
            weight = weight[0].to(sums.device).contiguous()
            got = []
            for two_shot in (False, True):
                x, residual = parts[rank].to(sums.device), stream.to(sums.device)
                out = torch.empty_like(x)
                sums.launch(x, out, residual, weight, 1e-5, two_shot=two_shot)
                got.append((out, residual))
            torch.cuda.synchronize()
            (out, residual), (out_two, residual_two) = got
            assert torch.equal(out, out_two)
            assert torch.equal(residual, residual_two)
            expected = (in_rank_order(parts) + stream.float()).to(torch.bfloat16)
            assert torch.equal(residual.cpu(), expected)
            x = expected.double()
            x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.cpu().double()
            torch.testing.assert_close(out.cpu().double(), x, rtol=0.02, atol=0.01)
    leave(control, sums)


def graph_of_many_sizes(rank: int, size: int, exchange: Exchange) -> None:
    control, sums = connect(rank, size, exchange)
    shapes = [(1, 4096), (130, 4096), (1, 4096), (17, 4096), (2, 576)]
    inputs = [terms(size, shape, torch.bfloat16, 5) for shape in shapes]
    static = [parts[rank].to(sums.device) for parts in inputs]
    outs = [torch.empty_like(x) for x in static]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at, (x, out) in enumerate(zip(static, outs, strict=True)):
            sums.launch(x, out, two_shot=at % 2 == 1)
    for _ in range(20):
        graph.replay()
        if rank == 0:
            time.sleep(0.005)  # the ranks drift
    torch.cuda.synchronize()
    for parts, out in zip(inputs, outs, strict=True):
        assert torch.equal(out.cpu(), in_rank_order(parts).to(torch.bfloat16))
    del graph
    leave(control, sums)


def a_peer_that_never_comes(rank: int, size: int, exchange: Exchange, way: str) -> float:
    """Seconds from the abort, or the deadline, until the device was free."""
    control, sums = connect(rank, size, exchange, 2.0 if way == "deadline" else 3600.0)
    took_s = 0.0
    if rank < size - 1:
        x = torch.ones(4, 4096, dtype=torch.bfloat16, device=sums.device)
        began = time.monotonic()
        for _ in range(50):  # all that is queued ends, not only the first
            sums.launch(x, x.clone(), torch.ones_like(x), torch.ones_like(x[0]), two_shot=False)
        if way == "abort":
            time.sleep(1.0)
            began = time.monotonic()
            threading.Thread(target=sums.abort).start()
        torch.cuda.synchronize()
        took_s = time.monotonic() - began
        failure = sums.failure()
        if way == "abort":
            assert failure is None
        else:
            assert failure is not None
            assert size > 2 or failure.ranks == (size - 1,)
        assert torch.ones(8, device=sums.device).sum().item() == 8
    exchange(b"")  # the last rank stays till the others are through
    sums.close()
    control.close()
    return took_s


def memory_that_is_used_again(rank: int, size: int, exchange: Exchange) -> None:
    """A group after another one that broke off: nothing of the old one is left."""
    control, sums = connect(rank, size, exchange, 0.5)
    if rank == 0:
        x = torch.ones(8, 4096, dtype=torch.bfloat16, device=sums.device)
        sums.launch(x, x, two_shot=False)
        torch.cuda.synchronize()
        assert sums.failure() is not None
    exchange(b"")
    memory: Any = sums._memory
    sums.close()
    again = PeerSums(control, memory, op_timeout_s=60.0)
    links = again.connect(exchange(again.offer), JOIN_TIMEOUT_S)
    assert {link.path for link in links} == {"peer"}
    parts = terms(size, (8, 4096), torch.bfloat16, 1)
    x = parts[rank].to(again.device)
    again.launch(x, x, two_shot=False)
    assert torch.equal(x.cpu(), in_rank_order(parts).to(torch.bfloat16))
    leave(control, again)


def a_handle_of_nothing(rank: int, size: int, exchange: Exchange) -> list[str]:
    """One rank's offer can't be opened; the notes of the links."""
    control, sums = meet(rank, size, exchange, 10.0)
    offers = list(exchange(sums.offer))
    if rank == 0:
        offers[1] = bytes(64) + offers[1][64:]
    links = sums.connect(offers, JOIN_TIMEOUT_S)
    control.close()
    assert {link.path for link in links} == {"nccl"}
    return [link.note for link in links]


def one_without(rank: int, size: int, exchange: Exchange, what: str) -> str:
    """Rank 0 can't have memory of its own, or the kernel; the notes of the links."""
    if rank == 0 and what == "memory":
        peer_sums.TURNS = 1_000_000  # which is more than a device has
    if rank == 0 and what == "kernel":
        peer_sums._SOURCE = Path(__file__)  # which is no CUDA
    control, sums = meet(rank, size, exchange, 10.0)
    links = sums.connect(exchange(sums.offer), JOIN_TIMEOUT_S)
    control.close()
    assert {link.path for link in links} == {"nccl"}
    # What CUDA has refused is not left for the next operation to fail at.
    assert torch.ones(8, device=sums.device).sum().item() == 8
    return "; ".join(link.note for link in links)


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_in_rank_order_to_the_bit(size: int) -> None:
    run_ranks(plain_sums, size)


@pytest.mark.parametrize("size", SIZES)
def test_one_shot_and_two_shots_with_residual_and_norm(size: int) -> None:
    run_ranks(both_shots_with_norm, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_graph_that_is_replayed_while_ranks_drift(size: int) -> None:
    run_ranks(graph_of_many_sizes, size)


@pytest.mark.parametrize("way", ["abort", "deadline"])
@pytest.mark.parametrize("size", [2, 4])
def test_who_waits_for_a_peer_that_never_comes_is_usable_again(size: int, way: str) -> None:
    assert max(run_ranks(a_peer_that_never_comes, size, way)) < USABLE_AGAIN_S


def test_memory_serves_one_group_after_another() -> None:
    run_ranks(memory_that_is_used_again, 2)


def test_memory_that_can_not_be_opened_is_told_and_all_use_nccl() -> None:
    (first,), (second,) = run_ranks(a_handle_of_nothing, 2)
    assert "CUDA IPC handle can't be opened" in first
    assert second == "rank 0 can't reach its peers"


@pytest.mark.parametrize(
    ("what", "note"), [("memory", "bytes for peers: cuda"), ("kernel", "CompileException: ")]
)
def test_one_rank_without_its_part_is_told_and_all_use_nccl(what: str, note: str) -> None:
    first, second = run_ranks(one_without, 2, what)
    assert note in first
    assert second in ("it offers no memory", "rank 0 can't reach its peers")
