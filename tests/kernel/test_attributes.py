"""How the kernel is to treat a process: asked of the kernel itself, about the container's process, by calls and files of the node."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers import rdt
from tare.handlers.attributes import SCHED_ATTR
from tare.handlers.builtin import StartFailed
from tare.handlers.capabilities import CAPABILITY_BITS
from tare.launch import attributes, linux
from tests.support.launch import Box, Launch, in_launch, namespaces, status, user_namespace
from tests.support.oci import Bundle, Runtime
from tests.support.trace import Trace

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
NR_SCHED_GETATTR = 315 if os.uname().machine == "x86_64" else 275
NR_IOPRIO_GET = 252 if os.uname().machine == "x86_64" else 31
CPUS = sorted(os.sched_getaffinity(0))
Json = dict[str, Any]


def scheduling(pid: int) -> tuple[int, ...]:
    """(policy, flags, nice, priority, runtime, deadline, period) by sched_getattr(2)."""
    buffer = ctypes.create_string_buffer(SCHED_ATTR.size)
    result = linux.syscall(
        ctypes.c_long(NR_SCHED_GETATTR), ctypes.c_long(pid), buffer, ctypes.c_long(SCHED_ATTR.size), ctypes.c_long(0)
    )
    linux.check(result, "sched_getattr")
    found: tuple[int, ...] = SCHED_ATTR.unpack(buffer.raw)[1:8]
    return found


def io_priority(pid: int) -> tuple[int, int]:
    """(class, level) by ioprio_get(2)."""
    call, who = ctypes.c_long(NR_IOPRIO_GET), ctypes.c_long(attributes.IOPRIO_WHO_PROCESS)
    value = linux.check(linux.syscall(call, who, ctypes.c_long(pid)), "ioprio_get")
    return value >> 13, value & 7


def facts(box: Box) -> dict[str, str]:
    """/proc/PID/status."""
    return status(Path(f"/proc/{box.process.pid}/status").read_text())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"policy": "SCHED_OTHER", "nice": -7}, (0, 0, -7, 0)),
        ({"policy": "SCHED_BATCH", "nice": 19}, (3, 0, 19, 0)),
        ({"policy": "SCHED_IDLE"}, (5, 0, 0, 0)),
        ({"policy": "SCHED_FIFO", "priority": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, (1, 1, 0, 3)),
        ({"policy": "SCHED_RR", "priority": 99}, (2, 0, 0, 99)),
    ],
)
def test_scheduler(wanted: Json, expected: tuple[int, ...], tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, scheduler=wanted, user={"uid": 7, "gid": 7})
        policy, flags, nice, priority, *_ = scheduling(box.process.pid)
        assert (policy, flags, nice, priority) == expected
        result = await launch.exec(box, ["cat", "/proc/self/stat"], scheduler=wanted)
        fields = result.out.rpartition(")")[2].split()
        assert int(fields[38]) == expected[0]  # field 41, the policy
        plain = await launch.exec(box, ["cat", "/proc/self/stat"])
        assert int(plain.out.rpartition(")")[2].split()[38]) == 0

    in_launch(tmp_path, body)


def test_a_deadline(tmp_path: Path) -> None:
    """Times in nanoseconds, of 64 bits; such a process may not fork, so the shell's own word is what it has."""
    wanted = {"policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 100_000_000, "period": 1_000_000_000}

    async def body(launch: Launch) -> None:
        box = await launch.start(["sleep", "1000"], scheduler=wanted)
        assert scheduling(box.process.pid) == (6, 0, 0, 0, 10_000_000, 100_000_000, 1_000_000_000)

    in_launch(tmp_path, body)


def test_what_the_kernel_refuses_is_named(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for wanted, number in (
            ({"policy": "SCHED_ISO"}, 22),
            ({"policy": "SCHED_DEADLINE", "runtime": 5, "deadline": 2, "period": 1}, 22),
        ):
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP, scheduler=wanted)
            assert (caught.value.step, caught.value.errno) == ("set the scheduler", number)
        hooks = {"startContainer": [{"path": "/bin/true"}]}
        with pytest.raises(InvalidArgument, match="SCHED_FLAG_RESET_ON_FORK"):
            await launch.start(SLEEP, scheduler={"policy": "SCHED_DEADLINE", "runtime": 9}, hooks=hooks)
        await launch.handler.hooked.release(f"c{launch.boxes}")

    in_launch(tmp_path, body)


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [("IOPRIO_CLASS_RT", 0, (1, 0)), ("IOPRIO_CLASS_BE", 7, (2, 7)), ("IOPRIO_CLASS_IDLE", 3, (3, 3))],
)
def test_io_priority(name: str, level: int, expected: tuple[int, int], tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(["sh", "-c", "sleep 1001; true"], ioPriority={"class": name, "priority": level})
        assert io_priority(box.process.pid) == expected
        child = await first_child(box.process.pid)
        assert io_priority(child) == expected
        await launch.kill(box)

    in_launch(tmp_path, body)


def test_in_a_user_namespace(tmp_path: Path) -> None:
    """What takes the node's privileges is refused there, by name; the rest is as anywhere."""

    async def body(launch: Launch) -> None:
        own = user_namespace()
        box = await launch.start(
            SLEEP,
            scheduler={"policy": "SCHED_BATCH", "nice": 5},
            ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 6},
            linux=own | {"personality": {"domain": "LINUX32"}},
        )
        assert scheduling(box.process.pid)[:3] == (3, 0, 5) and io_priority(box.process.pid) == (2, 6)
        refused: list[tuple[dict[str, Any], str]] = [
            ({"scheduler": {"policy": "SCHED_OTHER", "nice": -5}}, "set the scheduler"),
            ({"scheduler": {"policy": "SCHED_FIFO", "priority": 1}}, "set the scheduler"),
            ({"ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 1}}, "set the I/O priority"),
        ]
        for changes, step in refused:
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP, linux=own, **changes)
            assert caught.value.step == step and caught.value.errno in (errno.EPERM, errno.EACCES)

    in_launch(tmp_path, body)


async def first_child(pid: int) -> int:
    """A child of a process, once it has one."""
    deadline = time.monotonic() + 20
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    return int(found[0])


def test_personality(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, linux={"personality": {"domain": "LINUX32"}})
        assert int(Path(f"/proc/{box.process.pid}/personality").read_text(), 16) == 8
        result = await launch.exec(box, ["uname", "-m"], personality={"domain": "LINUX32"})
        assert result.out.strip() in ("i686", "armv8l")
        plain = await launch.run(["cat", "/proc/self/personality"], linux={"personality": {"domain": "LINUX"}})
        assert int(plain.out, 16) == 0

    in_launch(tmp_path, body)


@pytest.mark.skipif("len(__import__('os').sched_getaffinity(0)) < 2", reason="there is one CPU")
def test_who_makes_a_process_does_not_confine_it(tmp_path: Path) -> None:
    """A launcher on one CPU (a service manager's setting, say), or a command line that is: a container has all that its control group has."""
    every = sorted(CPUS)

    async def body(launch: Launch) -> None:
        os.sched_setaffinity(launch.pid_of("launcher"), CPUS[:1])
        pod = await launch.pod("pid")
        for wanted in ({}, {"namespaces": namespaces(pid=pod.pins["pid"])}):
            box = await launch.start(SLEEP, linux=wanted)
            assert sorted(os.sched_getaffinity(box.process.pid)) == every
            result = await launch.exec(box, ["cat", "/proc/self/status"])
            assert sorted(cpus(status(result.out)["Cpus_allowed_list"])) == every

    in_launch(tmp_path, body)


@pytest.mark.skipif("len(__import__('os').sched_getaffinity(0)) < 2", reason="there is one CPU")
def test_who_calls_the_command_does_not_confine_it(tmp_path: Path) -> None:
    bundle, runtime = Bundle(tmp_path / "bundle"), Runtime("tare", tmp_path / "root")
    plain = runtime.argv
    runtime.argv = lambda *words: ["taskset", "--cpu-list", str(CPUS[0]), *plain(*words)]  # type: ignore[method-assign]
    try:
        said = bundle.output(runtime, "cat /proc/self/status")
    finally:
        runtime.close()
    assert sorted(cpus(status(said)["Cpus_allowed_list"])) == sorted(CPUS)


@pytest.mark.skipif("len(__import__('os').sched_getaffinity(0)) < 2", reason="there is one CPU")
def test_affinity_of_an_exec(tmp_path: Path) -> None:
    """The first list holds before the control group is joined, the second after; without it the kernel decides."""
    first, last = CPUS[0], CPUS[-1]

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        for wanted, expected in (
            ({"initial": str(first)}, str(first)),
            ({"initial": str(first), "final": str(last)}, str(last)),
            ({"final": f"{last}"}, str(last)),
            ({"initial": str(first), "final": ",".join(map(str, CPUS))}, ",".join(map(str, CPUS))),
            ({}, ",".join(map(str, CPUS))),
        ):
            result = await launch.exec(box, ["cat", "/proc/self/status"], execCPUAffinity=wanted)
            assert sorted(cpus(status(result.out)["Cpus_allowed_list"])) == sorted(cpus(expected)), wanted
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            affinity = {"initial": str(first), "final": str(last)}
            await launch.exec(box, ["true"], execCPUAffinity=affinity)
        texts = [[str(call) for call in calls] for calls in trace.calls().values()]
        [helper] = [calls for calls in texts if any(text.startswith("sched_setaffinity") for text in calls)]
        order = [
            text for text in helper if "sched_setaffinity" in text or ("openat" in text and "cgroup.procs" in text)
        ]
        assert "sched_setaffinity" in order[0] and "sched_setaffinity" in order[-1], order
        assert len(order) > 2 and all("cgroup.procs" in text for text in order[1:-1]), order
        with pytest.raises(StartFailed, match="none of these CPUs") as caught:
            await launch.exec(box, ["true"], execCPUAffinity={"final": "8190"})
        assert caught.value.step == "run on CPUs 8190"

    in_launch(tmp_path, body, cgroups=True)


def cpus(text: str) -> list[int]:
    """The numbers of a kernel's list."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def test_umask(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, user={"uid": 0, "gid": 0, "umask": 0o137})
        assert facts(box)["Umask"] == "0137"

    in_launch(tmp_path, body)


def test_oom_score_is_left_alone_unless_it_is_set(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        launcher = Path(f"/proc/{launch.pid_of('launcher')}/oom_score_adj")
        launcher.write_text("123")
        box = await launch.start(SLEEP)
        assert Path(f"/proc/{box.process.pid}/oom_score_adj").read_text() == "123\n"
        other = await launch.start(SLEEP, oomScoreAdj=500)
        assert Path(f"/proc/{other.process.pid}/oom_score_adj").read_text() == "500\n"

    in_launch(tmp_path, body)


def test_every_limit(tmp_path: Path) -> None:
    """All sixteen by their names, as /proc shows them; a number over 2⁶³ is one, too."""
    shown = {
        "RLIMIT_CPU": "Max cpu time",
        "RLIMIT_FSIZE": "Max file size",
        "RLIMIT_DATA": "Max data size",
        "RLIMIT_STACK": "Max stack size",
        "RLIMIT_CORE": "Max core file size",
        "RLIMIT_RSS": "Max resident set",
        "RLIMIT_NPROC": "Max processes",
        "RLIMIT_NOFILE": "Max open files",
        "RLIMIT_MEMLOCK": "Max locked memory",
        "RLIMIT_AS": "Max address space",
        "RLIMIT_LOCKS": "Max file locks",
        "RLIMIT_SIGPENDING": "Max pending signals",
        "RLIMIT_MSGQUEUE": "Max msgqueue size",
        "RLIMIT_NICE": "Max nice priority",
        "RLIMIT_RTPRIO": "Max realtime priority",
        "RLIMIT_RTTIME": "Max realtime timeout",
    }
    limits, expected = [], {}
    for index, name in enumerate(shown):
        hard = resource.getrlimit(index)[1]
        hard = 1 << 30 if hard == resource.RLIM_INFINITY else hard
        limits.append({"type": name, "soft": hard // 2, "hard": hard})
        expected[name] = [str(hard // 2), str(hard)]
    large = (1 << 63) + 5
    unlimited = resource.getrlimit(resource.RLIMIT_RSS)[1] == resource.RLIM_INFINITY
    if unlimited:
        limits[5] = {"type": "RLIMIT_RSS", "soft": large, "hard": large}
        expected["RLIMIT_RSS"] = [str(large)] * 2

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, rlimits=limits)
        lines = Path(f"/proc/{box.process.pid}/limits").read_text().splitlines()
        found = {
            name: next(line for line in lines if line.startswith(title))[26:].split()[:2]
            for name, title in shown.items()
        }
        assert found == expected

    in_launch(tmp_path, body)


def test_ambient_capabilities_outlive_the_change_of_user(tmp_path: Path) -> None:
    bind, kill = CAPABILITY_BITS["CAP_NET_BIND_SERVICE"], CAPABILITY_BITS["CAP_KILL"]
    sets = {kind: ["CAP_NET_BIND_SERVICE", "CAP_KILL"] for kind in ("bounding", "permitted", "inheritable")}

    async def body(launch: Launch) -> None:
        box = await launch.start(
            SLEEP, user={"uid": 9, "gid": 9}, capabilities=sets | {"ambient": ["CAP_NET_BIND_SERVICE"]}
        )
        found = {key: int(value, 16) for key, value in facts(box).items() if key.startswith("Cap")}
        assert found == {"CapInh": bind | kill, "CapPrm": bind, "CapEff": bind, "CapBnd": bind | kill, "CapAmb": bind}

    in_launch(tmp_path, body)


def test_capabilities_that_cannot_be_granted_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The specification: what cannot be granted is logged, and the container starts."""
    capabilities = {
        "bounding": ["CAP_KILL", "CAP_OF_THE_FUTURE"],
        "permitted": ["CAP_KILL"],
        "effective": ["CAP_KILL", "CAP_CHOWN"],
        "inheritable": ["CAP_KILL", "CAP_FOWNER"],
        "ambient": ["CAP_KILL", "CAP_SETUID"],
    }

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, capabilities=capabilities)
        kill = CAPABILITY_BITS["CAP_KILL"]
        found = {key: int(value, 16) for key, value in facts(box).items() if key.startswith("Cap")}
        assert found == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), kill)
        said = "\n".join(record.getMessage() for record in caplog.records)
        for words in (
            "CAP_OF_THE_FUTURE of the bounding set is unknown",
            "CAP_CHOWN cannot be effective: not permitted",
            "CAP_FOWNER cannot be inheritable: not bounding",
            "CAP_SETUID cannot be ambient: not permitted and inheritable",
        ):
            assert words in said, said

    in_launch(tmp_path, body)


def test_the_size_of_a_terminal(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(
            ["sh", "-c", "stty size; sleep 1000"], terminal=True, consoleSize={"height": 33, "width": 77}
        )
        assert struct.unpack("HHHH", fcntl.ioctl(box.terminal, 0x5413, bytes(8)))[:2] == (33, 77)
        ignored = await launch.run(["true"], consoleSize={"height": 33, "width": 77})
        assert ignored.code == 0

    in_launch(tmp_path, body)


def test_a_class_of_service_without_resctrl_is_an_error(tmp_path: Path) -> None:
    """Where it is mounted, the process is in the class; where not, as on most machines, nothing is made."""
    mounted = rdt.mounted_at(Path("/proc/self/mountinfo").read_text())

    async def body(launch: Launch) -> None:
        wanted = {"intelRdt": {"enableMonitoring": True}}
        if mounted is None:
            with pytest.raises(FailedPrecondition, match="no resctrl file system is mounted"):
                await launch.start(SLEEP, linux=wanted)
            assert launch.handler.hooked.kept() == [] and not launch.processes
            return
        box = await launch.start(SLEEP, linux=wanted)
        group = Path(mounted) / box.id
        for place in (group, group / "mon_groups" / box.id):
            assert str(box.process.pid) in (place / "tasks").read_text().split()
        await launch.kill(box)
        await launch.handler.hooked.release(box.id)
        assert not group.exists()

    in_launch(tmp_path, body)


def test_who_asks_for_nothing_pays_for_nothing(tmp_path: Path) -> None:
    """None of these calls is in the trace of an ordinary start, nor is there a helper."""

    async def body(launch: Launch) -> None:
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            await launch.run(["true"])
        names = {call.name for calls in trace.calls().values() for call in calls}
        unwanted = {
            "sched_setattr",
            "ioprio_set",
            "personality",
            "fstatfs",
            "socketpair",
            "pidfd_getfd",
        }
        assert names & unwanted == {"socketpair"}  # the launcher's own, to its child
        assert len(trace.calls()) == 2

    in_launch(tmp_path, body)
