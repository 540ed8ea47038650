"""Workers that are killed at random under load: no call fails, no token changes, nothing is left."""

import math
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from client import Colrow
from client.grpc_client import TokenLogprobs
from tests.supervised import Cluster

NUM_STREAMS = 64
VOCAB_SIZE = 331  # of the checkpoint "smollm2"
MARGIN = 1e-4
TOP_K = 50

Asked = tuple[list[int], dict[str, Any]]


def num_kills(default: int) -> int:
    """As many as COLROW_KILLS says."""
    return int(os.environ.get("COLROW_KILLS", default))


def is_clear(item: TokenLogprobs, index: int, seed: int | None) -> bool:
    """Whether a token would be the same if the logits were others in their last bits.

    Sums of floats depend in their last bit on who else is in the batch; a token that is decided by it
    would tell nothing about recovery. Greedy ones are clear with a margin to the second; seeded ones
    when the draw does not lie where two tokens meet.
    """
    if seed is None:
        return item.top[0][1] - item.top[1][1] > MARGIN
    if item.top[TOP_K - 1][1] - item.top[TOP_K][1] < MARGIN:
        return False
    kept = sorted(item.top[:TOP_K])
    mass = np.cumsum([math.exp(logprob) for _, logprob in kept])
    key = np.array([seed, index], dtype=np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key)).random()
    return bool(np.abs(mass / mass[-1] - draw).min() > MARGIN)


def clear_requests(client: Colrow) -> list[tuple[Asked, list[int]]]:
    """Greedy and seeded requests, and what each gets when it is alone."""
    generator = random.Random(0)
    chosen: list[tuple[Asked, list[int]]] = []
    while len(chosen) < NUM_STREAMS:
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, 40))]
        seed = len(chosen) if len(chosen) % 2 else None
        settings: dict[str, Any] = {"max_tokens": generator.randint(30, 120), "temperature": 0}
        if seed is not None:
            settings |= {"temperature": 1, "top_k": TOP_K, "seed": seed}
        pieces = list(client.generate(prompt, logprobs=TOP_K + 1, **settings))
        items = [item for piece in pieces for item in piece.logprobs]
        if all(is_clear(item, index, seed) for index, item in enumerate(items)):
            chosen.append(((prompt, settings), [item.token_id for item in items]))
    return chosen


@dataclass(frozen=True)
class Held:
    """What the coordinator holds of the system, and what the cluster has left in it."""

    fds: int
    threads: int
    processes: int
    shared_memory: int

    @classmethod
    def by(cls, cluster: Cluster) -> "Held":
        process = psutil.Process(cluster.coordinator.process.pid)
        return cls(
            fds=process.num_fds(),
            threads=process.num_threads(),
            processes=len(psutil.Process().children(recursive=True)),
            shared_memory=len(list(Path("/dev/shm").glob("colrow-*"))),
        )


def outlive_random_kills(cluster: Cluster, count: int, recovery_timeout_s: float = 30.0) -> str:
    """Kills `count` workers at random, one after the other, and says what came of it.

    cluster: serves the checkpoint "smollm2", and nobody else. Fails where a call did, a token was
    another one, a recovery took longer than `recovery_timeout_s`, or something piles up.
    """
    generator = random.Random(0)
    victims = len(cluster.supervisor.workers)
    asked = clear_requests(cluster.client)
    stop = threading.Event()

    def keep_asking(index: int) -> tuple[int, int]:
        calls = changed = 0
        (prompt, settings), expected = asked[index]
        while not stop.is_set():
            pieces = cluster.client.generate(prompt, timeout_s=120, **settings)
            changed += [token for piece in pieces for token in piece.token_ids] != expected
            calls += 1
        return calls, changed

    with ThreadPoolExecutor(NUM_STREAMS) as threads:

        def rounds_of_kills(count: int) -> tuple[int, int, list[float]]:
            """Calls, those of them with changed tokens, and how long each recovery took."""
            stop.clear()
            streams = [threads.submit(keep_asking, index) for index in range(NUM_STREAMS)]
            recoveries: list[float] = []
            try:
                for _ in range(count):
                    time.sleep(generator.uniform(0.2, 1.0))
                    epoch = cluster.epoch
                    began = time.monotonic()
                    cluster.supervisor.signal(generator.randrange(victims), signal.SIGKILL)
                    cluster.wait_for_epoch(epoch + 1, recovery_timeout_s)
                    recoveries.append(time.monotonic() - began)
            finally:
                stop.set()
            counts = [stream.result(120) for stream in streams]
            calls, changed = (sum(each) for each in zip(*counts, strict=True))
            return calls, changed, recoveries

        # One kill first: threads and connections of a cluster that has seen one are its own.
        rounds_of_kills(1)
        before = Held.by(cluster)
        calls, changed, recoveries = rounds_of_kills(count)
    deadline = time.monotonic() + 5
    while (after := Held.by(cluster)) != before and time.monotonic() < deadline:
        time.sleep(0.1)  # connections that were closed last are about to be gone
    assert changed == 0, f"{changed} of {calls} calls"
    state = cluster.client.cluster()
    blocks = state.scheduler
    assert (blocks.running, blocks.waiting, blocks.kv_blocks_used) == (0, 0, 0)
    assert state.recoveries == count + 1
    assert sum(worker.restarts for worker in state.workers) == count + 1
    # Nothing piles up from one life to the next.
    assert after.fds <= before.fds
    assert after.threads <= before.threads
    assert (after.processes, after.shared_memory) == (before.processes, before.shared_memory)
    recoveries.sort()
    return (
        f"{count} kills, {NUM_STREAMS} streams, {calls} calls: 0 failed, 0 changed; recovery median "
        f"{recoveries[len(recoveries) // 2]:.2f} s, worst {recoveries[-1]:.2f} s\n{before} -> {after}"
    )
