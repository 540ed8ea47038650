"""Communicators between GPUs, a process each: sums, and ranks that never come, for workers too.

For every number of ranks that there are GPUs for.
"""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import JOIN_TIMEOUT_S, Exchange, in_rank_order, run_ranks, terms
from colrow.errors import ServiceError
from colrow.memory import MemoryLedger
from coordinator.block_manager import BlockManager
from coordinator.model_folder import ModelFolder
from coordinator.scheduler import Scheduler
from coordinator.sequence import Sampling
from coordinator.sequence import Sequence as Continuation
from coordinator.shard_group import ShardGroup
from coordinator.shard_plan import make_plan
from coordinator.worker_client import WorkerClient
from shard_worker.communicator import CommunicatorTimeout, Link
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.device_thread import EXIT_HUNG
from tests import checkpoints
from tests.clusters import WorkerPool
from tests.gpu.groups import join

pytestmark = pytest.mark.timeout(240)

USABLE_AGAIN_S = 10.0
SIZES = range(2, min(torch.cuda.device_count(), 8) + 1)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

if len(SIZES) == 0:
    pytest.skip("there are no two GPUs", allow_module_level=True)


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


@pytest.mark.parametrize("way", ["peer", "nccl", "deadline"])
@pytest.mark.parametrize("size", SIZES)
def test_who_waits_for_a_peer_that_never_comes_is_usable_again(size: int, way: str) -> None:
    assert max(run_ranks(a_peer_that_never_comes, size, way)) < USABLE_AGAIN_S


# Workers

BLOCKS, BLOCK_SIZE = 64, 16
HANGS_S = 8.0


async def form(group: ShardGroup, model: ModelFolder, transport: str) -> Scheduler:
    """Has the workers ready for step 1, of what this schedules: a sequence that goes on and on."""
    await group.describe(JOIN_TIMEOUT_S)
    await group.join(transport)
    assert group.transport == transport
    plan = make_plan(model.spec, group.size)
    await group.load(model.path, model.config_json, plan, "safetensors", lambda: None)
    await group.allocate(BLOCKS, BLOCK_SIZE, 0, [MemoryLedger()] * group.size)
    blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_caching=False)
    scheduler = Scheduler(blocks, max_batched_tokens=64, max_running=1)
    scheduler.add(Continuation(1, tuple(range(9)), Sampling(), 100, frozenset()))
    return scheduler


async def step(group: ShardGroup, scheduler: Scheduler) -> None:
    made = scheduler.schedule()
    assert made is not None
    await group.send(made)
    async with asyncio.timeout(JOIN_TIMEOUT_S):
        for token in (await group.receive()).tokens.values():
            made.chunks[0].sequence.append(token)


async def abort_while_a_step_waits(
    addresses: Sequence[str], model: ModelFolder, transport: str
) -> tuple[float, bool]:
    """Seconds until the worker whose peer never comes has left the group, and whether it has ended."""
    group = ShardGroup([WorkerClient(address) for address in addresses], step_timeout_s=3600.0)
    try:
        scheduler = await form(group, model, transport)
        for _ in range(5):  # the prompt, the capture of the decoding graph, and replays
            await step(group, scheduler)
        lone = scheduler.schedule()
        assert lone is not None
        first = group.workers[0]
        await first.send(first.encode(group.epoch, lone))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(first.receive(), 1.0)
        began = time.monotonic()
        try:
            await first.abort(epoch=group.epoch, timeout_s=USABLE_AGAIN_S)
        except ServiceError:
            return time.monotonic() - began, True
        took_s = time.monotonic() - began
        # With all of it: memory is opened anew, graphs are captured and replayed.
        scheduler = await form(group, model, transport)
        for _ in range(5):
            await step(group, scheduler)
        await group.abort()
        return took_s, False
    finally:
        await group.close()


@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_a_worker_whose_graph_waits_for_a_peer_is_usable_again_or_gone_after_an_abort(
    tmp_path: Path, transport: str
) -> None:
    model = ModelFolder.open(checkpoints.build("smollm2", tmp_path / "smollm2"))
    pool = WorkerPool(
        devices=["cuda:0", "cuda:1"],
        arguments=("--peer-timeout", "3600", "--abort-timeout", str(HANGS_S)),
    )
    try:
        took_s, has_ended = asyncio.run(
            abort_while_a_step_waits(pool.addresses(2), model, transport)
        )
        assert took_s < USABLE_AGAIN_S
        if has_ended:
            assert pool.services[0].process.wait(USABLE_AGAIN_S - took_s) == EXIT_HUNG
    finally:
        pool.stop()
