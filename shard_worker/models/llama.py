"""Llama 2 and 3 (Touvron et al., 2023; Llama Team, 2024). Mistral and Qwen vary it in their files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shard_worker.forward_batch import ForwardBatch
from shard_worker.layers.activation import silu_mul
from shard_worker.layers.attention import Attention
from shard_worker.layers.embedding import VocabParallelEmbedding, VocabParallelLMHead
from shard_worker.layers.linear import ColumnParallelLinear, RowParallelBlock, RowParallelLinear
from shard_worker.layers.norm import RMSNorm
from shard_worker.layers.rotary import RotaryEmbedding
from shard_worker.sharding import ShardTensors


def rms_norm_eps(config: Mapping[str, Any]) -> float:
    """What is added to the mean square; the default is that of transformers."""
    return config.get("rms_norm_eps", 1e-6)


class LlamaAttention(RowParallelBlock):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: ShardTensors,
        prefix: str,
        attention: Attention,
        rotary: RotaryEmbedding,
    ) -> None:
        self.attention = attention
        self.rotary = rotary
        self.qkv_proj = ColumnParallelLinear(tensors, prefix, ("q_proj", "k_proj", "v_proj"))
        self.o_proj = self.last = RowParallelLinear(tensors, prefix, "o_proj")

    def heads(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden] -> [num_tokens, q and k and v heads, head_dim], not rotated yet"""
        return self.qkv_proj(x).unflatten(-1, (-1, self.attention.head_dim))

    def partial(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> this rank's heads' term of [num_tokens, hidden]"""
        return self.o_proj.partial(self.attention(self.heads(x), batch, self.rotary(batch)))


class LlamaMLP(RowParallelBlock):
    """down(silu(gate x) · up x) (Shazeer, GLU Variants, 2020)."""

    def __init__(self, tensors: ShardTensors, prefix: str) -> None:
        self.gate_up_proj = ColumnParallelLinear(tensors, prefix, ("gate_proj", "up_proj"))
        self.down_proj = self.last = RowParallelLinear(tensors, prefix, "down_proj")

    def partial(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> this rank's neurons' term of [num_tokens, hidden]"""
        return self.down_proj.partial(silu_mul(self.gate_up_proj(x)))


class LlamaLayer:
    """Attention, then MLP, each on the normalised residual stream, to which its output is added."""

    attention_type: type[LlamaAttention] = LlamaAttention

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: ShardTensors,
        prefix: str,
        attention: Attention,
        rotary: RotaryEmbedding,
    ) -> None:
        eps = rms_norm_eps(config)
        self.input_layernorm = RMSNorm(tensors, f"{prefix}.input_layernorm", eps)
        self.self_attn = self.attention_type(
            config, tensors, f"{prefix}.self_attn", attention, rotary
        )
        self.post_attention_layernorm = RMSNorm(tensors, f"{prefix}.post_attention_layernorm", eps)
        self.mlp = LlamaMLP(tensors, f"{prefix}.mlp")

    def __call__(
        self, x: Tensor, residual: Tensor, next_norm: RMSNorm, batch: ForwardBatch
    ) -> Tensor:
        """The stream normalised for this layer -> the same for the next; the stream IN PLACE
        (all [num_tokens, hidden])"""
        x = self.self_attn.add_to(residual, self.post_attention_layernorm, x, batch)
        return self.mlp.add_to(residual, next_norm, x, batch)


class LlamaModel:
    """Embedding, layers, final norm; named as in the checkpoint."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: ShardTensors,
        layer_type: type[LlamaLayer],
        head_dim: int,
        window: int | None,
    ) -> None:
        self.embed_tokens = VocabParallelEmbedding(tensors, "model.embed_tokens")
        rotary = RotaryEmbedding(config, head_dim, tensors.dtype, tensors.device)
        self.layers = [
            layer_type(
                config,
                tensors,
                f"model.layers.{layer}",
                Attention(
                    layer=layer,
                    num_q_heads=tensors.layout.num_units("q_heads"),
                    num_kv_heads=tensors.layout.num_units("kv_heads"),
                    head_dim=head_dim,
                    window=window,
                ),
                rotary,
            )
            for layer in range(config["num_hidden_layers"])
        ]
        self.norm = RMSNorm(tensors, "model.norm", rms_norm_eps(config))

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """-> [num_tokens, hidden]"""
        residual = self.embed_tokens(batch.token_ids)
        norms = [*(layer.input_layernorm for layer in self.layers), self.norm]
        x = norms[0](residual)
        for layer, next_norm in zip(self.layers, norms[1:], strict=True):
            x = layer(x, residual, next_norm, batch)
        return x


class Llama:
    """`LlamaForCausalLM`: Llama 2, 3, 3.1, 3.2, SmolLM2."""

    layer_type = LlamaLayer

    def __init__(self, config: Mapping[str, Any], tensors: ShardTensors) -> None:
        self.num_layers = config["num_hidden_layers"]
        self.max_positions: int | None = None
        self.num_kv_heads = tensors.layout.num_units("kv_heads")
        self.head_dim = (
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        )
        self.model = LlamaModel(
            config, tensors, self.layer_type, self.head_dim, self.sliding_window(config)
        )
        tied = not tensors.has("lm_head.weight")
        self.lm_head = VocabParallelLMHead(
            tensors, "lm_head", tied_to=self.model.embed_tokens if tied else None
        )

    @staticmethod
    def sliding_window(config: Mapping[str, Any]) -> int | None:
        """How many tokens back attention reaches, itself included; None: all."""
        return None

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """-> [num_tokens, hidden]"""
        return self.model(batch)
