"""Devices by name (CDI) through the gRPC socket of a real daemon: what they bring into a container, and files that change meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
DISK = next(path for path in sorted(Path("/dev").iterdir()) if path.is_block_device())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cdi")


@pytest.fixture(scope="module")
def shared(directory: Path) -> Iterator[Node]:
    with busy_node("cdi", settings=f'[runtime]\ncdi_spec_dirs = ["{directory}/fixed", "{directory}/made"]\n') as node:
        yield node


@pytest.fixture
def node(shared: Node, directory: Path) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    for name in ("fixed", "made"):
        (directory / name).mkdir(exist_ok=True)
    yield shared
    shared.remove_all()
    for path in directory.glob("*/*.*"):
        path.unlink()
    assert shared.settled() == []


def describe(path: Path, *devices: dict[str, Any], version: str = "0.7.0", **common: Any) -> None:
    """Write a file of vendor.com/thing."""
    value = {"cdiVersion": version, "kind": "vendor.com/thing", "devices": devices, "containerEdits": common}
    path.write_text(json.dumps(value))


def device(name: str, **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits}


def created(node: Node, pod: str, name: str, script: str, *names: str, **more: Any) -> str:
    """A container with these devices, CREATED."""
    devices = [pb.CDIDevice(name=device) for device in names]
    return node.create(pod, node.container_config(name, "sh", "-c", script, CDI_devices=devices, **more))


def told(node: Node, pod: str, name: str, script: str, *names: str, **more: Any) -> list[str]:
    """What a script in a container with these devices writes."""
    container = node.start(created(node, pod, name, script, *names, **more))
    status = node.wait(container)
    lines = node.log(container)
    assert status.exit_code == 0, lines
    return lines


def test_a_device_brings_its_node_mounts_variables_groups_and_hooks(
    node: Node, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "library").write_text("code\n")
    mark = tmp_path / "mark"
    hook = {
        "hookName": "createRuntime",
        "path": "/bin/sh",
        "args": ["sh", "-c", f"cat > {mark}"],
        "env": ["PATH=/bin:/usr/bin"],
    }
    mount = {"hostPath": str(tmp_path / "library"), "containerPath": "/lib/vendor", "options": ["ro", "bind", "nosuid"]}
    describe(
        directory / "fixed" / "vendor.json",
        device("one", deviceNodes=[{"path": "/dev/vendor", "hostPath": str(DISK), "permissions": "r"}], env=["ONE=1"]),
        device("two", env=["TWO=2"], additionalGids=[77]),
        env=["COMMON=yes"],
        mounts=[mount],
        hooks=[hook],
    )
    script = "exec 2>/dev/null; echo $COMMON $ONE$TWO; cat /lib/vendor; echo x > /lib/vendor || echo closed; grep Groups /proc/self/status"
    script += "; stat -c %t,%T /dev/vendor; (true < /dev/vendor) && echo read; (true >> /dev/vendor) || echo refused"
    names = ("vendor.com/thing=one", "vendor.com/thing=two")
    pod = node.run_pod("devices")
    container = node.start(created(node, pod, "main", script, *names))
    assert node.wait(container).exit_code == 0
    number = DISK.stat().st_rdev
    assert node.log(container) == [
        "yes 12",
        "code",
        "closed",
        "Groups:\t0 77 ",
        f"{os.major(number):x},{os.minor(number):x}",
        "read",
        "refused",
    ]
    state = json.loads(mark.read_text())
    assert state["id"] == container
    assert (
        node.exec(node.start(created(node, pod, "idle", "sleep 100", names[0])), "sh", "-c", "echo $ONE").stdout
        == b"1\n"
    )


def test_a_device_in_a_user_namespace(node: Node, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "library").touch()
    mount = {"hostPath": str(tmp_path / "library"), "containerPath": "/lib/vendor", "options": ["rw", "rbind"]}
    edits = {"deviceNodes": [{"path": "/dev/vendor", "hostPath": "/dev/null"}], "mounts": [mount]}
    describe(directory / "fixed" / "vendor.json", device("a", **edits))
    config = node.pod_config("mapped")
    ids = pb.IDMapping(host_id=300_000, length=65_536)
    user = pb.UserNamespace(mode=pb.POD, uids=[ids], gids=[ids])
    config.linux.security_context.namespace_options.userns_options.CopyFrom(user)
    pod = node.run_pod(config)
    script = "echo x > /dev/vendor && echo wrote; stat -c %t,%T /dev/vendor; stat -c %u:%g /lib/vendor; echo y > /lib/vendor && echo wrote"
    assert told(node, pod, "main", script, "vendor.com/thing=a") == ["wrote", "1,3", "0:0", "wrote"]


def test_annotations_name_devices_too(node: Node, directory: Path) -> None:
    describe(directory / "fixed" / "vendor.json", device("a", env=["A=1"]), device("b", env=["B=2"]))
    annotations = {"cdi.k8s.io/plugin": "vendor.com/thing=a,vendor.com/thing=b", "other/plugin": "vendor.com/thing=c"}
    assert told(node, node.run_pod("annotated"), "main", "echo $A$B", annotations=annotations) == ["12"]


def test_files_that_change_are_read_again_and_later_directories_come_first(node: Node, directory: Path) -> None:
    pod, name = node.run_pod("changes"), "vendor.com/thing=a"
    node.refused("NOT_FOUND", f"{name}: at step spec: no file in", created, node, pod, "absent", "true", name)
    describe(directory / "fixed" / "vendor.json", device("a", env=["A=1"]))
    assert told(node, pod, "first", "echo $A", name) == ["1"]
    describe(directory / "fixed" / "vendor.json", device("a", env=["A=22"]))
    assert told(node, pod, "second", "echo $A", name) == ["22"]
    describe(directory / "made" / "vendor.json", device("a", env=["A=3"]))
    assert told(node, pod, "third", "echo $A", name) == ["3"]
    describe(directory / "made" / "other.json", device("a", env=["A=4"]))
    node.refused("FAILED_PRECONDITION", "describe it both", created, node, pod, "fourth", "true", name)
    for path in directory.glob("*/*.json"):
        path.unlink()
    node.refused("NOT_FOUND", f"{name}: at step spec: no file in", created, node, pod, "fifth", "true", name)


def test_names_that_are_none_and_devices_that_are_not_there(node: Node, directory: Path) -> None:
    pod = node.run_pod("wrong")
    node.refused("INVALID_ARGUMENT", "it is not vendor/class=name", created, node, pod, "name", "true", "vendor.com=a")
    describe(directory / "fixed" / "vendor.json", device("a", deviceNodes=[{"path": "/dev/no-such-device"}]))
    node.refused("NOT_FOUND", "/dev/no-such-device", created, node, pod, "gone", "true", "vendor.com/thing=a")


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"mounts": [{"hostPath": "/tmp", "containerPath": "/x"}]}, ".type: is required where the mount is no bind mount"),
        (
            {"deviceNodes": [{"path": "/dev/x", "type": "c", "major": 3_000_000_000, "minor": 1}]},
            "linux.devices[0].major: 3000000000 is not between 0 and 2147483647",
        ),
        ({"deviceNodes": [{"path": "/dev/null"}, {"path": "/dev/./null"}]}, "linux.devices[1].path: '/dev/null' is there twice"),
        ({"additionalGids": [4294967295]}, "process.user.additionalGids[1]: 4294967295 is not between"),
    ],
)  # fmt: skip
def test_what_comes_to_no_container_is_refused_when_it_is_created(
    node: Node, directory: Path, edits: dict[str, Any], words: str
) -> None:
    """Files that are right, by themselves, and make an OCI configuration that is not: with its JSON path."""
    describe(directory / "fixed" / "vendor.json", device("a", **edits))
    pod = node.run_pod("edited")
    node.refused("INVALID_ARGUMENT", words, created, node, pod, "main", "true", "vendor.com/thing=a")


def test_a_network_interface_cannot_be_given(node: Node, directory: Path) -> None:
    moved = {"hostInterfaceName": "eth9", "name": "eth1"}
    describe(directory / "fixed" / "vendor.json", device("a", netDevices=[moved]), version="1.1.0")
    pod = node.run_pod("interface")
    words = "netDevices are not supported (eth9)"
    node.refused("FAILED_PRECONDITION", words, created, node, pod, "main", "true", "vendor.com/thing=a")


def test_what_is_wrong_with_files_is_told_by_status(node: Node, directory: Path) -> None:
    (directory / "fixed" / "bad.json").write_text("{")
    describe(directory / "fixed" / "good.json", device("a", env=["A=1"]))
    describe(directory / "fixed" / "same.json", device("a", env=["A=2"]))
    client = node.daemon.client
    info = client.call(client.runtime.Status, pb.StatusRequest(verbose=True)).info["info"]
    problems = json.loads(info)["cdiProblems"]
    assert len(problems) == 2
    assert f"read CDI file {directory}/fixed/bad.json" in problems[0]
    assert "describe vendor.com/thing=a both" in problems[1]
