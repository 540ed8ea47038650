"""Measures a server through gRPC: time per token at batches, time to the first token at prompt
lengths, and throughput at request rates.

What makes the figures hold:

- Every prompt is new, of random token ids, so that the prefix cache can't help; an answer that says it
  did is a failure. So is one that has not exactly the tokens that were asked for (`ignore_eos`).
- A token counts when the response with it arrives, whether it has text yet or not. Requests share one
  thread and one connection, which takes the least from the cores that the cluster may be using too.
- Nothing is drawn while a batch or a prompt is measured, and warm-up runs of the same shape come first.

Terms: TTFT is the time from sending a request to its first token; TPOT that from the first token to
the last over the tokens after the first; a pause the time between two responses with tokens; the
latency that until the request has ended.
"""

import asyncio
import importlib.metadata
import itertools
import math
import platform
import random
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Protocol, Unpack

from client.grpc_client import Colrow, Piece, Prompt, Settings
from client.local_cluster import num_cores
from client.views import enum_name, transport_name
from colrow import __version__
from colrow.errors import ServiceError
from colrow.v1 import control_service_pb2, inference_service_pb2, tensor_pb2

REQUEST_TIMEOUT_S = 600.0
MIN_STEADY_STEPS = 8

Progress = Callable[[str, int, int], None]
"""`progress(what is measured, done, total)`, never called while something is timed to the step."""


class Client(Protocol):
    """The part of `AsyncColrow` that is used here."""

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> AsyncGenerator[Piece, None]: ...
    async def cluster_as_known(self) -> control_service_pb2.Cluster: ...


# --- statistics -------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile of at least one value, between two of them in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Distribution:
    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """None of no values."""
        known = list(values)
        if not known:
            return None
        return cls(
            count=len(known),
            mean=statistics.fmean(known),
            min=min(known),
            p50=percentile(known, 50),
            p90=percentile(known, 90),
            p99=percentile(known, 99),
            max=max(known),
        )


# --- one request ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """One request. Times are in seconds since its repeat began; `error` says what spoilt it.

    `arrivals` are the responses with tokens: when each came and how many it brought.
    """

    sent_s: float
    ended_s: float
    arrivals: tuple[tuple[float, int], ...] = ()
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None where all tokens came at once.

        Where the first response brings several tokens, those are not counted: the time until it is
        not either.
        """
        later = self.num_tokens - self.arrivals[0][1]
        return (self.last_s - self.first_s) / later if later else None

    @property
    def pauses_s(self) -> list[float]:
        times = [at for at, _ in self.arrivals]
        return [after - before for before, after in itertools.pairwise(times)]

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.sent_s

    def tokens_between(self, start_s: float, stop_s: float) -> int:
        """Tokens that came after `start_s` and until `stop_s`."""
        return sum(count for at, count in self.arrivals if start_s < at <= stop_s)


def problem(pieces: Sequence[Piece], num_prompt: int, num_tokens: int) -> str | None:
    """What makes an answer no good for a measurement."""
    if not pieces:
        return "no answer"
    last = pieces[-1]
    came = sum(len(piece.token_ids) for piece in pieces)
    if came != num_tokens or last.completion_tokens != num_tokens:
        return f"{came} tokens came ({last.completion_tokens} counted) instead of {num_tokens}"
    if last.finish_reason != "length":
        return f"ended for {last.finish_reason} and not for length"
    if last.prompt_tokens != num_prompt:
        return f"{last.prompt_tokens} prompt tokens instead of {num_prompt}"
    if last.cached_prompt_tokens:
        return f"{last.cached_prompt_tokens} tokens of a new prompt were cached"
    return None


async def trace_request(
    client: Client,
    prompt: list[int],
    num_tokens: int,
    began: float,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Trace:
    """Sends a request now; `began` is when its repeat did. Calls `on_tokens` with the tokens so far."""
    pieces: list[Piece] = []
    arrivals: list[tuple[float, int]] = []
    count = 0
    error = None
    sent_s = time.perf_counter() - began
    try:
        async for piece in client.generate(
            prompt,
            max_tokens=num_tokens,
            temperature=0,
            ignore_eos=True,
            timeout_s=REQUEST_TIMEOUT_S,
        ):
            now_s = time.perf_counter() - began
            pieces.append(piece)
            if piece.token_ids:
                arrivals.append((now_s, len(piece.token_ids)))
                count += len(piece.token_ids)
                on_tokens(count)
    except ServiceError as failure:
        error = f"{failure.code}: {failure}"
    ended_s = time.perf_counter() - began
    error = error or problem(pieces, len(prompt), num_tokens)
    return Trace(sent_s, ended_s, tuple(arrivals), error)


# --- the steady part of a batch ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Steady:
    """Decoding while every request of a batch did, between two moments of it.

    `period_s` is the time of a step, from the arrivals of tokens: in this phase a step brings each
    request one. `busy_s` is the time that a rank spends in a step on average, of the slowest rank, from
    the counters that the coordinator keeps. Both are of the steps that ended between the two moments,
    so it does not matter that others were under way.
    """

    steps: int
    seconds: float
    period_s: float
    busy_s: float

    @property
    def steps_per_s(self) -> float:
        return 1 / self.period_s

    @property
    def control_share(self) -> float:
        """The part of a step's time in which even the slowest rank had nothing to execute."""
        return 1 - self.busy_s / self.period_s


Snapshot = tuple[float, control_service_pb2.Cluster]
"""The cluster's counters, and when they came, in seconds since the repeat began."""


def steady_phase(traces: Sequence[Trace], before: Snapshot, after: Snapshot) -> Steady | None:
    """None where there was no such phase: too short, other requests ran, or these had to wait."""
    old, new = before[1], after[1]
    alone = all(
        cluster.scheduler.running == len(traces) and cluster.scheduler.waiting == 0
        for cluster in (old, new)
    )
    if not alone or old.epoch != new.epoch:
        return None
    periods = []
    for trace in traces:
        # From the last token that came before one moment to the last before the other.
        known = [at for at, _ in trace.arrivals if at <= before[0]]
        later = [(at, count) for at, count in trace.arrivals if before[0] < at <= after[0]]
        num_tokens = sum(count for _, count in later)
        if trace.error or not known or num_tokens < MIN_STEADY_STEPS:
            return None
        periods.append((later[-1][0] - known[-1]) / num_tokens)
    busy_s = []
    for then, now in zip(old.workers, new.workers, strict=True):
        done = now.last_step_id - then.last_step_id
        if done < MIN_STEADY_STEPS:
            return None
        busy_s.append((now.busy_us - then.busy_us) / 1e6 / done)
    return Steady(
        steps=new.scheduler.steps - old.scheduler.steps,
        seconds=after[0] - before[0],
        period_s=statistics.median(periods),
        busy_s=max(busy_s),
    )


class _Snapshots:
    """Takes one when every request has its first token, and one just before the first request ends."""

    def __init__(self, client: Client, batch: int, num_tokens: int, began: float) -> None:
        self._client = client
        self._began = began
        self._counts = [0] * batch
        # Before the last steps: the coordinator sends ahead, and they are with the workers already.
        self._stop_at = num_tokens - max(2, num_tokens // 16)
        self._tasks: list[asyncio.Task[Snapshot]] = []

    def note(self, index: int, count: int) -> None:
        self._counts[index] = count
        begins = not self._tasks and min(self._counts) > 0
        ends = len(self._tasks) == 1 and max(self._counts) >= self._stop_at
        if begins or ends:
            self._tasks.append(asyncio.create_task(self._take()))

    async def _take(self) -> Snapshot:
        cluster = await self._client.cluster_as_known()
        return time.perf_counter() - self._began, cluster

    async def steady(self, traces: Sequence[Trace]) -> Steady | None:
        try:
            taken = await asyncio.gather(*self._tasks)
        except ServiceError:  # the requests tell of it too
            return None
        return steady_phase(traces, *taken) if len(taken) == 2 else None


# --- measurements -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Repeat:
    """All requests of one go."""

    traces: tuple[Trace, ...]
    steady: Steady | None = None

    @property
    def good(self) -> list[Trace]:
        return [trace for trace in self.traces if trace.error is None]

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last."""
        return max(t.ended_s for t in self.traces) - min(t.sent_s for t in self.traces)

    @property
    def requests_per_s(self) -> float:
        return len(self.good) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time, prompts included."""
        return sum(trace.num_tokens for trace in self.good) / self.seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of the tokens that come after every request has its first; None where one has failed."""
        if len(self.good) < len(self.traces):
            return None
        start_s = max(trace.first_s for trace in self.traces)
        stop_s = max(trace.last_s for trace in self.traces)
        count = sum(trace.tokens_between(start_s, stop_s) for trace in self.traces)
        return count / (stop_s - start_s) if stop_s > start_s else None

    @property
    def slowest_ttft_s(self) -> float | None:
        """When every request had its first token; None where one has failed."""
        if len(self.good) < len(self.traces):
            return None
        return max(t.first_s for t in self.traces) - min(t.sent_s for t in self.traces)

    @property
    def peak_concurrency(self) -> int:
        # At the same moment the end of one comes before the start of another.
        changes = sorted(
            [(trace.sent_s, 1) for trace in self.traces]
            + [(trace.ended_s, -1) for trace in self.traces]
        )
        running = peak = 0
        for _, change in changes:
            running += change
            peak = max(peak, running)
        return peak


@dataclass(frozen=True, slots=True)
class Measurement:
    """Repeats of the same thing. Latencies are over the requests of all repeats together, rates are
    medians over the repeats."""

    kind: str
    """"decode", "prefill" or "throughput"."""
    value: float
    """The batch, the prompt length, or the requests a second."""
    input_tokens: int
    output_tokens: int
    repeats: tuple[Repeat, ...]

    @property
    def good(self) -> list[Trace]:
        return [trace for repeat in self.repeats for trace in repeat.good]

    @property
    def errors(self) -> list[str]:
        return [t.error for repeat in self.repeats for t in repeat.traces if t.error is not None]

    @property
    def ttft_s(self) -> Distribution | None:
        return Distribution.of(trace.ttft_s for trace in self.good)

    @property
    def tpot_s(self) -> Distribution | None:
        return Distribution.of(t.tpot_s for t in self.good if t.tpot_s is not None)

    @property
    def pause_s(self) -> Distribution | None:
        return Distribution.of(pause for trace in self.good for pause in trace.pauses_s)

    @property
    def latency_s(self) -> Distribution | None:
        return Distribution.of(trace.latency_s for trace in self.good)

    def over_repeats(self, figure: Callable[[Repeat], float | None]) -> Distribution | None:
        """Of one figure a repeat; p50 is the median. Those that are None are left out."""
        return Distribution.of(value for r in self.repeats if (value := figure(r)) is not None)


def steps_per_s(repeat: Repeat) -> float | None:
    return repeat.steady.steps_per_s if repeat.steady else None


def control_share(repeat: Repeat) -> float | None:
    return repeat.steady.control_share if repeat.steady else None


class Bench:
    """Measures through `client`; `new_prompt(length)` must never give what it has given before."""

    def __init__(self, client: Client, new_prompt: Callable[[int], list[int]]) -> None:
        self._client = client
        self._new_prompt = new_prompt

    async def decode(self, batch: int, input_tokens: int, output_tokens: int) -> Repeat:
        """`batch` requests at once."""
        prompts = [self._new_prompt(input_tokens) for _ in range(batch)]
        began = time.perf_counter()
        snapshots = _Snapshots(self._client, batch, output_tokens, began)

        def trace(index: int) -> Awaitable[Trace]:
            return trace_request(
                self._client,
                prompts[index],
                output_tokens,
                began,
                lambda count: snapshots.note(index, count),
            )

        traces = await asyncio.gather(*map(trace, range(batch)))
        return Repeat(tuple(traces), await snapshots.steady(traces))

    async def prefill(self, length: int) -> Repeat:
        """One request for one token."""
        prompt = self._new_prompt(length)
        return Repeat((await trace_request(self._client, prompt, 1, time.perf_counter()),))

    async def throughput(
        self,
        gaps_s: Iterable[float],
        input_tokens: int,
        output_tokens: int,
        on_end: Callable[[int], None] = lambda done: None,
    ) -> Repeat:
        """A request after each gap, whether those before it have ended or not."""
        due_s = 0.0
        dues_s = [due_s := due_s + gap for gap in gaps_s]
        prompts = [self._new_prompt(input_tokens) for _ in dues_s]
        done = 0
        began = time.perf_counter()

        async def one(due_s: float, prompt: list[int]) -> Trace:
            nonlocal done
            await asyncio.sleep(due_s - (time.perf_counter() - began))
            trace = await trace_request(self._client, prompt, output_tokens, began)
            done += 1
            on_end(done)
            return trace

        traces = await asyncio.gather(*map(one, dues_s, prompts))
        return Repeat(tuple(traces))


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


# --- the whole --------------------------------------------------------------------------------


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
        name, total = title(kind, value), workload.warmups + workload.repeats
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
    name, total = title("throughput", rate), workload.repeats * workload.requests
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


def title(kind: str, value: float) -> str:
    return {
        "decode": f"batch {value:g}",
        "prefill": f"prompt of {value:g} tokens",
        "throughput": "all requests at once" if math.isinf(value) else f"{value:g} requests/s",
    }[kind]


@dataclass(frozen=True, slots=True)
class Report:
    """All there is to say about a run. `server_idle`: nothing else was served when it began."""

    measured_on: dict[str, Any]
    workload: Workload
    server_idle: bool
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def num_failed(self) -> int:
        return sum(len(measurement.errors) for measurement in self.measurements)


def run_bench(
    colrow: Colrow,
    model: inference_service_pb2.GetModelResponse,
    workload: Workload,
    on_progress: Progress,
) -> Report:
    """Measures the server that `colrow` is connected to."""
    workload.check(model)
    cluster = colrow.cluster()
    scheduler = cluster.scheduler

    async def run() -> list[Measurement]:
        async with colrow.asynchronous() as client:
            await client.cluster_as_known()  # connects, before anything is timed
            return await measure(Bench(client, fresh_prompts(model)), workload, on_progress)

    return Report(
        measured_on(model, cluster),
        workload,
        server_idle=scheduler.running + scheduler.waiting == 0,
        measurements=asyncio.run(run()),
    )


def measured_on(
    model: inference_service_pb2.GetModelResponse, cluster: control_service_pb2.Cluster
) -> dict[str, Any]:
    """The server, and the machine that measured it, which for a local cluster is the same."""
    return {
        "model": model.model,
        "architecture": model.architecture,
        "num_parameters": model.num_parameters,
        "data_type": enum_name(tensor_pb2.DataType.DESCRIPTOR, model.data_type),
        "tp_size": model.tp_size,
        "transport": transport_name(cluster),
        "devices": [worker.description.device for worker in cluster.workers],
        "hosts": len({worker.description.host_id for worker in cluster.workers}),
        "context_length": model.context_length,
        "kv_blocks": cluster.scheduler.kv_blocks_total,
        "block_size": cluster.scheduler.block_size,
        "server_version": cluster.version,
        "client": {
            "version": __version__,
            "cpu": _cpu_name(),
            "cores": num_cores(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "packages": {
                name: importlib.metadata.version(name)
                for name in ("grpcio", "protobuf", "torch", "numpy")
            },
        },
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


# --- as data ----------------------------------------------------------------------------------


def report_data(report: Report) -> dict[str, Any]:
    """For JSON: the settings, the figures, and every request of every repeat."""
    settings = asdict(report.workload)
    settings["rates"] = [_number(rate) for rate in report.workload.rates]
    return {
        "measured_on": report.measured_on,
        "settings": settings,
        "server_idle": report.server_idle,
        "measurements": [measurement_data(m) for m in report.measurements],
    }


def measurement_data(measurement: Measurement) -> dict[str, Any]:
    return {
        "kind": measurement.kind,
        "value": _number(measurement.value),
        "input_tokens": measurement.input_tokens,
        "output_tokens": measurement.output_tokens,
        "completed": len(measurement.good),
        "failed": len(measurement.errors),
        "errors": sorted(set(measurement.errors)),
        "over_requests": {
            "ttft_s": _dict(measurement.ttft_s),
            "tpot_s": _dict(measurement.tpot_s),
            "pause_s": _dict(measurement.pause_s),
            "latency_s": _dict(measurement.latency_s),
        },
        "over_repeats": {
            name: _dict(measurement.over_repeats(figure)) for name, figure in FIGURES.items()
        },
        "repeats": [_repeat_data(repeat) for repeat in measurement.repeats],
    }


FIGURES: dict[str, Callable[[Repeat], float | None]] = {
    "requests_per_s": lambda repeat: repeat.requests_per_s,
    "tokens_per_s": lambda repeat: repeat.tokens_per_s,
    "decode_tokens_per_s": lambda repeat: repeat.decode_tokens_per_s,
    "slowest_ttft_s": lambda repeat: repeat.slowest_ttft_s,
    "peak_concurrency": lambda repeat: repeat.peak_concurrency,
    "steps_per_s": steps_per_s,
    "control_share": control_share,
}


def _repeat_data(repeat: Repeat) -> dict[str, Any]:
    return {
        **{name: figure(repeat) for name, figure in FIGURES.items()},
        "seconds": repeat.seconds,
        "steady": _dict(repeat.steady),
        "requests": [
            {
                "sent_s": trace.sent_s,
                "ended_s": trace.ended_s,
                "error": trace.error,
                "arrivals": [[round(at, 6), count] for at, count in trace.arrivals],
            }
            for trace in repeat.traces
        ],
    }


def _dict(value: Distribution | Steady | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if math.isinf(value) else value
