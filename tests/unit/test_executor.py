"""What a worker refuses before it computes anything."""

import asyncio

import pytest

from colrow.errors import InvalidArgument
from shard_worker.config import parse
from shard_worker.executor import Executor, Group


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_every_address_of_a_machine_is_none_to_give_to_other_hosts(host: str) -> None:
    executor = Executor(parse(["--host", host]))
    for refused in (
        lambda: executor.create_communicator_id("gloo"),
        lambda: asyncio.run(executor.join(Group(1, 1, 2, "gloo"), b"127.0.0.1:1", 1.0)),
    ):
        with pytest.raises(InvalidArgument, match="--advertise-host") as caught:
            refused()
        assert caught.value.field == "advertise_host"
    assert executor.create_communicator_id("shm"), "which shares memory and needs no address"


def test_workers_advertise_where_they_listen_unless_told_otherwise() -> None:
    assert parse(["--host", "[fd00::7]"]).advertise_host == "fd00::7"
    assert parse(["--host", "0.0.0.0", "--advertise-host", "gpu1"]).advertise_host == "gpu1"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_wait_for_peers_is_a_time(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--peer-timeout", value])
    assert "--peer-timeout" in capsys.readouterr().err
