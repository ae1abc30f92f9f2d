"""The systemd driver against a real systemd (the node's where there is one, else a manager of the test's own), and where there is none."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from jeepney import new_method_call

from tare.cgroups import bpf
from tare.cgroups.driver import SystemdDriver
from tare.cgroups.manager import CgroupManager
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
        "IOWeight": 500,
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


def kernel_file(groups: CgroupManager, path: str, first: str, second: str) -> str:
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


def test_the_driver_keeps_kernel_and_systemd_together(systemd: Instance) -> None:
    """Also when systemd is reloaded. A manager of the test's own has PIDs of its namespace: there nobody joins the other trees."""
    where = scope("driven")
    groups = CgroupManager()
    devices = resources(Resources())["devices"]
    wanted = {"pids": {"limit": 50}, "memory": {"limit": 64 << 20, "swap": 64 << 20}, "devices": devices}
    swap = "0" if groups.layout == "v2" else str(64 << 20)
    path = f"{systemd.group}{where.path}"
    if groups.layout == "v2" and not systemd.node:
        # A user's manager gives no controllers unless a system's gives them to it.
        groups.close()
        return

    async def life(manager: Systemd) -> None:
        driver = SystemdDriver(manager, groups)
        try:
            with pytest.MonkeyPatch.context() as patch:
                if not systemd.node:
                    patch.setattr("tare.cgroups.driver.join", lambda _group, _pids: None)
                group = await driver.start(where, "a container", [pid], wanted)
            assert group.path == path == group_of(process)
            assert limits(groups, group.path) == ("50", str(64 << 20), swap)
            await driver.update(where, group.path, {"pids": {"limit": 60}})
            with pytest.raises(InvalidArgument):
                await driver.update(where, group.path, {"pids": {"limit": 70}, "cpu": {"quota": 1}})
            programs = device_programs(groups, group.path) if groups.layout == "v2" else set()
            async with manager._call("reload") as link:
                await link.call(new_method_call(MANAGER, "Reload"))
            assert await manager.property(where.unit, "Scope", "TasksMax") == 60
            assert limits(groups, group.path) == ("60", str(64 << 20), swap)
            if groups.layout == "v2":
                # systemd's own may be loaded anew; ours stays.
                assert programs & device_programs(groups, group.path)
        finally:
            await driver.remove(where, path)
        await driver.remove(where, path)
        assert not groups.exists(path)

    try:
        with systemd.process() as (pid, process):
            run(systemd, life)
    finally:
        groups.close()


def test_a_scope_whose_limits_are_refused_is_gone_again(systemd: Instance) -> None:
    where = scope("refused")
    groups = CgroupManager()
    if groups.layout == "v2" and not systemd.node:
        groups.close()
        return

    async def life(manager: Systemd) -> None:
        with pytest.raises(InvalidArgument, match=r"to '1( 100000)?'"):
            await SystemdDriver(manager, groups).start(where, "a container", [pid], {"cpu": {"quota": 1}})
        with pytest.raises(FailedPrecondition, match="not loaded"):
            await manager.control_group(where.unit)
        assert not groups.exists(f"{systemd.group}{where.path}")

    try:
        with systemd.process() as (pid, _):
            run(systemd, life)
    finally:
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
