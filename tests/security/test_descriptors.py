"""What a process in a container has been handed: three streams, and no other descriptor, environment or working directory of anybody's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.handlers.hooks import POINTS
from tests.support.launch import Launch, bind, in_launch, line, namespaces, until

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
LOOK = ["sh", "-c", "exec ls -l /proc/self/fd"]
ENTRY = re.compile(r":\d\d (\d+)(?: -> (.*))?$", re.MULTILINE)


@pytest.fixture
def careless(tmp_path: Path) -> Iterator[None]:
    """A daemon that has descriptors open which every child inherits: of the node's root, of a secret, of a socket."""
    (tmp_path / "secret").write_text("word")
    held = [os.open("/", os.O_RDONLY | os.O_DIRECTORY), os.open(tmp_path / "secret", os.O_RDONLY), *os.pipe()]
    for fd in held:
        os.set_inheritable(fd, True)
    os.environ["TARE_SECRET"] = "word"
    try:
        yield
    finally:
        del os.environ["TARE_SECRET"]
        for fd in held:
            os.close(fd)


def assert_streams_alone(listing: str) -> None:
    """Three streams, which are FIFOs of its own or /dev/null, and the directory that is being listed."""
    found = {int(number): target for number, target in ENTRY.findall(listing)}
    assert list(found) == [0, 1, 2, 3] and re.fullmatch(r"(/proc/\d+/fd)?", found[3]), listing
    streams = [target for number, target in found.items() if number < 3]
    assert all(re.fullmatch(r"/dev/null|pipe:.*|.*/containers/c\d+/std(in|out|err)", target) for target in streams), (
        found
    )


@pytest.mark.parametrize(
    "changes", [{}, {"stdin": True}, {"user": {"uid": 1000, "gid": 1000}}, {"noNewPrivileges": False}], ids=str
)
def test_start_and_exec_hand_on_three_streams(tmp_path: Path, careless: None, changes: dict[str, Any]) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts", "pid")
        joined = namespaces(network=pod.pins["net"], ipc=pod.pins["ipc"], uts=pod.pins["uts"], pid=pod.pins["pid"])
        for kinds in (namespaces(), joined):
            result = await launch.run(LOOK, linux={"namespaces": kinds}, **changes)
            assert_streams_alone(result.out)
            box = await launch.start(SLEEP, linux={"namespaces": kinds}, **changes)
            own = {key: value for key, value in changes.items() if key != "stdin"}
            assert_streams_alone((await launch.exec(box, LOOK, **own)).out)

    in_launch(tmp_path, body)


def test_a_terminal_is_the_only_thing_that_is_handed_on(tmp_path: Path, careless: None) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, terminal=True)
        fds = sorted(Path(f"/proc/{box.process.pid}/fd").iterdir())
        assert [fd.name for fd in fds] == ["0", "1", "2"]
        assert {str(fd.readlink()) for fd in fds} == {"/dev/pts/0"}

    in_launch(tmp_path, body)


def test_nothing_but_the_configured_environment(tmp_path: Path, careless: None) -> None:
    """Neither the daemon's nor the keeper's; and no directory of the node's to start from."""

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        made = await launch.begin_exec(box, SLEEP, launch.descriptors[0])
        await until(lambda: Path(f"/proc/{made.pid}/comm").read_text() == "sleep\n", "its execve")
        for pid in (box.process.pid, made.pid):
            entry = Path(f"/proc/{pid}")
            assert (entry / "environ").read_bytes() == b"PATH=/bin\0COLOUR=blue\0"
            assert (entry / "cwd").samefile(entry / "root")
        empty = await launch.start(["/bin/sleep", "1000"], env=[])
        assert Path(f"/proc/{empty.process.pid}/environ").read_bytes() == b""

    in_launch(tmp_path, body)


def test_a_pods_own_process_and_its_namespaces_hold_nothing(tmp_path: Path, careless: None) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts", "pid")
        assert pod.pause is not None
        entry = Path(f"/proc/{pod.pause.pid}")
        await until(lambda: "Seccomp:\t2" in (entry / "status").read_text(), "its filter")
        assert os.listdir(entry / "fd") == []
        assert b"word" not in (entry / "environ").read_bytes()

    in_launch(tmp_path, body)


def test_what_is_open_in_one_container_is_not_in_the_next(tmp_path: Path) -> None:
    """Each is a fork of the launcher, which holds sockets, pidfds and terminals of all of them."""

    async def body(launch: Launch) -> None:
        for _ in range(3):
            await launch.start(SLEEP, terminal=True)
            box = await launch.start(["sh", "-c", "echo up; exec sleep 1000"], stdin=True)
            assert await line(box) == "up"
            await launch.begin_exec(box, SLEEP, launch.descriptors[0])
        assert_streams_alone((await launch.run(LOOK)).out)
        assert_streams_alone((await launch.exec(box, LOOK)).out)

    in_launch(tmp_path, body)


def test_hooks_hold_three_streams_wherever_they_run(tmp_path: Path, careless: None) -> None:
    """In the node's namespaces and in the container's, where the program may be the image's."""
    notes = tmp_path / "notes"
    notes.mkdir()
    hooks = {}
    for point in POINTS:
        place = "/notes" if point == "startContainer" else notes
        text = f"ls -l /proc/self/fd > {place}/{point}; cat /proc/self/environ > {place}/{point}.environ"
        hooks[point] = [{"path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/bin"]}]

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, mounts=[bind("/notes", notes)], hooks=hooks)
        await launch.kill(box)
        await launch.handler.hooked.release(box.id)

    in_launch(tmp_path, body)
    for point in POINTS:
        found = {int(number): target for number, target in ENTRY.findall((notes / point).read_text())}
        assert list(found) == [0, 1, 2, 3], (point, found)
        assert found[0].startswith("/memfd:tare-std" if point.startswith("post") else "/memfd:tare-state"), (
            point,
            found,
        )
        assert found[1].endswith(f"notes/{point}") and found[2].startswith("pipe:"), (point, found)
        variables = (notes / f"{point}.environ").read_bytes().split(b"\0")
        assert {entry.partition(b"=")[0] for entry in variables if entry} <= {b"PATH", b"PWD", b"OLDPWD", b"SHLVL"}, (
            point
        )
