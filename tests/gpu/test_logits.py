"""Logits on GPUs, of graphs and without, are those of transformers on the GPU, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ranks import JOIN_TIMEOUT_S, Exchange, run_ranks
from shard_worker.communicator import Communicator
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.tensor_parallel import TensorParallel
from tests import checkpoints
from tests.gpu.groups import join
from tests.integration.test_logits import TOLERANCE, Seen, check_logits, difference, run_steps

pytestmark = pytest.mark.timeout(300)


def joined(rank: int, size: int, exchange: Exchange) -> Communicator:
    torch.cuda.set_device(rank)
    return SingleCommunicator() if size == 1 else join(rank, size, exchange)


def both_ways(
    rank: int, size: int, exchange: Exchange, folder: Path
) -> tuple[list[Seen], list[Seen]]:
    """What this rank sees with operations launched one by one, and with graphs."""
    comm = joined(rank, size, exchange)
    tp, device = TensorParallel(rank, size, comm), torch.device("cuda", rank)
    launched = run_steps(folder, tp, device)
    replayed = run_steps(folder, tp, device, graphs=True)
    torch.cuda.synchronize(device)
    assert comm.failure() is None
    comm.barrier(JOIN_TIMEOUT_S)
    comm.close()
    return launched, replayed


@pytest.fixture(scope="module", params=["demo", "llama3", "mistral", "qwen2", "qwen3", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, and a random checkpoint of each family."""
    if request.param == "demo":
        found: Path = request.getfixturevalue("demo_model_folder")
        return found
    return checkpoints.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("size", [1, 2])
def test_logits_are_those_of_transformers(size: int, folder: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"there are no {size} GPUs")
    ranks = run_ranks(both_ways, size, folder)
    oracle = checkpoints.oracle(folder).cuda()
    for seen in ranks[0]:
        check_logits(seen, oracle, oracle.config.vocab_size)
    for launched, replayed in zip(*ranks[0], strict=True):
        assert difference(replayed.logits, launched.logits) <= TOLERANCE
    for other in ranks[1:]:
        for mine, theirs in zip(ranks[0], other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert np.array_equal(a.logits, b.logits), "all ranks hold the same bits"
                assert a.tokens == b.tokens
