"""What a worker refuses before it computes anything."""

import asyncio

import pytest
import torch

from colrow.errors import InvalidArgument
from shard_worker.communicator import CommunicatorError
from shard_worker.config import expandable_segments, parse
from shard_worker.executor import Executor
from shard_worker.joining import Group


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


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    "value", ["expandable_segments:True", " max_split_size_mb : 64 , expandable_segments : True "]
)
def test_expandable_segments_are_found_in_either_variable(variable: str, value: str) -> None:
    assert expandable_segments({variable: value}) == (variable, value)


@pytest.mark.parametrize("value", ["", "expandable_segments:False", "max_split_size_mb:64"])
def test_other_settings_of_the_allocator_are_no_expandable_segments(value: str) -> None:
    assert expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": value}) is None


def test_a_worker_on_a_gpu_refuses_expandable_segments_and_one_on_a_cpu_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(InvalidArgument, match="can't be shared") as caught:
        asyncio.run(Executor(parse(["--device", "cuda:0"])).open())
    assert caught.value.field == "PYTORCH_CUDA_ALLOC_CONF"
    asyncio.run(Executor(parse(["--device", "cpu"])).open())


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidArgument, match=r"'cuda:99': .*torch") as caught:
        asyncio.run(Executor(parse(["--device", "cuda:99"])).open())
    assert caught.value.field == "device"


def test_cuda_alone_is_the_first_gpu() -> None:
    assert Executor(parse(["--device", "cuda"])).describe().device == "cuda:0"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_has_no_nccl_and_says_what_to_install() -> None:
    with pytest.raises(CommunicatorError, match=r"nccl: .* is a build without CUDA; install"):
        Executor(parse([])).create_communicator_id("nccl")
