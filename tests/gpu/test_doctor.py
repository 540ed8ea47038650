"""The doctor finds nothing wrong on a machine whose GPUs the other tests here use."""

import re
import subprocess
import sys

import pytest
import torch

from colrow.finding import Finding, Verdict

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    done = subprocess.run(
        [sys.executable, "-m", "shard_worker.doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.stdout, done.stderr
    return [Finding.from_json(line) for line in done.stdout.splitlines()]


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def test_nothing_is_a_problem(findings: list[Finding]) -> None:
    assert not [finding for finding in findings if finding.verdict is Verdict.PROBLEM]


def test_every_gpu_is_described(findings: list[Finding]) -> None:
    for index in range(torch.cuda.device_count()):
        (device,) = named(findings, f"cuda:{index}")
        assert torch.cuda.get_device_name(index) in device.found
        assert re.search(r"[\d.]+ of [\d.]+ GiB free, compute capability \d+\.\d", device.found)
        assert f"CUDA {torch.version.cuda} in torch" in device.found


def test_kernels_can_be_compiled_and_ranks_have_a_transport(findings: list[Finding]) -> None:
    (triton,) = named(findings, "Triton")
    assert triton.verdict is Verdict.OK
    (transport,) = named(findings, "ranks on GPUs")
    if torch.cuda.device_count() == 1:
        assert "--tp 1" in transport.found
    else:
        assert re.search(r"exchange over (peer|nccl)\b", transport.found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("name", ["peer access", "CUDA IPC"])
def test_what_gpus_write_to_each_other_is_verified(name: str, findings: list[Finding]) -> None:
    for finding in named(findings, name):
        assert finding.verdict is Verdict.OK and "written and verified" in finding.found, finding
    assert named(findings, name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_nccl_is_one_library_and_adds_up(findings: list[Finding]) -> None:
    (library,) = named(findings, "NCCL")
    assert library.found.count("libnccl.so") == 1
    (transport,) = named(findings, "transport nccl")
    assert transport.verdict is Verdict.OK and "verified" in transport.found
