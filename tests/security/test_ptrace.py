"""A process on its way into a PID namespace, seen by those who live there: until its exec nobody looks into it or takes what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tare.errors import FailedPrecondition
from tare.handlers.builtin import StartFailed
from tare.handlers.capabilities import mask
from tare.launch import mounts
from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.seccomp_profile import default_profile
from tests.support.launch import Box, Launch, in_launch, line, namespaces, python_mounts, until
from tests.support.trace import Call, Trace

pytestmark = pytest.mark.root

PYTHON = ["/usr/bin/python3", "-I", "-c"]
WANTED = 12
TOO_LATE = (StartFailed, FailedPrecondition)
TRACER = {kind: ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_KILL"] for kind in ("bounding", "effective", "permitted")}

# What it can try of a process, by name; and the loop of one that tries all of it on whatever is new in its PID namespace.
WAYS = """
import ctypes, errno, json, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
def answer(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
def take_descriptor(pid):
    pidfd = os.pidfd_open(pid)
    try:
        answer(libc.syscall(438, pidfd, 2, 0))
    finally:
        os.close(pidfd)
def enter(pid):
    pidfd = os.pidfd_open(pid)
    try:
        answer(libc.setns(pidfd, 0x20000 | 0x40000000))
    finally:
        os.close(pidfd)
def read_memory(pid):
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    answer(libc.process_vm_readv(pid, ctypes.byref(vector), ctypes.c_ulong(1), ctypes.byref(vector), ctypes.c_ulong(1), ctypes.c_ulong(0)))
WAYS = {
    "ptrace": lambda pid: answer(libc.ptrace(0x4206, pid, None, None)),
    "pidfd_getfd": take_descriptor,
    "process_vm_readv": read_memory,
    "setns": enter,
    "root/": lambda pid: os.listdir(f"/proc/{pid}/root/"),
    "cwd/": lambda pid: os.listdir(f"/proc/{pid}/cwd/"),
}
for link in ("exe", "root", "cwd", "fd/0", "fd/2", "ns/mnt", "ns/net"):
    WAYS[link] = lambda pid, link=link: os.readlink(f"/proc/{pid}/{link}")
for file in ("mem", "environ", "maps", "auxv", "syscall", "stack"):
    WAYS[file] = lambda pid, file=file: os.read(os.open(f"/proc/{pid}/{file}", os.O_RDONLY), 1)
def attempt(way, pid):
    try:
        WAYS[way](pid)
        return "DONE"
    except OSError as error:
        return errno.errorcode[error.errno]
"""

HUNT = """
def unready(pid):
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read() == "tare-launcher\\n"
    except OSError:
        return False
newest = os.open("/proc/sys/kernel/ns_last_pid", os.O_RDONLY)
last, found, seen = os.getpid(), {}, 0
print("hunting", flush=True)
while seen < WANTED:
    pid = int(os.pread(newest, 20, 0))
    if pid == last:
        continue
    last = pid
    before = len(found)
    for way in WAYS:
        result = attempt(way, pid)
        if not unready(pid):
            break
        found.setdefault(way, [])
        if result not in found[way]:
            found[way].append(result)
    else:
        seen += 1
print(json.dumps(found), flush=True)
"""


async def hunted(launch: Launch, hunter: Box) -> dict[str, set[str]]:
    """What came of all attempts, by way. Processes are to be made for the hunter until this is known."""
    said = hunter.read("stdout")
    assert said, hunter.read("stderr")
    return {way: set(results) for way, results in json.loads(said).items()}


def assert_refused(found: dict[str, set[str]]) -> None:
    """Nothing was there to be had, by any way."""
    assert len(found) == 19, found
    refused, gone = (
        {"EPERM", "EACCES"},
        {"ESRCH", "ENOENT"},
    )  # there is a moment at which it is not yet to be found, or no more
    assert all(results & refused and results <= refused | gone for results in found.values()), found


def test_nobody_looks_into_an_exec_before_it_is_one(tmp_path: Path) -> None:
    """CVE-2016-9962: the container's own root, in whose PID namespace it appears."""

    async def body(launch: Launch) -> None:
        code = f"{WAYS}\nWANTED = {WANTED}\n{HUNT}"
        hunter = await launch.start([*PYTHON, code], mounts=python_mounts())
        assert await line(hunter) == "hunting"
        while launch.handler.alive(hunter.process):
            with contextlib.suppress(*TOO_LATE):  # the last one comes too late
                await launch.exec(hunter, ["true"])
        assert_refused(await hunted(launch, hunter))

    in_launch(tmp_path, body)


# Of what anybody may read of a process, without tracing it: what it has in common with whoever reads.
COMPARE = """
FILES = ("mountinfo", "net/dev", "net/route", "net/unix")
def read(pid, name):
    with open(f"/proc/{pid}/{name}") as file:
        lines = file.read().splitlines()
    return [line.partition(":")[0] for line in lines] if name == "net/dev" else lines
own = {name: read("self", name) for name in FILES}
WAYS = {name: lambda pid, name=name: read(pid, name) == own[name] for name in FILES}
def attempt(way, pid):
    try:
        return "the same" if WAYS[way](pid) else "another"
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def test_an_exec_shows_nothing_of_the_node_before_it_is_one(tmp_path: Path) -> None:
    """Mounts, addresses, routes and sockets of a process are there for everybody who sees it: they are the container's from the first moment."""

    async def body(launch: Launch) -> None:
        code = f"{WAYS}{COMPARE}\nWANTED = {WANTED}\n{HUNT}"
        hunter = await launch.start([*PYTHON, code], mounts=python_mounts())
        assert await line(hunter) == "hunting"
        while launch.handler.alive(hunter.process):
            with contextlib.suppress(*TOO_LATE):
                await launch.exec(hunter, ["true"])
        found = await hunted(launch, hunter)
        assert set(found) == {"mountinfo", "net/dev", "net/route", "net/unix"}
        gone = {"ESRCH", "ENOENT", "EINVAL"}
        assert all("the same" in results and results <= {"the same"} | gone for results in found.values()), found

    in_launch(tmp_path, body)


def test_who_may_trace_in_a_user_namespace_does_not_look_into_an_exec_either(tmp_path: Path) -> None:
    """CAP_SYS_PTRACE there is none over what the node's root has made."""
    mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    own = {"namespaces": [*namespaces(), {"type": "user"}], "uidMappings": mapping, "gidMappings": mapping}

    async def body(launch: Launch) -> None:
        code = f"{WAYS}\nWANTED = {WANTED}\n{HUNT}"
        hunter = await launch.start([*PYTHON, code], mounts=python_mounts(), linux=own, capabilities=TRACER)
        assert await line(hunter) == "hunting"
        while launch.handler.alive(hunter.process):
            with contextlib.suppress(*TOO_LATE):  # the last one comes too late
                await launch.exec(hunter, ["true"])
        assert_refused(await hunted(launch, hunter))

    in_launch(tmp_path, body)


def test_nobody_looks_into_a_container_of_the_pod_before_it_is_one(tmp_path: Path) -> None:
    """From its first moment, when its root is the node's, until its exec."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        shared = {"namespaces": namespaces(pid=pod.pins["pid"])}
        code = f"{WAYS}\nWANTED = {WANTED}\n{HUNT}"
        hunter = await launch.start([*PYTHON, code], mounts=python_mounts(), linux=shared)
        assert await line(hunter) == "hunting"
        while launch.handler.alive(hunter.process):
            await launch.run(["true"], linux=shared)
        assert_refused(await hunted(launch, hunter))

    in_launch(tmp_path, body)


# Whoever appears here and is not the program yet is stopped and looked at; what is done to it then is in `treat`.
SEIZE = """
def facts(pid):
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\\n").split(":\t", 1) for line in file if ":\t" in line)
def seized(pid):
    answer(libc.ptrace(0x4206, pid, None, None))
    answer(libc.ptrace(0x4207, pid, None, None))
    os.waitpid(pid, 0x40000000)
newest = os.open("/proc/sys/kernel/ns_last_pid", os.O_RDONLY)
last, held = os.getpid(), []
print("hunting", flush=True)
while len(held) < WANTED:
    pid = int(os.pread(newest, 20, 0))
    if pid == last:
        continue
    last = pid
    try:
        first = facts(pid)
        seized(pid)
    except OSError:
        continue
    now = facts(pid)
    if now["Name"] == "tare-launcher":
        held.append([first, now, treat(pid)])
    libc.ptrace(17, pid, None, None)
print(json.dumps(held), flush=True)
"""
LOOK = """
def treat(pid):
    links = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            links[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError as error:
            links[fd] = errno.errorcode[error.errno]
    return [links, os.readlink(f"/proc/{pid}/root"), os.readlink(f"/proc/{pid}/cwd")]
"""
LIE = """
import socket, struct
def packet(kind, *fields):
    parts = [struct.pack("<BBIH", 0x54, kind, 0, len(fields))]
    for field in fields:
        value = struct.pack("<q", field) if isinstance(field, int) else field
        parts.append(struct.pack("<BI", 0x69 if isinstance(field, int) else 0x62, len(value)) + value)
    return b"".join(parts)
LIES = [(packet(40, 1), True), (packet(40, b""), False), (packet(41), False), (packet(42, 5), False), (packet(44), False),
        (packet(1, 1, 1), False), (packet(3, b"setup", -1, b""), False), (b"?", False)]
def treat(pid):
    pidfd, own = os.pidfd_open(pid), os.pidfd_open(os.getpid())
    told = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        copy = libc.syscall(438, pidfd, int(fd), 0)
        if copy >= 0 and os.readlink(f"/proc/self/fd/{copy}").startswith("socket:"):
            lie, beside = LIES[len(held) % len(LIES)]
            with socket.socket(fileno=os.dup(copy)) as launcher:
                try:
                    socket.send_fds(launcher, [lie], [own] if beside else [])
                    told += 1
                except OSError:
                    pass
        if copy >= 0:
            os.close(copy)
    os.close(pidfd)
    os.close(own)
    return told
"""


async def held(launch: Launch, hunter: Box, make: Callable[[], Awaitable[object]]) -> list[Any]:
    """What a container that may trace got hold of, while processes are made in its PID namespace."""
    assert await line(hunter) == "hunting", hunter.read("stderr")
    while launch.handler.alive(hunter.process):
        with contextlib.suppress(*TOO_LATE):
            await make()
    said = hunter.read("stdout")
    assert said, hunter.read("stderr")
    found: list[Any] = json.loads(said)
    return found


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("uid", [0, 1000])
def test_who_may_trace_gets_hold_of_nothing_but_the_likes_of_itself(uid: int, confined: bool, tmp_path: Path) -> None:
    """CAP_SYS_PTRACE of the node's own user namespace: it may attach to the process of an exec as soon as that is there, and finds a
    process of the container's, with its filter."""
    profile = default_profile([name for names in TRACER.values() for name in names])
    filter = asyncio.run(SeccompCompiler(tmp_path / "seccomp").compile(profile))
    user = {"uid": uid, "gid": uid, "additionalGids": [7]}

    async def body(launch: Launch) -> None:
        code = f"{WAYS}\nWANTED = {WANTED}\n{LOOK}\n{SEIZE}"
        hunter = await launch.start(
            [*PYTHON, code], mounts=python_mounts(), capabilities=TRACER, noNewPrivileges=confined
        )
        changes = {"user": user, "capabilities": TRACER, "noNewPrivileges": confined, "seccomp": profile}
        found = await held(launch, hunter, lambda: launch.exec(hunter, ["true"], **changes))
        for links in likes(found, uid, confined):
            # Its streams, and the socket to the launcher.
            assert links == ["/dev/null", "pipe", "pipe", "socket"], links

    in_launch(tmp_path, body, filter=filter)


@pytest.mark.parametrize("kernel", ["new", "old"])
@pytest.mark.parametrize(("uid", "confined"), [(0, False), (1000, True)])
def test_who_may_trace_gets_hold_of_no_container_that_starts_beside_it(
    uid: int, confined: bool, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where containers share a PID namespace: one that starts appears in it as what it is going to be. Also before Linux 6.17, where
    a /proc that shows the namespace is one that the pod has had from the beginning."""
    if kernel == "old":
        monkeypatch.setattr(mounts, "shows_other_pids", lambda: False)
    profile = default_profile([name for names in TRACER.values() for name in names])
    filter = asyncio.run(SeccompCompiler(tmp_path / "seccomp").compile(profile))

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        assert pod.pins["pid"].with_name("proc").is_mount() == (kernel == "old" or not mounts.shows_other_pids())
        shared = {"namespaces": namespaces(pid=pod.pins["pid"])}
        code = f"{WAYS}\nWANTED = {WANTED}\n{LOOK}\n{SEIZE}"
        common: dict[str, Any] = {"linux": shared, "capabilities": TRACER, "noNewPrivileges": confined}
        hunter = await launch.start([*PYTHON, code], mounts=python_mounts(), **common)
        user = {"uid": uid, "gid": uid, "additionalGids": [7]}
        found = await held(launch, hunter, lambda: launch.run(["true"], user=user, **common))
        for links in likes(found, uid, confined):
            assert [link.rpartition("/")[2] for link in links] == ["null", "stderr", "stdout", "socket"], links

    in_launch(tmp_path, body, filter=filter)


def likes(found: list[Any], uid: int, confined: bool) -> list[list[str]]:
    """What has been got hold of is no more than a container's process: what descriptors each has, sorted."""
    held_open = []
    for first, now, (links, root, cwd) in found:
        for facts in (first, now):
            if facts["Name"] != "tare-launcher":
                continue  # it was not there yet, or no more
            assert facts["CapBnd"] == format(tracing(), "016x") and facts["CapInh"] == facts["CapAmb"] == "0" * 16
            assert facts["CapPrm"] == facts["CapEff"] == facts["CapBnd"]
            assert facts["Uid"].split() == [str(uid)] * 4 and facts["Groups"].split() == ["7"]
            assert facts["NoNewPrivs"] == str(int(confined)) and facts["Seccomp"] == "2"
        assert (root, cwd) == ("/", "/")
        held_open.append(sorted(link.partition(":")[0] for link in links.values()))
    return held_open


def tracing() -> int:
    """TRACER as a mask."""
    return mask(TRACER["permitted"])[0]


def test_what_it_says_in_the_name_of_its_prey_leads_nowhere(tmp_path: Path) -> None:
    """Not even to another process that would be taken for the exec's: the launcher goes on, and everybody else's marker is what it was."""

    async def body(launch: Launch) -> None:
        code = f"{WAYS}\nWANTED = {WANTED}\n{LIE}\n{SEIZE}"
        neighbour = await launch.start(["sleep", "1000"])
        launcher = launch.pid_of("launcher")
        hunter = await launch.start([*PYTHON, code], mounts=python_mounts(), capabilities=TRACER)
        found = await held(launch, hunter, lambda: launch.exec(hunter, ["true"], capabilities=TRACER))
        told = [treated for _, _, treated in found]
        assert sum(told) >= WANTED // 2, told
        assert (await launch.wait(hunter.process)).code == 0
        assert launch.pid_of("launcher") == launcher and launch.handler.alive(neighbour.process)
        own = f"{neighbour.process.pid}.{neighbour.process.start_time}"
        await until(
            lambda: [path.name for path in (launch.run_directory / "tasks").iterdir()] == [own], "the end of all"
        )
        assert not list((launch.run_directory / "exits").iterdir())
        assert (await launch.exec(neighbour, ["echo", "well"])).out == "well\n"

    in_launch(tmp_path, body)


def before_execve(trace: Trace, pid: int) -> list[Call]:
    """What a process has done until it became the container's program; nothing, while that is not on record."""
    calls = trace.calls().get(pid, [])
    return calls[: next((index for index, call in enumerate(calls) if call.name == "execve" and call.result == "0"), 0)]


def test_a_change_of_user_does_not_open_it_again(tmp_path: Path) -> None:
    """As it would where fs.suid_dumpable is 1. What is hidden once more stays so until the exec."""

    async def body(launch: Launch) -> None:
        user = {"uid": 1000, "gid": 1000}
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            box = await launch.start(["sh", "-c", "echo up; exec sleep 1000"], user=user)
            assert await line(box) == "up"
            made = await launch.begin_exec(box, ["sleep", "1000"], launch.descriptors[0], user=user)
            both = (box.process.pid, made.pid)
            await until(lambda: all(before_execve(trace, pid) for pid in both), "their execve")
        [maker] = [found for found in trace.calls().values() if any(call.name == "clone" for call in found)]
        assert not any(call.name.startswith("setres") for call in before_execve(trace, made.pid))
        for calls in (before_execve(trace, box.process.pid), maker):
            left = [f"{call.name} {call.arguments}" for call in calls]
            changed = max(index for index, call in enumerate(left) if call.startswith(("setres", "setfs")))
            assert any(call.startswith("prctl PR_SET_DUMPABLE, SUID_DUMP_DISABLE") for call in left[changed:]), left

    in_launch(tmp_path, body)


@pytest.mark.parametrize("tracer", [False, True])
def test_the_pid_1_of_a_pod_leads_nowhere(tmp_path: Path, tracer: bool) -> None:
    """Not even for who may trace: its root is empty and read-only, there is no descriptor, and what it executes is sealed."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts", "pid")
        shared = {"namespaces": namespaces(pid=pod.pins["pid"])}
        look = "print(json.dumps({way: attempt(way, 1) for way in WAYS if way not in ('ptrace', 'syscall')}))"
        more = """
for path in ("root", "cwd", "fd"):
    try:
        print(path, os.listdir(f"/proc/1/{path}"))
    except OSError as error:
        print(path, errno.errorcode[error.errno])
for path, flags in (("root/x", os.O_CREAT | os.O_WRONLY), ("cwd/x", os.O_CREAT | os.O_WRONLY), ("exe", os.O_WRONLY)):
    try:
        os.open(f"/proc/1/{path}", flags)
        print(path, "DONE")
    except OSError as error:
        print(path, errno.errorcode[error.errno])
"""
        changes = {"capabilities": TRACER} if tracer else {}
        command = [*PYTHON, f"{WAYS}\n{look}\n{more}"]
        result = await launch.run(command, mounts=python_mounts(), linux=shared, **changes)
        first, *rest = result.out.splitlines()
        ways = json.loads(first)
        assert ways["setns"] == "EPERM" and ways["fd/0"] == ways["fd/2"] == "ENOENT", ways
        if tracer:
            assert ways["exe"] == "DONE", ways  # so it may look, and this is what there is:
            assert rest == ["root []", "cwd []", "fd []", "root/x EROFS", "cwd/x EROFS", "exe ETXTBSY"]
        else:
            assert set(ways.values()) == {"EPERM", "EACCES", "ENOENT"}, ways
            assert rest == ["root EACCES", "cwd EACCES", "fd []", "root/x EACCES", "cwd/x EACCES", "exe EACCES"]
        assert pod.pause is not None and launch.handler.alive(pod.pause)

    in_launch(tmp_path, body)
