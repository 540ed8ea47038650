"""GPU tests. Where there is no GPU they are skipped, and say so."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.clusters import WorkerPool

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is no GPU: torch.cuda.is_available() is false")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def gpu_pools() -> Iterator[dict[bool, WorkerPool]]:
    """Workers with a GPU each, in turn: with CUDA graphs, and without."""
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    pools = {
        True: WorkerPool(devices=devices),
        False: WorkerPool(devices=devices, arguments=("--no-cuda-graphs",)),
    }
    yield pools
    for pool in pools.values():
        pool.stop()
