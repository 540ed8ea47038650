"""Reads slices of files into tensors: several threads, bounded memory, no byte that is not asked for.

Threads take pieces of at most `PIECE_BYTES`, in the order of the files. On a CPU a piece is read
straight into its tensor where that is contiguous and of the file's type, else into a buffer and copied.
For a GPU each thread has two pinned buffers and a stream of its own: one buffer is read into while the
other is copied to the device, where a type is converted, too.

A slice of each row is many short reads. The kernel is given a thousand of them at once, of the mapped
file by `process_vm_readv`: one at a time they would wait for Python's lock, and a map that is read in
the usual way kills the process when the file has become shorter (docs/architecture.md).
"""

import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle, repeat
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from colrow.errors import DataLoss

PIECE_BYTES = 8 * 1024 * 1024
"""Long enough that a copy to a device is at full speed, short enough that an abort is prompt."""
MAX_THREADS = 8
_ROWS_A_CALL = 1024  # what the kernel takes (IOV_MAX)
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A slice of a tensor, as bytes of a file. Offsets and sizes are whole elements of `dtype`.

    From `offset` on the tensor is `num_periods` stretches of `period_bytes`; of each of them the slice
    has the `spans` [start, stop), and all of those in their order are the slice, row-major.
    """

    file: Path
    dtype: torch.dtype
    offset: int
    num_periods: int
    period_bytes: int
    spans: tuple[tuple[int, int], ...]

    @property
    def bytes_of_period(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def num_bytes(self) -> int:
        return self.num_periods * self.bytes_of_period


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of each of the periods [first, last), the slice's bytes [start, stop).

    Of several periods these are all, so that a piece is one stretch of the slice.
    """

    source: FileSlice
    destination: Tensor
    index: int
    """Of the slice that it is a piece of."""
    first: int
    last: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return (self.last - self.first) * (self.stop - self.start)

    @property
    def elements(self) -> tuple[int, int]:
        """Where it begins and ends in the destination, row-major."""
        begin = self.first * self.source.bytes_of_period + self.start
        itemsize = self.source.dtype.itemsize
        return begin // itemsize, (begin + self.num_bytes) // itemsize

    @property
    def stretch(self) -> Tensor | None:
        """Its place in the destination, [elements], where the bytes can go as they are."""
        if self.destination.dtype != self.source.dtype or not self.destination.is_contiguous():
            return None
        begin, end = self.elements
        return self.destination.view(-1)[begin:end]


class _File:
    """A file that is open for reading, by any number of threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    def read_rows(self, memory: memoryview, starts: range, offsets: range, width: int) -> int:
        """Fills `width` bytes of memory at each start with what is at its offset of the file.

        How many rows it has filled: not all where the file ends before, or the system does not let it.
        """
        num_rows = len(starts)
        local = np.frombuffer(memory, dtype=np.uint8).ctypes.data + starts.start
        remote = self._bytes.ctypes.data + offsets.start
        local_vectors = _vectors(local, starts.step, width, num_rows)
        remote_vectors = _vectors(remote, offsets.step, width, num_rows)
        for done in range(0, num_rows, _ROWS_A_CALL):
            some = slice(done, done + _ROWS_A_CALL)
            count = _process_vm_readv(local_vectors[some], remote_vectors[some])
            if count < len(local_vectors[some]) * width:
                return done + max(count, 0) // width
        return num_rows

    def close(self) -> None:
        del self._bytes
        self._map.close()
        os.close(self.descriptor)


def _vectors(address: int, distance: int, width: int, count: int) -> np.ndarray:
    """`struct iovec`s, uint64 [count, 2]: of each stretch its address and bytes."""
    vectors = np.empty((count, 2), dtype=np.uint64)
    vectors[:, 0] = np.arange(count, dtype=np.uint64) * distance + address
    vectors[:, 1] = width
    return vectors


def _process_vm_readv(local: np.ndarray, remote: np.ndarray) -> int:
    """The bytes that went from the stretches `remote` of this process to `local`, or -1."""
    vectors = (
        *(ctypes.c_void_p(local.ctypes.data), ctypes.c_ulong(len(local))),
        *(ctypes.c_void_p(remote.ctypes.data), ctypes.c_ulong(len(remote))),
    )
    call = _LIBC.process_vm_readv
    call.restype = ctypes.c_ssize_t
    count: int = call(ctypes.c_int(os.getpid()), *vectors, ctypes.c_ulong(0))
    return count


class _Reader(Protocol):
    """Reads one piece at a time, by any thread."""

    def read(self, file: _File, piece: _Piece) -> None:
        """Brings a piece into its destination, or queues the last of it on the device."""

    def close(self) -> None:
        """Waits for what is queued and gives its memory up."""


def load(
    slices: Iterable[tuple[FileSlice, Tensor]],
    progress: Callable[[int, int], None],
    *,
    piece_bytes: int = PIECE_BYTES,
    num_threads: int | None = None,
) -> int:
    """Fills each tensor, all on one device, with its slice; returns the bytes read.

    `progress(bytes_read, tensors_filled)` is called by this thread after each piece; what it raises
    ends the load when each thread has read its piece. Threads: one for each core that this process may
    use, at most `MAX_THREADS`, and no more than there are pieces' worth of bytes.

    Memory beside the tensors: on a CPU `piece_bytes` a thread, and that only where a type is converted
    or a tensor is not contiguous (64 MiB at most); for a GPU twice that, pinned (128 MiB at most), and,
    to convert, as much as on a CPU of the device's. When this returns or raises, no thread is left, no
    copy is under way and the memory is given up. Raises DataLoss when a file ends early.
    """
    ordered = sorted(slices, key=lambda pair: (pair[0].file, pair[0].offset))
    pieces = [
        piece
        for index, (source, destination) in enumerate(ordered)
        for piece in _pieces(source, destination, index, piece_bytes)
    ]
    if not pieces:
        return 0
    if num_threads is None:
        total = sum(source.num_bytes for source, _ in ordered)
        num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), -(-total // piece_bytes))
    unread = Counter(piece.index for piece in pieces)
    filled = len(ordered) - len(unread)  # those without elements
    done = 0
    with ExitStack() as stack:
        files: dict[Path, _File] = {}
        for path in dict.fromkeys(piece.source.file for piece in pieces):
            files[path] = _File(path)
            stack.callback(files[path].close)
        readers: SimpleQueue[_Reader] = SimpleQueue()
        device = pieces[0].destination.device
        for _ in range(num_threads):
            reader = _reader(device, piece_bytes)
            stack.callback(reader.close)
            readers.put(reader)

        def read(piece: _Piece) -> _Piece:
            reader = readers.get_nowait()  # there is one for each thread
            try:
                reader.read(files[piece.source.file], piece)
            finally:
                readers.put(reader)
            return piece

        threads = _in_threads(read, pieces, num_threads, device)
        for piece in stack.enter_context(closing(threads)):
            done += piece.num_bytes
            unread[piece.index] -= 1
            filled += unread[piece.index] == 0
            progress(done, filled)
    return done


def _in_threads(
    function: Callable[[_Piece], _Piece],
    pieces: Sequence[_Piece],
    num_threads: int,
    device: torch.device,
) -> Generator[_Piece, None, None]:
    """Like `map`, in the order in which they are done. Closing it ends the threads."""
    if num_threads == 1:  # this one
        yield from map(function, pieces)
        return

    def begin() -> None:
        # A thread's device is the first one until it is said: going back to that from a stream of
        # `device` would make a context there, of half a gigabyte that no ledger knows of.
        if device.type == "cuda":
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load", initializer=begin)
    try:
        for future in as_completed([pool.submit(function, piece) for piece in pieces]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(
    source: FileSlice, destination: Tensor, index: int, piece_bytes: int
) -> Iterator[_Piece]:
    """Whole periods, as many as fit; parts of one where not even that fits. None of an empty slice."""
    assert destination.numel() * source.dtype.itemsize == source.num_bytes, "it is filled exactly"
    most = piece_bytes // source.dtype.itemsize * source.dtype.itemsize
    assert most > 0, "an element fits"
    width = source.bytes_of_period
    if width == 0:
        return
    periods = max(1, most // width)
    for first in range(0, source.num_periods, periods):
        last = min(first + periods, source.num_periods)
        for start in range(0, width, most):
            stop = min(start + most, width)
            yield _Piece(source, destination, index, first, last, start, stop)


def _read(file: _File, piece: _Piece, destination: Tensor) -> None:
    """Fills destination, uint8 [piece.num_bytes]. DataLoss when the file ends before that."""
    source = piece.source
    memory = memoryview(destination.numpy())  # type: ignore[arg-type]
    width = piece.stop - piece.start
    before = 0  # bytes of the slice in a period before this span
    for start, stop in source.spans:
        low, high = max(before, piece.start), min(before + stop - start, piece.stop)
        if low < high:
            offset = source.offset + piece.first * source.period_bytes + start + low - before
            starts = range(low - piece.start, len(memory), width)
            offsets = range(offset, offset + len(starts) * source.period_bytes, source.period_bytes)
            done = 0
            if len(starts) > 1:
                done = file.read_rows(memory, starts, offsets, high - low)
            rows = [memory[at : at + high - low] for at in starts[done:]]
            _read_rows(file, rows, offsets[done:])
        before += stop - start


def _read_rows(file: _File, rows: list[memoryview], offsets: range) -> None:
    """Fills each row from its offset."""
    counts = map(os.preadv, repeat(file.descriptor), zip(rows, strict=False), offsets)
    for row, offset, count in zip(rows, offsets, counts, strict=True):
        while count < len(row):
            more = os.preadv(file.descriptor, [row[count:]], offset + count)
            if more == 0:
                raise DataLoss(f"{file.path}: ended at byte {offset + count} while it was read")
            count += more


def _put(piece: _Piece, elements: Tensor) -> None:
    """Copies a piece, [elements] of the file's type, into a destination of any type and strides."""
    destination = piece.destination
    begin, end = piece.elements
    width = destination.shape[-1] if destination.dim() else 1
    rows = destination.view(-1, width)
    while begin < end:
        row, column = divmod(begin, width)
        whole = 0 if column else (end - begin) // width
        part = rows[row : row + whole] if whole else rows[row, column : column + end - begin]
        part.copy_(elements[: part.numel()].view(part.shape))
        elements, begin = elements[part.numel() :], begin + part.numel()


def _reader(device: torch.device, piece_bytes: int) -> _Reader:
    return _CpuReader(piece_bytes) if device.type == "cpu" else _CudaReader(device, piece_bytes)


class _CpuReader:
    def __init__(self, piece_bytes: int) -> None:
        # From the system, which gives memory as it is written: to free so much of malloc's would have it
        # keep pieces of that size from then on, a KV cache's too.
        self._buffer = torch.frombuffer(mmap.mmap(-1, piece_bytes), dtype=torch.uint8)

    def read(self, file: _File, piece: _Piece) -> None:
        if (stretch := piece.stretch) is not None:
            _read(file, piece, stretch.view(torch.uint8))
            return
        buffer = self._buffer[: piece.num_bytes]
        _read(file, piece, buffer)
        _put(piece, buffer.view(piece.source.dtype))

    def close(self) -> None:
        del self._buffer


class _CudaReader:
    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # The destinations' memory may have been another tensor's, which is still in use there.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._buffers = [
            (torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(2)
        ]
        self._turns = cycle(range(len(self._buffers)))

    def read(self, file: _File, piece: _Piece) -> None:
        pinned, copied = self._buffers[next(self._turns)]
        copied.synchronize()  # what was in it before; at once where nothing was
        buffer = pinned[: piece.num_bytes]
        _read(file, piece, buffer)
        with torch.cuda.stream(self._stream):
            if (stretch := piece.stretch) is not None:
                stretch.view(torch.uint8).copy_(buffer, non_blocking=True)
            else:
                # Converted there: torch would do it here first, on the way to another type.
                raw = buffer.to(self._device, non_blocking=True)
                _put(piece, raw.view(piece.source.dtype))
            copied.record()

    def close(self) -> None:
        self._buffers.clear()
        self._stream.synchronize()
        torch._C._host_emptyCache()  # else torch keeps pinned memory for the next to ask
