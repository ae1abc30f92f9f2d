"""Pods with a user namespace through the gRPC socket of a real daemon: whose their processes and files are, inside and on the node."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.images import File
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
Security = pb.LinuxContainerSecurityContext
FIRST, SIZE = 300_000, 65_536
NUMBERS = itertools.count(1)
OWNED = {"srv/mine": File(data=b"mine\n", uid=1000, gid=1001), "srv/roots": File(data=b"roots\n")}


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("userns", extra=[OWNED]) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def mapping(first: int = FIRST, inside: int = 0, size: int = SIZE) -> pb.IDMapping:
    return pb.IDMapping(host_id=first, container_id=inside, length=size)


def mapped(first: int = FIRST) -> pb.UserNamespace:
    return pb.UserNamespace(mode=pb.POD, uids=[mapping(first)], gids=[mapping(first)])


def pod_config(
    node: Node, name: str = "", *, user: pb.UserNamespace | None = None, privileged: bool = False, **options: Any
) -> pb.PodSandboxConfig:
    """A pod with a user namespace; `options` are further NamespaceOptions."""
    config = node.pod_config(name or f"pod-{next(NUMBERS)}")
    config.linux.security_context.privileged = privileged
    namespaces = config.linux.security_context.namespace_options
    for name, mode in options.items():
        setattr(namespaces, name, mode)
    namespaces.userns_options.CopyFrom(user or mapped())
    return config


def running(node: Node, pod: str, name: str, *command: str, security: Security | None = None, **more: Any) -> str:
    """A running container's ID, with the user namespace asked for as a kubelet does."""
    security = security or Security()
    options = node.pod_status(pod).linux.namespaces.options
    security.namespace_options.userns_options.CopyFrom(options.userns_options)
    if not security.namespace_options.target_id:
        security.namespace_options.pid = options.pid
    return node.start(node.create(pod, node.container_config(name, *command, security=security, **more)))


def told(node: Node, pod: str, name: str, script: str, **more: Any) -> list[str]:
    """What a script in a container writes."""
    container = running(node, pod, name, "sh", "-c", script, **more)
    status = node.wait(container)
    lines = node.log(container)
    assert status.exit_code == 0, lines
    return lines


def shell(node: Node, container: str, script: str) -> str:
    """What a script that is executed in a container writes."""
    reply = node.exec(container, "sh", "-c", script)
    assert reply.exit_code == 0, reply
    return reply.stdout.decode().strip()


def pid_of(node: Node, container: str) -> int:
    client = node.daemon.client
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info = client.call(client.runtime.ContainerStatus, request).info["info"]
    return int(json.loads(info)["pid"])


def group_of(node: Node, pod: str) -> str:
    """The logger that serves the pod."""
    client = node.daemon.client
    info = client.call(
        client.runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    ).info["info"]
    return str(json.loads(info)["loggerGroup"])


# Who it is


def test_root_of_a_pod_is_somebody_else_on_the_node(node: Node) -> None:
    pod = node.run_pod(pod_config(node))
    container = running(node, pod, "main", "sleep", "100")
    assert (
        shell(node, container, "cat /proc/self/uid_map /proc/self/gid_map").split() == ["0", str(FIRST), str(SIZE)] * 2
    )
    assert shell(node, container, "id -u; id -g") == "0\n0"
    status = Path(f"/proc/{pid_of(node, container)}/status").read_text()
    assert re.search(rf"^Uid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}$", status, re.M)
    assert re.search(rf"^Gid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}$", status, re.M)
    options = node.pod_status(pod).linux.namespaces.options.userns_options
    assert options == mapped()


def test_containers_of_a_pod_share_the_user_namespace_and_what_it_owns(node: Node) -> None:
    pod = node.run_pod(pod_config(node, pid=pb.POD))
    one, two = (running(node, pod, name, "sleep", "4242") for name in ("one", "two"))
    for kind in ("user", "net", "ipc", "uts", "pid"):
        link = f"readlink /proc/self/ns/{kind}"
        assert shell(node, one, link) == shell(node, two, link) != os.readlink(f"/proc/self/ns/{kind}")
    assert shell(node, one, "ps -o args | grep -c '^sleep 4242'") == "2"
    last = SIZE - 1  # whom the pod's own PID 1 is: there is no ID that nobody can have in a user namespace
    assert shell(node, one, "stat -c %u:%g /proc/1; grep CapEff /proc/1/status | cut -f2") == f"{last}:{last}\n{0:016x}"


def test_other_users_are_mapped_and_write_to_their_streams(node: Node) -> None:
    pod = node.run_pod(pod_config(node))
    security = Security(
        run_as_user=pb.Int64Value(value=1000), run_as_group=pb.Int64Value(value=1001), supplemental_groups=[7]
    )
    script = "id -u; id -g; grep Groups /proc/self/status | cut -f2; echo again > /dev/stdout; echo worse > /dev/stderr"
    found = told(node, pod, "main", script, security=security)
    assert [line.strip() for line in found] == ["1000", "1001", "7 1001", "again", "worse"]


def test_a_user_that_is_not_mapped_is_refused(node: Node) -> None:
    pod = node.run_pod(pod_config(node))
    security = Security(run_as_user=pb.Int64Value(value=SIZE))
    config = node.container_config("main", "true", security=security)
    node.refused("INVALID_ARGUMENT", f"user {SIZE} is not mapped", node.create, pod, config)


# Files


def test_the_images_files_have_the_images_owners_and_no_copy_is_made(node: Node) -> None:
    pod = node.run_pod(pod_config(node))
    container = running(node, pod, "main", "sleep", "100")
    assert shell(node, container, "stat -c %u:%g /srv/mine /srv/roots /") == "1000:1001\n0:0\n0:0"
    shell(node, container, "echo new > /srv/new; echo more >> /srv/mine; chown 5:6 /srv/roots; mkdir /d && rmdir /d")
    assert shell(node, container, "stat -c %u:%g /srv/new /srv/mine /srv/roots") == "0:0\n1000:1001\n5:6"
    upper = next((node.daemon.root / "containers").glob(f"{container}/**/srv"))
    owners = {path.name: (path.stat().st_uid - FIRST, path.stat().st_gid - FIRST) for path in upper.iterdir()}
    assert owners == {"new": (0, 0), "mine": (1000, 1001), "roots": (5, 6)}
    layers = list((node.daemon.root / "layers").glob("**/srv/mine"))
    assert [(path.stat().st_uid, path.read_bytes()) for path in layers] == [(1000, b"mine\n")]


def test_the_pods_files_are_the_pods_roots(node: Node) -> None:
    config = pod_config(node, name="files")
    pod = node.run_pod(config)
    paths = "/etc/hosts /etc/hostname /etc/resolv.conf /dev/shm /dev/null /dev/pts"
    script = f"stat -c %u:%g {paths} | sort -u; echo 10.9.8.7 x >> /etc/hosts; grep -c 10.9.8.7 /etc/hosts; echo y > /dev/shm/y"
    assert told(node, pod, "one", script)[-1] == "1"
    assert told(node, pod, "two", "stat -c %u /etc/hosts /dev/shm /dev/shm/y; cat /dev/shm/y; hostname") == [
        "0"
    ] * 3 + ["y", "files"]


def test_volumes_with_mappings_are_mapped_and_others_are_not(node: Node, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    owned = tmp_path / "owned"
    owned.write_text("x")
    os.chown(owned, 1000, 1001)
    mounts = [
        pb.Mount(container_path="/mapped", host_path=str(tmp_path), uidMappings=[mapping()], gidMappings=[mapping()]),
        pb.Mount(container_path="/plain", host_path=str(tmp_path)),
    ]
    pod = node.run_pod(pod_config(node))
    script = "stat -c %u:%g /mapped/owned /plain/owned; touch /mapped/new; touch /plain/also; stat -c %u:%g /mapped/new /plain/also"
    found = told(node, pod, "main", script, mounts=mounts)
    assert found == ["1000:1001", "65534:65534", "0:0", "0:0"]
    assert ((tmp_path / "new").stat().st_uid, (tmp_path / "also").stat().st_uid) == (0, FIRST)


def test_a_mapped_volume_is_mapped_with_what_is_mounted_in_it(node: Node, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "below")], check=True, timeout=10)
    try:
        (tmp_path / "below" / "x").touch()
        mount = pb.Mount(container_path="/m", host_path=str(tmp_path), uidMappings=[mapping()], gidMappings=[mapping()])
        pod = node.run_pod(pod_config(node))
        assert told(node, pod, "main", "stat -c %u:%g /m/below/x", mounts=[mount]) == ["0:0"]
    finally:
        node.remove_all()
        subprocess.run(["umount", "-l", str(tmp_path / "below")], check=True, timeout=10)


def test_a_file_system_that_cannot_be_mapped_is_an_error(node: Node) -> None:
    mount = pb.Mount(container_path="/m", host_path="/sys/kernel", uidMappings=[mapping()], gidMappings=[mapping()])
    pod = node.run_pod(pod_config(node))
    container = node.create(pod, node.container_config("main", "true", mounts=[mount]))
    node.refused("INTERNAL", "/m", node.start, container)
    assert node.status(container).reason == "StartError"


def test_an_image_volume_has_the_images_owners(node: Node) -> None:
    mount = pb.Mount(container_path="/image", image=pb.ImageSpec(image=node.image), readonly=True)
    pod = node.run_pod(pod_config(node))
    script = "stat -c %u:%g /image/srv/mine /image/srv/roots; touch /image/x 2>/dev/null || echo closed"
    assert told(node, pod, "main", script, mounts=[mount]) == ["1000:1001", "0:0", "closed"]


# What it may do


def test_root_of_a_pod_rules_the_pods_network_and_no_other(node: Node) -> None:
    pod = node.run_pod(pod_config(node))
    security = Security(capabilities=pb.Capability(add_capabilities=["NET_ADMIN"]))
    container = running(node, pod, "main", "sleep", "100", security=security)
    address = node.pod_status(pod).network.ip
    assert f"inet {address}/" in shell(node, container, "ip -4 -o addr show eth0")
    shell(node, container, "ip link add dummy0 type veth peer name dummy1; ip link set lo mtu 1400")
    gateway = shell(node, container, "ip route | grep default | cut -d' ' -f3")
    shell(node, container, f"ping -c 1 -W 5 {gateway}")


def test_a_privileged_container_in_a_user_namespace_is_privileged_there(node: Node) -> None:
    pod = node.run_pod(pod_config(node, privileged=True))
    script = (
        "exec 2>&1; grep CapEff /proc/self/status | cut -f2; mkdir /tmp/m && mount -t tmpfs none /tmp/m && echo mounted"
    )
    script += "; echo x > /proc/sysrq-trigger || echo refused; test -c /dev/null && echo device"
    found = told(node, pod, "main", script, security=Security(privileged=True))
    assert int(found[0], 16).bit_count() > 30
    assert (found[1], found[-2], found[-1]) == ("mounted", "refused", "device")


def test_kernel_settings_of_a_pod(node: Node) -> None:
    config = pod_config(node)
    config.linux.sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
    config.linux.sysctls["kernel.shm_rmid_forced"] = "1"
    pod = node.run_pod(config)
    found = told(
        node, pod, "main", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"
    )
    assert found == ["0", "1"]


def test_devices_come_from_the_node(node: Node) -> None:
    device = pb.Device(container_path="/dev/asked", host_path="/dev/null", permissions="rwm")
    pod = node.run_pod(pod_config(node))
    script = "echo x > /dev/asked && echo wrote; stat -c %t,%T /dev/asked /dev/null /dev/urandom; head -c 4 /dev/urandom | wc -c"
    assert told(node, pod, "main", script, devices=[device]) == ["wrote", "1,3", "1,3", "1,9", "4"]


def test_a_terminal(node: Node) -> None:
    pod = node.run_pod(pod_config(node))
    security = Security(run_as_user=pb.Int64Value(value=1000))
    found = told(node, pod, "main", "tty; echo err > $(tty); stat -c %u $(tty)", security=security, tty=True)
    assert [line.rstrip("\r") for line in found][1:] == ["err", "1000"]


def test_the_nodes_network(node: Node) -> None:
    pod = node.run_pod(pod_config(node, network=pb.NODE))
    assert node.pod_status(pod).network.ip == ""
    container = running(node, pod, "main", "sleep", "100")
    assert shell(node, container, "readlink /proc/self/ns/net") == os.readlink("/proc/self/ns/net")
    options = shell(node, container, "grep ' /sys ' /proc/mounts | cut -d' ' -f4").split(",")
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
    writable = "grep -E ' /sys[ /]' /proc/self/mountinfo | cut -d' ' -f6 | grep -v ^ro; true"
    assert shell(node, container, writable) == ""
    assert shell(node, container, "ls /sys/class/net | grep -cx lo") == "1"
    assert "not permitted" in shell(node, container, "ip link set lo mtu 1400 2>&1; true")


def test_the_nodes_message_queues(node: Node) -> None:
    pod = node.run_pod(pod_config(node, ipc=pb.NODE))
    container = running(node, pod, "main", "sleep", "100")
    assert shell(node, container, "readlink /proc/self/ns/ipc") == os.readlink("/proc/self/ns/ipc")


def test_a_container_in_the_processes_of_another(node: Node) -> None:
    pod = node.run_pod(pod_config(node, pid=pb.CONTAINER))
    target = running(node, pod, "target", "sleep", "4321")
    security = Security(namespace_options=pb.NamespaceOption(pid=pb.TARGET, target_id=target))
    guest = running(node, pod, "guest", "sleep", "100", security=security)
    assert "sleep 4321" in shell(node, guest, "ps -o args")


# Ends and restarts


def test_a_pod_goes_on_when_the_daemon_is_killed(node: Node) -> None:
    pod = node.run_pod(pod_config(node, pid=pb.POD))
    first = running(
        node, pod, "first", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo hi; while true; do sleep 0.05; done"
    )
    node.wait_for_log(first, "hi")
    node.daemon.kill()
    node.daemon.start()
    assert node.pod_status(pod).state == pb.SANDBOX_READY
    assert shell(node, first, "id -u; cat /proc/self/uid_map").split() == ["0", "0", str(FIRST), str(SIZE)]
    assert told(node, pod, "second", "id -u") == ["0"]
    node.stop(first)
    assert (node.status(first).exit_code, node.log(first)) == (3, ["hi", "bye"])


def test_a_daemon_that_dies_over_a_pod_leaves_nothing_of_it(node: Node) -> None:
    node.daemon.kill()
    node.daemon.start({"TARE_FAILPOINTS": "RunPodSandbox.namespaces.after=kill"})
    try:
        node.refused("UNAVAILABLE", "", node.run_pod, pod_config(node, pid=pb.POD))
        process = node.daemon.process
        assert process is not None and process.wait(timeout=10) == -signal.SIGKILL
        assert [path for path in (node.daemon.run / "pods").glob("*/user") if os.path.ismount(path)]
    finally:
        node.daemon.kill()
        node.daemon.start()
    assert node.settled() == []


def test_loggers_are_not_shared_with_other_mappings(node: Node) -> None:
    plain = node.run_pod("plain")
    pods = [node.run_pod(pod_config(node, user=user)) for user in (mapped(), mapped(), mapped(FIRST + SIZE))]
    groups = [group_of(node, pod) for pod in (plain, *pods)]
    assert len(set(groups)) == 3
    assert groups[1] == groups[2]


# What is refused


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (pb.UserNamespace(mode=pb.POD), "has one mapping, not 0"),
        (
            pb.UserNamespace(mode=pb.POD, uids=[mapping(), mapping(FIRST + SIZE, SIZE)], gids=[mapping()]),
            "one mapping, not 2",
        ),
        (
            pb.UserNamespace(mode=pb.POD, uids=[mapping(inside=1)], gids=[mapping()]),
            "ID 0 of the container is not mapped",
        ),
        (pb.UserNamespace(mode=pb.NODE, uids=[mapping()], gids=[mapping()]), "takes no mappings"),
        (pb.UserNamespace(mode=pb.CONTAINER), "cannot be CONTAINER"),
        (pb.UserNamespace(mode=pb.TARGET), "cannot be TARGET"),
    ],
)
def test_mappings_that_are_refused(node: Node, user: pb.UserNamespace, words: str) -> None:
    node.refused("INVALID_ARGUMENT", words, node.run_pod, pod_config(node, user=user))


def test_a_container_with_other_mappings_than_its_pods_is_refused(node: Node) -> None:
    pod, plain = node.run_pod(pod_config(node)), node.run_pod("plain")
    for where, user in ((pod, mapped(FIRST + SIZE)), (pod, pb.UserNamespace(mode=pb.NODE)), (plain, mapped())):
        security = Security(namespace_options=pb.NamespaceOption(userns_options=user))
        config = node.container_config("main", "true", security=security)
        node.refused("INVALID_ARGUMENT", "its user namespace is not its pod's", node.create, where, config)


def test_the_nodes_processes_are_refused(node: Node) -> None:
    node.refused("INVALID_ARGUMENT", "the node's PID namespace", node.run_pod, pod_config(node, pid=pb.NODE))
