"""A status says in which phase and after which step a worker went, and keeps that until it is back."""

from dataclasses import replace

import pytest

from colrow.errors import (
    Aborted,
    AnswerTooLarge,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ServiceError,
    Unavailable,
)
from coordinator.convert import descriptions
from coordinator.worker_status import UNREACHABLE, Phase, WorkerDescription, WorkerStatus
from shard_worker import convert
from shard_worker.config import parse
from shard_worker.executor import Executor

DESCRIPTION = WorkerDescription(
    version="1",
    host_id="h",
    pid=7,
    device="cpu",
    memory_total_bytes=0,
    memory_available_bytes=0,
    state="ready",
    epoch=3,
    rank=0,
    size=2,
    transport="shm",
    weight_bytes=0,
    kv_cache_bytes=0,
    resident_bytes=0,
    file_bytes_read=0,
    communication=(),
    supported_architectures=(),
)


@pytest.fixture
def serving() -> WorkerStatus:
    status = WorkerStatus("host:1", 1, last_step_id=17)
    status.heard(DESCRIPTION)
    status.enter(Phase.SERVING)
    return status


def test_the_first_error_of_a_loss_is_kept_until_the_worker_is_heard_of(
    serving: WorkerStatus,
) -> None:
    assert serving.where == "worker 1 (host:1), serving after step 17"
    serving.failed(Unavailable("does not answer", reason=UNREACHABLE))
    serving.failed(Unavailable("still does not", reason=UNREACHABLE))
    assert (serving.phase, serving.num_losses) == (Phase.LOST, 1)
    assert serving.error == "serving after step 17: does not answer"
    serving.heard(DESCRIPTION)
    assert (serving.phase, serving.num_restarts) == (Phase.WAITING, 0)
    assert serving.error, "what went wrong last is still known"


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("a peer is gone", reason="COMMUNICATOR_FAILED"),
        DeadlineExceeded("a peer is late", reason="PEER_TIMEOUT"),
        Aborted("the group was aborted", reason="GROUP_ABORTED"),
    ],
)
def test_a_worker_that_says_what_is_wrong_is_not_lost(
    error: ServiceError, serving: WorkerStatus
) -> None:
    serving.failed(error)
    assert (serving.phase, serving.num_losses) == (Phase.SERVING, 0)
    assert serving.error == f"serving after step 17: {error.message}"


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("activation", 1, "has no features"),
        NotFound("there is no such module", reason="UNKNOWN_MODULE"),
        AnswerTooLarge(100),
    ],
)
def test_what_a_user_asked_for_is_no_failure_of_the_worker(
    error: ServiceError, serving: WorkerStatus
) -> None:
    serving.failed(error)
    assert (serving.phase, serving.error) == (Phase.SERVING, "")


def test_one_that_was_never_there_is_waited_for_and_not_lost() -> None:
    status = WorkerStatus("host:1", 0)
    status.failed(Unavailable("does not answer", reason=UNREACHABLE))
    assert (status.phase, status.num_losses, status.heard_at) == (Phase.CONNECTING, 0, None)
    status.heard(DESCRIPTION)
    assert (status.phase, status.num_restarts) == (Phase.WAITING, 0)


@pytest.mark.parametrize("change", [{"pid": 8}, {"epoch": 0}], ids=("process", "container"))
def test_another_process_in_its_place_is_a_restart(
    change: dict[str, int], serving: WorkerStatus
) -> None:
    serving.heard(replace(DESCRIPTION, **change))  # type: ignore[arg-type]
    assert (serving.phase, serving.num_restarts) == (Phase.WAITING, 1)


def test_what_a_worker_says_of_itself_reaches_operators_whole() -> None:
    said = replace(Executor(parse([])).describe(), device_name="NVIDIA H200", device_uuid="1-2-3")
    told = convert.description(said)
    assert descriptions.description_message(descriptions.worker_description(told)) == told
    assert (told.device_name, told.device_uuid) == ("NVIDIA H200", "1-2-3")
