"""The statistics of `colrow bench`, what it refuses to count, and how it sends requests."""

import asyncio
import importlib.metadata
import io
import itertools
import json
import math
import random
import re
from collections.abc import AsyncGenerator, Sequence
from typing import cast

import numpy as np
import pytest
from rich.console import Console

from client.bench.distribution import Distribution, percentile
from client.bench.measuring import Bench, Client, what_spoils
from client.bench.report import Report, measured_on, report_data
from client.bench.traces import Measurement, Repeat, Trace, steady_phase
from client.bench.workload import (
    Workload,
    fresh_prompts,
    measure,
    parse_counts,
    parse_rates,
    poisson_gaps,
)
from client.bench_view import BenchProgress, report_tables
from client.grpc_client import Piece
from colrow.errors import Unavailable
from colrow.v1 import control_service_pb2 as control_pb
from colrow.v1 import inference_service_pb2 as inference_pb


def trace(*arrivals: tuple[float, int], sent: float = 0.0, error: str | None = None) -> Trace:
    return Trace(sent, arrivals[-1][0] if arrivals else sent + 1.0, arrivals, error)


def model(context_length: int = 8192) -> inference_pb.GetModelResponse:
    return inference_pb.GetModelResponse(
        model="tiny",
        context_length=context_length,
        vocab_size=1000,
        eos_token_ids=[2, 7],
        tp_size=2,
    )


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("q", [0, 50, 90, 99, 100])
def test_percentiles_are_those_of_numpy(count: int, q: float) -> None:
    values = [random.Random(count).random() for _ in range(count)]
    assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_a_distribution_of_nothing_is_none() -> None:
    assert Distribution.of([]) is None
    known = Distribution.of([3.0, 1.0, 2.0])
    assert known is not None
    assert (known.count, known.min, known.p50, known.max, known.mean) == (3, 1.0, 2.0, 3.0, 2.0)


def test_times_of_a_request_follow_from_its_arrivals() -> None:
    one = trace((1.5, 1), (1.6, 1), (1.9, 1), sent=1.0)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.tpot_s == pytest.approx(0.4 / 2)
    assert one.pauses_s == pytest.approx([0.1, 0.3])
    assert one.latency_s == pytest.approx(0.9)
    assert one.num_tokens == 3


def test_tokens_that_come_with_the_first_do_not_make_the_rest_faster() -> None:
    assert trace((1.0, 3), (1.4, 2)).tpot_s == pytest.approx(0.4 / 2)
    assert trace((1.0, 5)).tpot_s is None


def test_decoding_speed_counts_tokens_after_the_slowest_first_one() -> None:
    early = trace((1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1))
    late = trace((2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1))
    repeat = Repeat((early, late))
    # After 2.0: two of the early one and three of the late one, in three seconds.
    assert repeat.decode_tokens_per_s == pytest.approx(5 / 3)
    assert repeat.slowest_ttft_s == pytest.approx(2.0)
    assert repeat.tokens_per_s == pytest.approx(8 / 5)


def test_a_failed_request_leaves_no_decoding_speed_and_counts_for_no_throughput() -> None:
    good, bad = trace((1.0, 1), (2.0, 1)), trace((1.0, 1), error="UNAVAILABLE: gone")
    repeat = Repeat((good, bad))
    assert repeat.decode_tokens_per_s is None
    assert repeat.requests_per_s == pytest.approx(1 / 2.0)
    assert repeat.tokens_per_s == pytest.approx(2 / 2.0)
    measured = Measurement("throughput", 1, 4, 2, (repeat,))
    assert measured.errors == ["UNAVAILABLE: gone"]
    assert measured.ttft_s is not None
    assert measured.ttft_s.count == 1


def test_peak_concurrency_is_the_most_at_one_time() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.6)]
    repeat = Repeat(tuple(Trace(sent, ended) for sent, ended in spans))
    assert repeat.peak_concurrency == 3
    in_a_row = Repeat((Trace(0.0, 1.0), Trace(1.0, 2.0)))
    assert in_a_row.peak_concurrency == 1


# --- what spoils a measurement ----------------------------------------------------------------


def answer(
    tokens: int = 4, *, counted: int = 4, reason: str = "length", prompt: int = 3, cached: int = 0
) -> list[Piece]:
    pieces = [Piece("", (1,)) for _ in range(tokens)]
    return [*pieces, Piece("", (), reason, prompt, counted, cached)]


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (answer(), None),
        ([], "no answer"),
        (answer(3), "3 tokens came"),
        (answer(counted=5), "5 counted"),
        (answer(reason="stop"), "ended for stop"),
        (answer(prompt=9), "9 prompt tokens"),
        (answer(cached=2), "were cached"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_a_failure(
    pieces: Sequence[Piece], complaint: str | None
) -> None:
    found = what_spoils(pieces, num_prompt=3, num_tokens=4)
    assert found is None if complaint is None else complaint in (found or "")


# --- the steady phase -------------------------------------------------------------------------


def cluster(
    steps: int, busy_us: Sequence[int], *, running: int = 2, waiting: int = 0, epoch: int = 1
) -> control_pb.Cluster:
    return control_pb.Cluster(
        epoch=epoch,
        scheduler=control_pb.SchedulerStatus(steps=steps, running=running, waiting=waiting),
        workers=[
            control_pb.WorkerStatus(rank=rank, last_step_id=steps, busy_us=busy)
            for rank, busy in enumerate(busy_us)
        ],
    )


BATCH = [
    trace(*((0.5 + 0.01 * step, 1) for step in range(40))),
    trace(*((0.6 + 0.01 * step, 1) for step in range(40))),
]


def test_the_control_planes_share_is_what_the_slowest_rank_waits_in_a_step() -> None:
    before, after = (0.61, cluster(11, (70_000, 95_000))), (0.81, cluster(31, (210_000, 255_000)))
    steady = steady_phase(BATCH, before, after)
    assert steady is not None
    assert steady.steps == 20
    assert steady.period_s == pytest.approx(0.01)
    assert steady.steps_per_s == pytest.approx(100)
    assert steady.busy_s == pytest.approx(0.008)
    assert steady.control_share == pytest.approx(0.2)


def test_a_step_under_way_at_a_snapshot_changes_nothing() -> None:
    """Rank 1 has ended one step more than rank 0: each is counted for the steps that it has ended."""
    before, after = cluster(11, (0, 0)), cluster(31, (160_000, 168_000))
    after.workers[1].last_step_id += 1
    steady = steady_phase(BATCH, (0.61, before), (0.81, after))
    assert steady is not None
    assert steady.busy_s == pytest.approx(0.008)


@pytest.mark.parametrize(
    "after",
    [
        cluster(31, (1, 1), running=3),  # somebody else's request
        cluster(31, (1, 1), running=1),
        cluster(31, (1, 1), waiting=1),
        cluster(31, (1, 1), epoch=2),
        cluster(15, (1, 1)),  # too few steps
    ],
)
def test_where_the_batch_does_not_decode_alone_nothing_is_said(after: control_pb.Cluster) -> None:
    assert steady_phase(BATCH, (0.61, cluster(11, (0, 0))), (0.81, after)) is None


def test_a_batch_whose_requests_do_not_overlap_has_no_steady_phase() -> None:
    apart = [BATCH[0], trace((2.0, 1), (2.1, 1))]
    before, after = (0.61, cluster(11, (0, 0))), (0.81, cluster(31, (1, 1)))
    assert steady_phase(apart, before, after) is None


# --- sending ----------------------------------------------------------------------------------


class FakeServer:
    """Answers a token each `step_s`; knows what it was asked and counts steps like a cluster."""

    def __init__(self, *, step_s: float = 0.002, busy_us: int = 1500) -> None:
        self.prompts: list[list[int]] = []
        self.settings: list[dict[str, object]] = []
        self.short_by = 0
        self.failing: set[int] = set()
        self._step_s = step_s
        self._busy_us = busy_us
        self._running = 0
        self._began = 0.0

    async def generate(self, prompt: list[int], **settings: object) -> AsyncGenerator[Piece, None]:
        number = len(self.prompts)
        self.prompts.append(prompt)
        self.settings.append(settings)
        if number in self.failing:
            raise Unavailable("no place")
        self._running += 1
        count = int(str(settings["max_tokens"])) - self.short_by
        for _ in range(count):
            await asyncio.sleep(self._step_s)
            yield Piece("", (1,))
        self._running -= 1
        yield Piece("", (), "length", len(prompt), count)

    async def cluster_as_known(self) -> control_pb.Cluster:
        steps = int(asyncio.get_running_loop().time() / self._step_s)
        return cluster(steps, [steps * self._busy_us] * 2, running=self._running)


def prompts_of(server: FakeServer) -> Bench:
    return Bench(cast(Client, server), fresh_prompts(model()))


async def test_a_batch_is_sent_at_once_with_lengths_that_are_fixed() -> None:
    server = FakeServer()
    repeat = await prompts_of(server).decode(4, input_tokens=10, output_tokens=40)
    assert [t.error for t in repeat.traces] == [None] * 4
    assert [t.num_tokens for t in repeat.traces] == [40] * 4
    assert repeat.peak_concurrency == 4
    assert all(len(prompt) == 10 for prompt in server.prompts)
    assert all(s["ignore_eos"] and s["max_tokens"] == 40 for s in server.settings)
    assert repeat.steady is not None
    assert repeat.steady.busy_s == pytest.approx(0.0015)
    assert repeat.steady.period_s >= 0.002


async def test_an_answer_cut_short_and_a_refusal_are_counted_and_not_measured() -> None:
    server = FakeServer()
    server.failing = {1}
    server.short_by = 1
    repeat = await prompts_of(server).throughput([0.0] * 3, 5, 4)
    errors = [t.error or "" for t in repeat.traces]
    assert errors[1] == "UNAVAILABLE: no place"
    assert errors[0] == errors[2] == "3 tokens came (3 counted) instead of 4"
    assert repeat.good == []


async def test_requests_are_sent_when_due_whether_others_have_ended_or_not() -> None:
    server = FakeServer(step_s=0.02)
    ended: list[int] = []
    repeat = await prompts_of(server).throughput([0.0, 0.01, 0.01], 5, 4, ended.append)
    sent = [t.sent_s for t in repeat.traces]
    assert sent[1] >= 0.01
    assert sent[2] >= 0.02
    assert repeat.peak_concurrency == 3
    assert ended == [1, 2, 3]


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    gaps = poisson_gaps(4.0, 20_000, random.Random(1))
    assert gaps == poisson_gaps(4.0, 20_000, random.Random(1))
    assert gaps[0] == 0
    # An exponential distribution has its mean as its standard deviation.
    assert np.mean(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert poisson_gaps(math.inf, 3, random.Random(1)) == [0, 0, 0]


def test_prompts_are_never_the_same_and_have_no_end_in_them() -> None:
    draws = [new(64) for new in (fresh_prompts(model()), fresh_prompts(model())) * 20]
    assert all(one[:16] != other[:16] for one, other in itertools.combinations(draws, 2))
    drawn = set(itertools.chain(*draws))
    assert not drawn & {2, 7}
    assert 0 <= min(drawn) <= max(drawn) < 1000


# --- the whole --------------------------------------------------------------------------------


def test_lists_of_the_command_line() -> None:
    assert parse_counts("batch", "1,8") == (1, 8)
    assert parse_counts("batch", None) == ()
    assert parse_rates("0.5,inf") == (0.5, math.inf)
    with pytest.raises(ValueError, match="batch = '1,x'"):
        parse_counts("batch", "1,x")
    with pytest.raises(ValueError, match="rate = 'fast'"):
        parse_rates("fast")


@pytest.mark.parametrize(
    ("workload", "complaint"),
    [
        (Workload(batches=(0,)), "batch = 0"),
        (Workload(rates=(-1.0,)), "rate = -1"),
        (Workload(rates=(math.nan,)), "rate = nan"),
        (Workload(prompts=(512,)), "prompt = 512"),
        (Workload(batches=(1,), input_tokens=500, output_tokens=64), "input-tokens = 500"),
    ],
)
def test_what_the_model_cannot_do_is_named_before_anything_is_sent(
    workload: Workload, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        workload.check(model(context_length=512))


def report(server: FakeServer, workload: Workload) -> tuple[Report, list[tuple[str, int, int]]]:
    told: list[tuple[str, int, int]] = []

    def on_progress(name: str, done: int, total: int) -> None:
        told.append((name, done, total))

    measured = asyncio.run(measure(prompts_of(server), workload, on_progress))
    about = measured_on(model(), cluster(0, (0, 0)))
    return Report(about, workload, server_idle=False, measurements=measured), told


WORKLOAD = Workload(
    batches=(1, 2),
    prompts=(20,),
    rates=(200.0, math.inf),
    requests=3,
    input_tokens=8,
    output_tokens=20,
    repeats=2,
    warmups=1,
)


def test_everything_is_measured_repeated_and_warmed_up() -> None:
    server = FakeServer(step_s=0.001)
    made, told = report(server, WORKLOAD)
    kinds = [(m.kind, m.value, len(m.repeats)) for m in made.measurements]
    assert kinds == [
        ("decode", 1, 2),
        ("decode", 2, 2),
        ("prefill", 20, 2),
        ("throughput", 200, 2),
        ("throughput", math.inf, 2),
    ]
    assert len(server.prompts) == (1 + 2) * 3 + 3 + 2 * 3 * 3
    assert made.num_failed == 0
    # Every bar is full at the end.
    last = {name: (done, total) for name, done, total in told}
    assert len(last) == 5
    assert all(done == total for done, total in last.values())


def test_a_report_is_json_with_every_request_of_every_repeat() -> None:
    server = FakeServer(step_s=0.001)
    server.failing = {0, 1}  # of the first batch the warm-up and the first repeat
    made, _ = report(server, WORKLOAD)
    data = json.loads(json.dumps(report_data(made), allow_nan=False))
    assert data["settings"]["rates"] == [200.0, "inf"]
    assert data["measured_on"]["model"] == "tiny"
    first = data["measurements"][0]
    assert (first["completed"], first["failed"]) == (1, 1)
    assert first["errors"] == ["UNAVAILABLE: no place"]
    for measurement in data["measurements"]:
        for repeat in measurement["repeats"]:
            for request in repeat["requests"]:
                came = sum(count for _, count in request["arrivals"])
                assert came == (0 if request["error"] else measurement["output_tokens"])


def test_a_client_without_torch_measures_and_leaves_its_version_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    packages = measured_on(model(), cluster(0, (0, 0)))["client"]["packages"]
    assert set(packages) == {"grpcio", "protobuf", "numpy"}


def test_tables_show_every_part_and_what_failed() -> None:
    server = FakeServer(step_s=0.001)
    server.failing = {0, 1, 2}  # all of the first batch
    made, _ = report(server, WORKLOAD)
    file = io.StringIO()
    out = Console(file=file, width=80, highlight=False)
    for part in report_tables(made):
        out.print(part)
    shown = file.getvalue()
    for title in ("Decoding: 8 prompt tokens, 20 new ones", "Time to the first token"):
        assert title in shown
    assert "Throughput: 8 prompt tokens, 20 new ones, 3 requests" in shown
    assert "batch 1: 2 failed: UNAVAILABLE: no place" in shown
    assert "The server had other requests" in shown
    for name in ("TTFT", "TPOT", "pause", "latency"):
        assert len(re.findall(rf" {name} ", shown)) == 4, "of two batches and two rates"
    assert "…" not in shown, "a column is too narrow"


def test_progress_without_a_terminal_is_a_line_for_each_part() -> None:
    file = io.StringIO()
    with BenchProgress(Console(file=file)) as progress:
        for done in range(4):
            progress("batch 1", done, 3)
    assert file.getvalue() == "Measuring: batch 1\n"
