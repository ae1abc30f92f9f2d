"""Other runtimes' command lines under a real keeper and launcher, without a daemon: what the handler makes, and that all of it goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tare.cgroups.layout import detect
from tare.config import HandlerConfig
from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers.builtin import StartFailed
from tare.handlers.oci import OciHandler
from tare.handlers.oci_files import Bundle
from tare.handlers.processes import Process
from tare.handlers.volumes import joined
from tests.support.launch import Box, Launch, drain, in_launch, layer, readable, until
from tests.support.mounts import mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
# crun runs nothing where cgroup v2 has controllers beside v1.
PROGRAMS = [name for name in ("runc", "crun") if name != "crun" or detect().kind != "hybrid"]


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    """Each runtime's path."""
    found = shutil.which(str(request.param))
    assert found is not None
    return found


class Runtime:
    """A handler over a `Launch`."""

    def __init__(self, launch: Launch, program: str, *options: str) -> None:
        self.launch = launch
        self.handler = OciHandler(
            "other", HandlerConfig(path=program, options=options), launch.handler, launch.run_directory
        )
        self.made: list[str] = []

    async def start(
        self, args: list[str], *, place: Callable[[Process], Awaitable[None]] | None = None, **more: Any
    ) -> Box:
        """A container whose program runs."""
        launch = self.launch
        identity, overlay, ends = launch.place(stdin=bool(more.get("stdin")), lowers=more.pop("lowers", ()))
        self.made.append(identity)
        cgroup = launch.cgroup(identity)
        spec = launch.spec(args, **more)
        made = await self.handler.start(identity, spec, overlay=overlay, cgroup=cgroup, place=place)
        launch.processes[made] = None
        return Box(id=identity, process=made, upper=overlay.upper, cgroup=cgroup, streams=ends)

    def bundle(self, box: Box | str) -> Bundle:
        """A container's bundle."""
        return Bundle(self.launch.run_directory, box if isinstance(box, str) else box.id)

    async def release(self, box: Box) -> None:
        """Kill it, and take all of it away."""
        self.handler.signal(box.process, 9)
        await self.launch.wait(box.process)
        await self.handler.release(box.id)


def in_runtime(base: Path, program: str, body: Callable[[Runtime], Awaitable[None]], *options: str) -> None:
    """Run an asynchronous test body; whatever it leaves of containers is taken away, and nothing may be left then."""

    @contextlib.asynccontextmanager
    async def all_gone(launch: Launch) -> AsyncIterator[Runtime]:
        runtime = Runtime(launch, program, *options)
        try:
            yield runtime
        finally:
            for made in list(launch.processes):
                launch.handler.signal(made, 9)
                await launch.wait(made)
            for identity in runtime.made:
                await runtime.handler.release(identity)
        assert mounts_below(launch.run_directory) == []
        for name in ("bundles", "consoles", "tasks", "exits"):
            directory = launch.run_directory / name
            await until(lambda directory=directory: not os.path.exists(directory) or not os.listdir(directory), name)  # type: ignore[misc]

    async def inner(launch: Launch) -> None:
        async with all_gone(launch) as runtime:
            await body(runtime)

    in_launch(base, inner, cgroups=True)


def test_a_life(tmp_path: Path, program: str) -> None:
    """Its process is the keeper's, with a marker, and its exit is on record; its streams are the FIFOs."""

    async def body(runtime: Runtime) -> None:
        launch = runtime.launch
        box = await runtime.start(["sh", "-c", "read code; echo out $code; echo err >&2; exit $code"], stdin=True)
        assert runtime.handler.owns(box.process)
        entry = Path(f"/proc/{box.process.pid}")
        assert f"PPid:\t{launch.pid_of('keeper')}\n" in (entry / "status").read_text()
        assert box.cgroup.path in (entry / "cgroup").read_text()
        assert (launch.run_directory / "tasks" / f"{box.process.pid}.{box.process.start_time}").exists()
        assert mounts_below(launch.run_directory) == [str(runtime.bundle(box).rootfs)]
        os.write(box.streams["stdin"], b"6\n")
        end = await launch.finish(box)
        assert (end.code, end.out, end.err) == (6, "out 6\n", "err\n")
        await runtime.handler.release(box.id)
        assert not runtime.handler.owns(box.process)
        await runtime.handler.release(box.id)

    in_runtime(tmp_path, program, body)


def test_what_is_tares_own_is_made_before_and_not_told(tmp_path: Path, program: str) -> None:
    """Image volumes, one of them a part of an image and one of a single layer; declared directories; fields that the specification lacks."""
    top, below = tmp_path / "top", layer(tmp_path / "below")
    (top / "part").mkdir(parents=True)
    (top / "part/file").write_text("of the top\n")

    def volume(destination: str, lowers: list[Path], **more: str) -> dict[str, Any]:
        options = ["nodev", "ro", joined([str(path) for path in lowers])]
        return {"destination": destination, "type": "overlay", "source": "overlay", "options": options, **more}

    async def body(runtime: Runtime) -> None:
        mounts = [volume("/both", [top, below]), volume("/part", [top, below], subPath="part"), volume("/one", [top])]
        script = (
            "cat /both/part/file /part/file /one/part/file; ls -d /both/bin /data/deep; touch /part/new || echo not"
        )
        runtime.launch.spec = with_directories(runtime.launch.spec, ["/data/deep"])  # type: ignore[method-assign]
        box = await runtime.start(["sh", "-c", script], mounts=mounts)
        end = await runtime.launch.finish(box)
        assert end.out == "of the top\n" * 3 + "/both/bin\n/data/deep\nnot\n", end.err
        told = json.loads((runtime.bundle(box).directory / "config.json").read_text())
        assert "directories" not in told and "stdin" not in told["process"]
        assert all("subPath" not in mount and mount["type"] != "overlay" for mount in told["mounts"])
        assert len(mounts_below(runtime.launch.run_directory)) == 4

    in_runtime(tmp_path, program, body)


def with_directories(spec: Callable[..., dict[str, Any]], paths: list[str]) -> Callable[..., dict[str, Any]]:
    """A specification with Tare's own field."""
    return lambda *args, **more: spec(*args, **more) | {"directories": paths}


def test_a_start_that_fails_at_any_point_is_taken_away(tmp_path: Path, program: str) -> None:
    """The root file system cannot be mounted; there is no such program; whoever places the process fails, when it waits for `start`."""

    async def body(runtime: Runtime) -> None:
        with pytest.raises(StartFailed, match="at step make the root file system"):
            await runtime.start(SLEEP, lowers=[tmp_path / "not-there"])
        with pytest.raises(StartFailed, match="no-such-program"):
            await runtime.start(["/no-such-program"])

        async def refuse(process: Process) -> None:
            raise RuntimeError("not here")

        with pytest.raises(RuntimeError):
            await runtime.start(SLEEP, place=refuse)
        process = runtime.bundle("c3").process()
        assert process is not None and runtime.launch.handler.alive(process)
        assert not await runtime.handler.came_to_run(process)
        runtime.launch.processes[process] = None
        for identity in ("c1", "c2", "c3"):
            await runtime.handler.release(identity)
            assert not runtime.bundle(identity).directory.exists()
        await until(lambda: not runtime.launch.handler.alive(process), "its end")

    in_runtime(tmp_path, program, body)


def test_another_daemon_finds_it_by_its_bundle(tmp_path: Path, program: str) -> None:
    async def body(runtime: Runtime) -> None:
        box = await runtime.start(["sh", "-c", "read code; exit $code"], stdin=True)
        other = Runtime(runtime.launch, program)
        other.handler.adopt(runtime.bundle(box))
        assert other.handler.owns(box.process) and runtime.bundle(box).handler() == "other"
        assert await other.handler.came_to_run(box.process)
        os.write(box.streams["stdin"], b"3\n")
        end = await runtime.launch.wait(box.process)
        assert end.code == 3
        assert await other.handler.came_to_run(box.process)
        await other.handler.release(box.id)

    in_runtime(tmp_path, program, body)


def test_execs(tmp_path: Path, program: str) -> None:
    """What stands in for one ends with its code; its own process is a child of that, in the container's namespaces and cgroup."""

    async def body(runtime: Runtime) -> None:
        launch = runtime.launch
        box = await runtime.start(SLEEP)
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors += [ours, theirs, null]

        async def execute(number: int, *args: str, user: int = 0) -> Process:
            process = launch.spec(list(args), user={"uid": user, "gid": user})["process"]
            return await runtime.handler.exec(
                f"e{number}", box.process, process, cgroup=box.cgroup, stdin=null, stdout=theirs, stderr=theirs
            )

        made = await execute(1, "sh", "-c", "id -u; exec sleep 1000", user=7)
        inner = runtime.handler.root_of(made)
        await readable(ours)
        assert drain(ours) == "7\n" and inner != made.pid
        assert f"PPid:\t{made.pid}\n" in Path(f"/proc/{inner}/status").read_text()
        for kind in ("pid", "mnt", "net", "ipc"):
            assert os.stat(f"/proc/{inner}/ns/{kind}").st_ino == os.stat(f"/proc/{box.process.pid}/ns/{kind}").st_ino
        assert box.cgroup.path in Path(f"/proc/{inner}/cgroup").read_text()
        assert runtime.handler.signal(made, 9)
        assert (await launch.handler.wait(made)).code == 137
        runtime.handler.forget(made)
        await until(lambda: not os.path.exists(f"/proc/{inner}"), "its end")
        with pytest.raises(StartFailed, match="no-such"):
            await execute(2, "no-such")
        for code in (0, 8):
            made = await execute(3, "sh", "-c", f"exit {code}")
            assert (await launch.handler.wait(made)).code == code
            runtime.handler.forget(made)
        assert os.listdir(runtime.bundle(box).exec) == []

    in_runtime(tmp_path, program, body)


def test_what_would_be_got_wrong_is_refused(tmp_path: Path, program: str) -> None:
    async def body(runtime: Runtime) -> None:
        mapped = {"containerID": 0, "hostID": 100000, "size": 65536}
        mounts = [
            {"destination": "/data", "type": "bind", "source": "/tmp", "options": ["rbind"], "uidMappings": [mapped]}
        ]
        with pytest.raises(InvalidArgument, match="mappings of their own"):
            await runtime.start(SLEEP, mounts=mounts)
        with pytest.raises(InvalidArgument, match="user namespaces"):
            await runtime.start(SLEEP, linux={"namespaces": [{"type": "mount"}, {"type": "user"}]})
        assert not (runtime.launch.run_directory / "bundles").exists()

    in_runtime(tmp_path, program, body)


def test_an_oom_score_that_is_not_permitted(tmp_path: Path, program: str) -> None:
    """A runtime would fail; Tare asks it for the lowest that is permitted."""

    async def body(runtime: Runtime) -> None:
        own = int(Path("/proc/self/oom_score_adj").read_text())
        box = await runtime.start(SLEEP, oomScoreAdj=-900)
        assert int(Path(f"/proc/{box.process.pid}/oom_score_adj").read_text()) in (own, -900)
        await runtime.release(box)

    in_runtime(tmp_path, program, body)


def test_a_program_that_is_missing_or_does_not_run(tmp_path: Path) -> None:
    async def body(runtime: Runtime) -> None:
        for program, words in (
            ("/no/such", "No such file"),
            ("/etc/passwd", "not executable"),
            ("/bin/false", "does not run"),
        ):
            runtime.handler = OciHandler(
                "other", HandlerConfig(path=program), runtime.launch.handler, runtime.launch.run_directory
            )
            with pytest.raises(FailedPrecondition, match=words):
                await runtime.start(SLEEP)

    in_runtime(tmp_path, "/no/such", body)


def test_nothing_piles_up(tmp_path: Path, program: str) -> None:
    async def body(runtime: Runtime) -> None:
        async def some() -> None:
            boxes = await asyncio.gather(*(runtime.start(SLEEP) for _ in range(2)))
            await asyncio.gather(*(runtime.release(box) for box in boxes))
            for box in boxes:
                for fd in box.streams.values():
                    runtime.launch.descriptors.remove(fd)
                    os.close(fd)

        await some()
        processes = [os.getpid(), runtime.launch.pid_of("launcher"), runtime.launch.pid_of("keeper")]
        before = [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes]
        for _ in range(3):
            await some()
        assert [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes] == before

    in_runtime(tmp_path, program, body)
