"""How the workers of a group come to exchange activations."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from colrow import MAX_PEERS
from colrow.errors import FailedPrecondition, Internal, ServiceError, Unavailable
from coordinator.scheduler import Step
from coordinator.shard_group import Joined, ShardGroup
from coordinator.worker_status import UNREACHABLE, Link, Phase, WorkerDescription


def description(
    rank: int, device: str, host_id: str = "host", device_uuid: str = ""
) -> WorkerDescription:
    return WorkerDescription(
        version="1",
        host_id=host_id,
        pid=rank,
        device=device,
        memory_total_bytes=0,
        memory_available_bytes=0,
        state="idle",
        epoch=0,
        rank=0,
        size=0,
        transport=None,
        weight_bytes=0,
        kv_cache_bytes=0,
        resident_bytes=0,
        file_bytes_read=0,
        communication=(),
        supported_architectures=(),
        device_name="NVIDIA H200",
        device_uuid=device_uuid,
    )


@dataclass
class JoiningWorker:
    """Joins whatever it is asked to, and reaches its peers as `links` say; or raises what `errors` say.

    It leaves a group only when that one's epoch is aborted.
    """

    address: str
    links: tuple[Link, ...] = ()
    errors: dict[str, ServiceError] = field(default_factory=dict)
    epoch: int | None = None
    joined: list[str] = field(default_factory=list)
    peer_memories: list[bytes] = field(default_factory=list)

    async def join(
        self, *, epoch: int, rank: int, transport: str, communicator_id: bytes, **_: Any
    ) -> Joined:
        if not communicator_id:
            self.raise_for("id")
            return Joined(b"id")
        self.raise_for("join")
        self.epoch = epoch
        self.joined.append(transport)
        return Joined(communicator_id, b"memory %d" % rank)

    async def connect_peers(self, *, peer_memories: list[bytes], **_: Any) -> tuple[Link, ...]:
        self.peer_memories = list(peer_memories)
        self.raise_for("connect_peers")
        return self.links

    async def abort(self, *, epoch: int, **_: Any) -> None:
        self.raise_for("abort")
        if self.epoch is not None and epoch != self.epoch:
            raise FailedPrecondition(
                f"epoch = {epoch}: the group's is {self.epoch}", reason="STALE_EPOCH"
            )
        self.epoch = None

    def raise_for(self, call: str) -> None:
        if call in self.errors:
            raise self.errors[call]


def group(
    devices: list[str], hosts: list[str] | None = None, uuids: list[str] | None = None
) -> ShardGroup:
    workers: Any = [JoiningWorker(f"host:{rank}") for rank in range(len(devices))]
    made = ShardGroup(workers, step_timeout_s=1.0)
    for rank, device in enumerate(devices):
        host_id = hosts[rank] if hosts else "host"
        uuid = uuids[rank] if uuids else ""
        made.statuses[rank].description = description(rank, device, host_id, uuid)
    return made


GPUS = ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("devices", "hosts", "wanted", "expected"),
    [
        (["cuda:0"], None, None, "single"),
        (["cpu", "cpu"], None, None, "shm"),
        (["cpu", "cpu"], ["a", "b"], None, "gloo"),
        (["cpu", "cpu"], None, "gloo", "gloo"),
        (GPUS, None, None, "peer"),
        (GPUS, None, "nccl", "nccl"),
        (GPUS, ["a", "b"], None, "nccl"),
        ([f"cuda:{rank}" for rank in range(MAX_PEERS)], None, None, "peer"),
        ([f"cuda:{rank}" for rank in range(MAX_PEERS + 1)], None, None, "nccl"),
    ],
)
def test_the_transport_follows_from_where_the_workers_are(
    devices: list[str], hosts: list[str] | None, wanted: str | None, expected: str
) -> None:
    assert group(devices, hosts).choose_transport(wanted) == expected


@pytest.mark.parametrize(
    ("devices", "hosts", "wanted", "words"),
    [
        (["cpu", "cpu"], None, "peer", "'peer': the workers are on CPUs; it can be shm or gloo"),
        (["cpu", "cpu"], None, "nccl", "'nccl': the workers are on CPUs; it can be shm or gloo"),
        (GPUS, None, "shm", "'shm': the workers are on GPUs; it can be peer or nccl"),
        (["cpu", "cpu"], ["a", "b"], "shm", "'shm': the workers are on 2 hosts"),
        (GPUS, ["a", "b"], "peer", "'peer': the workers are on 2 hosts"),
        (["cuda:0"] * 9, None, "peer", "'peer': 9 ranks are over 8"),
        (
            ["cuda:0", "cpu"],
            None,
            None,
            r"can't be one group \(worker 0 \(host:0\): cuda:0, worker 1 \(host:1\): cpu\)",
        ),
    ],
)
def test_a_transport_that_can_not_be(
    devices: list[str], hosts: list[str] | None, wanted: str | None, words: str
) -> None:
    with pytest.raises(FailedPrecondition, match=words):
        group(devices, hosts).choose_transport(wanted)


@pytest.mark.parametrize(
    ("devices", "uuids", "shared", "free"),
    [
        (["cuda:0", "cuda:0"], "aa", (0, 1), "cuda:1"),
        (["cuda:0", "cuda:1", "cuda:1", "cuda:3"], "abbc", (1, 2), "cuda:2"),
        # Containers may call one GPU by several names, and several by one.
        (["cuda:0", "cuda:1"], "aa", (0, 1), "cuda:2"),
    ],
)
@pytest.mark.parametrize("wanted", [None, "nccl"])
def test_two_ranks_on_one_gpu_are_refused_with_another_to_take(
    devices: list[str],
    uuids: str,
    shared: tuple[int, int],
    free: str,
    wanted: str | None,
) -> None:
    made = group(devices, uuids=list(uuids))
    with pytest.raises(FailedPrecondition) as raised:
        made.choose_transport(wanted)
    first, second = (f"worker {rank} (host:{rank})" for rank in shared)
    assert raised.value.message.startswith(f"{first} and {second} are on the same GPU, ")
    assert raised.value.message.endswith(f"start one of them with --device {free}")
    assert f"(NVIDIA H200, {uuids[shared[0]]})" in raised.value.message


def test_gpus_of_one_name_in_several_containers_and_cpus_are_no_shared_gpu() -> None:
    assert group(["cuda:0", "cuda:0"], ["a", "b"], ["x", "y"]).choose_transport(None) == "nccl"
    assert group(["cpu", "cpu"], uuids=["", ""]).choose_transport(None) == "shm"


async def test_every_rank_is_told_how_to_open_the_others_memory() -> None:
    made = group(GPUS)
    await made.join("peer")
    assert made.transport == "peer"
    workers: Any = made.workers
    for worker in workers:
        assert worker.joined == ["peer"]
        assert worker.peer_memories == [b"memory 0", b"memory 1"]


async def test_where_one_rank_can_not_reach_another_it_is_nccl_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = group(GPUS)
    workers: Any = made.workers
    workers[0].links = (Link(1, "nccl", "its CUDA IPC handle can't be opened"),)
    workers[1].links = (Link(0, "nccl", "rank 0 can't reach its peers"),)
    await made.join("peer")
    assert made.transport == "nccl"
    assert "rank 0 reaches rank 1 by nccl: its CUDA IPC handle can't be opened" in caplog.text


async def test_other_transports_connect_no_peers() -> None:
    made = group(["cpu", "cpu"])
    await made.join("shm")
    workers: Any = made.workers
    assert [worker.peer_memories for worker in workers] == [[], []]


# Steps


@dataclass
class SteppingWorker:
    """Notes what it makes of steps, and what it is sent."""

    address: str
    encoded: list[tuple[int, Step]] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)

    def encode(self, epoch: int, step: Step) -> bytes:
        self.encoded.append((epoch, step))
        return b"step %d of %d" % (step.step_id, epoch)

    async def send(self, message: bytes) -> None:
        self.sent.append(message)


async def test_a_step_s_message_is_made_once_and_every_worker_gets_the_same() -> None:
    workers = [SteppingWorker(f"host:{rank}") for rank in range(8)]
    sending: Any = workers
    made = ShardGroup(sending, step_timeout_s=1.0)
    made.epoch = 7
    steps = [Step(step_id, (), (), ()) for step_id in (1, 2)]
    for step in steps:
        await made.send(step)
    assert [item for worker in workers for item in worker.encoded] == [(7, step) for step in steps]
    for worker in workers:
        assert worker.sent == [b"step 1 of 7", b"step 2 of 7"]


# A join that fails


@pytest.mark.parametrize("call", ["join", "connect_peers"])
async def test_a_join_that_fails_leaves_nobody_in_the_group_and_says_who_refused_and_why(
    call: str,
) -> None:
    made = group(GPUS)
    await made.join("peer")
    await made.abort()
    workers: Any = made.workers
    workers[1].errors[call] = Internal("CUDA error 2")
    with pytest.raises(Internal) as raised:
        await made.join("peer")
    assert raised.value.message == "worker 1 (host:1), joining: CUDA error 2"
    await made.abort()
    assert [worker.epoch for worker in workers] == [None, None]
    assert [status.error for status in made.statuses] == ["", "joining: CUDA error 2"]
    assert [status.phase for status in made.statuses] == [Phase.WAITING] * 2
    workers[1].errors.clear()
    await made.join("peer")
    assert [worker.epoch for worker in workers] == [3, 3]


async def test_a_rank_that_can_make_no_communicator_id_is_named_with_its_phase() -> None:
    made = group(GPUS)
    workers: Any = made.workers
    workers[0].errors["id"] = Unavailable("nccl: install cupy", reason="COMMUNICATOR_FAILED")
    with pytest.raises(Unavailable) as raised:
        await made.join("nccl")
    assert raised.value.message == "worker 0 (host:0), joining: nccl: install cupy"
    assert raised.value.metadata == {"rank": "0", "worker": "host:0"}
    assert made.statuses[0].error == "joining: nccl: install cupy"


async def test_a_worker_in_another_group_has_left_this_one_and_one_that_is_silent_is_lost() -> None:
    made = group(GPUS)
    await made.join("peer")
    workers: Any = made.workers
    workers[0].epoch = 17  # another coordinator's
    workers[1].errors["abort"] = Unavailable("does not leave the group", reason=UNREACHABLE)
    await made.abort()
    taken, silent = made.statuses
    assert (taken.phase, taken.error) == (Phase.WAITING, "")
    assert (silent.phase, silent.error) == (Phase.LOST, "waiting: does not leave the group")


async def test_a_group_that_was_never_tried_asks_nobody_to_leave() -> None:
    made = group(GPUS)
    workers: Any = made.workers
    workers[0].errors["abort"] = AssertionError("was asked")
    await made.abort()
