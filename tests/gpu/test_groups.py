"""Communicators between GPUs, a process each: sums, graphs, and ranks that never come.

For every number of ranks that there are GPUs for.
"""

import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shard_worker.communicator import CommunicatorTimeout, Link
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.peer import PeerCommunicator, PeerMemory

pytestmark = pytest.mark.timeout(240)

HOST = "127.0.0.1"
JOIN_TIMEOUT_S = 60.0
USABLE_AGAIN_S = 10.0
SIZES = range(2, min(torch.cuda.device_count(), 8) + 1)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

if len(SIZES) == 0:
    pytest.skip("there are no two GPUs", allow_module_level=True)

Exchange = Callable[[bytes], Sequence[bytes]]


def join(rank: int, size: int, exchange: Exchange, **options: Any) -> PeerCommunicator:
    """This rank of a group, connected to its peers."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = None
    communicator_id = b""
    if rank == 0:
        communicator_id, store = NcclCommunicator.create_id(HOST)
    comm = PeerCommunicator.join(
        exchange(communicator_id)[0],
        rank,
        size,
        device=device,
        timeout_s=JOIN_TIMEOUT_S,
        interface_host=HOST,
        store=store,
        **options,
    )
    comm.connect(exchange(comm.offer(PeerMemory.allocate(size, device))), JOIN_TIMEOUT_S)
    return comm


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    inboxes: Sequence[Any],
    results: Any,
    arguments: Sequence[Any],
) -> None:
    def exchange(mine: bytes) -> list[bytes]:
        for inbox in inboxes:
            inbox.put((rank, mine))
        return [piece for _, piece in sorted(inboxes[rank].get(timeout=60) for _ in range(size))]

    try:
        results.put((rank, function(rank, size, exchange, *arguments), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, size, exchange, *arguments)` gives on each rank."""
    context = multiprocessing.get_context("spawn")
    inboxes = [context.Queue() for _ in range(size)]
    results = context.Queue()
    ranks = [
        context.Process(
            target=_rank, args=(function, rank, size, inboxes, results, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        answers: dict[int, Any] = {}
        for _ in ranks:
            rank, answer, error = results.get(timeout=180)
            assert not error, f"rank {rank}: {error}"
            answers[rank] = answer
        return [answers[rank] for rank in range(size)]
    except queue.Empty:
        raise AssertionError("a rank hangs") from None
    finally:
        for process in ranks:
            process.join(20)
            process.kill()


# What the ranks do. Numbers are those of a seed, so that each rank knows what the others have.


def terms(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


def in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def sums(rank: int, size: int, exchange: Exchange) -> list[Link]:
    comm = join(rank, size, exchange)
    for dtype in DTYPES:
        for seed, num_tokens in enumerate((1, 3, 64, 300)):
            parts = terms(size, (num_tokens, 576), dtype, seed)
            x = comm.all_reduce(parts[rank].to(comm.device))
            torch.cuda.synchronize()
            assert comm.failure() is None
            expected = in_rank_order(parts).to(dtype)
            if comm.all_reduce_path(x.nbytes) == "peer":
                assert torch.equal(x.cpu(), expected), (dtype, num_tokens)
            else:
                torch.testing.assert_close(x.cpu(), expected, rtol=0.02, atol=0.05)
            # Every rank has the same bits.
            bits = x.view(torch.uint8).flatten().long()
            everyone = comm.all_gather(bits, [len(bits)] * size).view(size, -1)
            assert bool((everyone == everyone[0]).all())
            # And NCCL alone has the same but for its rounding.
            other = NcclCommunicator.all_reduce(comm, parts[rank].to(comm.device))
            tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
            torch.testing.assert_close(x, other, rtol=tolerance, atol=tolerance)
    links = list(comm.links)
    comm.barrier(JOIN_TIMEOUT_S)
    comm.close()
    return links


def both_shots_with_norm(rank: int, size: int, exchange: Exchange) -> None:
    comm = join(rank, size, exchange)
    for hidden in (576, 4096, 8192, 16384):
        for num_tokens in (1, 5, 33):
            parts = terms(size, (num_tokens, hidden), torch.bfloat16, num_tokens)
            stream, weight = terms(2, (num_tokens, hidden), torch.bfloat16, 77)
            weight = weight[0].to(comm.device).contiguous()
            got = []
            for two_shot in (False, True):
                x, residual = parts[rank].to(comm.device), stream.to(comm.device)
                out = torch.empty_like(x)
                comm._launch(x, out, residual, weight, 1e-5, two_shot=two_shot)
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
    assert comm.failure() is None
    comm.barrier(JOIN_TIMEOUT_S)
    comm.close()


def graphs_of_many_sizes(rank: int, size: int, exchange: Exchange) -> None:
    comm = join(rank, size, exchange)
    shapes = [(1, 4096), (300, 4096), (1, 4096), (17, 4096), (2, 576)]
    inputs = [terms(size, shape, torch.bfloat16, 5) for shape in shapes]
    static = [parts[rank].to(comm.device) for parts in inputs]
    outs = [torch.empty_like(x) for x in static]
    graph = torch.cuda.CUDAGraph()
    comm.all_reduce(static[0].clone())  # compiles it
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for x, out in zip(static, outs, strict=True):
            out.copy_(comm.all_reduce(x.clone()))
    for _ in range(100):
        graph.replay()
        if rank == 0:
            time.sleep(0.001)  # the ranks drift
    torch.cuda.synchronize()
    assert comm.failure() is None
    for parts, out in zip(inputs, outs, strict=True):
        expected = in_rank_order(parts).to(torch.bfloat16)
        torch.testing.assert_close(out.cpu(), expected, rtol=0.02, atol=0.05)
    del graph
    comm.barrier(JOIN_TIMEOUT_S)
    comm.close()


def a_peer_that_never_comes(rank: int, size: int, exchange: Exchange, way: str) -> float:
    """Seconds from the abort, or the deadline, until the device was free."""
    comm = join(rank, size, exchange, op_timeout_s=2.0 if way == "deadline" else 3600.0)
    if rank == size - 1:
        exchange(b"")  # when the others are through
        comm.abort()
        comm.close()
        return 0.0
    x = torch.ones(1, 4096, dtype=torch.bfloat16, device=comm.device)
    stream = torch.ones_like(x)
    began = time.monotonic()
    if way == "nccl":
        NcclCommunicator.all_reduce(comm, x)
    else:
        assert comm.norm_fusing(x) is comm, comm.links
        comm.all_reduce_rms_norm(x, stream, torch.ones_like(x[0]), 1e-5)
    if way != "deadline":
        time.sleep(1.0)
        began = time.monotonic()
        threading.Thread(target=comm.abort).start()
    torch.cuda.synchronize()
    took_s = time.monotonic() - began
    failure = comm.failure()
    assert failure is not None
    if way == "deadline":
        assert isinstance(failure, CommunicatorTimeout)
        assert size > 2 or failure.ranks == (size - 1,)
        comm.abort()
    comm.close()
    exchange(b"")
    torch.ones(8, device=comm.device).sum().item()  # the device is usable
    return took_s


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_in_rank_order_and_equal_on_all_ranks(size: int) -> None:
    for links in run_ranks(sums, size):
        assert {link.path for link in links} == {"peer"}, links


@pytest.mark.parametrize("size", SIZES)
def test_one_shot_and_two_shots_with_residual_and_norm(size: int) -> None:
    run_ranks(both_shots_with_norm, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_graph_that_is_replayed_while_ranks_drift(size: int) -> None:
    run_ranks(graphs_of_many_sizes, size)


@pytest.mark.parametrize("way", ["peer", "nccl", "deadline"])
@pytest.mark.parametrize("size", SIZES)
def test_who_waits_for_a_peer_that_never_comes_is_usable_again(size: int, way: str) -> None:
    assert max(run_ranks(a_peer_that_never_comes, size, way)) < USABLE_AGAIN_S
