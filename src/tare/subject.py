"""What the work at hand is about: the pod, the container and the call that its log lines are told to belong to.

A context of asyncio carries it: what a call binds, all that it starts sees. Each call and each long-lived task has a context of its own,
so that nothing has to be taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

_subject: ContextVar[Mapping[str, str]] = ContextVar("tare_subject", default={})  # noqa: B039 - it is never changed, only replaced


def bind(**names: str) -> None:
    """From here on the work is about these too: `method`, `pod` and `container`, an ID each."""
    _subject.set({**_subject.get(), **names})


def bound() -> Mapping[str, str]:
    """What it is about."""
    return _subject.get()
