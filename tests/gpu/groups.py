"""Communicator groups of ranks that are processes, one GPU each."""

from typing import Any

import torch

from benchmarks.ranks import HOST, JOIN_TIMEOUT_S, Exchange
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.peer import PeerCommunicator
from shard_worker.communicator.peer_sums import PeerMemory


def join(rank: int, size: int, exchange: Exchange, **options: Any) -> PeerCommunicator:
    """This rank of a group, connected to its peers."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = None
    communicator_id = b""
    if rank == 0:
        communicator_id, store = NcclCommunicator.create_id(HOST)
    comm = PeerCommunicator.join(
        exchange(communicator_id)[0],
        rank,
        size,
        device=device,
        timeout_s=JOIN_TIMEOUT_S,
        interface_host=HOST,
        store=store,
        **options,
    )
    comm.connect(exchange(comm.offer(PeerMemory.allocate(size, device))), JOIN_TIMEOUT_S)
    return comm
