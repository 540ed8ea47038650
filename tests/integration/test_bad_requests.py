"""A bad request gets a clear error and the right code; nothing is lost, and the server serves on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from client.grpc_client import array
from colrow.v1 import (
    control_service_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    sampling_pb2,
    tensor_pb2,
)
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster
from tests.refusals import (
    FAMILIES,
    NUM_TOKENS,
    PROMPT,
    VOCAB_SIZE,
    Model,
    check_health,
    floats,
    ids,
    refusal,
    tokens_of,
)

pytestmark = pytest.mark.timeout(60)

_inference = inference_service_pb2
_control = control_service_pb2

CONTEXT = checkpoints.CONTEXT


@pytest.fixture(scope="module")
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
        sampled(temperature=math.nan),
        "INVALID_ARGUMENT",
        ("sampling.temperature = nan",),
    ),
    "temperature infinite": (
        sampled(temperature=math.inf),
        "INVALID_ARGUMENT",
        ("sampling.temperature = inf",),
    ),
    "top_p 0": (sampled(top_p=0), "INVALID_ARGUMENT", ("sampling.top_p = 0.0", "(0, 1]")),
    "top_p above 1": (sampled(top_p=1.5), "INVALID_ARGUMENT", ("sampling.top_p = 1.5",)),
    "top_p negative": (sampled(top_p=-1), "INVALID_ARGUMENT", ("sampling.top_p = -1.0",)),
    "top_p NaN": (sampled(top_p=math.nan), "INVALID_ARGUMENT", ("sampling.top_p = nan",)),
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
        sampled(repetition_penalty=math.inf),
        "INVALID_ARGUMENT",
        ("sampling.repetition_penalty = inf",),
    ),
    "presence penalty too high": (
        sampled(presence_penalty=2.5),
        "INVALID_ARGUMENT",
        ("sampling.presence_penalty = 2.5", "[-2, 2]"),
    ),
    "frequency penalty NaN": (
        sampled(frequency_penalty=math.nan),
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
            _control.WatchClusterRequest(interval_s=math.nan), timeout=20
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
        plan(memory_weights=[math.nan, 1.0]),
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


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_next_is_answered(
    case: str, running: RunningCluster, model: Model
) -> None:
    call, code, words = BAD_REQUESTS[case]
    refusal(lambda: call(running), code, *words)
    check_health(running.target)
    good = running.client.generate(PROMPT, max_tokens=3, temperature=0, timeout_s=20)
    assert tokens_of(good) == model.expected[:3]


def test_an_error_names_field_and_value_for_programs(running: RunningCluster) -> None:
    info = refusal(lambda: sampled(top_p=2)(running), "INVALID_ARGUMENT")
    assert info.reason == "INVALID_FIELD"
    assert dict(info.metadata) == {"field": "sampling.top_p", "value": "2.0"}
    info = refusal(lambda: prompted(PROMPT, model="x")(running), "NOT_FOUND")
    assert info.reason == "UNKNOWN_MODEL"
    assert info.metadata["field"] == "model" and info.metadata["value"] == "x"


def test_bad_requests_do_no_harm_to_one_that_runs(running: RunningCluster, model: Model) -> None:
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
    method: str, data: bytes, running: RunningCluster
) -> None:
    with grpc.insecure_channel(running.target) as channel:
        call: Any = channel.unary_unary(f"/{method}")
        info = refusal(lambda: call(data, timeout=5), "INVALID_ARGUMENT", "request = ")
    assert info.reason == "INVALID_FIELD"


def test_an_oversized_message_is_refused(running: RunningCluster, model: Model) -> None:
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
def test_an_activation_of_nan_gives_nan(module: str, running: RunningCluster) -> None:
    features = 104 if module.endswith("down_proj") else 72
    activation = np.full((2, features), np.nan, dtype=np.float32)
    response = running.client.run_layer(module=module, activation=activation)
    assert np.isnan(array(response.output)).all()


def test_the_most_noise_is_answered(running: RunningCluster) -> None:
    assert running.client.run_layer(layer=0, num_tokens=4096).output.shape == [4096, 72]
