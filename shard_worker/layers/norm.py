"""Normalisation over the last dimension. Weights are whole on every rank."""

import torch.nn.functional as F
from torch import Tensor

from shard_worker.sharding import ShardTensors


class RMSNorm:
    """x / rms(x) · weight (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, tensors: ShardTensors, module: str, eps: float) -> None:
        self.weight = tensors.take(f"{module}.weight")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]"""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm:
    """(x - mean) / deviation · weight + bias (Ba et al., 2016)."""

    def __init__(self, tensors: ShardTensors, module: str, eps: float) -> None:
        self.weight = tensors.take(f"{module}.weight")
        self.bias = tensors.take(f"{module}.bias")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
