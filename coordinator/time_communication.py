"""Timed steps on request: those of the requests that run, and where none do, of requests made for it."""

import asyncio
import random
import uuid

from colrow.errors import InvalidArgument
from coordinator.engine import Engine
from coordinator.request import Request, SamplingRequest
from coordinator.step_times import StepTimes

MAX_STEPS = 1000


async def run(engine: Engine, num_steps: int, tokens_per_step: int) -> StepTimes:
    """Times the collectives of the next `num_steps` steps.

    tokens_per_step: that each step computes of own requests, which run whenever nothing else does.

    InvalidArgument for numbers that can't be; Unavailable when a worker is lost meanwhile.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise InvalidArgument("num_steps", num_steps, f"is not in [1, {MAX_STEPS}]")
    most = min(engine.scheduler.max_batched_tokens, engine.limits.context_length - 1)
    if not 1 <= tokens_per_step <= most:
        raise InvalidArgument(
            "tokens_per_step",
            tokens_per_step,
            f"is not in [1, {most}]: what a step and the context hold",
        )
    times = StepTimes(num_steps)
    with engine.timing(times):
        waiting = asyncio.create_task(times.wait())
        own = asyncio.create_task(_keep_busy(engine, times, tokens_per_step))
        try:
            await asyncio.wait((waiting, own), return_when=asyncio.FIRST_COMPLETED)
            if own.done():
                own.result()  # raises why a request of its own was refused
            await waiting
        finally:
            waiting.cancel()
            own.cancel()
            await asyncio.gather(waiting, own, return_exceptions=True)
    return times


async def _keep_busy(engine: Engine, times: StepTimes, tokens_per_step: int) -> None:
    """Sends requests of random tokens whenever the engine has none, while steps are wanted."""
    generator = random.Random()
    await engine.idle.wait()
    while times.num_wanted:
        tokens = [generator.randrange(engine.limits.vocab_size) for _ in range(tokens_per_step)]
        # A prompt of one token takes a step like those of the tokens that follow it.
        longest = engine.limits.context_length - 1 if tokens_per_step == 1 else 1
        request = Request(
            request_id=f"time-communication-{uuid.uuid4().hex}",
            prompt=tuple(tokens),
            sampling=SamplingRequest(temperature=0),
            max_tokens=min(times.num_wanted, longest),
            ignore_eos=True,
        )
        async for _ in engine.generate(request):
            pass
        await engine.idle.wait()
