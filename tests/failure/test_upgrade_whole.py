"""The whole of Tare replaced by another version of it and back, while pods run: what a user does is to start the other daemon."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks, versions
from tests.support.daemon import Daemon
from tests.support.images import busybox_image
from tests.support.node import Node
from tests.support.registry import Registry

pytestmark = [pytest.mark.root, pytest.mark.slow]

COUNTS = ("sh", "-c", "n=0; while [ ! -e /end ]; do n=$((n+1)); echo $n; sleep 0.01; done; exit 33")
SCHEMA = "(Migration(schema=FIRST, oldest=FIRST, apply=nothing),)"
NEXT = "(Migration(schema=FIRST, oldest=FIRST, apply=nothing), Migration(schema=2, oldest=1, apply=painted))"
PAINTED = """

def painted(database: Database) -> None:
    database.execute("CREATE TABLE IF NOT EXISTS painted (key TEXT)")


MIGRATIONS ="""


def whole(directory: Path, version: str) -> Path:
    """A copy of the package that says that it is of this version."""
    shutil.copytree(versions.SOURCE, directory / "tare", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "tare" / "__init__.py").write_text(f'"""Tare."""\n\n__version__ = "{version}"\n')
    return directory


def next_version(directory: Path) -> Path:
    """One with another protocol between its processes and another schema of its databases, by one."""
    tree = versions.change(whole(directory, "0.2.0"), "wire", "\nVERSION = 2\n", "\nVERSION = 3\n")
    schema = tree / "tare" / "state" / "schema.py"
    text = schema.read_text()
    assert SCHEMA in text and "\nMIGRATIONS =" in text
    schema.write_text(text.replace(SCHEMA, NEXT).replace("\nMIGRATIONS =", PAINTED))
    return tree


@pytest.fixture
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="tare-up-", dir="/var/lib") as name:
        base = Path(name)
        environment = {"PYTHONPATH": str(whole(base / "old", "0.1.0"))}
        with Registry(base / "registry") as registry, Daemon(base / "tare", environment=environment) as daemon:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            made = Node(daemon, f"{registry.url}/tests/busybox:1")
            made.pull()
            yield made


def start(node: Node, tree: Path) -> None:
    node.daemon.environment["PYTHONPATH"] = str(tree)
    node.daemon.start()


def version(node: Node) -> str:
    client = node.daemon.client
    return str(client.call(client.runtime.Version, pb.VersionRequest()).runtime_version)


def schema(node: Node) -> int:
    with closing(sqlite3.connect(f"file:{node.daemon.root}/state.db?mode=ro", uri=True)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def helpers(node: Node, name: str) -> dict[int, str]:
    """PID and package of those processes of ours."""
    found = {}
    for process in leaks.processes():
        words = process.command.split(" ")
        if process.name == name and str(node.daemon.run) in words:
            found[process.pid] = words[words.index(str(node.daemon.run)) - 1]
    return found


def lines(node: Node, container: str) -> int:
    """How many lines are in its log: the numbers from 1 on, each once and in order."""
    found = [int(line) for line in node.said(container)]
    assert found == list(range(1, len(found) + 1))
    return len(found)


def writes_on(node: Node, container: str) -> None:
    before, deadline = lines(node, container), time.monotonic() + 30
    while lines(node, container) < before + 10:
        assert time.monotonic() < deadline, "it does not write any more"
        time.sleep(0.02)


def test_up_and_down_while_pods_run(node: Node) -> None:
    base = node.daemon.base.parent
    old, new = base / "old", next_version(base / "new")
    pod = node.run_pod("before")
    plain = node.start(node.create(pod, "plain", *COUNTS))
    terminal = node.start(node.create(pod, node.container_config("terminal", *COUNTS, tty=True)))
    shared = node.run_pod(node.pod_config("shared", pid=pb.POD))
    gone = node.start(node.create(shared, "gone", "sh", "-c", "until [ -e /end ]; do sleep 0.05; done; exit 44"))
    keeper, launcher = helpers(node, "tare-keeper"), helpers(node, "tare-launcher")
    assert set(keeper.values()) == set(launcher.values()) == {str(old)}

    node.daemon.stop()
    start(node, new)
    assert (version(node), schema(node)) == ("0.2.0", 2)
    assert helpers(node, "tare-keeper") == dict.fromkeys(keeper, str(new))
    assert helpers(node, "tare-launcher") == dict.fromkeys(launcher, str(new))
    deadline = time.monotonic() + 30
    while set(helpers(node, "tare-logger").values()) != {str(new)}:
        assert time.monotonic() < deadline, "the loggers are still the old ones"
        time.sleep(0.02)
    for container in (plain, terminal):
        writes_on(node, container)
        assert node.exec(container, "echo", "in").stdout == b"in\n"
    during = node.start(node.create(node.run_pod("during"), "plain", *COUNTS))

    node.daemon.kill()
    end(gone)
    start(node, old)
    assert (version(node), schema(node)) == ("0.1.0", 1)
    assert helpers(node, "tare-keeper") == dict.fromkeys(keeper, str(old))
    assert node.wait(gone).exit_code == 44
    for container in (plain, terminal, during):
        writes_on(node, container)
        assert node.exec(container, "touch", "/end").exit_code in (0, 137)  # it may end before touch does
        status = node.wait(container)
        assert (status.exit_code, status.reason) == (33, "Error")
        lines(node, container)
    start_again(node, new)
    assert (version(node), schema(node)) == ("0.2.0", 2)
    node.remove_all()
    assert node.settled() == []


def end(container: str) -> None:
    """Let a container end that no daemon can be asked for: by its root file system."""
    for process in leaks.processes():
        cgroup = Path(f"/proc/{process.pid}/cgroup")
        if process.name == "sh" and cgroup.exists() and container in cgroup.read_text():
            Path(f"/proc/{process.pid}/root/end").touch()
            return
    raise AssertionError("the container is not there")


def start_again(node: Node, tree: Path) -> None:
    node.daemon.kill()
    start(node, tree)


def test_a_broken_version_serves_with_keeper_and_launcher_as_they_are(node: Node) -> None:
    container = node.start(node.create(node.run_pod("before"), "plain", *COUNTS))
    keeper, launcher = helpers(node, "tare-keeper"), helpers(node, "tare-launcher")
    broken = versions.change(
        next_version(node.daemon.base.parent / "broken"), "keeper", "import fcntl", "import fcntl, not_there"
    )
    start_again(node, broken)
    assert version(node) == "0.2.0"
    assert "No module named 'not_there'" in node.daemon.told()
    assert (helpers(node, "tare-keeper"), helpers(node, "tare-launcher")) == (keeper, launcher)
    writes_on(node, container)
    assert node.exec(container, "echo", "in").stdout == b"in\n"
    other = node.start(node.create(node.run_pod("after"), "plain", "sh", "-c", "exit 5"))
    assert node.wait(other).exit_code == 5
    start_again(node, next_version(node.daemon.base.parent / "mended"))
    assert "not_there" not in helpers(node, "tare-keeper").popitem()[1]
    assert node.exec(container, "touch", "/end").exit_code in (0, 137)  # it may end before touch does
    assert node.wait(container).exit_code == 33
    node.remove_all()
    assert node.settled() == []
