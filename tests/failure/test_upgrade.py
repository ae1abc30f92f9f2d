"""Keeper and launcher make way for another version of their code, in place; one that does not work leaves the old one running."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition
from tare.handlers import renewal
from tare.handlers.builtin import Process
from tare.launch import wire
from tests.support import versions
from tests.support.launch import NO_CGROUP, Box, Launch, in_launch, readable, second_daemon, until

pytestmark = pytest.mark.root

WAITS = ["sh", "-c", "read code; exit $code"]  # ends with the code that it is told
TALKS = ["sh", "-c", "while read word; do echo got $word; done"]
Use = Callable[[Path], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    monkeypatch.setattr(renewal, "KEEPER_RETRY", 0.05)
    return versions.use(monkeypatch)


@dataclass(frozen=True)
class Ours:
    """What must stay the same: PIDs and parents; and what must not: the version that greets."""

    keeper: int
    launcher: int
    parent: int


def ours(launch: Launch) -> Ours:
    keeper = int((launch.run_directory / "launcher.pid").read_text().split()[0])
    return Ours(keeper=parent_of(keeper), launcher=keeper, parent=parent_of(parent_of(keeper)))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def executes(pid: int) -> int:
    """The inode of what a process runs on: of a memfd of its own for each start and each renewal."""
    return os.stat(f"/proc/{pid}/exe").st_ino


async def said_versions(launch: Launch) -> list[int]:
    return [(await renewal.greet(channel)).version for channel in (launch.handler._keeper, launch.handler._launcher)]


async def keep(launch: Launch, key: bytes, fd: int) -> None:
    """Have the keeper keep a descriptor, as a logger does."""
    await launch.handler._keeper.request(wire.STORE, (key,), (fd,), doing="keep", timeout=10)


async def answers(box: Box, terminal: int, word: str) -> None:
    """What a container with a terminal says to a word."""
    os.write(terminal, f"{word}\n".encode())
    text = ""
    while f"got {word}" not in text:
        await readable(terminal)
        text += os.read(terminal, 4096).decode()


def tell(box: Box, word: object) -> None:
    os.write(box.streams["stdin"], f"{word}\n".encode())


async def terminal_box(launch: Launch) -> Box:
    box = await launch.start(TALKS, terminal=True)
    await keep(launch, b"tty/" + box.id.encode(), box.terminal)
    launch.descriptors.remove(box.terminal)
    os.close(box.terminal)  # the keeper alone has it now
    return box


def test_up_and_down_by_one_version(tmp_path: Path, use: Use) -> None:
    old, new = versions.copy(tmp_path / "old"), versions.bumped(tmp_path / "new", 3)
    use(old)

    async def body(launch: Launch) -> None:
        box, talks = [await launch.start(WAITS, stdin=True) for _ in range(5)], await terminal_box(launch)
        pod = await launch.pod("pid", "net")
        out, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        waits = await launch.begin_exec(box[4], ["sh", "-c", "echo begun; sleep 1000"], theirs)
        await readable(out)
        limit = (await launch.run(["sh", "-c", "ulimit -n; ulimit -Hn"])).out
        before, ran_on = ours(launch), executes(ours(launch).keeper)
        for code, (tree, version) in enumerate([(new, 3), (old, 2), (new, 3)], 41):
            use(tree)
            waiting = asyncio.ensure_future(launch.wait(box[code - 41].process))
            await asyncio.sleep(0)
            await launch.handler.connect()
            assert launch.handler.outdated == ""
            assert await said_versions(launch) == [version, version]
            assert ours(launch) == before and executes(before.keeper) != ran_on
            assert launch.pid_of("keeper3" if version == 3 else "keeper") == before.keeper
            ran_on = executes(before.keeper)
            assert executes(before.launcher) != executes(os.getpid())
            tell(box[code - 41], code)
            assert (await waiting).code == code
            assert (await launch.exec(box[3], ["echo", "in"])).out == "in\n"
            master = await launch.handler.terminal(talks.id)
            assert master is not None
            await answers(talks, master, f"word{code}")
            os.close(master)
            assert (await launch.run(["sh", "-c", "ulimit -n; ulimit -Hn"])).out == limit
            assert (await launch.run(["sh", "-c", "exit 6"])).code == 6
        launch.handler.signal(waits, signal.SIGTERM)
        assert (await launch.wait(waits)).signal == signal.SIGTERM
        os.close(out)
        os.close(theirs)
        await launch.remove_pod(pod)
        await launch.kill(talks)
        for last in box[3:]:
            tell(last, 9)
            assert (await launch.wait(last.process)).code == 9

    in_launch(tmp_path, body)


def test_who_ended_meanwhile_is_reaped_with_the_true_code(tmp_path: Path, use: Use) -> None:
    """Children end while keeper and launcher are between two versions: nobody else can reap them, and no signal tells of them twice."""
    slow = "import os, time\nif 'take' in __import__('sys').argv: open(__import__('sys').argv[1] + '/between', 'w'); time.sleep(0.5)\n"
    use(versions.copy(tmp_path / "old"))
    new = versions.bumped(tmp_path / "new", 3)
    main = new / "tare" / "launch" / "succession.py"
    main.write_text(main.read_text().replace("import os\n", slow, 1))

    async def body(launch: Launch) -> None:
        orphans = [await launch.start(WAITS, stdin=True) for _ in range(2)]
        old = launch.pid_of("launcher")
        await launch.kill_ours("launcher")  # these are the keeper's from now on
        await until(lambda: launch.pid_of("launcher") not in (0, old), "another launcher")
        children = [await launch.start(WAITS, stdin=True) for _ in range(2)]
        use(new)
        renewed = asyncio.ensure_future(launch.handler.connect())
        flag = launch.run_directory / "between"
        for ending in (orphans, children):  # the keeper comes first, then the launcher
            await until(flag.exists, "the moment between")
            flag.unlink()
            for code, box in enumerate(ending, 60):
                tell(box, code)
                await until(lambda box=box: state(box.process) in "ZX", "its end")  # type: ignore[misc]
        await renewed
        assert [(await launch.wait(box.process)).code for box in (*orphans, *children)] == [60, 61, 60, 61]
        assert not list((launch.run_directory / "tasks").iterdir())

    in_launch(tmp_path, body)


def state(process: Process) -> str:
    """As proc(5) has it; X for one that is gone."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


BROKEN = {
    "no module": (
        "keeper",
        "import fcntl",
        "import fcntl, not_there",
        "ModuleNotFoundError: No module named 'not_there'",
    ),
    "no Python": ("launcher", "class Launcher(Connections):", "class Launcher(Connections)", "SyntaxError"),
    "does not take up": ("keeper", 'state["store"]', 'state["shop"]', "KeyError: 'shop'"),
    "another form": ("succession", "FORM = 1", "FORM = 0", "has form 1; this version knows 0"),
    "ends without a word": ("mirror", "PREFIXES = (", "import os; os._exit(3)\nPREFIXES = (", "did not say why"),
    "does not end": ("mirror", "PREFIXES = (", "import time; time.sleep(1000)\nPREFIXES = (", "did not say why"),
}


def test_versions_that_do_not_work(tmp_path: Path, use: Use) -> None:
    """The old one goes on as if nothing had been asked, with the reason in the daemon's log and in launch.log."""
    use(versions.change(versions.copy(tmp_path / "old"), "succession", "PATIENCE = 30.0", "PATIENCE = 1.5"))

    async def body(launch: Launch) -> None:
        box, talks, before = await launch.start(WAITS, stdin=True), await terminal_box(launch), ours(launch)
        ran_on = executes(before.keeper), executes(before.launcher)
        for number, (module, there, instead, words) in enumerate(BROKEN.values()):
            tree = versions.change(versions.bumped(tmp_path / str(number), 3), module, there, instead)
            use(tree)
            await launch.handler.connect()
            assert words in launch.handler.outdated and "try the other version" in launch.handler.outdated
            assert await said_versions(launch) == [2, 2] and ours(launch) == before
            assert (executes(before.keeper), executes(before.launcher)) == ran_on
            assert (await launch.exec(box, ["echo", "in"])).out == "in\n"
            assert (await launch.run(["sh", "-c", "exit 6"])).code == 6
        assert "ModuleNotFoundError" in (launch.run_directory / "launch.log").read_text()
        use(versions.bumped(tmp_path / "works", 3))
        await launch.handler.connect()
        assert await said_versions(launch) == [3, 3] and ours(launch) == before
        master = await launch.handler.terminal(talks.id)
        assert master is not None
        await answers(talks, master, "still")
        os.close(master)
        await launch.kill(talks)
        tell(box, 7)
        assert (await launch.wait(box.process)).code == 7

    in_launch(tmp_path, body)


def test_a_launcher_that_does_not_work_under_a_keeper_that_does(tmp_path: Path, use: Use) -> None:
    use(versions.copy(tmp_path / "old"))

    async def body(launch: Launch) -> None:
        box, before = await launch.start(WAITS, stdin=True), ours(launch)
        use(
            versions.change(versions.bumped(tmp_path / "new", 3), "renewing", 'state["children"]', 'state["offspring"]')
        )
        await launch.handler.connect()
        assert "KeyError: 'offspring'" in launch.handler.outdated
        assert await said_versions(launch) == [3, 2] and ours(launch) == before
        assert (await launch.exec(box, ["echo", "in"])).out == "in\n"
        tell(box, 8)
        assert (await launch.wait(box.process)).code == 8

    in_launch(tmp_path, body)


def test_a_journal_that_the_next_loggers_would_not_understand(tmp_path: Path, use: Use) -> None:
    use(versions.copy(tmp_path / "old"))

    async def body(launch: Launch) -> None:
        await launch.handler.start_logger("group")
        journal = launch.run_directory / "loggers" / "group" / "journal"
        await until(lambda: journal.exists() and journal.stat().st_size > 0, "the journal")
        use(versions.change(versions.bumped(tmp_path / "new", 3), "journal", "\nVERSION = 1\n", "\nVERSION = 9\n"))
        await launch.handler.connect()
        assert "journal of version 1, not 9" in launch.handler.outdated
        assert await said_versions(launch) == [3, 2]

    in_launch(tmp_path, body)


def test_a_launcher_waits_until_no_child_is_on_its_way(tmp_path: Path, use: Use) -> None:
    """One that waits at its gate for a daemon that lives is in the way; one whose daemon has gone ends, and is not."""
    use(versions.change(versions.copy(tmp_path / "old"), "renewing", "QUIET_PATIENCE = 10.0", "QUIET_PATIENCE = 0.3"))

    async def body(launch: Launch) -> None:
        identity, overlay, _ = launch.place()
        made = await launch.handler.create(identity, launch.spec(["true"]), overlay=overlay, cgroup=NO_CGROUP)
        use(versions.bumped(tmp_path / "new", 3))
        async with second_daemon(launch) as handler:
            assert f"do not come to an end: {made.pid}" in handler.outdated
        launch.handler.close()
        async with second_daemon(launch) as handler:
            assert handler.outdated == ""
        assert not Path(f"/proc/{made.pid}").exists()
        await launch.handler.connect()
        launch.handler.forget(made)

    in_launch(tmp_path, body)


def test_one_that_speaks_another_language_is_not_used(
    tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be renewed either: the daemon says what there is to do. Where it can, the language does not matter."""
    use(versions.copy(tmp_path / "old"))

    async def body(launch: Launch) -> None:
        monkeypatch.setattr(wire, "OLDEST", 3)
        broken = versions.change(versions.bumped(tmp_path / "broken", 3), "keeper", "import fcntl", "import no_fcntl")
        use(broken)
        with pytest.raises(FailedPrecondition, match=r"no_fcntl.*stop all pods with the version that made them"):
            await launch.handler.connect()
        use(versions.bumped(tmp_path / "new", 3))
        await launch.handler.connect()
        assert launch.handler.outdated == ""

    in_launch(tmp_path, body)


# Killed in the middle

OLD = {"succession": ("become",), "keeper": ("tried",), "renewing": ("tried", "when_quiet")}
NEW = {
    "succession": ("main", "take_up", "answer"),
    "keeper": ("resume", "begin"),
    "renewing": ("resume", "go_on", "end"),
    "loggers": ("renew",),
}


def places(tree: Path, functions: dict[str, tuple[str, ...]]) -> list[tuple[str, str, int]]:
    """Of each function the first statement, one in the middle and the last: (module, function, number of the statement)."""
    found = []
    for module, names in functions.items():
        for name in names:
            count = versions.points(tree, module, name)
            found += [(module, name, number) for number in sorted({0, count // 2, count - 1})]
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_while_taking_over(tmp_path: Path, use: Use) -> None:
    """The version that comes, after its trial has gone well. Containers do not notice."""
    old = versions.copy(tmp_path / "old")
    use(old)

    async def body(launch: Launch) -> None:
        boxes, killed = [await launch.start(WAITS, stdin=True) for _ in range(3)], 0
        await launch.handler.start_logger("group")
        for number, place in enumerate(places(old, NEW)):
            tree = versions.copy(tmp_path / f"n{number}")
            # A launcher that a renewed keeper forks has that one's arguments.
            condition = "self.renewed" if place[1] == "end" else "'take' in __import__('sys').argv"
            use(versions.killed_at(tree, *place, condition=condition))
            killed += await renewed_over_a_death(launch)
            shutil.rmtree(tree)
            await another(launch, boxes, number)
        assert killed >= number / 2  # some are ways out that were not taken
        assert (await launch.exec(boxes[0], ["echo", "in"])).out == "in\n"
        await end(launch, boxes)

    in_launch(tmp_path, body)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_while_making_way(tmp_path: Path, use: Use) -> None:
    """The same of the version that goes."""
    new = versions.bumped(tmp_path / "new", 3)
    use(new)

    async def body(launch: Launch) -> None:
        boxes, killed = [await launch.start(WAITS, stdin=True) for _ in range(3)], 0
        for number, place in enumerate(places(new, OLD)):
            tree = versions.copy(tmp_path / f"o{number}")
            condition = "mode == TAKE" if place[0] == "succession" else "True"
            use(versions.killed_at(tree, *place, condition=condition))
            await renewed_over_a_death(launch)
            use(new)
            killed += await renewed_over_a_death(launch)
            assert await said_versions(launch) == [3, 3]
            await another(launch, boxes, number)
        assert killed >= number / 3  # the rest is of failures
        await end(launch, boxes)

    in_launch(tmp_path, body)


async def another(launch: Launch, boxes: list[Box], code: int) -> None:
    """One more container, and the end of the oldest."""
    boxes.append(await launch.start(WAITS, stdin=True))
    tell(boxes[0], code)
    assert (await launch.wait(boxes.pop(0).process)).code == code


async def renewed_over_a_death(launch: Launch) -> bool:
    """Renew; whether keeper or launcher ended meanwhile. Everything answers afterwards."""
    before = ours(launch)
    await launch.handler.connect()
    assert launch.handler.outdated == ""
    await until(lambda: launch.pid_of("launcher") > 0, "a launcher")
    await launch.handler.connect()
    return ours(launch) != before


async def end(launch: Launch, boxes: list[Box]) -> None:
    for code, box in enumerate(boxes, 100):
        tell(box, code)
        assert (await launch.wait(box.process)).code == code
    assert not list((launch.run_directory / "tasks").iterdir())
