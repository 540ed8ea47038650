"""Qwen3, dense (Qwen Team, 2025): Llama whose query and key heads are normalised before rotation."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shard_worker.layers.attention import Attention
from shard_worker.layers.norm import RMSNorm
from shard_worker.layers.rotary import RotaryEmbedding
from shard_worker.models.llama import Llama, LlamaAttention, LlamaLayer, rms_norm_eps
from shard_worker.sharding import ShardTensors


class Qwen3Attention(LlamaAttention):
    """Each head is normalised by itself, so the split over ranks does not touch it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: ShardTensors,
        prefix: str,
        attention: Attention,
        rotary: RotaryEmbedding,
    ) -> None:
        super().__init__(config, tensors, prefix, attention, rotary)
        self.q_norm = RMSNorm(tensors, f"{prefix}.q_norm", rms_norm_eps(config))
        self.k_norm = RMSNorm(tensors, f"{prefix}.k_norm", rms_norm_eps(config))

    def heads(self, x: Tensor) -> Tensor:
        heads = super().heads(x)
        q, k, _ = self.attention.split(heads)
        self.q_norm.heads_(q)
        self.k_norm.heads_(k)
        return heads


class Qwen3Layer(LlamaLayer):
    attention_type = Qwen3Attention


class Qwen3(Llama):
    """`Qwen3ForCausalLM`."""

    layer_type = Qwen3Layer
