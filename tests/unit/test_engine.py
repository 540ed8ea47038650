"""The step loop and its streams, on workers that are a function: right tokens, whoever else is there."""

import asyncio
import random
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import aclosing

import pytest
import tokenizers

from colrow.errors import Internal, InvalidArgument, ServiceError, Unavailable
from coordinator.block_manager import BlockManager
from coordinator.engine import Engine, ModelLimits, Output, SamplingRequest
from coordinator.scheduler import Scheduler, Step
from coordinator.sequence import FinishReason
from coordinator.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(30)

VOCAB_SIZE = 50
CONTEXT = 64
EOS = 7
GREEDY = SamplingRequest(temperature=0)


def next_token(tokens: SequenceOf[int]) -> int:
    """Stands in for a model: a token that depends on every token before it, and on their order."""
    return zlib.crc32(bytes(tokens)) % VOCAB_SIZE


def continuation(prompt: SequenceOf[int], max_tokens: int) -> list[int]:
    """What is generated when EOS, the context and nothing else end it."""
    output: list[int] = []
    while len(output) < max_tokens and EOS not in output:
        output.append(next_token((*prompt, *output)))
    return output


def prompt_without_eos(max_tokens: int, seed: int = 0) -> list[int]:
    """A prompt whose continuation does not stop before `max_tokens`."""
    generator = random.Random(seed)
    while True:
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(4)]
        if EOS not in continuation(prompt, max_tokens):
            return prompt


def prompt_that_stops() -> list[int]:
    """A prompt whose continuation has a few tokens and then EOS."""
    return next(p for p, _ in requests(100) if EOS in continuation(p, 20)[2:])


class Workers:
    """Executes steps in memory and notes every call; a step takes what `delay` says."""

    def __init__(self, delay: Callable[[], Awaitable[None]]) -> None:
        self.calls: list[tuple[str, int]] = []
        self.steps: list[Step] = []
        self.known: dict[int, list[int]] = {}
        self.fail_at: int | None = None
        self.error: Exception = Internal("a rank fell over")
        self._delay = delay
        self._results: deque[tuple[int, dict[int, int]]] = deque()

    async def send(self, step: Step) -> None:
        self.calls.append(("send", step.step_id))
        self.steps.append(step)
        for sequence_id in step.finished:
            del self.known[sequence_id]
        for new in step.new_sequences:
            self.known[new.sequence.sequence_id] = list(new.token_ids)
        sampled = {}
        for chunk in step.chunks:
            if chunk.samples:
                tokens = self.known[chunk.sequence.sequence_id]
                tokens.append(next_token(tokens))
                sampled[chunk.sequence.sequence_id] = tokens[-1]
        self._results.append((step.step_id, sampled))

    async def receive(self) -> dict[int, int]:
        step_id, sampled = self._results.popleft()
        await self._delay()
        self.calls.append(("receive", step_id))
        if step_id == self.fail_at:
            raise self.error
        return sampled


async def at_once() -> None:
    """A step that takes no time; others still get their turn."""
    await asyncio.sleep(0)


class Running:
    """An engine in its loop, on a cache of `num_blocks` blocks of 4 tokens."""

    def __init__(
        self,
        *,
        run_ahead: int = 2,
        num_blocks: int = 64,
        delay: Callable[[], Awaitable[None]] = at_once,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.workers = Workers(delay)
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4), max_batched_tokens=32, max_running=16
        )
        limits = ModelLimits(VOCAB_SIZE, CONTEXT, (EOS,))
        self.engine = Engine(self.workers, self.scheduler, limits, tokenizer, run_ahead=run_ahead)

    async def __aenter__(self) -> "Running":
        self.loop = asyncio.create_task(self.engine.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.loop.cancel()
        await asyncio.wait([self.loop])

    def generate(
        self, prompt: SequenceOf[int], max_tokens: int | None
    ) -> AsyncGenerator[Output, None]:
        return self.engine.generate(prompt, GREEDY, max_tokens)

    async def tokens(self, prompt: SequenceOf[int], max_tokens: int | None) -> list[int]:
        return [token async for out in self.generate(prompt, max_tokens) for token in out.token_ids]


def requests(count: int) -> list[tuple[list[int], int]]:
    """Prompts of all lengths, and how many tokens each may get."""
    generator = random.Random(count)
    return [
        (
            [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, 30))],
            generator.randint(1, 30),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [16, 200], ids=["preempting", "roomy"])
async def test_every_reader_gets_its_own_tokens_whatever_else_runs(
    run_ahead: int, num_blocks: int
) -> None:
    generator = random.Random(run_ahead)

    async def delay() -> None:
        await asyncio.sleep(generator.choice((0, 0, 0.0005)))

    asked = requests(40)
    async with Running(run_ahead=run_ahead, num_blocks=num_blocks, delay=delay) as running:

        async def late(index: int, prompt: list[int], max_tokens: int) -> list[int]:
            await asyncio.sleep(index * 0.0005)
            return await running.tokens(prompt, max_tokens)

        got = await asyncio.gather(*(late(i, *request) for i, request in enumerate(asked)))
        assert got == [continuation(*request) for request in asked]
        assert bool(running.scheduler.num_preemptions) == (num_blocks == 16)
        assert running.scheduler.blocks.num_used == 0
        assert running.engine.num_prompt_tokens == sum(len(prompt) for prompt, _ in asked)
        assert running.engine.num_generated_tokens == sum(map(len, got))


async def test_tokens_come_one_by_one_and_the_last_one_says_why_it_is_the_last() -> None:
    prompt = prompt_without_eos(5)
    async with Running() as running:
        outputs = [output async for output in running.generate(prompt, 5)]
    assert [len(output.token_ids) for output in outputs] == [1] * 5
    assert [output.finish_reason for output in outputs] == [None] * 4 + [FinishReason.LENGTH]


async def test_a_stop_token_ends_with_stop_and_is_the_last_token() -> None:
    prompt = prompt_that_stops()
    async with Running() as running:
        outputs = [output async for output in running.generate(prompt, 20)]
    assert outputs[-1].token_ids[-1] == EOS
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert [t for o in outputs for t in o.token_ids] == continuation(prompt, 20)


async def test_without_max_tokens_the_context_is_filled() -> None:
    prompt = prompt_without_eos(CONTEXT - 4)
    async with Running() as running:
        outputs = [output async for output in running.generate(prompt, None)]
    assert sum(len(output.token_ids) for output in outputs) == CONTEXT - len(prompt)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("stops", [False, True])
async def test_text_continues_the_prompt_and_ends_before_the_token_that_stops_it(
    stops: bool,
) -> None:
    words = {f"w{id}": id for id in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    prompt = prompt_that_stops() if stops else prompt_without_eos(20)
    async with Running(tokenizer=Tokenizer(backend, None, {})) as running:
        outputs = [output async for output in running.generate(prompt, 20)]
    tokens = continuation(prompt, 20)
    assert [token for output in outputs for token in output.token_ids] == tokens
    text = "".join(output.text for output in outputs)
    assert text == "".join(f" w{token}" for token in tokens if token != EOS)


async def test_a_reader_that_is_slow_finds_its_tokens_together_and_stalls_nobody() -> None:
    prompt = prompt_without_eos(30)
    async with Running() as running:
        slow = running.generate(prompt, 30)
        async with aclosing(slow):
            first = await anext(slow)
            for other, max_tokens in requests(5):
                assert await running.tokens(other, max_tokens) == continuation(other, max_tokens)
            while running.scheduler.running:
                await asyncio.sleep(0)
            rest = [output async for output in slow]
    assert len(first.token_ids) == 1
    assert [(len(output.token_ids), output.finish_reason) for output in rest] == [
        (29, FinishReason.LENGTH)
    ]
    assert [*first.token_ids, *rest[0].token_ids] == continuation(prompt, 30)


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
async def test_a_slow_reader_sees_no_token_that_was_sampled_beyond_the_end(run_ahead: int) -> None:
    prompt = prompt_that_stops()
    async with (
        Running(run_ahead=run_ahead) as running,
        aclosing(running.generate(prompt, 20)) as slow,
    ):
        tokens = [*(await anext(slow)).token_ids]
        # Another request keeps the steps coming.
        await running.tokens(prompt_without_eos(30), 30)
        tokens += [token async for output in slow for token in output.token_ids]
    assert tokens == continuation(prompt, 20)


async def test_leaving_the_iteration_frees_the_blocks_and_the_next_step_tells_the_workers() -> None:
    prompt = prompt_without_eos(40)
    async with Running() as running:
        staying = asyncio.create_task(running.tokens(prompt_without_eos(40, seed=1), 40))
        leaving = running.generate(prompt, 40)
        for _ in range(3):
            await anext(leaving)
        (gone,) = (s for s in running.scheduler.running if s.prompt == tuple(prompt))
        used, owned = running.scheduler.blocks.num_used, len(gone.block_ids)
        sent = len(running.workers.steps)
        await leaving.aclose()
        # At once: no step has passed since.
        assert len(running.workers.steps) == sent
        assert running.scheduler.blocks.num_used == used - owned
        assert gone not in running.scheduler.running
        await staying
        later = running.workers.steps[sent:]
        assert later[0].finished == (gone.sequence_id,)
        assert not any(chunk.sequence is gone for step in later for chunk in step.chunks)
        assert gone.sequence_id not in running.workers.known


async def test_a_task_that_is_cancelled_while_it_waits_frees_its_blocks() -> None:
    never = asyncio.Event()

    async def delay() -> None:
        await never.wait()

    async with Running(delay=delay) as running:
        reader = asyncio.create_task(running.tokens([1, 2, 3], 10))
        while not running.workers.steps:
            await asyncio.sleep(0)
        assert running.scheduler.blocks.num_used > 0
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert running.scheduler.blocks.num_used == 0


async def test_a_failed_step_ends_every_stream_and_every_later_call_with_a_time_to_retry() -> None:
    async def error_of(prompt: list[int]) -> tuple[list[int], ServiceError]:
        tokens: list[int] = []
        with pytest.raises(ServiceError) as caught:
            async for output in running.generate(prompt, 40):
                tokens += output.token_ids
        return tokens, caught.value

    prompts = [prompt_without_eos(40, seed) for seed in range(3)]
    async with Running() as running:
        running.workers.fail_at = 6
        for tokens, error in await asyncio.gather(*map(error_of, prompts)):
            assert len(tokens) == 5  # what the steps before it gave is not lost
            assert (error.code, error.reason) == ("UNAVAILABLE", "STEP_FAILED")
            assert "a rank fell over" in error.message
            assert error.retry_after_s
        with pytest.raises(Internal, match="a rank fell over"):
            await running.loop
        tokens, error = await error_of(prompts[0])
        assert (tokens, error.code) == ([], "UNAVAILABLE")
        assert error.retry_after_s
        assert running.scheduler.blocks.num_used == 0


async def test_a_slow_reader_gets_the_tokens_before_a_failed_step_and_then_its_error() -> None:
    prompt = prompt_without_eos(40)
    async with Running() as running:
        running.workers.fail_at = 6
        slow = running.generate(prompt, 40)
        tokens = [*(await anext(slow)).token_ids]
        await asyncio.wait([running.loop])
        tokens += (await anext(slow)).token_ids
        assert tokens == continuation(prompt, 5)
        with pytest.raises(Unavailable, match="a rank fell over"):
            await anext(slow)


async def test_a_bug_in_a_step_ends_the_streams_too() -> None:
    async with Running() as running:
        running.workers.fail_at, running.workers.error = 2, RuntimeError("a bug")
        with pytest.raises(Unavailable):
            await running.tokens(prompt_without_eos(20), 20)
        with pytest.raises(RuntimeError, match="a bug"):
            await running.loop


async def test_stopping_the_engine_ends_the_streams() -> None:
    async with Running() as running:
        stream = running.generate(prompt_without_eos(40), 40)
        await anext(stream)
        running.loop.cancel()
        with pytest.raises(Unavailable, match="stopped"):
            async for _ in stream:
                pass
    assert running.loop.cancelled()


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
async def test_steps_are_sent_ahead_of_the_results_that_were_read(run_ahead: int) -> None:
    prompt = prompt_without_eos(8)
    async with Running(run_ahead=run_ahead) as running:
        assert await running.tokens(prompt, 8) == continuation(prompt, 8)
        calls = running.workers.calls
    ahead = [
        sum(name == "send" for name, _ in calls[: calls.index(("receive", step))]) - (step - 1)
        for step in range(1, 9)
    ]
    # Of the last steps there are none left to send.
    assert ahead == [min(run_ahead, 8 - step) for step in range(8)]
    assert [step for name, step in calls if name == "receive"] == [*range(1, 9)]


async def test_an_idle_engine_sends_nothing_and_wakes_for_the_next_request() -> None:
    prompt = prompt_without_eos(3)
    async with Running() as running:
        schedule, asked = running.scheduler.schedule, 0

        def counted() -> Step | None:
            nonlocal asked
            asked += 1
            return schedule()

        running.scheduler.schedule = counted  # type: ignore[method-assign]
        for count in (1, 2):
            assert await running.tokens(prompt, 3) == continuation(prompt, 3)
            before = asked
            await asyncio.sleep(0.01)
            assert asked <= before + 2
            assert len(running.workers.calls) == count * 3 * 2


async def test_a_seed_reaches_the_workers_and_without_one_each_request_draws_its_own() -> None:
    async with Running() as running:
        for seed in (42, None, None):
            sampling = SamplingRequest(temperature=0.5, top_k=3, top_p=0.9, seed=seed)
            async for _ in running.engine.generate([1, 2], sampling, 1):
                pass
        new = [n.sequence.sampling for step in running.workers.steps for n in step.new_sequences]
    assert [(s.temperature, s.top_k, s.top_p) for s in new] == [(0.5, 3, 0.9)] * 3
    assert new[0].seed == 42
    assert len({s.seed for s in new}) == 3
    assert all(0 <= s.seed < 2**64 for s in new)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "prompt = '': is empty"),
        ([0, VOCAB_SIZE], 1, r"prompt.token_ids = 50: the vocabulary has 50 ids"),
        ([-1], 1, r"prompt.token_ids = -1"),
        ([1] * CONTEXT, 1, r"prompt = '64 tokens': the context holds 64 with at least one new"),
        ([1] * CONTEXT, None, r"prompt = '64 tokens'"),
        ([1, 2], 0, r"max_tokens = 0: is not in \[1, 62\]"),
        ([1, 2], -1, r"max_tokens = -1"),
        ([1, 2], CONTEXT - 1, r"max_tokens = 63: is not in \[1, 62\].*the prompt has 2"),
    ],
)
async def test_a_request_that_can_not_be_served_is_refused_before_anything_is_scheduled(
    prompt: list[int], max_tokens: int | None, message: str
) -> None:
    async with Running() as running:
        with pytest.raises(InvalidArgument, match=message):
            await running.tokens(prompt, max_tokens)
        assert not running.scheduler.waiting
        await asyncio.sleep(0.01)
        assert running.workers.calls == []
        assert running.engine.num_prompt_tokens == 0
        assert await running.tokens([1] * (CONTEXT - 1), 1) == continuation([1] * 63, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=rf"sampling\.{field} = {value}"):
        SamplingRequest(**{field: value})  # type: ignore[arg-type]
