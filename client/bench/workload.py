"""What is measured: how many requests, of what length, when; and all of it, one after the other."""

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from client.bench.measuring import Bench
from client.bench.traces import Measurement, Repeat, measurement_title
from colrow.v1 import inference_service_pb2

Progress = Callable[[str, int, int], None]
"""`progress(what is measured, done, total)`, never called while something is timed to the step."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured. Rates are requests a second; inf sends all at once."""

    batches: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    requests: int = 32
    input_tokens: int = 128
    output_tokens: int = 64
    repeats: int = 3
    warmups: int = 1
    seed: int = 0
    """Of the times of arrival. Prompts are never the same twice."""

    def check(self, model: inference_service_pb2.GetModelResponse) -> None:
        """ValueError naming what does not fit the model."""
        for name, values in (("batch", self.batches), ("prompt", self.prompts)):
            for value in values:
                if value < 1:
                    raise ValueError(f"{name} = {value}: must be positive")
        for rate in self.rates:
            if not rate > 0:
                raise ValueError(f"rate = {rate:g}: must be positive")
        limit = model.context_length
        for prompt in self.prompts:
            if prompt + 1 > limit:
                raise ValueError(f"prompt = {prompt}: the context holds {limit} tokens")
        if (self.batches or self.rates) and self.input_tokens + self.output_tokens > limit:
            raise ValueError(
                f"input-tokens = {self.input_tokens}, output-tokens = {self.output_tokens}: the "
                f"context holds {limit} tokens"
            )


def parse_counts(name: str, text: str | None) -> tuple[int, ...]:
    """`1,8` as numbers; ValueError names what is none."""
    try:
        return tuple(int(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise ValueError(f"{name} = {text!r}: is no list of whole numbers like 1,8") from None


def parse_rates(text: str | None) -> tuple[float, ...]:
    """`1,inf` as numbers; ValueError names what is none."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise ValueError(f"rate = {text!r}: is no list of numbers like 1,4,inf") from None


async def measure(bench: Bench, workload: Workload, on_progress: Progress) -> list[Measurement]:
    """Everything that a workload asks for, one after the other."""
    done: list[Measurement] = []
    shape = workload.input_tokens, workload.output_tokens

    async def repeated(
        kind: str, value: float, tokens: tuple[int, int], once: Callable[[], Awaitable[Repeat]]
    ) -> None:
        name, total = measurement_title(kind, value), workload.warmups + workload.repeats
        repeats = []
        for number in range(total):
            on_progress(name, number, total)
            repeat = await once()
            if number >= workload.warmups:
                repeats.append(repeat)
        on_progress(name, total, total)
        done.append(Measurement(kind, value, *tokens, tuple(repeats)))

    for batch in workload.batches:
        await repeated("decode", batch, shape, lambda batch=batch: bench.decode(batch, *shape))  # type: ignore[misc]
    for length in workload.prompts:
        await repeated("prefill", length, (length, 1), lambda n=length: bench.prefill(n))  # type: ignore[misc]
    for rate in workload.rates:
        done.append(await _throughput(bench, workload, rate, on_progress))
    return done


async def _throughput(
    bench: Bench, workload: Workload, rate: float, on_progress: Progress
) -> Measurement:
    name, total = measurement_title("throughput", rate), workload.repeats * workload.requests
    shape = workload.input_tokens, workload.output_tokens
    on_progress(name, 0, total)
    for _ in range(workload.warmups):
        # All at once, for the largest steps; the arrivals of a rate need no warming.
        await bench.throughput([0.0] * min(workload.requests, 16), *shape)
    repeats = []
    for number in range(workload.repeats):
        # Each repeat has other arrivals, the same in every run.
        generator = random.Random(f"{workload.seed} {rate} {number}")
        before = number * workload.requests
        repeats.append(
            await bench.throughput(
                poisson_gaps(rate, workload.requests, generator),
                *shape,
                lambda ended, before=before: on_progress(name, before + ended, total),  # type: ignore[misc]
            )
        )
    return Measurement("throughput", rate, *shape, tuple(repeats))


def poisson_gaps(rate: float, count: int, generator: random.Random) -> list[float]:
    """Seconds before each of `count` requests: a Poisson process of `rate` a second, without a wait
    before the first; for inf all at once."""
    if math.isinf(rate):
        return [0.0] * count
    return [0.0, *(generator.expovariate(rate) for _ in range(count - 1))]


def fresh_prompts(model: inference_service_pb2.GetModelResponse) -> Callable[[int], list[int]]:
    """Prompts of random token ids, other ones in every process: a server that is measured twice must
    not know them from the first time."""
    generator = random.Random(random.SystemRandom().getrandbits(128))
    ends = set(model.eos_token_ids)
    ids = [token for token in range(model.vocab_size) if token not in ends]
    return lambda length: generator.choices(ids, k=length)
