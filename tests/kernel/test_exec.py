"""Further processes in a running container: what they join, what they are, how they end, and that nothing piles up."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers.builtin import StartFailed
from tests.support.launch import (
    CAPABILITIES,
    Box,
    Launch,
    drain,
    in_launch,
    namespaces,
    process,
    python_mounts,
    readable,
    status,
    until,
)

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
KINDS = ("mnt", "pid", "ipc", "uts", "net", "cgroup", "user")


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def pipe(launch: Launch) -> tuple[int, int]:
    """A pipe that is closed with the test."""
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    launch.descriptors += ends
    return ends


def test_all_namespaces_and_the_root_are_joined(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts", "pid")
        shared = namespaces(network=pod.pins["net"], ipc=pod.pins["ipc"], uts=pod.pins["uts"], pid=pod.pins["pid"])
        boxes = [
            await launch.start(SLEEP),
            await launch.start(SLEEP, linux={"namespaces": shared}),
            await launch.start(SLEEP, linux={"namespaces": namespaces(network=None, pid=None, ipc=None, uts=None)}),
        ]
        for box in boxes:
            made = await launch.begin_exec(box, SLEEP, pipe(launch)[1])
            for kind in KINDS:
                own, joined = (os.stat(f"/proc/{p.pid}/ns/{kind}").st_ino for p in (box.process, made))
                assert own == joined, kind
            assert os.stat(f"/proc/{made.pid}/root/").st_ino == os.stat(f"/proc/{box.process.pid}/root/").st_ino
            assert Path(f"/proc/{made.pid}/cgroup").read_text() == Path(f"/proc/{box.process.pid}/cgroup").read_text()

    in_launch(tmp_path, body, cgroups=True)


def test_what_it_is(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        writing = pipe(launch)[1]
        user = {"uid": 1000, "gid": 1000, "additionalGids": [5]}
        limit = [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]
        made = await launch.begin_exec(
            box, SLEEP, writing, user=user, env=["ONLY=this"], cwd="/tmp", rlimits=limit, oomScoreAdj=77
        )
        entry = Path(f"/proc/{made.pid}")
        facts = status((entry / "status").read_text())
        for mask in ("SigIgn", "SigBlk", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(facts[mask], 16) == 0, mask
        assert facts["Uid"].split() == ["1000"] * 4 and facts["Groups"] == "5" and facts["NoNewPrivs"] == "1"
        assert (entry / "environ").read_bytes() == b"ONLY=this\0"
        assert (entry / "cwd").readlink() == Path("/tmp") and (entry / "oom_score_adj").read_text() == "77\n"
        assert sorted(os.listdir(entry / "fd")) == ["0", "1", "2"]
        assert os.fstat(writing).st_uid == 1000 and os.stat("/dev/null").st_uid == 0
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        assert fields[2] == fields[3] == str(made.pid) and fields[4] == "0"
        assert any(
            line.split()[3:5] == ["99", "100"] for line in (entry / "limits").read_text().splitlines() if "open" in line
        )
        root = await launch.exec(box, ["cat", "/proc/self/status"])
        bits = {name: int(value, 16) for name, value in status(root.out).items() if name.startswith("Cap")}
        assert bits["CapInh"] == bits["CapAmb"] == 0 and bits["CapEff"] == bits["CapPrm"] == bits["CapBnd"] != 0
        assert len(CAPABILITIES) == bits["CapEff"].bit_count()

    in_launch(tmp_path, body)


@pytest.mark.parametrize("confined", [True, False])
def test_limits_are_no_hindrance_to_its_making(confined: bool, tmp_path: Path) -> None:
    """No further process, no descriptor to be had: it has that, and began."""
    limits = [
        {"type": "RLIMIT_NPROC", "soft": 1, "hard": 1},
        {"type": "RLIMIT_NOFILE", "soft": 3, "hard": 3},
    ]

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        user = {"uid": 54321, "gid": 54321}
        made = await launch.begin_exec(box, SLEEP, pipe(launch)[1], user=user, rlimits=limits, noNewPrivileges=confined)
        lines = [line.split() for line in Path(f"/proc/{made.pid}/limits").read_text().splitlines()]
        assert [line[2:4] for line in lines if line[1] == "processes"] == [["1", "1"]]
        assert [line[3:5] for line in lines if line[1:3] == ["open", "files"]] == [["3", "3"]]

    in_launch(tmp_path, body)


def test_exit_codes(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        for code in (0, 3, 255):
            assert (await launch.exec(box, ["sh", "-c", f"echo {code}; exit {code}"])).code == code
        for number in (9, 11, 15):
            result = await launch.exec(box, ["sh", "-c", f"kill -{number} $$; sleep 1000"])
            assert (result.code, result.signal) == (128 + number, number)
        assert launch.handler.alive(box.process)

    in_launch(tmp_path, body)


def test_a_user_writes_to_its_own_streams_by_name(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        result = await launch.exec(
            box, ["sh", "-c", "echo a >/dev/stdout; echo b >/dev/stderr"], user={"uid": 7, "gid": 7}
        )
        assert result.out == "a\nb\n"

    in_launch(tmp_path, body)


def test_failures(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        with pytest.raises(StartFailed) as caught:
            await launch.exec(box, ["nonexistent"])
        assert (caught.value.step, caught.value.errno) == ("exec", 2)
        assert str(caught.value).startswith(
            f"exec 'nonexistent' in the container of process {box.process.pid}: at step exec"
        )
        for changes, step, errno in (
            ({"cwd": "/none"}, "change to the working directory", 2),
            ({"cwd": "/bin/sh"}, "change to the working directory", 20),
            ({"user": {"uid": 0, "gid": 1 << 33}}, f"become user 0:{1 << 33}", 0),
        ):
            with pytest.raises(StartFailed) as caught:
                await launch.exec(box, ["true"], **changes)
            assert (caught.value.step, caught.value.errno) == (step, errno)
        with pytest.raises(InvalidArgument):
            await launch.exec(box, [])
        assert (await launch.exec(box, ["echo", "well"])).out == "well\n"
        assert len(list((launch.run_directory / "tasks").iterdir())) == 1

    in_launch(tmp_path, body)


def test_a_container_that_is_gone(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        await launch.kill(box)
        with pytest.raises(StartFailed) as caught:
            await launch.exec(box, ["true"])
        assert (caught.value.step, caught.value.errno) == ("find the container", 3)
        other = await launch.start(SLEEP)
        launch.handler.signal(other.process, 9)
        await until(lambda: not launch.handler.alive(other.process), "its end")
        with pytest.raises((StartFailed, FailedPrecondition), match=r"find the container|that has ended"):
            await launch.exec(other, ["true"])  # dead, and perhaps not reaped

    in_launch(tmp_path, body)


def test_into_a_container_that_dies_meanwhile(tmp_path: Path) -> None:
    """It runs and is killed with the container, or fails with a step, or since that has ended; the launcher serves on."""

    async def body(launch: Launch) -> None:
        outcomes = set()
        for delay in range(8):
            box = await launch.start(SLEEP)
            execs = [asyncio.ensure_future(launch.exec(box, SLEEP)) for _ in range(4)]
            for _ in range(delay * 8):
                await asyncio.sleep(0)
            launch.handler.signal(box.process, 9)
            for result in await asyncio.gather(*execs, return_exceptions=True):
                if isinstance(result, StartFailed):
                    outcomes.add(result.step)
                elif not isinstance(result, FailedPrecondition):
                    assert not isinstance(result, BaseException), result
                    assert (result.code, result.signal) == (137, 9)
            await launch.wait(box.process)
        assert outcomes <= {"find the container", "join the container", "setup", "exec"}, outcomes
        assert (await launch.run(["true"])).code == 0
        await until(lambda: not list((launch.run_directory / "tasks").iterdir()), "the end of all")

    in_launch(tmp_path, body)


def test_nothing_piles_up(tmp_path: Path) -> None:
    """No descriptor stays in daemon, launcher or keeper, no process, no marker, no record; and the launcher does not grow."""

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        pids = [os.getpid(), launch.pid_of("launcher"), launch.pid_of("keeper")]

        async def round_of(count: int) -> None:
            for number in range(count):
                assert (await launch.exec(box, ["true"])).code == 0
                if number % 4 == 0:
                    with pytest.raises(StartFailed):
                        await launch.exec(box, ["nonexistent"])

        await round_of(20)
        await settled(launch, 1)
        before = [descriptors(pid) for pid in pids]
        sizes = [private(pids[1])]
        for _ in range(3):
            await round_of(40)
            await settled(launch, 1)
            sizes.append(private(pids[1]))
        assert [descriptors(pid) for pid in pids] == before
        assert not list((launch.run_directory / "exits").iterdir())
        # An allocator takes a new arena once in a while; what leaks does so in each round.
        assert min(after - size for size, after in itertools.pairwise(sizes)) < 100, f"kB after 40 execs each: {sizes}"

    in_launch(tmp_path, body)


async def settled(launch: Launch, children: int) -> None:
    """Wait until the launcher has reaped all but so many."""
    launcher = launch.pid_of("launcher")
    path = Path(f"/proc/{launcher}/task/{launcher}/children")
    await until(lambda: len(path.read_text().split()) == children, "the reaping")


def private(pid: int) -> int:
    """kB of memory that only this process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_containers_and_pods_do_not_pile_up_either(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pids = [launch.pid_of("launcher"), launch.pid_of("keeper")]

        async def one(number: int) -> None:
            pod = await launch.pod("net", "uts", "pid")
            await launch.run(["true"], linux={"namespaces": namespaces(pid=pod.pins["pid"], network=pod.pins["net"])})
            with pytest.raises(StartFailed):
                await launch.run(["true"], cwd="/bin/sh")
            await launch.handler.check_sources([("/etc", False), (f"/none{number}", False)])
            await launch.remove_pod(pod)

        await one(0)
        await settled(launch, 0)
        before = [descriptors(pid) for pid in pids]
        ours = descriptors(os.getpid()) - len(launch.descriptors)
        for number in range(10):
            await one(number)
        await settled(launch, 0)
        assert [descriptors(pid) for pid in pids] == before
        assert descriptors(os.getpid()) - len(launch.descriptors) == ours

    in_launch(tmp_path, body)


def test_many_at_once(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        results = await asyncio.gather(*(launch.exec(box, ["sh", "-c", f"echo {n}; exit {n}"]) for n in range(30)))
        assert [(result.code, result.out) for result in results] == [(n, f"{n}\n") for n in range(30)]

    in_launch(tmp_path, body)


def test_cancelled_execs_are_not_left_running(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        for pause in (0.0, 0.001, 0.002, 0.003, 0.005):
            task = asyncio.ensure_future(launch.exec(box, ["sleep", "777"]))
            await asyncio.sleep(pause)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for made in [made for made in launch.processes if made != box.process]:  # it had begun: ours to end
                launch.handler.signal(made, 9)
                await launch.wait(made)
            await settled(launch, 1)
        assert len(list((launch.run_directory / "tasks").iterdir())) == 1

    in_launch(tmp_path, body)


def test_a_process_whose_terminal_nobody_takes_is_ended(tmp_path: Path) -> None:
    async def refuse(master: int) -> None:
        await until(lambda: bool(select.select([master], [], [], 0)[0]), "its first word")
        raise OSError(24, "Too many open files")

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors.append(null)
        with pytest.raises(OSError, match="Too many open files"):
            await launch.handler.exec(
                "lost",
                box.process,
                process(["sh", "-c", "trap '' HUP; echo; sleep 778"], terminal=True),
                cgroup=box.cgroup,
                stdin=null,
                stdout=null,
                stderr=null,
                tty_sink=refuse,
            )
        await settled(launch, 1)
        assert len(list((launch.run_directory / "tasks").iterdir())) == 1

    in_launch(tmp_path, body)


CODE = "import sys, os; print(sorted(sys.argv[1:]), os.getpid() > 1, flush=True); print(sys.stdin.read())"


def test_streams_are_those_given(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box: Box = await launch.start(SLEEP, mounts=python_mounts())
        streams = [pipe(launch) for _ in range(3)]
        made = await launch.handler.exec(
            "e",
            box.process,
            launch.spec(["/usr/bin/python3", "-I", "-c", CODE, "b", "a"])["process"],
            cgroup=box.cgroup,
            stdin=streams[0][0],
            stdout=streams[1][1],
            stderr=streams[2][1],
        )
        launch.processes[made] = None
        os.set_blocking(streams[0][0], True)
        await readable(streams[1][0])
        os.write(streams[0][1], b"typed")
        for fd in streams[0]:
            launch.descriptors.remove(fd)
            os.close(fd)
        assert (await launch.wait(made)).code == 0
        assert drain(streams[1][0]) == "['a', 'b'] True\ntyped\n" and drain(streams[2][0]) == ""

    in_launch(tmp_path, body)
