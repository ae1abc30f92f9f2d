"""The systemd driver against a real systemd (the node's where there is one, else a manager of the test's own), and where there is none."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jeepney import new_method_call

from tare.cgroups import bpf, systemd_sync
from tare.cgroups.core import Groups
from tare.cgroups.layout import detect
from tare.cgroups.manager import CgroupManager
from tare.cgroups.scopes import SystemdGroups
from tare.cgroups.systemd import MANAGER, Systemd
from tare.cgroups.units import INFINITY, Place, place, resource_properties, scope_properties, slice_properties
from tare.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from tare.runtime.records import Resources
from tare.runtime.spec import resources
from tests.support.systemd import Instance, instance

pytestmark = pytest.mark.root

LIMITS: dict[str, object] = {
    "memory": {"limit": 64 << 20, "swap": 128 << 20, "reservation": 32 << 20},
    "cpu": {"shares": 512, "quota": 25000, "period": 50000, "cpus": "0", "mems": "0"},
    "pids": {"limit": 77},
    "blockIO": {"weight": 500},
    "devices": resources(Resources())["devices"],
    "unified": {"memory.high": "50M", "cpu.max": "max 100000"},
}


@pytest.fixture(name="systemd", scope="module")
def _systemd() -> Iterator[Instance]:
    with instance() as found:
        yield found
        # A slice that systemd made for what was in it stays when it is empty.
        run(found, lambda manager: manager.stop("tare-test.slice"))
        run(found, lambda manager: manager.stop("tare.slice"))


def run(found: Instance, work: Any, timeout: float = 30.0) -> Any:
    """Run `work(systemd)`, connected to the test's own."""

    async def connected() -> Any:
        systemd = Systemd(found.addresses, timeout)
        try:
            return await work(systemd)
        finally:
            await systemd.close()

    return asyncio.run(connected())


def scope(name: str) -> Place:
    return place(f"tare-test.slice:tare:{name}", name)


def group_of(process: subprocess.Popen[str]) -> str:
    """Where the child of a process is in systemd's own hierarchy."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = Path(f"/proc/{children[0]}/cgroup").read_text().splitlines()
    named = [line for line in lines if ":name=systemd:" in line] or [line for line in lines if line.startswith("0::")]
    return named[0].split(":", 2)[2]


def test_a_scope_holds_the_process_that_waited_and_is_gone_with_it(systemd: Instance) -> None:
    where = scope("first")

    async def life(manager: Systemd) -> None:
        assert await manager.version() >= 244
        properties = [*scope_properties(where, "a container", [pid]), *resource_properties(LIMITS, 2)]
        await manager.start(where.unit, properties)
        assert group_of(process) == f"{systemd.group}{where.path}" == await manager.control_group(where.unit)
        with pytest.raises(AlreadyExists, match=r"start unit tare-first\.scope"):
            await manager.start(where.unit, properties)
        assert await manager.property(where.unit, "Scope", "Delegate") is True
        await manager.stop(where.unit)
        await manager.stop(where.unit)
        with pytest.raises(
            FailedPrecondition, match=r"look at unit tare-first\.scope: Unit tare-first\.scope not loaded"
        ):
            await manager.control_group(where.unit)

    with systemd.process() as (pid, process):
        run(systemd, life)
        assert process.wait(20) == 0


def test_systemd_keeps_every_limit_that_is_said_to_it(systemd: Instance) -> None:
    where = scope("limits")
    second = {
        "MemoryMax": 64 << 20,
        "MemorySwapMax": 64 << 20,
        "MemoryLow": 32 << 20,
        "MemoryHigh": 50 << 20,
        "CPUWeight": 59,
        "CPUQuotaPerSecUSec": INFINITY,
        "CPUQuotaPeriodUSec": 100000,
        "AllowedCPUs": b"\x01".ljust(8, b"\0"),
        "AllowedMemoryNodes": b"\x01".ljust(8, b"\0"),
        "TasksMax": 77,
        "IOWeight": 4950,
        "DevicePolicy": "strict",
    }
    first = {
        "MemoryLimit": 64 << 20,
        "CPUShares": 512,
        "CPUQuotaPerSecUSec": 500000,
        "CPUQuotaPeriodUSec": 50000,
        "BlockIOWeight": 500,
    }

    async def life(manager: Systemd) -> None:
        started = [*scope_properties(where, "a container", [pid]), *resource_properties(LIMITS, 2)]
        await manager.start(where.unit, started)
        assert {name: await manager.property(where.unit, "Scope", name) for name in second} == second
        allowed = await manager.property(where.unit, "Scope", "DeviceAllow")
        assert ("/dev/char/1:3", "rwm") in allowed and ("char-136", "rwm") in allowed and ("block-*", "m") in allowed
        await manager.set_properties(where.unit, resource_properties(LIMITS, 1))
        assert {name: await manager.property(where.unit, "Scope", name) for name in first} == first
        open_to_all = {"devices": [{"allow": True, "access": "rwm"}], "pids": {"limit": -1}}
        await manager.set_properties(where.unit, resource_properties(open_to_all, 2))
        assert await manager.property(where.unit, "Scope", "DevicePolicy") == "auto"
        assert await manager.property(where.unit, "Scope", "DeviceAllow") == []
        assert await manager.property(where.unit, "Scope", "TasksMax") == INFINITY
        await manager.set_properties(where.unit, [])
        await manager.stop(where.unit)

    with systemd.process() as (pid, _):
        run(systemd, life)


def test_what_heeds_no_signal_is_ended_at_once(systemd: Instance) -> None:
    """As a process that waits at its barrier: systemd would wait for 90 seconds after its SIGTERM."""
    where = scope("deaf")

    async def life(manager: Systemd) -> None:
        await manager.start(where.unit, scope_properties(where, "a container", [pid]))
        await manager.end(where.unit)
        await manager.end(where.unit)

    deaf = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with systemd.process() as (pid, process):
            run(systemd, life, timeout=20)
            assert process.wait(20) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, deaf)


def test_a_pods_slice(systemd: Instance) -> None:
    where = place("tare.slice:tare:tare-pod1.slice", "pod1")

    async def life(manager: Systemd) -> None:
        await manager.start(where.unit, [*slice_properties(where, "a pod"), *resource_properties(LIMITS, 2)])
        assert await manager.control_group(where.unit) == f"{systemd.group}/tare.slice/tare-pod1.slice"
        assert await manager.property(where.unit, "Slice", "TasksMax") == 77
        await manager.stop(where.unit)

    run(systemd, life)


def test_what_failed_under_a_name_is_cleared_away(systemd: Instance) -> None:
    """A scope without CollectMode whose only process is gone before it starts has failed, and stays until it is reset."""
    where = scope("again")

    async def life(manager: Systemd) -> None:
        broken = [("Slice", ("s", "tare-test.slice"))]
        with pytest.raises((InvalidArgument, FailedPrecondition), match=r"start unit tare-again\.scope"):
            await manager.start(where.unit, broken)
        await manager.start(where.unit, scope_properties(where, "a container", [pid]))
        await manager.stop(where.unit)

    with systemd.process() as (pid, _):
        run(systemd, life)


def test_many_at_once_over_one_connection(systemd: Instance) -> None:
    async def life(manager: Systemd) -> None:
        pods = [place(f"tare.slice:tare:tare-many{number}.slice", "x") for number in range(10)]
        await asyncio.gather(*(manager.start(pod.unit, slice_properties(pod, "one of many")) for pod in pods))
        assert len({await manager.control_group(pod.unit) for pod in pods}) == 10
        await asyncio.gather(*(manager.stop(pod.unit) for pod in pods))

    run(systemd, life)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.start("tare-x.scope", [("NoSuch", ("s", "x"))]), InvalidArgument, "start unit tare-x.scope: .*NoSuch"),
        (lambda m: m.start("x.nothing", []), InvalidArgument, "start unit x.nothing"),
        (lambda m: m.set_properties("absent.scope", [("TasksMax", ("t", 5))]), FailedPrecondition, "change unit absent.scope"),
        (lambda m: m.control_group("absent.slice"), FailedPrecondition, "absent.slice not loaded"),
    ],
)  # fmt: skip
def test_refusals_are_in_systemds_own_words(systemd: Instance, call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(systemd, call)


def kernel_file(groups: Groups, path: str, first: str, second: str) -> str:
    """A limit's file, as either version names it."""
    name = second if groups.layout == "v2" else first
    tree = groups.found.tree_of(name.partition(".")[0])
    assert tree is not None
    return Path(f"{tree.directory}{path}/{name}").read_text().strip()


def device_programs(groups: CgroupManager, path: str) -> set[int]:
    """The programs that decide about devices in a v2 group."""
    unified = groups.found.unified
    assert unified is not None
    group = os.open(unified.directory + path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return set(bpf.attached(group, path))
    finally:
        os.close(group)


def limits(groups: CgroupManager, path: str) -> tuple[str, str, str]:
    return (
        kernel_file(groups, path, "pids.max", "pids.max"),
        kernel_file(groups, path, "memory.limit_in_bytes", "memory.max"),
        kernel_file(groups, path, "memory.memsw.limit_in_bytes", "memory.swap.max"),
    )


@contextmanager
def scoped(systemd: Instance, manager: Systemd) -> Iterator[SystemdGroups]:
    """The daemon's groups. A manager of the test's own has PIDs of its namespace: there nobody joins the other trees."""
    with tempfile.TemporaryDirectory() as run, pytest.MonkeyPatch.context() as patch:
        groups = SystemdGroups(manager, Path(run), above=systemd.group)
        try:
            if not systemd.node:
                patch.setattr("tare.cgroups.driver.join", lambda _group, _pids: None)
            yield groups
        finally:
            groups.close()


def controllable(systemd: Instance) -> bool:
    """A user's manager gives no controllers of v2 unless a system's gives them to it."""
    return systemd.node or detect().kind != "v2"


def test_kernel_and_systemd_are_kept_together(systemd: Instance) -> None:
    """Also when systemd is reloaded."""
    where = scope("driven")
    wanted = {
        "pids": {"limit": 50},
        "memory": {"limit": 64 << 20, "swap": 64 << 20},
        "devices": resources(Resources())["devices"],
    }
    path = f"{systemd.group}{where.path}"
    if not controllable(systemd):
        return

    async def life(manager: Systemd) -> None:
        with scoped(systemd, manager) as groups:
            swap = "0" if groups.layout == "v2" else str(64 << 20)
            assert groups.prepare(path, wanted).join == () and not groups.exists(path)
            place = groups.placing(path, wanted)
            assert place is not None
            try:
                await place(pid)
                assert group_of(process) == path
                assert limits(groups, path) == ("50", str(64 << 20), swap)
                await groups.update(path, {"pids": {"limit": 60}})
                with pytest.raises(InvalidArgument):
                    await groups.update(path, {"pids": {"limit": 70}, "cpu": {"quota": 1}})
                programs = device_programs(groups, path) if groups.layout == "v2" else set()
                async with manager._call("reload") as link:
                    await link.call(new_method_call(MANAGER, "Reload"))
                assert await manager.property(where.unit, "Scope", "TasksMax") == 60
                assert limits(groups, path) == ("60", str(64 << 20), swap)
                if groups.layout == "v2":
                    # systemd's own may be loaded anew; ours stays.
                    assert programs & device_programs(groups, path)
            finally:
                await groups.remove(path)
            await groups.remove(path)
            assert not groups.exists(path)

    with systemd.process() as (pid, process):
        run(systemd, life)


def test_a_scope_whose_limits_are_refused_is_gone_again(systemd: Instance) -> None:
    where = scope("refused")
    path = f"{systemd.group}{where.path}"
    if not controllable(systemd):
        return

    async def life(manager: Systemd) -> None:
        with scoped(systemd, manager) as groups:
            place = groups.placing(path, {"cpu": {"quota": 1}})
            assert place is not None
            with pytest.raises(InvalidArgument, match=r"to '1( 100000)?'"):
                await place(pid)
            with pytest.raises(FailedPrecondition, match="not loaded"):
                await manager.control_group(where.unit)
            assert not groups.exists(path)

    with systemd.process() as (pid, _):
        run(systemd, life)


def test_a_scope_that_was_left_is_taken_away_and_one_in_use_is_not(systemd: Instance) -> None:
    """What is in it counts as its PIDs are in the node's namespace: elsewhere nobody is seen in it, and it is taken for left."""
    where = scope("left")
    path = f"{systemd.group}{where.path}"
    if not controllable(systemd):
        return

    async def life(manager: Systemd) -> None:
        with scoped(systemd, manager) as groups:
            place = groups.placing(path, {})
            assert place is not None
            await place(first)
            if systemd.node:
                with pytest.raises(AlreadyExists):
                    await place(second)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(groups, "processes", lambda _path: [])
                await place(second)
            assert group_of(two) == path and one.wait(20) == 0
            await groups.remove(path)

    with systemd.process() as (first, one), systemd.process() as (second, two):
        run(systemd, life)


def test_a_scope_that_is_made_elsewhere_is_refused(systemd: Instance) -> None:
    """As by a systemd that takes a group for the root that is not."""
    where = scope("elsewhere")
    if not controllable(systemd):
        return

    async def life(manager: Systemd) -> None:
        with scoped(systemd, manager) as groups:
            groups._above = "/another"
            place = groups.placing(f"/another{where.path}", {})
            assert place is not None
            with pytest.raises(FailedPrecondition, match=f"systemd has made it at {systemd.group}{where.path}"):
                await place(pid)
            with pytest.raises(FailedPrecondition, match="not loaded"):
                await manager.control_group(where.unit)
            await groups.remove(f"/another{where.path}")

    with systemd.process() as (pid, _):
        run(systemd, life)


def test_a_pods_slice_is_made_where_there_is_none_and_kept_while_it_is_used(systemd: Instance) -> None:
    if not controllable(systemd):
        return

    async def life(manager: Systemd) -> None:
        with scoped(systemd, manager) as groups:
            pod = groups.resolve_parent("", "/tare-pod7")
            assert pod == f"{systemd.group}/tare.slice/tare-pod7.slice"
            container = groups.container_path(pod, "abc")
            assert container == f"{pod}/tare-abc.scope"
            with pytest.raises(InvalidArgument, match="is no slice of systemd's"):
                groups.resolve_parent("/kubepods/pod7", "/tare-pod7")
            made = groups.missing_groups(pod)
            assert await groups.make_parent(pod) is True
            assert await groups.make_parent(pod) is False
            place = groups.placing(container, {})
            assert place is not None
            await place(pid)
            assert await groups.remove_parent(pod) is False
            await groups.remove(container)
            for group in made:
                assert await groups.remove_parent(group) is True
            assert await groups.remove_parent(pod) is True
            assert not groups.exists(pod)

    with systemd.process() as (pid, _):
        run(systemd, life)


def test_a_command_makes_changes_and_stops_a_scope(systemd: Instance) -> None:
    """By the node's own systemd, which there may not be."""
    if not systemd.node:
        with pytest.raises(FailedPrecondition, match=r"kill unit tare-absent\.scope: no systemd is to be reached"):
            systemd_sync.stop_scope("tare-absent.scope")
        return
    where = scope("command")
    groups = Groups()
    with systemd.process() as (pid, process):
        group = systemd_sync.start_scope(groups, where, "a container", pid, {"pids": {"limit": 50}})
        assert (group.path, group_of(process)) == (where.path, where.path)
        assert systemd_sync.update_scope(groups, where.unit, group.path, {"pids": {"limit": 60}}) == ()
        assert kernel_file(groups, group.path, "pids.max", "pids.max") == "60"
        systemd_sync.stop_scope(where.unit)
        systemd_sync.stop_scope(where.unit)
        assert process.wait(20) == 0 and not groups.exists(where.path)
    groups.close()


def test_no_systemd(tmp_path: Path) -> None:
    def failing(work: Coroutine[Any, Any, Any]) -> None:
        with pytest.raises(FailedPrecondition, match=r"no systemd is to be reached \(.*No such file.*cgroupfs"):
            asyncio.run(work)

    failing(Systemd([f"unix:path={tmp_path}/bus"]).start("a.scope", []))
    failing(Systemd([f"unix:path={tmp_path}/bus"]).stop("a.scope"))


def test_a_bus_without_systemd(tmp_path: Path) -> None:
    address = f"unix:path={tmp_path}/bus"
    config = tmp_path / "bus.conf"
    config.write_text(
        f"<busconfig><type>session</type><listen>{address}</listen><auth>EXTERNAL</auth>"
        '<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>'
    )
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"], stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    try:
        assert address.encode() in daemon.stdout.readline()
        with pytest.raises(FailedPrecondition, match=r"org.freedesktop.systemd1 was not provided"):
            asyncio.run(Systemd([address]).version())
    finally:
        daemon.kill()
        daemon.wait(20)
        daemon.stdout.close()


def test_one_who_does_not_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/bus")
        listener.listen()
        with pytest.raises(DeadlineExceeded, match=r"stop unit a.scope: systemd has not answered in 0.05 s"):
            asyncio.run(Systemd([f"unix:path={tmp_path}/bus"], timeout=0.05).stop("a.scope"))


def test_a_connection_that_breaks_is_made_anew() -> None:
    async def life(found: Instance) -> None:
        manager = Systemd(found.addresses)
        try:
            await manager.version()
            link = manager._link
            assert link is not None
            link._writer.transport.abort()
            with pytest.raises(Unavailable, match="the connection to systemd broke"):
                await manager.stop("absent.scope")
            await manager.stop("absent.scope")
        finally:
            await manager.close()

    with instance() as found:
        asyncio.run(life(found))
