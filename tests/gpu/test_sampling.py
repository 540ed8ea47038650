"""Sampling on a GPU gives what it gives on a CPU: the same draws from the same logits, in float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.grpc_client import array
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
PROMPT = list(range(30, 90))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("smollm2"))


def answers(running: RunningCluster) -> list[list[int]]:
    """All settings at once, as one batch."""

    def ask(settings: dict[str, Any]) -> list[int]:
        pieces = running.client.generate(PROMPT, max_tokens=24, timeout_s=120, **settings)
        return [token for piece in pieces for token in piece.token_ids]

    with ThreadPoolExecutor(len(SETTINGS)) as threads:
        return list(threads.map(ask, SETTINGS))


@pytest.fixture(scope="module")
def on_cpu(folder: Path, worker_pool: WorkerPool) -> Iterator[RunningCluster]:
    with cluster(worker_pool, folder, 1) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(on_cpu: RunningCluster) -> list[list[int]]:
    return answers(on_cpu)


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_every_way_of_sampling(
    run_ahead: int, wanted: list[list[int]], folder: Path, gpu_pools: dict[bool, WorkerPool]
) -> None:
    with cluster(gpu_pools[True], folder, 1, "--run-ahead", str(run_ahead)) as running:
        for settings, expected, tokens in zip(SETTINGS, wanted, answers(running), strict=True):
            assert tokens == expected, settings


@pytest.mark.parametrize("module", ["self_attn", "mlp", "mlp.down_proj", "input_layernorm"])
def test_a_module_alone_gives_the_same(
    module: str, on_cpu: RunningCluster, folder: Path, gpu_pools: dict[bool, WorkerPool]
) -> None:
    name = f"model.layers.1.{module}"
    width = 104 if module == "mlp.down_proj" else 72
    activation = np.random.default_rng(1).standard_normal((3, width)).astype(np.float32)
    with cluster(gpu_pools[True], folder, 1) as running:
        outputs = [
            array(of.client.run_layer(module=name, activation=activation).output)
            for of in (running, on_cpu)
        ]
    np.testing.assert_allclose(*outputs, rtol=2e-5, atol=2e-5)
