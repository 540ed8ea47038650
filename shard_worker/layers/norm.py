"""Normalisation over the last dimension. Weights are whole on every rank."""

import torch.nn.functional as F
from torch import Tensor

from shard_worker import kernels
from shard_worker.sharding import ShardTensors


class RMSNorm:
    """x / rms(x) · weight (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, tensors: ShardTensors, module: str, eps: float) -> None:
        self.weight = tensors.take(f"{module}.weight")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]"""
        if x.is_cuda:
            return kernels.norm.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def heads_(self, x: Tensor) -> Tensor:
        """[num_tokens, heads, head_dim] -> x itself, each head normalised, IN PLACE"""
        if x.is_cuda:
            return kernels.norm.rms_norm_heads_(x, self.weight, self.eps)
        return x.copy_(self(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, IN PLACE -> the sum, normalised: [num_tokens, features]"""
        if x.is_cuda:
            return kernels.norm.add_rms_norm(x, residual, self.weight, self.eps)
        return self(residual.add_(x))


class LayerNorm:
    """(x - mean) / deviation · weight + bias (Ba et al., 2016)."""

    def __init__(self, tensors: ShardTensors, module: str, eps: float) -> None:
        self.weight = tensors.take(f"{module}.weight")
        self.bias = tensors.take(f"{module}.bias")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
