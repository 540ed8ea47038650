"""An OTLP collector on a free port that keeps the spans it is sent."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans from entering its context to leaving it; `delay_s` is how long each batch takes."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self._delay_s = delay_s
        self._leaving = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> "Collector":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._server.stop(None).wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self._leaving.wait(self._delay_s)
        for of_resource in request.resource_spans:
            self.resource = attributes(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += of_scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, num_spans: int, timeout_s: float = 20.0) -> list[Span]:
        """The spans so far, once there are so many."""
        deadline = time.monotonic() + timeout_s
        while len(self.spans) < num_spans:
            assert time.monotonic() < deadline, f"{len(self.spans)} spans of {num_spans}"
            time.sleep(0.02)
        return list(self.spans)


def attributes(pairs: Any) -> dict[str, Any]:
    """Attributes of a span or a resource as plain values."""

    def plain(value: AnyValue) -> Any:
        kind = value.WhichOneof("value")
        assert kind is not None
        if kind == "array_value":
            return [plain(each) for each in value.array_value.values]
        return getattr(value, kind)

    found: list[KeyValue] = list(pairs)
    return {pair.key: plain(pair.value) for pair in found}
