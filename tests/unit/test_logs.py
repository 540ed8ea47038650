"""Log lines: fields that can be read back, whoever wrote them, and JSON to the last line."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from colrow.errors import ResourceExhausted
from colrow.logs import JsonLinesFormatter, TextFormatter
from coordinator.metrics import Metrics
from coordinator.request import Request, RequestRecord
from coordinator.telemetry import Telemetry

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}


def record(message: str = "hello %s", **extra: Any) -> logging.LogRecord:
    logger = logging.getLogger("some.logger")
    return logger.makeRecord(
        "some.logger", logging.INFO, __file__, 1, message, ("you",), None, extra=extra
    )


def as_json(line: str) -> dict[str, Any]:
    assert "\n" not in line
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_text_has_time_level_logger_message_and_fields() -> None:
    one = record(request_id="r-1", queue_s=0.25, nothing=None)
    line = TextFormatter().format(one)
    time, rest = line.split(" ", 1)
    assert rest == "INFO some.logger hello you request_id=r-1 queue_s=0.25"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert abs(datetime.fromisoformat(time) - datetime.fromtimestamp(one.created, UTC)).seconds < 1


def test_json_has_time_level_logger_message_and_fields() -> None:
    line = as_json(JsonLinesFormatter().format(record(request_id="r-1", queue_s=0.25)))
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "some.logger",
        "message": "hello you",
        "request_id": "r-1",
        "queue_s": 0.25,
    }


@pytest.mark.parametrize(
    "value", ["", "a b", 'a"b', "a=b", "a\nINFO forged", "\x1b[2J", "\\", "é b"]
)
def test_a_field_of_a_client_can_not_pass_for_another_one(value: str) -> None:
    line = TextFormatter().format(record(request_id=value, n=1))
    assert "\n" not in line and "\x1b" not in line
    field, found = re.fullmatch(r".* hello you request_id=(.*) (n=1)", line).groups()  # type: ignore[union-attr]
    assert json.loads(field) == value
    assert found == "n=1"
    assert as_json(JsonLinesFormatter().format(record(request_id=value)))["request_id"] == value


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonLinesFormatter()])
def test_a_traceback_is_kept(formatter: logging.Formatter) -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        one = record(request_id="r-1")
        one.exc_info = sys.exc_info()
    line = formatter.format(one)
    assert "Traceback" in line and "KeyError: 'lost'" in line
    if isinstance(formatter, JsonLinesFormatter):
        assert "KeyError" in as_json(line)["exc_info"]
    else:
        assert line.splitlines()[0].endswith("hello you request_id=r-1")


def test_what_uvicorn_adds_for_terminals_is_left_out() -> None:
    one = record(color_message="\x1b[32mhello\x1b[0m")
    assert TextFormatter().format(one).endswith("hello you")
    assert "color_message" not in as_json(JsonLinesFormatter().format(one))


# --- requests ----------------------------------------------------------------------------------


def ended(**changes: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "trace": {},
        "num_prompt_tokens": 12,
        "n": 1,
        "max_tokens": 40,
        "arrived": 100.0,
        "scheduled": 100.5,
        "first_token": 101.5,
        "last_token": 105.5,
        "ended": 106.0,
        "num_cached_tokens": 4,
        "num_generated_tokens": 11,
        "outcome": "length",
    }
    return RequestRecord(**fields | changes)


Told = Callable[..., tuple[logging.LogRecord, dict[str, Any]]]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """What is logged of a request that ended: the record, and its fields."""
    telemetry = Telemetry(Metrics("m", 64))

    def tell(**changes: Any) -> tuple[logging.LogRecord, dict[str, Any]]:
        with caplog.at_level(logging.INFO):
            caplog.clear()
            telemetry.ended(ended(**changes))
        (one,) = caplog.records
        line = as_json(JsonLinesFormatter().format(one))
        return one, {name: line[name] for name in list(line)[4:]}

    return tell


def test_of_a_request_one_line_says_what_it_took(told: Told) -> None:
    one, fields = told()
    assert (one.levelname, one.getMessage()) == ("INFO", "request ended")
    assert fields == {
        "request_id": "r-1",
        "outcome": "length",
        "prompt_tokens": 12,
        "cached_tokens": 4,
        "completion_tokens": 11,
        "queue_s": 0.5,
        "ttft_s": 1.5,
        "tpot_s": 0.4,
        "total_s": 6.0,
    }


def test_the_callers_trace_is_named(told: Told) -> None:
    assert told(trace=TRACE)[1]["trace_id"] == TRACE_ID
    for other in ("", "nonsense", TRACE["traceparent"].upper(), f"00-{'0' * 32}-{'1' * 16}-01"):
        assert "trace_id" not in told(trace={"traceparent": other})[1]


def test_times_that_were_not_reached_are_left_out(told: Told) -> None:
    nan = float("nan")
    _, fields = told(
        outcome="abort", scheduled=nan, first_token=nan, last_token=nan, num_generated_tokens=0
    )
    assert fields["outcome"] == "abort"
    assert {"queue_s", "ttft_s", "tpot_s"}.isdisjoint(fields)
    assert fields["total_s"] == 6.0


def test_a_failure_is_an_error_with_the_request_and_the_reason(told: Told) -> None:
    one, fields = told(outcome="error", error="a step failed: boom", error_type="STEP_FAILED")
    assert (one.levelname, one.getMessage()) == ("ERROR", "request failed")
    assert fields["request_id"] == "r-1"
    assert (fields["reason"], fields["error"]) == ("STEP_FAILED", "a step failed: boom")


def test_a_refused_request_is_named(caplog: pytest.LogCaptureFixture) -> None:
    request = Request("r-2", (1, 2), trace=TRACE)
    with caplog.at_level(logging.INFO):
        Telemetry(Metrics("m", 64)).rejected(
            request, ResourceExhausted("full", reason="QUEUE_FULL")
        )
    line = as_json(JsonLinesFormatter().format(caplog.records[0]))
    assert line["message"] == "request refused"
    assert (line["request_id"], line["reason"], line["trace_id"]) == ("r-2", "QUEUE_FULL", TRACE_ID)


# --- a process ---------------------------------------------------------------------------------


def stderr_of(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout == ""
    assert done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise KeyError('lost')", ("CRITICAL", "KeyError: 'lost'")),
        (
            "import threading\n"
            "thread = threading.Thread(target=lambda: [][1]); thread.start(); thread.join()",
            ("CRITICAL", "IndexError"),
        ),
        (
            "class Odd:\n    def __del__(self): raise KeyError('lost')\nOdd()",
            ("ERROR", "KeyError: 'lost'"),
        ),
        ("import warnings; warnings.warn('odd')", ("WARNING", "odd")),
        (
            "import asyncio\n"
            "async def fail(): raise KeyError('lost')\n"
            "async def main(): task = asyncio.create_task(fail()); await asyncio.sleep(0); del task\n"
            "asyncio.run(main())",
            ("ERROR", "KeyError: 'lost'"),
        ),
        ("logging.getLogger('uvicorn.error').error('uvicorn')", ("ERROR", "uvicorn")),
        (
            "logs.complain('colrow worker', ValueError('no port'), 'json')",
            ("CRITICAL", "no port"),
        ),
    ],
    ids=["uncaught", "thread", "unraisable", "warning", "task", "logger", "last words"],
)
def test_in_json_everything_on_stderr_is_an_object(code: str, expected: tuple[str, str]) -> None:
    setup = "import logging\nfrom colrow import logs\nlogs.configure('info', 'json')\n"
    lines = [as_json(line) for line in stderr_of("-c", setup + code)]
    level, text = expected
    assert any(line["level"] == level and text in json.dumps(line) for line in lines), lines


@pytest.mark.parametrize("service", ["coordinator", "shard_worker"])
def test_a_service_that_can_not_start_says_so_in_json(service: str) -> None:
    flags = {
        "coordinator": ("--model", "/nowhere", "--workers", "127.0.0.1:1"),
        "shard_worker": ("--host", "203.0.113.1", "--port", "1"),
    }[service]
    last = as_json(stderr_of("-m", service, "--log-format", "json", *flags)[-1])
    assert last["level"] == "CRITICAL"
    assert last["logger"] == {"coordinator": "colrow coordinator"}.get(service, "colrow worker")
