"""Who is told of calls and of the steps of operations as they happen: metrics, traces, or both. Where neither is asked for there is no watch.

    cri.dispatch      with watch.call(service, method, metadata) as call: … call.refused(code, message)
    state.operations  with watch.operation(name, names): … with watch.step(operation, step): …

How a thing ended is one word, its outcome: "OK", or the gRPC code of what went wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from tare.errors import TareError

OK = "OK"
Metadata = Iterable[tuple[str, str | bytes]]


class Meter(Protocol):
    """Counts (`metrics`). Times in seconds."""

    def begun(self, service: str, method: str) -> None:
        """A call is under way."""

    def ended(self, service: str, method: str, outcome: str, seconds: float) -> None:
        """It is over."""

    def operation(self, name: str, outcome: str, seconds: float) -> None:
        """An operation is over."""

    def step(self, operation: str, step: str, outcome: str, seconds: float) -> None:
        """A step of one is."""


class Span(Protocol):
    """A stretch of time in a trace."""

    def end(self, outcome: str, message: str) -> None:
        """It is over."""


class Tracer(Protocol):
    """Tells what was done when, as part of what (`tracing`)."""

    def call(self, service: str, method: str, metadata: Metadata) -> Span:
        """A call, as part of the caller's trace."""

    def work(self, name: str, attributes: Mapping[str, str]) -> Span:
        """Something within what is under way in this context."""


def outcome(error: BaseException | None) -> tuple[str, str]:
    """One word for how something ended, and more words."""
    if error is None:
        return OK, ""
    if isinstance(error, TareError):
        return error.code, str(error)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED", ""
    return "INTERNAL", f"{type(error).__name__}: {error}"


class Call:
    """One call: entered when it begins, left when it is over."""

    def __init__(self, watch: Watch, service: str, method: str, metadata: Metadata) -> None:
        self._watch, self._service, self._method, self._metadata = watch, service, method, metadata
        self._refusal: tuple[str, str] | None = None
        self._begin = 0.0
        self._span: Span | None = None

    def refused(self, code: str, message: str) -> None:
        """It is answered with this gRPC code."""
        self._refusal = (code, message)

    def __enter__(self) -> Call:
        self._begin = time.perf_counter()
        if self._watch.tracer is not None:
            self._span = self._watch.tracer.call(self._service, self._method, self._metadata)
        if self._watch.meter is not None:
            self._watch.meter.begun(self._service, self._method)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        word, message = self._refusal or outcome(error)
        if self._watch.meter is not None:
            self._watch.meter.ended(self._service, self._method, word, time.perf_counter() - self._begin)
        if self._span is not None:
            self._span.end(word, message)


class Work:
    """An operation, or a step of one: entered when it begins, left when it is over."""

    def __init__(self, watch: Watch, operation: str, step: str, attributes: Mapping[str, str]) -> None:
        self._watch, self._operation, self._step, self._attributes = watch, operation, step, attributes
        self._begin = 0.0
        self._span: Span | None = None

    def __enter__(self) -> Work:
        self._begin = time.perf_counter()
        if self._watch.tracer is not None:
            name = f"{self._operation} {self._step}" if self._step else self._operation
            self._span = self._watch.tracer.work(name, self._attributes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        word, message = outcome(error)
        seconds = time.perf_counter() - self._begin
        if self._watch.meter is not None and self._step:
            self._watch.meter.step(self._operation, self._step, word, seconds)
        elif self._watch.meter is not None:
            self._watch.meter.operation(self._operation, word, seconds)
        if self._span is not None:
            self._span.end(word, message)


class Watch:
    """Tells a meter, a tracer, or both."""

    def __init__(self, meter: Meter | None = None, tracer: Tracer | None = None) -> None:
        self.meter = meter
        self.tracer = tracer

    def call(self, service: str, method: str, metadata: Metadata) -> Call:
        """A call that begins."""
        return Call(self, service, method, metadata)

    def operation(self, name: str, names: Mapping[str, str]) -> AbstractContextManager[object]:
        """An operation that begins on what these names say."""
        return Work(self, name, "", names)

    def step(self, operation: str, step: str) -> AbstractContextManager[object]:
        """A step of it."""
        return Work(self, operation, step, {})
