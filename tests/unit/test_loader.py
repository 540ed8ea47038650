"""Whatever the pieces and threads, a slice arrives whole, once, and nothing is left of its way."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colrow.errors import DataLoss
from shard_worker import loader
from shard_worker.loader import FileSlice

MIB = 1024 * 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def open_files() -> set[str]:
    folder = Path("/proc/self/fd")
    return {os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()}


@contextmanager
def nothing_left(file: Path) -> Iterator[None]:
    """No thread more than before, and the file is closed."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert str(file) not in open_files()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def write(file: Path, *tensors: Tensor) -> list[int]:
    """One after the other, after bytes that are no tensor's; where each begins."""
    offsets = []
    with file.open("wb") as stream:
        stream.write(b"\xff" * 12)
        for tensor in tensors:
            offsets.append(stream.tell())
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        stream.write(b"\xff" * 12)
    return offsets


def columns_of(file: Path, offset: int, tensor: Tensor, *spans: tuple[int, int]) -> FileSlice:
    """Some columns of each row of a matrix, by element ranges."""
    rows, width = tensor.shape
    size = tensor.dtype.itemsize
    owned = tuple((start * size, stop * size) for start, stop in spans)
    return FileSlice(file, tensor.dtype, offset, rows, width * size, owned)


def whole_of(file: Path, offset: int, tensor: Tensor) -> FileSlice:
    return FileSlice(file, tensor.dtype, offset, 1, tensor.nbytes, ((0, tensor.nbytes),))


def some_of(tensor: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    return torch.cat([tensor[:, start:stop] for start, stop in spans], dim=1)


# Any slice


@dataclass(frozen=True)
class Wanted:
    stored: Tensor
    spans: list[tuple[int, int]]
    served: torch.dtype
    is_transposed: bool


@st.composite
def wanted(draw: st.DrawFn) -> Wanted:
    """One to three spans of the columns of a matrix."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    bounds = sorted(draw(st.sets(st.integers(0, width), min_size=2, max_size=6)))
    spans = list(zip(bounds[::2], bounds[1::2], strict=False))
    stored = random_tensor((rows, width), draw(st.sampled_from(DTYPES)))
    return Wanted(stored, spans, draw(st.sampled_from(DTYPES)), draw(st.booleans()))


@given(st.lists(wanted(), min_size=1, max_size=4), st.integers(4, 100), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_any_slices_in_any_pieces_are_what_indexing_gives(
    drawn: list[Wanted], piece_bytes: int, num_threads: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "weights")
        offsets = write(file, *(each.stored for each in drawn))
        slices, expected = [], []
        for each, offset in zip(drawn, offsets, strict=True):
            result = some_of(each.stored, each.spans).to(each.served)
            destination = torch.full_like(result, float("nan"))
            if each.is_transposed:
                destination = destination.t().contiguous().t()
            slices.append((columns_of(file, offset, each.stored, *each.spans), destination))
            expected.append(result)
        seen: list[tuple[int, int]] = []
        num_bytes = loader.load(
            slices,
            lambda *now: seen.append(now),
            piece_bytes=piece_bytes,
            num_threads=num_threads,
        )
    for (_, destination), result in zip(slices, expected, strict=True):
        assert torch.equal(destination, result)
    assert num_bytes == sum(source.num_bytes for source, _ in slices)
    assert seen == sorted(seen), "never backwards"
    assert seen[-1] == (num_bytes, len(slices))
    largest = max(b - a for (a, _), (b, _) in zip([(0, 0), *seen], seen, strict=False))
    assert largest <= piece_bytes


@given(st.integers(1, 40), st.integers(4, 64), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_a_vector_in_any_pieces_is_the_vector(
    length: int, piece_bytes: int, stored: torch.dtype, served: torch.dtype
) -> None:
    vector = random_tensor((length,), stored)
    destination = torch.full((length,), float("nan"), dtype=served)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "weights")
        (offset,) = write(file, vector)
        slices = [(whole_of(file, offset, vector), destination)]
        loader.load(slices, lambda *_: None, piece_bytes=piece_bytes, num_threads=2)
    assert torch.equal(destination, vector.to(served))


def test_what_has_no_elements_is_filled(tmp_path: Path) -> None:
    matrix, empty = random_tensor((4, 4), torch.float32), torch.empty(0, 4)
    offsets = write(tmp_path / "weights", empty, matrix)
    destinations = [torch.empty(0, 4), torch.empty(4, 4)]
    sources = [
        whole_of(tmp_path / "weights", offset, tensor)
        for offset, tensor in zip(offsets, (empty, matrix), strict=True)
    ]
    seen: list[tuple[int, int]] = []
    loader.load(zip(sources, destinations, strict=True), lambda *now: seen.append(now))
    assert seen == [(64, 2)]
    assert torch.equal(destinations[1], matrix)
    assert loader.load([(sources[0], destinations[0])], lambda *_: None) == 0


def watch_map(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What comes of each read of rows from the mapped file, in bytes."""
    read, counts = loader._process_vm_readv, []

    def watched(local: Any, remote: Any) -> int:
        counts.append(read(local, remote))
        return counts[-1]

    monkeypatch.setattr(loader, "_process_vm_readv", watched)
    return counts


def refuse_map(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As where the system forbids it."""
    monkeypatch.setattr(loader, "_process_vm_readv", lambda *_: -1)
    return []


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="Linux counts reads there")
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("by_map", [True, False])
def test_the_kernel_counts_the_bytes_of_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, by_map: bool
) -> None:
    mapped = watch_map(monkeypatch) if by_map else refuse_map(monkeypatch)
    matrix = random_tensor((256, 64), torch.float32)
    (offset,) = write(tmp_path / "weights", matrix)
    source = columns_of(tmp_path / "weights", offset, matrix, (3, 9), (40, 63))
    destination = torch.empty(256, 29)

    def so_far() -> tuple[int, int]:
        """What the kernel says that this process has read, and what asking will add to it."""
        text = Path("/proc/self/io").read_text()
        return int(text.split()[1]), len(text)

    before, asking = so_far()
    num_bytes = loader.load(
        [(source, destination)], lambda *_: None, piece_bytes=500, num_threads=num_threads
    )
    assert so_far()[0] - before - asking + sum(mapped) == num_bytes == destination.nbytes
    assert bool(mapped) == by_map


# Its threads and its memory


def test_no_more_threads_than_cores_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = random_tensor((1000,), torch.float32)
    (offset,) = write(tmp_path / "weights", vector)
    source = whole_of(tmp_path / "weights", offset, vector)

    def threads_of(cores: int, piece_bytes: int) -> int:
        readers: list[int] = []
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        create = loader._reader
        with monkeypatch.context() as patched:

            def count(*settings: Any) -> Any:
                readers.append(1)
                return create(*settings)

            patched.setattr(loader, "_reader", count)
            loader.load([(source, torch.empty(1000))], lambda *_: None, piece_bytes=piece_bytes)
        return len(readers)

    assert threads_of(cores=2, piece_bytes=100) == 2
    assert threads_of(cores=64, piece_bytes=100) == loader.MAX_THREADS
    assert threads_of(cores=64, piece_bytes=1500) == 3
    assert threads_of(cores=64, piece_bytes=4000) == 1


def test_a_load_takes_no_more_memory_than_its_pieces(tmp_path: Path) -> None:
    """64 MiB in float32 become 32 MiB, which are there before, through 2 x 1 MiB."""
    vector = random_tensor((16 * MIB,), torch.float32)
    (offset,) = write(tmp_path / "weights", vector)
    source = whole_of(tmp_path / "weights", offset, vector)
    destination = torch.ones(16 * MIB, dtype=torch.bfloat16)
    process, peak = psutil.Process(), 0

    def watch(bytes_read: int, _: int) -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    before = process.memory_info().rss
    loader.load([(source, destination)], watch, piece_bytes=MIB, num_threads=2)
    assert torch.equal(destination, vector.bfloat16())
    assert peak - before < 8 * MIB, "the pieces, and what threads take"


# What ends it


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("served", [torch.float32, torch.float16], ids=str)
def test_what_progress_raises_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: torch.dtype, num_threads: int
) -> None:
    class AbortedError(Exception):
        pass

    vector = random_tensor((10_000,), torch.float32)
    (offset,) = write(tmp_path / "weights", vector)
    destination = torch.full((10_000,), float("nan"), dtype=served)
    preadv, reads, calls = os.preadv, 0, 0

    def slow_preadv(descriptor: int, buffers: list[memoryview], at: int) -> int:
        nonlocal reads
        reads += 1
        time.sleep(0.001)
        return preadv(descriptor, buffers, at)

    def abort(bytes_read: int, _: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise AbortedError

    monkeypatch.setattr(os, "preadv", slow_preadv)
    source = whole_of(tmp_path / "weights", offset, vector)
    with nothing_left(tmp_path / "weights"), pytest.raises(AbortedError):
        loader.load([(source, destination)], abort, piece_bytes=4, num_threads=num_threads)
    assert calls == 5
    assert 5 <= reads < 1000, "of 10,000"


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_file_that_shrinks_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    """After some rows of it: those that are gone are no crash, and nobody waits for them."""
    file = tmp_path / "weights"
    matrix = random_tensor((2000, 16), torch.float32)
    (offset,) = write(file, matrix)
    preadv, reads = os.preadv, itertools.count(1)

    def shrinking_preadv(descriptor: int, buffers: list[memoryview], at: int) -> int:
        if next(reads) == 100:
            os.truncate(file, offset + 40)
        return preadv(descriptor, buffers, at)

    read = loader._process_vm_readv

    def shrinking_read(local: Any, remote: Any) -> int:
        if next(reads) == 100:
            os.truncate(file, offset + 40)
        return read(local, remote)

    monkeypatch.setattr(os, "preadv", shrinking_preadv)
    monkeypatch.setattr(loader, "_process_vm_readv", shrinking_read)
    source, destination = columns_of(file, offset, matrix, (8, 16)), torch.empty(2000, 8)
    with nothing_left(file), pytest.raises(DataLoss, match=r"weights: ended at byte \d+ while"):
        loader.load(
            [(source, destination)], lambda *_: None, piece_bytes=64, num_threads=num_threads
        )


@pytest.mark.parametrize("mapped", [-1, 0, 28 * 7, 28 * 7 + 5])
def test_reads_that_give_less_than_asked_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: int
) -> None:
    read = loader._process_vm_readv
    monkeypatch.setattr(loader, "_process_vm_readv", lambda *vectors: min(read(*vectors), mapped))
    matrix = random_tensor((20, 10), torch.float32)
    (offset,) = write(tmp_path / "weights", matrix)
    destination = torch.full((20, 7), float("nan"))
    preadv = os.preadv

    def scant(descriptor: int, buffers: list[memoryview], at: int) -> int:
        return preadv(descriptor, [memoryview(buffers[0])[:5]], at)

    monkeypatch.setattr(os, "preadv", scant)
    source = columns_of(tmp_path / "weights", offset, matrix, (2, 9))
    loader.load([(source, destination)], lambda *_: None, num_threads=1)
    assert torch.equal(destination, matrix[:, 2:9])
