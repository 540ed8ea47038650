"""Model families, a file each. A family builds its layers from this rank's tensors and runs them."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from colrow.errors import InvalidArgument, ServiceError
from shard_worker.forward_batch import ForwardBatch
from shard_worker.layers.embedding import VocabParallelLMHead
from shard_worker.models.gpt2 import GPT2
from shard_worker.models.llama import Llama
from shard_worker.models.mistral import Mistral
from shard_worker.models.qwen2 import Qwen2
from shard_worker.models.qwen3 import Qwen3
from shard_worker.sharding import ShardTensors


class Model(Protocol):
    """A causal language model on this rank's shard."""

    lm_head: VocabParallelLMHead
    num_layers: int
    num_kv_heads: int
    """KV heads of this rank."""
    head_dim: int
    max_positions: int | None
    """Tokens of the longest sequence; None where any position can be computed."""

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """-> [num_tokens, hidden], normalised: what the LM head takes"""
        ...


FAMILIES: dict[str, Callable[[Mapping[str, Any], ShardTensors], Model]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "GPT2LMHeadModel": GPT2,
}
"""By the `architectures` entry of a config.json."""


def build(config: Mapping[str, Any], tensors: ShardTensors) -> Model:
    """The model of a config.json, its tensors taken and still empty."""
    (architecture, *_) = config.get("architectures") or [None]
    if architecture not in FAMILIES:
        raise InvalidArgument(
            "config.architectures", architecture, f"supported are {', '.join(sorted(FAMILIES))}"
        )
    try:
        model = FAMILIES[architecture](config, tensors)
    except (ServiceError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        # A coordinator has checked its config; this one has not.
        problem = f"no model can be built of it: {type(error).__name__}: {error}"
        raise InvalidArgument("config_json", dict(config), problem) from error
    tensors.check_all_taken()
    return model


__all__ = ["FAMILIES", "Model", "build"]
