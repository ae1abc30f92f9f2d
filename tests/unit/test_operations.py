"""Operations: done, or undone in reverse past failures; what a crash leaves is undone or finished; failpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tare.errors import InternalError, InvalidArgument
from tare.state import failpoints
from tare.state.database import Database
from tare.state.operations import Intent, Operation, Operations, Step

NAMES = {"thing": "t"}


@dataclass
class Subject:
    """What was done and undone, and which effects fail."""

    seen: list[str] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)

    def effect(self, name: str) -> None:
        self.seen.append(name)
        if name in self.failing:
            raise InvalidArgument(f"{name} failed")


def step(name: str, undone: bool = True) -> Step[Subject]:
    def work(prefix: str) -> Callable[[Subject], Awaitable[None]]:
        async def effect(subject: Subject) -> None:
            subject.effect(prefix + name)

        return effect

    return Step(name, work(""), work("-") if undone else None)


MAKE = Operation("Make", (step("a"), step("b", undone=False), step("c"), step("d")))
TAKE = Operation("Take", (step("x"), step("y")), finish=True)


class Disk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[Database] = []

    def operations(self) -> Operations:
        """As a new daemon has them."""
        self.open.append(Database(self.path))
        return Operations(self.open[-1])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "boot.db")
    yield disk
    for database in disk.open:
        database.close()


def run(operations: Operations, operation: Operation[Subject], subject: Subject) -> None:
    asyncio.run(operations.run(operation, subject, NAMES))


def recover(operations: Operations, operation: Operation[Subject], subject: Subject) -> int:
    def restore(names: Mapping[str, str]) -> Subject:
        assert names == NAMES
        return subject

    return asyncio.run(operations.recover(operation, restore))


def test_all_steps_in_order_and_no_intent_left(disk: Disk) -> None:
    operations, subject = disk.operations(), Subject()
    run(operations, MAKE, subject)
    assert subject.seen == ["a", "b", "c", "d"]
    assert operations.pending() == []


def test_a_failure_undoes_in_reverse_the_failed_step_too(disk: Disk) -> None:
    operations, subject = disk.operations(), Subject(failing={"c"})
    with pytest.raises(InvalidArgument, match="c failed: at step c"):
        run(operations, MAKE, subject)
    assert subject.seen == ["a", "b", "c", "-c", "-a"]
    assert operations.pending() == []


def test_undo_goes_on_past_failures_and_remembers_them(disk: Disk) -> None:
    operations, subject = disk.operations(), Subject(failing={"d", "-c"})
    with pytest.raises(InvalidArgument):
        run(operations, MAKE, subject)
    assert subject.seen[-3:] == ["-d", "-c", "-a"]
    assert operations.pending() == [Intent(operation="Make", subject=NAMES, failures=("c: -c failed",))]
    again = Subject()
    assert recover(disk.operations(), MAKE, again) == 1
    assert again.seen == ["-d", "-c", "-a"]
    assert disk.operations().pending() == []


def test_after_a_crash_everything_is_undone(disk: Disk) -> None:
    dead = disk.operations()
    dead._intents.put("1", Intent(operation="Make", subject=NAMES))
    fresh, subject = disk.operations(), Subject()
    assert recover(fresh, TAKE, Subject()) == 0
    assert recover(fresh, MAKE, subject) == 1
    assert subject.seen == ["-d", "-c", "-a"]
    assert fresh.pending() == []
    assert recover(fresh, MAKE, subject) == 0


def test_after_a_crash_what_goes_forward_is_finished(disk: Disk) -> None:
    disk.operations()._intents.put("1", Intent(operation="Take", subject=NAMES))
    fresh, subject = disk.operations(), Subject(failing={"y"})
    assert recover(fresh, TAKE, subject) == 1
    assert fresh.pending()[0].failures == ("y failed",)
    subject.failing.clear()
    assert recover(fresh, TAKE, subject) == 1
    assert subject.seen == ["x", "y", "x", "y"]
    assert fresh.pending() == []


def test_what_could_not_be_finished_is_written_down_once_however_often_it_is_tried(disk: Disk) -> None:
    operations, subject = disk.operations(), Subject(failing={"y"})
    for _ in range(3):
        with pytest.raises(InvalidArgument):
            run(operations, TAKE, subject)
        assert len(operations.pending()) == 1
    subject.failing.clear()
    run(operations, TAKE, subject)
    assert operations.pending() == []


def test_intents_of_an_earlier_daemon_are_not_overwritten(disk: Disk) -> None:
    disk.operations()._intents.put("0000000000000007", Intent(operation="Take", subject={"thing": "other"}))
    operations = disk.operations()
    with pytest.raises(InvalidArgument):
        run(operations, TAKE, Subject(failing={"x"}))
    assert [intent.subject["thing"] for intent in operations.pending()] == ["other", "t"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failpoint_fails_a_step_once(disk: Disk, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(failpoints, "_rules", failpoints.parse(f"Make.c.{when}=error"))
    operations, subject = disk.operations(), Subject()
    with pytest.raises(InternalError, match=f"failpoint Make.c.{when}: at step c"):
        run(operations, MAKE, subject)
    assert subject.seen == ["a", "b", *(["c"] if when == "after" else []), "-c", "-a"]
    run(operations, MAKE, Subject())


def test_a_failpoint_can_have_a_meaning_of_its_own(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_rules", failpoints.parse("Make.a.before=note, Take.x.after=note"))
    subject = Subject()

    async def note() -> None:
        subject.seen.append("noted")

    failpoints.on("note", note)
    operations = disk.operations()
    run(operations, MAKE, subject)
    run(operations, TAKE, subject)
    assert subject.seen == ["noted", "a", "b", "c", "d", "x", "noted", "y"]


@pytest.mark.parametrize("text", ["Make.a.before", "Make.a=kill", "Make.a.before="])
def test_a_rule_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"OPERATION\.STEP\.WHEN=ACTION"):
        failpoints.parse(text)


def test_what_failed_is_told_but_not_while_somebody_is_at_work_on_it(disk: Disk) -> None:
    """So that it can be tried again: undone at the second time, it is told no more."""
    operations = disk.operations()
    broken = Subject(failing={"c", "-a"})
    with pytest.raises(InvalidArgument):
        run(operations, MAKE, broken)
    (key,) = operations.failed()
    seen: list[dict[str, Intent]] = []

    class Looks(Subject):
        def effect(self, name: str) -> None:
            seen.append(operations.failed())

    run(operations, MAKE, Looks())
    assert seen == [{}] * 4
    assert list(operations.failed()) == [key]
    assert recover(operations, MAKE, Subject()) == 1
    assert operations.failed() == {}
