"""Tickets: what the URL of an exec, attach or port-forward carries. Each is good once, for a while, and for its own request alone."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tare.errors import ResourceExhausted

Request = TypeVar("Request")

LIFE = 60.0  # seconds
MOST = 1000  # that are out at once
BYTES = 24


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Request]):
    """A request that was granted, until `expires` (monotonic seconds)."""

    kind: str
    request: Request
    expires: float


class Tickets(Generic[Request]):
    """Those that are out. `clock` tells monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, life: float = LIFE, most: int = MOST) -> None:
        self._clock, self._life, self._most = clock, life, most
        self._out: OrderedDict[str, Ticket[Request]] = OrderedDict()

    def issue(self, kind: str, request: Request) -> str:
        """A new ticket's name, which nobody can guess. Raises ResourceExhausted where too many are out."""
        self._expire()
        if len(self._out) >= self._most:
            cause = f"{self._most} are waiting to be used"
            hint = f"they expire after {self._life:g} s"
            raise ResourceExhausted("hand out a URL for streaming", cause=cause, hint=hint)
        name = secrets.token_urlsafe(BYTES)
        self._out[name] = Ticket(kind, request, self._clock() + self._life)
        return name

    def redeem(self, kind: str, name: str) -> Request | None:
        """The request of a ticket, which is used up by this; None for one that is unknown, used, too old or for something else."""
        self._expire()
        ticket = self._out.get(name)
        if ticket is None or ticket.kind != kind:
            return None
        del self._out[name]
        return ticket.request

    def _expire(self) -> None:
        now = self._clock()
        while self._out and next(iter(self._out.values())).expires <= now:
            self._out.popitem(last=False)
