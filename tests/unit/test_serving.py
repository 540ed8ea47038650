"""The clusters that the command starts itself: on which devices, and with which settings."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from client import demo, local_cluster, serving
from client.cli import app
from client.serving import DEFAULT_TP, NothingAnswers, Settings, choose_devices
from colrow.gpus import HostGpus, host_gpus
from coordinator import config as coordinator_config


@pytest.mark.parametrize(
    ("device", "num_gpus", "devices"),
    [
        ("auto", 0, ["cpu", "cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("auto", 3, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cpu", 0, ["cpu", "cpu"]),
        ("cpu", 1, ["cpu", "cpu"]),
        ("cpu", 2, ["cpu", "cpu"]),
    ],
)
def test_two_ranks_get_a_gpu_each_or_cpus(device: str, num_gpus: int, devices: list[str]) -> None:
    assert choose_devices(device, 2, HostGpus(num_gpus)) == devices


@pytest.mark.parametrize(
    ("device", "num_gpus", "advice"),
    [
        ("auto", 1, "this host has 1; --tp 1 takes no more, --device cpu does without"),
        ("cuda", 1, "this host has 1; --tp 1 takes no more, --device cpu does without"),
        ("cuda", 0, "this host has 0; --device cpu does without"),
    ],
)
def test_fewer_gpus_than_ranks_are_refused_with_what_to_do(
    device: str, num_gpus: int, advice: str
) -> None:
    with pytest.raises(ValueError, match=rf"^tp = 2: each rank takes a GPU .*{advice}$"):
        choose_devices(device, 2, HostGpus(num_gpus))


def test_gpus_that_the_environment_hides_do_not_count_and_the_variable_is_named() -> None:
    assert choose_devices("auto", 2, HostGpus(8, "")) == ["cpu", "cpu"]
    assert choose_devices("auto", 2, HostGpus(8, "6,7")) == ["cuda:0", "cuda:1"]
    for visible, shown in (("3", 1), ("", 0), ("-1", 0)):
        says = f"CUDA_VISIBLE_DEVICES = '{visible}' shows {shown} of 8; .*--device cpu"
        with pytest.raises(ValueError, match=says):
            choose_devices("cuda", 2, HostGpus(8, visible))


@pytest.mark.parametrize(
    ("visible_devices", "num_visible"),
    [
        (None, 4),
        ("", 0),
        ("NoDevFiles", 0),
        ("2", 1),
        ("3, 0", 2),
        ("0,1,2,3", 4),
        ("0,4,1", 1),  # CUDA reads no further
        ("0,-1,1", 1),
        ("0,1,0", 0),  # an error to CUDA, which shows none
        ("GPU-8932f937,GPU-d0ad1a7c", 2),
        ("MIG-c6d4f1ef", 1),
    ],
)
def test_what_is_visible_is_read_as_cuda_reads_it(
    visible_devices: str | None, num_visible: int
) -> None:
    gpus = HostGpus(4, visible_devices)
    assert gpus.num_visible == num_visible
    assert bool(gpus.what_is_hidden) is (num_visible < 4)


def test_no_variable_shows_gpus_where_there_are_none() -> None:
    for visible_devices in (None, "", "0", "GPU-8932f937"):
        assert HostGpus(0, visible_devices).num_visible == 0
        assert HostGpus(0, visible_devices).what_is_hidden == ""


def test_gpus_are_counted_in_the_drivers_list_and_the_environment_is_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colrow.gpus._IN_DRIVER", tmp_path)
    for bus_address in ("0000:03:00.0", "0000:04:00.0"):
        (tmp_path / bus_address).mkdir()
    assert host_gpus(None) == HostGpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert local_cluster.local_gpus() == HostGpus(2, "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local_cluster.local_gpus() == HostGpus(2)


class _Started(Exception):
    """A cluster would have been started."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of clusters that would have been started on a host with one GPU."""
    seen: list[Settings] = []

    def running(settings: Settings, messages: Console) -> Iterator[None]:
        seen.append(settings)
        raise _Started

    for module in (serving, demo):
        monkeypatch.setattr(module, "running", running)
    return seen


ONE_GPU = HostGpus(1)


def test_the_demo_is_on_the_cpu_as_it_says_whatever_gpus_there_are(
    started: list[Settings],
) -> None:
    with pytest.raises(_Started):
        demo.run_demo(3, "Why?", 8)
    (settings,) = started
    assert choose_devices(settings.device, settings.tp, ONE_GPU) == ["cpu"] * 3


def test_the_cluster_of_a_command_that_found_none_is_on_the_cpu_and_that_is_said(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def connected(endpoint: object) -> Iterator[None]:
        raise NothingAnswers("nobody there")
        yield

    monkeypatch.setattr(serving, "connected", connected)
    with (
        pytest.raises(_Started),
        serving.connected_or_demo(None, None, None, Console(width=200)),
    ):
        pass
    (settings,) = started
    assert choose_devices(settings.device, settings.tp, ONE_GPU) == ["cpu"] * DEFAULT_TP
    assert f"over {DEFAULT_TP} ranks on the CPU for this command alone" in capsys.readouterr().out


def test_what_serve_is_told_reaches_the_coordinator(started: list[Settings]) -> None:
    flags = ("--gpu-memory-utilization", "0.55", "--kv-cache-mib", "7", "--max-running", "3")
    assert isinstance(CliRunner().invoke(app, ["serve", *flags]).exception, _Started)
    (settings,) = started
    required = ("--model", ".", "--workers", "unused:1")
    config = coordinator_config.parse((*required, *settings.coordinator_args))
    assert config.gpu_memory_utilization == 0.55
    assert (config.kv_cache_bytes, config.max_running) == (7 * 2**20, 3)


@pytest.mark.parametrize("share", ["0", "1.1", "-1"])
def test_a_share_of_memory_that_is_none_is_refused_before_anything_starts(
    started: list[Settings], share: str
) -> None:
    assert CliRunner().invoke(app, ["serve", "--gpu-memory-utilization", share]).exit_code == 2
    assert not started


@pytest.mark.parametrize(("flags", "device"), [((), "auto"), (("--device", "cpu"), "cpu")])
def test_bench_has_the_flag_that_a_host_with_too_few_gpus_needs(
    started: list[Settings], flags: tuple[str, ...], device: str
) -> None:
    assert isinstance(CliRunner().invoke(app, ["bench", *flags]).exception, _Started)
    (settings,) = started
    assert (settings.tp, settings.device) == (DEFAULT_TP, device)


def test_bench_of_a_running_cluster_takes_no_device(started: list[Settings]) -> None:
    done = CliRunner().invoke(app, ["bench", "--target", "127.0.0.1:1", "--device", "cpu"])
    assert (done.exit_code, started) == (1, [])
    assert "leave out MODEL, --tp, --device and --dtype" in done.stderr
