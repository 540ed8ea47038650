"""A GPU's ledger is what torch's allocator says, and what was planned is what steps take."""

from pathlib import Path

import pytest
import torch

from colrow.memory import MemoryLedger
from tests import checkpoints
from tests.clusters import WorkerPool, cluster, start_coordinator
from tests.unit.test_memory_ledger import LedWorker

pytestmark = pytest.mark.timeout(300)

NUM_BLOCKS = 2**16


def actual(ledger: MemoryLedger, *names: str) -> int:
    values = {name: use.actual for name, use in ledger.entries()}
    return sum(values[name] or 0 for name in names)


async def test_weights_and_cache_are_what_the_allocator_gave_out(tmp_path: Path) -> None:
    worker = LedWorker(checkpoints.build("smollm2", tmp_path / "m"), "--device", "cuda:0")
    before = torch.cuda.memory_allocated()
    await worker.join()
    try:
        await worker.load()
        weights = torch.cuda.memory_allocated() - before
        assert actual(worker.ledger, "weights") == pytest.approx(weights, rel=0.03)
        num_bytes = await worker.allocate(NUM_BLOCKS)
        held = torch.cuda.memory_allocated() - before
        ready = worker.ledger
        assert actual(ready, "weights", "kv_cache") == pytest.approx(held, rel=0.03)
        assert ready.kv_cache.planned == num_bytes
        assert ready.kv_cache.actual == pytest.approx(num_bytes, rel=0.03)

        await worker.step(1, 20, is_new=True)
        await worker.step(2, 20)
        worker.executor.describe()  # has the peak looked at
        await worker.step(3, 20)
        served = worker.ledger
        assert actual(served, "graphs") > 0
        assert actual(served, "workspace") > 0
        assert (served.weights, served.kv_cache) == (ready.weights, ready.kv_cache)

        await worker.executor.abort(1)
        assert worker.ledger == MemoryLedger(weights=ready.weights)
    finally:
        await worker.executor.close()


def test_steps_take_no_more_than_was_planned(tmp_path: Path) -> None:
    """Long prompts, launched operation by operation, and many sequences, drawn and greedy."""
    pool = WorkerPool(devices=["cuda:0"])
    limits = ("--max-batched-tokens", "2048", "--kv-cache-mib", "256")
    try:
        with cluster(pool, checkpoints.build("smollm2", tmp_path / "m"), 1, *limits) as running:
            for prompt, settings in (
                (list(range(200)), {"temperature": 0, "n": 1}),
                (list(range(100)), {"temperature": 1.0, "top_p": 0.9, "n": 64}),
            ):
                pieces = running.client.generate(prompt, max_tokens=8, timeout_s=120, **settings)
                assert sum(len(piece.token_ids) for piece in pieces) > 0
            running.client.cluster()  # has the peak looked at
            (worker,) = running.client.cluster().workers
    finally:
        pool.stop()
    ledger = worker.description.memory
    for use in (ledger.graphs, ledger.workspace):
        assert 0 < use.actual_bytes <= use.planned_bytes


def test_a_share_that_holds_no_cache_is_refused_with_the_ledger(tmp_path: Path) -> None:
    folder = checkpoints.build("smollm2", tmp_path / "m")
    pool = WorkerPool(devices=["cuda:0"])
    try:
        service = start_coordinator(folder, pool.addresses(1), "--gpu-memory-utilization", "1e-6")
        line = service.wait_for_failure()
    finally:
        pool.stop()
    assert "tp_size = 1: rank 0 (cuda:0) needs " in line
    assert "weights " in line and "no tp size up to " in line
