"""Timed steps on request: exactly so many, of what runs, or of requests that are made for it."""

import asyncio

import pytest

from client.times_view import times_tables
from colrow.errors import InvalidArgument, Unavailable
from colrow.v1 import control_service_pb2 as pb
from coordinator import time_communication
from coordinator.convert import operators
from coordinator.step_times import StepTimes
from tests.unit.test_engine import (
    CONTEXT,
    Running,
    continuation,
    prompt_without_eos,
)
from tests.unit.test_watch import text

pytestmark = pytest.mark.timeout(30)


async def slowly() -> None:
    await asyncio.sleep(0.001)


async def started(running: Running, prompt: list[int]) -> "asyncio.Task[list[int]]":
    """A request for 40 tokens, of which the first steps were sent."""
    request = asyncio.create_task(running.tokens(prompt, 40))
    while not running.workers.steps:
        await asyncio.sleep(0)
    return request


def timed(running: Running) -> list[int]:
    """The ids of the steps that were sent to be timed."""
    return [step.step_id for step in running.workers.steps if step.times_collectives]


async def test_where_nothing_runs_own_requests_do_until_all_steps_are_timed() -> None:
    async with Running() as running:
        times = await time_communication.run(running.engine, 20, 1)
        assert timed(running) == list(range(1, 21))
        assert (times.num_steps, times.num_tokens, times.steps_us) == (20, 20, 20_000)
        await asyncio.wait_for(running.engine.idle.wait(), 5)
        assert len(running.workers.steps) == 20, "none is left behind"
        assert running.scheduler.blocks.num_used == 0


async def test_a_call_costs_what_it_took_on_the_rank_that_did_not_wait() -> None:
    async with Running() as running:
        times = await time_communication.run(running.engine, 10, 1)
    layer, sampler = times.communication
    assert (layer.operation, layer.module, layer.path) == ("all_reduce", "layer", "shm")
    assert (layer.calls, layer.payload_bytes) == (20, 160)
    assert layer.own_ns == 10 * (30_000 + 40_000), "the shortest of each call, not of the sums"
    assert layer.rank_ns == [10 * 120_000, 10 * 140_000]
    assert (sampler.calls, sampler.payload_bytes, sampler.own_ns) == (10, 170, 50_000)


async def test_more_steps_than_the_context_holds_take_several_requests() -> None:
    num_steps = 3 * CONTEXT
    async with Running() as running:
        times = await time_communication.run(running.engine, num_steps, 1)
        assert len(timed(running)) == num_steps == times.num_tokens
        assert len(running.observer.records) > 3


async def test_own_prompts_fill_each_step() -> None:
    async with Running() as running:
        times = await time_communication.run(running.engine, 5, 24)
        steps = [step for step in running.workers.steps if step.times_collectives]
        assert [[chunk.num_tokens for chunk in step.chunks] for step in steps] == [[24]] * 5
        assert times.num_tokens == 5 * 24


async def test_requests_that_run_go_on_and_theirs_are_the_steps() -> None:
    prompt = prompt_without_eos(40)
    async with Running(delay=slowly) as running:
        request = await started(running, prompt)
        times = await time_communication.run(running.engine, 7, 1)
        assert await request == continuation(prompt, 40)
        assert len(timed(running)) == 7
        assert times.num_tokens == 7
        assert len(running.observer.records) == 1, "no request was made for it"
        # It has ended; the next is not timed.
        assert await running.tokens(prompt, 5) == continuation(prompt, 5)
        assert len(timed(running)) == 7


async def test_two_at_once_each_get_their_number_of_steps() -> None:
    async with Running() as running:
        first, second = await asyncio.gather(
            time_communication.run(running.engine, 6, 1),
            time_communication.run(running.engine, 9, 1),
        )
        assert (first.steps_us, second.steps_us) == (6_000, 9_000)
        assert first.communication[0].calls == 12
        assert second.communication[0].calls == 18


async def test_one_that_is_cancelled_leaves_nothing_and_the_next_counts_its_own_steps() -> None:
    async with Running(run_ahead=3, delay=slowly) as running:
        asked = asyncio.create_task(time_communication.run(running.engine, 500, 1))
        while len(running.workers.steps) < 10:
            await slowly()
        asked.cancel()
        times = await time_communication.run(running.engine, 5, 1)
        assert times.steps_us == 5_000
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert running.scheduler.blocks.num_used == 0


async def test_losing_the_workers_is_unavailable_and_requests_outlive_it() -> None:
    prompt = prompt_without_eos(40)
    async with Running(delay=slowly, recovers=True) as running:
        request = await started(running, prompt)
        running.workers.fail_at = running.workers.last_step_id + 5
        with pytest.raises(Unavailable) as caught:
            await time_communication.run(running.engine, 500, 1)
        assert (caught.value.reason, caught.value.retry_after_s) == ("STEPS_LOST", 1.0)
        assert await request == continuation(prompt, 40)
        # The workers are back.
        assert (await time_communication.run(running.engine, 3, 1)).num_tokens == 3


async def test_an_engine_that_was_given_up_says_so() -> None:
    async with Running() as running:
        running.workers.fail_at = 2
        with pytest.raises(Unavailable):
            await time_communication.run(running.engine, 10, 1)
        await asyncio.wait([running.loop])
        with pytest.raises(Unavailable, match="not recovered"):
            await time_communication.run(running.engine, 10, 1)


@pytest.mark.parametrize(
    ("field", "num_steps", "tokens_per_step"),
    [
        ("num_steps", 0, 1),
        ("num_steps", 1001, 1),
        ("num_steps", 10**6, 1),
        ("tokens_per_step", 5, 0),
        ("tokens_per_step", 5, 33),  # a step holds 32
        ("tokens_per_step", 5, 2**32 - 1),
    ],
)
async def test_numbers_that_can_not_be_are_refused_by_name(
    field: str, num_steps: int, tokens_per_step: int
) -> None:
    async with Running() as running:
        with pytest.raises(InvalidArgument, match=f"^{field} = "):
            await time_communication.run(running.engine, num_steps, tokens_per_step)
        assert running.workers.steps == []


# What is shown


async def response(num_steps: int) -> pb.TimeCommunicationResponse:
    async with Running() as running:
        return operators.times_response(await time_communication.run(running.engine, num_steps, 1))


async def test_the_table_has_the_shares_of_each_operation_and_path() -> None:
    table, about = map(text, times_tables(await response(10)))
    assert "Communication in 10 steps that were timed, of 1 token and 1,000 µs each" in table
    assert "all_reduce shm 2 16 35.0 70.0 7.0% 60.0" in table
    assert "all_gather shm 1 17 5.0 5.0 0.5% 0.0" in table
    assert "waits for none" in about


async def test_by_module_there_is_a_row_for_each() -> None:
    _, table, _ = map(text, times_tables(await response(1), by_module=True))
    assert "layer all_reduce shm 2" in table
    assert "sampler all_gather shm 1" in table


def test_one_rank_has_nothing_to_communicate() -> None:
    alone = StepTimes(4, num_tokens=4, steps_us=8000)
    (line,) = times_tables(operators.times_response(alone))
    assert line == (
        "In 4 steps that were timed, of 1 token and 2,000 µs each, nothing was communicated: "
        "one rank has nobody to talk to."
    )
