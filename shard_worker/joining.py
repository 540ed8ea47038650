"""How a worker comes into a group: a communicator of the transport that the coordinator has chosen."""

import ipaddress
import threading
from dataclasses import dataclass
from typing import Any

import torch

from colrow import MAX_PEERS
from colrow.errors import InvalidArgument
from shard_worker.communicator import Communicator, CommunicatorAborted, check_wanted
from shard_worker.communicator.gloo import GlooCommunicator
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.peer import PeerCommunicator
from shard_worker.communicator.peer_sums import PeerMemory
from shard_worker.communicator.shm import ShmCommunicator
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.config import WorkerConfig

_TRANSPORTS = "is none of single, shm, gloo, nccl, peer"


@dataclass(frozen=True, slots=True)
class Group:
    """The communicator group that the worker is in."""

    epoch: int
    rank: int
    size: int
    transport: str


class Joiner:
    """Makes the communicators of one worker, one after the other, on its device thread.

    What outlives a group is here: memory that peers may still have open.
    """

    def __init__(self, config: WorkerConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._store: Any = None
        self._peer_memory: PeerMemory | None = None

    def create_id(self, transport: str) -> bytes:
        """An id for `join`, made by rank 0 and carried to all ranks by the coordinator."""
        match transport:
            case "single":
                return b""
            case "shm":
                return ShmCommunicator.create_id()
            case "gloo":
                communicator_id, self._store = GlooCommunicator.create_store(self._data_address())
                return communicator_id
            case "nccl" | "peer":
                communicator_id, self._store = NcclCommunicator.create_id(self._data_address())
                return communicator_id
        raise InvalidArgument("transport", transport, _TRANSPORTS)

    def _data_address(self) -> str:
        """Where Gloo listens, and nowhere else, and what other hosts call. InvalidArgument for none."""
        address = self._config.advertise_host
        try:
            is_wildcard = ipaddress.ip_address(address).is_unspecified
        except ValueError:  # a name
            is_wildcard = False
        if is_wildcard:
            raise InvalidArgument(
                "advertise_host",
                address,
                "is no address at which workers on other hosts reach this one; start it with "
                "--advertise-host",
            )
        return address

    def join(
        self, group: Group, communicator_id: bytes, timeout_s: float, abandoned: threading.Event
    ) -> Communicator:
        """Meets the other ranks; blocks until all have come. Raises as the communicators' `join` do;
        InvalidArgument for a transport or a size that this worker can't be in. Once `abandoned` is set
        no communicator is left: nobody would take it."""
        comm = self._meet(group, communicator_id, timeout_s, abandoned)
        try:
            check_wanted(abandoned)
        except CommunicatorAborted:
            comm.close()
            raise
        return comm

    def _meet(
        self, group: Group, communicator_id: bytes, timeout_s: float, abandoned: threading.Event
    ) -> Communicator:
        store, self._store = self._store, None
        match group.transport:
            case "single":
                if group.size != 1:
                    raise InvalidArgument("transport", "single", f"the size is {group.size}")
                return SingleCommunicator()
            case "shm":
                return ShmCommunicator.join(
                    communicator_id,
                    group.rank,
                    group.size,
                    timeout_s=timeout_s,
                    op_timeout_s=self._config.peer_timeout_s,
                    abandoned=abandoned,
                )
            case "gloo":
                return GlooCommunicator.join(
                    communicator_id,
                    group.rank,
                    group.size,
                    timeout_s=timeout_s,
                    store=store,
                    interface_host=self._data_address(),
                    op_timeout_s=self._config.peer_timeout_s,
                    abandoned=abandoned,
                )
            case "nccl" | "peer":
                if self._device.type != "cuda":
                    raise InvalidArgument(
                        "transport", group.transport, f"this worker is on {self._device}"
                    )
                if group.transport == "peer" and group.size > MAX_PEERS:
                    raise InvalidArgument("size", group.size, f"peers are at most {MAX_PEERS}")
                kind = PeerCommunicator if group.transport == "peer" else NcclCommunicator
                return kind.join(
                    communicator_id,
                    group.rank,
                    group.size,
                    device=self._device,
                    timeout_s=timeout_s,
                    store=store,
                    interface_host=self._data_address(),
                    op_timeout_s=self._config.peer_timeout_s,
                    abandoned=abandoned,
                )
        raise InvalidArgument("transport", group.transport, _TRANSPORTS)

    def offer(self, comm: Communicator) -> bytes:
        """What other ranks need to open this one's memory; b"" where `comm` does not go through it, or
        where the device refuses it, which `comm.connect` tells."""
        if not isinstance(comm, PeerCommunicator):
            return b""
        memory = self._peer_memory
        if memory is None or memory.size != comm.size or memory.problem:
            self.free()
            memory = self._peer_memory = PeerMemory.allocate(comm.size, self._device)
        return comm.offer(memory)

    def free(self) -> None:
        """Gives up the memory for peers, who have none of it open any more."""
        if self._peer_memory is not None:
            self._peer_memory.free()
            self._peer_memory = None
