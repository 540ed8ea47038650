"""The step loop and its streams, on workers that are a function: right tokens, whoever else is there."""

import asyncio
import random
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import aclosing
from typing import Any

import pytest
import tokenizers

from colrow.errors import Internal, InvalidArgument, ServiceError, Unavailable
from coordinator.block_manager import BlockManager
from coordinator.engine import Engine
from coordinator.request import (
    ModelLimits,
    Output,
    Request,
    RequestRecord,
    SamplingRequest,
    Usage,
)
from coordinator.scheduler import (
    RankTimes,
    Scheduler,
    SequenceLogprobs,
    Step,
    StepOutput,
    TimedCollective,
)
from coordinator.sequence import FinishReason, TokenLogprobs
from coordinator.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(30)

VOCAB_SIZE = 50
CONTEXT = 64
EOS = 7
GREEDY = SamplingRequest(temperature=0)


def next_token(tokens: SequenceOf[int]) -> int:
    """Stands in for a model: a token that depends on every token before it, and on their order."""
    return zlib.crc32(bytes(tokens)) % VOCAB_SIZE


def logprob_of(tokens: SequenceOf[int], position: int) -> TokenLogprobs:
    """Stands in for the log-probability of the token there; it tells token and position apart."""
    return TokenLogprobs(tokens[position], -float(position), 1, ((tokens[position], 0.0),))


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
        self.computed: dict[int, int] = {}
        self.last_step_id = 0
        self.fail_at: int | None = None
        self.error: Exception = Internal("a rank fell over")
        self._delay = delay
        self._results: deque[tuple[int, StepOutput]] = deque()

    def forget(self) -> None:
        """What workers do that join a new group."""
        self.known.clear()
        self.computed.clear()
        self._results.clear()
        self.last_step_id = 0
        self.fail_at = None

    async def send(self, step: Step) -> None:
        assert step.step_id == self.last_step_id + 1
        self.last_step_id = step.step_id
        self.calls.append(("send", step.step_id))
        self.steps.append(step)
        for sequence_id in step.finished:
            del self.known[sequence_id]
        for new in step.new_sequences:
            self.known[new.sequence.sequence_id] = list(new.token_ids)
            self.computed[new.sequence.sequence_id] = 4 * len(new.cached_block_ids)
        sampled = {}
        logprobs = []
        for chunk in step.chunks:
            sequence_id, sampling = chunk.sequence.sequence_id, chunk.sequence.sampling
            tokens = self.known[sequence_id]
            start = self.computed[sequence_id]
            self.computed[sequence_id] = stop = start + chunk.num_tokens
            if chunk.samples:
                tokens.append(next_token(tokens))
                sampled[sequence_id] = tokens[-1]
            wanted = []
            if sampling.prompt_logprobs is not None:
                wanted = [*range(start + 1, min(stop + 1, len(chunk.sequence.prompt)))]
            if sampling.logprobs is not None and chunk.samples:
                wanted.append(stop)
            logprobs += [
                SequenceLogprobs(sequence_id, at, (logprob_of(tokens, at),)) for at in wanted
            ]
        by_rank = tuple(RankTimes(1000, self.collectives(step, rank)) for rank in range(2))
        self._results.append((step.step_id, StepOutput(sampled, tuple(logprobs), by_rank)))

    def collectives(self, step: Step, rank: int) -> tuple[TimedCollective, ...]:
        """Where they are asked for: of two calls, each rank waits for the other in one."""
        if not step.times_collectives:
            return ()
        size = 8 * sum(chunk.num_tokens for chunk in step.chunks)
        return (
            TimedCollective("all_reduce", "layer", "shm", size, 100_000 if rank else 30_000),
            TimedCollective("all_reduce", "layer", "shm", size, 40_000 if rank else 90_000),
            TimedCollective("all_gather", "sampler", "shm", 16 + rank, 5_000),
        )

    async def receive(self) -> StepOutput:
        step_id, sampled = self._results.popleft()
        await self._delay()
        self.calls.append(("receive", step_id))
        if step_id == self.fail_at:
            raise self.error
        return sampled


async def at_once() -> None:
    """A step that takes no time; others still get their turn."""
    await asyncio.sleep(0)


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.step_tokens: list[int] = []
        self.first_tokens: list[float] = []
        self.next_tokens: list[float] = []
        self.records: list[RequestRecord] = []
        self.refused: list[str] = []

    def step(self, num_tokens: int) -> None:
        self.step_tokens.append(num_tokens)

    def first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def next_token(self, seconds: float) -> None:
        self.next_tokens.append(seconds)

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)

    def rejected(self, request: Request, error: ServiceError) -> None:
        self.refused.append(error.reason)


class Running:
    """An engine in its loop, on a cache of `num_blocks` blocks of 4 tokens."""

    def __init__(
        self,
        *,
        run_ahead: int = 2,
        num_blocks: int = 64,
        delay: Callable[[], Awaitable[None]] = at_once,
        tokenizer: Tokenizer | None = None,
        max_waiting: int = 1000,
        recovers: bool = False,
    ) -> None:
        self.recovers = recovers
        self.workers = Workers(delay)
        self.observer = Notes()
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4), max_batched_tokens=32, max_running=16
        )
        self.engine = Engine(
            self.workers,
            self.scheduler,
            ModelLimits(VOCAB_SIZE, CONTEXT, (EOS,), num_blocks * 4),
            tokenizer,
            run_ahead=run_ahead,
            max_waiting=max_waiting,
            observer=self.observer,
        )

    async def __aenter__(self) -> "Running":
        self.loop = asyncio.create_task(self._drive())
        return self

    async def _drive(self) -> None:
        """As the cluster does it: a step that fails ends requests, or with `recovers` none."""
        try:
            while True:
                try:
                    await self.engine.run()
                except ServiceError:
                    if not self.recovers:
                        raise
                    self.workers.forget()
        except asyncio.CancelledError:
            self.engine.fail(Unavailable("stopped", retry_after_s=5.0))
            raise
        except Exception as error:
            self.engine.fail(Unavailable(f"not recovered: {error}", retry_after_s=5.0))
            raise

    async def __aexit__(self, *_: object) -> None:
        self.loop.cancel()
        await asyncio.wait([self.loop])

    def generate(
        self, prompt: SequenceOf[int], max_tokens: int | None = None, **settings: Any
    ) -> AsyncGenerator[Output, None]:
        settings.setdefault("sampling", GREEDY)
        return self.engine.generate(
            Request("a request", tuple(prompt), max_tokens=max_tokens, **settings)
        )

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
        used, owned = running.scheduler.blocks.num_used, len(gone.table.block_ids)
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
            assert error.code == "UNAVAILABLE"
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
            async for _ in running.generate([1, 2], 1, sampling=sampling):
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
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=rf"sampling\.{field} = {value}"):
        SamplingRequest(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, r"n = 0: is not in \[1, 128\]"),
        ({"n": 9, "max_tokens": 30}, r"n = 9: times max_tokens = 30 is more than the 256 tokens"),
        ({"min_tokens": 11, "max_tokens": 10}, r"min_tokens = 11: is not in \[0, 10\]"),
        ({"stop": ("",)}, r"stop = ''"),
        ({"stop": ("x",) * 65}, r"stop = 65"),
        ({"stop_token_ids": (VOCAB_SIZE,)}, r"stop_token_ids = 50: the vocabulary has 50"),
        ({"logprobs": 101}, r"logprobs = 101"),
        ({"prompt_logprobs": -1}, r"prompt_logprobs = -1"),
        ({"priority": 2**31}, r"priority = 2147483648"),
        (
            {"sampling": SamplingRequest(logit_bias={VOCAB_SIZE: 1.0})},
            r"sampling.logit_bias = 50: the vocabulary",
        ),
        ({"max_tokens": 0}, r"max_tokens = 0"),
    ],
)
async def test_settings_that_can_not_be_are_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    async with Running() as running:
        with pytest.raises(InvalidArgument, match=message):
            await anext(running.generate([1, 2], **settings))
        assert running.workers.calls == []


def test_a_bias_out_of_range_is_refused_with_its_token() -> None:
    with pytest.raises(InvalidArgument, match=r"sampling\.logit_bias\[3\] = 100.5"):
        SamplingRequest(logit_bias={3: 100.5})


async def test_stop_strings_need_a_tokenizer() -> None:
    async with Running() as running:
        with pytest.raises(ServiceError, match="no tokenizer"):
            await anext(running.generate([1], stop=("x",)))


async def test_a_full_queue_refuses_with_a_time_to_retry_and_serves_on() -> None:
    async with Running(max_waiting=4) as running:
        readers = [asyncio.create_task(running.tokens([1, i], 40)) for i in range(20)]
        await asyncio.sleep(0.01)
        refused = [reader for reader in readers if reader.done() and reader.exception()]
        assert len(refused) == 16  # they came at once, before any could be admitted
        for reader in refused:
            error = reader.exception()
            assert isinstance(error, ServiceError)
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
            assert error.retry_after_s
        served = [reader for reader in readers if reader not in refused]
        assert all(await asyncio.gather(*served))
        assert await running.tokens([1, 2], 3)
        with pytest.raises(ServiceError, match="wait already"):
            await anext(running.generate([1, 2], 3, n=5))


async def test_n_continuations_share_the_prompt_and_each_has_its_own_seed() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    sampling = SamplingRequest(temperature=1, seed=11)
    async with Running() as running:
        outputs = [o async for o in running.generate(prompt, 6, n=3, sampling=sampling)]
        new = [n.sequence for step in running.workers.steps for n in step.new_sequences]
        one = [n async for n in running.generate(prompt, 6, sampling=sampling)]
    assert len({sequence.sampling.seed for sequence in new}) == 3
    assert new[0].sampling.seed == 11  # so the first is the same without the others
    assert [sequence.num_prefix_hits for sequence in new] == [0, 8, 8]
    by_index = {i: [t for o in outputs if o.index == i for t in o.token_ids] for i in range(3)}
    assert by_index == dict.fromkeys(range(3), continuation(prompt, 6))
    assert sum(o.finish_reason is not None for o in outputs) == 3
    assert [o.usage is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]
    total = 3 * len(continuation(prompt, 6))
    assert outputs[-1].usage == Usage(9, total, 0)
    assert one[-1].usage == Usage(9, total // 3, 8)


async def test_leaving_ends_every_continuation() -> None:
    async with Running() as running:
        stream = running.generate(prompt_without_eos(40), 40, n=3)
        await anext(stream)
        await stream.aclose()
        assert running.scheduler.blocks.num_used == 0
        assert (running.scheduler.running, running.scheduler.waiting) == ([], [])
        assert [record.outcome for record in running.observer.records] == ["abort"]


async def test_eos_is_passed_over_when_it_is_ignored_or_too_early() -> None:
    prompt = prompt_that_stops()
    stop = len(continuation(prompt, 20))
    async with Running() as running:
        ignoring = [o async for o in running.generate(prompt, 20, ignore_eos=True)]
        early = [o async for o in running.generate(prompt, 20, min_tokens=stop)]
        exact = [o async for o in running.generate(prompt, 20, min_tokens=stop - 1)]
        (_, suppressing, _) = (
            n.sequence.sampling for step in running.workers.steps for n in step.new_sequences
        )
    assert sum(len(o.token_ids) for o in ignoring) == 20
    assert sum(len(o.token_ids) for o in early) > stop
    assert sum(len(o.token_ids) for o in exact) == stop
    # The workers don't sample it before; here they do, and it is passed over.
    assert (suppressing.min_tokens, suppressing.suppressed) == (stop, (EOS,))


async def test_a_stop_token_of_the_request_is_named_as_the_reason() -> None:
    prompt = prompt_without_eos(10)
    tokens = continuation(prompt, 10)
    async with Running() as running:
        outputs = [o async for o in running.generate(prompt, 10, stop_token_ids=(tokens[4],))]
    got = [token for o in outputs for token in o.token_ids]
    assert got == tokens[: tokens.index(tokens[4]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, tokens[4])


def letters() -> Tokenizer:
    """Each token is one letter, and text is letters side by side."""
    alphabet = {chr(ord("A") + i): i for i in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, [], fuse_unk=False))
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, None, {})


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("run_ahead", [1, 2])
async def test_a_stop_string_ends_the_text_across_token_borders(
    include: bool, run_ahead: int
) -> None:
    prompt = prompt_without_eos(20)
    text = "".join(chr(ord("A") + t) for t in continuation(prompt, 20))
    stop = text[5:8]
    place = text.index(stop)
    async with Running(tokenizer=letters(), run_ahead=run_ahead) as running:
        outputs = [
            o async for o in running.generate(prompt, 20, stop=(stop, "??"), include_stop=include)
        ]
        assert running.scheduler.blocks.num_used == 0
    assert "".join(o.text for o in outputs) == text[: place + 3 * include]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, stop)
    assert sum(len(o.token_ids) for o in outputs) == place + 3
    # Nothing of it was shown before it was clear that it is one.
    shown = ""
    for output in outputs[:-1]:
        shown += output.text
        assert not any(shown.endswith(stop[:k]) for k in (1, 2))


async def test_what_only_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    prompt = prompt_without_eos(8)
    text = "".join(chr(ord("A") + t) for t in continuation(prompt, 8))
    async with Running(tokenizer=letters()) as running:
        outputs = [o async for o in running.generate(prompt, 8, stop=(text[-2:] + "?",))]
    assert "".join(o.text for o in outputs) == text
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_a_stop_string_ends_its_sequence_though_nobody_reads() -> None:
    prompt = prompt_without_eos(40)
    text = "".join(chr(ord("A") + t) for t in continuation(prompt, 40))
    async with Running(tokenizer=letters()) as running:
        stream = running.generate(prompt, 40, stop=(text[6:9],))
        await anext(stream)
        while running.scheduler.running:
            await asyncio.sleep(0)
        assert running.engine.num_generated_tokens == text.index(text[6:9]) + 3
        await stream.aclose()


@pytest.mark.parametrize("num_blocks", [16, 200], ids=["preempting", "roomy"])
async def test_log_probabilities_come_with_their_tokens_and_the_prompts_come_first(
    num_blocks: int,
) -> None:
    async with Running(num_blocks=num_blocks) as running:

        async def check(prompt: list[int], max_tokens: int) -> None:
            outputs = [
                o async for o in running.generate(prompt, max_tokens, logprobs=1, prompt_logprobs=1)
            ]
            whole = [*prompt, *continuation(prompt, max_tokens)]
            expected = [logprob_of(whole, at) for at in range(1, len(whole))]
            of_prompt = [item for o in outputs for item in o.prompt_logprobs]
            assert of_prompt == expected[: len(prompt) - 1]
            assert not any(o.prompt_logprobs for o in outputs[1:])
            assert [item for o in outputs for item in o.logprobs] == expected[len(prompt) - 1 :]
            for output in outputs:
                assert [item.token_id for item in output.logprobs] == [*output.token_ids]

        await asyncio.gather(*(check(*request) for request in requests(30)))
        assert bool(running.scheduler.num_preemptions) == (num_blocks == 16)


async def test_a_request_for_no_token_only_looks_at_its_prompt() -> None:
    prompt = [1] * CONTEXT  # as long as the context: there is no room for another token
    async with Running() as running:
        outputs = [o async for o in running.generate(prompt, 0, prompt_logprobs=0)]
        assert running.engine.num_generated_tokens == 0
    (output,) = outputs
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), FinishReason.LENGTH)
    assert list(output.prompt_logprobs) == [logprob_of(prompt, at) for at in range(1, CONTEXT)]
    assert output.usage == Usage(CONTEXT, 0, 0)


async def test_the_observer_hears_of_every_step_token_and_request() -> None:
    asked = requests(10)
    async with Running() as running:
        got = await asyncio.gather(*(running.tokens(*request) for request in asked))
        notes = running.observer
        assert sum(map(len, got)) == len(notes.first_tokens) + len(notes.next_tokens)
        assert len(notes.first_tokens) == len(notes.records) == 10
        assert len(notes.step_tokens) == running.scheduler.num_steps
        for record in notes.records:
            assert record.arrived <= record.scheduled <= record.first_token
            assert record.first_token <= record.last_token <= record.ended
            assert record.outcome in ("stop", "length")
        totals = sorted(record.num_generated_tokens for record in notes.records)
        assert totals == sorted(map(len, got))
        running.workers.fail_at = running.scheduler.num_steps + 2
        with pytest.raises(Unavailable):
            await running.tokens(prompt_without_eos(20), 20)
        assert notes.records[-1].outcome == "error"


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [16, 200], ids=["preempting", "roomy"])
async def test_requests_outlive_workers_that_forget_everything(
    run_ahead: int, num_blocks: int
) -> None:
    generator = random.Random(run_ahead)
    asked = requests(40)
    async with Running(run_ahead=run_ahead, num_blocks=num_blocks, recovers=True) as running:
        failures = 0

        async def fail_now_and_then() -> None:
            nonlocal failures
            while True:
                await asyncio.sleep(0.001)
                if running.workers.fail_at is None:
                    running.workers.fail_at = running.workers.last_step_id + generator.randint(1, 9)
                    failures += 1

        failing = asyncio.create_task(fail_now_and_then())

        async def check(index: int, prompt: list[int], max_tokens: int) -> None:
            await asyncio.sleep(index * 0.0005)
            outputs = [
                o async for o in running.generate(prompt, max_tokens, logprobs=0, prompt_logprobs=0)
            ]
            tokens = continuation(prompt, max_tokens)
            assert [t for o in outputs for t in o.token_ids] == tokens
            assert [item.token_id for o in outputs for item in o.logprobs] == tokens
            of_prompt = [item.token_id for o in outputs for item in o.prompt_logprobs]
            assert of_prompt == prompt[1:]

        await asyncio.gather(*(check(i, *request) for i, request in enumerate(asked)))
        failing.cancel()
        assert failures > 2
        assert running.scheduler.blocks.num_used == 0
        assert running.engine.num_prompt_tokens == sum(len(prompt) for prompt, _ in asked)


@pytest.mark.parametrize("field", ["new_sequences[2].sampling.top_p", "chunks[2]"])
async def test_a_request_that_the_workers_refuse_by_name_ends_alone(field: str) -> None:
    prompts = [prompt_without_eos(40, seed) for seed in range(3)]
    async with Running(recovers=True) as running:
        running.workers.error = refusal = ServiceError("worker 0: no", metadata={"field": field})
        refusal.code = "INVALID_ARGUMENT"
        running.workers.fail_at = 3
        first = asyncio.create_task(running.tokens(prompts[0], 40))
        await asyncio.sleep(0)
        refused = running.generate(prompts[1], 40, n=2)  # sequences 2 and 3
        last = asyncio.create_task(running.tokens(prompts[2], 40))
        await anext(refused)  # and then its reader is slow
        assert await first == continuation(prompts[0], 40)
        assert await last == continuation(prompts[2], 40)
        assert running.workers.fail_at is None, "the refusal came"
        told = [n.sequence.sequence_id for s in running.workers.steps for n in s.new_sequences]
        assert (told.count(1), told.count(2), told.count(3)) == (2, 1, 1)
        with pytest.raises(Internal, match="refuse the request: worker 0: no"):
            async for _ in refused:
                pass
        assert running.scheduler.blocks.num_used == 0


@pytest.mark.parametrize("field", ["", "epoch", "new_sequences[77].sampling", "chunks[x]"])
async def test_a_refusal_that_names_no_request_ends_none(field: str) -> None:
    prompt = prompt_without_eos(40)
    async with Running(recovers=True) as running:
        running.workers.error = refusal = ServiceError("no", metadata={"field": field})
        refusal.code = "INVALID_ARGUMENT"
        running.workers.fail_at = 3
        assert await running.tokens(prompt, 40) == continuation(prompt, 40)
        assert running.workers.fail_at is None


async def test_one_that_is_cancelled_between_two_lives_of_the_workers_is_forgotten() -> None:
    async with Running(recovers=True) as running:
        stream = running.generate(prompt_without_eos(40), 40)
        await anext(stream)
        running.loop.cancel()
        await asyncio.wait([running.loop])
        await stream.aclose()
        running.workers.forget()
        running.loop = asyncio.create_task(running._drive())
        await asyncio.sleep(0)
        prompt = prompt_without_eos(5)
        assert await running.tokens(prompt, 5) == continuation(prompt, 5)
        assert running.scheduler.blocks.num_used == 0
