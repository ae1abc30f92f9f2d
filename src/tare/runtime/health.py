"""Looking after a container's health by a command in it, as Docker does it: what is asked, when, and what the answers come to.

    starting ──► healthy        a probe that ends with 0
       │  ▲         │
       └──┴─────────┴──► unhealthy     so many failures in a row as `retries` says; in the start period none counts until one succeeded

What the image says (HEALTHCHECK: "Healthcheck" in its configuration) holds where `tare run` says nothing else. An unhealthy container is
shown as such and goes on.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tare.errors import DeadlineExceeded, FailedPrecondition, NotFound, TareError, describe

ANNOTATION = "tare/health"
NONE, COMMAND, SHELL = "NONE", "CMD", "CMD-SHELL"
STARTING, HEALTHY, UNHEALTHY = "starting", "healthy", "unhealthy"
SECOND = 10**9
KEPT, OUTPUT = 5, 4096  # probes, and bytes of what each said
TIMED_OUT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Docker's HealthConfig; times in ns. `test` is empty for none of its own, ("NONE",) for none at all, ("CMD", …) or ("CMD-SHELL", line)."""

    test: tuple[str, ...] = ()
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0

    @property
    def command(self) -> tuple[str, ...]:
        """What is run; nothing where there is nothing to look at."""
        kind, *words = self.test or (NONE,)
        if kind == COMMAND:
            return tuple(words)
        return ("/bin/sh", "-c", words[0]) if kind == SHELL and words else ()


DEFAULTS = Check(interval=30 * SECOND, timeout=30 * SECOND, start_interval=5 * SECOND, retries=3)


@dataclass(frozen=True, slots=True)
class Probe:
    """One look; times in ns since the epoch. `exit_code` −1: it took too long."""

    started_at: int
    finished_at: int
    exit_code: int
    output: str


def encode(check: Check) -> str:
    """For an annotation."""
    return json.dumps({name: value for name in FIELDS if (value := getattr(check, name))})


FIELDS = ("test", "interval", "timeout", "start_period", "start_interval", "retries")


def decode(text: str) -> Check:
    """From an annotation. Raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or not found.keys() <= set(FIELDS):
        raise ValueError(f"{text!r} is no health check")
    test = tuple(str(word) for word in found.pop("test", ()))
    return Check(test=test, **{name: int(value) for name, value in found.items()})


def of_image(document: Mapping[str, Any]) -> Check:
    """What an image's configuration says; what it says amiss it does not say."""
    config = document.get("config") or {}
    given = config.get("Healthcheck") if isinstance(config, dict) else None
    if not isinstance(given, dict):
        return Check()
    names = {
        "Interval": "interval",
        "Timeout": "timeout",
        "StartPeriod": "start_period",
        "StartInterval": "start_interval",
    }
    numbers = {
        name: value for key, name in {**names, "Retries": "retries"}.items() if isinstance(value := given.get(key), int)
    }
    test = given.get("Test")
    return Check(test=tuple(map(str, test)) if isinstance(test, list) else (), **numbers)


def merged(*checks: Check) -> Check:
    """The first that says something counts, for each field; then the defaults."""
    merged = Check()
    for check in (*checks, DEFAULTS):
        values = {name: getattr(merged, name) or getattr(check, name) for name in FIELDS}
        merged = Check(**values)
    return merged


def assess(status: str, streak: int, failed: bool, *, starting: bool, retries: int) -> tuple[str, int]:
    """Status and failures in a row after one more probe; `starting` says that the start period lasts."""
    if not failed:
        return HEALTHY, 0
    if starting and status == STARTING:
        return status, streak
    streak += 1
    return (UNHEALTHY if streak >= retries else status), streak


class Monitor:
    """Probes one container until it is cancelled or the container ends. `run` runs a command in it: (exit code, output)."""

    def __init__(
        self,
        check: Check,
        run: Callable[[tuple[str, ...], float], Awaitable[tuple[int, bytes]]],
        changed: Callable[[str, int], None],
        *,
        status: str = "",
        streak: int = 0,
        running_for: float = 0.0,
    ) -> None:
        self.check = check
        self.status = status or STARTING
        self.streak = streak
        self.probes: deque[Probe] = deque(maxlen=KEPT)
        self._run = run
        self._changed = changed
        self._began = time.monotonic() - running_for

    async def watch(self) -> None:
        """For ever, or until the container is no more."""
        self._changed(self.status, self.streak)
        while True:
            await asyncio.sleep((self.check.start_interval if self._starting() else self.check.interval) / SECOND)
            starting = self._starting()
            try:
                probe = await self._probe()
            except (NotFound, FailedPrecondition):
                return
            self.probes.append(probe)
            before = (self.status, self.streak)
            failed = probe.exit_code != 0
            self.status, self.streak = assess(*before, failed, starting=starting, retries=self.check.retries)
            if (self.status, self.streak) != before:
                self._changed(self.status, self.streak)

    def _starting(self) -> bool:
        """Whether failures do not count yet."""
        age = time.monotonic() - self._began
        return self.status == STARTING and age < self.check.start_period / SECOND

    async def _probe(self) -> Probe:
        began = time.time_ns()
        seconds = self.check.timeout / SECOND
        try:
            code, output = await self._run(self.check.command, seconds)
        except DeadlineExceeded:
            code, output = TIMED_OUT, f"no end within {seconds:g} s".encode()
        except (NotFound, FailedPrecondition):
            raise
        except TareError as error:  # the command is not there, or a process of Tare's was lost over it
            code, output = 126, describe(error).encode()
        return Probe(began, time.time_ns(), code, output[:OUTPUT].decode(errors="replace"))


def without(check: Check) -> Check:
    """The same, with nothing that is looked at."""
    return replace(check, test=(NONE,))
