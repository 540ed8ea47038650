"""Timed communication of a real cluster: every call of a step, within the step's time, whatever runs."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from colrow.errors import ServiceError
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(120)

NUM_STEPS = 8
LAYERS = 30
HIDDEN_BYTES = 576 * 2  # of a token, in bfloat16


@pytest.fixture(scope="module")
def running(worker_pool: WorkerPool, demo_model_folder: Path) -> Iterator[RunningCluster]:
    with cluster(worker_pool, demo_model_folder, 2) as running:
        yield running


def generate(running: RunningCluster, max_tokens: int) -> list[int]:
    pieces = running.client.generate(
        [3, 1, 4, 1, 5], max_tokens=max_tokens, temperature=0, ignore_eos=True
    )
    return [token for piece in pieces for token in piece.token_ids]


@pytest.mark.parametrize("tokens_per_step", [1, 64])
def test_an_idle_cluster_times_every_collective_of_its_own_steps(
    running: RunningCluster, tokens_per_step: int
) -> None:
    response = running.client.time_communication(NUM_STEPS, tokens_per_step=tokens_per_step)
    assert response.num_steps == NUM_STEPS
    assert response.num_tokens == NUM_STEPS * tokens_per_step
    sums = [timed for timed in response.times if timed.operation == "all_reduce"]
    assert sum(timed.calls for timed in sums) == NUM_STEPS * (2 * LAYERS + 1)
    embedding, *layers = sums
    assert [timed.module for timed in layers] == [f"model.layers.{i}" for i in range(LAYERS)]
    for timed in layers:
        assert (timed.calls, timed.path) == (2 * NUM_STEPS, "shm")
        assert timed.payload_bytes == 2 * response.num_tokens * HIDDEN_BYTES
    assert (embedding.module, embedding.calls) == ("model.embed_tokens", NUM_STEPS)
    gathers = [timed for timed in response.times if timed.operation == "all_gather"]
    assert [(timed.module, timed.calls) for timed in gathers] == [("sampler", NUM_STEPS)]
    for timed in response.times:
        assert 0 < timed.own_us <= min(timed.rank_us)
        assert len(timed.rank_us) == 2
    for rank in range(2):
        assert sum(timed.rank_us[rank] for timed in response.times) < response.steps_us


def test_counters_of_the_workers_and_metrics_have_what_was_timed(running: RunningCluster) -> None:
    def timed() -> list[tuple[int, int, int]]:
        return [
            (
                sum(s.timed_calls for s in worker.description.communication),
                sum(s.timed_bytes for s in worker.description.communication),
                sum(s.timed_us for s in worker.description.communication),
            )
            for worker in running.client.cluster().workers
        ]

    before = timed()
    generate(running, 4)
    assert timed() == before, "steps are timed on request only"
    times = running.client.time_communication(NUM_STEPS).times
    for rank, (then, now) in enumerate(zip(before, timed(), strict=True)):
        calls, num_bytes, us = (b - a for a, b in zip(then, now, strict=True))
        assert calls == NUM_STEPS * (2 * LAYERS + 2)
        assert num_bytes == sum(timed.payload_bytes for timed in times)
        # Counters are of whole microseconds.
        assert us == pytest.approx(sum(t.rank_us[rank] for t in times), abs=LAYERS + 2)
    with urllib.request.urlopen(f"{running.http_url}/metrics", timeout=10) as response:
        scraped = response.read().decode()
    for name in ("calls", "bytes", "seconds"):
        assert (
            f'colrow_communication_timed_{name}_total{{module="model.layers.0",'
            'operation="all_reduce",path="shm",rank="1"}' in scraped
        )


def test_a_request_that_runs_is_timed_and_gets_the_tokens_that_it_would_have(
    running: RunningCluster,
) -> None:
    expected = generate(running, 60)
    with ThreadPoolExecutor(1) as threads:
        request = threads.submit(generate, running, 60)
        while not running.client.cluster().scheduler.running:
            time.sleep(0.005)
        response = running.client.time_communication(NUM_STEPS)
        assert request.result() == expected
    assert response.num_tokens >= NUM_STEPS
    assert running.client.cluster().scheduler.running == 0


@pytest.mark.parametrize(
    ("field", "num_steps", "tokens_per_step"),
    [("num_steps", 0, 1), ("num_steps", 10**6, 1), ("tokens_per_step", 1, 10**6)],
)
def test_numbers_that_can_not_be_are_refused(
    running: RunningCluster, field: str, num_steps: int, tokens_per_step: int
) -> None:
    with pytest.raises(ServiceError, match=f"^{field} = ") as caught:
        running.client.time_communication(num_steps, tokens_per_step=tokens_per_step)
    assert caught.value.code == "INVALID_ARGUMENT"


def colrow(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "client.cli", *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_shows_a_table_and_json(running: RunningCluster) -> None:
    asked = ("status", "--target", running.target, "--time-communication", "4")
    shown = colrow(*asked)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    (row,) = [line for line in lines if line[:2] == ["all_reduce", "shm"]]
    assert row[2:4] == [str(2 * LAYERS + 1), f"{(2 * LAYERS + 1) * HIDDEN_BYTES:,}"]
    assert "Communication in 4 steps that were timed, of 1 token and" in shown.stdout
    data = json.loads(colrow(*asked, "--json").stdout)
    assert data["state"] == "serving"
    assert data["communication_times"]["num_steps"] == 4
    assert colrow(*asked[:-1], "0").returncode != 0
    watched = colrow(*asked, "--watch")
    assert (watched.returncode, watched.stderr.count("\n")) == (1, 1)


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    """Workers that may be lost, and that are not those of `running`."""
    pool = WorkerPool()
    yield pool
    pool.stop()


def test_one_rank_says_that_it_communicates_nothing(own_pool: WorkerPool, tmp_path: Path) -> None:
    with cluster(own_pool, checkpoints.build("smollm2", tmp_path), 1) as alone:
        response = alone.client.time_communication(NUM_STEPS)
        assert (response.num_steps, response.num_tokens) == (NUM_STEPS, NUM_STEPS)
        assert response.steps_us > 0
        assert not response.times
        shown = colrow("status", "--target", alone.target, "--time-communication", "2")
        assert "nothing was communicated: one rank has nobody to talk to" in shown.stdout


def test_a_worker_that_is_lost_meanwhile_is_unavailable(
    own_pool: WorkerPool, tmp_path: Path
) -> None:
    folder = checkpoints.build("smollm2", tmp_path)
    with cluster(own_pool, folder, 2) as running, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(running.client.time_communication, 1000, timeout_s=60)
        while not running.client.cluster().scheduler.running:
            assert not asked.done(), asked.result()
            time.sleep(0.002)
        own_pool.services[1].process.kill()
        with pytest.raises(ServiceError, match="ended while its steps were timed") as caught:
            asked.result()
        assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "STEPS_LOST")
        assert caught.value.retry_after_s
