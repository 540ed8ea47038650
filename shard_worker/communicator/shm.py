"""Collectives between processes of one host, through a shared memory segment that both spin on.

A tensor-parallel CPU model makes two small all-reduces a layer. Through a loopback socket each
costs hundreds of microseconds, most of it the kernel waking the peer up. Here every rank copies its
tensor to a slot of its own, raises a flag, and adds the slots up itself: no wake-up, no hop through
another rank, a few microseconds.

The segment, every cell an int64 and every line 128 bytes (two cache lines of 64, because x86
fetches them in pairs), so that no rank's stores take a line away from under another's:

    line 0          magic, layout version, size, slot capacity: written by rank 0, then constant
    line 1          READY (1 once all have joined), ABORTED_BY (0, or the aborting rank + 1)
    line 2 + r      rank r: SEQUENCE, SIGNATURE (one per slot), STATE
    page aligned    rank 0 slot 0, rank 0 slot 1, rank 1 slot 0, …, `capacity` bytes each

The exchange
------------
All collectives are made of one step, the exchange, and every rank does the same series of them,
numbered 1, 2, 3, …: a small all_reduce or all_gather is one exchange, a tensor larger than a slot
is one per chunk, a barrier is one with no data. In exchange i, a rank

    1. writes its data to its slot i % 2,    2. fence,    3. stores SEQUENCE = i,
    4. waits until every peer's SEQUENCE >= i,    5. fence,    6. reads slot i % 2 of every rank.

*A slot holds the right data when it is read.* Step 4 of exchange i saw each peer past its step 3,
so its data for i was written. It is still there: the peer next writes that slot in exchange i + 2,
which it enters after its step 4 of i + 1, so after this rank's step 3 of i + 1, so after this
rank's step 6 of i.

*That is, no slot is overwritten before all have read it*, for any number of ranks: whoever writes
slot i % 2 in exchange i has seen every peer's SEQUENCE >= i - 1 (step 4 of i - 1), and a peer that
has stored i - 1 had done its step 6 of i - 2, the last reader of that slot, before. One slot would
not do: a fast rank could write exchange i while a slow one still reads i - 1. What the exchanges
carry (all_reduce, all_gather, a chunk of either, nothing) plays no part in the argument, so any mix
of them is right as long as all ranks run the same mix; the number of chunks therefore follows from
shapes that all ranks know. SIGNATURE has two cells for the same reason as the slots.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from . import (
    DEFAULT_OP_TIMEOUT_S,
    Communicator,
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorTimeout,
    check_all_gather,
    check_all_reduce,
    check_membership,
    check_wanted,
    sum_in_rank_order,
)

__all__ = ["ShmCommunicator"]

_DIRECTORY = "/dev/shm"
_ID_PATTERN = re.compile(rb"colrow-[0-9a-f]{32}")

_MAGIC = 0x776F72_6C6F63  # "colrow", little endian
_LAYOUT_VERSION = 1
_WORD = 8  # bytes of a cell
_LINE = 16  # cells of a line
_HEADER = struct.Struct("=4q")  # line 0: magic, layout version, size, capacity

# Cells, counted from the segment's start.
_READY = 1 * _LINE
_ABORTED_BY = 1 * _LINE + 1
_FIRST_RANK_LINE = 2 * _LINE
# Cells, counted from a rank's line.
_SEQUENCE = 0
_SIGNATURE = 1  # and 2
_STATE = 3

# Values of STATE. A fresh segment is all zeros, so nobody has joined yet.
_ABSENT, _JOINED, _LEFT = 0, 1, 2

# Large enough that decode steps and short prompts go in one exchange, small enough that a chunk is
# still in the cache of the core that wrote it when the others read it.
_DEFAULT_CAPACITY_BYTES = 1 << 20

_SPINS_BEFORE_YIELD = 32  # a yield takes longer than a peer in step with us, about 1 µs
_SPINS_PER_CHECK = 64  # between two looks at the abort cell and the clock, about 30 µs
_SPIN_LIMIT_S = 0.002  # beyond this, the peer is not merely late: let the core go
_MAX_SLEEP_S = 0.001
_JOIN_POLL_S = 0.0005

# Shapes of prompts vary without end; the views of this many are kept.
_MAX_CACHED_VIEWS = 256


@dataclass(frozen=True, slots=True)
class _Views:
    """The slots as tensors of one collective's dtype and shapes: slots[parity][rank]."""

    slots: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    signature: int


class ShmCommunicator(Communicator):
    """All ranks in processes of one host (sharing /dev/shm, so of one container or pod IPC space).

    Ranks are made by `join`. Waiting costs a core for at most 2 ms, then the rank sleeps in short
    naps that lengthen the wait by about 3 %. A peer that died is noticed by `op_timeout_s`.
    """

    transport = "shm"

    def __init__(
        self, rank: int, size: int, segment: mmap.mmap, capacity_bytes: int, op_timeout_s: float
    ) -> None:
        """For `join`, which makes the segment and checks in."""
        super().__init__(rank, size, op_timeout_s)
        self._capacity = capacity_bytes
        # The segment is never closed by hand: torch.frombuffer takes a reference to it but no
        # buffer lock, so that an explicit close would leave tensors pointing at unmapped memory.
        # It is unmapped when the last view goes.
        self._segment: mmap.mmap | None = segment
        # An indexed store or load of a "q" memoryview is one aligned 8-byte move: no torn reads.
        self._words = memoryview(segment).cast("q")
        self._own_line = _rank_line(rank)
        self._peer_lines = tuple(_rank_line(r) for r in range(size) if r != rank)
        self._sequence = 0
        self._reduce_views: dict[tuple[torch.dtype, torch.Size], _Views] = {}
        self._gather_views: dict[tuple[torch.dtype, torch.Size, tuple[int, ...]], _Views] = {}
        fence = threading.Lock()
        fence.acquire()
        self._fence_release, self._fence_acquire = fence.release, fence.acquire
        self._lifecycle = threading.Lock()  # abort (any thread) against close
        self._closed = False

    @staticmethod
    def create_id() -> bytes:
        """A fresh segment name that nobody can guess. Made once per epoch, then given to all ranks;
        creates nothing yet."""
        return b"colrow-" + secrets.token_hex(16).encode()

    @classmethod
    def join(
        cls,
        communicator_id: bytes,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        capacity_bytes: int = _DEFAULT_CAPACITY_BYTES,
        op_timeout_s: float = DEFAULT_OP_TIMEOUT_S,
        abandoned: threading.Event | None = None,
    ) -> Self:
        """Meet the other ranks; blocks until all `size` of them have mapped the segment.

        communicator_id: from `create_id`, the same on all ranks. timeout_s: deadline of the
        rendezvous. capacity_bytes: of one slot (there are 2 * size), rounded up to 4096; the same
        on all ranks; larger tensors go in chunks. op_timeout_s: see `Communicator`. abandoned: ends
        the wait for other ranks at once with CommunicatorAborted when set.

        Once any rank's join has returned, the segment has no name any more: the kernel frees it
        with the last process, however that process ends. The name of a join that fails goes with
        the first rank to give up; it stays only if all ranks are killed in the midst of joining.

        Raises ValueError for a bad argument, CommunicatorTimeout naming the ranks that are missing,
        CommunicatorError when the ranks disagree on size, capacity or layout, when a rank joins
        twice, or when /dev/shm is missing or too small.
        """
        check_membership(rank, size)
        path = _segment_path(communicator_id)
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: {capacity_bytes} is not positive")
        capacity_bytes = _round_up(capacity_bytes, 4096)
        deadline = time.monotonic() + timeout_s
        header = (_MAGIC, _LAYOUT_VERSION, size, capacity_bytes)
        if rank == 0:
            segment = _create_segment(path, header)
        else:
            segment = _open_segment(path, header, rank, deadline, timeout_s, abandoned)
        communicator = cls(rank, size, segment, capacity_bytes, op_timeout_s)
        communicator._check_in(path, deadline, timeout_s, abandoned)
        return communicator

    def all_reduce(self, x: Tensor) -> Tensor:
        """IN PLACE; see `Communicator.all_reduce`. One exchange per `capacity_bytes` of x."""
        views = self._reduce_views.get((x.dtype, x.shape))
        if views is not None and x.is_cpu and x.is_contiguous() and not x.requires_grad:
            return self._reduce(x, views)
        check_all_reduce(x)
        capacity = self._capacity // self._slot_dtype(x.dtype).itemsize
        if x.numel() <= capacity:
            return self._reduce(x, self._cache_reduce_views(x))
        flat = x.view(-1)
        for start in range(0, x.numel(), capacity):
            chunk = flat[start : start + capacity]
            self._reduce(chunk, self._cache_reduce_views(chunk))
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """NOT in place; see `Communicator.all_gather`. One exchange if the largest rank's tensor
        fits `capacity_bytes`, else one per block of rows (and columns) that does."""
        sizes = tuple(sizes)
        views = self._gather_views.get((x.dtype, x.shape, sizes))
        if views is not None and x.is_cpu and not x.requires_grad:
            return self._gather(x, views)
        check_all_gather(x, sizes, self.rank, self.size)
        largest = max(sizes)
        num_rows = x.shape[:-1].numel()
        if num_rows * largest * x.itemsize <= self._capacity:
            return self._gather(x, self._cache_gather_views(x, sizes))
        # Blocks of the largest rank's [num_rows, largest], the same on every rank. A rank whose
        # rows end before the block's columns has a narrower or an empty piece of it.
        rows = x.reshape(num_rows, sizes[self.rank])
        out = x.new_empty((num_rows, sum(sizes)))
        block_columns = min(largest, self._capacity // x.itemsize)
        block_rows = self._capacity // (block_columns * x.itemsize)
        for row in range(0, num_rows, block_rows):
            for column in range(0, largest, block_columns):
                widths = tuple(min(max(s - column, 0), block_columns) for s in sizes)
                piece = rows[row : row + block_rows, column : column + widths[self.rank]]
                slots = self._send(piece, self._cache_gather_views(piece, widths), "all_gather")
                start = column
                for slot, width, rank_size in zip(slots, widths, sizes, strict=True):
                    out[row : row + block_rows, start : start + width] = slot
                    start += rank_size
        return out.view(*x.shape[:-1], out.shape[-1])

    def barrier(self, timeout_s: float) -> None:
        """An exchange without data; see `Communicator.barrier`."""
        self._exchange(self._sequence + 1, _signature("barrier"), "barrier", timeout_s)

    def abort(self) -> None:
        """Raise the abort cell that every waiting rank looks at, in this process and in the others;
        see `Communicator.abort`."""
        with self._lifecycle:
            if not self._closed and not self._words[_ABORTED_BY]:
                self._words[_ABORTED_BY] = self.rank + 1

    def close(self) -> None:
        """Leave the group and let go of the segment; see `Communicator.close`. A peer that still
        reads this rank's last slots has the segment mapped itself; a peer that later waits for
        this rank gets CommunicatorAborted."""
        with self._lifecycle:
            if self._closed:
                return
            self._closed = True
            self._words[self._own_line + _STATE] = _LEFT
            self._reduce_views.clear()
            self._gather_views.clear()
            self._words = memoryview(b"").cast("q")
            self._segment = None

    # One exchange with data

    def _reduce(self, x: Tensor, views: _Views) -> Tensor:
        sum_in_rank_order(self._send(x, views, "all_reduce"), out=x)
        return x

    def _gather(self, x: Tensor, views: _Views) -> Tensor:
        return torch.cat(self._send(x, views, "all_gather"), dim=-1)

    def _send(self, x: Tensor, views: _Views, op: str) -> tuple[Tensor, ...]:
        """Exchange x; returns every rank's tensor, still in its slot: to be read before the next
        exchange and never to be written."""
        sequence = self._sequence + 1
        slots = views.slots[sequence & 1]
        slots[self.rank].copy_(x)
        self._exchange(sequence, views.signature, op, self.op_timeout_s)
        return slots

    def _exchange(self, sequence: int, signature: int, op: str, timeout_s: float) -> None:
        """Steps 2 to 5 of the module's docstring."""
        words = self._words
        if self._closed or words[_ABORTED_BY]:
            raise self._ended(op)
        self._sequence = sequence
        own_line = self._own_line
        signature_cell = _SIGNATURE + (sequence & 1)
        words[own_line + signature_cell] = signature
        self._fence()
        words[own_line] = sequence
        for line in self._peer_lines:
            if words[line] < sequence:
                self._wait(line, sequence, op, timeout_s)
        self._fence()
        for line in self._peer_lines:
            if words[line + signature_cell] != signature:
                self.abort()
                raise CommunicatorError(
                    f"{op}: rank {_rank_of(line)} runs another collective, or one of another shape "
                    f"or dtype, than rank {self.rank}: the ranks have diverged"
                )

    def _fence(self) -> None:
        """A full memory fence: no load or store moves across it, in either direction.

        x86 keeps stores in order, and loads; ARM and others do not: a plain store of the flag may
        become visible before the data, and a load of the data may be served before that of the
        flag. Python has no fence, but releasing a lock that this thread holds and taking it again
        are two atomic operations, a release (nothing moves below it) followed by an acquire
        (nothing moves above it), which the processor keeps in this order. About 60 ns. What
        torch's own threads copied is ordered by their hand-over to this one.
        """
        self._fence_release()
        self._fence_acquire()

    def _wait(self, line: int, sequence: int, op: str, timeout_s: float) -> None:
        """Return once the peer of this line has stored `sequence` or more."""
        words = self._words
        sched_yield = os.sched_yield  # lets a peer on the same core run, and other threads of ours
        for _ in range(_SPINS_BEFORE_YIELD):
            if words[line] >= sequence:
                return
        for _ in range(_SPINS_PER_CHECK):
            if words[line] >= sequence:
                return
            sched_yield()
        began = time.monotonic()
        while words[line] < sequence:
            if words[_ABORTED_BY] or self._closed:
                raise self._ended(op, sequence)
            if words[line + _STATE] == _LEFT:
                self._fence()
                if words[line] >= sequence:  # it did its part of this exchange and then left
                    return
                self.abort()
                raise CommunicatorAborted(f"{op}: rank {_rank_of(line)} has left the group")
            waited_s = time.monotonic() - began
            if waited_s >= timeout_s:
                missing = self._behind(sequence)
                # This rank leaves the series here, so the group can't go on: tell the others.
                self.abort()
                raise CommunicatorTimeout(op, missing, timeout_s)
            if waited_s < _SPIN_LIMIT_S:
                for _ in range(_SPINS_PER_CHECK):
                    if words[line] >= sequence:
                        return
                    sched_yield()
            else:
                time.sleep(min(waited_s / 32, _MAX_SLEEP_S))

    def _behind(self, sequence: int) -> list[int]:
        return [_rank_of(line) for line in self._peer_lines if self._words[line] < sequence]

    def _ended(self, op: str, sequence: int | None = None) -> CommunicatorError:
        """The error for a collective of a group that is over; sequence: if it was under way."""
        if self._closed:
            return CommunicatorError(f"{op}: the communicator is closed")
        message = f"{op}: rank {self._words[_ABORTED_BY] - 1} aborted the group"
        if sequence is not None and (behind := self._behind(sequence)):
            message += f" while rank {self.rank} waited for {', '.join(map(str, behind))}"
        return CommunicatorAborted(message)

    # Views of the slots

    def _slot_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the slots hold while tensors of this dtype are summed. More than two 16-bit tensors
        are added in float32: each rank widens its own on the way in, instead of everyone's on the
        way out."""
        return dtype if self.size == 2 else torch.float32

    def _cache_reduce_views(self, x: Tensor) -> _Views:
        key = (x.dtype, x.shape)
        views = self._reduce_views.get(key)
        if views is None:
            signature = _signature("all_reduce", str(x.dtype), x.numel())
            views = self._make_views(self._slot_dtype(x.dtype), [x.shape] * self.size, signature)
            if len(self._reduce_views) >= _MAX_CACHED_VIEWS:
                self._reduce_views.clear()
            self._reduce_views[key] = views
        return views

    def _cache_gather_views(self, x: Tensor, sizes: tuple[int, ...]) -> _Views:
        key = (x.dtype, x.shape, sizes)
        views = self._gather_views.get(key)
        if views is None:
            shapes = [torch.Size((*x.shape[:-1], s)) for s in sizes]
            num_rows = x.shape[:-1].numel()
            signature = _signature("all_gather", str(x.dtype), num_rows, *sizes)
            views = self._make_views(x.dtype, shapes, signature)
            if len(self._gather_views) >= _MAX_CACHED_VIEWS:
                self._gather_views.clear()
            self._gather_views[key] = views
        return views

    def _make_views(
        self, dtype: torch.dtype, shapes: Sequence[torch.Size], signature: int
    ) -> _Views:
        if self._segment is None:
            raise CommunicatorError("the communicator is closed")
        segment = self._segment
        data = _data_offset(self.size)

        def slot(rank: int, parity: int) -> Tensor:
            shape = shapes[rank]
            if shape.numel() == 0:
                return torch.empty(shape, dtype=dtype)
            offset = data + (2 * rank + parity) * self._capacity
            flat = torch.frombuffer(segment, dtype=dtype, count=shape.numel(), offset=offset)
            return flat.view(shape)

        # Views outlive the call that made them, and in-place writes to tensors made in inference
        # mode are refused outside of it.
        with torch.inference_mode(False):
            ranks = range(self.size)
            slots = (tuple(slot(r, 0) for r in ranks), tuple(slot(r, 1) for r in ranks))
        return _Views(slots, signature)

    # Rendezvous

    def _check_in(
        self, path: str, deadline: float, timeout_s: float, abandoned: threading.Event | None
    ) -> None:
        """Say that this rank has mapped the segment; return when all have and the name is gone."""
        words = self._words
        own_state = self._own_line + _STATE
        if words[own_state] != _ABSENT:
            raise CommunicatorError(f"join: rank {self.rank} is there already")
        words[own_state] = _JOINED
        try:
            while not words[_READY]:
                check_wanted(abandoned)
                states = [words[_rank_line(r) + _STATE] for r in range(self.size)]
                left = [r for r, state in enumerate(states) if state == _LEFT]
                missing = [r for r, state in enumerate(states) if state == _ABSENT]
                if left or time.monotonic() >= deadline:
                    # All have joined and yet no READY: rank 0 died in between.
                    detail = f"rank {left[0]} gave up first" if left else ""
                    raise CommunicatorTimeout("join", missing or left or [0], timeout_s, detail)
                if self.rank == 0 and not missing:
                    _unlink(path)
                    words[_READY] = 1
                else:
                    time.sleep(_JOIN_POLL_S)
        except BaseException:
            # Peers must not count on this rank, even if the last of them has just arrived.
            words[own_state] = _LEFT
            self.abort()
            _unlink(path)
            raise


def _rank_line(rank: int) -> int:
    return _FIRST_RANK_LINE + rank * _LINE


def _rank_of(line: int) -> int:
    return (line - _FIRST_RANK_LINE) // _LINE


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _data_offset(size: int) -> int:
    """Bytes before the first slot."""
    return _round_up(_rank_line(size) * _WORD, 4096)


def _segment_bytes(header: tuple[int, ...]) -> int:
    _, _, size, capacity = header
    return _data_offset(size) + 2 * size * capacity


def _signature(op: str, *shape: object) -> int:
    """A number that tells collectives apart. Not hash(): of a str, it differs between processes."""
    return zlib.crc32(repr((op, shape)).encode())


def _segment_path(communicator_id: bytes) -> str:
    """The id came over the network: only the exact form of `create_id` may become a path."""
    if not _ID_PATTERN.fullmatch(communicator_id):
        raise ValueError(f"communicator_id: {communicator_id[:64]!r} is not one of ShmCommunicator")
    return os.path.join(_DIRECTORY, communicator_id.decode())


def _create_segment(path: str, header: tuple[int, ...]) -> mmap.mmap:
    """Rank 0's part. O_EXCL: an existing file of this name is not ours to use."""
    num_bytes = _segment_bytes(header)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise CommunicatorError("join: the segment exists: rank 0 is there already") from None
    except OSError as error:
        raise CommunicatorError(f"join: no shared memory in {_DIRECTORY}: {error}") from error
    try:
        # Claims the pages now. With ftruncate alone, a full /dev/shm (64 MiB in a container that
        # nobody told otherwise) would kill the process with SIGBUS at the first write.
        os.posix_fallocate(fd, 0, num_bytes)
        segment = mmap.mmap(fd, num_bytes)
        # Peers take the header for complete when they see the magic: it goes last.
        packed = _HEADER.pack(*header)
        os.pwrite(fd, packed[_WORD:], _WORD)
        os.pwrite(fd, packed[:_WORD], 0)
    except BaseException as error:
        _unlink(path)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CommunicatorError(
                f"join: {_DIRECTORY} has no room for {num_bytes} bytes; enlarge it (--shm-size, a "
                "memory-backed emptyDir) or lower capacity_bytes"
            ) from error
        raise
    finally:
        os.close(fd)
    return segment


def _open_segment(
    path: str,
    header: tuple[int, ...],
    rank: int,
    deadline: float,
    timeout_s: float,
    abandoned: threading.Event | None,
) -> mmap.mmap:
    """Another rank's part: wait until rank 0 has made the segment, and map it if both agree."""
    while True:
        check_wanted(abandoned)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = -1
        except OSError as error:
            raise CommunicatorError(f"join: cannot open the segment: {error}") from error
        if fd >= 0:
            try:
                data = os.pread(fd, _HEADER.size, 0)
                theirs = _HEADER.unpack(data.ljust(_HEADER.size, b"\0"))
                if theirs == header:
                    return mmap.mmap(fd, _segment_bytes(header))
                if theirs[0] == _MAGIC:
                    _refuse(fd, header, theirs, rank)
            finally:
                os.close(fd)
        if time.monotonic() >= deadline:
            _unlink(path)
            raise CommunicatorTimeout("join", [0], timeout_s, "no shared memory segment from it")
        time.sleep(_JOIN_POLL_S)


def _refuse(fd: int, header: tuple[int, ...], theirs: tuple[int, ...], rank: int) -> None:
    """Tell rank 0, as far as its layout has a line for this rank, and raise."""
    if theirs[1] == _LAYOUT_VERSION and rank < theirs[2]:
        os.pwrite(fd, struct.pack("=q", _LEFT), (_rank_line(rank) + _STATE) * _WORD)
    names = ("magic", "layout version", "size", "capacity_bytes")
    differences = ", ".join(
        f"{name} {b} on rank 0 and {a} on rank {rank}"
        for name, a, b in zip(names, header, theirs, strict=True)
        if a != b
    )
    raise CommunicatorError(f"join: the ranks disagree: {differences}")


def _unlink(path: str) -> None:
    """Remove the segment's name, whoever comes first."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
