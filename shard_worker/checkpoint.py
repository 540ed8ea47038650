"""Reads this rank's slices of a safetensors checkpoint: no more bytes than it owns.

The format: an 8-byte little-endian header length, a JSON header with data type, shape and offsets of
each tensor, then the data, row-major (https://huggingface.co/docs/safetensors). A checkpoint is one
`model.safetensors` or several files named by `model.safetensors.index.json`.

A slice along the first dimension is one stretch of the file, one along a later dimension a stretch for
each row. Which bytes they are is said here; `loader` reads them.
"""

import fnmatch
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from colrow.errors import DataLoss, InvalidArgument
from shard_worker import loader
from shard_worker.model_roots import ModelRoots
from shard_worker.sharding import ShardLayout

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MAX_HEADER_BYTES = 100 * 1024 * 1024

FileVersions = tuple[tuple[str, int, int], ...]
"""Name, size in bytes and modification time in ns of each file: changed files are another model."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

ANYWHERE = ModelRoots()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: file, data type, shape, and the byte offset of its first element."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class LoadProgress:
    bytes_read: int
    bytes_to_read: int
    parameters_loaded: int
    parameters_total: int


class Checkpoint:
    """The tensors of a checkpoint folder, by key. Opening it reads index and headers only.

    `bytes_read` counts those.
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], files: FileVersions, bytes_read: int
    ) -> None:
        self.tensors = tensors
        self.files = files
        self.bytes_read = bytes_read

    @classmethod
    def open(cls, folder: Path, roots: ModelRoots = ANYWHERE) -> "Checkpoint":
        """Reads the headers. InvalidArgument when there is no checkpoint, DataLoss when it is broken,
        PermissionDenied when a file, links followed, lies outside of `roots`."""
        index = folder / INDEX_FILE
        if index.is_file():
            roots.check(index)
            weight_map = _read_index(index)
            files, bytes_read = sorted(set(weight_map.values())), index.stat().st_size
        elif (folder / SINGLE_FILE).is_file():
            weight_map, files, bytes_read = {}, [folder / SINGLE_FILE], 0
        else:
            raise InvalidArgument(
                "model_path", str(folder), f"has neither {SINGLE_FILE} nor {INDEX_FILE}"
            )
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            roots.check(file)
            if not file.is_file():
                raise DataLoss(f"{file}: is missing; {INDEX_FILE} names it")
            found, header_bytes = _read_header(file)
            for key in found:
                if (listed := weight_map.get(key, file)) != file:
                    raise DataLoss(f"{file}: holds {key!r}; {INDEX_FILE} has it in {listed.name}")
            tensors |= found
            bytes_read += header_bytes
        if lost := sorted(weight_map.keys() - tensors.keys()):
            raise DataLoss(f"{weight_map[lost[0]]}: lacks {lost[0]!r}; {INDEX_FILE} has it there")
        stats = [(file.name, file.stat()) for file in files]
        versions = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
        return cls(tensors, versions, bytes_read)


def _read_index(file: Path) -> dict[str, Path]:
    """Where the index says that each key is."""
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataLoss(f"{file}: is no index: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataLoss(f"{file}: weight_map is empty or no object")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise DataLoss(
                f"{file}: weight_map has {key!r} in {name!r}, which is no file beside it"
            )
    return {key: file.with_name(name) for key, name in weight_map.items()}


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of one file, each checked to lie inside it, and the bytes that were read."""
    file_bytes = file.stat().st_size
    with file.open("rb", buffering=0) as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise DataLoss(f"{file}: is truncated or no safetensors file ({file_bytes} bytes)")
        raw = stream.read(header_bytes)
    start = 8 + header_bytes
    tensors = {}
    spans: list[tuple[int, int, str]] = []
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for key, entry in header.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError(f"{key} has shape {shape} at {begin!r} to {end!r}")
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is not None and end - begin != prod(shape) * dtype.itemsize:
                raise DataLoss(f"{file}: {key} holds {end - begin} bytes for shape {shape}")
            if not begin <= end <= file_bytes - start:
                raise DataLoss(
                    f"{file}: is truncated: {key} ends at byte {start + end} of {file_bytes}"
                )
            if begin < end:
                spans.append((begin, end, key))
            # A type that no model loads (an int mask, say) matters only when a parameter has it.
            tensors[key] = StoredTensor(file, dtype or torch.uint8, shape, start + begin)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataLoss(f"{file}: malformed header: {error!r}") from error
    for (_, end, key), (begin, _, other) in pairwise(sorted(spans)):
        if begin < end:
            raise DataLoss(f"{file}: {key} and {other} overlap")
    return tensors, start


def match_keys(
    layout: ShardLayout,
    checkpoint: Checkpoint,
    ignored: Sequence[str],
    optional_prefix: str,
) -> dict[str, StoredTensor]:
    """The stored tensor of each parameter, strict both ways.

    Raises InvalidArgument naming the keys when a parameter is missing, when a key is neither a
    parameter nor ignored, or when a shape or data type differs.
    """

    def full_name(key: str) -> str:
        prefixed = optional_prefix + key
        return prefixed if key not in layout.parameters and prefixed in layout.parameters else key

    stored: dict[str, StoredTensor] = {}
    for key, tensor in checkpoint.tensors.items():
        if (name := full_name(key)) in stored:
            raise InvalidArgument("checkpoint", name, f"is there twice, once as {key}")
        stored[name] = tensor
    if missing := sorted(layout.parameters.keys() - stored.keys()):
        raise InvalidArgument(
            "checkpoint", _some(missing), f"missing ({len(missing)} of {len(layout.parameters)})"
        )
    patterns = [*ignored, *(p.removeprefix(optional_prefix) for p in ignored)]
    unexpected = sorted(
        key
        for key in stored.keys() - layout.parameters.keys()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
    )
    if unexpected:
        raise InvalidArgument(
            "checkpoint", _some(unexpected), f"unexpected ({len(unexpected)}): no parameter has it"
        )
    for name, parameter in layout.parameters.items():
        tensor = stored[name]
        if tensor.shape != parameter.shape:
            raise InvalidArgument(
                "checkpoint", name, f"has shape {tensor.shape}, the config asks {parameter.shape}"
            )
        if tensor.dtype not in _DTYPES.values():
            raise InvalidArgument("checkpoint", name, f"its data type is none of {sorted(_DTYPES)}")
    return {name: stored[name] for name in layout.parameters}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")


def load(
    layout: ShardLayout,
    stored: Mapping[str, StoredTensor],
    destinations: Mapping[str, Tensor],
    progress: Callable[[LoadProgress], None],
    *,
    piece_bytes: int = loader.PIECE_BYTES,
    num_threads: int | None = None,
) -> int:
    """Fills every destination with this rank's slice and returns the bytes read.

    `destinations[name]` has `layout.local_shape(name)`; the data is converted to its type. `progress`
    is called after each piece of a parameter, and what it raises ends the load. How it is read, and in
    how much memory, `loader.load` says. Raises DataLoss when a file ends early.
    """
    assert stored.keys() == destinations.keys(), "every parameter has one place to go"
    slices = [(file_slice(layout, name, stored[name]), destinations[name]) for name in stored]
    total = sum(source.num_bytes for source, _ in slices)

    def report(bytes_read: int, parameters_loaded: int) -> None:
        progress(LoadProgress(bytes_read, total, parameters_loaded, len(stored)))

    return loader.load(slices, report, piece_bytes=piece_bytes, num_threads=num_threads)


def file_slice(layout: ShardLayout, name: str, tensor: StoredTensor) -> loader.FileSlice:
    """Where this rank's slice of a parameter lies."""
    split = layout.parameters[name].split_dim or 0
    extent = tensor.shape[split] if tensor.shape else 1
    owned: list[tuple[int, int]] = []
    for start, stop in layout.slices(name) or ((0, extent),):
        if owned and owned[-1][1] == start:
            start = owned.pop()[0]
        owned.append((start, stop))
    periods = prod(tensor.shape[:split])
    if owned == [(0, extent)]:  # one stretch of the file, whatever the dimension
        periods, extent, owned = 1, periods * extent, [(0, periods * extent)]
    index_bytes = prod(tensor.shape[split + 1 :]) * tensor.dtype.itemsize
    spans = tuple((start * index_bytes, stop * index_bytes) for start, stop in owned)
    return loader.FileSlice(
        file=tensor.file,
        dtype=tensor.dtype,
        offset=tensor.offset,
        num_periods=periods,
        period_bytes=extent * index_bytes,
        spans=spans,
    )


def fill_randomly(
    layout: ShardLayout,
    destinations: Mapping[str, Tensor],
    progress: Callable[[LoadProgress], None],
) -> None:
    """Fills every destination with numbers of the usual size, without a checkpoint.

    What all ranks hold whole is the same on all of them.
    """
    total = sum(destination.nbytes for destination in destinations.values())
    done = 0
    for count, (name, destination) in enumerate(destinations.items(), 1):
        split = layout.parameters[name].split_dim is not None
        seed = zlib.crc32(name.encode()) + (layout.rank if split else 0)
        if destination.dim() < 2:
            destination.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(destination.device).manual_seed(seed)
            destination.normal_(0.0, 0.02, generator=generator)
        done += destination.nbytes
        progress(LoadProgress(done, total, count, len(destinations)))
