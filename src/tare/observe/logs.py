"""The daemon's log: lines on standard error, for people or as JSON, each with the pod and the container that it is about.

    console   2026-01-02 03:04:05,678 INFO tare.runtime.service: container 3f… runs in pod 9c… [method=StartContainer]
    json      {"time": "2026-01-02T03:04:05.678901+00:00", "level": "info", "logger": "tare.runtime.service", "message": "container 3f… runs …",
               "method": "StartContainer", "pod": "9c…", "container": "3f…"}

A JSON line has `exception` where there was one, and `trace_id` and `span_id` where the call is traced. The level can be changed while the
daemon runs.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Final, Literal

from tare import subject
from tare.errors import InvalidArgument

LEVELS: Final = ("debug", "info", "warning", "error")
LINE: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NOISY: Final = ("asyncio", "grpc", "aiohttp")  # what these say below a warning is about themselves

Ids = Callable[[], Mapping[str, str]]


def nothing() -> Mapping[str, str]:
    """The IDs of a trace where nothing is traced."""
    return {}


class Console(logging.Formatter):
    """A line for people: what the work is about is added where the words do not say it."""

    def __init__(self) -> None:
        super().__init__(LINE)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without an exception's traceback."""
        line = super().formatMessage(record)
        missing = [
            f"{name}={value}" for name, value in subject.bound().items() if value and value not in record.message
        ]
        return f"{line} [{' '.join(missing)}]" if missing else line


class Json(logging.Formatter):
    """One JSON object a line. `trace` tells the IDs of the trace that the work belongs to."""

    def __init__(self, trace: Ids = nothing) -> None:
        super().__init__()
        self._trace = trace

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": at.isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in subject.bound().items() if value},
            **self._trace(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, form: Literal["console", "json"], trace: Ids = nothing) -> None:
    """Log to standard error from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(trace) if form == "json" else Console())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def level() -> str:
    """The level from which on lines are written."""
    return logging.getLevelName(logging.getLogger().level).lower()


def set_level(wanted: str) -> str:
    """Write lines from this level on; returns the one before. Raises InvalidArgument."""
    if wanted not in LEVELS:
        raise InvalidArgument(f"set the log level to {wanted!r}", cause=f"the levels are {', '.join(LEVELS)}")
    before = level()
    logging.getLogger().setLevel(wanted.upper())
    return before
