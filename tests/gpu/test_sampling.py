"""Sampling on a GPU gives what it gives on a CPU: the same draws from the same logits, in float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.grpc_client import array
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.draw_graphs import DrawGraphs
from shard_worker.graph_capture import GraphCapture
from shard_worker.memory_meter import MemoryMeter
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.tensor_parallel import TensorParallel
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(300)

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20},
    {"temperature": 0.9, "seed": 5, "top_p": 0.8},
    {"temperature": 1.2, "seed": 6, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.8, "seed": 7, "frequency_penalty": 0.7, "logit_bias": {5: 2.0, 9: -50.0}},
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 2},
]
# Those that are drawn by a graph, if all of a step are such.
GRAPHED = slice(0, 5)
PROMPT = list(range(30, 90))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("smollm2"))


def answers(running: RunningCluster, which: slice = slice(None)) -> list[list[int]]:
    """The settings at once, as one batch."""

    def ask(settings: dict[str, Any]) -> list[int]:
        pieces = running.client.generate(PROMPT, max_tokens=24, timeout_s=120, **settings)
        return [token for piece in pieces for token in piece.token_ids]

    with ThreadPoolExecutor(len(SETTINGS)) as threads:
        return list(threads.map(ask, SETTINGS[which]))


@pytest.fixture(scope="module")
def on_cpu(folder: Path, worker_pool: WorkerPool) -> Iterator[RunningCluster]:
    with cluster(worker_pool, folder, 1) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(on_cpu: RunningCluster) -> list[list[int]]:
    return answers(on_cpu)


def check_answers(running: RunningCluster, wanted: list[list[int]]) -> None:
    for settings, expected, tokens in zip(SETTINGS, wanted, answers(running), strict=True):
        assert tokens == expected, settings
    assert answers(running, GRAPHED) == wanted[GRAPHED]


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_every_way_of_sampling(
    run_ahead: int, wanted: list[list[int]], folder: Path, gpu_pools: dict[bool, WorkerPool]
) -> None:
    with cluster(gpu_pools[True], folder, 1, "--run-ahead", str(run_ahead)) as running:
        check_answers(running, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_ranks_on_two_gpus_sample_alike(
    transport: str, wanted: list[list[int]], folder: Path, gpu_pools: dict[bool, WorkerPool]
) -> None:
    """Graphs of draws gather over the group."""
    with cluster(gpu_pools[True], folder, 2, "--transport", transport) as running:
        check_answers(running, wanted)


def test_draws_of_a_graph_are_those_without() -> None:
    device = torch.device("cuda:0")
    vocab_size = 50_000
    limits = [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (64, 0.9, 0.01)]
    draws = [
        Draw(Sampling(temperature, top_k, top_p, seed=index, min_p=min_p), index)
        for index, (top_k, top_p, min_p) in enumerate(limits)
        for temperature in (0.2, 0.0, 1.5)
    ]
    sampler = Sampler(TensorParallel(0, 1, SingleCommunicator()), (vocab_size,), 0, device)
    buffer = torch.zeros(256, vocab_size, device=device)
    last_tokens = torch.zeros(300, dtype=torch.int64, device=device)
    capture = GraphCapture(device, sampler.tp, MemoryMeter(device))
    graphs = DrawGraphs(sampler, buffer, last_tokens, capture)
    for chosen in (draws, draws[:1], [d for d in draws if d.sampling.top_p == 1][:3], draws[3:9]):
        for scale in (0.5, 8.0):
            logits = scale * torch.randn(len(chosen), vocab_size, device=device)
            expected = sampler(logits.clone(), chosen)
            buffer[: len(chosen)] = logits
            rows = list(range(7, 7 + len(chosen)))
            last_tokens[rows] = sampler.greedy(logits)  # as a step leaves them
            assert graphs.fit(chosen)
            tokens = graphs.run(chosen, rows)
            assert tokens.tolist() == expected.tolist()
            assert last_tokens[rows].tolist() == expected.tolist()


def test_draws_are_queued_and_those_of_a_cpu() -> None:
    """Of flat and peaked rows, and a greedy one. torch raises where an operation waits for the GPU."""
    limits = [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (500, 0.9, 0.01)]
    draws = [
        Draw(Sampling(temperature, top_k, top_p, seed=index, min_p=min_p), index)
        for index, (top_k, top_p, min_p) in enumerate(limits * 2)
        for temperature in (0.2, 0.0, 1.5)
    ]
    logits = 2 * torch.randn(len(draws), 50_000, generator=torch.Generator().manual_seed(0))

    def sample(logits: torch.Tensor) -> torch.Tensor:
        tp = TensorParallel(0, 1, SingleCommunicator())
        return Sampler(tp, (50_000,), 0, logits.device)(logits, draws)

    sample(logits.cuda())  # the first call sets libraries up
    on_device = logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == sample(logits).tolist()


@pytest.mark.parametrize("module", ["self_attn", "mlp", "mlp.down_proj", "input_layernorm"])
def test_a_module_alone_gives_the_same(
    module: str, on_cpu: RunningCluster, folder: Path, gpu_pools: dict[bool, WorkerPool]
) -> None:
    name = f"model.layers.1.{module}"
    width = 104 if module == "mlp.down_proj" else 72
    activation = np.random.default_rng(1).standard_normal((3, width)).astype(np.float32)
    with cluster(gpu_pools[True], folder, 1) as running:
        on_gpu, expected = (
            array(of.client.run_layer(module=name, activation=activation).output)
            for of in (running, on_cpu)
        )
    np.testing.assert_allclose(on_gpu, expected, rtol=2e-5, atol=2e-5)
