"""Collectives between CPU ranks of several hosts, over TCP, by the Gloo that torch carries.

Gloo is used for what it is good at, moving tensors between any two ranks, through the point-to-point
calls of a process group object of our own: nothing here touches torch.distributed's default group.
Gloo's own collectives are not used:

- Its ring all-reduce adds in another order for every part of the tensor, and bfloat16 in bfloat16.
  Here every rank sends its tensor to every other one and adds all of them itself in rank order, so
  that all hold the same bits. For decode steps, where payloads are small and latency is what counts,
  one direct hop also takes half the time of a ring.
- A wait for a collective can't be aborted (`abort()` and `shutdown()` of the process group do
  nothing in Gloo) and does not know for whom it waits. A wait for one peer knows, and see `abort`.
- Uneven gathers need no padding.
"""

from __future__ import annotations

import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Self, TypeVar

import torch
from torch import Tensor

# torch's type stubs do not know all that torch exports; hence this "ignore" and those below.
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
)

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

__all__ = ["GlooCommunicator"]

_T = TypeVar("_T")

# Messages match by sender and tag. This tag is never sent.
_SEVER_TAG = 0
_JOIN_POLL_S = 0.01
_LAST_WORDS_S = 10 * _JOIN_POLL_S
# TCP sends a lost connection request again after 1, 3, 7, 15 … s. Asked anew each second, a network
# that heals is found within one.
_KNOCK_TIMEOUT_S = 1.0
# Between ranks that have all checked in, of which none has to start first.
_CONNECT_TIMEOUT_S = 5.0
_SHORTEST_WAIT = timedelta(milliseconds=1)  # Gloo takes zero for "the default"


class GlooCommunicator(Communicator):
    """Ranks anywhere that can reach each other's `interface_host` over TCP.

    Ranks are made by `join`. A lost connection, which is what a dead or an aborted peer looks like,
    raises CommunicatorError at once; a peer that is alive but silent, CommunicatorTimeout.
    """

    transport = "gloo"

    def __init__(
        self,
        rank: int,
        size: int,
        group: ProcessGroupGloo,
        store: TCPStore | None,
        op_timeout_s: float,
    ) -> None:
        """For `join`, which connects the group."""
        super().__init__(rank, size, op_timeout_s)
        self._peers = tuple(r for r in range(size) if r != rank)
        self._group: ProcessGroupGloo | None = group
        self._store = store
        self._lifecycle = threading.Lock()  # abort (any thread) against close
        self._aborted = False

    @staticmethod
    def create_store(host: str) -> tuple[bytes, TCPStore]:
        """Start the store at which the ranks of one epoch meet, in rank 0's process.

        host: a name or address of this machine under which the other ranks reach it; the store
        listens there and nowhere else. Returns the communicator id, b"host:port", for all ranks,
        and the store, to be passed to rank 0's `join`; it dies with its last reference.

        Raises ValueError when host is not an address of this machine.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, 0, type=socket.SOCK_STREAM
            )[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise ValueError(f"host: {host!r} cannot be resolved: {error}") from error
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise ValueError(f"host: {host!r} is not an address of this machine: {error}") from None
        port = listener.getsockname()[1]
        # Given only a port, TCPStore would listen on all interfaces. It owns the socket from here.
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return f"{host}:{port}".encode(), store

    @classmethod
    def join(
        cls,
        communicator_id: bytes,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        interface_host: str,
        store: TCPStore | None = None,
        op_timeout_s: float = DEFAULT_OP_TIMEOUT_S,
        abandoned: threading.Event | None = None,
    ) -> Self:
        """Meet the other ranks and connect to each; blocks until all `size` of them have.

        communicator_id: from rank 0's `create_store`, the same on all ranks. store: its other
        result, on rank 0 only. interface_host: a name or address of this machine, of the network
        interface that the activations are to use. timeout_s: deadline of the rendezvous.
        abandoned: ends the wait for other ranks at once with CommunicatorAborted when set.
        op_timeout_s: see `Communicator`.

        Raises ValueError for a bad argument, CommunicatorTimeout naming the ranks that are missing
        (rank 0 when its store can't be reached), CommunicatorError when the ranks disagree on size
        or a connection between two of them fails.
        """
        check_membership(rank, size)
        host, port = _parse_id(communicator_id)
        if (store is not None) != (rank == 0):
            raise ValueError("store: rank 0 passes the one it created, the other ranks None")
        deadline = time.monotonic() + timeout_s
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._threads = 1  # they run collectives, of which we use none
        try:
            options._devices = [ProcessGroupGloo.create_device(hostname=interface_host)]
        except RuntimeError as error:
            raise ValueError(f"interface_host: {interface_host!r}: {error}") from error
        if store is None:
            store = _connect_store(host, port, deadline, timeout_s, abandoned)

        def rendezvous() -> ProcessGroupGloo:
            _check_in(store, rank, size, deadline, timeout_s, abandoned)
            # Connects to every peer, and gives up by this timeout.
            options._timeout = min(_remaining(deadline), timedelta(seconds=_CONNECT_TIMEOUT_S))
            return ProcessGroupGloo(PrefixStore("mesh", store), rank, size, options)

        try:
            group = _within(deadline, rendezvous, abandoned)
        except TimeoutError:
            # A store that no longer answers: its process hangs or the network is gone.
            raise CommunicatorTimeout("join", [0], timeout_s, "its store is silent") from None
        except CommunicatorError:
            raise
        except RuntimeError as error:
            message = f"join: rank {rank} could not connect to all ranks: {_said(error)}"
            raise CommunicatorError(message) from error
        communicator = cls(rank, size, group, store if rank == 0 else None, op_timeout_s)
        try:
            # Nobody leaves, and rank 0's store stays, before everyone is connected.
            communicator._exchange(torch.zeros(1), [(1,)] * size, "join", _seconds_to(deadline))
        except CommunicatorTimeout as error:
            communicator.close()
            raise CommunicatorTimeout("join", error.ranks, timeout_s) from None
        except BaseException:
            communicator.close()
            raise
        return communicator

    def all_reduce(self, x: Tensor) -> Tensor:
        """IN PLACE; see `Communicator.all_reduce`. Sends x once to every peer."""
        check_all_reduce(x)
        parts = self._exchange(x, [x.shape] * self.size, "all_reduce", self.op_timeout_s)
        # A sum in place must not overwrite one of its own terms.
        parts[self.rank] = x.clone()
        if self.size > 2:
            parts = [part.float() for part in parts]
        sum_in_rank_order(parts, out=x)
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """NOT in place; see `Communicator.all_gather`. Sends x once to every peer."""
        check_all_gather(x, sizes, self.rank, self.size)
        shapes = [(*x.shape[:-1], s) for s in sizes]
        return torch.cat(
            self._exchange(x.contiguous(), shapes, "all_gather", self.op_timeout_s), dim=-1
        )

    def barrier(self, timeout_s: float) -> None:
        """One byte from everyone to everyone; see `Communicator.barrier`."""
        token = torch.zeros(1, dtype=torch.uint8)
        self._exchange(token, [(1,)] * self.size, "barrier", timeout_s)

    def abort(self) -> None:
        """Close the connections; see `Communicator.abort`. Takes 10 to 30 ms.

        Gloo has no call for that, but one wait that times out does it: the transport then fails
        everything pending on every connection and closes them, so that a wait in another thread
        ends at once and the peers see the connection go. So: wait for a message that nobody sends.
        """
        with self._lifecycle:
            if self._aborted or self._group is None:
                return
            self._aborted = True
            try:
                nothing = torch.empty(1, dtype=torch.uint8)
                pending = self._group.recv(  # type: ignore[attr-defined]
                    [nothing], self._peers[0], _SEVER_TAG
                )
                pending.wait(_SHORTEST_WAIT)
            except RuntimeError:
                pass  # the time-out, or connections that had failed before

    def close(self) -> None:
        """Close connections, threads and, on rank 0, the store; see `Communicator.close`."""
        with self._lifecycle:
            self._group = None
            self._store = None

    def _exchange(
        self, x: Tensor, shapes: Sequence[Sequence[int]], op: str, timeout_s: float
    ) -> list[Tensor]:
        """Send x to every peer; returns every rank's tensor, x itself being this rank's.

        The tag is made of what all ranks must agree on: of ranks that have diverged each waits for
        a message that does not come, and times out, instead of adding up what was never meant to
        be added.
        """
        group = self._group
        if group is None:
            raise CommunicatorError(f"{op}: the communicator is closed")
        if self._aborted:
            raise CommunicatorAborted(f"{op}: the group was aborted")
        deadline = time.monotonic() + timeout_s
        tag = _tag(op, x.dtype, shapes)
        parts = [x if r == self.rank else x.new_empty(shape) for r, shape in enumerate(shapes)]
        receiving: dict[int, Callable[[timedelta], bool]] = {}
        sending: dict[int, Callable[[timedelta], bool]] = {}
        peer = self.rank
        try:
            # An empty tensor is not a message; sender and receiver both know.
            for peer in self._peers:
                if parts[peer].numel():
                    work = group.recv([parts[peer]], peer, tag)  # type: ignore[attr-defined]
                    receiving[peer] = work.wait
            for peer in self._peers:
                if x.numel():
                    work = group.send([x], peer, tag)  # type: ignore[attr-defined]
                    sending[peer] = work.wait
            for pending in (receiving, sending):
                for peer in list(pending):
                    pending[peer](_remaining(deadline))
                    del pending[peer]
        except RuntimeError as error:
            if self._aborted:
                raise CommunicatorAborted(f"{op}: the group was aborted") from None
            timed_out = time.monotonic() >= deadline
            missing = {peer} | _unfinished(receiving) | _unfinished(sending)
            self.abort()
            if timed_out:
                raise CommunicatorTimeout(op, sorted(missing), timeout_s) from None
            raise CommunicatorError(f"{op}: lost rank {peer}: {_said(error)}") from error
        return parts


def _said(error: RuntimeError) -> str:
    """Gloo's words without the place in its source before them and its advice after them."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error)).partition(". This is typically")[0]


def _unfinished(pending: dict[int, Callable[[timedelta], bool]]) -> set[int]:
    """The ranks whose message was not through when the connections were closed."""
    ranks = set()
    for peer, wait in pending.items():
        try:
            wait(_SHORTEST_WAIT)
        except RuntimeError:
            ranks.add(peer)
    return ranks


def _check_in(
    store: TCPStore,
    rank: int,
    size: int,
    deadline: float,
    timeout_s: float,
    abandoned: threading.Event | None,
) -> None:
    """Sign the store's list; return when all ranks have, raise as soon as one has given up."""
    if store.add(f"joined/{rank}", 1) > 1:
        raise CommunicatorError(f"join: rank {rank} is there already")
    store.set(f"size/{rank}", str(size))
    missing = [r for r in range(size) if r != rank]
    try:
        while missing:
            check_wanted(abandoned)
            for peer in [r for r in missing if store.check([f"size/{r}"])]:
                missing.remove(peer)
                theirs = int(store.get(f"size/{peer}"))
                if theirs != size:
                    raise CommunicatorError(
                        f"join: the ranks disagree: size {theirs} on rank {peer} and {size} on "
                        f"rank {rank}"
                    )
            if missing and store.check(["left"]):
                left = int(store.get("left"))
                detail = f"rank {left} gave up first"
                raise CommunicatorTimeout("join", missing, timeout_s, detail)
            if missing and time.monotonic() >= deadline:
                raise CommunicatorTimeout("join", missing, timeout_s)
            if missing:
                time.sleep(_JOIN_POLL_S)
    except CommunicatorError:
        store.set("left", str(rank))
        if rank == 0:
            # The store goes with this rank. Let the others read why: the loss of a store makes
            # torch write C++ stack traces.
            time.sleep(_LAST_WORDS_S)
        raise


def _connect_store(
    host: str, port: int, deadline: float, timeout_s: float, abandoned: threading.Event | None
) -> TCPStore:
    """A client of rank 0's store; CommunicatorTimeout when it is not there by the deadline."""
    # Knock first: TCPStore's own retries overrun their timeout by up to half and write a C++
    # stack trace to stderr each.
    while True:
        check_wanted(abandoned)
        left_s = _seconds_to(deadline)
        try:
            knock_s = min(max(left_s, 0.001), _KNOCK_TIMEOUT_S)
            socket.create_connection((host, port), timeout=knock_s).close()
            break
        except OSError as error:
            if _seconds_to(deadline) <= _JOIN_POLL_S:
                detail = f"no store at {host}:{port}: {error}"
                raise CommunicatorTimeout("join", [0], timeout_s, detail) from error
            time.sleep(_JOIN_POLL_S)

    def connect() -> TCPStore:
        return TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=_remaining(deadline)
        )

    try:
        return _within(deadline, connect, abandoned)
    except (RuntimeError, TimeoutError) as error:
        detail = f"what listens at {host}:{port} is not its store"
        raise CommunicatorTimeout("join", [0], timeout_s, detail) from error


def _within(deadline: float, function: Callable[[], _T], abandoned: threading.Event | None) -> _T:
    """function(), or TimeoutError half a second past the deadline, or CommunicatorAborted.

    For calls into torch that have a timeout and yet wait for some answers without one. Such a call
    can't be stopped; it is left behind in a daemon thread.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="gloo-join", daemon=True)
    thread.start()
    while thread.is_alive() and _seconds_to(deadline) > -0.5:
        thread.join(_JOIN_POLL_S)
        if thread.is_alive():
            check_wanted(abandoned)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _seconds_to(deadline: float) -> float:
    return deadline - time.monotonic()


def _remaining(deadline: float) -> timedelta:
    return max(timedelta(seconds=_seconds_to(deadline)), _SHORTEST_WAIT)


def _tag(op: str, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> int:
    """A positive 31-bit number; not hash(), which differs between processes for a str."""
    text = repr((op, str(dtype), [tuple(shape) for shape in shapes]))
    return (zlib.crc32(text.encode()) & 0x7FFFFFFF) or 1


def _parse_id(communicator_id: bytes) -> tuple[str, int]:
    """b"host:port" -> (host, port). The host may be an IPv6 address: the port is after the last
    colon."""
    host, colon, port = communicator_id.decode("utf-8", "replace").rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"communicator_id: {communicator_id[:64]!r} is not host:port")
    return host, int(port)
