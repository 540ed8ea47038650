"""One rank's share of a model: what is to be loaded, and what is held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colrow.errors import InvalidArgument
from shard_worker import checkpoint, models
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_roots import ModelRoots
from shard_worker.sharding import Parameter, ShardLayout, ShardTensors
from shard_worker.tensor_parallel import TensorParallel

MAX_WEIGHT_BYTES = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load: a checkpoint folder, its config, the plan's parameters and ranges."""

    model_path: Path
    config: dict[str, Any]
    dtype: torch.dtype
    parameters: Sequence[Parameter]
    ranks: Sequence[dict[str, tuple[int, int]]]
    ignored_keys: Sequence[str]
    optional_prefix: str
    is_dummy: bool = False
    """Weights are random, and no file is read."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a shard is to be loaded from: a request, and the files that were there when it came.

    `opened`: None where weights are random.
    """

    request: LoadRequest
    layout: ShardLayout
    opened: checkpoint.Checkpoint | None

    @classmethod
    def open(cls, request: LoadRequest, rank: int, model_roots: ModelRoots) -> "Source":
        """Reads the files' headers. InvalidArgument for a plan that no device has memory for; raises
        as `Checkpoint.open` does."""
        layout = ShardLayout(
            {parameter.name: parameter for parameter in request.parameters},
            rank,
            tuple(request.ranks),
        )
        if (planned := layout.numel * request.dtype.itemsize) > MAX_WEIGHT_BYTES:
            raise InvalidArgument("parameters", f"{planned} bytes", "no device has so many")
        if request.is_dummy:
            return cls(request, layout, None)
        return cls(request, layout, checkpoint.Checkpoint.open(request.model_path, model_roots))

    @property
    def files(self) -> checkpoint.FileVersions:
        return self.opened.files if self.opened else ()

    @property
    def bytes_read(self) -> int:
        """Of headers."""
        return self.opened.bytes_read if self.opened else 0


@dataclass(frozen=True, slots=True)
class Shard:
    """A loaded model and what it was loaded from. `bytes_read` of files, beside their headers."""

    model: models.Model
    tensors: ShardTensors
    weight_bytes: int
    bytes_read: int
    request: LoadRequest
    files: checkpoint.FileVersions

    @property
    def vocab_size(self) -> int:
        return sum(self.model.lm_head.rank_sizes)

    def is_of(self, source: Source) -> bool:
        """To load `source` would give the same."""
        return (self.request, self.files) == (source.request, source.files)


def load(
    source: Source,
    tp: TensorParallel,
    device: torch.device,
    meter: MemoryMeter,
    progress: Callable[[checkpoint.LoadProgress], None],
) -> Shard:
    """Allocates a shard and fills it. Raises as `match_keys`, `models.build` and `checkpoint.load` do,
    and what `progress` raises."""
    request, layout, opened = source.request, source.layout, source.opened
    stored: Mapping[str, checkpoint.StoredTensor] = {}
    if opened is not None:
        stored = checkpoint.match_keys(
            layout, opened, request.ignored_keys, request.optional_prefix
        )
    meter.loading(layout.numel * request.dtype.itemsize)
    tensors = ShardTensors(layout, tp, request.dtype, device)
    model = models.build(request.config, tensors)
    bytes_read = 0
    if opened is not None:
        bytes_read = checkpoint.load(layout, stored, tensors.destinations, progress)
    else:
        checkpoint.fill_randomly(layout, tensors.destinations, progress)
    weight_bytes = tensors.num_bytes
    meter.loaded(tensors.finish())
    return Shard(model, tensors, weight_bytes, bytes_read, request, source.files)
