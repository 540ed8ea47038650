"""Requests as large as a message may be hold nobody else up: they are refused, or worked on aside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from colrow.v1 import control_service_pb2, inference_service_pb2, tensor_pb2
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster
from tests.pulse import LONGEST_PAUSE_S, Pulse

pytestmark = pytest.mark.timeout(120)

_inference = inference_service_pb2
_control = control_service_pb2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))
    checkpoints.add_tokenizer(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def running(folder: Path, worker_pool: WorkerPool) -> Iterator[RunningCluster]:
    with cluster(worker_pool, folder, 2) as started:
        yield started


def text(length: int) -> Any:
    return _inference.TokenizeRequest(text="a" * length)


def conversation(count: int) -> Any:
    messages = [_inference.ChatMessage(role="user", content="a")] * count
    return _inference.TokenizeRequest(chat=_inference.Chat(messages=messages))


def plan(folder: Path, tp_size: int, **changes: int) -> Any:
    config = json.loads((folder / "config.json").read_text()) | changes
    return _control.PlanShardsRequest(config_json=json.dumps(config), tp_size=tp_size)


def activation(count: int) -> tensor_pb2.Tensor:
    data = bytes(count * 72 * 4)
    return tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[count, 72], data=data)


Stubs = Any
LARGE: dict[str, tuple[Callable[[Stubs, Path], Any], str]] = {
    "a text to tokenize": (lambda s, _: s.inference.Tokenize(text(500_000), timeout=60), "OK"),
    "a longer one": (
        lambda s, _: s.inference.Tokenize(text(30_000_000), timeout=20),
        "INVALID_ARGUMENT",
    ),
    "a prompt of 30 MB": (
        lambda s, _: list(
            s.inference.Generate(_inference.GenerateRequest(text="a" * 30_000_000), timeout=20)
        ),
        "INVALID_ARGUMENT",
    ),
    "ten million token ids": (
        lambda s, _: list(
            s.inference.Generate(
                _inference.GenerateRequest(token_ids=_inference.TokenIds(ids=[5] * 10_000_000)),
                timeout=20,
            )
        ),
        "INVALID_ARGUMENT",
    ),
    "ten million stop tokens": (
        lambda s, _: list(
            s.inference.Generate(
                _inference.GenerateRequest(text="a", stop_token_ids=[5] * 10_000_000), timeout=20
            )
        ),
        "INVALID_ARGUMENT",
    ),
    "a million ids to detokenize": (
        lambda s, _: s.inference.Detokenize(
            _inference.DetokenizeRequest(token_ids=[5] * 1_000_000), timeout=60
        ),
        "OK",
    ),
    "a million sequences to score": (
        lambda s, _: s.inference.Score(
            _inference.ScoreRequest(sequences=[_inference.TokenIds(ids=[5])] * 1_000_000),
            timeout=20,
        ),
        "INVALID_ARGUMENT",
    ),
    "half a million messages": (
        lambda s, _: s.inference.Tokenize(conversation(500_000), timeout=20),
        "INVALID_ARGUMENT",
    ),
    "a plan of 4096 layers": (
        lambda s, folder: s.control.PlanShards(plan(folder, 2, num_hidden_layers=4096), timeout=60),
        "OK",
    ),
    "a plan of 4096 layers for 1000 ranks": (
        lambda s, folder: s.control.PlanShards(
            plan(folder, 1000, num_hidden_layers=4096), timeout=20
        ),
        "INVALID_ARGUMENT",
    ),
    "a config of 40 MB": (
        lambda s, _: s.control.PlanShards(
            _control.PlanShardsRequest(config_json="[" + "1," * 20_000_000 + "1]", tp_size=2),
            timeout=20,
        ),
        "INVALID_ARGUMENT",
    ),
    "weights for millions of ranks": (
        lambda s, _: s.control.PlanShards(
            _control.PlanShardsRequest(tp_size=2, memory_weights=[1.0] * 5_000_000), timeout=20
        ),
        "INVALID_ARGUMENT",
    ),
    "a layer of 200,000 tokens": (
        lambda s, _: s.control.RunLayer(
            _control.RunLayerRequest(layer=0, activation=activation(200_000)), timeout=20
        ),
        "INVALID_ARGUMENT",
    ),
    "news without a pause": (
        lambda s, _: list(
            s.control.WatchCluster(_control.WatchClusterRequest(interval_s=1e-30), timeout=5)
        ),
        "INVALID_ARGUMENT",
    ),
    "a name of 100,000 letters": (
        lambda s, _: s.inference.GetModel(
            _inference.GetModelRequest(model="x" * 100_000), timeout=5
        ),
        "NOT_FOUND",
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_large_request_holds_nobody_up(case: str, running: RunningCluster, folder: Path) -> None:
    ask, expected = LARGE[case]
    with Pulse(running.target) as pulse:
        try:
            ask(running.client, folder)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name  # type: ignore[attr-defined]
    assert code == expected
    assert pulse.longest_s < LONGEST_PAUSE_S


BODIES = {
    "lists": b'{"prompt": [' + b"[]," * 1_300_000 + b"1]}",
    "objects": b'{"prompt": [' + b"{}," * 1_300_000 + b"1]}",
    "names": b"{" + b",".join(b'"%d":1' % i for i in range(350_000)) + b"}",
    "a text": b'{"prompt": "' + b"a " * 2_000_000 + b'"}',
}


@pytest.mark.parametrize("case", BODIES)
def test_a_large_body_holds_nobody_up(case: str, running: RunningCluster) -> None:
    url, json_type = f"{running.http_url}/v1/completions", {"content-type": "application/json"}
    with Pulse(running.target) as pulse:
        answer = httpx2.post(url, content=BODIES[case], headers=json_type, timeout=60)
    assert answer.status_code == 400, answer.text
    assert pulse.longest_s < LONGEST_PAUSE_S
