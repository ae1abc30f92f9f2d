"""`tare doctor` holds the node against the records: what is planted is found by name and mended, what is a stranger's is left alone."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tare.api.v1 import tare_pb2
from tare.cli.client import CallFailed
from tare.cli.output import as_dict
from tare.cri.v1 import api_pb2 as pb
from tare.launch import linux
from tare.network import bridge, rtnetlink
from tare.network.attach import node as node_netlink
from tare.runtime.audit import SETTLING
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root

GHOST = "f" * 64
CGROUP = Path("/sys/fs/cgroup/pids")
if not CGROUP.exists():
    CGROUP = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("audit") as found:
        yield found


@pytest.fixture
def pod(node: Node) -> Iterator[str]:
    """A pod with a container that runs."""
    pod = node.run_pod("audited")
    node.start(node.create(pod, "main", "sleep", "1000"))
    yield pod
    node.remove_all()


def doctor(node: Node, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and what the audit has found."""
    base = node.daemon.base
    places = [f"--config={base}/config.toml", f"--root={node.daemon.root}", f"--run={node.daemon.run}"]
    command = [sys.executable, "-m", "tare.cli.main", "doctor", "--json", *places, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode in (0, 1, 2) and done.stdout, done.stderr
    return done.returncode, [item for item in json.loads(done.stdout) if "kind" in item or item["subject"] == "audit"]


def findings(node: Node, *, repair: bool = False) -> dict[str, dict[str, Any]]:
    """What the daemon's audit finds, by kind and name."""
    client = node.daemon.client
    answer = client.call(client.node.Audit, tare_pb2.AuditRequest(repair=repair))
    return {f"{item.kind} {item.name}": as_dict(item) for item in answer.findings}


def clean(node: Node) -> None:
    """Nothing is found."""
    assert findings(node) == {}


# What can be planted: each returns the subject under which it must be found


def plant_namespace(node: Node, ghost: str) -> str:
    pin = node.daemon.run / "pods" / ghost / "uts"
    pin.parent.mkdir()
    pin.touch()
    holder = subprocess.Popen(["unshare", "--uts", "sleep", "60"])
    wait_until(lambda: os.stat(f"/proc/{holder.pid}/ns/uts").st_ino != os.stat("/proc/self/ns/uts").st_ino)
    linux.mount(f"/proc/{holder.pid}/ns/uts".encode(), bytes(pin), None, linux.MS_BIND)
    holder.kill()
    holder.wait()
    return f"namespace {pin.resolve()}"


def plant_shm(node: Node, ghost: str) -> str:
    point = node.daemon.run / "pods" / ghost / "shm"
    point.mkdir(parents=True)
    linux.mount(b"shm", bytes(point), b"tmpfs", 0, b"size=65536")
    return f"mount {point.resolve()}"


def plant_pod_directory(node: Node, ghost: str) -> str:
    directory = node.daemon.run / "pods" / ghost
    directory.mkdir()
    (directory / "hosts").write_text("127.0.0.1 localhost\n")
    return f"directory {directory.resolve()}"


def plant_streams(node: Node, ghost: str) -> str:
    directory = node.daemon.run / "containers" / ghost
    directory.mkdir()
    os.mkfifo(directory / "stdout")
    return f"directory {directory}"


def plant_writable_layer(node: Node, ghost: str) -> str:
    directory = node.daemon.root / "containers" / ghost
    (directory / "upper" / "deep").mkdir(parents=True)
    return f"directory {directory}"


def plant_layer(node: Node, ghost: str) -> str:
    (node.daemon.root / "layers" / ghost).mkdir()
    return f"layer sha256:{ghost}"


def plant_blob(node: Node, ghost: str) -> str:
    blob = node.daemon.root / "blobs" / "sha256" / ghost
    blob.write_bytes(b"nobody's")
    os.utime(blob, (time.time() - 7200,) * 2)
    return f"blob sha256:{ghost}"


def plant_cgroup(node: Node, ghost: str) -> str:
    group = CGROUP / f"tare-{ghost}"
    group.mkdir()
    os.setxattr(group, "user.tare", str(node.daemon.run).encode())
    return f"cgroup /tare-{ghost}"


def plant_link(node: Node, ghost: str) -> str:
    name = bridge.pod_link_name(ghost)
    ip("link", "add", name, "type", "veth", "peer", "name", "auditpeer")
    with node_netlink() as netlink:
        netlink.run([rtnetlink.set_link(name, alias=bridge.pod_mark(node.daemon.run.resolve(), ghost))])
    return f"link {name}"


def plant_lease(node: Node, ghost: str) -> str:
    state(
        node, "INSERT INTO leases (network, address, pod_id) SELECT network, '10.199.0.9', ? FROM leases LIMIT 1", ghost
    )
    return "lease 10.199.0.9"


def plant_port(node: Node, ghost: str) -> str:
    state(node, "INSERT INTO ports VALUES ('tcp', '0.0.0.0', 9, '10.199.0.9', 9, ?, 'ghost')", ghost)
    return "port 9/tcp"


def plant_process(node: Node, ghost: str) -> str:
    stray = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    threading.Thread(target=stray.wait, daemon=True).start()
    marker = f"{stray.pid}.{linux.start_time(stray.pid)}"
    (node.daemon.run / "tasks" / marker).touch()
    time.sleep(SETTLING + 0.5)  # a younger one may be somebody's who has not been told yet
    return f"process {marker}"


def plant_marker(node: Node, ghost: str) -> str:
    marker = node.daemon.run / "tasks" / "4194303.7"
    marker.touch()
    return f"file {marker}"


def plant_exit(node: Node, ghost: str) -> str:
    record = node.daemon.run / "exits" / "4194303.8"
    record.write_text("exited 0 1\n")
    os.utime(record, (time.time() - 60,) * 2)
    return f"file {record}"


def plant_offer(node: Node, ghost: str) -> str:
    boot(node, "INSERT INTO offers VALUES (?, '{\"made_at\":1}')", ghost)
    return f"record offers/{ghost}"


PLANTS = [
    plant_namespace,
    plant_shm,
    plant_pod_directory,
    plant_streams,
    plant_writable_layer,
    plant_layer,
    plant_blob,
    plant_cgroup,
    plant_link,
    plant_lease,
    plant_port,
    plant_process,
    plant_marker,
    plant_exit,
    plant_offer,
]


def test_orphans_are_found_by_name_and_taken_away(node: Node, pod: str) -> None:
    """One of each kind, all at once."""
    subjects = {plant(node, f"{number:02x}" * 32) for number, plant in enumerate(PLANTS, 0xA0)}
    found = findings(node)
    assert {subject: found[subject]["state"] for subject in subjects & found.keys()} == dict.fromkeys(
        subjects, "orphan"
    )
    mended = findings(node, repair=True)
    assert [subject for subject in subjects if not mended[subject]["mended"]] == [], mended
    clean(node)
    assert node.pod_status(pod).state == pb.SANDBOX_READY


# What can be lost


def lose_pin(node: Node, pod: str, container: str) -> str:
    pin = node.daemon.run / "pods" / pod / "uts"
    linux.umount(bytes(pin), linux.MNT_DETACH)
    return f"namespace {pin}"


def lose_shm(node: Node, pod: str, container: str) -> str:
    point = node.daemon.run / "pods" / pod / "shm"
    linux.umount(bytes(point), linux.MNT_DETACH)
    return f"mount {point.resolve()}"


def lose_file(node: Node, pod: str, container: str) -> str:
    path = node.daemon.run / "pods" / pod / "resolv.conf"
    path.unlink()
    return f"file {path.resolve()}"


def lose_link(node: Node, pod: str, container: str) -> str:
    ip("link", "delete", bridge.pod_link_name(pod))
    return f"link {bridge.pod_link_name(pod)}"


def lose_lease(node: Node, pod: str, container: str) -> str:
    state(node, "DELETE FROM leases WHERE pod_id = ?", pod)
    return f"lease {node.pod_status(pod).network.ip}"


def lose_table(node: Node, pod: str, container: str) -> str:
    table = next(line.split()[-1] for line in nft("list", "tables").splitlines() if owned(node, line.split()[-1]))
    nft("flush", "table", "inet", table)
    return f"rule {table}"


def lose_marker(node: Node, pod: str, container: str) -> str:
    (process,) = (json.loads(row) for row in boot(node, "SELECT value FROM container_facts WHERE key = ?", container))
    marker = node.daemon.run / "tasks" / f"{process['process']['pid']}.{process['process']['start_time']}"
    marker.unlink()
    return f"file {marker}"


def lose_blob(node: Node, pod: str, container: str) -> str:
    (image,) = (json.loads(row) for row in state(node, "SELECT value FROM images"))
    kind, _, name = image["layer_digests"][0].partition(":")
    (node.daemon.root / "blobs" / kind / name).unlink()
    return f"blob {kind}:{name}"


def lose_facts(node: Node, pod: str, container: str) -> str:
    node.daemon.kill()
    boot(node, "DELETE FROM container_facts WHERE key = ?", container)
    return f"record container_facts/{container}"


SURVIVED = [lose_shm, lose_file, lose_lease, lose_table, lose_marker, lose_blob]


def test_losses_are_found_by_name_and_mended(node: Node, pod: str) -> None:
    """All at once, of a pod that goes on."""
    (container,) = (item.id for item in node.daemon.client.containers())
    subjects = {lose(node, pod, container) for lose in SURVIVED}
    found = findings(node)
    assert {subject: found[subject]["state"] for subject in subjects & found.keys()} == dict.fromkeys(subjects, "lost")
    mended = findings(node, repair=True)
    assert [subject for subject in subjects if not mended[subject]["mended"]] == [], mended
    clean(node)
    assert node.pod_status(pod).state == pb.SANDBOX_READY
    node.stop(container, 0)
    assert node.wait(container).exit_code == 137


@pytest.mark.parametrize("lose", [lose_pin, lose_link], ids=lambda lose: lose.__name__)
def test_a_pod_that_is_of_no_use_any_more_is_not_ready(
    node: Node, pod: str, lose: Callable[[Node, str, str], str]
) -> None:
    """Its kubelet makes another."""
    (container,) = (item.id for item in node.daemon.client.containers())
    subject = lose(node, pod, container)
    assert findings(node, repair=True)[subject]["mended"]
    clean(node)
    assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY
    assert node.status(container).state == pb.CONTAINER_RUNNING


def test_what_cannot_be_made_again_is_told(node: Node, pod: str) -> None:
    (container,) = (item.id for item in node.daemon.client.containers())
    fifo = node.daemon.run / "containers" / container / "stdout"
    fifo.unlink()
    found = findings(node, repair=True)[f"file {fifo}"]
    assert (found["mended"], found["outcome"][:5]) == (False, "left:")
    code, told = doctor(node)
    assert (code, [item["subject"] for item in told]) == (1, [f"file {fifo}"])


def test_what_is_in_use_is_refused(node: Node, pod: str) -> None:
    user = subprocess.Popen(["unshare", "--uts", "sleep", "1000"])
    group = CGROUP / f"tare-{GHOST}"
    try:
        wait_until(lambda: os.stat(f"/proc/{user.pid}/ns/uts").st_ino != os.stat("/proc/self/ns/uts").st_ino)
        pin = node.daemon.run / "pods" / GHOST / "uts"
        pin.parent.mkdir()
        pin.touch()
        linux.mount(f"/proc/{user.pid}/ns/uts".encode(), bytes(pin), None, linux.MS_BIND)
        plant_cgroup(node, GHOST)
        (group / "cgroup.procs").write_text(str(user.pid))
        found = findings(node, repair=True)
        for subject in (f"namespace {pin.resolve()}", f"cgroup /tare-{GHOST}"):
            assert not found[subject]["mended"]
            assert f"{user.pid} (sleep)" in found[subject]["outcome"]
        assert user.poll() is None
        assert os.path.ismount(pin)
    finally:
        user.kill()
        user.wait()
    assert all(item["mended"] for item in findings(node, repair=True).values())
    clean(node)
    assert not group.exists()


def test_what_is_a_strangers_is_neither_told_nor_touched(node: Node, pod: str, tmp_path: Path) -> None:
    """Not even where it is called as ours is."""
    group, other = CGROUP / f"tare-{'e' * 64}", CGROUP / f"tare-{'d' * 64}"
    point = node.daemon.run / "pods" / pod / "strange"
    table = "tare-audit-stranger"
    try:
        group.mkdir()
        other.mkdir()
        os.setxattr(other, "user.tare", b"/run/another-tare")
        ip("link", "add", "tareabcdef01234", "type", "bridge")
        nft("add", "table", "inet", table)
        point.mkdir()
        linux.mount(b"none", bytes(point), b"tmpfs")
        clean(node)
        assert findings(node, repair=True) == {}
        assert group.exists() and other.exists() and os.path.ismount(point)
        assert table in nft("list", "tables")
        assert "tareabcdef01234" in ip("-o", "link")
    finally:
        linux.umount(bytes(point), linux.MNT_DETACH)
        point.rmdir()
        nft("delete", "table", "inet", table)
        ip("link", "delete", "tareabcdef01234")
        group.rmdir()
        other.rmdir()


def test_pods_that_come_and_go_are_no_findings(node: Node) -> None:
    """20 of them, in four hands, while an audit follows the other."""
    troubles: list[object] = []
    left = list(range(20))

    def hand() -> None:
        try:
            while left:
                number = left.pop()
                pod = node.run_pod(f"churn-{number}")
                container = node.start(node.create(pod, "main", "sleep", "1000" if number % 3 == 0 else "0.2"))
                node.exec(container, "true") if number % 3 == 0 else node.wait(container)
                node.stop_pod(pod)
                node.remove_pod(pod)
        except (AssertionError, CallFailed) as error:
            troubles.append(error)

    hands = [threading.Thread(target=hand) for _ in range(4)]
    for thread in hands:
        thread.start()
    audits = 0
    while any(thread.is_alive() for thread in hands) or not audits:
        troubles += [found] if (found := findings(node)) else []
        audits += 1
    for thread in hands:
        thread.join()
    assert troubles == []
    clean(node)


def test_an_operation_that_could_not_be_undone_is_shown_and_finished(node: Node) -> None:
    """A removal that failed because of something strange in the pod's directory."""
    pod = node.run_pod("stuck")
    strange = node.daemon.run / "pods" / pod / "strange"
    strange.mkdir()
    node.stop_pod(pod)
    with pytest.raises(CallFailed):
        node.remove_pod(pod)
    found = findings(node)
    (subject,) = (subject for subject in found if "RemovePodSandbox" in subject)
    assert found[subject]["state"] == "unfinished"
    assert not findings(node, repair=True)[subject]["mended"]
    strange.rmdir()
    assert findings(node, repair=True)[subject]["mended"]
    clean(node)
    assert pod not in [item.id for item in node.daemon.client.pods()]


def test_a_repair_that_is_cut_off_is_begun_anew(node: Node) -> None:
    """The next daemon knows of it, and of what it was about."""
    node.daemon.kill()
    node.daemon.start({"TARE_FAILPOINTS": "Repair.mend.before=kill"})
    subject = plant_layer(node, GHOST)
    with pytest.raises(CallFailed):
        findings(node, repair=True)
    node.daemon.kill()
    node.daemon.start()
    assert findings(node, repair=True).keys() <= {subject}
    clean(node)
    assert not (node.daemon.root / "layers" / GHOST).exists()


def test_without_a_daemon(node: Node) -> None:
    """It audits from the files; a repair does what a start would do; a daemon that does not answer is not taken for one that is gone."""
    pod = node.run_pod("down")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    code, told = doctor(node, "--images")
    assert (code, [item["text"] for item in told]) == (0, ["the daemon serves, and all belongs to a record"])
    node.daemon.kill()
    try:
        subjects = [plant_streams(node, GHOST), plant_writable_layer(node, GHOST), lose_facts(node, pod, container)]
        code, found = doctor(node)
        assert (code, {item["subject"] for item in found} >= set(subjects)) == (1, True), found
        assert Path(subjects[0].split()[1]).exists()
        code, found = doctor(node, "--repair")
        assert (code, {item["subject"] for item in found} >= set(subjects)) == (0, True), found
        assert doctor(node)[0] == 0
    finally:
        node.daemon.start()
    assert node.status(container).state == pb.CONTAINER_EXITED
    node.remove_all()
    shutil.move(node.daemon.socket, f"{node.daemon.socket}.away")
    try:
        assert doctor(node)[0] == 2
    finally:
        shutil.move(f"{node.daemon.socket}.away", node.daemon.socket)
    clean(node)


def owned(node: Node, table: str) -> bool:
    """Whether a table is that of this node's bridge."""
    return table in [f"tare-{name}" for name in state(node, "SELECT key FROM networks")]


def wait_until(condition: Callable[[], bool]) -> None:
    """Ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(node: Node, sql: str, *parameters: str) -> list[Any]:
    """A statement on state.db; the first column of what it answers."""
    return statement(node.daemon.root / "state.db", sql, parameters)


def boot(node: Node, sql: str, *parameters: str) -> list[Any]:
    """A statement on boot.db."""
    return statement(node.daemon.run / "boot.db", sql, parameters)


def statement(path: Path, sql: str, parameters: tuple[str, ...]) -> list[Any]:
    """As a program beside the daemon."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as connection:
        return [row[0] for row in connection.execute(sql, parameters)]


def ip(*arguments: str) -> str:
    """ip(8)."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout


def nft(*arguments: str) -> str:
    """nft(8)."""
    return subprocess.run(["nft", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout
