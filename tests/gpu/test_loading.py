"""What is loaded to a GPU is bit for bit what is loaded to a CPU, and no pinned memory stays behind."""

import json
from pathlib import Path

import pytest
import torch

from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from shard_worker import checkpoint, models
from shard_worker.checkpoint import Checkpoint
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.sharding import ShardTensors
from shard_worker.tensor_parallel import TensorParallel
from tests import checkpoints
from tests.unit.test_checkpoint import layout_of_plan


class AbortedError(Exception):
    pass


def load(
    folder: Path,
    tp: int,
    rank: int,
    device: str,
    dtype: torch.dtype,
    *,
    piece_bytes: int,
    abort_after: int | None = None,
) -> ShardTensors:
    """A rank's tensors, in NaN before, through the model's own merged and transposed places."""
    config = json.loads((folder / "config.json").read_text())
    spec = model_spec(config)
    layout = layout_of_plan(make_plan(spec, tp), rank)
    parallel = TensorParallel(rank, tp, SingleCommunicator())
    tensors = ShardTensors(layout, parallel, dtype, torch.device(device))
    models.build(config, tensors)
    for destination in tensors.destinations.values():
        destination.fill_(float("nan"))
    stored = checkpoint.match_keys(
        layout, Checkpoint.open(folder), spec.ignored, spec.optional_prefix
    )
    calls = 0

    def progress(now: checkpoint.LoadProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == abort_after:
            raise AbortedError

    checkpoint.load(
        layout, stored, tensors.destinations, progress, piece_bytes=piece_bytes, num_threads=3
    )
    return tensors


def pinned_bytes() -> int:
    """What torch has from the system, in use or not."""
    torch.cuda.init()
    return torch.cuda.memory.host_memory_stats()["allocated_bytes.current"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variation", ["smollm2", "gpt2"])
@pytest.mark.parametrize("piece_bytes", [1000, 8 * 1024 * 1024])
def test_a_gpu_gets_the_bits_that_a_cpu_gets(
    variation: str, dtype: torch.dtype, piece_bytes: int, tmp_path: Path
) -> None:
    """GPT-2's weights are transposed; a checkpoint in float32 is converted on the device."""
    folder = checkpoints.build(variation, tmp_path)
    before = pinned_bytes()
    for rank in range(2):
        on_cpu, on_gpu = (
            load(folder, 2, rank, device, dtype, piece_bytes=piece_bytes).destinations
            for device in ("cpu", "cuda:0")
        )
        assert on_cpu.keys() == on_gpu.keys()
        for name, expected in on_cpu.items():
            assert on_gpu[name].is_cuda
            assert torch.equal(on_gpu[name].cpu(), expected), name
    assert pinned_bytes() <= before


def test_an_abort_leaves_no_pinned_memory(tmp_path: Path) -> None:
    folder = checkpoints.build("smollm2", tmp_path)
    before = pinned_bytes()
    with pytest.raises(AbortedError):
        load(folder, 1, 0, "cuda:0", torch.float32, piece_bytes=1000, abort_after=5)
    assert pinned_bytes() <= before
