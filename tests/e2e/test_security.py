"""CRI's security context through the gRPC socket of a real daemon, as a container sees it from the inside."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
Security = pb.LinuxContainerSecurityContext
Profile = pb.SecurityProfile
DISK = next(path for path in sorted(Path("/dev").iterdir()) if path.is_block_device())
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("secure") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def pod_of(node: Node, name: str, *, privileged: bool = False, **options: Any) -> str:
    """A pod's ID; `options` are its NamespaceOption's."""
    config = node.pod_config(name)
    config.linux.security_context.privileged = privileged
    config.linux.security_context.namespace_options.MergeFrom(pb.NamespaceOption(**options))
    return node.run_pod(config)


def told(
    node: Node, script: str, security: Security | None = None, *, privileged: bool = False, **config: Any
) -> list[str]:
    """What a script in a container of its own pod writes."""
    pod = pod_of(node, f"told-{next(NUMBERS)}", privileged=privileged)
    container = node.start(
        node.create(pod, node.container_config("main", "sh", "-c", script, security=security, **config))
    )
    status = node.wait(container)
    lines = node.log(container)
    assert status.exit_code == 0, lines
    return lines


def refused(node: Node, status: str, words: str, security: Security, **config: Any) -> None:
    """A container must be refused by CreateContainer."""
    pod = pod_of(node, f"refused-{next(NUMBERS)}")
    node.refused(status, words, node.create, pod, node.container_config("main", "true", security=security, **config))


def user(uid: int | None = None, gid: int | None = None, **more: Any) -> Security:
    """A security context with IDs."""
    numbers = {"run_as_user": uid, "run_as_group": gid}
    given = {name: pb.Int64Value(value=value) for name, value in numbers.items() if value is not None}
    return Security(**given, **more)  # type: ignore[arg-type]


# Who it is

IDENTITY = "id -u; id -g; grep ^Groups /proc/self/status | cut -f2"


@pytest.mark.parametrize(
    ("security", "lines"),
    [
        (Security(), ["0", "0", "0"]),
        (user(1000), ["1000", "0", "0"]),
        (user(1000, 2000), ["1000", "2000", "2000"]),
        (user(1), ["1", "1", "1 50"]),
        (user(1, supplemental_groups=[7]), ["1", "1", "1 7 50"]),
        (user(1, supplemental_groups=[7], supplemental_groups_policy=pb.Strict), ["1", "1", "1 7"]),
        (user(run_as_username="daemon"), ["1", "1", "1 50"]),
        (user(run_as_username="daemon", gid=9, supplemental_groups_policy=pb.Strict), ["1", "9", "9"]),
    ],
    ids=["root", "user", "group", "merged", "supplemented", "strict", "named", "named and strict"],
)
def test_users_and_groups(node: Node, security: Security, lines: list[str]) -> None:
    found = told(node, IDENTITY, security)
    assert [found[0], found[1], " ".join(sorted(found[2].split(), key=int))] == lines


def test_users_that_are_refused(node: Node) -> None:
    refused(node, "INVALID_ARGUMENT", "run_as_group", user(gid=5))
    refused(node, "INVALID_ARGUMENT", "there is no user 'nobody-such'", user(run_as_username="nobody-such"))
    refused(node, "INVALID_ARGUMENT", "run_as_username", user(1, run_as_username="daemon"))


# What it may do


def capabilities(text: str) -> dict[str, int]:
    """The sets in /proc/self/status, by their names there."""
    return {line.split(":")[0]: int(line.split()[1], 16) for line in text.splitlines() if line.startswith("Cap")}


def test_capabilities_are_added_dropped_and_ambient(node: Node) -> None:
    add = pb.Capability(add_capabilities=["NET_ADMIN"], drop_capabilities=["chown", "CAP_KILL"])
    found = capabilities("\n".join(told(node, "grep ^Cap /proc/self/status", Security(capabilities=add))))
    assert found["CapEff"] == found["CapBnd"] == 0xA80425FB & ~(1 << 0) & ~(1 << 5) | 1 << 12
    assert found["CapInh"] == found["CapAmb"] == 0
    ambient = pb.Capability(drop_capabilities=["ALL"], add_ambient_capabilities=["NET_RAW"])
    security = user(1000, capabilities=ambient)
    found = capabilities("\n".join(told(node, "grep ^Cap /proc/self/status", security)))
    assert set(found.values()) == {1 << 13}


def test_no_new_privileges(node: Node) -> None:
    assert told(node, "grep NoNewPrivs /proc/self/status | cut -f2", Security(no_new_privs=True)) == ["1"]


def test_a_privileged_container_has_it_all(node: Node) -> None:
    script = "grep -E 'CapEff|Seccomp:' /proc/self/status | cut -f2; touch /sys/kernel/mm/x 2>&1 | grep -c Read-only; ls /dev | grep -cx fuse"
    security = Security(
        privileged=True,
        masked_paths=["/proc/interrupts"],
        readonly_paths=["/proc/sys"],
        seccomp=Profile(profile_type=Profile.RuntimeDefault),
    )
    script += "; stat -c %t,%T /proc/interrupts; mkdir /tmp/m && mount -t tmpfs none /tmp/m && echo mounted; true"
    found = told(node, script, security, privileged=True)
    own = capabilities(Path("/proc/self/status").read_text())["CapBnd"]
    assert int(found[0], 16) == own  # what the node itself lacks is not to be had
    assert found[1:3] == ["0", "0"]
    assert found[3] == str(int(Path("/dev/fuse").exists()))
    assert found[4:] == ["0,0", "mounted"]


def test_a_privileged_container_is_for_a_privileged_pod(node: Node) -> None:
    refused(node, "INVALID_ARGUMENT", "it is privileged, and its pod is not", Security(privileged=True))


def test_masked_and_readonly_paths(node: Node) -> None:
    script = "exec 2>/dev/null; cat /proc/timer_list | wc -c; echo 1 > /proc/sys/kernel/domainname && echo wrote || echo refused"
    script += "; stat -c %t,%T /proc/interrupts"
    closed = Security(masked_paths=["/proc/interrupts", "/proc/timer_list"], readonly_paths=["/proc/sys"])
    assert told(node, script, closed) == ["0", "refused", "1,3"]
    unmasked = told(node, script, Security())
    assert int(unmasked[0]) > 0 and unmasked[1:] == ["wrote", "0,0"]


def test_a_read_only_root_with_what_is_mounted_in_it(node: Node, tmp_path: Path) -> None:
    mount = pb.Mount(container_path="/data", host_path=str(tmp_path))
    script = "exec 2>/dev/null; touch /x || echo closed; touch /data/x /dev/shm/x && echo open; touch /etc/hosts || echo closed"
    assert told(node, script, Security(readonly_rootfs=True), mounts=[mount])[-3:] == [
        "closed",
        "open",
        "closed",
    ]


# What it sees of the node


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Path]:
    """A directory with another file system mounted in it, at below/."""
    (tmp_path / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "below")], check=True, timeout=10)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path / "below")], check=True, timeout=10)


WRITES = "touch /m/x 2>/dev/null && echo top; touch /m/below/x 2>/dev/null && echo below; true"


@pytest.mark.parametrize(
    ("options", "writable"),
    [
        ({}, ["top", "below"]),
        ({"readonly": True}, ["below"]),
        ({"readonly": True, "recursive_read_only": True}, []),
    ],
    ids=["writable", "read-only", "recursively"],
)
def test_read_only_mounts(node: Node, nested: Path, options: dict[str, bool], writable: list[str]) -> None:
    assert told(node, WRITES, mounts=[pb.Mount(container_path="/m", host_path=str(nested), **options)]) == writable  # type: ignore[arg-type]


def test_recursive_read_only_has_rules(node: Node, tmp_path: Path) -> None:
    for more in ({}, {"readonly": True, "propagation": pb.PROPAGATION_HOST_TO_CONTAINER}):
        mount = pb.Mount(container_path="/m", host_path=str(tmp_path), recursive_read_only=True, **more)  # type: ignore[arg-type]
        refused(node, "INVALID_ARGUMENT", "recursive_read_only", Security(), mounts=[mount])


def test_mount_options(node: Node, tmp_path: Path) -> None:
    mount = pb.Mount(container_path="/m", host_path=str(tmp_path), mount_options=["nosuid", "nodev", "noexec"])
    assert {"nosuid", "nodev", "noexec"} <= set(
        told(node, "grep ' /m ' /proc/mounts | cut -d' ' -f4", mounts=[mount])[0].split(",")
    )
    wrong = pb.Mount(container_path="/m", host_path=str(tmp_path), mount_options=["size=1"])
    refused(node, "INVALID_ARGUMENT", "'size=1' is not an option", Security(), mounts=[wrong])


def test_propagation(node: Node, tmp_path: Path) -> None:
    subprocess.run(["mount", "--bind", "--make-shared", str(tmp_path), str(tmp_path)], check=True, timeout=10)
    try:
        pod = pod_of(node, "spread", privileged=True)
        seen = {}
        for name, propagation in (("private", 0), ("slave", 1), ("shared", 2)):
            mount = pb.Mount(container_path="/m", host_path=str(tmp_path), propagation=propagation)  # type: ignore[arg-type]
            security = Security(privileged=True)
            seen[name] = node.start(
                node.create(pod, node.container_config(name, "sleep", "100", mounts=[mount], security=security))
            )
        (tmp_path / "in").mkdir()
        (tmp_path / "out").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "in")], check=True, timeout=10)
        counts = {name: node.exec(one, "grep", "-c", " /m/in ", "/proc/mounts").stdout for name, one in seen.items()}
        assert counts == {"private": b"0\n", "slave": b"1\n", "shared": b"1\n"}
        for one in seen.values():
            assert node.exec(one, "mount", "-t", "tmpfs", "none", "/m/out").exit_code == 0
        mounted = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{tmp_path}/out " in line]
        assert len(mounted) == 1
    finally:
        node.remove_all()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith(str(tmp_path)):
                subprocess.run(["umount", "-l", line.split()[4]], check=True, timeout=10)


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [("private", {0}), ("unbindable", {0}), ("slave", {0, 1}), ("shared", {0, 1, 2})],
)
def test_propagation_needs_a_mount_that_spreads(node: Node, tmp_path: Path, kind: str, allowed: set[int]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
    # A mount is a slave only of one that is shared.
    subprocess.run(["mount", "--bind", "--make-shared", str(first), str(first)], check=True, timeout=10)
    subprocess.run(["mount", "--bind", str(first), str(second)], check=True, timeout=10)
    try:
        subprocess.run(["mount", f"--make-{kind}", str(second)], check=True, timeout=10)
        pod = pod_of(node, f"spread-{kind}")
        for propagation in range(3):
            mount = pb.Mount(container_path="/m", host_path=f"{second}/", propagation=propagation)  # type: ignore[arg-type]
            config = node.container_config(f"main-{propagation}", "true", mounts=[mount])
            if propagation in allowed:
                node.create(pod, config)
                continue
            words = f"is on a mount that is {'slave' if kind == 'slave' else 'private'}, not shared"
            node.refused("FAILED_PRECONDITION", words, node.create, pod, config)
    finally:
        for path in (second, first):
            subprocess.run(["umount", "-l", str(path)], check=True, timeout=10)


def test_devices_have_their_permissions(node: Node) -> None:
    devices = [
        pb.Device(container_path="/dev/asked", host_path="/dev/null", permissions="rwm"),
        pb.Device(container_path="/dev/read", host_path=str(DISK), permissions="r"),
    ]
    script = "exec 2>/dev/null; echo x > /dev/asked && echo wrote; (true >> /dev/read) || echo refused; (true < /dev/read) && echo read"
    assert told(node, script, devices=devices) == ["wrote", "refused", "read"]
    numbers = DISK.stat().st_rdev
    script = f"mknod /tmp/disk b {os.major(numbers)} {os.minor(numbers)} && echo made; (true < /tmp/disk) 2>/dev/null || echo refused"
    assert told(node, script) == ["made", "refused"]


# Namespaces

KINDS = ("net", "ipc", "uts", "pid", "cgroup", "mnt", "user")


def namespaces(lines: Sequence[str]) -> dict[str, str]:
    """What readlink says of each kind."""
    return dict(zip(KINDS, lines, strict=True))


def of_the_node(kind: str) -> str:
    """The node's own."""
    return os.readlink(f"/proc/self/ns/{kind}")


LINKS = "; ".join(f"readlink /proc/self/ns/{kind}" for kind in KINDS)


def container_in(node: Node, pod: str, name: str, *command: str, **options: Any) -> str:
    """A running container with these namespace options."""
    security = Security(namespace_options=pb.NamespaceOption(**options))
    return node.start(node.create(pod, node.container_config(name, *command, security=security)))


def links(node: Node, container: str) -> dict[str, str]:
    return namespaces(node.exec(container, "sh", "-c", LINKS).stdout.decode().split())


def test_namespaces_of_containers_in_a_pod(node: Node) -> None:
    pod = pod_of(node, "apart")
    first, second = (
        links(node, container_in(node, pod, name, "sleep", "100", pid=pb.CONTAINER)) for name in ("first", "second")
    )
    for kind in KINDS:
        assert (first[kind] == second[kind]) is (kind in ("net", "ipc", "uts", "user"))
        assert (first[kind] == of_the_node(kind)) is (kind == "user")


def test_namespaces_of_the_node(node: Node) -> None:
    pod = pod_of(node, "node", network=pb.NODE, ipc=pb.NODE, pid=pb.NODE)
    found = links(node, container_in(node, pod, "main", "sleep", "100", network=pb.NODE, ipc=pb.NODE, pid=pb.NODE))
    assert {kind for kind in KINDS if found[kind] == of_the_node(kind)} == {"net", "ipc", "uts", "pid", "user"}


def test_a_container_in_the_processes_of_another(node: Node) -> None:
    pod = pod_of(node, "target")
    target = container_in(node, pod, "target", "sleep", "4321", pid=pb.CONTAINER)
    guest = container_in(node, pod, "guest", "sleep", "100", pid=pb.TARGET, target_id=target)
    assert links(node, guest)["pid"] == links(node, target)["pid"]
    assert "sleep 4321" in node.exec(guest, "ps", "-o", "args").stdout.decode()
    security = Security(namespace_options=pb.NamespaceOption(pid=pb.TARGET, target_id=target))
    late = node.create(pod, node.container_config("late", "true", security=security))
    node.stop(target, 0)
    node.refused("FAILED_PRECONDITION", "whose PID namespace it is to share, has ended", node.start, late)
    config = node.container_config("later", "true", security=security)
    node.refused("FAILED_PRECONDITION", "EXITED", node.create, pod, config)
    security.namespace_options.target_id = "0" * 64
    config = node.container_config("lost", "true", security=security)
    node.refused("NOT_FOUND", "0" * 64, node.create, pod, config)


# Profiles


def test_seccomp(node: Node, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    denied = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}))
    script = (
        "grep ^Seccomp: /proc/self/status | cut -f2; mkdir /tmp/x && echo made; unshare -U true && echo unshared; true"
    )
    for security, lines in (
        (Security(), ["0", "made", "unshared"]),
        (Security(seccomp=Profile(profile_type=Profile.Unconfined)), ["0", "made", "unshared"]),
        (Security(seccomp=Profile(profile_type=Profile.RuntimeDefault)), ["2", "made"]),
        (Security(seccomp=Profile(profile_type=Profile.Localhost, localhost_ref=str(profile))), ["2", "unshared"]),
        (Security(seccomp_profile_path=f"localhost/{profile}"), ["2", "unshared"]),
        (Security(seccomp_profile_path="runtime/default"), ["2", "made"]),
    ):
        found = told(node, script, security)
        assert [line for line in found if ": " not in line] == lines


def test_seccomp_profiles_that_are_refused(node: Node, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.json")
    security = Security(seccomp=Profile(profile_type=Profile.Localhost, localhost_ref=absent))
    refused(node, "INVALID_ARGUMENT", absent, security)


if not Path("/sys/module/apparmor").exists():

    def test_apparmor_where_there_is_none(node: Node) -> None:
        for security in (
            Security(apparmor=Profile(profile_type=Profile.RuntimeDefault)),
            Security(apparmor=Profile(profile_type=Profile.Unconfined)),
            Security(apparmor_profile="runtime/default"),
            Security(apparmor_profile="unconfined"),
        ):
            assert told(node, "echo fine", security) == ["fine"]
        for security in (
            Security(apparmor=Profile(profile_type=Profile.Localhost, localhost_ref="mine")),
            Security(apparmor_profile="localhost/mine"),
        ):
            refused(node, "FAILED_PRECONDITION", "this node's kernel does not have AppArmor", security)
        config = node.pod_config("pod")
        config.linux.security_context.apparmor.CopyFrom(Profile(profile_type=Profile.Localhost, localhost_ref="mine"))
        node.refused("FAILED_PRECONDITION", "this node's kernel does not have AppArmor", node.run_pod, config)


@pytest.mark.skipif(Path("/sys/fs/selinux/enforce").exists(), reason="this kernel has SELinux on")
def test_selinux_where_it_is_off(node: Node, tmp_path: Path) -> None:
    options = pb.SELinuxOption(level="s0:c1,c2")
    refused(node, "FAILED_PRECONDITION", "SELinux is off on this node", Security(selinux_options=options))
    config = node.pod_config("pod")
    config.linux.security_context.selinux_options.CopyFrom(options)
    node.refused("FAILED_PRECONDITION", "SELinux is off on this node", node.run_pod, config)
    mount = pb.Mount(container_path="/m", host_path=str(tmp_path), selinux_relabel=True)
    assert told(node, "touch /m/x; echo fine", Security(selinux_options=pb.SELinuxOption()), mounts=[mount]) == ["fine"]
    assert os.listxattr(tmp_path) == []


# The node


def status(node: Node) -> pb.StatusResponse:
    client = node.daemon.client
    reply: pb.StatusResponse = client.call(client.runtime.Status, pb.StatusRequest(verbose=True))
    return reply


def ready(node: Node) -> pb.RuntimeCondition:
    """Its RuntimeReady."""
    return next(item for item in status(node).status.conditions if item.type == "RuntimeReady")


def test_features_are_what_this_kernel_allows(node: Node) -> None:
    found = status(node)
    assert found.features.supplemental_groups_policy and found.features.mount_options
    features = {handler.name: handler.features for handler in found.runtime_handlers}
    assert features[""] == features["builtin"]
    assert features[""].recursive_read_only_mounts
    assert features[""].user_namespaces and found.features.user_namespaces_host_network
    assert json.loads(found.info["info"])["unsupported"] == {}
    assert os.listdir(node.daemon.run / "pods") == []


def test_the_runtime_is_not_ready_while_its_launcher_does_not_answer(node: Node) -> None:
    assert ready(node) == pb.RuntimeCondition(type="RuntimeReady", status=True)
    launcher = int((node.daemon.run / "launcher.pid").read_text().split()[0])
    os.kill(launcher, signal.SIGSTOP)
    try:
        found = ready(node)
        assert (found.status, found.reason) == (False, "LauncherNotReady")
        assert "the launcher has not answered" in found.message
    finally:
        os.kill(launcher, signal.SIGCONT)
    assert ready(node).status
    os.kill(launcher, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not ready(node).status:
        assert time.monotonic() < deadline
