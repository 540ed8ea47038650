"""What the tests of refusals share: how an error of ours looks, and a small model to go on with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from colrow.errors import DOMAIN
from colrow.v1 import tensor_pb2
from coordinator.convert import tensors
from tests import checkpoints

VOCAB_SIZE = 331
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


def build_model(folder: Path) -> Model:
    checkpoints.build("smollm2", folder)
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


def tokens_of(pieces: Any) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def floats(*shape: int) -> tensor_pb2.Tensor:
    return tensors.tensor_message(np.zeros(shape, dtype=np.float32))


def ids(*values: int) -> tensor_pb2.Tensor:
    return tensors.tensor_message(np.array(values, dtype=np.int64))
