"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, one fused q, k, v projection.

Its checkpoints keep linear weights as [inputs, outputs] (`Conv1D`), hence `transposed`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from shard_worker.forward_batch import ForwardBatch
from shard_worker.layers.attention import Attention
from shard_worker.layers.embedding import Embedding, VocabParallelEmbedding, VocabParallelLMHead
from shard_worker.layers.linear import ColumnParallelLinear, RowParallelBlock, RowParallelLinear
from shard_worker.layers.norm import LayerNorm
from shard_worker.sharding import ShardTensors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class GPT2Attention(RowParallelBlock):
    """Multi-head attention; q, k and v of all heads lie side by side in `c_attn`."""

    def __init__(self, tensors: ShardTensors, prefix: str, attention: Attention) -> None:
        self.attention = attention
        self.c_attn = ColumnParallelLinear(tensors, prefix, ("c_attn",), transposed=True)
        self.c_proj = self.last = RowParallelLinear(tensors, prefix, "c_proj", transposed=True)

    def partial(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> this rank's heads' term of [num_tokens, hidden]"""
        heads = self.c_attn(x).unflatten(-1, (-1, self.attention.head_dim))
        return self.c_proj.partial(self.attention(heads, batch))


class GPT2MLP(RowParallelBlock):
    """proj(activation(fc x))."""

    def __init__(self, config: Mapping[str, Any], tensors: ShardTensors, prefix: str) -> None:
        self.c_fc = ColumnParallelLinear(tensors, prefix, ("c_fc",), transposed=True)
        self.c_proj = self.last = RowParallelLinear(tensors, prefix, "c_proj", transposed=True)
        self.activation = ACTIVATIONS[config.get("activation_function", "gelu_new")]

    def partial(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> this rank's neurons' term of [num_tokens, hidden]"""
        return self.c_proj.partial(self.activation(self.c_fc(x)))


class GPT2Layer:
    """Attention, then MLP, each normalised before and added to the residual stream after."""

    def __init__(
        self, config: Mapping[str, Any], tensors: ShardTensors, prefix: str, attention: Attention
    ) -> None:
        eps = config.get("layer_norm_epsilon", 1e-5)
        self.ln_1 = LayerNorm(tensors, f"{prefix}.ln_1", eps)
        self.attn = GPT2Attention(tensors, f"{prefix}.attn", attention)
        self.ln_2 = LayerNorm(tensors, f"{prefix}.ln_2", eps)
        self.mlp = GPT2MLP(config, tensors, f"{prefix}.mlp")

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden] -> [num_tokens, hidden]"""
        x = x + self.attn(self.ln_1(x), batch)
        return x + self.mlp(self.ln_2(x), batch)


class GPT2Model:
    """Token and position embedding, layers, final norm; named as in the checkpoint."""

    def __init__(self, config: Mapping[str, Any], tensors: ShardTensors, head_dim: int) -> None:
        self.wte = VocabParallelEmbedding(tensors, "transformer.wte")
        self.wpe = Embedding(tensors, "transformer.wpe")
        self.h = [
            GPT2Layer(
                config,
                tensors,
                f"transformer.h.{layer}",
                Attention(
                    layer=layer,
                    num_q_heads=tensors.layout.num_units("q_heads"),
                    num_kv_heads=tensors.layout.num_units("kv_heads"),
                    head_dim=head_dim,
                ),
            )
            for layer in range(config["n_layer"])
        ]
        self.ln_f = LayerNorm(tensors, "transformer.ln_f", config.get("layer_norm_epsilon", 1e-5))

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """-> [num_tokens, hidden]"""
        x = self.wte(batch.token_ids) + self.wpe(batch.positions)
        for layer in self.h:
            x = layer(x, batch)
        return self.ln_f(x)


class GPT2:
    """`GPT2LMHeadModel`."""

    def __init__(self, config: Mapping[str, Any], tensors: ShardTensors) -> None:
        self.num_layers = config["n_layer"]
        positions = tensors.layout.parameters["transformer.wpe.weight"]
        self.max_positions: int | None = positions.shape[0]
        self.num_kv_heads = tensors.layout.num_units("kv_heads")
        self.head_dim = config["n_embd"] // config["n_head"]
        self.transformer = GPT2Model(config, tensors, self.head_dim)
        tied = not tensors.has("lm_head.weight")
        self.lm_head = VocabParallelLMHead(
            tensors, "lm_head", tied_to=self.transformer.wte if tied else None
        )

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """-> [num_tokens, hidden]"""
        return self.transformer(batch)
