"""Rotary position embedding (Su et al., RoFormer, 2021), in the half-rotated layout of Hugging Face."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from colrow.errors import InvalidArgument
from shard_worker import kernels
from shard_worker.forward_batch import ForwardBatch


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a config.json, or what older files say in `rope_theta`, `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    defaults = {
        "rope_type": given.get("type", "default"),  # what transformers before 4.43 wrote
        "rope_theta": config.get("rope_theta") or 10000.0,
        "original_max_position_embeddings": config.get("max_position_embeddings"),
    }
    return defaults | {key: value for key, value in given.items() if value is not None}


def inverse_frequencies(settings: Mapping[str, Any], head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians a position, with the scaling that the model was trained for."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (settings["rope_theta"] ** exponents)
    match settings["rope_type"]:
        case "default":
            return inverse
        case "linear":
            return inverse / settings["factor"]
        case "llama3":
            return _llama3(inverse, settings)
        case other:
            raise InvalidArgument("rope_type", other, "is none of default, linear, llama3")


def _llama3(inverse: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    factor = settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    context = settings["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    share = (context / wavelength - low) / (high - low)
    blended = (1 - share) * inverse / factor + share * inverse
    stretched = torch.where(wavelength > context / low, inverse / factor, blended)
    return torch.where(wavelength < context / high, inverse, stretched)


class RotaryEmbedding:
    """Turns positions into rotations, which `Attention` applies to its queries and keys."""

    def __init__(
        self, config: Mapping[str, Any], head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.inverse = inverse_frequencies(rope_settings(config), head_dim).to(device)
        self.dtype = dtype

    def __call__(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """-> cos and signed sin of the batch's positions, [num_tokens, 1, head_dim] each"""
        return batch.derive("rotation", lambda: self._rotation(batch.positions))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float().unsqueeze(-1) * self.inverse
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return (
            torch.cat((cos, cos), dim=-1).unsqueeze(1),
            torch.cat((-sin, sin), dim=-1).unsqueeze(1),
        )


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """[num_tokens, heads, head_dim] -> the same, each head's pairs (i, i + head_dim / 2) rotated

    On a GPU in place. There it serves attention without a KV cache: what is cached is rotated by the
    kernel that writes it.
    """
    cos, signed_sin = rotation
    if x.is_cuda:
        return kernels.rotary.rotate_(x, cos, signed_sin)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), signed_sin)
