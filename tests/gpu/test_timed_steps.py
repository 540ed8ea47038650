"""Steps that are timed, on GPUs: the tokens of a CUDA graph, and times that are the device's."""

import re
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shard_worker.communicator.single import SingleCommunicator
from shard_worker.stopwatch import hold_back
from shard_worker.tensor_parallel import TensorParallel
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(300)

NUM_TOKENS = 240
NUM_STEPS = 8
CYCLES = 4_000_000


class SlowCommunicator(SingleCommunicator):
    """A rank that plays one of two: all-reduce is slow on the device, all-gather on the host."""

    transport = "slow"

    def all_reduce(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(CYCLES)
        return x.add_(1)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        time.sleep(0.003)
        return x + 1


def test_a_collective_takes_what_the_device_takes_and_not_its_launch() -> None:
    x = torch.zeros(16, device="cuda")
    layer = TensorParallel(0, 2, SlowCommunicator()).collectives("model.layers.0")
    layer.all_reduce(x)  # kernels are loaded
    layer.all_gather(x, (16,))
    torch.cuda.synchronize()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    torch.cuda._sleep(CYCLES)
    ended.record()
    ended.synchronize()
    slow_ns = began.elapsed_time(ended) * 1e6
    hold_back(x.device)
    with layer.tp.timing(True) as times:
        launched = time.perf_counter_ns()
        layer.all_reduce(x)
        assert time.perf_counter_ns() - launched < slow_ns / 2, "nothing waits for the device"
        layer.all_gather(x, (16,))
    reduced, gathered = times.wait()
    assert 0.7 * slow_ns < reduced.duration_ns < 1.5 * slow_ns
    assert gathered.duration_ns < 1_000_000, "the device had it queued before it came to it"


def generate(running: RunningCluster) -> list[int]:
    pieces = running.client.generate(
        [3, 1, 4, 1, 5], max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, timeout_s=120
    )
    return [token for piece in pieces for token in piece.token_ids]


def test_a_timed_step_gives_the_tokens_of_a_graph(
    gpu_pools: dict[bool, WorkerPool], tmp_path: Path
) -> None:
    folder = checkpoints.build("smollm2", tmp_path)
    with cluster(gpu_pools[True], folder, 1) as running, ThreadPoolExecutor(1) as threads:
        expected = generate(running)
        running.client.time_communication(1)  # compiles what no graph has compiled
        request = threads.submit(generate, running)
        response = running.client.time_communication(20)
        assert request.result() == expected
        assert response.num_tokens >= 20
        assert not response.times, "one rank has nobody to communicate with"
        # Held back by about 20 ms, which is no part of the step.
        assert 0 < response.steps_us / 20 < 15_000


def check_times(running: RunningCluster, sums: str, gathers: str) -> None:
    """Steps that the cluster makes are timed, by these paths; so say its workers and `/metrics`."""
    response = running.client.time_communication(NUM_STEPS)
    assert response.num_steps == NUM_STEPS
    paths = {timed.operation: timed.path for timed in response.times}
    assert paths == {"all_reduce": sums, "all_gather": gathers}
    for timed in response.times:
        assert 0 < timed.own_us <= min(timed.rank_us)
        assert len(timed.rank_us) == 2
    for rank in range(2):
        assert sum(timed.rank_us[rank] for timed in response.times) < response.steps_us
    for worker in running.client.cluster().workers:
        for stats in worker.description.communication:
            assert stats.path == paths[stats.operation]
            assert stats.timed_calls > 0 and stats.timed_us > 0, stats
    with urllib.request.urlopen(f"{running.http_url}/metrics", timeout=10) as scraped:
        metrics = scraped.read().decode()
    for rank in range(2):
        seconds = re.search(
            'colrow_communication_timed_seconds_total{module="model.layers.0",'
            f'operation="all_reduce",path="{sums}",rank="{rank}"}} (.*)',
            metrics,
        )
        assert seconds and float(seconds[1]) > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_collectives_between_gpus_are_timed_by_their_path(
    transport: str, gpu_pools: dict[bool, WorkerPool], tmp_path: Path
) -> None:
    folder = checkpoints.build("smollm2", tmp_path)
    with cluster(gpu_pools[True], folder, 2, "--transport", transport) as running:
        check_times(running, sums=transport, gathers=transport)
