"""The HTTP API is as its OpenAPI document says, whatever is sent: schemathesis makes the requests."""

from __future__ import annotations

import time
from typing import Any

import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz.victim import BUDGET, DEADLINE_S, Cluster, Tally, examine

pytestmark = pytest.mark.timeout(600 * max(1.0, BUDGET))

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def of_the_served_model(case: Any) -> Any:
    """Others are refused before anything else is looked at."""
    if isinstance(case.body, dict):
        case.body["model"] = "tiny"
    return case


def test_every_operation_of_the_openapi_document(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"http://127.0.0.1:{cluster.coordinator.http_port}"
    document = schemathesis.openapi.from_url(f"{base}/openapi.json")
    tally = Tally()
    failures: list[Exception] = []
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 9
    with cluster.without_leaks():
        for operation in operations:
            good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
            cases = good | good.map(of_the_served_model)
            if operation.body:
                cases |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

            def check(case: Any) -> None:
                began = time.monotonic()
                answer = case.call(timeout=DEADLINE_S)
                tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
                tally.codes[str(answer.status_code)] += 1
                case.validate_response(answer, checks=CHECKS)
                cluster.check()

            num_cases = 100 if operation.body else 10
            try:
                examine(cases, num_cases, check)
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("operations", failures)
    with capsys.disabled():
        print(f"\n{tally.codes.total()} HTTP requests to {len(operations)} operations: {tally}")
