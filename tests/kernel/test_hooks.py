"""Hooks at all six points: when and where each runs, what it is told, what it may do, and what its failure comes to."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tare.errors import DeadlineExceeded
from tare.handlers import starting
from tare.handlers.builtin import Process, StartFailed
from tare.handlers.compile import Filter
from tare.handlers.hooks import POINTS
from tests.support import leaks
from tests.support.launch import FIRST_ID, IDS, Box, Launch, in_launch, namespaces, status, until, user_namespace
from tests.support.mounts import mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
ALLOW_ALL = Filter(program=b"\x06\x00\x00\x00\x00\x00\xff\x7f")
KINDS = ("mnt", "net", "pid", "uts")
Json = dict[str, Any]


def script(text: str, **more: Any) -> Json:
    """A hook that a shell runs."""
    return {"path": "/bin/sh", "args": ["sh", "-c", text], **more}


def witness(directory: Path, point: str) -> Json:
    """A hook that leaves behind when, where and as what it ran, and what it was told."""
    here = f"{directory}/{point}"
    text = f"cat > {here}.state; echo {point} >> {directory}/order; pwd > {here}.cwd; cat /proc/self/status > {here}.status; "
    text += "".join(f"readlink /proc/self/ns/{kind} >> {here}.namespaces; " for kind in KINDS)
    return script(text, env=["PATH=/usr/bin:/bin"])


def told(directory: Path, point: str) -> Json:
    """The state that it was told."""
    found: Json = json.loads((directory / f"{point}.state").read_text())
    return found


def namespaces_of(pid: int | str) -> list[str]:
    """What /proc says of a process's namespaces."""
    return [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS]


async def release(launch: Launch, box: Box) -> None:
    """What the daemon does when nothing is left of a container's run."""
    await launch.kill(box)
    await launch.handler.hooked.release(box.id)


def test_each_at_its_point(tmp_path: Path) -> None:
    """In the order of the specification, with the state that holds then, in the namespaces that it says."""
    notes = tmp_path / "notes"
    notes.mkdir()
    mount = {"destination": "/notes", "type": "bind", "source": str(notes), "options": ["rbind"]}
    hooks = {point: [witness(notes, point)] for point in POINTS if point != "startContainer"}
    hooks["startContainer"] = [witness(Path("/notes"), "startContainer")]
    started: list[int] = []

    async def body(launch: Launch) -> None:
        box = await launch.start(
            SLEEP,
            mounts=[mount],
            hooks=hooks,
            annotations={"com.example.key": 'a "quoted" value', "pid": '"pid":2147483646'},
            on_created=lambda process: started.append(process.pid),
        )
        order = (notes / "order").read_text().split()
        assert order == ["prestart", "createRuntime", "createContainer", "startContainer", "poststart"]
        bundle = launch.run_directory / "hooked" / box.id
        expected = {
            "ociVersion": "1.2.0",
            "id": box.id,
            "bundle": str(bundle),
            "annotations": {"com.example.key": 'a "quoted" value', "pid": '"pid":2147483646'},
        }
        node, inside = box.process.pid, 1
        for point, state, pid in (
            ("prestart", "creating", node),
            ("createRuntime", "creating", node),
            ("createContainer", "creating", inside),
            ("startContainer", "created", inside),
            ("poststart", "running", node),
        ):
            assert told(notes, point) == expected | {"status": state, "pid": pid}, point
        container, ours = namespaces_of(box.process.pid), namespaces_of("self")
        for point in POINTS[:-1]:
            where = container if point.endswith("Container") else ours
            assert (notes / f"{point}.namespaces").read_text().split() == where, point
        assert (notes / "prestart.cwd").read_text().strip() == str(bundle)
        assert (notes / "createContainer.cwd").read_text().strip() == str(launch.run_directory / "rootfs")
        configuration = json.loads((bundle / "config.json").read_text())
        assert configuration["root"]["path"] == str(launch.run_directory / "rootfs")
        assert configuration["process"]["args"] == SLEEP

        await release(launch, box)
        assert told(notes, "poststop") == expected | {"status": "stopped"}
        assert (notes / "poststop.namespaces").read_text().split() == ours
        assert not bundle.exists()
        await launch.handler.hooked.release(box.id)  # again: nothing happens
        assert (notes / "order").read_text().split() == [*order, "poststop"]

    in_launch(tmp_path, body)


def test_a_create_container_hook_sees_the_root_and_may_mount_there(tmp_path: Path) -> None:
    """What the hooks of devices do: a file of theirs into the root, before it is all that there is."""
    (tmp_path / "tool").write_text("mine")
    text = f"mount --bind {tmp_path}/tool $PWD/etc/tool && test -d /work/../etc && test -e $PWD/dev/null"

    async def body(launch: Launch) -> None:
        (launch.layer / "etc/tool").write_text("theirs")
        hooks = {"createContainer": [script(text, env=["PATH=/usr/bin:/bin:/usr/sbin:/sbin"])]}
        result = await launch.run(["cat", "/etc/tool"], hooks=hooks)
        assert result.out == "mine"
        await launch.handler.hooked.release("c1")

    in_launch(tmp_path, body)


def test_a_hook_in_the_container_is_no_more_than_its_process(tmp_path: Path) -> None:
    """Its program is the image's: with the launcher's privileges it would be an escape."""
    text = "cat /proc/self/status > /dev/shm/status; echo $COLOUR > /dev/shm/colour; ls /proc/self/fd > /dev/shm/fds; umask > /dev/shm/umask"
    shm = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777"]}
    user = {"uid": 1234, "gid": 4321, "additionalGids": [77]}
    caps = {kind: ["CAP_CHOWN", "CAP_KILL"] for kind in ("bounding", "permitted", "effective")}

    async def body(launch: Launch) -> None:
        for confined in (True, False):
            box = await launch.start(
                SLEEP,
                mounts=[shm],
                hooks={"startContainer": [script(text)]},
                user=user,
                capabilities=caps,
                noNewPrivileges=confined,
                rlimits=[{"type": "RLIMIT_NOFILE", "soft": 40, "hard": 50}],
            )
            root = Path(f"/proc/{box.process.pid}/root/dev/shm")
            facts = status((root / "status").read_text())
            main = status(Path(f"/proc/{box.process.pid}/status").read_text())
            alike = (
                "Uid",
                "Gid",
                "Groups",
                "CapInh",
                "CapPrm",
                "CapEff",
                "CapBnd",
                "CapAmb",
                "NoNewPrivs",
                "Seccomp",
                "SigIgn",
                "SigBlk",
            )
            assert {key: facts[key] for key in alike} == {key: main[key] for key in alike}
            assert facts["Uid"].split() == ["1234"] * 4 and facts["Seccomp"] == "2" and facts["CapBnd"].endswith("21")
            assert (
                root / "colour"
            ).read_text() == "blue\n"  # the container's environment, since it has none of its own
            assert (root / "fds").read_text().split() == ["0", "1", "2", "3"]  # the last is the listing's own
            assert (root / "umask").read_text() == "0022\n"
            await release(launch, box)

    in_launch(tmp_path, body, filter=ALLOW_ALL)


FAILURES = [
    (script("echo no such device >&2; exit 3"), "ended with status 3: no such device"),
    (script("echo out; kill -9 $$"), "was killed by signal 9: out"),
    ({"path": "/no/such/hook"}, "ended with status 127: cannot be run: No such file or directory"),
    ({"path": "/etc"}, "ended with status 127: cannot be run: Permission denied"),
    (script("echo waiting; sleep 1000", timeout=1), "took longer than 1 s, and was killed: waiting"),
]


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer", "startContainer"])
def test_one_that_fails_before_the_program_runs(point: str, tmp_path: Path) -> None:
    """The start fails with its words, hooks after it do not run, nothing stays, and the poststop hooks are run."""
    marker, after = tmp_path / "never", tmp_path / "after"

    async def body(launch: Launch) -> None:
        for hook, words in FAILURES:
            hooks = {
                point: [script("true"), hook, script(f"touch {marker}")],
                "startContainer" if point != "startContainer" else "poststart": [script(f"touch {marker}")],
                "poststop": [script(f"echo gone >> {after}")],
            }
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP, hooks=hooks)
            assert caught.value.step == f"{point} hook {hook['path']}" and words in str(caught.value), str(caught.value)
            await gone(launch)
            await launch.handler.hooked.release(f"c{launch.boxes}")
        assert not marker.exists() and after.read_text() == "gone\n" * len(FAILURES)
        assert launch.handler.hooked.kept() == []

    in_launch(tmp_path, body)


async def gone(launch: Launch) -> None:
    """Wait until nothing of a start is left."""
    launcher = launch.pid_of("launcher")
    ours = ("tare-outside", "sh", "sleep")
    await until(lambda: not any(process.parent == launcher for process in leaks.processes()), "the end of the child")
    await until(
        lambda: not any(p.name in ours and str(launch.base) in p.command for p in leaks.processes()), "its helper's end"
    )
    await until(lambda: not launch.handler._errands, "the end of the errand")
    assert not list((launch.run_directory / "tasks").iterdir()) and mounts_below(launch.run_directory) == []


def test_a_poststart_hook_that_fails_stops_the_container(tmp_path: Path) -> None:
    pids: list[int] = []

    async def body(launch: Launch) -> None:
        hooks = {"poststart": [script("echo bad >&2; exit 5")]}
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, hooks=hooks, on_created=lambda process: pids.append(process.pid))
        assert caught.value.step == "poststart hook /bin/sh" and "ended with 5: bad" in str(caught.value)
        await gone(launch)
        assert not Path(f"/proc/{pids[0]}").exists()
        hooks = {"poststart": [script("sleep 1004", timeout=1)]}
        with pytest.raises(StartFailed, match="did not end within 1 s"):
            await launch.start(SLEEP, hooks=hooks)
        await gone(launch)
        assert not any("sleep 1004" in process.command for process in leaks.processes())
        for name in ("c1", "c2"):
            await launch.handler.hooked.release(name)

    in_launch(tmp_path, body)


def test_a_poststop_hook_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(launch: Launch) -> None:
        hooks = {"poststop": [script("exit 6"), {"path": "/no/such/hook"}, script(f"touch {tmp_path}/last")]}
        box = await launch.start(SLEEP, hooks=hooks)
        with caplog.at_level(logging.WARNING):
            await release(launch, box)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 and "it ended with 6" in said[0] and "No such file or directory" in said[1], said
        assert (tmp_path / "last").exists()

    in_launch(tmp_path, body)


def test_a_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    """Also what ignores the end of its shell, and holds the pipe open."""
    text = f"sleep 1001 & echo $! > {tmp_path}/child; wait"

    async def body(launch: Launch) -> None:
        for point in ("createRuntime", "createContainer"):
            began = time.monotonic()
            with pytest.raises(StartFailed, match="took longer than 1 s"):
                await launch.start(
                    SLEEP, hooks={point: [script(text, timeout=1)]}, linux={"namespaces": namespaces(pid=None)}
                )
            assert 1 <= time.monotonic() - began < 10
            child = int((tmp_path / "child").read_text())
            await until(lambda child=child: not alive(child), "the end of the hook's child")  # type: ignore[misc]
            await launch.handler.hooked.release(f"c{launch.boxes}")

    in_launch(tmp_path, body)


@pytest.mark.parametrize("point", ["prestart", "createContainer", "startContainer"])
def test_a_hook_has_the_time_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Also where that is more than a request to the launcher may take otherwise: then hooks without a time of their own are cut."""
    monkeypatch.setattr(starting, "SETUP_TIMEOUT", 1.0)

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, hooks={point: [script("sleep 2", timeout=15)]})
        await release(launch, box)
        with pytest.raises(DeadlineExceeded, match="has not answered for 1 s"):
            await launch.start(SLEEP, hooks={point: [script("sleep 2")]})
        await gone(launch)
        await launch.handler.hooked.release("c2")

    in_launch(tmp_path, body)


def alive(pid: int) -> bool:
    """Whether it runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_hook_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    """It holds the pipe of the hook's words open; a hook that says much is not stopped by that either, nor one that reads nothing."""
    text = f"head -c 300000 /dev/zero | tr '\\0' x; sleep 1002 & echo $! > {tmp_path}/child"

    async def body(launch: Launch) -> None:
        box = await launch.start(
            SLEEP, hooks={"createRuntime": [script(text)]}, annotations={"com.example.large": "x" * 200_000}
        )
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        await release(launch, box)

    in_launch(tmp_path, body)


def test_a_hook_ends_with_who_waits_for_it(tmp_path: Path) -> None:
    """A caller that gives up, in the middle of a hook that would go on for ever: no hook stays."""

    async def body(launch: Launch) -> None:
        for point in ("createRuntime", "createContainer", "startContainer"):
            place = tmp_path if point != "startContainer" else Path("/dev")
            text = f"echo $$ > {place}/{point}; exec sleep 1003"
            pids: list[int] = []
            start = asyncio.ensure_future(
                launch.start(SLEEP, hooks={point: [script(text)]}, on_created=lambda process: pids.append(process.pid))  # noqa: B023
            )
            inside = Path(f"/proc/{pids[0]}/root/dev") if pids else tmp_path
            if point == "startContainer":
                await until(lambda: bool(pids), "the container")  # noqa: B023
                inside = Path(f"/proc/{pids[0]}/root/dev")
            await until(lambda: (inside / point).exists() and (inside / point).read_text() != "", "the hook")  # noqa: B023
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
            await until(
                lambda: not any("sleep 1003" in process.command for process in leaks.processes()), "the hook's end"
            )
            await gone(launch)
            await launch.handler.hooked.release(f"c{launch.boxes}")

    in_launch(tmp_path, body)


def test_hooks_of_a_container_in_a_pods_pid_namespace(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid", "net")
        notes = tmp_path / "notes"
        notes.mkdir()
        hooks = {point: [witness(notes, point)] for point in ("createRuntime", "createContainer")}
        joined = namespaces(pid=pod.pins["pid"], network=pod.pins["net"])
        box = await launch.start(SLEEP, hooks=hooks, linux={"namespaces": joined})
        assert told(notes, "createRuntime")["pid"] == box.process.pid
        inner = status(Path(f"/proc/{box.process.pid}/status").read_text())["NSpid"].split()[-1]
        assert told(notes, "createContainer")["pid"] == int(inner) != 1
        await release(launch, box)

    in_launch(tmp_path, body)


def test_hooks_of_a_container_in_a_user_namespace(tmp_path: Path) -> None:
    """The node's run as the node's root; what runs in the container is root there, and nobody outside."""
    outer = tmp_path / "outer"
    inner = "cat > tmp/state; cat /proc/self/uid_map > tmp/map; stat -c %u tmp/state > tmp/owner"

    async def body(launch: Launch) -> None:
        hooks = {
            "createRuntime": [script(f"cat > {outer}; cat /proc/self/uid_map >> {outer}.map")],
            "createContainer": [script(inner, env=["PATH=/usr/bin:/bin"])],
            "startContainer": [script("cat /proc/self/uid_map > /tmp/last")],
        }
        box = await launch.start(SLEEP, hooks=hooks, linux=user_namespace())
        assert json.loads(outer.read_text())["pid"] == box.process.pid
        assert Path(f"{outer}.map").read_text().split() == ["0", "0", "4294967295"]
        root = Path(f"/proc/{box.process.pid}/root/tmp")
        assert json.loads((root / "state").read_text())["pid"] == 1
        assert (
            (root / "map").read_text().split() == (root / "last").read_text().split() == ["0", str(FIRST_ID), str(IDS)]
        )
        assert (root / "owner").read_text() == "0\n" and (root / "state").stat().st_uid == FIRST_ID
        await release(launch, box)

    in_launch(tmp_path, body)


def test_without_hooks_there_is_nothing_beside(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, hooks={"createRuntime": [], "poststop": None})
        assert launch.handler.hooked.kept() == []
        await release(launch, box)

    in_launch(tmp_path, body)


def test_hooks_of_a_container_that_is_placed_by_another(tmp_path: Path) -> None:
    """It waits at its barrier before all else, and for that its PID is known before any hook runs."""
    notes = tmp_path / "notes"
    notes.mkdir()
    placed: list[int] = []

    async def place(process: Process) -> None:
        assert list(notes.iterdir()) == []
        placed.append(process.pid)

    async def body(launch: Launch) -> None:
        hooks = {point: [witness(notes, point)] for point in ("createRuntime", "createContainer")}
        box = await launch.start(SLEEP, hooks=hooks, place=place)
        assert placed == [box.process.pid] == [told(notes, "createRuntime")["pid"]]
        await release(launch, box)

    in_launch(tmp_path, body)
