"""A worker says which device it has, and on a CPU which processor."""

from types import SimpleNamespace

import pytest
import torch

from shard_worker.config import parse
from shard_worker.device import device_name, device_uuid
from shard_worker.executor import Executor

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_a_cpu_has_the_name_of_the_processor_and_no_uuid() -> None:
    described = Executor(parse(["--device", "cpu"])).describe()
    assert described.device_name == device_name(CPU) != ""
    assert described.device_uuid == device_uuid(CPU) == ""


def test_a_gpu_has_a_name_and_a_uuid_once_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {GPU: SimpleNamespace(name="NVIDIA H200", uuid="1-2-3")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert (device_name(GPU), device_uuid(GPU)) == ("", "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert (device_name(GPU), device_uuid(GPU)) == ("NVIDIA H200", "1-2-3")
