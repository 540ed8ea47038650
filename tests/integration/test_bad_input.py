"""What is wrong gets a clear error and the right code; nothing is lost, and the server serves on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from safetensors.torch import load_file, save_file

from client import Colrow
from client.grpc_client import array
from colrow.errors import DOMAIN, ServiceError
from colrow.rpc import error_of
from colrow.v1 import (
    control_service_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    sampling_pb2,
    shard_worker_service_pb2,
    shard_worker_service_pb2_grpc,
    tensor_pb2,
)
from coordinator.convert import tensors, workers
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from tests import checkpoints, dying_worker
from tests.clusters import RunningCluster, Service, WorkerPool, cluster, start

pytestmark = pytest.mark.timeout(60)

_inference = inference_service_pb2
_control = control_service_pb2
_worker = shard_worker_service_pb2

VOCAB_SIZE = 331
CONTEXT = checkpoints.CONTEXT
FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GPT2LMHeadModel",
)
PROMPT = [5, 17, 200]
NUM_TOKENS = 60

# Refuses a conversation that the user does not start, as the templates of some models do.
CHAT_TEMPLATE = """
{%- if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor -%}
"""


@dataclass(frozen=True)
class Model:
    """A small model with a tokenizer, and what it says to `PROMPT`."""

    folder: Path
    expected: list[int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))
    checkpoints.add_tokenizer(folder, CHAT_TEMPLATE)
    reference = checkpoints.oracle(folder)
    return Model(folder, checkpoints.greedy(reference, PROMPT, NUM_TOKENS))


def error_info(error: Any) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo that every error of our own carries."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no details: {error.details()}"
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info


def refusal(call: Callable[[], Any], code: str, *words: str) -> error_details_pb2.ErrorInfo:
    """The call fails with this code, with a message that has these words, and as errors of ours do."""
    with pytest.raises(grpc.RpcError) as raised:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)
    error: Any = raised.value
    assert error.code().name == code, error.details()
    for word in words:
        assert word in error.details()
    info = error_info(error)
    assert info.domain == DOMAIN
    assert re.fullmatch(r"[A-Z][A-Z_]+[A-Z]", info.reason)
    return info


def check_health(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
    assert response.status == health_pb2.HealthCheckResponse.SERVING


# Requests of users and operators


@pytest.fixture(scope="class")
def running(model: Model, worker_pool: WorkerPool) -> Iterator[RunningCluster]:
    name = ("--served-model-name", "tiny")
    with cluster(worker_pool, model.folder, 2, *name) as started:
        yield started


def generate(**fields: Any) -> Callable[[RunningCluster], Any]:
    request = _inference.GenerateRequest(**fields)
    return lambda running: running.client.inference.Generate(request, timeout=20)


def sampled(**fields: Any) -> Callable[[RunningCluster], Any]:
    return generate(
        token_ids=_inference.TokenIds(ids=PROMPT), sampling=sampling_pb2.SamplingParams(**fields)
    )


def prompted(ids: Sequence[int], **fields: Any) -> Callable[[RunningCluster], Any]:
    return generate(token_ids=_inference.TokenIds(ids=ids), **fields)


def tokenize(**fields: Any) -> Callable[[RunningCluster], Any]:
    request = _inference.TokenizeRequest(**fields)
    return lambda running: running.client.inference.Tokenize(request, timeout=20)


def detokenize(**fields: Any) -> Callable[[RunningCluster], Any]:
    request = _inference.DetokenizeRequest(**fields)
    return lambda running: running.client.inference.Detokenize(request, timeout=20)


def plan(config: Any = None, tp_size: int = 2, **fields: Any) -> Callable[[RunningCluster], Any]:
    """`config`: the text of a config.json, or changes to one."""
    text = config if isinstance(config, str) else json.dumps(LLAMA | config) if config else ""
    request = _control.PlanShardsRequest(config_json=text, tp_size=tp_size, **fields)
    return lambda running: running.client.control.PlanShards(request, timeout=20)


def score(sequences: Sequence[Sequence[int]], **fields: Any) -> Callable[[RunningCluster], Any]:
    request = _inference.ScoreRequest(
        sequences=[_inference.TokenIds(ids=ids) for ids in sequences], **fields
    )
    return lambda running: running.client.inference.Score(request, timeout=20)


def run_layer(
    module: str, activation: tensor_pb2.Tensor | None = None, **fields: Any
) -> Callable[[RunningCluster], Any]:
    request = _control.RunLayerRequest(module=module, activation=activation, **fields)
    return lambda running: running.client.control.RunLayer(request, timeout=20)


def floats(*shape: int) -> tensor_pb2.Tensor:
    return tensors.tensor_message(np.zeros(shape, dtype=np.float32))


def ids(*values: int) -> tensor_pb2.Tensor:
    return tensors.tensor_message(np.array(values, dtype=np.int64))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
USER = [_inference.ChatMessage(role="user", content="hi")]
SYSTEM = [_inference.ChatMessage(role="system", content="hi")]
NAN, INF = float("nan"), float("inf")
Q_PROJ = "model.layers.0.self_attn.q_proj"

# What is wrong: the call, the code, and words of the message: the field and the value above all.
BAD_REQUESTS: dict[str, tuple[Callable[[RunningCluster], Any], str, tuple[str, ...]]] = {
    "unknown model": (
        prompted(PROMPT, model="gpt-5"),
        "NOT_FOUND",
        ("model = 'gpt-5'", "'tiny'"),
    ),
    "prompt longer than the context": (
        prompted([1] * 300),
        "INVALID_ARGUMENT",
        ("prompt", "300 tokens", str(CONTEXT)),
    ),
    "prompt that fills the context": (
        prompted([1] * CONTEXT),
        "INVALID_ARGUMENT",
        ("prompt", f"{CONTEXT} tokens", "one new token"),
    ),
    "text longer than the context": (
        generate(text="a" * 500),
        "INVALID_ARGUMENT",
        ("prompt", "500 tokens", str(CONTEXT)),
    ),
    "empty text": (generate(text=""), "INVALID_ARGUMENT", ("prompt", "is empty")),
    "no token ids": (prompted([]), "INVALID_ARGUMENT", ("prompt", "is empty")),
    "no messages": (
        generate(chat=_inference.Chat()),
        "INVALID_ARGUMENT",
        ("chat.messages", "is empty"),
    ),
    "no prompt": (generate(), "INVALID_ARGUMENT", ("prompt", "set text, token_ids or chat")),
    "chat that the template refuses": (
        generate(chat=_inference.Chat(messages=SYSTEM)),
        "INVALID_ARGUMENT",
        ("chat", "the user speaks first"),
    ),
    "token id outside the vocabulary": (
        prompted([5, VOCAB_SIZE]),
        "INVALID_ARGUMENT",
        ("prompt.token_ids = 331", "331 ids"),
    ),
    "largest token id": (
        prompted([2**32 - 1]),
        "INVALID_ARGUMENT",
        ("prompt.token_ids = 4294967295",),
    ),
    "negative temperature": (
        sampled(temperature=-0.5),
        "INVALID_ARGUMENT",
        ("sampling.temperature = -0.5", "[0, 100]"),
    ),
    "temperature too high": (
        sampled(temperature=101),
        "INVALID_ARGUMENT",
        ("sampling.temperature = 101",),
    ),
    "temperature NaN": (
        sampled(temperature=NAN),
        "INVALID_ARGUMENT",
        ("sampling.temperature = nan",),
    ),
    "temperature infinite": (
        sampled(temperature=INF),
        "INVALID_ARGUMENT",
        ("sampling.temperature = inf",),
    ),
    "top_p 0": (sampled(top_p=0), "INVALID_ARGUMENT", ("sampling.top_p = 0.0", "(0, 1]")),
    "top_p above 1": (sampled(top_p=1.5), "INVALID_ARGUMENT", ("sampling.top_p = 1.5",)),
    "top_p negative": (sampled(top_p=-1), "INVALID_ARGUMENT", ("sampling.top_p = -1.0",)),
    "top_p NaN": (sampled(top_p=NAN), "INVALID_ARGUMENT", ("sampling.top_p = nan",)),
    "no tokens wanted": (
        prompted(PROMPT, max_tokens=0),
        "INVALID_ARGUMENT",
        ("max_tokens = 0", "[1, 253]"),
    ),
    "more tokens than the context": (
        prompted(PROMPT, max_tokens=254),
        "INVALID_ARGUMENT",
        ("max_tokens = 254", "[1, 253]", "prompt has 3"),
    ),
    "tokenize nothing": (tokenize(), "INVALID_ARGUMENT", ("input", "set text or chat")),
    "tokenize an empty chat": (
        tokenize(chat=_inference.Chat()),
        "INVALID_ARGUMENT",
        ("chat.messages", "is empty"),
    ),
    "tokenize for another model": (
        tokenize(text="a", model="gpt-5"),
        "NOT_FOUND",
        ("model = 'gpt-5'",),
    ),
    "detokenize outside the vocabulary": (
        detokenize(token_ids=[3, 400]),
        "INVALID_ARGUMENT",
        ("token_ids = 400", "331 ids"),
    ),
    "detokenize for another model": (
        detokenize(token_ids=[3], model="gpt-5"),
        "NOT_FOUND",
        ("model = 'gpt-5'",),
    ),
    "describe another model": (
        lambda running: running.client.inference.GetModel(
            _inference.GetModelRequest(model="gpt-5"), timeout=20
        ),
        "NOT_FOUND",
        ("model = 'gpt-5'",),
    ),
    "score nothing": (score([]), "INVALID_ARGUMENT", ("sequences", "is empty")),
    "score an empty sequence": (score([PROMPT, []]), "INVALID_ARGUMENT", ("prompt", "is empty")),
    "score outside the vocabulary": (
        score([PROMPT, [1, 400]]),
        "INVALID_ARGUMENT",
        ("prompt.token_ids = 400",),
    ),
    "score more than the context": (
        score([[1] * (CONTEXT + 1)]),
        "INVALID_ARGUMENT",
        ("prompt", f"{CONTEXT + 1} tokens", str(CONTEXT)),
    ),
    "score for another model": (
        score([PROMPT], model="gpt-5"),
        "NOT_FOUND",
        ("model = 'gpt-5'",),
    ),
    "too many likeliest tokens": (
        score([PROMPT], top_logprobs=101),
        "INVALID_ARGUMENT",
        ("prompt_logprobs = 101", "[0, 100]"),
    ),
    "min_p above 1": (sampled(min_p=1.5), "INVALID_ARGUMENT", ("sampling.min_p = 1.5", "[0, 1]")),
    "repetition penalty 0": (
        sampled(repetition_penalty=0),
        "INVALID_ARGUMENT",
        ("sampling.repetition_penalty = 0.0", "(0, 100]"),
    ),
    "repetition penalty infinite": (
        sampled(repetition_penalty=INF),
        "INVALID_ARGUMENT",
        ("sampling.repetition_penalty = inf",),
    ),
    "presence penalty too high": (
        sampled(presence_penalty=2.5),
        "INVALID_ARGUMENT",
        ("sampling.presence_penalty = 2.5", "[-2, 2]"),
    ),
    "frequency penalty NaN": (
        sampled(frequency_penalty=NAN),
        "INVALID_ARGUMENT",
        ("sampling.frequency_penalty = nan",),
    ),
    "bias outside the vocabulary": (
        sampled(logit_bias={331: 1.0}),
        "INVALID_ARGUMENT",
        ("sampling.logit_bias = 331", "331 ids"),
    ),
    "bias too high": (
        sampled(logit_bias={3: 101.0}),
        "INVALID_ARGUMENT",
        ("sampling.logit_bias[3] = 101.0",),
    ),
    "no continuations": (prompted(PROMPT, n=0), "INVALID_ARGUMENT", ("n = 0", "[1, 128]")),
    "too many continuations": (prompted(PROMPT, n=129), "INVALID_ARGUMENT", ("n = 129",)),
    "more min_tokens than max_tokens": (
        prompted(PROMPT, max_tokens=4, min_tokens=5),
        "INVALID_ARGUMENT",
        ("min_tokens = 5", "[0, 4]"),
    ),
    "empty stop text": (
        prompted(PROMPT, stop=["x", ""]),
        "INVALID_ARGUMENT",
        ("stop = ''", "1 to 1024 characters"),
    ),
    "long stop text": (prompted(PROMPT, stop=["x" * 1025]), "INVALID_ARGUMENT", ("stop = 'xxx",)),
    "many stop texts": (prompted(PROMPT, stop=["x"] * 65), "INVALID_ARGUMENT", ("stop = 65",)),
    "stop token outside the vocabulary": (
        prompted(PROMPT, stop_token_ids=[331]),
        "INVALID_ARGUMENT",
        ("stop_token_ids = 331",),
    ),
    "too many log-probabilities": (
        prompted(PROMPT, logprobs=101),
        "INVALID_ARGUMENT",
        ("logprobs = 101", "[0, 100]"),
    ),
    "watch at no interval": (
        lambda running: running.client.control.WatchCluster(
            _control.WatchClusterRequest(interval_s=NAN), timeout=20
        ),
        "INVALID_ARGUMENT",
        ("interval_s = nan",),
    ),
    "watch at a negative interval": (
        lambda running: running.client.control.WatchCluster(
            _control.WatchClusterRequest(interval_s=-1), timeout=20
        ),
        "INVALID_ARGUMENT",
        ("interval_s = -1.0",),
    ),
    "plan of broken JSON": (plan('{"a": '), "INVALID_ARGUMENT", ("config_json", '{"a": ')),
    "plan of a list": (plan("[1]"), "INVALID_ARGUMENT", ("config_json = '[1]'", "no JSON object")),
    "plan of nested JSON": (plan("[" * 100_000), "INVALID_ARGUMENT", ("config_json",)),
    "plan of nothing known": (plan("{}"), "INVALID_ARGUMENT", ("model_type", "missing")),
    "plan of an unsupported family": (
        plan({"architectures": ["BertModel"]}),
        "INVALID_ARGUMENT",
        ("architectures[0]", "'BertModel'", *FAMILIES),
    ),
    "plan of a missing field": (
        plan(json.dumps({k: v for k, v in LLAMA.items() if k != "vocab_size"})),
        "INVALID_ARGUMENT",
        ("vocab_size is missing",),
    ),
    "plan of a field of another type": (
        plan({"hidden_size": "64"}),
        "INVALID_ARGUMENT",
        ("hidden_size", "'64'"),
    ),
    "plan of a size beyond reason": (
        plan({"vocab_size": 10**30}),
        "INVALID_ARGUMENT",
        ("vocab_size", "1000000000000000000000000000000"),
    ),
    "plan of layers beyond reason": (
        plan({"num_hidden_layers": 10**9}),
        "INVALID_ARGUMENT",
        ("num_hidden_layers", "1000000000"),
    ),
    "plan over no rank": (plan(tp_size=0), "INVALID_ARGUMENT", ("tp_size = 0", "[1, 1024]")),
    "plan over too many ranks": (
        plan(tp_size=5000),
        "INVALID_ARGUMENT",
        ("tp_size = 5000", "[1, 1024]"),
    ),
    "plan over more ranks than heads": (
        plan(tp_size=10),
        "INVALID_ARGUMENT",
        ("tp_size 10", "q_heads has only 9", "1, 2, 3, 4, 5, 6, 7, 8, 9"),
    ),
    "plan with a weight too few": (
        plan(memory_weights=[1.0]),
        "INVALID_ARGUMENT",
        ("memory_weights", "[1.0]", "(2)"),
    ),
    "plan with a weight of zero": (
        plan(memory_weights=[1.0, 0.0]),
        "INVALID_ARGUMENT",
        ("memory_weights[1]", "0.0"),
    ),
    "plan with a weight that is no number": (
        plan(memory_weights=[NAN, 1.0]),
        "INVALID_ARGUMENT",
        ("memory_weights[0]", "nan"),
    ),
    "plan in a type that no model has": (
        plan(data_type=tensor_pb2.DATA_TYPE_INT64),
        "INVALID_ARGUMENT",
        ("data_type = 4", "float32, bfloat16, float16"),
    ),
    "layer that is not there": (
        run_layer("mlp", layer=3),
        "INVALID_ARGUMENT",
        ("layer = 3", "3 layers"),
    ),
    "neither layer nor module": (run_layer(""), "INVALID_ARGUMENT", ("module", "name a layer")),
    "module that is not there": (
        run_layer("mlp.side_proj", layer=0),
        "NOT_FOUND",
        ("module = 'model.layers.0.mlp.side_proj'", "'side_proj'"),
    ),
    "layer by name that is not there": (
        run_layer("model.layers.7.mlp"),
        "NOT_FOUND",
        ("module = 'model.layers.7.mlp'", "'7'"),
    ),
    "layer by another name": (
        run_layer("model.layers.00.self_attn.q_proj"),
        "NOT_FOUND",
        ("module = 'model.layers.00.self_attn.q_proj'", "'00'"),
    ),
    "module of a number": (
        run_layer("model.layers.0.self_attn.attention.head_dim.real", floats(1, 72)),
        "NOT_FOUND",
        ("'real'",),
    ),
    "module that is a weight": (
        run_layer("model.norm.weight"),
        "INVALID_ARGUMENT",
        ("module = 'model.norm.weight'", "no module"),
    ),
    "module of many modules": (
        run_layer("model.layers"),
        "INVALID_ARGUMENT",
        ("module = 'model.layers'", "no module"),
    ),
    "activation of other features": (
        run_layer(Q_PROJ, floats(2, 71)),
        "INVALID_ARGUMENT",
        ("activation.shape = (2, 71)", "[num_tokens, 72]"),
    ),
    "activation of one dimension": (
        run_layer(Q_PROJ, floats(72)),
        "INVALID_ARGUMENT",
        ("activation = (72,)", "[num_tokens, features]"),
    ),
    "activation of no tokens": (
        run_layer(Q_PROJ, floats(0, 72)),
        "INVALID_ARGUMENT",
        ("activation.data = '0 bytes'", "[0, 72]"),
    ),
    "activation with too few bytes": (
        run_layer(
            Q_PROJ,
            tensor_pb2.Tensor(
                data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1, 72], data=b"\0" * 287
            ),
        ),
        "INVALID_ARGUMENT",
        ("activation.data = '287 bytes'", "288"),
    ),
    "activation of an immense shape": (
        run_layer(
            Q_PROJ,
            tensor_pb2.Tensor(
                data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2**63, 2**63], data=b"\0" * 4
            ),
        ),
        "INVALID_ARGUMENT",
        ("activation.data = '4 bytes'",),
    ),
    "activation of no type": (
        run_layer(Q_PROJ, tensor_pb2.Tensor(shape=[1, 72], data=b"\0" * 288)),
        "INVALID_ARGUMENT",
        ("activation.data_type = 0", "float32 or int64"),
    ),
    "activation of another type": (
        run_layer(
            Q_PROJ,
            tensor_pb2.Tensor(
                data_type=tensor_pb2.DATA_TYPE_BFLOAT16, shape=[1, 72], data=b"\0" * 144
            ),
        ),
        "INVALID_ARGUMENT",
        ("activation.data_type = 2", "float32 or int64"),
    ),
    "ids for a linear layer": (run_layer(Q_PROJ, ids(1, 2)), "INVALID_ARGUMENT", ("activation",)),
    "floats for an embedding": (
        run_layer("model.embed_tokens", floats(1, 72)),
        "INVALID_ARGUMENT",
        ("activation = (1, 72)", "int64 ids"),
    ),
    "ids outside the vocabulary": (
        run_layer("model.embed_tokens", ids(3, VOCAB_SIZE)),
        "INVALID_ARGUMENT",
        ("activation = [3, 331]", "[0, 331)"),
    ),
    "negative ids": (
        run_layer("model.embed_tokens", ids(-1)),
        "INVALID_ARGUMENT",
        ("activation = [-1]", "[0, 331)"),
    ),
    "too much noise": (
        run_layer(Q_PROJ, num_tokens=5000),
        "INVALID_ARGUMENT",
        ("num_tokens = 5000", "[1, 4096]"),
    ),
}


def tokens_of(pieces: Any) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


class TestRequests:
    @pytest.mark.parametrize("case", BAD_REQUESTS)
    def test_a_bad_request_is_refused_and_the_next_is_answered(
        self, case: str, running: RunningCluster, model: Model
    ) -> None:
        call, code, words = BAD_REQUESTS[case]
        refusal(lambda: call(running), code, *words)
        check_health(running.target)
        good = running.client.generate(PROMPT, max_tokens=3, temperature=0, timeout_s=20)
        assert tokens_of(good) == model.expected[:3]

    def test_an_error_names_field_and_value_for_programs(self, running: RunningCluster) -> None:
        info = refusal(lambda: sampled(top_p=2)(running), "INVALID_ARGUMENT")
        assert info.reason == "INVALID_FIELD"
        assert dict(info.metadata) == {"field": "sampling.top_p", "value": "2.0"}
        info = refusal(lambda: prompted(PROMPT, model="x")(running), "NOT_FOUND")
        assert info.reason == "UNKNOWN_MODEL"
        assert info.metadata["field"] == "model" and info.metadata["value"] == "x"

    def test_bad_requests_do_no_harm_to_one_that_runs(
        self, running: RunningCluster, model: Model
    ) -> None:
        pieces = running.client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0, timeout_s=30)
        first = next(pieces)
        with ThreadPoolExecutor(4) as threads:
            for call, _, _ in BAD_REQUESTS.values():
                threads.submit(lambda answer: list(answer(running)), call)
            rest = list(pieces)
        assert tokens_of([first, *rest]) == model.expected
        state = running.client.cluster()
        assert state.state == _control.CLUSTER_STATE_SERVING
        scheduler = state.scheduler
        assert (scheduler.running, scheduler.waiting, scheduler.kv_blocks_used) == (0, 0, 0)

    @pytest.mark.parametrize("data", [b"\x0a\xff", b"\x0a\x02\xff\xfe"], ids=["cut", "no UTF-8"])
    @pytest.mark.parametrize(
        "method", ["colrow.v1.InferenceService/GetModel", "grpc.health.v1.Health/Check"]
    )
    def test_bytes_that_are_no_such_message_are_refused(
        self, method: str, data: bytes, running: RunningCluster
    ) -> None:
        with grpc.insecure_channel(running.target) as channel:
            call: Any = channel.unary_unary(f"/{method}")
            info = refusal(lambda: call(data, timeout=5), "INVALID_ARGUMENT", "request = ")
        assert info.reason == "INVALID_FIELD"

    def test_an_oversized_message_is_refused(self, running: RunningCluster, model: Model) -> None:
        """By the client, which knows the limit; and by the server, if a client does not."""
        request = _inference.GenerateRequest(text="a" * (65 * 2**20))
        unlimited = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(running.target, options=unlimited) as channel:
            careless = inference_service_pb2_grpc.InferenceServiceStub(channel)
            for stub in (running.client.inference, careless):
                with pytest.raises(grpc.RpcError) as raised:
                    list(stub.Generate(request, timeout=30))
                error: Any = raised.value
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
                assert str(64 * 2**20) in error.details()
        good = running.client.generate(PROMPT, max_tokens=3, temperature=0, timeout_s=20)
        assert tokens_of(good) == model.expected[:3]

    @pytest.mark.parametrize("module", [Q_PROJ, "model.layers.1.mlp.down_proj", "model.norm"])
    def test_an_activation_of_nan_gives_nan(self, module: str, running: RunningCluster) -> None:
        features = 104 if module.endswith("down_proj") else 72
        activation = np.full((2, features), np.nan, dtype=np.float32)
        response = running.client.run_layer(module=module, activation=activation)
        assert np.isnan(array(response.output)).all()

    def test_the_most_noise_is_answered(self, running: RunningCluster) -> None:
        assert running.client.run_layer(layer=0, num_tokens=4096).output.shape == [4096, 72]


# A coordinator that can't start


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """An address at which nobody listens, nor can."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def failure(model: Path, workers: Sequence[str], *arguments: str) -> str:
    """The one line with which a coordinator ends that can't serve."""
    service = start(
        "coordinator",
        "coordinator",
        *("--model", str(model), "--workers", ",".join(workers), "--grpc-port", "0"),
        *("--http-port", "0"),
        *arguments,
    )
    return service.wait_for_failure()


@pytest.fixture
def copy(model: Model, tmp_path: Path) -> Path:
    """A copy of the model's folder, to be damaged."""
    return Path(shutil.copytree(model.folder, tmp_path / "model"))


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class TestAModelFolderThatIsNone:
    """No worker is needed to see that."""

    def test_missing_folder(self, tmp_path: Path, nobody: str) -> None:
        line = failure(tmp_path / "nothing", [nobody])
        assert f"model = '{tmp_path}/nothing'" in line and "config.json" in line

    def test_missing_config(self, copy: Path, nobody: str) -> None:
        (copy / "config.json").unlink()
        assert f"model = '{copy}': is no folder with a config.json" in failure(copy, [nobody])

    @pytest.mark.parametrize("text", ['{"architectures": [', "[1, 2]", "\x00", "[" * 100_000])
    def test_broken_config(self, copy: Path, text: str, nobody: str) -> None:
        (copy / "config.json").write_text(text)
        assert "config.json = " in failure(copy, [nobody])

    def test_config_of_an_unsupported_family(self, copy: Path, nobody: str) -> None:
        change_config(copy, architectures=["MambaForCausalLM"])
        line = failure(copy, [nobody])
        assert "'MambaForCausalLM'" in line
        assert all(family in line for family in FAMILIES)

    def test_config_with_a_wrong_value(self, copy: Path, nobody: str) -> None:
        change_config(copy, num_attention_heads=-9)
        assert "num_attention_heads" in (line := failure(copy, [nobody])) and "-9" in line

    @pytest.mark.parametrize(
        ("file", "text", "words"),
        [
            ("tokenizer.json", "{}", "tokenizer.json: "),
            ("tokenizer.json", "{", "tokenizer.json: "),
            ("tokenizer_config.json", "{", "tokenizer_config.json: "),
            ("tokenizer_config.json", "[]", "tokenizer_config.json: is no JSON object"),
            ("chat_template.jinja", "{% for %}", "chat template, line 1: "),
            ("generation_config.json", "{", "generation_config.json = '{'"),
            (
                "generation_config.json",
                '{"eos_token_id": "</s>"}',
                "generation_config.json: eos_token_id must be a token id, a list of them or null",
            ),
        ],
    )
    def test_broken_files_beside_it(
        self, copy: Path, file: str, text: str, words: str, nobody: str
    ) -> None:
        (copy / file).write_text(text)
        assert words in failure(copy, [nobody])


OLD_WORKER = """
import runpy
import colrow
colrow.__version__ = "0.0.9"
runpy.run_module("shard_worker", run_name="__main__")
"""


class TestAnAddressThatIsNone:
    def test_port_in_use(self, model: Model, nobody: str) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            line = failure(model.folder, [nobody], "--grpc-port", str(port))
            assert f"127.0.0.1:{port}" in line and "in use" in line
            code, log = start("worker", "shard_worker", "--port", str(port)).wait_for_end()
        assert code == 1 and "Traceback" not in log
        assert f"colrow worker: address = '127.0.0.1:{port}'" in log and "in use" in log

    def test_worker_that_does_not_answer(self, model: Model, nobody: str) -> None:
        began = time.monotonic()
        line = failure(model.folder, [nobody], "--startup-timeout", "2")
        assert f"worker 0 ({nobody}), connecting: does not answer within 2 s" in line
        assert 2 <= time.monotonic() - began < 10

    def test_one_worker_of_several_that_does_not_answer(
        self, model: Model, worker_pool: WorkerPool, nobody: str
    ) -> None:
        workers = [*worker_pool.addresses(1), nobody]
        line = failure(model.folder, workers, "--startup-timeout", "1")
        assert f"worker 1 ({nobody})" in line

    def test_duplicate_addresses(self, model: Model) -> None:
        code, log = start(
            "coordinator",
            "coordinator",
            *("--model", str(model.folder), "--workers", "127.0.0.1:9,127.0.0.1:9"),
        ).wait_for_end()
        assert code == 2, "wrong usage"
        assert "--workers 127.0.0.1:9,127.0.0.1:9: an address stands there twice" in log

    def test_worker_of_another_version(self, model: Model) -> None:
        log = model.folder.with_name("worker.log")
        process = subprocess.Popen(
            [sys.executable, "-c", OLD_WORKER, "--port", "0"],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        old = Service("old worker", process, log)
        try:
            old.wait_for_port()
            line = failure(model.folder, [old.address])
        finally:
            old.stop()
        assert f"worker 0 ({old.address}): version = '0.0.9'" in line
        assert "the coordinator is" in line


class TestAModelThatTheWorkersRefuse:
    """The workers are as good as before: another coordinator serves with them."""

    @pytest.fixture(autouse=True)
    def still_good(self, worker_pool: WorkerPool, model: Model) -> Iterator[list[str]]:
        workers = worker_pool.addresses(2)
        yield workers
        for address in workers:
            check_health(address)
        with cluster(worker_pool, model.folder, 2) as running:
            good = running.client.generate(PROMPT, max_tokens=5, temperature=0, timeout_s=20)
            assert tokens_of(good) == model.expected[:5]

    def test_missing_safetensors(self, copy: Path, still_good: list[str]) -> None:
        (copy / "model.safetensors").unlink()
        line = failure(copy, still_good)
        assert f"model_path = '{copy}'" in line and "model.safetensors" in line

    def test_truncated_safetensors(self, copy: Path, still_good: list[str]) -> None:
        file = copy / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1000)
        assert f"{file}: is truncated" in failure(copy, still_good)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model.norm.weight": None}, "'model.norm.weight': missing"),
            ({"model.norm.bias": torch.ones(72)}, "'model.norm.bias': unexpected"),
            ({"model.norm.weight": torch.ones(71)}, "'model.norm.weight': has shape (71,)"),
            (
                {"model.norm.weight": torch.ones(72, dtype=torch.int32)},
                "'model.norm.weight': its data type",
            ),
        ],
        ids=["missing key", "unexpected key", "wrong shape", "wrong dtype"],
    )
    def test_other_tensors(
        self, change: dict[str, torch.Tensor | None], words: str, copy: Path, still_good: list[str]
    ) -> None:
        tensors: dict[str, torch.Tensor | None] = {
            **load_file(copy / "model.safetensors"),
            **change,
        }
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, copy / "model.safetensors")
        line = failure(copy, still_good)
        assert words in line and "worker " in line

    def test_more_ranks_than_heads(self, copy: Path, still_good: list[str]) -> None:
        change_config(copy, num_attention_heads=1, num_key_value_heads=1, head_dim=72)
        line = failure(copy, still_good)
        assert "tp_size 2" in line and "tp sizes that fit: 1" in line

    def test_more_weights_than_the_host_has_memory(self, copy: Path, still_good: list[str]) -> None:
        """Refused before a worker is asked to load anything."""
        change_config(copy, intermediate_size=2**31 - 1)  # terabytes
        line = failure(copy, still_good)
        assert "tp_size = 2: ranks 0 and 1 need " in line
        assert "GiB for weights on a host (cpu) that has " in line
        assert "no tp size up to " in line or "the smallest tp size that fits" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--max-model-len", "257"), "max_model_len = 257: the model's context is 256"),
            (("--kv-cache-mib", "1", "--block-size", "100000"), "kv_cache_mib = 1"),
            (("--num-blocks", "4000000000", "--block-size", "4000000"), "num_blocks"),
            (("--memory-weights", "1,2,3"), "memory_weights must be one number per rank (2)"),
            (("--memory-weights", "nan,1"), "memory_weights[0]"),
        ],
    )
    def test_settings_that_do_not_fit(
        self, arguments: Sequence[str], words: str, model: Model, still_good: list[str]
    ) -> None:
        assert words in failure(model.folder, still_good, *arguments)


class TestADeviceThatCanNotBeHad:
    @pytest.mark.parametrize(
        ("variable", "value", "words"),
        [
            ("PYTORCH_CUDA_ALLOC_CONF", "", "device = 'cuda:99': "),
            ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF = "),
            ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "PYTORCH_ALLOC_CONF = "),
        ],
    )
    def test_the_worker_ends_with_one_line(
        self, variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, value)
        code, log = start(
            "worker", "shard_worker", "--port", "0", "--device", "cuda:99"
        ).wait_for_end()
        assert code == 1
        assert log.startswith(f"colrow worker: {words}") and log.count("\n") == 1, log


class TestAWorkerThatDiesAtStart:
    """The coordinator ends within seconds and says which rank it was, and when; the other is free."""

    @pytest.mark.parametrize("phase", dying_worker.PHASES)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_rank_phase_and_cause_are_named(
        self, rank: int, phase: str, model: Model, worker_pool: WorkerPool
    ) -> None:
        workers = worker_pool.addresses(1)
        dying = start("dying", "tests.dying_worker", "--port", "0", phase)
        dying.wait_for_port()
        workers.insert(rank, dying.address)
        began = time.monotonic()
        line = failure(model.folder, workers)
        assert time.monotonic() - began < 15, "most of it is the start of the coordinator"
        assert dying.process.wait(5) == -signal.SIGKILL
        dying.log.unlink()
        assert f"worker {rank} ({dying.address}), {phase}: the connection to it is lost" in line
        with cluster(worker_pool, model.folder, 1) as running:
            good = running.client.generate(PROMPT, max_tokens=5, temperature=0, timeout_s=20)
            assert tokens_of(good) == model.expected[:5]


# Straight on a worker

UNKNOWN_TRANSPORT: Any = 9


@dataclass
class Worker:
    """A worker that is led by hand."""

    address: str
    stub: Any
    model: Model
    epoch: int = 0

    def join(self, **fields: Any) -> Any:
        """A group of one, of the next epoch."""
        request = {
            "epoch": self.epoch + 1,
            "rank": 0,
            "size": 1,
            "transport": _worker.TRANSPORT_SINGLE,
            "timeout_s": 5.0,
        } | fields
        self.epoch = max(self.epoch, request["epoch"])
        return self.stub.JoinGroup(_worker.JoinGroupRequest(**request), timeout=20)

    def load(self, epoch: int | None = None, **fields: Any) -> Any:
        config = (self.model.folder / "config.json").read_text()
        shards = make_plan(model_spec(json.loads(config)), 1)
        request = workers.load_request(
            self.epoch if epoch is None else epoch,
            self.model.folder,
            config,
            shards,
            "safetensors",
        )
        for name, value in fields.items():
            if isinstance(value, list):
                request.ClearField(name)  # type: ignore[arg-type]
                getattr(request, name).extend(value)
            else:
                setattr(request, name, value)
        return list(self.stub.LoadShard(request, timeout=20))[-1]

    def allocate(self, num_blocks: int = 8, block_size: int = 4, epoch: int | None = None) -> Any:
        request = _worker.AllocateKvCacheRequest(
            epoch=self.epoch if epoch is None else epoch,
            num_blocks=num_blocks,
            block_size=block_size,
        )
        return self.stub.AllocateKvCache(request, timeout=20)

    def abort(self, epoch: int | None = None) -> Any:
        request = _worker.AbortGroupRequest(epoch=self.epoch if epoch is None else epoch)
        return self.stub.AbortGroup(request, timeout=20)

    def compute(self, epoch: int | None = None) -> Any:
        request = _worker.ComputePartialRequest(
            epoch=self.epoch if epoch is None else epoch,
            module="model.norm",
            activation=floats(1, 72),
        )
        return self.stub.ComputePartial(request, timeout=20)

    def execute(self, *steps: _worker.ExecuteStepsRequest) -> list[Any]:
        for step in steps:
            if not step.epoch:
                step.epoch = self.epoch
        return list(self.stub.ExecuteSteps(iter(steps), timeout=20))

    @property
    def state(self) -> str:
        worker = self.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        return _worker.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_")

    def leave(self) -> None:
        """Back to idle, whatever was."""
        worker = self.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        self.epoch = worker.epoch
        if worker.size:
            self.abort()
        assert self.state == "IDLE"

    def make_ready(self) -> None:
        self.leave()
        self.join()
        self.load()
        self.allocate()
        assert self.state == "READY"


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """Workers that no coordinator has met."""
    pool = WorkerPool()
    pool.addresses(1)
    yield pool
    pool.stop()


@pytest.fixture
def worker(own_pool: WorkerPool, model: Model) -> Iterator[Worker]:
    """An idle worker; afterwards it must be in health and do its work."""
    (address,) = own_pool.addresses(1)
    with grpc.insecure_channel(address) as channel:
        led = Worker(address, shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel), model)
        led.leave()
        yield led
        check_health(address)
        led.make_ready()
        first, second = led.execute(
            step(1, new=[sequence(1, PROMPT)], chunks=[chunk(1, 3, [7])]),
            step(2, chunks=[chunk(1, 1)]),
        )
        assert [*first.token_ids, *second.token_ids] == model.expected[:2]
        led.leave()


def step(
    step_id: int,
    *,
    epoch: int = 0,
    new: Sequence[_worker.NewSequence] = (),
    chunks: Sequence[_worker.ScheduledChunk] = (),
) -> _worker.ExecuteStepsRequest:
    return _worker.ExecuteStepsRequest(
        epoch=epoch, step_id=step_id, new_sequences=new, chunks=chunks
    )


def sequence(
    sequence_id: int, token_ids: Sequence[int], num_prompt_tokens: int | None = None
) -> _worker.NewSequence:
    return _worker.NewSequence(
        sequence_id=sequence_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=_worker.StepSampling(temperature=0, top_p=1, repetition_penalty=1),
    )


def chunk(
    sequence_id: int, num_tokens: int, new_block_ids: Sequence[int] = ()
) -> _worker.ScheduledChunk:
    return _worker.ScheduledChunk(
        sequence_id=sequence_id, num_tokens=num_tokens, new_block_ids=new_block_ids
    )


class TestAWorkerOutOfOrder:
    def test_nothing_goes_before_joining(self, worker: Worker) -> None:
        for call in (worker.load, worker.allocate, worker.compute):
            for epoch in (0, worker.epoch, worker.epoch + 1):
                info = refusal(
                    partial(call, epoch=epoch),
                    "FAILED_PRECONDITION",
                    f"epoch = {epoch}",
                    "there is no group",
                )
                assert info.reason == "STALE_EPOCH"
        refusal(lambda: worker.execute(step(1)), "FAILED_PRECONDITION", "there is no group")
        assert worker.state == "IDLE"

    def test_nothing_goes_before_loading(self, worker: Worker) -> None:
        worker.join()
        for call in (worker.allocate, worker.compute, lambda: worker.execute(step(1))):
            refusal(call, "FAILED_PRECONDITION", "the worker is joined")
        assert worker.state == "JOINED"

    def test_no_step_goes_before_the_cache(self, worker: Worker) -> None:
        worker.join()
        worker.load()
        refusal(lambda: worker.execute(step(1)), "FAILED_PRECONDITION", "is loaded", "it ready")
        assert worker.state == "LOADED"

    def test_a_second_load_is_refused(self, worker: Worker) -> None:
        worker.join()
        held = worker.load().weight_bytes
        refusal(worker.load, "FAILED_PRECONDITION", "the worker is loaded", "needs it joined")
        worker.allocate()
        refusal(worker.load, "FAILED_PRECONDITION", "the worker is ready", "needs it joined")
        described = worker.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        assert (worker.state, described.weight_bytes) == ("READY", held)

    def test_every_call_of_another_epoch_is_refused(self, worker: Worker) -> None:
        worker.make_ready()
        worker.make_ready()  # so that there was an epoch before: 0 is none
        for epoch in (worker.epoch - 1, worker.epoch + 1):
            for call in (
                partial(worker.load, epoch=epoch),
                partial(worker.allocate, epoch=epoch),
                partial(worker.compute, epoch=epoch),
                partial(worker.abort, epoch=epoch),
                partial(worker.execute, step(1, epoch=epoch)),
            ):
                info = refusal(
                    call, "FAILED_PRECONDITION", f"epoch = {epoch}", f"is {worker.epoch}"
                )
                assert info.reason == "STALE_EPOCH"
        assert worker.state == "READY"

    def test_leaving_no_group_is_no_error(self, worker: Worker) -> None:
        worker.abort(epoch=12345)
        assert worker.state == "IDLE"


class TestJoining:
    def test_an_epoch_that_nothing_could_follow(self, worker: Worker) -> None:
        request = _worker.JoinGroupRequest(
            epoch=2**64 - 1, size=1, transport=_worker.TRANSPORT_SINGLE
        )
        refusal(lambda: worker.stub.JoinGroup(request, timeout=5), "INVALID_ARGUMENT", "epoch")

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"rank": 1}, ("rank = 1", "size is 1")),
            ({"rank": 7, "size": 2}, ("rank = 7", "size is 2")),
            ({"size": 0}, ("rank = 0", "size is 0")),
            ({"size": 2}, ("transport = 'single'", "size is 2")),
            ({"transport": 0}, ("transport = 0",)),
            ({"transport": UNKNOWN_TRANSPORT}, ("transport = 9",)),
            ({"timeout_s": NAN}, ("timeout_s = nan",)),
            ({"timeout_s": INF}, ("timeout_s = inf",)),
            ({"timeout_s": -1.0}, ("timeout_s = -1.0",)),
            (
                {"size": 2, "transport": 2, "communicator_id": b"colrow-../../etc"},
                ("communicator_id",),
            ),
            ({"size": 2, "transport": 2, "communicator_id": b"\xff\x00"}, ("communicator_id",)),
            (
                {"size": 2, "rank": 1, "transport": 3, "communicator_id": b"nowhere"},
                ("communicator_id",),
            ),
            (
                {"size": 2, "rank": 1, "transport": 3, "communicator_id": b"127.0.0.1:99999"},
                ("communicator_id",),
            ),
        ],
        ids=str,
    )
    def test_a_group_that_can_not_be(
        self, fields: dict[str, Any], words: Sequence[str], worker: Worker
    ) -> None:
        refusal(lambda: worker.join(**fields), "INVALID_ARGUMENT", *words)
        assert worker.state == "IDLE"

    def test_an_epoch_that_has_been(self, worker: Worker) -> None:
        worker.join()
        worker.abort()
        for epoch in (worker.epoch, worker.epoch - 1, 0):
            info = refusal(
                partial(worker.join, epoch=epoch),
                "FAILED_PRECONDITION",
                f"epoch = {epoch}",
                f"seen epoch {worker.epoch}",
            )
            assert info.reason == "STALE_EPOCH"

    def test_a_group_beside_another(self, worker: Worker) -> None:
        worker.join()
        now = worker.epoch
        refusal(
            lambda: worker.join(), "FAILED_PRECONDITION", f"the group of epoch {now}", "abort it"
        )
        assert worker.state == "JOINED"

    def test_peers_of_a_group_that_has_none(self, worker: Worker) -> None:
        request = _worker.ConnectPeersRequest(peer_memories=[b""], timeout_s=1.0)
        refusal(
            lambda: worker.stub.ConnectPeers(request, timeout=5), "FAILED_PRECONDITION", "epoch = 0"
        )
        worker.join()
        request.epoch = worker.epoch
        refusal(
            lambda: worker.stub.ConnectPeers(request, timeout=5),
            "FAILED_PRECONDITION",
            "transport is single, not peer",
        )

    @pytest.mark.parametrize("transport", [4, 5], ids=["nccl", "peer"])
    def test_a_transport_of_gpus_on_a_cpu(self, transport: int, worker: Worker) -> None:
        refusal(
            lambda: worker.join(transport=transport, size=2, communicator_id=b"0" * 140),
            "INVALID_ARGUMENT",
            "worker is on cpu",
        )

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
    @pytest.mark.parametrize("transport", [4, 5], ids=["nccl", "peer"])
    def test_an_id_of_gpus_from_a_cpu(self, transport: int, worker: Worker) -> None:
        info = refusal(
            lambda: worker.join(transport=transport, size=2), "UNAVAILABLE", "without CUDA; install"
        )
        assert info.reason == "COMMUNICATOR_FAILED"
        assert worker.state == "IDLE"

    @pytest.mark.parametrize("transport", [2, 3], ids=["shm", "gloo"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_peer_that_never_comes_is_named_in_time(
        self, rank: int, transport: int, worker: Worker
    ) -> None:
        """Meanwhile the worker answers; afterwards it joins another group."""
        group = {"rank": rank, "size": 3, "transport": transport, "timeout_s": 1.0}
        if transport == 2 or rank == 0:
            communicator_id = worker.join(**group).communicator_id
        else:
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                communicator_id = f"127.0.0.1:{unused.getsockname()[1]}".encode()
        missing = "ranks 1, 2" if rank == 0 else "rank 0"
        began = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            joining = threads.submit(
                refusal,
                lambda: worker.join(communicator_id=communicator_id, **group),
                "DEADLINE_EXCEEDED",
                f"join: {missing} not there within 1 s",
            )
            while not joining.done():
                check_health(worker.address)
                assert worker.state == "IDLE"
                time.sleep(0.1)
        assert joining.result().reason == "PEER_TIMEOUT"
        assert 1.0 <= time.monotonic() - began < 6.0


class TestLoading:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model_path": "/nowhere"}, ("model_path = '/nowhere'", "no folder")),
            ({"model_path": "/" + "x" * 5000}, ("model_path = '/xxx", "no folder")),
            (
                {"config_json": '{"architectures": ["LlamaForCausalLM"]}'},
                ("config_json", "no model can be built of it", "KeyError"),
            ),
            (
                {
                    "config_json": '{"architectures": ["LlamaForCausalLM"], "hidden_size": 0.5, '
                    '"num_hidden_layers": "x", "num_attention_heads": 1}'
                },
                ("config_json", "no model can be built of it", "TypeError"),
            ),
            ({"config_json": "{"}, ("config_json = '{'",)),
            ({"config_json": "[" * 100_000}, ("config_json",)),
            ({"config_json": "[]"}, ("config_json = '[]'", "no JSON object")),
            (
                {"config_json": '{"architectures": ["BertModel"]}'},
                ("config.architectures = 'BertModel'", *FAMILIES),
            ),
            ({"config_json": '{"architectures": []}'}, ("config.architectures = None",)),
            ({"data_type": tensor_pb2.DATA_TYPE_INT64}, ("data_type = 4",)),
            ({"data_type": 0}, ("data_type = 0",)),
            ({"ranks": []}, ("ranks = 0", "1 ranks")),
            ({"parameters": []}, ("checkpoint", "unexpected")),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_a_shard_that_can_not_be(
        self, fields: dict[str, Any], words: Sequence[str], worker: Worker
    ) -> None:
        worker.join()
        refusal(lambda: worker.load(**fields), "INVALID_ARGUMENT", *words)
        assert worker.state == "JOINED"
        worker.load()
        assert worker.state == "LOADED"

    def test_a_cache_of_nothing(self, worker: Worker) -> None:
        worker.join()
        worker.load()
        refusal(lambda: worker.allocate(num_blocks=0), "INVALID_ARGUMENT", "num_blocks = 0")
        refusal(lambda: worker.allocate(block_size=0), "INVALID_ARGUMENT", "block_size = 0")
        assert worker.state == "LOADED"

    @pytest.mark.parametrize("block_size", [2**20, 2**32 - 1])
    def test_a_cache_beyond_all_memory(self, block_size: int, worker: Worker) -> None:
        worker.join()
        worker.load()
        refusal(
            lambda: worker.allocate(num_blocks=2**32 - 1, block_size=block_size),
            "RESOURCE_EXHAUSTED",
            "num_blocks = 4294967295",
            "bytes",
            "cpu is out of memory (weights ",
        )
        assert worker.state == "LOADED"
        worker.allocate()


class TestSteps:
    @pytest.mark.parametrize("step_ids", [(0,), (2,), (1, 1), (1, 3), (1, 2, 1)])
    def test_a_gap_in_step_ids_is_refused(self, step_ids: Sequence[int], worker: Worker) -> None:
        worker.make_ready()
        answered: list[int] = []

        def run() -> None:
            requests = [step(number, epoch=worker.epoch) for number in step_ids]
            for response in worker.stub.ExecuteSteps(iter(requests), timeout=20):
                answered.append(response.step_id)

        wanted = len(step_ids)
        info = refusal(
            run, "FAILED_PRECONDITION", f"step_id = {step_ids[-1]}", f"the next step is {wanted}"
        )
        assert info.reason == "STEP_GAP"
        assert answered == list(step_ids[:-1]), "steps before the gap are answered"

    @pytest.mark.parametrize(
        ("new", "chunks", "words"),
        [
            ([], [chunk(9, 1, [0])], ("chunks[9]", "is not known")),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 4, [0])],
                ("chunks[2].num_tokens = 4", "3 tokens are left"),
            ),
            ([sequence(2, PROMPT)], [chunk(2, 0, [0])], ("chunks[2].num_tokens = 0",)),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 3, [8])],
                ("chunks[2].new_block_ids = 8", "8 blocks"),
            ),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 3)],
                ("chunks[2].new_block_ids = []", "3 tokens need more blocks"),
            ),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 1, [0]), chunk(2, 2)],
                ("chunks[2]", "two chunks in one step"),
            ),
            (
                [sequence(2, [5, VOCAB_SIZE])],
                [chunk(2, 2, [0])],
                ("new_sequences[2].token_ids = 331", "331 ids"),
            ),
            ([sequence(1, PROMPT)], [], ("new_sequences[1]", "is known already")),
            ([sequence(2, PROMPT), sequence(2, PROMPT)], [], ("new_sequences[2]", "known already")),
            ([sequence(2, [])], [], ("new_sequences[2].num_prompt_tokens = 0", "0 tokens")),
            ([sequence(2, PROMPT, 4)], [], ("new_sequences[2].num_prompt_tokens = 4", "3 tokens")),
        ],
        ids=[
            "unknown sequence",
            "chunk too long",
            "empty chunk",
            "block outside the cache",
            "too few blocks",
            "two chunks",
            "token outside the vocabulary",
            "known sequence",
            "new twice",
            "no tokens",
            "more prompt than tokens",
        ],
    )
    def test_a_step_that_does_not_fit_is_refused_before_it_runs(
        self,
        new: Sequence[_worker.NewSequence],
        chunks: Sequence[_worker.ScheduledChunk],
        words: Sequence[str],
        worker: Worker,
    ) -> None:
        worker.make_ready()
        tokens = worker.execute(
            step(1, new=[sequence(1, PROMPT)], chunks=[chunk(1, 3, [7])]),
        )[0].token_ids
        refusal(lambda: worker.execute(step(2, new=new, chunks=chunks)), "INVALID_ARGUMENT", *words)
        assert worker.state == "READY"
        # The sequence that was there is none the worse for it.
        (after,) = worker.execute(step(3, chunks=[chunk(1, 1)]))
        assert [*tokens, *after.token_ids] == worker.model.expected[:2]


def test_errors_of_the_small_client_are_the_contracts(own_pool: WorkerPool) -> None:
    """A code, a reason and what it is about, free of gRPC."""
    (address,) = own_pool.addresses(1)
    with Colrow(address) as client, pytest.raises(ServiceError) as raised:
        client.model()  # a worker serves no InferenceService
    assert raised.value.code == "UNIMPLEMENTED"
    with grpc.insecure_channel(address) as channel:
        stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failed:
            stub.JoinGroup(_worker.JoinGroupRequest(transport=UNKNOWN_TRANSPORT), timeout=5)
    error = error_of(failed.value)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert error.metadata == {"field": "transport", "value": "9"}
