"""What came of requests, and what follows from it: pure.

A trace is of one request, a repeat has those of one go, a measurement repeats of the same thing.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client.bench.distribution import Distribution
from colrow.v1 import control_service_pb2

MIN_STEADY_STEPS = 8


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


@dataclass(frozen=True, slots=True)
class SteadyPhase:
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


def steady_phase(traces: Sequence[Trace], before: Snapshot, after: Snapshot) -> SteadyPhase | None:
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
    return SteadyPhase(
        steps=new.scheduler.steps - old.scheduler.steps,
        seconds=after[0] - before[0],
        period_s=statistics.median(periods),
        busy_s=max(busy_s),
    )


@dataclass(frozen=True, slots=True)
class Repeat:
    """All requests of one go."""

    traces: tuple[Trace, ...]
    steady: SteadyPhase | None = None

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


def measurement_title(kind: str, value: float) -> str:
    return {
        "decode": f"batch {value:g}",
        "prefill": f"prompt of {value:g} tokens",
        "throughput": "all requests at once" if math.isinf(value) else f"{value:g} requests/s",
    }[kind]
