"""What a worker keeps and gives up when it joins groups."""

import threading

import pytest

from shard_worker.communicator import CommunicatorAborted
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.peer import PeerCommunicator
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.config import parse
from shard_worker.joining import Group, Joiner
from tests.unit import thread_gpus
from tests.unit.thread_gpus import CPU, Gpus

HOST = "127.0.0.1"


def test_a_group_that_nobody_waits_for_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[SingleCommunicator] = []
    monkeypatch.setattr(SingleCommunicator, "close", lambda comm: closed.append(comm))
    abandoned = threading.Event()
    abandoned.set()
    with pytest.raises(CommunicatorAborted):
        Joiner(parse([]), CPU).join(Group(1, 0, 1, "single"), b"", 1.0, abandoned)
    assert len(closed) == 1


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return thread_gpus.install(monkeypatch)


def offers(gpus: Gpus, joiner: Joiner, size: int) -> bytes:
    """What rank 0 of a group of that size offers."""
    communicator_id, store = NcclCommunicator.create_id(HOST)

    def one(rank: int) -> bytes:
        comm = PeerCommunicator.join(
            communicator_id,
            rank,
            size,
            device=CPU,
            timeout_s=10.0,
            interface_host=HOST,
            store=store if rank == 0 else None,
        )
        offer = joiner.offer(comm) if rank == 0 else b""
        comm.barrier(10.0)
        comm.close()
        return offer

    return gpus.outcomes(size, one)[0].result()


def test_peer_memory_outlives_a_group_and_goes_with_another_size(gpus: Gpus) -> None:
    joiner = Joiner(parse([]), CPU)
    first = offers(gpus, joiner, 2)
    assert first and offers(gpus, joiner, 2) == first
    assert len(gpus.allocated) == 1
    assert offers(gpus, joiner, 3) not in (b"", first)
    assert len(gpus.allocated) == 1
    joiner.free()
    assert gpus.allocated == {}


def test_memory_that_was_refused_is_offered_as_none_and_asked_for_again_by_the_next_join(
    gpus: Gpus,
) -> None:
    joiner = Joiner(parse([]), CPU)
    gpus.fails["malloc"] = {0}
    assert offers(gpus, joiner, 2) == b""
    gpus.fails["malloc"].clear()
    assert offers(gpus, joiner, 2) != b""
    joiner.free()
    assert gpus.allocated == {}


def test_what_is_no_group_of_peers_offers_nothing(gpus: Gpus) -> None:
    assert Joiner(parse([]), CPU).offer(SingleCommunicator()) == b""
    assert gpus.allocated == {}
