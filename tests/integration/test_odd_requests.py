"""What a worker could not do ends no epoch: odd requests are served or refused, and others go on.

On a small model whose vocabulary has fewer ids than a request may name of the likeliest tokens, and not
the id that its config names as the end of a text.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
import transformers

from client import Colrow
from colrow.rpc import error_of
from colrow.v1 import inference_service_pb2, sampling_pb2
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

pytestmark = pytest.mark.timeout(120)

VOCAB_SIZE = 64
CONTEXT = 1024
NUM_TOKENS = 600
BARRED = 1000
"""An end of text that the vocabulary does not have."""
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def running(
    worker_pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=72,
        intermediate_size=104,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=[2, BARRED],
    )
    path = tmp_path_factory.mktemp("small_vocabulary")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    checkpoints.add_tokenizer(path, "")
    with cluster(worker_pool, path, 2, "--served-model-name", "small") as started:
        yield started


def stream(client: Colrow) -> list[int]:
    """A long text, token by token."""
    request = inference_service_pb2.GenerateRequest(
        token_ids=inference_service_pb2.TokenIds(ids=PROMPT),
        sampling=sampling_pb2.SamplingParams(temperature=0.8, seed=3),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    return [
        token
        for response in client.inference.Generate(request, timeout=60)
        for token in response.token_ids
    ]


def post(running: RunningCluster, **settings: Any) -> tuple[int, Any]:
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 4} | settings
    request = urllib.request.Request(
        f"{running.http_url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60.0) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# To the field that a refusal names; None where the request is served.
ODD: list[tuple[dict[str, Any], str | None]] = [
    ({"top_p": 1e-50}, None),
    ({"top_p": 1e-45, "temperature": 1e-45}, None),
    ({"repetition_penalty": 1e-50}, None),
    ({"repetition_penalty": 1e-50, "temperature": 0}, None),
    ({"temperature": 1e-50}, None),
    ({"min_tokens": 4}, None),
    ({"min_tokens": 4, "stop_token_ids": [*range(VOCAB_SIZE)]}, None),
    ({"logprobs": VOCAB_SIZE}, None),
    ({"top_p": 0}, "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop_token_ids": [BARRED], "min_tokens": 2}, "stop_token_ids"),
    ({"logit_bias": {str(BARRED): 1}}, "logit_bias"),
    ({"logprobs": VOCAB_SIZE + 1}, "logprobs"),
    ({"prompt_logprobs": 100}, "prompt_logprobs"),
]


def test_odd_requests_leave_a_stream_beside_them_alone(running: RunningCluster) -> None:
    alone = stream(running.client)
    epoch = running.client.cluster().epoch
    with ThreadPoolExecutor(1) as threads:
        beside = threads.submit(stream, running.client)
        for settings, refused in ODD:
            status, answer = post(running, **settings)
            if refused is None:
                assert (status, answer["usage"]["completion_tokens"]) == (200, 4), settings
            else:
                assert (status, answer["error"]["param"]) == (400, refused), settings
        assert not beside.done(), "it ran beside all of them"
        assert beside.result() == alone
    assert len(alone) == NUM_TOKENS
    now = running.client.cluster()
    assert (now.epoch, now.recoveries) == (epoch, 0)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        # What a client's float32 can't hold has become 0 before it is here.
        ({"sampling": sampling_pb2.SamplingParams(top_p=1e-50)}, "sampling.top_p"),
        (
            {"sampling": sampling_pb2.SamplingParams(repetition_penalty=1e-50)},
            "sampling.repetition_penalty",
        ),
        ({"logprobs": VOCAB_SIZE + 1}, "logprobs"),
        ({"prompt_logprobs": VOCAB_SIZE + 1}, "prompt_logprobs"),
    ],
)
def test_odd_calls_are_refused_by_name(
    running: RunningCluster, settings: dict[str, Any], field: str
) -> None:
    request = inference_service_pb2.GenerateRequest(
        token_ids=inference_service_pb2.TokenIds(ids=PROMPT), max_tokens=4, **settings
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(running.client.inference.Generate(request, timeout=10))
    error = error_of(caught.value)
    assert (error.code, error.metadata["field"]) == ("INVALID_ARGUMENT", field)
    assert running.client.cluster().recoveries == 0


def test_scores_name_no_more_tokens_than_there_are(running: RunningCluster) -> None:
    sequences = [inference_service_pb2.TokenIds(ids=PROMPT)]
    request = inference_service_pb2.ScoreRequest(sequences=sequences, top_logprobs=VOCAB_SIZE)
    (scores,) = running.client.inference.Score(request, timeout=10).sequences
    assert {len(token.top_token_ids) for token in scores.tokens} == {VOCAB_SIZE}
    request.top_logprobs += 1
    with pytest.raises(grpc.RpcError) as caught:
        running.client.inference.Score(request, timeout=10)
    assert error_of(caught.value).code == "INVALID_ARGUMENT"
