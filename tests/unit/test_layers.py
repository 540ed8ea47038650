"""Each layer, on its shard and over the paged cache, computes what the textbook says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from shard_worker.communicator.single import SingleCommunicator
from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PrefillSpan
from shard_worker.kv_cache import KvCache
from shard_worker.layers.attention import Attention
from shard_worker.layers.embedding import Embedding, VocabParallelEmbedding, VocabParallelLMHead
from shard_worker.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    Weight,
    padded_rows,
)
from shard_worker.layers.norm import LayerNorm, RMSNorm
from shard_worker.layers.rotary import RotaryEmbedding, rotate
from shard_worker.sharding import Parameter, Section, ShardLayout, ShardTensors
from shard_worker.tensor_parallel import TensorParallel

CPU = torch.device("cpu")

Parameters = dict[str, tuple[Tensor, int | None, Sequence[Section]]]
"""By name: the whole value, the dimension that is split, and the sections along it."""


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of the type that was computed in."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.bfloat16:
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-2)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Attention


def dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """[length, heads, head_dim] each, in float64 and with every mask spelt out."""
    q, k, v = q.double(), k.double(), v.double()
    length, num_q_heads, head_dim = q.shape
    out = torch.zeros_like(q)
    for head in range(num_q_heads):
        kv = head // (num_q_heads // k.shape[1])
        for now in range(length):
            first = 0 if window is None else max(0, now - window + 1)
            scores = k[first : now + 1, kv] @ q[now, head] / head_dim**0.5
            out[now, head] = scores.softmax(0) @ v[first : now + 1, kv]
    return out.flatten(1)


@dataclass
class Running:
    """A sequence's whole q, k and v, its block table, and how far it is computed."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0


@dataclass
class Chunk:
    sequence: Running
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.sequence.num_computed > 0

    def of(self, name: str) -> Tensor:
        """Its tokens' part of the sequence's q, k or v."""
        start = self.sequence.num_computed
        whole: Tensor = getattr(self.sequence, name)
        return whole[start : start + self.num_tokens]


def compute(attention: Attention, cache: KvCache, chunks: Sequence[Chunk]) -> list[Tensor]:
    """One step: the outputs of each chunk. Prefills stand first in a batch."""
    size = cache.block_size
    ordered = sorted(chunks, key=lambda chunk: chunk.is_decode)
    positions: list[int] = []
    slots: list[int] = []
    prefills: list[PrefillSpan] = []
    at = 0
    for chunk in ordered:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        stop = start + chunk.num_tokens
        positions += range(start, stop)
        slots += [sequence.block_ids[p // size] * size + p % size for p in range(start, stop)]
        if not chunk.is_decode:
            used = torch.tensor(sequence.block_ids[: -(-stop // size)])
            prefills.append(PrefillSpan(at, at + chunk.num_tokens, start, used))
        at += chunk.num_tokens
    decoding = [chunk.sequence for chunk in ordered if chunk.is_decode]
    decode = None
    if decoding:
        tables = [s.block_ids[: s.num_computed // size + 1] for s in decoding]
        width = max(map(len, tables))
        decode = DecodeSpan(
            start=at - len(decoding),
            block_ids=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
            context_lens=torch.tensor([s.num_computed + 1 for s in decoding]),
            block_size=size,
        )
    batch = ForwardBatch(
        token_ids=torch.zeros(at, dtype=torch.int64),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        prefills=tuple(prefills),
        decode=decode,
        kv_cache=cache,
    )

    heads = [torch.cat([chunk.of(name) for name in "qkv"], dim=1) for chunk in ordered]
    out = attention(torch.cat(heads), batch)
    pieces = dict(zip(map(id, ordered), out.split([c.num_tokens for c in ordered]), strict=True))
    return [pieces[id(chunk)] for chunk in chunks]


@st.composite
def partitions(draw: st.DrawFn) -> list[int]:
    """Chunks that a sequence is computed in: a prompt in one or several, then single tokens."""
    prompt = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    return prompt + [1] * draw(st.integers(0, 5))


@given(
    partitions=st.lists(partitions(), min_size=1, max_size=4),
    delays=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    block_size=st.integers(1, 6),
    window=st.none() | st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_attention_over_the_paged_cache_is_dense_attention(
    partitions: list[list[int]],
    delays: list[int],
    kv_heads: int,
    group: int,
    block_size: int,
    window: int | None,
    seed: int,
) -> None:
    """Sequences that start at different steps, in blocks that lie anywhere, chunk by chunk."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    head_dim, q_heads = 4, kv_heads * group
    lengths = [sum(chunks) for chunks in partitions]
    num_blocks = sum(-(-length // block_size) for length in lengths) + 1
    cache = KvCache.allocate(
        num_layers=2,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    for layer in cache.layers:  # what other sequences left behind
        layer.keys.normal_(std=50, generator=generator)
        layer.values.normal_(std=50, generator=generator)
    attention = Attention(
        layer=1, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, window=window
    )
    sequences = [
        Running(
            normal(length, q_heads, head_dim),
            normal(length, kv_heads, head_dim),
            normal(length, kv_heads, head_dim),
        )
        for length in lengths
    ]
    free = torch.randperm(num_blocks, generator=generator).tolist()
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    waiting = [list(chunks) for chunks in partitions]
    step = 0
    while any(waiting):
        turn = [i for i, chunks in enumerate(waiting) if chunks and step >= delays[i]]
        step += 1
        chunks = []
        for i in turn:
            chunk = Chunk(sequences[i], waiting[i].pop(0))
            needed = chunk.sequence.num_computed + chunk.num_tokens
            while len(chunk.sequence.block_ids) * block_size < needed:
                chunk.sequence.block_ids.append(free.pop())
            chunks.append(chunk)
        if not chunks:
            continue
        for i, chunk, output in zip(turn, chunks, compute(attention, cache, chunks), strict=True):
            outputs[i].append(output)
            chunk.sequence.num_computed += chunk.num_tokens
    for sequence, pieces in zip(sequences, outputs, strict=True):
        expected = dense_attention(sequence.q, sequence.k, sequence.v, window)
        torch.testing.assert_close(torch.cat(pieces).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_without_a_cache_is_that_of_one_sequence(
    kv_heads: int, window: int | None
) -> None:
    q, k, v = torch.randn(9, 6, 8), torch.randn(9, kv_heads, 8), torch.randn(9, kv_heads, 8)
    attention = Attention(layer=0, num_q_heads=6, num_kv_heads=kv_heads, head_dim=8, window=window)
    ids = torch.arange(9)
    batch = ForwardBatch(token_ids=ids, positions=ids, slot_mapping=ids)
    out = attention(torch.cat((q, k, v), dim=1), batch)
    expected = dense_attention(q, k, v, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_cached", [False, True])
def test_attention_rotates_queries_and_keys_and_caches_what_it_attends_to(is_cached: bool) -> None:
    q, k, v = torch.randn(9, 6, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    cache = KvCache.allocate(
        num_layers=1,
        num_blocks=3,
        block_size=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=CPU,
    )
    ids, blocks = torch.arange(9), torch.tensor([2, 0, 1])
    batch = ForwardBatch(
        token_ids=ids,
        positions=ids,
        slot_mapping=blocks[ids // 4] * 4 + ids % 4,
        prefills=(PrefillSpan(0, 9, 0, blocks),),
        kv_cache=cache if is_cached else None,
    )
    rotation = RotaryEmbedding({}, 8, torch.float32, CPU)(batch)
    attention = Attention(layer=0, num_q_heads=6, num_kv_heads=2, head_dim=8)
    out = attention(torch.cat((q, k, v), dim=1), batch, rotation)
    rotated = rotate(k, rotation)
    expected = dense_attention(rotate(q, rotation), rotated, v, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    keys, values = cache.layers[0].read(blocks)
    torch.testing.assert_close(keys[:9], rotated if is_cached else torch.zeros_like(rotated))
    torch.testing.assert_close(values[:9], v if is_cached else torch.zeros_like(v))


def test_a_cache_takes_no_memory_before_it_is_written() -> None:
    """Blocks that nobody uses cost nothing, so a cache may be sized for the worst."""
    gib = 2**30
    cache = KvCache.allocate(
        num_layers=16,
        num_blocks=2**14,
        block_size=16,
        num_kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        device=CPU,
    )
    assert cache.num_bytes == 4 * gib
    before = resident_bytes()
    keys = torch.ones(16, 2, 128, dtype=torch.bfloat16)
    for layer in cache.layers:
        layer.write(torch.arange(64, 80), keys, keys)
        read_keys, _ = layer.read(torch.tensor([4]))
        assert torch.equal(read_keys, keys)
    assert resident_bytes() - before < 64 * 2**20


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


# Rotary positions

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
OLD_LLAMA3 = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
WITHOUT_ORIGINAL = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 500_000.0},
        {"rope_theta": 500_000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4},
        {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}},
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500_000.0, "rope_scaling": OLD_LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 1e5}},
        {"rope_theta": 1e5, "rope_scaling": WITHOUT_ORIGINAL},
        {
            "rope_scaling": {"rope_type": "linear", "type": "default", "factor": 2.0},
            "rope_theta": 2e4,
        },
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 5.0, "rope_theta": 1e5},
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [4, 16, 64])
def test_rotary_positions_are_those_of_transformers(fields: dict[str, Any], head_dim: int) -> None:
    config = {"head_dim": head_dim, "max_position_embeddings": 8192} | fields
    positions = torch.tensor([0, 1, 2, 63, 511, 512, 4095, 8191])
    q, k = torch.randn(8, 3, head_dim), torch.randn(8, 2, head_dim)

    theirs = LlamaRotaryEmbedding(LlamaConfig(**copied(config)))
    cos, sin = theirs(q, positions.unsqueeze(0))
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos, sin
    )

    batch = ForwardBatch(token_ids=positions, positions=positions, slot_mapping=positions)
    rotation = RotaryEmbedding(config, head_dim, torch.float32, CPU)(batch)
    for x, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(
            rotate(x, rotation), wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5
        )


def copied(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers completes the dictionaries it is given in place."""
    return {key: dict(v) if isinstance(v, dict) else v for key, v in config.items()}


def test_a_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    positions = torch.tensor([3, 10, 103, 110])
    batch = ForwardBatch(token_ids=positions, positions=positions, slot_mapping=positions)
    rotation = RotaryEmbedding({}, 16, torch.float32, CPU)(batch)
    x, y = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    rotated_x, rotated_y = (rotate(t.expand(4, 1, 16), rotation)[:, 0] for t in (x, y))
    torch.testing.assert_close(rotated_x.norm(dim=-1), x.norm().expand(4))
    torch.testing.assert_close(rotated_x[0] @ rotated_y[1], rotated_x[2] @ rotated_y[3])
    assert not torch.isclose(rotated_x[0] @ rotated_y[1], rotated_x[0] @ rotated_y[2], rtol=1e-3)


# Shards of parameters


def shards(
    parameters: Parameters,
    cuts: Mapping[str, Sequence[int]],
    dtype: torch.dtype = torch.float32,
) -> list[ShardTensors]:
    """Every rank's tensors: `cuts[axis]` are the bounds of the ranks' ranges."""
    size = len(next(iter(cuts.values()))) - 1
    described = {
        name: Parameter(name, tuple(value.shape), dim, tuple(sections), "concat")
        for name, (value, dim, sections) in parameters.items()
    }
    ranges = tuple(
        {axis: (bounds[r], bounds[r + 1]) for axis, bounds in cuts.items()} for r in range(size)
    )
    return [
        ShardTensors(
            ShardLayout(described, rank, ranges),
            TensorParallel(rank, size, SingleCommunicator()),
            dtype,
            CPU,
        )
        for rank in range(size)
    ]


def fill(tensors: ShardTensors, parameters: Parameters) -> None:
    """What loading a checkpoint does."""
    for name, destination in tensors.destinations.items():
        value, dim, _ = parameters[name]
        if dim is not None:
            pieces = [value.narrow(dim, a, b - a) for a, b in tensors.layout.slices(name)]
            value = torch.cat(pieces, dim)
        destination.copy_(value)
    tensors.finish()


CUTS = {"mlp": [0, 7, 12, 20], "kv_heads": [0, 1, 2, 3], "vocab": [0, 40, 70, 101]}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_column_parallel_outputs_are_pieces_of_the_whole(
    dtype: torch.dtype, bias: bool, transposed: bool, num_tokens: int
) -> None:
    """Two merged modules, one of them fused of two sections, unevenly cut over three ranks."""
    gate, qkv = torch.randn(20, 24).to(dtype), torch.randn(3 * 4 + 3 * 2, 24).to(dtype)
    gate_bias, qkv_bias = torch.randn(20).to(dtype), torch.randn(18).to(dtype)
    mlp, heads = (Section("mlp", 20, 1),), (Section("kv_heads", 3, 4), Section("kv_heads", 3, 2))
    parameters: Parameters = {
        "m.gate.weight": (gate.t() if transposed else gate, 1 if transposed else 0, mlp),
        "m.qkv.weight": (qkv.t() if transposed else qkv, 1 if transposed else 0, heads),
    }
    if bias:
        parameters |= {
            "m.gate.bias": (gate_bias, 0, mlp),
            "m.qkv.bias": (qkv_bias, 0, heads),
        }
    x = torch.randn(num_tokens, 24).to(dtype)
    whole = {
        "gate": F.linear(x.double(), gate.double(), gate_bias.double() if bias else None),
        "qkv": F.linear(x.double(), qkv.double(), qkv_bias.double() if bias else None),
    }
    for tensors in shards(parameters, CUTS, dtype):
        linear = ColumnParallelLinear(tensors, "m", ("gate", "qkv"), transposed=transposed)
        layout = tensors.layout
        fill(tensors, parameters)
        expected = {
            name: torch.cat([out[:, a:b] for a, b in layout.slices(f"m.{name}.weight")], dim=1)
            for name, out in whole.items()
        }
        assert_close(linear(x), torch.cat([expected["gate"], expected["qkv"]], 1).to(dtype))
        for name in ("gate", "qkv"):
            assert_close(linear.part(name, x), expected[name].to(dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_parallel_outputs_sum_to_the_whole_with_the_bias_once(
    dtype: torch.dtype, bias: bool, transposed: bool
) -> None:
    weight, offset = torch.randn(16, 20).to(dtype), 10 * torch.randn(16).to(dtype)
    mlp = (Section("mlp", 20, 1),)
    parameters: Parameters = {
        "m.down.weight": (weight.t() if transposed else weight, 0 if transposed else 1, mlp)
    }
    if bias:
        parameters["m.down.bias"] = (offset, None, ())
    x = torch.randn(6, 20).to(dtype)
    total = torch.zeros(6, 16, dtype=torch.float64)
    for tensors in shards(parameters, CUTS, dtype):
        linear = RowParallelLinear(tensors, "m", "down", transposed=transposed)
        fill(tensors, parameters)
        assert linear.whole_inputs == 20
        total += linear.partial(linear.select(x)).double()
    expected = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(total, expected, rtol=0, atol=tolerance)


@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_a_packed_bfloat16_weight_multiplies_like_a_plain_one(
    inputs: int, outputs: int, num_tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    offset = torch.randn(outputs, generator=generator).bfloat16()
    x = torch.randn(num_tokens, inputs, generator=generator).bfloat16()
    section = (Section("mlp", outputs, 1),)
    parameters: Parameters = {
        "m.up.weight": (weight, 0, section),
        "m.up.bias": (offset, 0, section),
    }
    (tensors,) = shards(parameters, {"mlp": [0, outputs]}, torch.bfloat16)
    linear = ColumnParallelLinear(tensors, "m", ("up",))
    fill(tensors, parameters)
    exact = F.linear(x.double(), weight.double(), offset.double())
    packed, plain = linear(x), F.linear(x, weight, offset)
    assert packed.shape == plain.shape and packed.dtype == plain.dtype
    # Both round; a packed product may be off by no more than a plain one can be.
    step = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=0.5)
    assert ((packed.double() - exact).abs() <= step).all()
    assert ((plain.double() - exact).abs() <= step).all()


def test_vocabulary_pieces_sum_to_the_whole_embedding() -> None:
    weight = torch.randn(101, 12)
    parameters: Parameters = {"m.embed.weight": (weight, 0, (Section("vocab", 101, 1),))}
    ids = torch.tensor([0, 39, 40, 69, 70, 100, 5, 5])
    pieces = []
    for tensors in shards(parameters, CUTS):
        embedding = VocabParallelEmbedding(tensors, "m.embed")
        fill(tensors, parameters)
        pieces.append(embedding.partial(ids))
        mine = (ids >= embedding.start) & (ids < embedding.stop)
        assert torch.equal(pieces[-1].abs().sum(1) > 0, mine), "zero for others' tokens"
    assert len(pieces) == 3
    assert torch.equal(sum(pieces, torch.zeros(8, 12)), weight[ids])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_the_ranks_are_those_of_the_whole_head(dtype: torch.dtype, tied: bool) -> None:
    vocab = (Section("vocab", 101, 1),)
    embedding, head = torch.randn(101, 12).to(dtype), torch.randn(101, 12).to(dtype)
    parameters: Parameters = {"embed.weight": (embedding, 0, vocab)}
    if not tied:
        parameters["head.weight"] = (head, 0, vocab)
    x = torch.randn(3, 12).to(dtype)
    pieces = []
    for tensors in shards(parameters, CUTS, dtype):
        embed = VocabParallelEmbedding(tensors, "embed")
        layer = VocabParallelLMHead(tensors, "head", tied_to=embed if tied else None)
        fill(tensors, parameters)
        assert layer.rank_sizes == (40, 30, 31)
        pieces.append(layer(x))
        # A head that is tied must leave the embedding usable.
        assert torch.equal(embed.partial(torch.tensor([embed.start]))[0], embedding[embed.start])
    logits = torch.cat(pieces, dim=1)
    assert logits.dtype == torch.float32
    expected = F.linear(x.double(), (embedding if tied else head).double()).float()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_communication_is_counted_by_layer_and_from_each_join_anew() -> None:
    parameters: Parameters = {
        "model.embed_tokens.weight": (torch.randn(101, 12), 0, (Section("vocab", 101, 1),)),
    }
    for layer in (0, 1):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = torch.randn(12, 20)
            parameters[f"model.layers.{layer}.{name}.weight"] = weight, 1, (Section("mlp", 20, 1),)
    tensors, *_ = shards(parameters, CUTS)
    tp = tensors.tp
    embedding = VocabParallelEmbedding(tensors, "model.embed_tokens")
    linears = [
        RowParallelLinear(tensors, f"model.layers.{layer}.{block}", name)
        for layer in (0, 1)
        for block, name in (("self_attn", "o_proj"), ("mlp", "down_proj"))
    ]
    fill(tensors, parameters)

    def counted() -> list[tuple[str, str, str, int, int]]:
        return [(s.module, s.operation, s.path, s.calls, s.payload_bytes) for s in tp.all_stats()]

    def run() -> None:
        x = embedding(torch.tensor([0, 5, 100]))
        for linear in linears:
            x = linear(linear.select(torch.cat((x, x), dim=1)[:, :20]))

    run()
    size = 3 * 12 * 4  # bytes of three tokens
    expected = [
        ("model.embed_tokens", "all_reduce", "single", 1, size),
        ("model.layers.0", "all_reduce", "single", 2, 2 * size),
        ("model.layers.1", "all_reduce", "single", 2, 2 * size),
    ]
    assert counted() == expected
    tp.renew(SingleCommunicator())
    assert counted() == []
    run()
    assert counted() == expected


def test_a_whole_embedding_is_on_every_rank() -> None:
    weight = torch.randn(16, 4)
    parameters: Parameters = {"wpe.weight": (weight, None, ())}
    for tensors in shards(parameters, CUTS):
        embedding = Embedding(tensors, "wpe")
        fill(tensors, parameters)
        assert torch.equal(embedding(torch.tensor([3, 0, 15])), weight[[3, 0, 15]])


# What is held once everything is in its layout


@pytest.mark.parametrize(
    ("dtype", "tied", "copies"),
    [(torch.float32, True, 1), (torch.bfloat16, False, 2), (torch.bfloat16, True, 2)],
    ids=str,
)
def test_weights_are_held_once_but_for_a_tied_one_that_is_packed(
    dtype: torch.dtype, tied: bool, copies: int
) -> None:
    """64 ids of 32 features; an untied head is another tensor of the same size."""
    table = torch.randn(64, 32)
    parameters: Parameters = {"embed.weight": (table, 0, [Section("vocab", 64, 1)])}
    if not tied:
        parameters["head.weight"] = (table, 0, [Section("vocab", 64, 1)])
    (tensors,) = shards(parameters, {"vocab": [0, 64]}, dtype)
    embed = VocabParallelEmbedding(tensors, "embed")
    head = VocabParallelLMHead(tensors, "head", tied_to=embed if tied else None)
    assert tensors.num_bytes == tensors.layout.numel * dtype.itemsize
    held = tensors.finish()
    assert held >= copies * table.numel() * dtype.itemsize
    assert held == embed.weight.nbytes + (
        torch.ops.mkldnn._nbytes(head.weight._packed) if dtype == torch.bfloat16 else 0
    )


# Norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 32), (4, 3, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_is_that_of_transformers(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    weight, x = torch.randn(shape[-1]).to(dtype), (torch.randn(shape) * scale).to(dtype)
    theirs = LlamaRMSNorm(shape[-1], eps=1e-5)
    theirs.weight.data = weight
    parameters: Parameters = {"norm.weight": (weight, None, ())}
    (tensors,) = shards(parameters, {"mlp": [0, 1]}, dtype)
    norm = RMSNorm(tensors, "norm", 1e-5)
    fill(tensors, parameters)
    # In bfloat16 transformers rounds once more, before it multiplies by the weight.
    relative = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(norm(x), theirs(x).detach(), rtol=relative, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_among_others_are_normalised_in_place(dtype: torch.dtype) -> None:
    parameters: Parameters = {"norm.weight": (torch.randn(16).to(dtype), None, ())}
    (tensors,) = shards(parameters, {"mlp": [0, 1]}, dtype)
    norm = RMSNorm(tensors, "norm", 1e-5)
    fill(tensors, parameters)
    whole = torch.randn(4, 5, 16).to(dtype)
    expected = whole.clone()
    expected[:, 1:4] = norm(whole[:, 1:4])
    x = whole[:, 1:4]
    assert norm.heads_(x) is x
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_layer_norm_is_that_of_torch(dtype: torch.dtype, eps: float) -> None:
    weight, bias = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    x = (torch.randn(5, 24) * 3 + 1).to(dtype)
    parameters: Parameters = {
        "norm.weight": (weight, None, ()),
        "norm.bias": (bias, None, ()),
    }
    (tensors,) = shards(parameters, {"mlp": [0, 1]}, dtype)
    norm = LayerNorm(tensors, "norm", eps)
    fill(tensors, parameters)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = centred / deviation * weight.double() + bias.double()
    assert_close(norm(x), expected.to(dtype))


class TwoPaths(SingleCommunicator):
    """Small sums go another way."""

    def all_reduce_path(self, num_bytes: int) -> str:
        return "aside" if num_bytes <= 8 else self.transport


class Fusing(SingleCommunicator):
    """Sums several rows and normalises them in one operation."""

    fused = 0

    def norm_fusing(self, x: Tensor) -> Fusing | None:
        return self if len(x) > 1 else None

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        self.fused += 1
        return F.rms_norm(residual.add_(x), weight.shape, weight, eps)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_sum_goes_onto_the_residual_stream_in_one_operation_where_there_is_one(
    num_tokens: int,
) -> None:
    parameters: Parameters = {
        "norm.weight": (torch.randn(16), None, ()),
        "m.down.weight": (torch.randn(16, 20), 1, (Section("mlp", 20, 1),)),
    }
    (tensors,) = shards(parameters, {"mlp": [0, 20]})
    norm, linear = RMSNorm(tensors, "norm", 1e-5), RowParallelLinear(tensors, "m", "down")
    fill(tensors, parameters)
    x, stream = torch.randn(num_tokens, 20), torch.randn(num_tokens, 16)
    separate, fused = stream.clone(), stream.clone()
    expected = norm.add(linear(x), separate)
    comm = Fusing()
    tensors.tp.renew(comm)
    assert_close(linear.reduce_onto(linear.partial(x), fused, norm), expected)
    assert_close(fused, separate)
    assert comm.fused == (num_tokens > 1)
    ((calls, payload_bytes),) = ((s.calls, s.payload_bytes) for s in tensors.tp.all_stats())
    assert (calls, payload_bytes) == (1, num_tokens * 16 * 4)


def test_collectives_are_counted_by_the_path_that_they_take() -> None:
    tp = TensorParallel(0, 1, TwoPaths())
    layer = tp.collectives("model.layers.0")
    for count in (1, 2, 3):
        x = torch.ones(count)
        assert layer.all_reduce(x) is x
    assert layer.all_gather(torch.ones(1), (1,)).tolist() == [1]
    assert [(s.operation, s.path, s.calls, s.payload_bytes) for s in tp.all_stats()] == [
        ("all_reduce", "aside", 2, 4 + 8),
        ("all_reduce", "single", 1, 12),
        ("all_gather", "single", 1, 4),
    ]


def test_what_is_captured_counts_when_it_is_replayed() -> None:
    tp = TensorParallel(0, 1, SingleCommunicator())
    layer, sampler = tp.collectives("model.layers.0"), tp.collectives("sampler")
    layer.all_reduce(torch.zeros(3))
    before = tp.all_stats()
    layer.all_reduce(torch.zeros(5))
    sampler.all_gather(torch.zeros(2), (2,))
    captured = tp.take_back(before)
    assert [(s.calls, s.payload_bytes) for s in tp.all_stats()] == [(1, 12), (0, 0)]
    tp.count(captured)
    tp.count(captured)
    assert [(s.calls, s.payload_bytes) for s in tp.all_stats()] == [(3, 52), (2, 16)]


def test_few_numbers_of_rows_are_multiplied_with_since_each_is_compiled_and_kept() -> None:
    padded = {num_rows: padded_rows(num_rows) for num_rows in range(1, 1025)}
    assert len(set(padded.values())) <= 64
    assert all(num_rows <= rows <= 1.25 * num_rows for num_rows, rows in padded.items())


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 33, 70, 300])
def test_a_packed_weight_multiplies_as_a_plain_one_for_any_number_of_rows(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    plain = torch.randn(48, 32, generator=generator).bfloat16()
    x = torch.randn(num_tokens, 32, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16()
    parameters: Parameters = {"up.weight": (plain, 0, [Section("mlp", 48, 1)])}
    (tensors,) = shards(parameters, {"mlp": [0, 48]}, torch.bfloat16)
    weight = Weight(tensors, tensors.take("up.weight"))
    fill(tensors, parameters)
    assert weight._packed is not None
    got = weight.multiply(x, bias)
    assert got.shape == (num_tokens, 48)
    wanted = x.double() @ plain.double().T + bias.double()
    torch.testing.assert_close(got.double(), wanted, rtol=0.02, atol=0.1)
