"""How the ranks of one tensor-parallel group combine their activations.

One `Communicator` is one epoch of one group, seen from one rank. It is used by one thread (the
worker's device thread); only `abort` may be called from any other.

| transport | class                       | for                                        |
|-----------|-----------------------------|--------------------------------------------|
| single    | `single.SingleCommunicator` | tp_size 1: there is nobody to talk to      |
| shm       | `shm.ShmCommunicator`       | CPU ranks of one host                      |
| gloo      | `gloo.GlooCommunicator`     | CPU ranks of several hosts (TCP)           |
| nccl      | `nccl.NcclCommunicator`     | GPUs, one a rank, of one host or several   |
| peer      | `peer.PeerCommunicator`     | GPUs of one host: NCCL, and for small sums |
|           |                             | stores into each other's memory            |

Collectives are matched by order alone: every rank must call the same collectives with the same
shapes and dtypes in the same order, as ranks that run the same model on the same step do.

After `CommunicatorTimeout`, and after anything else that breaks a collective off midway, the ranks
no longer agree on which collective comes next. The communicator is then dead: later calls raise
`CommunicatorAborted`, and the group has to be joined anew under a fresh communicator id.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "DEFAULT_OP_TIMEOUT_S",
    "Communicator",
    "CommunicatorAborted",
    "CommunicatorError",
    "CommunicatorTimeout",
    "Link",
    "NormFusing",
    "check_all_gather",
    "check_all_reduce",
    "check_membership",
    "check_wanted",
    "sum_in_rank_order",
]

DEFAULT_OP_TIMEOUT_S = 30.0

# The dtypes that activations have. A sum in another one would need its own decision on rounding.
_SUMMABLE = (torch.float32, torch.bfloat16, torch.float16)


class CommunicatorError(RuntimeError):
    """A collective or a rendezvous failed. Base of the two below; raised itself for lost or
    disagreeing peers and for a communicator that was closed."""


class CommunicatorTimeout(CommunicatorError):
    """Peers did not arrive within the deadline.

    op: "join", "barrier", "all_reduce" or "all_gather". ranks: who was missing, ascending.
    timeout_s: the deadline that passed, in seconds. detail: what else is known, or "".
    """

    def __init__(self, op: str, ranks: Sequence[int], timeout_s: float, detail: str = "") -> None:
        super().__init__(op, ranks, timeout_s, detail)
        self.op = op
        self.ranks = tuple(sorted(ranks))
        self.timeout_s = timeout_s
        self.detail = detail

    def __str__(self) -> str:
        who = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        message = f"{self.op}: {who} not there within {self.timeout_s:g} s"
        return f"{message} ({self.detail})" if self.detail else message


class CommunicatorAborted(CommunicatorError):
    """The group was aborted, here or by a peer, while or before this collective ran."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a rank reaches the rank `rank`. `note`: why not by the way that was wanted, or ""."""

    rank: int
    path: str
    note: str = ""


class NormFusing(Protocol):
    """A communicator that sums, adds to the residual stream and normalises in one operation."""

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """residual += the sum of x over the ranks, IN PLACE -> that, RMS-normalised. x is left alone.

        x, residual: contiguous [num_tokens, hidden], of the type of weight [hidden]. Added in float32
        and rounded once; what is normalised is the rounded stream.

        Raises as `Communicator.all_reduce` does.
        """
        ...


class Communicator(ABC):
    """One rank's end of a group of `size` ranks.

    rank, size: this rank and the number of ranks. transport: as in the table above. links: how it
    reaches each other rank, where that was tried.
    op_timeout_s: the longest that a collective waits for its peers, in seconds (over shm: for each
    chunk of a large tensor).
    """

    transport: str
    links: Sequence[Link] = ()

    def __init__(self, rank: int, size: int, op_timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.op_timeout_s = op_timeout_s

    def all_reduce_path(self, num_bytes: int) -> str:
        """By which way an all-reduce of so many bytes goes: the transport, where that has but one."""
        return self.transport

    @property
    def all_gather_path(self) -> str:
        """By which way all-gathers go."""
        return self.transport

    def norm_fusing(self, x: Tensor) -> NormFusing | None:
        """Who sums x and normalises in one operation; None: that takes two."""
        return None

    def failure(self) -> CommunicatorError | None:
        """What collectives have met that are queued on a device; may be asked by any thread.

        What those give counts only if the device has done it and there is none then.
        """
        return None

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, IN PLACE; returns x itself.

        x: any shape, the same on every rank; contiguous; float32, bfloat16 or float16; no gradient.
        Added in rank order, for the 16-bit dtypes in float32 with a single rounding at the end, so
        that every rank holds the same bits: ranks then sample the same token without being told.

        Raises ValueError for an x that is not so, CommunicatorTimeout, CommunicatorAborted, and
        CommunicatorError for lost or diverged peers. After an error the content of x is undefined.
        """

    @abstractmethod
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the ranks' tensors along the last dimension. NOT in place; x is left alone.

        x: [..., sizes[rank]], any dtype, no gradient; the leading dimensions are the same on every
        rank. sizes: the last dimension of every rank, which may differ and may be 0.
        Returns [..., sum(sizes)], contiguous, on every rank. It is a new tensor, save that a group
        of one rank may return x itself.

        Raises as all_reduce does.
        """

    @abstractmethod
    def barrier(self, timeout_s: float) -> None:
        """Return once every rank has called it. CommunicatorTimeout after timeout_s seconds."""

    @abstractmethod
    def abort(self) -> None:
        """End the group now; may be called from any thread, any number of times.

        A collective that waits in this process raises CommunicatorAborted within 100 ms, and so
        does every later one. Peers that wait for this rank are freed with an error too.
        """

    @abstractmethod
    def close(self) -> None:
        """Free memory, sockets and threads. Idempotent. Later collectives raise CommunicatorError.

        Call it from the thread that runs the collectives, or abort() first and let that thread end.
        """


def check_membership(rank: int, size: int) -> None:
    """ValueError unless 0 <= rank < size and there are peers at all."""
    if size < 2:
        raise ValueError(f"size: {size} ranks have nothing to join; use SingleCommunicator")
    if not 0 <= rank < size:
        raise ValueError(f"rank: {rank} is not in [0, {size})")


def check_wanted(abandoned: threading.Event | None) -> None:
    """CommunicatorAborted when the join that is under way is not wanted any more."""
    if abandoned is not None and abandoned.is_set():
        raise CommunicatorAborted("join: the group was aborted while it formed")


def check_all_reduce(x: Tensor, device_type: str = "cpu") -> None:
    """ValueError unless x is what `Communicator.all_reduce` takes on that kind of device."""
    if x.device.type != device_type:
        raise ValueError(
            f"x: device {x.device}, but this communicator is for {device_type} tensors"
        )
    if x.dtype not in _SUMMABLE:
        raise ValueError(f"x: dtype {x.dtype} is none of {', '.join(map(str, _SUMMABLE))}")
    if not x.is_contiguous():
        raise ValueError(f"x: strides {x.stride()} of shape {tuple(x.shape)} are not contiguous")
    if x.requires_grad:
        raise ValueError("x: requires_grad is set, but communicators do not carry gradients")


def check_all_gather(
    x: Tensor, sizes: Sequence[int], rank: int, size: int, device_type: str = "cpu"
) -> None:
    """ValueError unless x and sizes are what `Communicator.all_gather` takes on that kind of device."""
    if x.device.type != device_type:
        raise ValueError(
            f"x: device {x.device}, but this communicator is for {device_type} tensors"
        )
    if x.requires_grad:
        raise ValueError("x: requires_grad is set, but communicators do not carry gradients")
    if x.dim() == 0:
        raise ValueError("x: a scalar has no last dimension to gather along")
    if len(sizes) != size:
        raise ValueError(f"sizes: {len(sizes)} entries for {size} ranks")
    if min(sizes) < 0:
        raise ValueError(f"sizes: {list(sizes)} has a negative entry")
    if x.shape[-1] != sizes[rank]:
        raise ValueError(f"sizes: entry {sizes[rank]} of rank {rank}, but x ends in {x.shape[-1]}")


def sum_in_rank_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """out = ((parts[0] + parts[1]) + parts[2]) + …, added in float32 and rounded to out.dtype once.

    parts: two or more tensors of out's shape that share no memory with out; float32, or of out's
    dtype if they are two. Left to right on every rank: float addition is not associative, so
    another order on another rank would give that rank other bits.
    """
    first, second, *rest = parts
    if first.dtype == out.dtype:
        # Two 16-bit numbers: torch adds them in float32 and rounds once, which is what we promise.
        # (Where it adds float16 natively the result is the same: float32 has more than 2 * 11 + 1
        # bits, which makes rounding twice harmless.) A third would be added to a rounded sum.
        assert not rest or out.dtype == torch.float32, f"{len(parts)} parts of {out.dtype}"
        torch.add(first, second, out=out)
        for part in rest:
            out.add_(part)
    else:
        total = torch.add(first, second)
        for part in rest:
            total.add_(part)
        out.copy_(total)
