"""Namespaces that containers share: pinned, entered, let go of; and the PID 1 of a pod's shared PID namespace, which has nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from tare.handlers.builtin import Process
from tare.handlers.channel import Refused
from tare.launch import linux
from tests.support import leaks
from tests.support.launch import Launch, in_launch, line, namespaces, status, until
from tests.support.mounts import mount_table, mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
NOBODY = str(0xFFFFFFFD)


def zombies(parent: int) -> list[int]:
    """Children of a process that it has not reaped."""
    found = []
    for process in leaks.processes():
        if process.parent == parent and not process.command:
            facts = Path(f"/proc/{process.pid}/status")
            if facts.exists() and status(facts.read_text()).get("State", "").startswith("Z"):
                found.append(process.pid)
    return found


def test_pins_hold_namespaces_without_a_process(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts")
        assert pod.pause is None and set(pod.pins) == {"net", "ipc", "uts"}
        for kind, pin in pod.pins.items():
            assert os.path.ismount(pin) and pin.stat().st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
        assert launch.pid_of("pod") == 0
        await launch.remove_pod(pod)
        assert not any(pin.exists() for pin in pod.pins.values()) and not mounts_below(launch.run_directory)

    in_launch(tmp_path, body)


def test_removal_is_idempotent_and_takes_stacked_pins(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "uts")
        linux.mount(b"/proc/self/ns/uts", bytes(pod.pins["uts"]), None, linux.MS_BIND)
        await launch.handler.remove_pod_namespaces("p0", pod.pause)
        await launch.handler.remove_pod_namespaces("p0", pod.pause)
        await launch.handler.remove_pod_namespaces("never-was", None)
        assert not mounts_below(launch.run_directory)
        launch.pods.clear()

    in_launch(tmp_path, body)


def test_the_netlink_socket_is_in_the_new_namespace(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        (launch.run_directory / "pods/n").mkdir()
        made = await launch.handler.pod_namespaces("n", kinds=frozenset({"net"}), hostname="", sysctls={})
        try:
            assert made.netlink is not None
            assert (made.netlink.family, made.netlink.proto) == (socket.AF_NETLINK, socket.NETLINK_ROUTE)
            # struct nlmsghdr for RTM_GETLINK, dump; then struct ifinfomsg. A new network namespace has lo alone.
            made.netlink.send(b"\x20\0\0\0\x12\0\x01\x03\x01\0\0\0\0\0\0\0" + bytes(16))
            answer = made.netlink.recv(1 << 16)
            assert b"lo\0" in answer and answer.count(b"\x10\0") >= 1 and b"eth" not in answer
            assert not made.netlink.get_inheritable()
        finally:
            if made.netlink is not None:
                made.netlink.close()
            await launch.handler.remove_pod_namespaces("n", None)

    in_launch(tmp_path, body)


def test_sysctls_are_the_pods(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        settings = {"net.ipv4.ip_unprivileged_port_start": "7", "kernel.shmmax": "12345"}
        before = {name: Path("/proc/sys", *name.split(".")).read_text() for name in settings}
        pod = await launch.pod("net", "ipc", sysctls=settings)
        joined = {"namespaces": namespaces(network=pod.pins["net"], ipc=pod.pins["ipc"])}
        files = ["/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/kernel/shmmax"]
        assert (await launch.run(["cat", *files], linux=joined)).out == "7\n12345\n"
        assert {name: Path("/proc/sys", *name.split(".")).read_text() for name in settings} == before

    in_launch(tmp_path, body)


def test_a_sysctl_that_is_refused_names_itself_and_leaves_nothing(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        (launch.run_directory / "pods/s").mkdir()
        for name, value, errno in (("net.ipv4.no_such", "1", 2), ("net.ipv4.ip_forward", "many", 22)):
            with pytest.raises(Refused) as caught:
                await launch.handler.pod_namespaces(
                    "s", kinds=frozenset({"net", "pid"}), hostname="", sysctls={name: value}
                )
            assert caught.value.step == f"set sysctl {name}" and caught.value.errno == errno
            await launch.handler.remove_pod_namespaces("s", None)
        assert not mounts_below(launch.run_directory) and launch.pid_of("pod") == 0

    in_launch(tmp_path, body)


def test_pid_1_of_a_pod_has_nothing(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts", "pid")
        assert pod.pause is not None
        entry = Path(f"/proc/{pod.pause.pid}")
        await until(lambda: status((entry / "status").read_text())["Seccomp"] == "2", "its filter")
        facts = status((entry / "status").read_text())
        assert facts["Uid"].split() == facts["Gid"].split() == [NOBODY] * 4 and facts["Groups"] == ""
        assert {facts[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (facts["NoNewPrivs"], facts["Seccomp"], facts["Threads"]) == ("1", "2", "1")
        assert facts["NSpid"].split()[-1] == "1" and int(facts["SigIgn"], 16) == 0
        assert os.listdir(entry / "fd") == [] and os.listdir(entry / "root") == []
        assert (entry / "environ").stat().st_uid == 0  # not dumpable: else it would be its own user's
        mounts = mount_table((entry / "mountinfo").read_text())
        assert list(mounts) == ["/"] and {"ro", "nosuid", "nodev", "noexec"} <= mounts["/"].flags
        assert (entry / "comm").read_text() == "tare-pod\n"
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        assert fields[2] == fields[3] == str(pod.pause.pid)  # process group and session
        rollup = (entry / "smaps_rollup").read_text()
        private = sum(int(row.split()[1]) for row in rollup.splitlines() if row.startswith("Private_"))
        assert private < 2500  # kB; what is shared with the launcher costs nothing

    in_launch(tmp_path, body)


def test_pid_1_of_a_pod_reaps_orphans(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        assert pod.pause is not None
        shared = {"namespaces": namespaces(pid=pod.pins["pid"])}
        script = "for i in $(seq 30); do (sleep 0 &); done; (sleep 777 &); echo $$; sleep 1000"
        box = await launch.start(["sh", "-c", script], linux=shared)
        assert int(await line(box)) > 1
        pause = pod.pause.pid
        await until(lambda: orphans(pause) != [], "the orphan")
        await until(lambda: zombies(pause) == [] and len(orphans(pause)) == 1, "the reaping of the others")
        [orphan] = orphans(pause)
        os.kill(orphan, 9)
        await until(lambda: not Path(f"/proc/{orphan}").exists(), "the reaping of the last")

    in_launch(tmp_path, body)


def orphans(pause: int) -> list[int]:
    """The long sleepers whose parent is PID 1."""
    return [p.pid for p in leaks.processes() if p.parent == pause and p.command.split()[1:] == ["777"]]


async def gone(process: Process) -> None:
    """A process has ended when this is called, and is reaped when it returns."""
    entry = Path(f"/proc/{process.pid}/status")
    if entry.exists():
        assert status(entry.read_text())["State"].startswith(("Z", "X"))
    await until(lambda: not entry.exists(), "the reaping")


@pytest.mark.parametrize("known", [True, False])
def test_removal_ends_the_namespace_with_all_in_it(tmp_path: Path, known: bool) -> None:
    async def body(launch: Launch) -> None:
        other = await launch.pod("pid")
        pod = await launch.pod("pid", "uts")
        box = await launch.start(SLEEP, linux={"namespaces": namespaces(pid=pod.pins["pid"])})
        inner = await launch.start(SLEEP, linux={"namespaces": namespaces(pid=pod.pins["pid"])})
        assert pod.pause is not None and other.pause is not None
        await launch.remove_pod(pod, known=known)
        await gone(pod.pause)
        for one in (box, inner):
            end = await launch.wait(one.process)
            assert (end.code, end.signal, end.known) == (137, 9, True)
        assert launch.handler.alive(other.pause)
        assert not list((launch.run_directory / "exits").iterdir())

    in_launch(tmp_path, body)


def test_removal_after_the_launchers_death(tmp_path: Path) -> None:
    """Nobody has its name any more, and the keeper is its parent."""

    async def body(launch: Launch) -> None:
        pods = [await launch.pod("pid"), await launch.pod("pid")]
        await launch.kill_ours("launcher")
        for pod, known in zip(pods, (True, False), strict=True):
            assert pod.pause is not None and launch.handler.alive(pod.pause)
            await launch.remove_pod(pod, known=known)
            await gone(pod.pause)
        assert not list((launch.run_directory / "exits").iterdir())

    in_launch(tmp_path, body)


def test_the_end_of_pid_1_is_told_at_once_with_its_code(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        assert pod.pause is not None
        waiting = asyncio.ensure_future(launch.handler.wait(pod.pause))
        await asyncio.sleep(0)
        os.kill(pod.pause.pid, 9)
        async with asyncio.timeout(1):
            end = await waiting
        assert (end.code, end.signal, end.known) == (137, 9, True)
        assert not launch.handler.alive(pod.pause)

    in_launch(tmp_path, body)


def test_keeper_and_launcher_stay_while_a_pod_has_its_pid_1(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        assert not await launch.handler.quit()
        assert pod.pause is not None and launch.handler.alive(pod.pause)

    in_launch(tmp_path, body)


def test_a_process_of_the_pod_cannot_look_into_its_pid_1(tmp_path: Path) -> None:
    """Not even as root: there is nothing to see, no descriptor to take, and signals from inside do not reach it."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        assert pod.pause is not None
        shared = {"namespaces": namespaces(pid=pod.pins["pid"])}
        script = "cat /proc/1/environ; ls /proc/1/root /proc/1/fd; readlink /proc/1/exe; kill -9 1; kill -TERM 1; sleep 0.1; echo $$"
        result = await launch.run(["sh", "-c", script], linux=shared)
        assert result.out.startswith("/proc/1/fd:\n") and len(result.out.splitlines()) == 2, result
        assert result.err.count("Permission denied") == 2, result
        assert launch.handler.alive(pod.pause)

    in_launch(tmp_path, body)


def test_a_pid_namespace_of_another_container(tmp_path: Path) -> None:
    """CRI's TARGET: its processes are seen and can be signalled, and its end is the end of both."""

    async def body(launch: Launch) -> None:
        target = await launch.start(["sh", "-c", "trap 'exit 44' TERM; while :; do sleep 0.05; done"])
        joined = {"namespaces": namespaces(pid=f"/proc/{target.process.pid}/ns/pid")}
        looking = await launch.run(["sh", "-c", "ps -o pid,args | head -2; echo $$"], linux=joined)
        assert "1 sh -c trap" in looking.out and int(looking.out.splitlines()[-1]) > 1
        other = await launch.start(SLEEP, linux=joined)
        assert (await launch.run(["kill", "-TERM", "1"], linux=joined)).code == 0
        assert (await launch.wait(target.process)).code == 44
        end = await launch.wait(other.process)
        assert (end.code, end.signal) == (137, 9)
        gone = {"namespaces": namespaces(pid=f"/proc/{target.process.pid}/ns/pid")}
        with pytest.raises(Exception, match="open pid namespace"):
            await launch.start(SLEEP, linux=gone)

    in_launch(tmp_path, body)


def test_a_pid_namespace_whose_first_process_is_gone(tmp_path: Path) -> None:
    """It is pinned, but no process can be made in it any more."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        assert isinstance(pod.pause, Process)
        launch.handler.signal(pod.pause, 9)
        await launch.handler.wait(pod.pause)
        with pytest.raises(Exception, match="join pid namespace: Cannot allocate memory"):
            await launch.start(SLEEP, linux={"namespaces": namespaces(pid=pod.pins["pid"])})

    in_launch(tmp_path, body)
