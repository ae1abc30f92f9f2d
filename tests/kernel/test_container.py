"""What a process finds itself to be when a container begins: looked at from the node, where /proc says it exactly."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tare.handlers.capabilities import CAPABILITY_BITS
from tare.handlers.compile import Filter
from tare.launch import credentials
from tests.support.launch import CAPABILITIES, Box, Launch, in_launch, namespaces, python_mounts, status

pytestmark = pytest.mark.root

ALLOW_ALL = Filter(program=b"\x06\x00\x00\x00\x00\x00\xff\x7f")
SLEEP = ["sleep", "1000"]
PYTHON = ["/usr/bin/python3", "-I", "-c"]
KEYRING = (
    "import ctypes; print(ctypes.CDLL(None).syscall(250, 0, -3, 0))"  # keyctl(KEYCTL_GET_KEYRING_ID, session keyring)
)


def proc(box: Box, name: str) -> Path:
    """A file of /proc/PID."""
    return Path(f"/proc/{box.process.pid}/{name}")


def state(box: Box) -> dict[str, str]:
    """/proc/PID/status."""
    return status(proc(box, "status").read_text())


def masks(box: Box) -> dict[str, int]:
    """The five capability sets."""
    return {key: int(value, 16) for key, value in state(box).items() if key.startswith("Cap")}


def bits(*names: str) -> int:
    """A capability mask."""
    return sum(CAPABILITY_BITS[name] for name in names)


def test_signals_session_and_descriptors(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        facts = state(box)
        for mask in ("SigIgn", "SigBlk", "SigCgt", "SigPnd", "ShdPnd"):
            assert int(facts[mask], 16) == 0, mask
        assert facts["Umask"] == "0022"
        assert facts["NSpid"].split() == [str(box.process.pid), "1"]
        assert facts["Threads"] == "1"
        fields = proc(box, "stat").read_text().rpartition(")")[2].split()
        group, session, terminal = (int(field) for field in fields[2:5])
        assert (group, session, terminal) == (box.process.pid, box.process.pid, 0)
        streams = launch.run_directory / "containers" / box.id
        # By identity: a path that leads over a mount of the node's reads differently from inside.
        opened = {fd.name: (fd.stat().st_dev, fd.stat().st_ino) for fd in proc(box, "fd").iterdir()}
        logs = {name: (streams / file).stat() for name, file in (("1", "stdout"), ("2", "stderr"))}
        assert opened.keys() == {"0", "1", "2"}
        assert proc(box, "fd/0").readlink() == Path("/dev/null")
        assert {name: opened[name] for name in logs} == {name: (st.st_dev, st.st_ino) for name, st in logs.items()}
        flags = {fd: int(proc(box, f"fdinfo/{fd}").read_text().split()[3], 8) for fd in range(3)}
        assert flags[0] & os.O_ACCMODE == os.O_RDONLY
        assert flags[1] & os.O_ACCMODE == flags[2] & os.O_ACCMODE == os.O_RDWR
        assert not any(value & os.O_NONBLOCK for value in flags.values())

    in_launch(tmp_path, body)


def test_ignored_signals_of_the_daemon_are_not_inherited(tmp_path: Path) -> None:
    """A daemon under nohup or a service manager ignores some."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    }
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        assert int(state(box)["SigIgn"], 16) == int(state(box)["SigBlk"], 16) == 0

    try:
        in_launch(tmp_path, body)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_identity_and_capabilities_of_root(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, user={"uid": 0, "gid": 0, "additionalGids": [7, 4242]})
        facts = state(box)
        assert facts["Uid"].split() == ["0"] * 4 and facts["Gid"].split() == ["0"] * 4
        assert facts["Groups"].split() == ["7", "4242"]
        wanted = bits(*CAPABILITIES)
        assert masks(box) == {"CapInh": 0, "CapPrm": wanted, "CapEff": wanted, "CapBnd": wanted, "CapAmb": 0}
        assert facts["NoNewPrivs"] == "1" and facts["Seccomp"] == "0"

    in_launch(tmp_path, body)


def test_identity_and_capabilities_of_a_user(tmp_path: Path) -> None:
    """Without ambient ones a user has none; ambient ones are the only inheritable ones (CVE-2022-29162)."""

    async def body(launch: Launch) -> None:
        plain = await launch.start(SLEEP, user={"uid": 1000, "gid": 1001, "umask": 0o077})
        facts = state(plain)
        assert facts["Uid"].split() == ["1000"] * 4 and facts["Gid"].split() == ["1001"] * 4
        assert facts["Groups"] == "" and facts["Umask"] == "0077"
        bounding = bits(*CAPABILITIES)
        assert masks(plain) == {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": bounding, "CapAmb": 0}
        names = ["CAP_NET_BIND_SERVICE"]
        sets = dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), names)
        ambient = await launch.start(SLEEP, user={"uid": 1000, "gid": 1001}, capabilities=sets)
        one = bits(*names)
        assert masks(ambient) == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), one)

    in_launch(tmp_path, body)


def test_no_capability_at_all(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, capabilities={})
        assert set(masks(box).values()) == {0}

    in_launch(tmp_path, body)


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_is_loaded_and_privileges_cannot_come_back(tmp_path: Path, no_new_privileges: bool) -> None:
    async def body(launch: Launch) -> None:
        user = {"uid": 33, "gid": 33}
        box = await launch.start(SLEEP, user=user, noNewPrivileges=no_new_privileges)
        facts = state(box)
        assert facts["Seccomp"] == "2" and facts["Seccomp_filters"] == "1"
        assert facts["NoNewPrivs"] == str(int(no_new_privileges))
        assert facts["Uid"].split() == ["33"] * 4

    in_launch(tmp_path, body, filter=ALLOW_ALL)


def refusing(*numbers: int) -> Filter:
    """BPF that answers EPERM to these system calls and allows all others."""
    lines = [(0x20, 0, 0, 0)]
    lines += [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]
    return Filter(program=b"".join(struct.pack("<HBBI", *line) for line in lines))


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_that_knows_no_new_system_calls_does_not_hinder_the_start(
    tmp_path: Path, no_new_privileges: bool
) -> None:
    """close_range, sendmsg, recvmsg, openat, mmap, munmap, getcwd, write: none of them is needed once a filter is loaded."""
    filter = refusing(436, 46, 47, 257, 9, 11, 79, 1)

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, noNewPrivileges=no_new_privileges)
        assert state(box)["Seccomp"] == "2"

    in_launch(tmp_path, body, filter=filter)


def test_session_keyrings_are_new(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        mounts = python_mounts()
        one = await launch.run([*PYTHON, KEYRING], mounts=mounts)
        two = await launch.run([*PYTHON, KEYRING], mounts=mounts)
        box = await launch.start(SLEEP, mounts=mounts)
        three = await launch.exec(box, [*PYTHON, KEYRING])
        ours = subprocess.check_output([*PYTHON, KEYRING], text=True)
        serials = {int(text) for text in (ours, one.out, two.out, three.out)}
        assert len(serials) == 4 and all(serial > 0 for serial in serials)

    in_launch(tmp_path, body)


def test_the_environment_is_exactly_what_was_asked_for(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        os.environ["TARE_SECRET"] = "must not leak"
        try:
            box = await launch.start(SLEEP, env=["PATH=/bin", "A=1", "A=2", "EMPTY=", "B=\udcff é"])
        finally:
            del os.environ["TARE_SECRET"]
        assert proc(box, "environ").read_bytes() == b"PATH=/bin\0A=1\0A=2\0EMPTY=\0B=\xff \xc3\xa9\0"
        assert proc(box, "cmdline").read_bytes() == b"sleep\x001000\0"
        bare = await launch.start(["/bin/sleep", "1000"], env=[])
        assert proc(bare, "environ").read_bytes() == b""

    in_launch(tmp_path, body)


def test_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(launch: Launch) -> None:
        wanted = [
            {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 600},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_CPU", "soft": 10000, "hard": (1 << 64) - 1},
        ]
        box = await launch.start(SLEEP, rlimits=wanted)
        table = limits(box)
        assert table["Max open files"] == ("512", "600") and table["Max core file size"] == ("0", "0")
        assert table["Max cpu time"] == ("10000", "unlimited")
        usual = await launch.start(SLEEP)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert limits(usual)["Max open files"] == (str(soft), str(hard))

    in_launch(tmp_path, body)


def limits(box: Box) -> dict[str, tuple[str, str]]:
    """/proc/PID/limits."""
    lines = proc(box, "limits").read_text().splitlines()[1:]
    return {line[:25].strip(): (line[26:46].strip(), line[47:67].strip()) for line in lines}


def has_capability(number: int) -> bool:
    """Whether this process has a capability."""
    return bool(int(status(Path("/proc/self/status").read_text())["CapEff"], 16) >> number & 1)


def test_what_the_node_does_not_permit_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node in a container lacks CAP_SYS_RESOURCE: hard limits stay, and no process gets a lower OOM score."""

    async def body(launch: Launch) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = [{"type": "RLIMIT_NOFILE", "soft": hard + 5, "hard": hard + 10}]
        box = await launch.start(SLEEP, rlimits=wanted, oomScoreAdj=-500)
        if has_capability(credentials.CAP_SYS_RESOURCE):
            assert limits(box)["Max open files"] == (str(hard + 5), str(hard + 10))
            assert proc(box, "oom_score_adj").read_text() == "-500\n"
            return
        assert limits(box)["Max open files"] == (str(hard), str(hard))
        words = [record.getMessage() for record in caplog.records]
        assert f"container {box.id}: RLIMIT_NOFILE of {hard + 10} is not permitted here, it stays {hard}" in words
        assert f"container {box.id}: oom_score_adj -500 is not permitted here" in words

    with caplog.at_level(logging.WARNING):
        in_launch(tmp_path, body)


def test_oom_score(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, oomScoreAdj=321)
        assert proc(box, "oom_score_adj").read_text() == "321\n"

    in_launch(tmp_path, body)


def inode(path: Path | str) -> int:
    """A namespace's number."""
    return os.stat(path).st_ino


def test_namespaces_are_new_or_the_pods_or_the_nodes(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        own = await launch.start(SLEEP)
        for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
            assert inode(proc(own, f"ns/{kind}")) != inode(f"/proc/self/ns/{kind}"), kind
        assert inode(proc(own, "ns/user")) == inode("/proc/self/ns/user")
        pod = await launch.pod("net", "ipc", "uts", "pid")
        joined = namespaces(network=pod.pins["net"], ipc=pod.pins["ipc"], uts=pod.pins["uts"], pid=pod.pins["pid"])
        shared = await launch.start(SLEEP, linux={"namespaces": joined})
        for kind in ("net", "ipc", "uts", "pid"):
            assert inode(proc(shared, f"ns/{kind}")) == inode(pod.pins[kind]), kind
        node = await launch.start(SLEEP, linux={"namespaces": namespaces(network=None, ipc=None, uts=None, pid=None)})
        for kind in ("net", "ipc", "uts", "pid"):
            assert inode(proc(node, f"ns/{kind}")) == inode(f"/proc/self/ns/{kind}"), kind

    in_launch(tmp_path, body)


def test_host_names(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("uts", hostname="web-1")
        result = await launch.run(["uname", "-n"], linux={"namespaces": namespaces(uts=pod.pins["uts"])})
        assert result.out == "web-1\n"
        assert (await launch.run(["uname", "-n"])).out.strip() == os.uname().nodename

    in_launch(tmp_path, body)


def test_a_host_name_of_the_containers_own(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        identity, overlay, ends = launch.place()
        spec = launch.spec(["uname", "-n"]) | {"hostname": "alone"}
        made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
        await launch.wait(made)
        assert os.read(ends["stdout"], 100) == b"alone\n" and os.uname().nodename != "alone"

    in_launch(tmp_path, body)


def test_the_working_directory_is_made(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, cwd="/srv/deep/er", user={"uid": 1000, "gid": 1000})
        made = box.upper / "srv/deep/er"
        assert stat.S_IMODE(made.stat().st_mode) == 0o755 and made.stat().st_uid == 0
        assert proc(box, "cwd").readlink() == Path("/srv/deep/er")
        there = await launch.run(["pwd"], cwd="/tmp")
        assert there.out == "/tmp\n"

    in_launch(tmp_path, body)


def test_streams_belong_to_the_user(tmp_path: Path) -> None:
    """A user opens /dev/stdout again by its name, and no reader means no SIGPIPE."""

    async def body(launch: Launch) -> None:
        script = "echo out >/dev/stdout; echo err >/dev/stderr; read word </dev/stdin; echo $word; exit 3"
        box = await launch.start(["sh", "-c", script], user={"uid": 1000, "gid": 1000}, stdin=True)
        assert os.fstat(box.streams["stdout"]).st_uid == 1000
        os.write(box.streams["stdin"], b"hello\n")
        result = await launch.finish(box)
        assert (result.code, result.out, result.err) == (3, "out\nhello\n", "err\n")

    in_launch(tmp_path, body)


def test_output_without_a_reader_is_no_broken_pipe(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(["sh", "-c", "read go; echo one; echo two >&2; exit 4"], stdin=True)
        for name in ("stdout", "stderr"):
            os.dup2(box.streams["stdin"], box.streams[name])
        os.write(box.streams["stdin"], b"go\n")
        assert (await launch.wait(box.process)).code == 4

    in_launch(tmp_path, body)


def test_exit_codes_and_signals(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for code in (0, 1, 127, 255):
            result = await launch.run(["sh", "-c", f"exit {code}"])
            assert (result.code, result.signal) == (code, 0)
        pod = await launch.pod("pid")
        shared = {"namespaces": namespaces(pid=pod.pins["pid"])}
        for number in (1, 6, 9, 11, 15):
            result = await launch.run(["sh", "-c", f"kill -{number} $$; sleep 1000"], linux=shared)
            assert (result.code, result.signal) == (128 + number, number)
        box = await launch.start(SLEEP)
        assert launch.handler.alive(box.process)
        assert launch.handler.signal(box.process, 9)
        end = await launch.wait(box.process)
        assert (end.code, end.signal, end.known) == (137, 9, True)
        assert not launch.handler.alive(box.process) and not launch.handler.signal(box.process, 9)

    in_launch(tmp_path, body)


def test_exits_are_on_record_until_they_are_forgotten(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(["sh", "-c", "exit 9"])
        name = f"{box.process.pid}.{box.process.start_time}"
        first = await launch.handler.wait(box.process)
        again = await launch.new_handler().wait(box.process)
        assert first.code == again.code == 9 and first.finished_at == again.finished_at
        assert (launch.run_directory / "exits" / name).exists()
        assert not (launch.run_directory / "tasks" / name).exists()
        await launch.wait(box.process)
        assert not (launch.run_directory / "exits" / name).exists()

    in_launch(tmp_path, body)


def test_a_process_is_told_of_while_it_waits_at_its_gate(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    async def body(launch: Launch) -> None:
        def look(process: object) -> None:
            pid = process.pid  # type: ignore[attr-defined]
            marker = any(launch.run_directory.glob(f"tasks/{pid}.*"))
            seen.append((Path(f"/proc/{pid}/comm").read_text().strip(), marker))

        await launch.run(["true"], on_created=look)

    in_launch(tmp_path, body)
    assert seen == [("tare-launcher", True)]


def test_control_groups_are_joined(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        launch.descriptors.append(null)
        box = await launch.start(SLEEP, resources={"pids": {"limit": 20}})
        paths = [line.split(":", 2)[2] for line in proc(box, "cgroup").read_text().splitlines()]
        assert all(path.endswith(f"/{box.id}") for path in paths) and paths
        result = await launch.exec(box, ["cat", "/proc/self/cgroup"])
        assert {line.split(":", 2)[2] for line in result.out.splitlines()} == {"/"}  # its own cgroup namespace
        other = await launch.begin_exec(box, SLEEP, null)
        theirs = Path(f"/proc/{other.pid}/cgroup").read_text()
        assert theirs == proc(box, "cgroup").read_text()

    in_launch(tmp_path, body, cgroups=True)


def test_many_at_once(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        results = await asyncio.gather(*(launch.run(["sh", "-c", f"echo {n}; exit {n}"]) for n in range(20)))
        assert [(result.code, result.out) for result in results] == [(n, f"{n}\n") for n in range(20)]

    in_launch(tmp_path, body)
