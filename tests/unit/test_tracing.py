"""Spans of requests, as a collector gets them over OTLP, and what happens when there is none."""

import contextlib
import logging
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from coordinator.config import parse
from coordinator.request import RequestRecord
from coordinator.tracing import Tracing
from tests.collector import Collector, attributes

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=value"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}


def ended(**changes: Any) -> RequestRecord:
    """A request of 6 s that has just ended: 0.5 s in the queue, 1 s of prefill, 4 s of decoding."""
    now = time.monotonic()
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "trace": SAMPLED,
        "num_prompt_tokens": 12,
        "n": 1,
        "max_tokens": 40,
        "arrived": now - 6.0,
        "scheduled": now - 5.5,
        "first_token": now - 4.5,
        "last_token": now - 0.5,
        "ended": now,
        "num_cached_tokens": 4,
        "num_generated_tokens": 11,
        "outcome": "length",
    }
    return RequestRecord(**fields | changes)


@contextlib.contextmanager
def tracing(endpoint: str) -> Iterator[Tracing]:
    made = Tracing.open(endpoint, "some/model")
    try:
        yield made
    finally:
        made.close()


def spans_of(*records: RequestRecord) -> list[Span]:
    """What a collector has of these requests after an orderly end."""
    with Collector() as collector:
        with tracing(collector.endpoint) as traces:
            for record in records:
                traces.ended(record)
        return collector.spans


def by_name(spans: list[Span]) -> dict[str, Span]:
    found = {span.name: span for span in spans}
    assert len(found) == len(spans)
    return found


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_request_is_a_server_span_below_its_caller() -> None:
    span = by_name(spans_of(ended()))["text_completion some/model"]
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.trace_state == "vendor=value"
    assert span.status.code == Status.STATUS_CODE_UNSET


def test_times_are_those_of_the_wall_clock() -> None:
    span = by_name(spans_of(ended()))["text_completion some/model"]
    assert seconds(span) == pytest.approx(6.0, abs=1e-3)
    assert span.end_time_unix_nano / 1e9 == pytest.approx(time.time(), abs=20)


def test_its_phases_are_children_that_follow_each_other() -> None:
    spans = by_name(spans_of(ended()))
    whole = spans.pop("text_completion some/model")
    assert list(spans) == ["queue", "prefill", "decode"]
    assert [seconds(span) for span in spans.values()] == pytest.approx([0.5, 1.0, 4.0], abs=1e-3)
    start = whole.start_time_unix_nano
    for span in spans.values():
        assert (span.trace_id, span.parent_span_id) == (whole.trace_id, whole.span_id)
        assert span.kind == Span.SPAN_KIND_INTERNAL
        assert span.start_time_unix_nano == start
        start = span.end_time_unix_nano


def test_attributes_are_those_of_the_conventions() -> None:
    found = attributes(by_name(spans_of(ended(n=2)))["text_completion some/model"].attributes)
    latencies = {
        name: found.pop(name) for name in list(found) if name.startswith("gen_ai.latency.")
    }
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "colrow",
        "gen_ai.request.model": "some/model",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.id": "r-1",
        "gen_ai.response.model": "some/model",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 11,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert latencies == pytest.approx(
        {
            "gen_ai.latency.time_in_queue": 0.5,
            "gen_ai.latency.time_to_first_token": 1.5,
            "gen_ai.latency.time_in_model_prefill": 1.0,
            "gen_ai.latency.time_in_model_decode": 4.0,
            "gen_ai.latency.e2e": 6.0,
        }
    )


def test_a_failed_request_is_an_error() -> None:
    record = ended(outcome="error", error="a step failed: boom", error_type="STEP_FAILED")
    span = by_name(spans_of(record))["text_completion some/model"]
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert span.status.message == "a step failed: boom"
    found = attributes(span.attributes)
    assert found["error.type"] == "STEP_FAILED"
    assert "gen_ai.response.finish_reasons" not in found


def test_a_request_that_never_ran_has_the_queue_as_its_only_phase() -> None:
    nan = math.nan
    record = ended(outcome="abort", scheduled=nan, first_token=nan, last_token=nan)
    spans = by_name(spans_of(record))
    assert list(spans) == ["queue", "text_completion some/model"]
    assert seconds(spans["queue"]) == pytest.approx(6.0, abs=1e-3)
    found = attributes(spans["text_completion some/model"].attributes)
    assert [name for name in found if "latency" in name] == ["gen_ai.latency.e2e"]


def test_without_a_caller_a_request_begins_a_trace() -> None:
    for trace in ({}, {"traceparent": "nonsense"}):
        span = by_name(spans_of(ended(trace=trace)))["text_completion some/model"]
        assert span.parent_span_id == b""
        assert span.trace_id not in (b"", bytes.fromhex(TRACE_ID))


def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    spans = spans_of(ended(trace=NOT_SAMPLED), ended())
    assert len(spans) == 4
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}


def test_the_id_of_the_trace_is_told_sampled_or_not() -> None:
    with Collector() as collector, tracing(collector.endpoint) as traces:
        assert traces.ended(ended()) == TRACE_ID
        assert traces.ended(ended(trace=NOT_SAMPLED)) == TRACE_ID
        own = traces.ended(ended(trace={}))
        assert len(own) == 32 and own != TRACE_ID and int(own, 16)


def test_the_service_is_named() -> None:
    with Collector() as collector:
        with tracing(collector.endpoint) as traces:
            traces.ended(ended())
        assert collector.resource["service.name"] == "colrow-coordinator"


# --- when nobody takes them --------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[str]:
    """An endpoint where nothing listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def slow() -> Iterator[str]:
    """A collector that takes longer for a batch than anybody waits."""
    with Collector(delay_s=30) as collector:
        yield collector.endpoint


@pytest.mark.parametrize("kind", ["nobody", "silent", "slow"])
def test_a_dead_endpoint_slows_nothing_and_says_so_little(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    traces = Tracing.open(request.getfixturevalue(kind), "some/model")
    with caplog.at_level(logging.INFO):
        times = []
        for _ in range(1500):  # three times what the queue holds
            began = time.perf_counter()
            traces.ended(ended())
            times.append(time.perf_counter() - began)
        time.sleep(2)  # for a retry or two
        began = time.monotonic()
        traces.close(timeout_s=1.0)
        assert time.monotonic() - began < 4
    # A machine that does other things may stop anything for a second, now and then; who waits for an
    # endpoint does so each time, once the queue is full.
    assert sorted(times)[-10] < 0.1
    assert max(times) < 3
    complaints = [one for one in caplog.records if one.levelno >= logging.INFO]
    assert len(complaints) <= 2, [one.getMessage() for one in complaints]
    assert not any(one.exc_info for one in complaints)


def test_closing_sends_what_is_left() -> None:
    assert len(spans_of(*(ended() for _ in range(300)))) == 1200


# --- without -----------------------------------------------------------------------------------


def test_without_an_endpoint_neither_sdk_nor_exporter_is_loaded() -> None:
    script = (
        "import coordinator.__main__, sys;"
        "parts = ('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.proto');"
        "print(*(name for name in sys.modules if name.startswith(parts)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://host:1", "http://", "http://h:1/x"])
def test_an_endpoint_that_is_no_url_is_refused(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "m", "--workers", "a:1", "--otlp-endpoint"]
    with pytest.raises(SystemExit):
        parse([*flags, endpoint])
    assert "--otlp-endpoint" in capsys.readouterr().err
    assert parse([*flags, "https://host:4317"]).otlp_endpoint == "https://host:4317"
