"""Each rank has a GPU to itself."""

from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.clusters import WorkerPool, cluster, start_coordinator

pytestmark = pytest.mark.timeout(300)


def test_two_workers_on_one_gpu_are_refused_by_name_and_one_says_which_it_has(
    tmp_path: Path,
) -> None:
    folder = checkpoints.build("smollm2", tmp_path / "m")
    pool = WorkerPool(devices=["cuda:0"])
    try:
        first, second = pool.addresses(2)
        service = start_coordinator(folder, [first, second])
        line = service.wait_for_failure()
        properties = torch.cuda.get_device_properties(0)
        for words in (
            f"worker 0 ({first}) and worker 1 ({second}) are on the same GPU, cuda:0",
            f"({properties.name}, {properties.uuid})",
            "start one of them with --device cuda:1",
        ):
            assert words in line
        with cluster(pool, folder, 1) as running:
            (worker,) = running.client.cluster().workers
        assert worker.description.device_name == properties.name
        assert worker.description.device_uuid == str(properties.uuid)
    finally:
        pool.stop()
