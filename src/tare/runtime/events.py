"""What happens to pods and containers, in the order in which it happens, for whoever wants to follow it.

    store ─► journal: … 41 42 43 44 45 │        a subscriber is a place in it, and waits at its end
                      ▲        ▲     ▲          one that falls out at the other end is told so: it never misses an event unknowingly
                   oldest    slow  quick

An event holds its pod and all of the pod's containers as they were right after it. The journal is in memory, and bounded. What
happens while nobody follows is kept for the next who does, for a while: so a client that reconnects goes on where the last
one was (an event may then come twice). Of a pod there are the same events as of a container, under the pod's own ID.
"""

from __future__ import annotations

import asyncio
import collections
import enum
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from tare.errors import ResourceExhausted, Unavailable
from tare.runtime.records import ContainerRecord, ContainerState, PodRecord, PodState

LIMIT = 4096
KEEP = 300 * 10**9  # ns that an event waits for a first reader


class Kind(enum.IntEnum):
    """CRI ContainerEventType."""

    CREATED = 0
    STARTED = 1
    STOPPED = 2
    DELETED = 3


@dataclass(frozen=True, slots=True)
class Event:
    """`id` is a container's, or the pod's own; `at` ns since the epoch; `containers` oldest first."""

    kind: Kind
    id: str
    at: int
    pod: PodRecord
    containers: tuple[ContainerRecord, ...]


CONTAINER_KINDS = {
    ContainerState.CREATED: Kind.CREATED,
    ContainerState.RUNNING: Kind.STARTED,
    ContainerState.EXITED: Kind.STOPPED,
}
POD_KINDS = {PodState.READY: (Kind.CREATED, Kind.STARTED), PodState.NOTREADY: (Kind.STOPPED,)}


class Journal:
    """The last events, `limit` of them at most."""

    def __init__(self, limit: int = LIMIT, keep: int = KEEP) -> None:
        self._events: collections.deque[Event] = collections.deque(maxlen=limit)
        self._keep = keep
        self._next = 0  # the number of the next event; the oldest one kept is len(_events) before it
        self._read = 0  # as far as anybody has come
        self._followers = 0
        self._news = asyncio.Event()
        self._closed = False

    def add(self, kind: Kind, thing: str, pod: PodRecord, containers: tuple[ContainerRecord, ...]) -> None:
        """It has happened just now."""
        self._events.append(Event(kind, thing, time.time_ns(), pod, containers))
        self._next += 1
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def close(self) -> None:
        """Nobody is told anything any more: who follows is told that."""
        self._closed = True
        self._wake()

    @property
    def followers(self) -> int:
        """How many follow."""
        return self._followers

    def follow(self) -> AsyncGenerator[Event]:
        """Every event from this call on; for the first who follows, also those that nobody has read.

        Raises ResourceExhausted in the place of an event that came and is not kept any more, Unavailable once the journal is closed.
        """
        return self._from(self._next if self._followers else self._unread())

    def _unread(self) -> int:
        """The number of the first event that nobody has read and that is not too old."""
        since = time.time_ns() - self._keep
        number = max(self._read, self._next - len(self._events))
        while number < self._next and self._at(number).at < since:
            number += 1
        return number

    def _at(self, number: int) -> Event:
        return self._events[number - self._next]

    async def _from(self, number: int) -> AsyncGenerator[Event]:
        self._followers += 1
        try:
            while not self._closed:
                if number == self._next:
                    await self._news.wait()
                    continue
                if number < self._next - len(self._events):
                    cause = f"{self._next - number} events wait, and {len(self._events)} are kept"
                    hint = "subscribe again, and list what there is"
                    raise ResourceExhausted("follow events", cause=cause, hint=hint)
                yield self._at(number)
                number += 1
                self._read = max(self._read, number)
            raise Unavailable("follow events", cause="the daemon is stopping", hint="subscribe again")
        finally:
            self._followers -= 1
