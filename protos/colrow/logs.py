"""What Colrow's services log: one record a line on stderr, as text or as JSON.

Fields that a record is given with `extra` follow the message as `key=value` in text, and are members
of their own in JSON. Times are UTC.
"""

import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

FORMATS = ("text", "json")

_NO_FIELDS = frozenset(
    {
        *RESERVED_ATTRS,
        *vars(logging.makeLogRecord({})),
        "asctime",
        "message",
        "color_message",  # uvicorn's message once more, for terminals
    }
)
_BARE = re.compile(r"[^\s\"=\\]+")  # values that need no quotes


def _iso_time(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO coordinator message key=value`, and a traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _iso_time(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [
            f" {name}={_text(value)}"
            for name, value in vars(record).items()
            if name not in _NO_FIELDS and value is not None
        ]
        return super().formatMessage(record) + "".join(fields)


def _text(value: object) -> str:
    text = str(value)
    # A field may be what a client sent: quoted, it can begin neither a field nor a line of its own.
    return text if _BARE.fullmatch(text) and text.isprintable() else json.dumps(text)


class JsonLinesFormatter(JsonFormatter):
    """An object with timestamp, level, logger and message, `exc_info` where there is a traceback,
    and the fields of the record."""

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "timestamp", "levelname": "level", "name": "logger"},
            reserved_attrs=tuple(_NO_FIELDS),
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _iso_time(record)


def configure(level: str, log_format: str) -> None:
    """Sends the records of all loggers from `level` on to stderr.

    As "json", warnings and exceptions that nothing catches go there too, so that every line that
    Python writes to stderr is an object.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLinesFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        sys.unraisablehook = _log_unraisable
        threading.excepthook = _log_of_thread


def complain(program: str, error: Exception, log_format: str) -> None:
    """The one line with which a service ends that can't go on."""
    if log_format == "json":
        logging.getLogger(program).critical("%s", error)
    else:
        print(f"{program}: {error}", file=sys.stderr)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logging.critical("uncaught %s", kind.__name__, exc_info=(kind, error, traceback))


def _log_unraisable(unraisable: Any) -> None:
    error = unraisable.exc_value
    exc_info = (unraisable.exc_type, error, unraisable.exc_traceback) if error else None
    logging.error("%s", unraisable.err_msg or "ignored an exception", exc_info=exc_info)


def _log_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit or arguments.exc_value is None:
        return
    name = arguments.thread.name if arguments.thread else "?"
    logging.critical(
        "uncaught %s in thread %s",
        arguments.exc_type.__name__,
        name,
        exc_info=(arguments.exc_type, arguments.exc_value, arguments.exc_traceback),
    )
