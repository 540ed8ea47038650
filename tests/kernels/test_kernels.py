"""Every kernel computes what plain torch does in float64, for every type and odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shard_worker import kernels
from tests.kernels.numbers import DEVICE, DTYPES, TOLERANCE, attend, error, large, normal

pytestmark = pytest.mark.timeout(300)  # the first call of a kernel compiles it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (7, 576), (3, 8192), (5, 12), (2, 97), (1, 1)])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    expected = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)
    assert error(kernels.norm.rms_norm(x, weight, 1e-5), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [128, 64, 12])
def test_rms_norm_heads_normalises_each_in_place(head_dim: int, dtype: torch.dtype) -> None:
    whole, weight = normal(5, 12, head_dim, dtype=dtype), normal(head_dim, dtype=dtype)
    before = whole.clone()
    x = whole[:, 2:9]
    assert kernels.norm.rms_norm_heads_(x, weight, 1e-5) is x
    expected = F.rms_norm(before[:, 2:9].double(), weight.shape, weight.double(), 1e-5)
    assert error(x, expected) < TOLERANCE[dtype]
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, 9:], before[:, 9:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (7, 576), (130, 72)])
def test_add_rms_norm_adds_in_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weight = normal(shape[1], dtype=dtype)
    total = residual + x
    out = kernels.norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    expected = F.rms_norm(total.double(), weight.shape, weight.double(), 1e-5)
    assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (9, 104), (3, 1025), (2, 97), (1, 1)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = normal(rows, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert error(kernels.activation.silu_mul(gate_up), F.silu(gate) * up) < TOLERANCE[dtype]


def rotation(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By any angles, as `RotaryEmbedding` gives it."""
    angles = torch.rand(num_tokens, 1, head_dim // 2, device=DEVICE) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """In float64."""
    first, second = x.double().chunk(2, -1)
    return x.double() * cos.double() + torch.cat((second, first), -1) * signed_sin.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(40, 128), (12, 64), (5, 12), (3, 8), (1, 2)])
def test_rotate_turns_heads_in_place(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    whole = normal(6, heads + 3, head_dim, dtype=dtype)
    before = whole.clone()
    cos, signed_sin = rotation(6, head_dim, dtype)
    x = whole[:, :heads]
    assert kernels.rotary.rotate_(x, cos, signed_sin) is x
    expected = rotated(before[:, :heads], cos, signed_sin)
    assert error(x, expected) < TOLERANCE[dtype]
    assert torch.equal(whole[:, heads:], before[:, heads:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"),
    [(32, 8, 128), (9, 3, 64), (6, 1, 96), (5, 5, 80), (3, 1, 12), (1, 1, 2)],
)
def test_rotate_and_write_turns_q_and_k_in_place_and_stores_k_and_v_at_slots(
    q_heads: int, kv_heads: int, head_dim: int, slot_type: torch.dtype, dtype: torch.dtype
) -> None:
    """Each token's heads lie among others. One token has no slot: it is rotated and not stored."""
    num_heads = q_heads + 2 * kv_heads
    whole = normal(4, num_heads + 3, head_dim, dtype=dtype)
    before = whole.clone()
    cos, signed_sin = rotation(4, head_dim, dtype)
    keys = torch.full((5, 4, kv_heads, head_dim), 7.0, device=DEVICE, dtype=dtype)
    values = keys.clone()
    slots = torch.tensor([17, -1, 0, 6], device=DEVICE, dtype=slot_type)
    kernels.rotary.rotate_and_write_(
        whole[:, 2 : num_heads + 2], cos, signed_sin, keys, values, slots
    )
    first_key, first_value, end = 2 + q_heads, 2 + q_heads + kv_heads, 2 + num_heads
    turned = whole[:, 2:first_value]
    assert error(turned, rotated(before[:, 2:first_value], cos, signed_sin)) < TOLERANCE[dtype]
    expected = before.clone()
    expected[:, 2:first_value] = turned
    assert torch.equal(whole, expected), "nothing else changes"
    expected_keys, expected_values = torch.full_like(keys, 7.0), torch.full_like(values, 7.0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_keys.flatten(0, 1)[slot] = whole[token, first_key:first_value]
            expected_values.flatten(0, 1)[slot] = before[token, first_value:end]
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_write_kv_stores_at_slots_and_leaves_out_negative_ones(
    slot_type: torch.dtype, dtype: torch.dtype
) -> None:
    heads = normal(4, 9, 12, dtype=dtype)
    k, v = heads[:, 3:6], heads[:, 6:]
    keys = torch.full((5, 4, 3, 12), 7.0, device=DEVICE, dtype=dtype)
    values = keys.clone()
    expected_keys, expected_values = keys.clone(), values.clone()
    slots = torch.tensor([17, -1, 0, 6], device=DEVICE, dtype=slot_type)
    kernels.attention.write_kv(k, v, keys, values, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_keys.flatten(0, 1)[slot] = k[token]
            expected_values.flatten(0, 1)[slot] = v[token]
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        pytest.param(3072, 4096, marks=large),
        *((12, 4096), (128, 7168), (6, 1024)),
        *((331, 72), (6, 1000), (5, 1025), (3, 4097), (1, 1)),
    ],
)
def test_gemv(outputs: int, inputs: int, biased: bool, dtype: torch.dtype) -> None:
    weight, x = normal(outputs, inputs, dtype=dtype), normal(1, inputs, dtype=dtype)
    bias = normal(outputs, dtype=dtype) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert error(kernels.gemv.gemv(weight, x, bias), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "block_size", "window"),
    [
        pytest.param(32, 8, 128, 16, None, marks=large),
        (9, 3, 64, 16, None),
        (10, 2, 12, 4, None),
        (7, 7, 8, 16, 24),
        (16, 1, 128, 16, 1000),
        (4, 4, 256, 5, None),
        (8, 2, 16, 16, 16),
        (8, 1, 32, 16, 1),
    ],
)
@pytest.mark.parametrize(
    "lengths",
    [
        *((1,), (0, 129, 64), (15, 16, 17, 63, 65, 128), (700,)),
        *(
            pytest.param(lengths, marks=large)
            for lengths in ((2000,), (3, 77, 700, 1, 63, 65) * 12)
        ),
    ],
    ids=lambda lengths: str(lengths[:6]),
)
def test_decode_attention_over_the_paged_cache(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    most = math.ceil(max(lengths) / block_size)
    num_blocks = len(lengths) * most
    keys = normal(num_blocks, block_size, kv_heads, head_dim, dtype=dtype)
    values = normal(num_blocks, block_size, kv_heads, head_dim, dtype=dtype)
    tables = torch.randperm(num_blocks, device=DEVICE).view(len(lengths), most).int()
    # Between other heads, as the merged projection has them.
    q = normal(len(lengths), q_heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :q_heads]
    out = kernels.attention.decode_attention(
        q,
        keys,
        values,
        tables.t().contiguous().t(),
        torch.tensor(lengths, device=DEVICE, dtype=torch.int32),
        scale=head_dim**-0.5,
        window=window,
    )
    for row, length in enumerate(lengths):
        if not length:
            assert not out[row].any()
            continue
        k, v = (cache[tables[row].long()].flatten(0, 1)[:length] for cache in (keys, values))
        expected = attend(q[row], k, v, window, head_dim**-0.5)
        assert error(out[row], expected) < 2 * TOLERANCE[dtype], (row, length)
