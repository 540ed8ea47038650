"""What comes between the two products of an MLP."""

import torch.nn.functional as F
from torch import Tensor

from shard_worker import kernels


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer, GLU Variants, 2020): [num_tokens, 2 · width] -> [num_tokens, width]"""
    if gate_up.is_cuda:
        return kernels.activation.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
