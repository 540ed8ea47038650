"""A worker that dies, hangs or comes back: requests go on, with the text that they would have had."""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from grpc_health.v1 import health_pb2

from client import Colrow
from colrow.errors import Unavailable
from colrow.v1 import control_service_pb2
from tests import checkpoints
from tests.chaos import num_kills, outlive_random_kills
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


@pytest.mark.parametrize("victim", [0, 1])
def test_layers_are_run_whatever_becomes_of_a_worker(victim: int, folder: Path) -> None:
    with running(folder) as cluster:

        def run() -> bytes:
            return cluster.client.run_layer(layer=0, num_tokens=256, seed=1).output.data

        expected = run()
        cluster.supervisor.signal(victim, signal.SIGKILL)
        killed = time.monotonic()
        while not cluster.client.cluster().recoveries:
            assert run() == expected
            assert time.monotonic() - killed < 60
        assert run() == expected


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


def test_a_worker_whose_device_refuses_every_call_ends_itself_and_its_stream_goes_on(
    folder: Path, expected: list[int], tmp_path: Path
) -> None:
    trigger = tmp_path / "break"
    supervisor = Supervisor(2, str(trigger), module="tests.broken_worker")
    with running(folder, supervisor=supervisor) as cluster:
        tokens: list[int] = []
        for piece in cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0):
            tokens += piece.token_ids
            if len(tokens) == 20:
                trigger.touch()
        assert tokens == expected
        assert supervisor.exit_codes == [71]
        said = [line for line in supervisor.last_words.splitlines() if "is broken" in line]
        (line,) = said
        assert "an illegal memory access was encountered" in line
        assert "Device-side assertions" not in line, "what CUDA says first, and no advice"


def test_a_worker_whose_device_refuses_one_call_goes_on(
    folder: Path, expected: list[int], tmp_path: Path
) -> None:
    trigger = tmp_path / "break"
    supervisor = Supervisor(2, str(trigger), "--once", module="tests.broken_worker")
    with running(folder, supervisor=supervisor) as cluster:
        before = [worker.description.pid for worker in cluster.client.cluster().workers]
        tokens: list[int] = []
        for piece in cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0):
            tokens += piece.token_ids
            if len(tokens) == 20:
                trigger.touch()
        assert tokens == expected
        after = cluster.client.cluster()
        assert [worker.description.pid for worker in after.workers] == before
        assert (after.recoveries, supervisor.exit_codes) == (1, [])


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


@pytest.mark.timeout(60 + 15 * num_kills(20))
def test_64_streams_outlive_random_kills_without_an_error_or_a_changed_token(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(folder) as cluster:
        outcome = outlive_random_kills(cluster, num_kills(20))
    with capsys.disabled():
        print(f"\n{outcome}")
