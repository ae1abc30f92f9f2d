"""Operations of several steps that are whole or undone, whatever is killed in between.

An operation is a named list of steps; a step has a name, an action, and how to undo it. Its intent is written down before
the first effect and struck out after the last. When an action fails, the steps so far (the failed one included, since
it may have half happened) are undone in reverse order, going on past failures. After a crash `Operations.recover` does
the same for every intent still written down, or finishes it where the operation says so.

    intent written ─► step 1 ─► step 2 ─► … ─► intent struck out
                                  │ fails, or the daemon died
                                  ▼
                      undo 2 ─► undo 1 ─► intent struck out (kept, with the error, if an undo failed)

Undo and finish work from the operation's subject alone (IDs, names), must be idempotent, and must not mind that an effect
never happened. Each step is a failpoint before and after its action; see `failpoints`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tare.errors import TareError, describe
from tare.state.database import Database
from tare.state.failpoints import failpoint
from tare.state.file import BEGINS

log = logging.getLogger(__name__)
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """One effect. `undo` is None where there is nothing to take back."""

    name: str
    action: Callable[[S], Awaitable[None]]
    undo: Callable[[S], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Operation(Generic[S]):
    """Steps in order. `finish` says that recovery goes forward: every action runs again, in order, and must be idempotent.

    `ends` says that it ends something, which may cost the room that is kept for that; what is finished always may.
    """

    name: str
    steps: tuple[Step[S], ...]
    finish: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """An operation that has begun: whose, on what (JSON-able names by which its subject is found again), and what went wrong in undoing it."""

    operation: str
    subject: dict[str, str]
    failures: tuple[str, ...] = ()


class Watch(Protocol):
    """Who is told of operations and their steps: by entering and leaving what these give."""

    def operation(self, name: str, names: Mapping[str, str]) -> AbstractContextManager[object]:
        """A whole operation, undoing included, on the subject that goes by `names`."""

    def step(self, operation: str, step: str) -> AbstractContextManager[object]:
        """One step, or "undo STEP"."""


class Unwatched:
    """Nobody is told."""

    def __init__(self) -> None:
        self._nothing = nullcontext()

    def operation(self, name: str, names: Mapping[str, str]) -> AbstractContextManager[object]:
        """Nothing."""
        return self._nothing

    def step(self, operation: str, step: str) -> AbstractContextManager[object]:
        """Nothing."""
        return self._nothing


class Operations:
    """Runs operations and keeps their intents in the boot-scoped database. `watch` is told of all that is run here.

    An intent lives as long as the boot: after a reboot the effects that belong to a boot are gone, and those that last
    are found by comparing what exists with what is recorded.
    """

    def __init__(self, database: Database, watch: Watch | None = None) -> None:
        self._database = database
        self._watch: Watch = watch or Unwatched()
        self._intents = database.table("intents", Intent)
        keys = [int(key) for key, _ in self._intents.items()]
        self._next = max(keys, default=0) + 1
        self._unfinished: dict[tuple[str, ...], str] = {}
        self._active: dict[str, frozenset[str]] = {}

    async def run(self, operation: Operation[S], subject: S, names: Mapping[str, str]) -> None:
        """All steps, or an error after undoing them. `names` is what recovery will find the subject by.

        Not to be cancelled halfway: call it in a task of its own and shield that. Raises what the step raised.
        """
        key = self._key(operation, names)
        self._active[key] = frozenset(names.values())
        beginning = BEGINS.set(not (operation.finish or operation.ends))
        try:
            with self._watch.operation(operation.name, names):
                await self._run(key, operation, subject, names)
        finally:
            BEGINS.reset(beginning)
            del self._active[key]

    async def _run(self, key: str, operation: Operation[S], subject: S, names: Mapping[str, str]) -> None:
        self._intents.put(key, Intent(operation=operation.name, subject=dict(names)))
        done = 0
        try:
            for step in operation.steps:
                done += 1
                with self._watch.step(operation.name, step.name):
                    await failpoint(operation.name, step.name, "before")
                    await step.action(subject)
                    await failpoint(operation.name, step.name, "after")
        except BaseException as error:
            BEGINS.set(False)  # undoing ends things
            if isinstance(error, TareError) and error.step is None:
                error.step = operation.steps[done - 1].name
            if operation.finish:
                self._unfinished[identity(operation, names)] = key
            else:
                await self._undo(key, operation, subject, names, done)
            raise
        self._intents.delete(key)

    def _key(self, operation: Operation[S], names: Mapping[str, str]) -> str:
        """A new intent's key; the old one's where the same thing was begun before and could not be finished."""
        known = self._unfinished.pop(identity(operation, names), None)
        if known is None:
            known = f"{self._next:016d}"
            self._next += 1
        return known

    async def _undo(
        self, key: str, operation: Operation[S], subject: S, names: Mapping[str, str], count: int
    ) -> tuple[str, ...]:
        failures = []
        for step in reversed(operation.steps[:count]):
            if step.undo is None:
                continue
            try:
                with self._watch.step(operation.name, f"undo {step.name}"):
                    await step.undo(subject)
            except Exception as error:  # noqa: BLE001 - one undo that fails must not keep the others from running
                log.warning("undo %s.%s for %s: %s", operation.name, step.name, dict(names), describe(error))
                failures.append(f"{step.name}: {describe(error)}")
        if failures:
            self._intents.put(key, Intent(operation=operation.name, subject=dict(names), failures=tuple(failures)))
        else:
            self._intents.delete(key)
        return tuple(failures)

    def pending(self, only: str | None = None) -> list[Intent]:
        """Operations that are under way, or could not be undone; of one key alone, if it is given."""
        return [intent for key, intent in self._intents.items() if only in (None, key)]

    def failed(self) -> dict[str, Intent]:
        """By key, the operations that could not be undone or finished, on whose subjects nobody is at work now."""
        busy = self.busy()
        return {
            key: intent
            for key, intent in self._intents.items()
            if intent.failures and key not in busy and busy.isdisjoint(intent.subject.values())
        }

    def busy(self) -> set[str]:
        """Keys of the intents of operations that run now, and the names of what they are at work on."""
        return {*self._active, *frozenset[str]().union(*self._active.values())}

    async def recover(
        self, operation: Operation[S], restore: Callable[[Mapping[str, str]], S], only: str | None = None
    ) -> int:
        """Undo (or finish) every intent of this operation that an earlier process left; returns how many there were.

        Of one that is served already, `only` the intent of this key, if nobody is at it.
        """
        intents = [
            (key, intent)
            for key, intent in self._intents.items()
            if intent.operation == operation.name and (only is None or key == only) and key not in self._active
        ]
        for key, intent in intents:
            subject = restore(intent.subject)
            if not operation.finish:
                await self._undo(key, operation, subject, intent.subject, len(operation.steps))
                continue
            try:
                for step in operation.steps:
                    await step.action(subject)
            except Exception as error:  # noqa: BLE001 - it stays written down and is tried again at the next start
                log.warning("finish %s for %s: %s", operation.name, intent.subject, describe(error))
                failed = Intent(operation=operation.name, subject=intent.subject, failures=(describe(error),))
                self._intents.put(key, failed)
                self._unfinished[identity(operation, intent.subject)] = key
            else:
                self._intents.delete(key)
        return len(intents)


def identity(operation: Operation[S], names: Mapping[str, str]) -> tuple[str, ...]:
    """Two runs with the same identity do the same thing to the same subject."""
    return (operation.name, *(word for pair in sorted(names.items()) for word in pair))
