"""Containers and pods written down with CRIU and made again out of that: what goes on, what is in an archive, and what is left where it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import handlers
from tests.support.images import Layout, tar_of
from tests.support.node import Node, busy_node, cgroups_named
from tests.support.registry import Registry

pytestmark = pytest.mark.root
CRIU = Path(sys.executable).parent / "criu"
COUNT = "i=0; trap 'exit 7' TERM; while true; do i=$((i+1)); echo $i; sleep 0.05; done"
# One process answers over a TCP connection, another counts the answers.
TALK = (
    "rm -f /tmp/in; mkfifo /tmp/in; nc -l -p 5000 -e cat & sleep 0.3; "
    "n=0; nc 127.0.0.1 5000 </tmp/in | while read line; do echo got $line; done & "
    "exec 3>/tmp/in; while true; do n=$((n+1)); echo $n >&3; sleep 0.1; done"
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("criu", settings=settings(CRIU)) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []
    assert left(shared) == []


def settings(criu: Path) -> str:
    return f'[runtime]\ncriu = "{criu}"\n'


def left(node: Node) -> list[Path]:
    """What there is of checkpoints beside their archives."""
    root = node.daemon.root
    found = [path for name in ("checkpoints", "restores") for path in (root / name).glob("*")]
    return [*found, *node.daemon.base.rglob("*.partial")]


@pytest.fixture
def place(node: Node) -> Iterator[Path]:
    """A directory for archives."""
    with tempfile.TemporaryDirectory(prefix="tare-archives-", dir="/var/lib") as name:
        yield Path(name)


def checkpoint(node: Node, container: str, location: Path, timeout: int = 0) -> Path:
    request = pb.CheckpointContainerRequest(container_id=container, location=str(location), timeout=timeout)
    node.daemon.client.call(node.daemon.client.runtime.CheckpointContainer, request)
    return location


def checkpoint_pod(node: Node, pod: str, location: Path, *containers: str) -> None:
    request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(location), container_ids=containers)
    node.daemon.client.call(node.daemon.client.runtime.CheckpointPod, request)


def restore_pod(node: Node, location: Path, **more: Any) -> tuple[str, dict[str, str]]:
    request = pb.RestorePodRequest(checkpoint_path=str(location), **more)
    response = node.daemon.client.call(node.daemon.client.runtime.RestorePod, request)
    return response.pod_sandbox_id, {item.name: item.container_id for item in response.restored_containers}


def restored_config(node: Node, image: Path | str, name: str = "main", **more: Any) -> pb.ContainerConfig:
    config = node.container_config(name, **more)
    config.image.image = str(image)
    return config


def numbers(node: Node, container: str, prefix: str = "") -> list[int]:
    lines = node.log(container) if Path(node.status(container).log_path).exists() else []
    return [
        int(line.removeprefix(prefix)) for line in lines if line.startswith(prefix) and line[len(prefix) :].isdecimal()
    ]


def grows(node: Node, container: str, prefix: str = "", than: int = 0) -> int:
    """Until the container counts further than it has, or than a number; how far it is."""
    deadline = time.monotonic() + 30
    start = max([than, *numbers(node, container, prefix)])
    while (found := max(numbers(node, container, prefix), default=0)) <= start:
        assert time.monotonic() < deadline, f"it does not count on from {start}"
        time.sleep(0.02)
    return found


def consecutive(values: list[int]) -> bool:
    return values == list(range(values[0], values[0] + len(values)))


def test_an_archive_restores_a_counter(node: Node, place: Path) -> None:
    """Memory, files, log and exit code: all goes on in the new container as if nothing had been; so does the old one."""
    pod = node.run_pod("first")
    script = "echo kept > /etc/new; mkdir -p /data/deep; echo x > /data/deep/file; rm /etc/passwd; " + COUNT
    old = node.start(node.create(pod, "main", "sh", "-c", script))
    grows(node, old, than=4)
    archive = checkpoint(node, old, place / "counter.tar")
    assert oct(archive.stat().st_mode & 0o777) == "0o600"
    at = max(numbers(node, old))
    assert grows(node, old, than=at) and consecutive(numbers(node, old))

    other = node.run_pod("second")
    new = node.create(other, restored_config(node, archive))
    status = node.status(new)
    assert status.state == pb.CONTAINER_CREATED and status.image_ref == node.status(old).image_ref
    assert cgroups_named(new) == []
    node.start(new)
    counted = grows(node, new)
    assert consecutive(numbers(node, new)) and 4 < numbers(node, new)[0] <= at + 1 < counted + at
    assert node.exec(new, "cat", "/etc/new").stdout == b"kept\n"
    assert node.exec(new, "cat", "/data/deep/file").stdout == b"x\n"
    assert node.exec(new, "test", "-e", "/etc/passwd").exit_code == 1
    assert node.exec(new, "hostname").stdout == b"second\n"
    assert f"PID{' ' * 3}" in node.exec(new, "ps").stdout.decode()
    node.stop(new, 10)
    assert node.status(new).exit_code == 7
    assert node.status(old).state == pb.CONTAINER_RUNNING


def test_the_archive_has_what_others_read(node: Node, place: Path) -> None:
    """checkpointctl, CRI-O and containerd: names, JSON fields, a tar of changes, a list of what is gone."""
    pod = node.run_pod("form")
    config = node.container_config(
        "main", "sh", "-c", "echo new > /new; rm /etc/group; " + COUNT, annotations={"a": "b"}
    )
    container = node.start(node.create(pod, config))
    grows(node, container)
    with tarfile.open(checkpoint(node, container, place / "form.tar")) as archive:
        members = {item.name: item for item in archive.getmembers()}
        parts = {name: archive.extractfile(item).read() for name, item in members.items() if item.isfile()}  # type: ignore[union-attr]
    assert all(item.isfile() or item.isdir() for item in members.values())
    assert {"config.dump", "spec.dump", "status.dump", "status", "rootfs-diff.tar", "deleted.files"} <= set(parts)
    assert {"dump.log", "stats-dump", "container.log", "bind.mounts"} <= set(parts)
    assert {f"checkpoint/{name}.img" for name in ("inventory", "pstree", "core-1", "files")} <= set(parts)
    described = json.loads(parts["config.dump"])
    assert (described["id"], described["name"]) == (container, "main")
    assert described["rootfsImageRef"] == node.status(container).image_id
    assert described["checkpointedTime"].endswith("Z") and described["restored"] is False
    spec = json.loads(parts["spec.dump"])
    assert spec["annotations"]["io.kubernetes.cri.sandbox-name"] == "form"
    assert json.loads(spec["annotations"]["io.kubernetes.cri-o.Annotations"]) == {"a": "b"}
    assert {"/etc/hosts", "/proc"} <= {mount["destination"] for mount in spec["mounts"]}
    assert json.loads(parts["deleted.files"]) == ["/etc/group"]
    with tarfile.open(fileobj=io.BytesIO(parts["rootfs-diff.tar"])) as changes:
        assert changes.extractfile("new").read() == b"new\n"  # type: ignore[union-attr]
    assert len(json.loads(parts["checkpoint/descriptors.json"])) == 3
    assert json.loads(parts["status"])["Pid"] > 1
    assert b" stdout F 1\n" in parts["container.log"]


def test_connections_inside_a_pod_go_on(node: Node, place: Path) -> None:
    pod = node.run_pod("talk")
    old = node.start(node.create(pod, "main", "sh", "-c", TALK))
    grows(node, old, "got ", than=5)
    archive = checkpoint(node, old, place / "talk.tar")
    at = max(numbers(node, old, "got "))
    grows(node, old, "got ", than=at)
    assert consecutive(numbers(node, old, "got "))
    new = node.start(node.create(node.run_pod("again"), restored_config(node, archive)))
    assert grows(node, new, "got ", than=at + 5)
    assert consecutive(numbers(node, new, "got "))


def test_connections_from_outside_go_on_here_and_are_closed_elsewhere(node: Node, place: Path) -> None:
    pod = node.run_pod("open")
    serve = "nc -l -p 7000 -e cat; echo closed; " + COUNT
    old = node.start(node.create(pod, "main", "sh", "-c", serve))
    with talk(node.pod_status(pod).network.ip, 7000) as connection:
        assert said(connection, b"before") == b"before"
        archive = checkpoint(node, old, place / "open.tar")
        assert said(connection, b"after") == b"after"
        other = node.run_pod("elsewhere")
        new = node.start(node.create(other, restored_config(node, archive)))
        node.wait_for_log(new, "closed")
        annotations = {"tare.checkpoint.tcp": "perhaps"}
        wrong = restored_config(node, archive, name="wrong", annotations=annotations)
        node.refused("INVALID_ARGUMENT", "established or close", node.create, other, wrong)
        assert said(connection, b"still") == b"still"
    node.wait_for_log(old, "closed")


def test_shared_memory_of_the_pod_comes_with_it(node: Node, place: Path) -> None:
    pod = node.run_pod("memory")
    old = node.start(node.create(pod, "main", "sh", "-c", "echo kept > /dev/shm/file; exec 3</dev/shm/file; " + COUNT))
    grows(node, old)
    archive = checkpoint(node, old, place / "memory.tar")
    new = node.start(node.create(node.run_pod("forgetful"), restored_config(node, archive)))
    grows(node, new)
    assert node.exec(new, "cat", "/dev/shm/file").stdout == b"kept\n"


def test_a_command_in_the_container_is_waited_for(node: Node, place: Path) -> None:
    """A probe, say: it could not be put back, so the checkpoint is taken when it has ended."""
    pod = node.run_pod("probed")
    container = node.start(node.create(pod, "main", "sh", "-c", COUNT))
    grows(node, container)
    client = node.daemon.client
    request = pb.ExecSyncRequest(
        container_id=container, cmd=["sh", "-c", "echo begun >/proc/1/fd/1; sleep 1; echo ended"]
    )
    probe = client.runtime.ExecSync.future(request)
    node.wait_for_log(container, "begun")
    checkpoint(node, container, place / "probed.tar")
    assert probe.result().stdout == b"ended\n"
    assert consecutive(numbers(node, container))


def test_a_pod_is_written_down_while_all_of_it_stands_still(node: Node, place: Path) -> None:
    """And comes back as a whole, CREATED, its containers' connections to each other included."""
    pod = node.run_pod("pair")
    server = node.start(node.create(pod, "server", "sh", "-c", "nc -l -p 6000 -e cat & " + COUNT))
    client = "n=0; mkfifo /in; nc 127.0.0.1 6000 </in | while read line; do echo got $line; done & "
    client += "exec 3>/in; while true; do n=$((n+1)); echo $n >&3; sleep 0.1; done"
    grows(node, server)
    talker = node.start(node.create(pod, "talker", "sh", "-c", client))
    grows(node, talker, "got ", than=3)
    restart(node, "CheckpointPod.dump.before=hold")
    grows(node, talker, "got ")
    with held(node, lambda: checkpoint_pod(node, pod, place / "pair")):
        assert {state(name) for name in (server, talker)} == {"FROZEN"}
    assert {state(name) for name in (server, talker)} == {"THAWED"}
    at = max(numbers(node, talker, "got "))
    assert grows(node, talker, "got ", than=at) and grows(node, server)
    options = json.loads((place / "pair" / "pod.options").read_text())
    assert options["containers"] == {"server": "server.tar", "talker": "talker.tar"} and options["version"] == 1
    node.remove_all()

    again, made = restore_pod(node, place / "pair", config=node.pod_config("again"))
    assert set(made) == {"server", "talker"}
    assert {node.status(name).state for name in made.values()} == {pb.CONTAINER_CREATED}
    assert node.pod_status(again).state == pb.SANDBOX_READY
    time.sleep(0.3)
    assert numbers(node, made["server"]) == []
    node.start(made["talker"])
    node.start(made["server"])
    assert grows(node, made["talker"], "got ", than=at + 5) and grows(node, made["server"])
    assert consecutive(numbers(node, made["talker"], "got "))
    node.stop(made["server"], 10)
    assert node.status(made["server"]).exit_code == 7


def test_a_pod_that_is_restored_outlives_the_daemon_before_it_is_started(node: Node, place: Path) -> None:
    pod = node.run_pod("held")
    grows(node, node.start(node.create(pod, "main", "sh", "-c", COUNT)), than=3)
    checkpoint_pod(node, pod, place / "held")
    node.remove_all()
    restore_pod(node, place / "held")
    node.remove_all()
    _, made = restore_pod(node, place / "held")
    before = numbers(node, made["main"])  # its log goes on where the first one's has ended
    restart(node)
    assert node.status(made["main"]).state == pb.CONTAINER_CREATED and numbers(node, made["main"]) == before
    node.start(made["main"])
    assert grows(node, made["main"]) > 3
    node.stop(made["main"], 10)
    assert node.status(made["main"]).exit_code == 7


def test_a_pod_that_cannot_be_written_down_goes_on(node: Node, place: Path) -> None:
    """The second of its containers is in the way: the first goes on all the same, and nothing is left."""
    pod = node.run_pod("fails")
    first = node.start(node.create(pod, "first", "sh", "-c", COUNT))
    second = node.start(node.create(pod, "second", "sh", "-c", COUNT))
    grows(node, first)
    grows(node, second)
    restart(node, "CheckpointPod.describe.before=error")
    node.refused("INTERNAL", "failpoint", checkpoint_pod, node, pod, place / "fails")
    assert {state(name) for name in (first, second)} == {"THAWED"}
    assert grows(node, first) and grows(node, second)
    assert list(place.iterdir()) == []
    (place / "taken").mkdir()
    (place / "taken" / "file").touch()
    node.refused("ALREADY_EXISTS", "there are files", checkpoint_pod, node, pod, place / "taken")
    node.refused("NOT_FOUND", "no container", checkpoint_pod, node, pod, place / "fails", "nobody")


def test_nothing_is_left_of_a_pod_that_cannot_be_restored(node: Node, place: Path) -> None:
    pod = node.run_pod("bad")
    for name in ("one", "two"):
        grows(node, node.start(node.create(pod, name, "sh", "-c", COUNT)))
    checkpoint_pod(node, pod, place / "bad")
    (place / "bad" / "two.tar").write_bytes(b"no archive")
    node.refused("ALREADY_EXISTS", "held", restore_pod, node, place / "bad")
    node.remove_all()
    node.refused("INVALID_ARGUMENT", "archive", restore_pod, node, place / "bad")
    only = [node.container_config("one")]
    node.refused("INVALID_ARGUMENT", "two", lambda: restore_pod(node, place / "bad", container_configs=only))
    assert list(node.daemon.client.pods()) == []


def test_an_image_can_be_a_checkpoint(node: Node, place: Path) -> None:
    pod = node.run_pod("origin")
    old = node.start(node.create(pod, "main", "sh", "-c", COUNT))
    at = grows(node, old, than=3)
    archive = checkpoint(node, old, place / "image.tar")
    layout = Layout(place / "layout")
    descriptor = layout.image([archive.read_bytes()], config={})
    blob = place / "layout" / "blobs" / str(descriptor["digest"]).replace(":", "/")
    manifest = json.loads(blob.read_text()) | {"annotations": {"org.criu.checkpoint.container.name": "main"}}
    layout.tag("latest", {**descriptor, **layout.add_json(manifest).descriptor(manifest["mediaType"])})
    with Registry(place / "registry") as registry:
        registry.push(place / "layout", "tests/checkpoint:1")
        image = f"{registry.url}/tests/checkpoint:1"
        node.pull(image)
    new = node.start(node.create(node.run_pod("copy"), restored_config(node, image)))
    assert grows(node, new) > at
    client = node.daemon.client
    client.call(client.images.RemoveImage, pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))


def test_mounts_are_the_new_containers_own(node: Node, place: Path) -> None:
    """What the request does not say of a mount that was there is refused; what it says is what is there."""
    for name in ("a", "b"):
        (place / name).mkdir()
        (place / name / "who").write_text(name)
    mounts = {
        name: pb.Mount(container_path="/shown", host_path=str(place / name), readonly=True) for name in ("a", "b")
    }
    pod = node.run_pod("mounts")
    old = node.start(node.create(pod, node.container_config("main", "sh", "-c", COUNT, mounts=[mounts["a"]])))
    grows(node, old)
    archive = checkpoint(node, old, place / "mounts.tar")
    other = node.run_pod("others")
    node.refused("INVALID_ARGUMENT", "/shown", node.create, other, restored_config(node, archive))
    new = node.start(node.create(other, restored_config(node, archive, mounts=[mounts["b"]])))
    assert node.exec(new, "cat", "/shown/who").stdout == b"b"
    assert node.exec(new, "touch", "/shown/x").exit_code == 1


def test_a_restored_container_is_confined_as_it_was_and_no_less(node: Node, place: Path) -> None:
    """Seccomp and capabilities hold; a request for more confinement than the processes have is refused."""
    filtered = pb.LinuxContainerSecurityContext(
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
        masked_paths=["/proc/kcore", "/sys/firmware"],
        readonly_paths=["/proc/sys"],
        no_new_privs=True,
        capabilities=pb.Capability(drop_capabilities=["NET_RAW"]),
    )
    pod = node.run_pod("tight")
    tight = node.start(node.create(pod, node.container_config("main", "sh", "-c", COUNT, security=filtered)))
    loose = node.start(node.create(pod, "loose", "sh", "-c", COUNT))
    for container in (tight, loose):
        grows(node, container)
    archives = {name: checkpoint(node, name, place / f"{name}.tar") for name in (tight, loose)}
    other = node.run_pod("restored")
    new = node.start(node.create(other, restored_config(node, archives[tight], security=filtered)))
    fields = ("Seccomp:", "CapBnd:", "NoNewPrivs:")
    before, after = (node.exec(name, "cat", "/proc/1/status").stdout.decode() for name in (tight, new))
    for text in (before, after):
        assert "Seccomp:\t2" in text
    assert [line for line in before.splitlines() if line.startswith(fields)] == [
        line for line in after.splitlines() if line.startswith(fields)
    ]
    assert node.exec(new, "head", "-c", "1", "/proc/kcore").stdout == b""
    more = restored_config(node, archives[loose], name="more", security=filtered)
    node.refused("INVALID_ARGUMENT", "of the checkpoint", node.create, other, more)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "it has no"),
    "link": ({"checkpoint/inventory.img": ("link", "/etc/shadow")}, "no plain file"),
    "device": ({"config.dump": ("device", "")}, "no plain file"),
    "hard link": ({"spec.dump": ("hard", "/etc/passwd")}, "no plain file"),
    "outside": ({"../../escaped": b"x"}, "leads out"),
    "deleted outside": ({"deleted.files": b'["/../.."]'}, "names"),
    "no JSON": ({"config.dump": b"{"}, "config.dump"),
    "deep JSON": ({"spec.dump": b"[" * 200_000}, "spec.dump"),
    "cut image": ({"checkpoint/pstree.img": b"\x30\x30\x27\x50\xff\xff\xff\x7f"}, "ends in the middle"),
    "no processes": ({"checkpoint/pstree.img": b"\x30\x30\x27\x50"}, "no processes"),
    "escaping files": ({"rootfs-diff.tar": tar_of({"../up": "x"})}, "rootfs-diff.tar"),
}


@pytest.fixture(scope="module")
def sample(shared: Node) -> Iterator[dict[str, bytes]]:
    """The files of a good archive."""
    with tempfile.TemporaryDirectory(prefix="tare-sample-", dir="/var/lib") as name:
        pod = shared.run_pod("sample")
        container = shared.start(shared.create(pod, "main", "sh", "-c", COUNT))
        grows(shared, container)
        with tarfile.open(checkpoint(shared, container, Path(name) / "sample.tar")) as archive:
            parts = {item.name: archive.extractfile(item).read() for item in archive if item.isfile()}  # type: ignore[union-attr]
        shared.remove_all()
        yield parts


def pack(path: Path, parts: Mapping[str, Any]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
                entry.type, entry.linkname = kinds[content[0]], content[1]
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(
    node: Node, place: Path, sample: dict[str, bytes], case: str
) -> None:
    change, words = HOSTILE[case]
    parts = sample | change if change else {}
    pod = node.run_pod("hostile")
    archive = pack(place / "hostile.tar", parts)
    node.refused("INVALID_ARGUMENT", words, node.create, pod, restored_config(node, archive))
    assert left(node) == [] and not (place.parent / "escaped").exists()


def test_an_archive_that_is_none_or_has_no_room_is_refused(node: Node, place: Path, sample: dict[str, bytes]) -> None:
    pod = node.run_pod("refused")
    node.refused("NOT_FOUND", "no checkpoint", node.create, pod, restored_config(node, place / "absent.tar"))
    os.mkfifo(place / "fifo")
    node.refused("INVALID_ARGUMENT", "no plain file", node.create, pod, restored_config(node, place / "fifo"))
    huge = tarfile.TarInfo("checkpoint/pages-1.img")
    huge.size = 1 << 50
    (place / "huge.tar").write_bytes(huge.tobuf())
    node.refused("RESOURCE_EXHAUSTED", "no room", node.create, pod, restored_config(node, place / "huge.tar"))
    stranger = json.loads(sample["config.dump"]) | {
        "rootfsImageRef": "sha256:" + "0" * 64,
        "rootfsImage": "nobody/has:this",
    }
    archive = pack(place / "stranger.tar", sample | {"config.dump": json.dumps(stranger).encode()})
    node.refused("NOT_FOUND", "nobody/has:this", node.create, pod, restored_config(node, archive))


def test_what_cannot_be_written_down_is_refused(node: Node, place: Path) -> None:
    pod = node.run_pod("refusing")
    created = node.create(pod, "created", "sh", "-c", COUNT)
    target = place / "no.tar"
    node.refused("FAILED_PRECONDITION", "CREATED", checkpoint, node, created, target)
    terminal = node.start(node.create(pod, node.container_config("terminal", "sleep", "1000", tty=True)))
    node.refused("FAILED_PRECONDITION", "terminal", checkpoint, node, terminal, target)
    node.refused("NOT_FOUND", "no container", checkpoint, node, "nobody", target)
    node.refused("INVALID_ARGUMENT", "location", checkpoint, node, created, Path("relative.tar"))
    node.start(created)
    node.refused("INVALID_ARGUMENT", "no directory", checkpoint, node, created, place / "absent" / "x.tar")
    node.refused("INVALID_ARGUMENT", "something else", checkpoint, node, created, place)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("point", ["pause.after", "dump.after", "archive.after"])
def test_the_daemon_is_killed_in_the_middle(node: Node, place: Path, point: str) -> None:
    """The container goes on with the next daemon, and nothing is left but an archive that is whole."""
    pod = node.run_pod(f"killed-{point}")
    container = node.start(node.create(pod, "main", "sh", "-c", COUNT))
    grows(node, container)
    restart(node, f"CheckpointContainer.{point}=kill")
    with pytest.raises(CallFailed):
        checkpoint(node, container, place / "killed.tar")
    died(node)
    node.daemon.start()
    assert state(container) == "THAWED"
    assert grows(node, container) and consecutive(numbers(node, container))
    assert left(node) == []
    assert [path.name for path in place.iterdir()] == (["killed.tar"] if point == "archive.after" else [])
    checkpoint(node, container, place / "again.tar")


@pytest.mark.parametrize("point", ["process.after", "process.before"])
def test_the_daemon_is_killed_over_a_restore(node: Node, place: Path, point: str) -> None:
    """What was restored runs; what was not can be started again."""
    pod = node.run_pod(f"before-{point}")
    old = node.start(node.create(pod, "main", "sh", "-c", COUNT))
    at = grows(node, old)
    archive = checkpoint(node, old, place / "x.tar")
    new = node.create(node.run_pod(f"after-{point}"), restored_config(node, archive))
    restart(node, f"StartContainer.{point}=kill")
    with pytest.raises(CallFailed):
        node.start(new)
    died(node)
    node.daemon.start()
    node.start(new)
    assert grows(node, new) >= at and consecutive(numbers(node, new))
    node.stop(new, 10)
    assert node.status(new).exit_code == 7


def test_the_daemon_is_killed_over_the_restore_of_a_pod(node: Node, place: Path) -> None:
    pod = node.run_pod("whole")
    grows(node, node.start(node.create(pod, "main", "sh", "-c", COUNT)))
    checkpoint_pod(node, pod, place / "whole")
    node.remove_all()
    restart(node, "RestoreContainer.process.after=kill")
    with pytest.raises(CallFailed):
        restore_pod(node, place / "whole")
    died(node)
    node.daemon.start()
    assert list(node.daemon.client.pods()) == []
    _, made = restore_pod(node, place / "whole")
    node.start(made["main"])
    assert grows(node, made["main"])


def test_the_command_line(node: Node, place: Path) -> None:
    """A container and a pod there and back, and a file that is not there."""
    logs = ("--log-dir", str(place / "logs"))
    first = tare(node, "run", "-d", "--name", "first", *logs, node.image, "sh", "-c", COUNT)
    at = grows(node, first, than=3)
    tare(node, "checkpoint", "first", str(place / "first.tar"))
    second = tare(node, "restore", "--name", "second", *logs, str(place / "first.tar"))
    assert grows(node, second) > at and node.exec(second, "hostname").stdout == b"second\n"
    tare(node, "checkpoint", "--pod", "second", str(place / "second"))
    tare(node, "rm", "-f", "second")
    pod = tare(node, "restore", str(place / "second"))
    assert node.pod_status(pod).metadata.name == "second"
    (third,) = [item.id for item in node.daemon.client.containers() if item.pod_sandbox_id == pod]
    assert grows(node, third) > at
    assert "there is no file" in tare(node, "restore", str(place / "absent.tar"), code=1)


def tare(node: Node, *arguments: str, code: int = 0) -> str:
    """What the command says."""
    command = [sys.executable, "-m", "tare.cli.main", f"--socket={node.daemon.socket}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == code, result.stderr
    return (result.stdout if not code else result.stderr).strip()


def test_what_takes_too_long_is_given_up_and_all_goes_on(node: Node, place: Path) -> None:
    """By the field `timeout`, and where the caller's own time is over."""
    stalls = place_script(place, f'[ "$1" = swrk ] && exec cat <&3 >/dev/null; exec {CRIU} "$@"')
    pod = node.run_pod("slow")
    container = node.start(node.create(pod, "main", "sh", "-c", COUNT))
    grows(node, container)
    with configured(node, settings(stalls)):
        node.refused("DEADLINE_EXCEEDED", "within 1 s", checkpoint, node, container, place / "slow.tar", 1)
        assert state(container) == "THAWED" and grows(node, container)
        client = node.daemon.client
        request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(place / "slow"))
        with pytest.raises(CallFailed) as failure:
            client.call(client.runtime.CheckpointPod, request, timeout=1)
        assert failure.value.status == "DEADLINE_EXCEEDED"
        deadline = time.monotonic() + 20
        while state(container) != "THAWED" or left(node):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert grows(node, container)
        assert not (place / "slow").exists() and not (place / "slow.tar").exists()


def test_without_criu_it_says_what_to_install(node: Node, place: Path) -> None:
    container = node.start(node.create(node.run_pod("pod"), "main", "sh", "-c", COUNT))
    old = place_script(place, "echo 'Version: 3.17.1'")
    for program, words in ((place / "nothing", "no program"), (old, "too old")):
        with configured(node, settings(program)):
            for call in (partial(checkpoint, node, container, place / "x.tar"), partial(restore_pod, node, place)):
                node.refused("FAILED_PRECONDITION", words, call)
                node.refused("FAILED_PRECONDITION", "install CRIU 4", call)
            assert grows(node, container)


def test_only_the_built_in_handlers_containers_can_be_written_down(node: Node, place: Path) -> None:
    with configured(node, settings(CRIU) + handlers.settings()):
        _, container = handlers.running(node, "runc", "sh", "-c", COUNT)
        node.refused("FAILED_PRECONDITION", "runtime handler runc", checkpoint, node, container, place / "x.tar")
        node.remove_all()


@contextmanager
def talk(address: str, port: int) -> Iterator[socket.socket]:
    """A connection to a server that may take its time to listen."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = socket.create_connection((address, port), 10)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    with connection:
        yield connection


def said(connection: socket.socket, data: bytes) -> bytes:
    """What a server says to this."""
    connection.sendall(data)
    return connection.recv(1024)


def place_script(place: Path, text: str) -> Path:
    path = place / "criu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@contextmanager
def configured(node: Node, text: str) -> Iterator[None]:
    """With other settings."""
    before = node.daemon.settings
    node.daemon.settings = text
    restart(node)
    try:
        yield
    finally:
        node.daemon.settings = before
        restart(node)


@contextmanager
def held(node: Node, call: Callable[[], object]) -> Iterator[None]:
    """While a call waits at a failpoint."""
    flag = node.daemon.run / "held"
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(call)
        deadline = time.monotonic() + 30
        while not flag.exists():
            assert time.monotonic() < deadline and not result.done(), result
            time.sleep(0.01)
        try:
            yield
        finally:
            flag.unlink()
        result.result(60)


def restart(node: Node, failpoints: str = "") -> None:
    node.daemon.kill()
    node.daemon.start({"TARE_FAILPOINTS": failpoints})


def died(node: Node) -> None:
    assert node.daemon.process is not None
    assert node.daemon.process.wait(timeout=20) == -signal.SIGKILL


def state(container: str) -> str:
    """FROZEN or THAWED, by the container's own control group."""
    for path in map(Path, cgroups_named(container)):
        if (path / "freezer.state").exists():
            return (path / "freezer.state").read_text().strip()
        if (path / "cgroup.events").exists() and (path / "cgroup.freeze").exists() and "unified" not in path.parts:
            return "FROZEN" if "frozen 1" in (path / "cgroup.events").read_text() else "THAWED"
    return "none"
