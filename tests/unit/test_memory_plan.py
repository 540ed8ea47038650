"""What ranks need of their devices adds up, and a model that does not fit is refused with what would."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.predict_scaling import LLAMA_8B, LLAMA_70B
from colrow.errors import InvalidArgument
from colrow.memory import GraphSizes, MemoryLedger, MemoryUse, StepSize
from coordinator.config import DEFAULT_CPU_BATCHED_TOKENS, DEFAULT_GPU_BATCHED_TOKENS, parse
from coordinator.families import model_spec
from coordinator.memory_plan import (
    MemorySettings,
    StepLimits,
    cache_room,
    check_fits,
    graph_bytes,
    layer_bytes,
    logits_bytes,
    max_batched_tokens,
    planned,
    workspace_bytes,
)
from coordinator.model_spec import ModelSpec
from coordinator.shard_plan import fitting_tp_sizes, make_plan
from coordinator.worker_status import WorkerDescription
from tests.unit.test_shard_plan import SMOLLM2, specs
from tests.unit.test_worker_status import DESCRIPTION

MIB, GIB = 2**20, 2**30
LIBRARIES = 32 * MIB  # of each stream
SEGMENTS = 22 * MIB

GRAPHS = GraphSizes(
    decode=(StepSize(1, 1), StepSize(2, 2), StepSize(4, 4)),
    prefill=(StepSize(16, 4), StepSize(64, 4)),
    draws=2,
)
LIMITS = StepLimits(tokens=1024, sequences=256, context=8192)
SETTINGS = MemorySettings(
    LIMITS, least_cache_tokens=16, gpu_memory_utilization=0.9, is_cache_given=False
)


def gpu(total: int, *, free: int = 0, index: int = 0) -> WorkerDescription:
    return replace(
        DESCRIPTION,
        device=f"cuda:{index}",
        memory_total_bytes=total,
        memory_available_bytes=free,
        graph_sizes=GRAPHS,
    )


def cpu(total: int, host: str = "h") -> WorkerDescription:
    return replace(DESCRIPTION, host_id=host, memory_total_bytes=total)


def refusal(call: Callable[[], Any]) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as raised:
        call()
    return raised.value


# Settings


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ((), cpu(GIB), DEFAULT_CPU_BATCHED_TOKENS),
        ((), gpu(GIB), DEFAULT_GPU_BATCHED_TOKENS),
        (("--max-running", "2000"), cpu(GIB), 2000),
        (("--max-batched-tokens", "77"), gpu(GIB), 77),
    ],
)
def test_steps_are_as_long_as_suits_the_device(
    flags: tuple[str, ...], device: WorkerDescription, expected: int
) -> None:
    assert (
        max_batched_tokens(parse(["--model", "m", "--workers", "a:1", *flags]), [device])
        == expected
    )


# Bytes


def test_a_layer_has_the_stream_its_widest_block_and_rotations() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 2)  # 16 and 4 heads of 128, 7168 of the MLP
    width = 3 * 4096 + 3 * 7168 + 2 * 128
    assert layer_bytes(plan, 0, 1000) == 1000 * (2 * width + 32)
    narrow = make_plan(model_spec(LLAMA_8B | {"intermediate_size": 1024}), 2)
    attention = (16 + 2 * 4) * 128 + 2 * 16 * 128
    assert layer_bytes(narrow, 0, 1) == 2 * (3 * 4096 + attention + 2 * 128) + 32


def test_logits_are_in_the_model_s_type_and_in_float32() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 2)
    assert logits_bytes(plan, 0, StepSize(10, 3)) == 10 * 4096 * 2 + 3 * 64128 * (2 + 4)


def test_a_step_takes_what_its_layers_or_its_logits_take() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 2)
    gathered = 2 * 4 * 128 * 131072 * 2  # the keys and values of a whole context
    long = StepLimits(tokens=8192, sequences=1, context=131072)
    assert workspace_bytes(plan, 0, long) == layer_bytes(plan, 0, 8192) + gathered + 2 * LIBRARIES
    wide = StepLimits(tokens=256, sequences=256, context=64)
    assert workspace_bytes(plan, 0, wide) == (
        logits_bytes(plan, 0, StepSize(256, 256)) + 256 * 64128 * 53 + 2 * LIBRARIES
    )


def test_graphs_share_their_logits_and_the_rest() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 2)
    shared = max(layer_bytes(plan, 0, 64), logits_bytes(plan, 0, StepSize(64, 4)), 2 * 64128 * 53)
    assert graph_bytes(plan, 0, LIMITS, GRAPHS) == 4 * 64128 * 4 + shared + LIBRARIES + SEGMENTS
    assert graph_bytes(plan, 0, LIMITS, GraphSizes()) == 0


@pytest.mark.parametrize(
    ("limits", "largest", "draws"),
    [
        (StepLimits(tokens=16, sequences=1, context=64), 16, 1),
        (StepLimits(tokens=17, sequences=2, context=64), 64, 2),
        (StepLimits(tokens=16, sequences=3, context=64), 16, 2),
    ],
)
def test_only_graphs_count_that_a_step_can_need(
    limits: StepLimits, largest: int, draws: int
) -> None:
    """It takes the next larger one."""
    plan = make_plan(model_spec(SMOLLM2), 1)
    shared = max(
        layer_bytes(plan, 0, largest),
        logits_bytes(plan, 0, StepSize(largest, 4)),
        draws * 49152 * 53,
    )
    expected = 4 * 49152 * 4 + shared + LIBRARIES + SEGMENTS
    assert graph_bytes(plan, 0, limits, GRAPHS) == expected


@given(spec=specs(), data=st.data())
def test_larger_steps_never_need_less_and_a_shard_never_more_than_the_whole(
    spec: ModelSpec, data: st.DataObject
) -> None:
    sizes = st.integers(1, 4096)
    low, high = (
        StepLimits(*pair)
        for pair in zip(
            *(sorted((data.draw(sizes), data.draw(sizes))) for _ in range(3)), strict=True
        )
    )
    whole = make_plan(spec, 1)
    plan = make_plan(spec, data.draw(st.sampled_from(fitting_tp_sizes(spec)[:8])))
    for rank in range(plan.tp_size):
        assert workspace_bytes(plan, rank, low) <= workspace_bytes(plan, rank, high)
        assert workspace_bytes(plan, rank, high) <= workspace_bytes(whole, 0, high)
        assert graph_bytes(plan, rank, low, GRAPHS) <= graph_bytes(plan, rank, high, GRAPHS)
        assert graph_bytes(plan, rank, high, GRAPHS) <= graph_bytes(whole, 0, high, GRAPHS)


def test_of_a_cpu_no_workspace_is_planned_and_no_graph() -> None:
    plan = make_plan(model_spec(SMOLLM2), 2)
    assert planned(plan, 1, cpu(GIB), SETTINGS) == MemoryLedger(
        weights=MemoryUse(plan.ranks[1].weight_bytes),
        kv_cache=MemoryUse(16 * plan.ranks[1].kv_bytes_per_token),
        graphs=MemoryUse(0),
    )


# The room for the cache


def test_the_cache_gets_what_is_free_but_for_graphs_steps_and_what_is_kept_back() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 1)
    beside = workspace_bytes(plan, 0, LIMITS) + graph_bytes(plan, 0, LIMITS, GRAPHS)
    room = cache_room(plan, 0, gpu(100 * GIB, free=80 * GIB), SETTINGS)
    assert room == 70 * GIB - beside
    least = 16 * plan.ranks[0].kv_bytes_per_token
    just = gpu(100 * GIB, free=10 * GIB + beside + least)
    assert cache_room(plan, 0, just, SETTINGS) == least
    one_less = replace(just, memory_available_bytes=just.memory_available_bytes - 1)
    refusal(lambda: cache_room(plan, 0, one_less, SETTINGS))


def test_too_little_room_is_told_with_the_ledger() -> None:
    plan = make_plan(model_spec(LLAMA_8B), 1)
    loaded = MemoryLedger(weights=MemoryUse(plan.ranks[0].weight_bytes, 16 * GIB))
    device = replace(gpu(24 * GIB, free=3 * GIB), memory=loaded)
    error = refusal(lambda: cache_room(plan, 0, device, replace(SETTINGS, least_cache_tokens=8192)))
    assert error.field == "gpu_memory_utilization"
    for words in (
        "gpu_memory_utilization = 0.9: rank 0 (cuda:0) has ",
        "left for the KV cache, which is to hold 8192 tokens",
        "weights 16.00 GiB of 14.96 GiB planned, KV cache 1.00 GiB planned, graphs ",
        "workspace ",
        "3.00 GiB of 24.00 GiB are free",
    ):
        assert words in error.message


# A model that does not fit


def test_a_model_too_large_for_a_gpu_is_refused_with_the_ledger_and_what_fits() -> None:
    plan = make_plan(model_spec(LLAMA_70B), 1)
    error = refusal(lambda: check_fits(plan, [gpu(140 * GIB)], SETTINGS))
    assert error.field == "tp_size"
    for words in (
        "tp_size = 1: rank 0 (cuda:0) needs 13",
        "weights 131.42 GiB planned, KV cache 5.0 MiB planned, graphs ",
        "workspace ",
        "may use 126.00 GiB of 140.00 GiB",
        "; the smallest tp size that fits such memory is 2",
    ):
        assert words in error.message
    check_fits(make_plan(model_spec(LLAMA_70B), 2), [gpu(140 * GIB)] * 2, SETTINGS)


def test_the_rank_whose_gpu_is_too_small_is_named() -> None:
    plan = make_plan(model_spec(LLAMA_70B), 2)
    error = refusal(lambda: check_fits(plan, [gpu(140 * GIB), gpu(24 * GIB, index=1)], SETTINGS))
    assert "tp_size = 2: rank 1 (cuda:1) needs" in error.message


def test_where_no_size_fits_that_is_said() -> None:
    plan = make_plan(model_spec(LLAMA_70B), 1)
    error = refusal(lambda: check_fits(plan, [gpu(GIB)], SETTINGS))
    assert error.message.endswith("; no tp size up to 64 fits such memory")


def test_where_the_cache_is_given_only_weights_are_reckoned_with() -> None:
    """Somebody who says how large it is may know better what the rest takes."""
    plan = make_plan(model_spec(LLAMA_70B), 1)
    given_cache = replace(SETTINGS, is_cache_given=True)
    check_fits(plan, [gpu(132 * GIB)], given_cache)
    error = refusal(lambda: check_fits(plan, [gpu(131 * GIB)], given_cache))
    assert "needs 131.42 GiB (weights 131.42 GiB planned) and may use 131.00 GiB" in error.message


@given(spec=specs(), data=st.data())
def test_the_size_that_is_named_fits_and_no_smaller_one_does(
    spec: ModelSpec, data: st.DataObject
) -> None:
    sizes = fitting_tp_sizes(spec)
    small = replace(SETTINGS, limits=StepLimits(tokens=8, sequences=2, context=32))
    whole = planned(make_plan(spec, 1), 0, gpu(0), small).planned_bytes
    device = gpu(data.draw(st.integers(1, 2 * whole)))
    tp_size = data.draw(st.sampled_from(sizes))

    def fits(tp_size: int) -> bool:
        try:
            check_fits(make_plan(spec, tp_size), [device] * tp_size, small)
        except InvalidArgument:
            return False
        return True

    assume(not fits(tp_size))
    plan = make_plan(spec, tp_size)
    message = refusal(lambda: check_fits(plan, [device] * tp_size, small)).message
    fitting = [size for size in sizes if fits(size)]
    if fitting:
        assert message.endswith(f"the smallest tp size that fits such memory is {fitting[0]}")
    else:
        assert message.endswith("no tp size up to 64 fits such memory")


def test_the_ranks_of_a_host_share_its_memory() -> None:
    plan = make_plan(model_spec(SMOLLM2), 2, dtype="float32")
    first, second = (shard.weight_bytes for shard in plan.ranks)
    check_fits(plan, [cpu(first + second)] * 2, SETTINGS)
    check_fits(plan, [cpu(first, "a"), cpu(second, "b")], SETTINGS)
    refusal(lambda: check_fits(plan, [cpu(first + second - 1)] * 2, SETTINGS))
    error = refusal(lambda: check_fits(plan, [cpu(300 * MIB)] * 2, SETTINGS))
    assert error.message == (
        "tp_size = 2: ranks 0 and 1 need 513.3 MiB for weights on a host (cpu) that has 300.0 MiB; "
        "with a host for each rank, the smallest tp size that fits such memory is 2"
    )
    error = refusal(lambda: check_fits(plan, [cpu(first), cpu(MIB, "b")], SETTINGS))
    assert "rank 1 needs " in error.message and "no tp size up to 64" in error.message
