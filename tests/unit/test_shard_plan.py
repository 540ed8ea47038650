"""A plan covers each axis exactly once, leaves no rank idle and accounts for every byte."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.predict_scaling import LLAMA_8B
from coordinator.families import model_spec
from coordinator.model_spec import Axis, ModelSpec, ParameterSpec
from coordinator.shard_plan import (
    PlanError,
    Range,
    ShardPlan,
    fitting_tp_sizes,
    make_plan,
)

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small models of every family; MLP and vocabulary sizes are primes as often as not."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gpt2"]))
    num_kv_heads = draw(st.integers(1, 8))
    group = draw(st.integers(1, 8))
    head_dim = 2 * draw(st.integers(1, 4))
    primes = st.sampled_from([17, 19, 97, 251, 509, 1021, 4093])
    mlp = draw(primes | st.integers(16, 300) | st.integers(1, 40).map(lambda n: 64 * n))
    vocab = draw(primes | st.integers(16, 5000) | st.integers(1, 200).map(lambda n: 64 * n))
    common: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocab,
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from([*ITEMSIZES])),
    }
    num_q_heads = num_kv_heads * group
    if family == "gpt2":
        sizes = {"n_embd": num_q_heads * head_dim, "n_head": num_q_heads, "n_layer": 2}
        return model_spec(common | sizes | {"n_inner": mlp, "n_positions": 24})
    sizes = {
        "hidden_size": draw(st.integers(1, 40)),
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "max_position_embeddings": 24,
    }
    if family in ("llama", "qwen3"):
        sizes["attention_bias"] = draw(st.booleans())
    return model_spec(common | sizes)


@st.composite
def plans(draw: st.DrawFn, max_tp_size: int = 16, weighted: bool | None = None) -> ShardPlan:
    spec = draw(specs())
    tp_size = draw(st.integers(1, fitting_tp_sizes(spec, max_tp_size)[-1]))
    weights = None
    if draw(st.booleans()) if weighted is None else weighted:
        weights = draw(st.lists(st.floats(0.01, 1e12), min_size=tp_size, max_size=tp_size))
    dtype = draw(st.sampled_from([None, *ITEMSIZES]))
    return make_plan(spec, tp_size, dtype=dtype, memory_weights=weights)


def ranges(plan: ShardPlan, axis: Axis) -> list[Range]:
    return [plan.range(axis, rank) for rank in range(plan.tp_size)]


def layer_bytes(plan: ShardPlan, rank: int) -> int:
    return plan.itemsize * sum(
        math.prod(plan.local_shape(parameter, rank))
        for parameter in plan.spec.parameters
        if parameter.name.startswith(f"{plan.spec.layer_prefix}.")
    )


def mlp_slack(plan: ShardPlan) -> int:
    """Units that alignment may cost: 64, or an eighth of an average share where that is less."""
    return max(1, min(64, plan.spec.intermediate_size // (8 * plan.tp_size)))


def mlp_unit_bytes(plan: ShardPlan) -> int:
    """Bytes of one MLP unit, over all layers."""
    return plan.itemsize * sum(
        parameter.numel // plan.spec.intermediate_size
        for parameter in plan.spec.parameters
        if any(section.axis is Axis.MLP for section in parameter.sections)
    )


@given(plans())
def test_query_heads_mlp_and_vocab_are_covered_exactly_once_in_rank_order(plan: ShardPlan) -> None:
    for axis in (Axis.Q_HEADS, Axis.MLP, Axis.VOCAB):
        owned = [unit for r in ranges(plan, axis) for unit in range(r.start, r.stop)]
        assert owned == [*range(plan.spec.axis_units(axis))]


@given(plans())
def test_every_rank_has_work_on_every_axis(plan: ShardPlan) -> None:
    for axis in Axis:
        assert all(len(r) >= 1 for r in ranges(plan, axis))


@given(plans())
def test_every_query_head_finds_its_kv_head_on_its_own_rank(plan: ShardPlan) -> None:
    group = plan.spec.num_q_heads // plan.spec.num_kv_heads
    for q, kv in zip(ranges(plan, Axis.Q_HEADS), ranges(plan, Axis.KV_HEADS), strict=True):
        needed = {head // group for head in range(q.start, q.stop)}
        assert needed == {*range(kv.start, kv.stop)}


@given(plans())
def test_kv_heads_are_replicated_only_when_ranks_outnumber_them_and_then_evenly(
    plan: ShardPlan,
) -> None:
    kv = ranges(plan, Axis.KV_HEADS)
    copies = Counter(head for r in kv for head in range(r.start, r.stop))
    assert set(copies) == {*range(plan.spec.num_kv_heads)}
    if plan.tp_size <= plan.spec.num_kv_heads:
        assert set(copies.values()) == {1}
    else:
        assert all(len(r) == 1 for r in kv)
        assert max(copies.values()) - min(copies.values()) <= 1


@given(plans(weighted=False))
def test_heads_are_as_even_as_can_be_and_larger_shares_come_first(plan: ShardPlan) -> None:
    kv = ranges(plan, Axis.KV_HEADS)
    if plan.tp_size <= plan.spec.num_kv_heads:
        sizes = [len(r) for r in kv]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1
    else:
        q = zip(kv, ranges(plan, Axis.Q_HEADS), strict=True)
        for _, of_head in itertools.groupby(q, key=lambda pair: pair[0].start):
            sizes = [len(r) for _, r in of_head]
            assert sizes == sorted(sizes, reverse=True)
            assert max(sizes) - min(sizes) <= 1


@given(plans(weighted=False))
def test_no_rank_could_hand_mlp_units_to_another_and_even_out_the_layers(plan: ShardPlan) -> None:
    slack = mlp_slack(plan)
    held = [layer_bytes(plan, rank) for rank in range(plan.tp_size)]
    for rank in range(plan.tp_size):
        if len(plan.range(Axis.MLP, rank)) > slack:
            assert held[rank] <= min(held) + slack * mlp_unit_bytes(plan)


@given(specs(), st.lists(st.floats(0.01, 100), min_size=1, max_size=16))
def test_the_mlp_brings_layers_into_the_proportion_of_weights(
    spec: ModelSpec, weights: list[float]
) -> None:
    weights = weights[: fitting_tp_sizes(spec)[-1]]
    plan = make_plan(spec, len(weights), memory_weights=weights)
    slack = mlp_slack(plan)
    slack_bytes = slack * mlp_unit_bytes(plan)
    held = [layer_bytes(plan, rank) for rank in range(plan.tp_size)]
    # What a rank can't shed, having the least of the MLP, is not its to balance.
    most = max(
        (held[rank] - slack_bytes) / weight if len(plan.range(Axis.MLP, rank)) > slack else -1.0
        for rank, weight in enumerate(weights)
    )
    least = min((held[rank] + slack_bytes) / weight for rank, weight in enumerate(weights))
    assert most <= least * (1 + 1e-9)


@given(specs(), st.lists(st.floats(1, 100), min_size=1, max_size=6))
def test_only_the_proportions_of_weights_matter(spec: ModelSpec, weights: list[float]) -> None:
    weights = weights[: fitting_tp_sizes(spec)[-1]]
    doubled = [4.0 * weight for weight in weights]
    plan = make_plan(spec, len(weights), memory_weights=weights)
    assert plan == make_plan(spec, len(weights), memory_weights=doubled)


@given(specs(), st.integers(1, 16), st.floats(1e-3, 1e12))
def test_equal_weights_are_no_weights(spec: ModelSpec, tp_size: int, weight: float) -> None:
    tp_size = min(tp_size, fitting_tp_sizes(spec)[-1])
    plan = make_plan(spec, tp_size, memory_weights=[weight] * tp_size)
    assert plan == make_plan(spec, tp_size)


def test_bytes_follow_memory_weights() -> None:
    weights = [24.0, 80.0, 80.0, 40.0]
    plan = make_plan(model_spec(LLAMA_8B), 4, memory_weights=weights)
    total = sum(shard.weight_bytes for shard in plan.ranks)
    for shard, weight in zip(plan.ranks, weights, strict=True):
        assert shard.weight_bytes / total == pytest.approx(weight / sum(weights), rel=0.01)
    kv = [len(r) for r in ranges(plan, Axis.KV_HEADS)]
    assert kv == [1, 3, 3, 1]


def test_weights_divide_the_query_heads_among_the_ranks_of_a_kv_head() -> None:
    spec = model_spec(SMOLLM2 | {"num_attention_heads": 8, "num_key_value_heads": 2})
    plan = make_plan(spec, 4, memory_weights=[3.0, 1.0, 1.0, 1.0])
    assert ranges(plan, Axis.KV_HEADS) == [Range(0, 1), Range(0, 1), Range(1, 2), Range(1, 2)]
    assert ranges(plan, Axis.Q_HEADS) == [Range(0, 3), Range(3, 4), Range(4, 6), Range(6, 8)]


@given(plans())
def test_bytes_of_ranks_add_up_to_the_checkpoint_and_what_is_replicated(plan: ShardPlan) -> None:
    held = sum(shard.weight_bytes for shard in plan.ranks)
    assert held == plan.checkpoint_bytes + plan.replicated_bytes


@given(plans())
def test_bytes_of_a_rank_are_those_of_its_local_tensors(plan: ShardPlan) -> None:
    for rank, shard in enumerate(plan.ranks):
        elements = sum(math.prod(plan.local_shape(p, rank)) for p in plan.spec.parameters)
        assert shard.rank == rank
        assert shard.weight_bytes == ITEMSIZES[plan.dtype] * elements


def copies_of_each_index(plan: ShardPlan, parameter: ParameterSpec) -> Counter[int]:
    """How many ranks hold each index of the split dimension."""
    copies: Counter[int] = Counter()
    for rank in range(plan.tp_size):
        held = [i for span in plan.slices(parameter, rank) for i in range(*span)]
        assert parameter.split_dim is not None
        assert len(held) == len(set(held)) == plan.local_shape(parameter, rank)[parameter.split_dim]
        copies.update(held)
    return copies


@given(plans())
@settings(max_examples=50)
def test_slices_of_all_ranks_make_up_every_parameter_and_repeat_only_kv_heads(
    plan: ShardPlan,
) -> None:
    extra = 0
    for parameter in plan.spec.parameters:
        if parameter.split_dim is None:
            assert plan.slices(parameter, 0) == ()
            assert plan.local_shape(parameter, plan.tp_size - 1) == parameter.shape
            extra += (plan.tp_size - 1) * math.prod(parameter.shape)
            continue
        size = parameter.shape[parameter.split_dim]
        copies = copies_of_each_index(plan, parameter)
        assert set(copies) == set(range(size))
        if all(section.axis is not Axis.KV_HEADS for section in parameter.sections):
            assert set(copies.values()) == {1}
        repeated = sum(copies.values()) - size
        extra += repeated * math.prod(parameter.shape) // size
    assert plan.replicated_bytes == extra * ITEMSIZES[plan.dtype]


@given(plans())
def test_slices_of_a_fused_tensor_stay_within_their_sections(plan: ShardPlan) -> None:
    for parameter in plan.spec.parameters:
        for rank in range(plan.tp_size):
            begin = 0
            slices = plan.slices(parameter, rank)
            for section, (start, stop) in zip(parameter.sections, slices, strict=True):
                own = plan.range(section.axis, rank)
                assert start == begin + own.start * section.unit_size
                assert stop == begin + own.stop * section.unit_size <= begin + section.size
                begin += section.size


@given(plans())
def test_kv_cache_of_a_token_is_keys_and_values_of_the_heads_held(plan: ShardPlan) -> None:
    for rank, shard in enumerate(plan.ranks):
        elements = 2 * 2 * len(plan.range(Axis.KV_HEADS, rank)) * plan.spec.head_dim  # 2 layers
        assert shard.kv_bytes_per_token == elements * ITEMSIZES[plan.dtype]


def test_nine_query_and_three_kv_heads_over_two_ranks() -> None:
    plan = make_plan(model_spec(SMOLLM2), 2)
    assert ranges(plan, Axis.KV_HEADS) == [Range(0, 2), Range(2, 3)]
    assert ranges(plan, Axis.Q_HEADS) == [Range(0, 6), Range(6, 9)]
    assert ranges(plan, Axis.VOCAB) == [Range(0, 24576), Range(24576, 49152)]
    # One rank has twice the heads, and is given less of the MLP.
    assert ranges(plan, Axis.MLP) == [Range(0, 704), Range(704, 1536)]
    first, second = (shard.weight_bytes for shard in plan.ranks)
    assert first == pytest.approx(second, rel=0.04)


def test_nine_query_and_three_kv_heads_over_five_ranks_replicate_kv_heads() -> None:
    plan = make_plan(model_spec(SMOLLM2), 5)
    assert [str(r) for r in ranges(plan, Axis.KV_HEADS)] == [
        "[0,1)", "[0,1)", "[1,2)", "[1,2)", "[2,3)",
    ]  # fmt: skip
    assert [str(r) for r in ranges(plan, Axis.Q_HEADS)] == [
        "[0,2)", "[2,3)", "[3,5)", "[5,6)", "[6,9)",
    ]  # fmt: skip


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_a_model_that_divides_is_cut_in_equal_parts_without_waste(tp_size: int) -> None:
    spec = model_spec(LLAMA_8B)
    plan = make_plan(spec, tp_size)
    for axis in Axis:
        assert {len(r) for r in ranges(plan, axis)} == {spec.axis_units(axis) // tp_size}
    norms = 2 * (2 * 32 + 1) * 4096
    assert plan.replicated_bytes == (tp_size - 1) * norms
    assert plan.checkpoint_bytes == 16_060_522_496  # 8.03 billion parameters in bfloat16
    assert {shard.kv_bytes_per_token for shard in plan.ranks} == {131072 // tp_size}


def test_cuts_keep_to_multiples_of_64_where_the_axis_is_large() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 3)
    for axis in (Axis.MLP, Axis.VOCAB):
        assert all(r.start % 64 == 0 and r.stop % 64 == 0 for r in ranges(plan, axis))


def test_equal_shares_are_preferred_to_larger_multiples() -> None:
    plan = make_plan(model_spec(LLAMA_8B | {"intermediate_size": 11008}), 8)
    assert {len(r) for r in ranges(plan, Axis.MLP)} == {1376}  # 21.5 times 64


def test_aligned_cuts_are_preferred_to_equal_shares_of_odd_size() -> None:
    plan = make_plan(model_spec(LLAMA_8B | {"vocab_size": 16 * 8017}), 16)
    assert all(r.stop % 16 == 0 for r in ranges(plan, Axis.VOCAB))


def test_a_vocabulary_that_does_not_divide_is_cut_to_within_one_row() -> None:
    plan = make_plan(model_spec(SMOLLM2 | {"vocab_size": 50257}), 3)
    assert [len(r) for r in ranges(plan, Axis.VOCAB)] == [16753, 16752, 16752]


def test_bytes_communicated_by_a_token() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 2)
    assert plan.all_reduce_bytes_per_token_per_layer == 2 * 4096 * 2
    assert plan.all_reduce_bytes_per_token == (2 * 32 + 1) * 4096 * 2  # and one of the embedding
    wide = make_plan(model_spec(LLAMA_8B), 2, dtype="float32")
    assert wide.all_reduce_bytes_per_token == 2 * plan.all_reduce_bytes_per_token


def test_one_rank_communicates_and_replicates_nothing() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 1)
    assert plan.all_reduce_bytes_per_token_per_layer == 0
    assert plan.all_reduce_bytes_per_token == 0
    assert plan.replicated_bytes == 0
    assert plan.ranks[0].weight_bytes == plan.checkpoint_bytes


def test_partial_outputs_combine_as_declared() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 2)
    combine = {parameter.name: plan.combine(parameter) for parameter in plan.spec.parameters}
    assert combine["model.embed_tokens.weight"] == "sum"
    assert combine["model.layers.0.self_attn.q_proj.weight"] == "concat"
    assert combine["model.layers.0.self_attn.o_proj.weight"] == "sum"
    assert combine["model.layers.0.mlp.up_proj.weight"] == "concat"
    assert combine["model.layers.0.mlp.down_proj.weight"] == "sum"
    assert combine["model.norm.weight"] == "replicate"
    assert combine["lm_head.weight"] == "concat"


@given(specs(), st.integers(1, 70))
def test_a_tp_size_is_planned_exactly_if_it_is_listed_as_fitting(
    spec: ModelSpec, tp_size: int
) -> None:
    fitting = fitting_tp_sizes(spec, 70)
    if tp_size in fitting:
        assert make_plan(spec, tp_size).tp_size == tp_size
    else:
        with pytest.raises(PlanError) as refusal:
            make_plan(spec, tp_size)
        assert refusal.value.fitting == tuple(size for size in fitting if size <= 64)


def test_a_refusal_names_tp_size_why_and_the_sizes_that_fit() -> None:
    with pytest.raises(PlanError) as refusal:
        make_plan(model_spec(SMOLLM2), 10)
    assert isinstance(refusal.value, ValueError)
    assert refusal.value.tp_size == 10
    assert refusal.value.fitting == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    message = str(refusal.value)
    assert "tp_size 10" in message
    assert "q_heads has only 9" in message
    assert message.endswith("tp sizes that fit: 1, 2, 3, 4, 5, 6, 7, 8, 9")


def test_a_refusal_names_every_axis_that_is_too_short() -> None:
    spec = model_spec(SMOLLM2 | {"intermediate_size": 5, "vocab_size": 4})
    with pytest.raises(PlanError, match="mlp has only 5 and vocab has only 4") as refusal:
        make_plan(spec, 6)
    assert refusal.value.fitting == (1, 2, 3, 4)


@pytest.mark.parametrize("tp_size", [0, -1, 2.0, True, "2"])
def test_a_tp_size_that_is_no_positive_integer_is_refused(tp_size: Any) -> None:
    with pytest.raises(ValueError, match=f"tp_size must be a positive integer, got {tp_size!r}"):
        make_plan(model_spec(SMOLLM2), tp_size)


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16.*, got 'int4'"):
        make_plan(model_spec(SMOLLM2), 2, dtype="int4")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"memory_weights must be one number per rank \(2\), got \[1.0\]"),
        ([1.0, 2.0, 3.0], r"memory_weights must be one number per rank \(2\)"),
        ([1.0, 0.0], r"memory_weights\[1\] must be positive and finite, got 0.0"),
        ([-1.0, 1.0], r"memory_weights\[0\] must be positive and finite, got -1.0"),
        ([1.0, math.nan], r"memory_weights\[1\] must be positive and finite, got nan"),
        ([math.inf, 1.0], r"memory_weights\[0\] must be positive and finite, got inf"),
    ],
)
def test_weights_out_of_range_are_refused_by_name_and_value(
    weights: Sequence[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(model_spec(SMOLLM2), 2, memory_weights=weights)
