"""What the daemon itself lays open on the node: who can reach its sockets and files, what its logs say, what of it gets into containers."""

from __future__ import annotations

import base64
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tare.launch.plan import SEALS
from tests.support import leaks
from tests.support.images import busybox_image
from tests.support.node import Node, busy_node
from tests.support.registry import Registry

pytestmark = pytest.mark.root

SECRET = "s3cr3t-w0rd"
SETTINGS = '[daemon]\nlog_level = "debug"\n'
CONNECT = """
import socket, sys
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
            print("DONE")
        except OSError as error:
            print(error.strerror)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A node whose daemon has a secret in its environment and says all that it can in its log; others may come as far as its directory."""
    with busy_node("exp", SETTINGS, {"TARE_TEST_SECRET": SECRET, "LD_LIBRARY_PATH": "", "PYTHONWARNINGS": ""}) as made:
        made.daemon.base.chmod(0o755)
        made.daemon.base.parent.chmod(0o755)
        yield made


@pytest.fixture(scope="module")
def pod(node: Node) -> str:
    """A pod that shares a PID namespace."""
    return node.run_pod(node.pod_config("web", pid=pb.POD))


def logged(node: Node) -> str:
    """All that daemon, keeper, launcher and loggers have said."""
    return "".join(path.read_text(errors="replace") for path in (node.daemon.log, node.daemon.run / "launch.log"))


def sockets(node: Node) -> list[Path]:
    """Every socket of the instance."""
    found = [path for path in node.daemon.run.rglob("*") if path.is_socket()]
    assert {"tare.sock", "keeper.sock", "launcher.sock", "sock"} <= {path.name for path in found}
    return found


def test_nobody_but_root_reaches_a_socket(node: Node, pod: str) -> None:
    node.start(node.create(pod, "reached", "sleep", "1000"))
    for path in sockets(node):
        status = path.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode) & 0o077) == (0, 0, 0), path
    command = [sys.executable, "-I", "-c", CONNECT, *map(str, sockets(node))]
    others = subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=30
    )
    assert set(others.stdout.splitlines()) == {"Permission denied"}, others
    abstract = [
        line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "tare" in line.split()[-1]
    ]
    assert not [name for name in abstract if name.startswith("@")], (
        "a name that every process of the node can connect to"
    )


def test_directories_are_roots_alone_and_no_file_is_the_worlds(node: Node, pod: str) -> None:
    """Also those that were there before with another mode."""
    for directory in (node.daemon.run, node.daemon.root):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700 and directory.stat().st_uid == 0
    node.start(node.create(pod, "files", "sleep", "1000"))
    own = [node.daemon.run / name for name in ("pods", "containers", "loggers", "tasks", "exits")]
    for directory in own:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory
    for path in node.daemon.run.rglob("*"):
        mode = path.lstat().st_mode
        if path.is_symlink() or path.is_mount() or "shm" in path.parts:
            continue
        assert not mode & 0o022, f"{path} {stat.filemode(mode)}"
    for name in ("state.db", "boot.db"):
        [database] = [path for path in (node.daemon.root / name, node.daemon.run / name) if path.exists()]
        assert not database.stat().st_mode & 0o022
    node.daemon.stop()
    node.daemon.run.chmod(0o755)
    node.daemon.root.chmod(0o777)
    node.daemon.start()
    for directory in (node.daemon.run, node.daemon.root):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_no_secret_is_logged(node: Node, pod: str) -> None:
    """Passwords for registries, environments, arguments: not where a call succeeds, not where it fails at any stage, not with log level debug."""
    client = node.daemon.client
    start = len(logged(node))
    config = node.container_config("secret", "sh", "-c", f"echo {SECRET} >/dev/null; sleep 1000")
    config.envs.append(pb.KeyValue(key="PASSWORD", value=SECRET.encode()))
    container = node.start(node.create(pod, config))
    assert node.exec(container, "sh", "-c", f"test $PASSWORD = {SECRET}").exit_code == 0
    bad = node.container_config("bad", "/nonexistent", SECRET)
    bad.envs.append(pb.KeyValue(key="PASSWORD", value=SECRET.encode()))
    with pytest.raises(CallFailed) as caught:
        node.start(node.create(pod, bad))
    assert SECRET not in str(caught.value)
    with pytest.raises(CallFailed) as caught:
        node.exec(container, "/nonexistent", SECRET)
    assert SECRET not in str(caught.value)
    broken = node.container_config("broken", "sleep", "1000")
    broken.envs.append(pb.KeyValue(key="PASSWORD", value=SECRET.encode()))
    broken.working_dir = "/bin/busybox"
    with pytest.raises(CallFailed) as caught:
        node.start(node.create(pod, broken))
    assert SECRET not in str(caught.value)
    node.stop(container, 0)
    pull_with_secrets(node)
    client.call(client.runtime.Status, pb.StatusRequest(verbose=True))
    node.daemon.kill()
    node.daemon.start()
    said = logged(node)[start:]
    assert "container" in said and "pulled" in said, "the log is of another run"
    encoded = base64.b64encode(f"alice:{SECRET}".encode()).decode()
    assert not [line for line in said.splitlines() if SECRET in line or encoded in line]


def pull_with_secrets(node: Node) -> None:
    """From a registry that asks for a password: with the right one, with a wrong one, and where the image is not."""
    client = node.daemon.client
    base = node.daemon.base
    with Registry(base / "locked", users={"alice": SECRET}) as registry:
        registry.push(busybox_image(base / "locked-image"), "alice/image:1", credentials=f"alice:{SECRET}")
        right = pb.AuthConfig(username="alice", password=SECRET)
        packed = pb.AuthConfig(auth=base64.b64encode(f"alice:{SECRET}".encode()).decode())
        wrong = pb.AuthConfig(username="mallory", password=SECRET)
        for auth, name, fine in (
            (right, "image:1", True),
            (packed, "image:1", True),
            (wrong, "image:1", False),
            (right, "none:1", False),
        ):
            image = pb.ImageSpec(image=f"{registry.url}/alice/{name}")
            try:
                client.call(client.images.PullImage, pb.PullImageRequest(image=image, auth=auth), timeout=60)
            except CallFailed as error:
                assert not fine and SECRET not in str(error), error
            else:
                assert fine


def test_nothing_of_the_daemon_gets_into_containers(node: Node, pod: str) -> None:
    """No variable of its environment, no directory, no signal that it ignores."""
    container = node.start(node.create(pod, "ambient", "sleep", "1000"))
    ambient = {"TARE_TEST_SECRET", "PYTHONWARNINGS", "LD_LIBRARY_PATH"} | {
        key for key in os.environ if key.startswith("TARE")
    }
    for said in (
        node.exec(container, "env").stdout,
        node.exec(container, "cat", "/proc/1/environ", "/proc/self/environ").stdout,
    ):
        names = {entry.partition(b"=")[0].decode() for entry in said.replace(b"\0", b"\n").split(b"\n")}
        assert not names & ambient, names
    assert SECRET.encode() not in node.exec(container, "sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null").stdout
    listing = node.exec(
        container, "sh", "-c", "ls -l /proc/self/fd /proc/1/fd; cat /proc/net/unix; cat /proc/self/cgroup"
    )
    assert b"tare.sock" not in listing.stdout and b"state.db" not in listing.stdout


def test_keeper_and_launcher_run_on_sealed_memory(node: Node) -> None:
    pids = [
        p.pid
        for p in leaks.processes()
        if p.name in ("tare-keeper", "tare-launcher") and str(node.daemon.run) in p.command
    ]
    assert len(pids) >= 2
    for pid in pids:
        assert os.readlink(f"/proc/{pid}/exe") == "/memfd:tare (deleted)"
        fd = os.open(f"/proc/{pid}/exe", os.O_RDONLY)
        try:
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        finally:
            os.close(fd)
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert environment == b"PATH=/usr/sbin:/usr/bin:/sbin:/bin\0"


def test_a_client_that_speaks_nonsense_is_cut_off(node: Node) -> None:
    """Only root gets as far as that, and even root does no harm by it."""
    for path in sockets(node):
        ours = path.name in ("keeper.sock", "launcher.sock", "sock")
        kind = socket.SOCK_SEQPACKET if ours else socket.SOCK_STREAM
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.settimeout(10)
            client.connect(str(path))
            client.send(b"\xff" * 200)
    assert node.daemon.answers()


# Hostile containers, as the kubelet sees their end


def test_a_stopped_container_is_stopped_and_removed(node: Node, pod: str) -> None:
    """SIGTERM waits for a SIGCONT that does not come; the grace period ends it."""
    container = node.start(node.create(pod, "frozen", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"))
    node.wait_for_log(container, "up")
    for path in leaks.processes():
        if "trap '' TERM; echo up" in path.command and path.command.startswith("sh"):
            os.kill(path.pid, 19)
    begun = time.monotonic()
    node.stop(container, timeout=1)
    assert time.monotonic() - begun < 10
    assert node.status(container).exit_code == 137
    node.remove(container)


def test_a_full_dev_shm_is_the_pods_own_trouble(node: Node, pod: str) -> None:
    container = node.start(node.create(pod, "filler", "sleep", "1000"))
    filled = node.exec(container, "dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M")
    assert filled.exit_code != 0 and b"No space left" in filled.stderr
    other = node.run_pod("beside")
    fine = node.start(node.create(other, "fine", "sh", "-c", "echo x >/dev/shm/x && echo written; sleep 1000"))
    node.wait_for_log(fine, "written")
    assert node.exec(container, "rm", "/dev/shm/x").exit_code == 0
    node.stop(container, 0)
