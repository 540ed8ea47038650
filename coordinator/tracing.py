"""OpenTelemetry: one span a request, with its phases as children, sent over OTLP.

The SDK is imported when a `Tracing` is made, so that a coordinator without one does not load it. What
the SDK reads from the environment (`OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER`,
`OTEL_RESOURCE_ATTRIBUTES` and others) is its own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from colrow import __version__
from coordinator.request import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

SERVICE_NAME = "colrow-coordinator"
EXPORT_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 3.0
COMPLAINT_INTERVAL_S = 60.0
HEADERS = ("traceparent", "tracestate")
"""What carries a trace from a caller: https://www.w3.org/TR/trace-context/"""

# Those that complain at every attempt when nobody takes the spans.
_LOUD_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.sdk._shared_internal",
)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def trace_id_of(trace: Mapping[str, str]) -> str:
    """The trace that a caller's `traceparent` names; empty where it names none."""
    found = _TRACEPARENT.fullmatch(trace.get("traceparent", ""))
    return found[1] if found and int(found[1], 16) else ""


class Tracing:
    """Makes spans of requests that ended and sends them to `endpoint` from a thread of its own.

    `endpoint` is http://host:port, or https: with TLS. Where nobody takes the spans they are dropped,
    oldest first, and no request waits for them.
    """

    def __init__(
        self, provider: TracerProvider, exporter: OTLPSpanExporter, model_name: str
    ) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._exporter = exporter
        self._model_name = model_name
        self._tracer = provider.get_tracer("colrow", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._quiet = _OncePerInterval(COMPLAINT_INTERVAL_S)
        for name in _LOUD_LOGGERS:
            logging.getLogger(name).addFilter(self._quiet)

    @classmethod
    def open(cls, endpoint: str, model_name: str) -> Tracing:
        """Loads the SDK and starts its thread; does not connect yet."""
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        service = {"service.name": SERVICE_NAME, "service.version": __version__}
        provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, exporter, model_name)

    def ended(self, record: RequestRecord) -> str:
        """Makes the spans of a request and returns the id of their trace.

        The caller's decision whether the trace is sampled holds.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        # One difference for all times, so that what lies between them is as measured.
        monotonic_to_wall = time.time_ns() - time.monotonic_ns()

        def wall_ns(monotonic_s: float) -> int:
            return round(monotonic_s * 1e9) + monotonic_to_wall

        span = self._tracer.start_span(
            f"text_completion {self._model_name}",
            context=self._propagator.extract(record.trace),
            kind=SpanKind.SERVER,
            start_time=wall_ns(record.arrived),
        )
        if span.is_recording():
            span.set_attributes(self._attributes(record))
            if record.outcome == "error":
                span.set_status(Status(StatusCode.ERROR, record.error))
            inside: Context = set_span_in_context(span)
            for name, start, stop in _phases(record):
                phase = self._tracer.start_span(name, context=inside, start_time=wall_ns(start))
                phase.end(wall_ns(stop))
        span.end(wall_ns(record.ended))
        return f"{span.get_span_context().trace_id:032x}"

    def _attributes(self, record: RequestRecord) -> dict[str, AttributeValue]:
        """By the semantic conventions for generative AI; the latencies, which these lack, as vLLM's."""
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "colrow",
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.max_tokens": record.max_tokens,
            "gen_ai.request.choice.count": record.n,
            "gen_ai.request.id": record.request_id,
            "gen_ai.response.model": self._model_name,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        }
        for name, seconds in (
            ("time_in_queue", record.queue_s),
            ("time_to_first_token", record.time_to_first_token_s),
            ("time_in_model_prefill", record.prefill_s),
            ("time_in_model_decode", record.decode_s),
            ("e2e", record.total_s),
        ):
            if not math.isnan(seconds):
                attributes[f"gen_ai.latency.{name}"] = seconds
        if record.outcome == "error":
            attributes["error.type"] = record.error_type
        else:
            attributes["gen_ai.response.finish_reasons"] = [record.outcome]
        return attributes

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Sends what is left, for at most `timeout_s` seconds, and ends the thread. Blocks."""
        # Once it is shut down, the exporter gives up what it is at and takes nothing more.
        giving_up = threading.Timer(timeout_s, self._exporter.shutdown)
        giving_up.daemon = True
        giving_up.start()
        with contextlib.suppress(Exception):
            self._provider.shutdown()
        giving_up.cancel()
        for name in _LOUD_LOGGERS:
            logging.getLogger(name).removeFilter(self._quiet)


def _phases(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Name, start and stop of each phase that a request reached; the last may have been cut short."""
    for name, start, stop in (
        ("queue", record.arrived, record.scheduled),
        ("prefill", record.scheduled, record.first_token),
        ("decode", record.first_token, record.last_token),
    ):
        if math.isnan(start):
            return
        yield name, start, record.ended if math.isnan(stop) else stop


class _OncePerInterval(logging.Filter):
    """Lets one record through in `interval_s` seconds."""

    def __init__(self, interval_s: float) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return False
        self._last = now
        return True
