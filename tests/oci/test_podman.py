"""podman with Tare as its runtime: run, logs, exec, pause, stop, exit codes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oci import Bundle, command, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(400)]
IMAGE = "localhost/tare-test:latest"


class Podman:
    """podman with storage of its own."""

    def __init__(self, path: Path) -> None:
        self.storage = path / "storage.conf"
        self.storage.write_text(
            f'[storage]\ndriver = "vfs"\nrunroot = "{path}/run"\ngraphroot = "{path}/graph"\n', encoding="utf-8"
        )
        self.path = path

    def call(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run it."""
        argv = [
            *("podman", "--cgroup-manager=cgroupfs", "--events-backend=none", "--runtime", command("tare")[0]),
            *("--tmpdir", str(self.path / "tmp"), *words),
        ]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CONTAINERS_STORAGE_CONF": str(self.storage)}
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        if check:
            assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done


@pytest.fixture
def podman(tmp_path: Path, bundle: Bundle) -> Iterator[Podman]:
    """podman, with an image of busybox."""
    found = Podman(tmp_path)
    tar = tmp_path / "image.tar"
    subprocess.run(["tar", "-C", str(bundle.rootfs), "-cf", str(tar), "."], check=True)
    found.call("import", str(tar), IMAGE)
    yield found
    found.call("rm", "--all", "--force", "--time", "0")
    shutil.rmtree(tmp_path / "graph")
    top = Path("/sys/fs/cgroup")
    for group in (*top.glob("libpod_parent"), *top.glob("*/libpod_parent")):
        for path in (*group.glob("*"), group):
            if path.is_dir():
                path.rmdir()


@pytest.mark.timeout(300)
def test_podman_runs_its_containers(podman: Podman) -> None:
    run = ("run", "--rm", "--network", "none")
    assert podman.call(*run, IMAGE, "echo", "hello").stdout == "hello\n"
    assert podman.call(*run, IMAGE, "sh", "-c", "exit 5", check=False).returncode == 5
    assert podman.call(*run, IMAGE, "/no/such", check=False).returncode == 127
    assert podman.call(*run, "--tty", IMAGE, "tty").stdout.strip() == "/dev/pts/0"
    limits = podman.call(
        *run, "--pids-limit", "44", "--user", "7:8", IMAGE, "sh", "-c", "id -u; id -g; grep Seccomp: /proc/self/status"
    )
    assert limits.stdout.split() == ["7", "8", "Seccomp:", "2"]


def test_podman_keeps_one_running(podman: Podman) -> None:
    script = "trap 'exit 3' TERM; echo begun; while :; do sleep 0.1; done"
    podman.call("run", "--detach", "--name", "one", "--network", "none", IMAGE, "sh", "-c", script)
    wait_for(lambda: True if podman.call("logs", "one").stdout == "begun\n" else None)
    assert podman.call("exec", "one", "sh", "-c", "echo within; exit 4", check=False).returncode == 4
    assert (
        podman.call("exec", "--env", "A=b", "--workdir", "/tmp", "one", "sh", "-c", "echo $A; pwd").stdout
        == "b\n/tmp\n"
    )
    assert podman.call("exec", "--tty", "one", "tty").stdout.strip() == "/dev/pts/0"
    podman.call("pause", "one")
    assert podman.call("inspect", "one", "--format", "{{.State.Status}}").stdout.strip() == "paused"
    podman.call("unpause", "one")
    podman.call("stop", "--time", "20", "one")
    assert podman.call("inspect", "one", "--format", "{{.State.ExitCode}}").stdout.strip() == "3"
