"""What is told of requests: metrics of everything, and of each that ends a log line and a span."""

import logging
import math
from dataclasses import dataclass

from colrow.errors import ServiceError
from coordinator.metrics import Metrics
from coordinator.request import Request, RequestRecord
from coordinator.tracing import Tracing, trace_id_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The engine's `Observer`; `tracing` is None where spans are not wanted."""

    metrics: Metrics
    tracing: Tracing | None = None

    def step(self, num_tokens: int) -> None:
        self.metrics.step(num_tokens)

    def first_token(self, seconds: float) -> None:
        self.metrics.first_token(seconds)

    def next_token(self, seconds: float) -> None:
        self.metrics.next_token(seconds)

    def ended(self, record: RequestRecord) -> None:
        self.metrics.ended(record)
        trace_id = self.tracing.ended(record) if self.tracing else trace_id_of(record.trace)
        failed = record.outcome == "error"
        log.log(
            logging.ERROR if failed else logging.INFO,
            "request failed" if failed else "request ended",
            extra=_fields(record, trace_id),
        )

    def rejected(self, request: Request, error: ServiceError) -> None:
        self.metrics.rejected(request, error)
        fields = {"request_id": request.request_id, "reason": error.reason, "error": str(error)}
        if trace_id := trace_id_of(request.trace):
            fields["trace_id"] = trace_id
        log.info("request refused", extra=fields)


def _fields(record: RequestRecord, trace_id: str) -> dict[str, object]:
    """A log line's fields of a request; times in seconds, those that were not reached left out."""
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "outcome": record.outcome,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "completion_tokens": record.num_generated_tokens,
    }
    for name, seconds in (
        ("queue_s", record.queue_s),
        ("ttft_s", record.time_to_first_token_s),
        ("tpot_s", record.time_per_token_s),
        ("total_s", record.total_s),
    ):
        if not math.isnan(seconds):
            fields[name] = round(seconds, 6)
    if record.error_type:
        fields |= {"reason": record.error_type, "error": record.error}
    if trace_id:
        fields["trace_id"] = trace_id
    return fields
