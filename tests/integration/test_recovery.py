"""A worker that dies, hangs or comes back: requests go on, with the text that they would have had."""

import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2

from client import Colrow
from client.grpc_client import TokenLogprobs
from colrow.errors import Unavailable
from colrow.v1 import control_service_pb2
from tests import checkpoints
from tests.clusters import start, start_coordinator, wait_until_serving
from tests.supervised import Cluster, Supervisor, health, running

pytestmark = pytest.mark.timeout(180)

VOCAB_SIZE = 331
DETECTION_S = 2.5  # a heartbeat's timeout and the pause between two
SERVING = control_service_pb2.WORKER_PHASE_SERVING
LOST = control_service_pb2.WORKER_PHASE_LOST
PROMPT = [5, 17, 200]
NUM_TOKENS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return checkpoints.greedy(checkpoints.oracle(folder), PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stream_goes_on_when_a_worker_is_killed_and_only_that_one_loads_again(
    victim: int, folder: Path, expected: list[int]
) -> None:
    with running(folder) as cluster:
        before = cluster.client.cluster()
        tokens: list[int] = []
        for piece in cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0):
            tokens += piece.token_ids
            if len(tokens) == 20:
                cluster.supervisor.signal(victim, signal.SIGKILL)
        assert tokens == expected
        after = cluster.client.cluster()
        assert after.epoch > before.epoch
        read = [
            (a.description.pid == b.description.pid, b.description.file_bytes_read)
            for a, b in zip(before.workers, after.workers, strict=True)
        ]
        survivor = 1 - victim
        assert read[survivor][0]
        headers = read[survivor][1] - before.workers[survivor].description.file_bytes_read
        assert headers < 100_000 < read[victim][1], "the survivor reads headers only"
        assert not read[victim][0]
        assert f"worker {victim}" in cluster.log
        assert (after.recoveries, 0 < after.last_recovery_s < 30) == (1, True)
        assert [worker.phase for worker in after.workers] == [SERVING] * 2
        counts = [(worker.losses, worker.restarts) for worker in after.workers]
        assert counts[survivor] == (0, 0)
        assert counts[victim] == (1, 1)
        assert (after.scheduler.kv_blocks_used, after.error) == (0, "")


def test_a_worker_that_hangs_is_found_in_time_and_goes_on_where_it_wakes(
    folder: Path, expected: list[int]
) -> None:
    with running(folder) as cluster:
        tokens: list[int] = []
        states = cluster.client.watch()
        next(states)
        for piece in cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0):
            tokens += piece.token_ids
            if len(tokens) == 20:
                cluster.supervisor.signal(1, signal.SIGSTOP)
                hung = time.monotonic()
                lost = next(states)
                assert time.monotonic() - hung < DETECTION_S + 1.0
                assert lost.state == control_service_pb2.CLUSTER_STATE_RECOVERING
                assert "worker 1" in lost.error
                # Which rank it is, in which phase and after which step it went.
                first, second = lost.workers
                assert (first.phase, second.phase) == (SERVING, LOST)
                step = second.last_step_id
                assert 18 <= step <= first.last_step_id
                assert f"serving after step {step}: does not answer within 2 s" in second.error
                assert second.losses == 1
                assert 2.0 < second.heard_age_s < DETECTION_S + 1.0
                assert f"is lost, its last completed step {step}; serving after" in cluster.log
                assert (
                    health(cluster.coordinator.address)
                    == health_pb2.HealthCheckResponse.NOT_SERVING
                )
                cluster.supervisor.signal(1, signal.SIGCONT)
        assert tokens == expected
        states.close()


def test_a_worker_whose_device_thread_hangs_is_named_and_ends_itself_in_its_time(
    folder: Path, expected: list[int], tmp_path: Path
) -> None:
    trigger = tmp_path / "hang"
    supervisor = Supervisor(2, str(trigger), "--abort-timeout", "3", module="tests.hanging_worker")
    with running(folder, 2, "--step-timeout", "1", supervisor=supervisor) as cluster:
        before = [worker.description.pid for worker in cluster.client.cluster().workers]
        tokens: list[int] = []
        for piece in cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0):
            tokens += piece.token_ids
            if len(tokens) == 20:
                trigger.touch()
                hung = time.monotonic()
        took_s = time.monotonic() - hung
        assert tokens == expected
        # A second for the step, three for the device to heed the abort, and the start of a process.
        assert 4 < took_s < 40
        assert supervisor.exit_codes == [70]
        assert "the device thread hangs: 3 s after an abort" in supervisor.last_words
        assert "hanging_worker.py" in supervisor.last_words, "it says where"
        workers = cluster.client.cluster().workers
        (victim,) = (
            w.rank for w, pid in zip(workers, before, strict=True) if w.description.pid != pid
        )
        assert "no answer to step" in workers[1 - victim].error, cluster.log
        assert f"worker {victim} (" in cluster.log
        assert "does not leave the group within 2 s" in cluster.log


def test_a_worker_whose_device_thread_hangs_ends_on_sigterm_too(
    tmp_path: Path, folder: Path
) -> None:
    trigger = tmp_path / "hang"
    workers = [
        start(
            f"worker{rank}",
            "tests.hanging_worker",
            *(str(trigger), "--abort-timeout", "1", "--port", "0"),
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.wait_for_port()
    coordinator = start_coordinator(folder, [worker.address for worker in workers])
    try:
        with Colrow(coordinator.address) as client:
            wait_until_serving(coordinator, client)
            stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
            next(stream)
            trigger.touch()
            while trigger.exists():
                time.sleep(0.01)
    finally:
        coordinator.process.kill()
        coordinator.process.wait()
        coordinator.log.unlink()
        codes = sorted(worker.stop() for worker in workers)
        for worker in workers:
            worker.log.unlink()
    assert codes == [0, 70]


def test_an_idle_cluster_finds_a_dead_worker_too_and_takes_requests_meanwhile(
    folder: Path, expected: list[int]
) -> None:
    with running(folder) as cluster:
        epoch = cluster.epoch
        cluster.supervisor.restarts = False
        cluster.supervisor.signal(0, signal.SIGKILL)
        deadline = time.monotonic() + DETECTION_S + 1.0
        while health(cluster.coordinator.address) == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        answer = ThreadPoolExecutor(1).submit(
            lambda: [
                token
                for piece in cluster.client.generate(PROMPT, max_tokens=30, temperature=0)
                for token in piece.token_ids
            ]
        )
        time.sleep(0.5)
        assert not answer.done()
        cluster.supervisor.restarts = True
        assert answer.result(60) == expected[:30]
        assert cluster.epoch > epoch


NUM_BLOCKS = 2048


def fill_the_cache(cluster: Cluster) -> None:
    """Other prompts than before, until every block was written and has memory."""
    length = checkpoints.CONTEXT - 16
    generator = random.Random(1)
    for _ in range(NUM_BLOCKS * 16 // length + 1):
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(length)]
        list(cluster.client.generate(prompt, max_tokens=1))


def resident(cluster: Cluster, rank: int) -> int:
    return psutil.Process(cluster.supervisor.workers[rank].process.pid).memory_info().rss


def test_when_a_worker_stays_away_requests_fail_with_a_time_to_retry_until_it_is_back(
    folder: Path, expected: list[int]
) -> None:
    flags = ("--recovery-timeout", "2", "--num-blocks", str(NUM_BLOCKS))
    with running(folder, 2, *flags) as cluster:
        fill_the_cache(cluster)
        held = cluster.client.cluster().workers[0].description.kv_cache_bytes
        with_cache = resident(cluster, 0)
        cluster.supervisor.restarts = False
        stream = cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
        tokens = [*next(stream).token_ids]
        cluster.supervisor.signal(1, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="worker 1") as caught:
            for piece in stream:
                tokens += piece.token_ids
        assert time.monotonic() - began < 2 + DETECTION_S + 1.0
        assert caught.value.reason == "NOT_RECOVERED"
        assert caught.value.retry_after_s
        assert tokens == expected[: len(tokens)]
        with pytest.raises(Unavailable, match="worker 1"):
            list(cluster.client.generate(PROMPT, max_tokens=5))
        # What the requests held is free, with the coordinator and with the rank that is left.
        state = cluster.client.cluster()
        blocks = state.scheduler
        assert (blocks.running, blocks.waiting, blocks.kv_blocks_used) == (0, 0, 0)
        survivor = state.workers[0].description
        assert (survivor.kv_cache_bytes, survivor.size) == (0, 0)
        assert resident(cluster, 0) < with_cache - held / 2
        cluster.supervisor.restarts = True
        cluster.wait_for_epoch(2)
        again = cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
        assert [token for piece in again for token in piece.token_ids] == expected


def test_when_the_coordinator_is_killed_calls_end_at_once_and_the_next_one_finds_the_weights(
    folder: Path, expected: list[int]
) -> None:
    supervisor = Supervisor(2)
    first = start_coordinator(folder, supervisor.addresses)
    try:
        with Colrow(first.address) as client:
            wait_until_serving(first, client)
            before = client.cluster().workers
            stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
            tokens = [*next(stream).token_ids]
            first.process.kill()
            killed = time.monotonic()
            with pytest.raises(Unavailable):
                for piece in stream:
                    tokens += piece.token_ids
            assert time.monotonic() - killed < 2
            first.process.wait()
            # On the port of the one before it, where its clients look for it.
            port = ("--grpc-port", str(first.port))
            second = start_coordinator(folder, supervisor.addresses, *port)
            try:
                # Through the connection of before: the client is the same.
                wait_until_serving(second, client)
                pieces = client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
                assert [token for piece in pieces for token in piece.token_ids] == expected
                after = client.cluster()
            finally:
                assert second.stop() == 0, second.log.read_text()
                second.log.unlink()
        assert tokens == expected[: len(tokens)]
        assert (after.epoch, after.scheduler.kv_blocks_used) == (2, 0)
        for old, new in zip(before, after.workers, strict=True):
            assert new.description.pid == old.description.pid
            read = new.description.file_bytes_read - old.description.file_bytes_read
            assert 0 < read < 100_000, "headers only"
    finally:
        first.process.kill()
        first.process.wait()
        first.log.unlink()
        supervisor.stop()


def test_when_a_client_is_killed_its_blocks_are_free_within_a_step(folder: Path) -> None:
    script = (
        "import sys, client; colrow = client.Colrow(sys.argv[1])\n"
        f"for piece in colrow.generate({PROMPT}, max_tokens={NUM_TOKENS}, n=8): print('.', flush=True)"
    )
    with running(folder) as cluster:
        popen = subprocess.Popen(
            [sys.executable, "-c", script, cluster.coordinator.address], stdout=subprocess.PIPE
        )
        with popen:
            assert popen.stdout is not None
            assert popen.stdout.readline() == b".\n"
            assert cluster.client.cluster().scheduler.kv_blocks_used > 0
            popen.kill()
            killed = time.monotonic()
            while cluster.client.cluster().scheduler.kv_blocks_used:
                assert time.monotonic() - killed < 2
                time.sleep(0.01)
            state = cluster.client.cluster().scheduler
            assert (state.running, state.waiting) == (0, 0)
            assert state.generated_tokens < 8 * NUM_TOKENS, "it was not simply done"


def test_a_coordinator_whose_workers_another_one_takes_ends_and_does_not_take_them_back(
    folder: Path, expected: list[int]
) -> None:
    supervisor = Supervisor(2)
    first = start_coordinator(folder, supervisor.addresses)
    try:
        with Colrow(first.address) as client:
            wait_until_serving(first, client)
            second = start_coordinator(folder, supervisor.addresses)
            with Colrow(second.address) as other:
                wait_until_serving(second, other)
                assert first.process.wait(10) == 1
                assert "was taken by another coordinator" in first.log.read_text()
                pieces = other.generate(PROMPT, max_tokens=30, temperature=0)
                assert [token for piece in pieces for token in piece.token_ids] == expected[:30]
                assert other.cluster().epoch == 2
            assert second.stop() == 0
            second.log.unlink()
    finally:
        first.process.kill()
        first.process.wait()
        first.log.unlink()
        supervisor.stop()


def test_a_worker_without_a_coordinator_frees_its_memory_and_can_be_joined_again(
    demo_model_folder: Path,
) -> None:
    worker = start("worker", "shard_worker", "--port", "0", "--lease", "2")
    worker.wait_for_port()
    resident = psutil.Process(worker.process.pid).memory_info
    try:
        empty = resident().rss
        for _ in range(2):
            coordinator = start_coordinator(demo_model_folder, [worker.address])
            with Colrow(coordinator.address) as client:
                wait_until_serving(coordinator, client)
                text = "".join(p.text for p in client.generate("Water is", max_tokens=8))
                assert text
                weight_bytes = client.cluster().workers[0].description.weight_bytes
                time.sleep(3)  # longer than the lease, which heartbeats keep
                assert client.cluster().workers[0].description.weight_bytes == weight_bytes
            assert resident().rss > empty + weight_bytes * 0.9
            coordinator.process.kill()
            coordinator.process.wait()
            deadline = time.monotonic() + 10
            while resident().rss > empty + weight_bytes * 0.5:
                assert time.monotonic() < deadline, worker.log.read_text()
                time.sleep(0.1)
    finally:
        worker.stop()
    assert "freeing the device" in worker.log.read_text()


NUM_KILLS = int(os.environ.get("COLROW_KILLS", "20"))
NUM_STREAMS = 64
MARGIN = 1e-4
TOP_K = 50

Asked = tuple[list[int], dict[str, Any]]


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


@pytest.mark.timeout(60 + 15 * NUM_KILLS)
def test_64_streams_outlive_random_kills_without_an_error_or_a_changed_token(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(0)
    with running(folder) as cluster, ThreadPoolExecutor(NUM_STREAMS) as threads:
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
                    cluster.supervisor.signal(generator.randrange(2), signal.SIGKILL)
                    cluster.wait_for_epoch(epoch + 1)
                    recoveries.append(time.monotonic() - began)
            finally:
                stop.set()
            counts = [stream.result(120) for stream in streams]
            calls, changed = (sum(each) for each in zip(*counts, strict=True))
            return calls, changed, recoveries

        # One kill first: threads and connections of a cluster that has seen one are its own.
        rounds_of_kills(1)
        before = Held.by(cluster)
        calls, changed, recoveries = rounds_of_kills(NUM_KILLS)
        deadline = time.monotonic() + 5
        while (after := Held.by(cluster)) != before and time.monotonic() < deadline:
            time.sleep(0.1)  # connections that were closed last are about to be gone
        with capsys.disabled():
            recoveries.sort()
            print(
                f"\n{NUM_KILLS} kills, {NUM_STREAMS} streams, {calls} calls: 0 failed, {changed} "
                f"changed; recovery median {recoveries[len(recoveries) // 2]:.2f} s, worst "
                f"{recoveries[-1]:.2f} s\n{before} -> {after}"
            )
        assert changed == 0
        state = cluster.client.cluster()
        blocks = state.scheduler
        assert (blocks.running, blocks.waiting, blocks.kv_blocks_used) == (0, 0, 0)
        assert state.recoveries == NUM_KILLS + 1
        assert sum(worker.restarts for worker in state.workers) == NUM_KILLS + 1
        # Nothing piles up from one life to the next.
        assert after.fds <= before.fds
        assert after.threads <= before.threads
        assert (after.processes, after.shared_memory) == (before.processes, before.shared_memory)
