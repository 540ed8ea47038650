"""A worker on a GPU is killed in the midst of a stream, and the stream goes on with the same tokens;
and what one coordinator leaves, the next finds whole."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.clusters import WorkerPool, cluster, start

pytestmark = pytest.mark.timeout(300)

NUM_TOKENS = 160
PROMPT = list(range(40, 70))


def test_a_killed_worker_fails_no_stream(tmp_path: Path) -> None:
    folder = checkpoints.build("smollm2", tmp_path / "smollm2")
    pool = WorkerPool(devices=["cuda:0"])
    settings: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "timeout_s": 120}
    try:
        with cluster(pool, folder, 1) as running:
            undisturbed = [
                t for p in running.client.generate(PROMPT, **settings) for t in p.token_ids
            ]
            tokens: list[int] = []
            for piece in running.client.generate(PROMPT, **settings):
                if len(tokens) < NUM_TOKENS // 4 <= len(tokens) + len(piece.token_ids):
                    (worker,) = pool.services
                    worker.process.send_signal(signal.SIGKILL)
                    worker.process.wait()
                    again = ("--port", str(worker.port), "--device", "cuda:0")
                    pool.services[0] = start("worker0", "shard_worker", *again)
                tokens += piece.token_ids
            assert tokens == undisturbed
            assert running.client.cluster().recoveries == 1
    finally:
        pool.stop()


def test_the_next_coordinator_finds_as_much_memory(tmp_path: Path) -> None:
    """The weights are held over; the cache that was beside them is not to count as taken."""
    folder = checkpoints.build("smollm2", tmp_path / "smollm2")
    pool = WorkerPool(devices=["cuda:0"])
    # So little memory, and so many sequences, that it is the memory that limits the cache.
    limits = (
        *("--gpu-memory-utilization", "0.02"),
        *("--max-running", "65536", "--max-batched-tokens", "65536"),
    )
    blocks = []
    try:
        for _ in range(3):
            with cluster(pool, folder, 1, *limits) as running:
                blocks.append(running.client.cluster().scheduler.kv_blocks_total)
    finally:
        pool.stop()
    assert min(blocks) > 0.9 * max(blocks), blocks
