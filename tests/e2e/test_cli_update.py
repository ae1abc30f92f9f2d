"""`tare update --restart`: what stands on an older image of a tag gets the newer one, whoever made it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.daemon import Daemon
from tests.support.images import Tree, busybox_image, make_image
from tests.support.node import Node
from tests.support.registry import Registry

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Site:
    """The command for one daemon, and the image `name` that its containers are of."""

    node: Node
    registry: Registry
    base: Path

    @property
    def name(self) -> str:
        return f"{self.registry.url}/update/app:1"

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TARE_SOCKET": str(self.node.daemon.socket), "TARE_LOG_DIR": str(self.base / "logs")}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tare.cli.main", *arguments]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=90, check=False)

    def ok(self, *arguments: str) -> str:
        result = self(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def publish(self, number: int) -> None:
        """The tag means image `number` from now on; image 0 has no shell."""
        extra: Tree = {"etc/version": str(number)}
        directory = self.base / f"image{number}-{time.monotonic_ns()}"
        made = busybox_image(directory, extra=[extra]) if number else make_image(directory, [extra])
        self.registry.push(made, "update/app:1")

    def running(self) -> dict[str, str]:
        """Names of running containers to the version that they see."""
        client = self.node.daemon.client
        ids = {c.metadata.name: c.id for c in client.containers() if c.state == pb.CONTAINER_RUNNING}
        return {name: self.node.exec(i, "cat", "/etc/version").stdout.decode() for name, i in ids.items()}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Registry(tmp_path / "registry") as registry, Daemon(tmp_path / "tare") as daemon:
        site = Site(Node(daemon, f"{registry.url}/update/app:1"), registry, tmp_path)
        site.publish(1)
        yield site
        site.node.remove_all()


def outcomes(table: str) -> dict[str, str]:
    """By container's name."""
    lines = table.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("CONTAINER"))
    columns = [lines[at].index(word) for word in ("NAME", "IMAGE", "OUTCOME")]
    return {line[columns[0] : columns[1]].strip(): line[columns[2] :].strip() for line in lines[at + 1 :]}


def test_containers_follow_their_tag(site: Site) -> None:
    node, sleep = site.node, ("sleep", "1000")
    site.ok("run", "-d", "--name", "web", "-e", "A=b", site.name, *sleep)
    by_digest = site.ok("inspect", site.name)
    assert "repoDigests" in by_digest
    kubelet = node.pod_config("kubelet", labels={"io.kubernetes.pod.uid": "uid"})
    ours = node.start(node.create(node.run_pod("other"), "crictl", *sleep))
    theirs = node.start(node.create(node.run_pod(kubelet), "theirs", *sleep))
    waiting = subprocess.Popen(
        [sys.executable, "-m", "tare.cli.main", "run", "--name", "waiting", site.name, *sleep], env=site.environment()
    )
    try:
        deadline = time.monotonic() + 30
        while "waiting" not in site.running():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pods = {pod.id for pod in node.daemon.client.pods()}
        assert site.ok("update", "--restart", "-t", "0") == ""
        site.publish(2)
        shown = site.ok("update", "--restart", "-t", "0", site.name)
        assert shown.splitlines()[0] == site.name
        assert outcomes(shown) == {
            "web": "restarted",
            "crictl": "restarted",
            "theirs": "stopped: its kubelet starts it again",
            "waiting": "left: a `tare run` waits for it",
        }
        assert site.running() == {"web": "2", "crictl": "2", "waiting": "1"}
        assert {pod.id for pod in node.daemon.client.pods()} == pods
        kept = {c.metadata.name: c for c in node.daemon.client.containers()}
        assert kept["theirs"].id == theirs and kept["theirs"].state == pb.CONTAINER_EXITED
        assert kept["crictl"].id != ours and kept["crictl"].metadata.attempt == 1
        assert node.exec(kept["web"].id, "sh", "-c", "echo $A").stdout == b"b\n"
        assert outcomes(site.ok("update", "--restart")) == {"waiting": "left: a `tare run` waits for it"}
        site("stop", "-t", "0", "waiting")
        waiting.wait(30)
        assert {pod.metadata.name for pod in node.daemon.client.pods()} == {"web", "other", "kubelet"}
    finally:
        waiting.kill()
        waiting.wait()


def test_an_image_that_does_not_start_is_not_kept_running(site: Site) -> None:
    site.ok("run", "-d", "--name", "web", site.name, "sleep", "1000")
    site.publish(0)
    result = site("update", "--restart", "-t", "0")
    assert result.returncode == 1
    assert outcomes(result.stdout)["web"].startswith("rolled back: ")
    assert "update images: web: rolled back" in result.stderr
    assert site.running() == {"web": "1"}
    site.publish(2)
    assert outcomes(site.ok("update", "--restart", "-t", "0")) == {"web": "restarted"}
    assert site.running() == {"web": "2"}
