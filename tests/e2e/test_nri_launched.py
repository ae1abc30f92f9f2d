"""NRI plugins that the daemon starts, validators, and the plugin of the documentation."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node, busy_node
from tests.support.nri import Noted, plugin, script

pytestmark = pytest.mark.root
MARKS = """
def configure(self, config, runtime, version):
    note("configure", config=config, runtime=runtime, pid=__import__("os").getpid())
    print("said by the plugin", flush=True)
def create_container(self, pod, container):
    return ContainerAdjustment(env=[KeyValue(key="MARK", value="made")])
"""
VALIDATES = """
def validate_container_adjustment(self, request):
    owners = request.owners.owners[request.container.id]
    note("validate", env=[item.key for item in request.adjust.env], before=[e for e in request.container.env if e[:5] == "MARK="],
         plugins=[item.name for item in request.plugins], owners=dict(owners.compound[6].owners))
    return "there is a secret" if request.container.name == "refused" else None
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A place that is not world-writable, for plugins and their settings."""
    with tempfile.TemporaryDirectory(prefix="tare-nri-", dir="/var/lib") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def node(directory: Path) -> Iterator[Node]:
    """A node with a plugin in its directory, and some things that are none."""
    plugins, settings = directory / "plugins", directory / "conf.d"
    plugins.mkdir()
    settings.mkdir()
    script(plugins / "10-marks", directory / "marks.log", MARKS, "")
    (settings / "marks.conf").write_text("not this one")
    (settings / "10-marks.conf").write_text("color = red\n")
    script(plugins / "20-ends", directory / "ends.log", "", "").write_text("#!/bin/sh\nexit 3\n")
    script(plugins / "30-silent", directory / "silent.log", "", "").write_text("#!/bin/sh\nsleep 1000\n")
    script(plugins / "nameless", directory / "nameless.log", "", "")
    (plugins / "40-module").write_bytes(b"\0asm\1\0\0\0")
    (plugins / "40-module").chmod(0o755)
    (plugins / "50-readme").write_text("no program")
    text = f"""[nri]
plugin_path = "{plugins}"
plugin_config_path = "{settings}"
registration_timeout = 6.0
[nri.default_validator]
enable = true
required_plugins = ["10-marks"]
reject_sysctl_adjustment = true
"""
    with busy_node("nril", settings=text) as found:
        (plugins / "30-silent").unlink()  # once is enough to wait for it
        yield found
        found.remove_all()
        found.daemon.stop()
        Noted(directory / "marks.log").until("shutdown")
        assert found.processes() == []


def pid_of(noted: Noted, count: int) -> int:
    """The plugin's process, of its so many-th start."""
    pid = noted.until("configure", count)["pid"]
    assert isinstance(pid, int)
    return pid


def output(node: Node, pod: str, name: str, command: str) -> list[str]:
    """What a container says."""
    container = node.start(node.create(pod, name, "sh", "-c", command))
    node.wait(container)
    return node.log(container)


def test_it_is_started_with_its_settings_and_no_container_is_made_without_it(node: Node, directory: Path) -> None:
    marks = Noted(directory / "marks.log")
    assert marks.until("configure")["config"] == "color = red\n" and marks.events[0]["runtime"] == "tare"
    told = node.daemon.log.read_text()
    for words in (
        "NRI plugin 10-marks: said by the plugin",
        "NRI plugin 20-ends could not be started",
        "NRI plugin 30-silent could not be started: register an NRI plugin: it did not within 6 s",
        "nameless is not started as an NRI plugin",
        "40-module is not started as an NRI plugin: start an NRI plugin: it is a WebAssembly module",
    ):
        assert words in told, words
    assert "50-readme" not in told
    pod = node.run_pod("launched")
    assert output(node, pod, "main", "echo $MARK") == ["made"]
    own = os.stat(f"/proc/{pid_of(marks, 1)}/fd/1")
    assert stat.S_ISFIFO(own.st_mode)
    node.remove_all()


def test_a_killed_daemon_leaves_it_to_the_next_which_starts_it_anew(node: Node, directory: Path) -> None:
    marks = Noted(directory / "marks.log")
    starts = marks.names().count("configure")
    before = pid_of(marks, starts)
    pod = node.run_pod("killed")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    node.daemon.kill()
    node.daemon.start()
    assert pid_of(marks, starts + 1) != before
    assert not Path(f"/proc/{before}").exists()
    assert marks.until("synchronize", starts + 1)["containers"] == [container]
    assert output(node, pod, "second", "echo $MARK") == ["made"]
    node.remove_all()


def test_validators_have_the_last_word(node: Node, tmp_path: Path) -> None:
    with plugin(node, tmp_path, "90", "judge", VALIDATES) as judge:
        pod = node.run_pod("judged")
        node.refused(
            "UNKNOWN",
            "validator 90-judge rejects its adjustment: there is a secret",
            node.create,
            pod,
            "refused",
            "true",
        )
        assert node.daemon.client.containers() == []
        shown = judge.until("validate")
        assert shown["env"] == ["MARK"] and shown["before"] == [] and shown["plugins"] == ["marks", "judge"]
        assert shown["owners"] == {"MARK": "10-marks"}
        assert output(node, pod, "good", "echo $MARK") == ["made"]
    wants = """
    def create_container(self, pod, container):
        return ContainerAdjustment(linux=LinuxContainerAdjustment(sysctl={"net.core.somaxconn": "9"}))
    """
    with plugin(node, tmp_path, "20", "wants", wants):
        node.refused("FAILED_PRECONDITION", "20-wants adjusts sysctls", node.create, pod, "sysctl", "true")
    node.remove_all()


def test_one_that_ends_is_missed_where_it_is_required(node: Node, directory: Path) -> None:
    marks = Noted(directory / "marks.log")
    os.kill(pid_of(marks, marks.names().count("configure")), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while "NRI plugin 10-marks has ended" not in node.daemon.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pod = node.run_pod("missed")
    node.refused(
        "FAILED_PRECONDITION", "required NRI plugins are not there: 10-marks", node.create, pod, "main", "true"
    )
    node.remove_all()
    node.daemon.stop()
    node.daemon.start()


def test_the_example_in_the_documentation_works(node: Node, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent.parent / "docs/nri.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    assert 'run(Zone(), name="zone", index="10")' in example
    path = tmp_path / "zone.py"
    path.write_text(example.replace('index="10")', f'index="10", path="{node.daemon.run}/nri.sock")'))
    with subprocess.Popen([sys.executable, str(path)]) as process:
        try:
            deadline = time.monotonic() + 20
            while "NRI plugin 10-zone is connected" not in node.daemon.log.read_text():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            pod = node.run_pod(node.pod_config("example", annotations={"example.com/zone": "b"}))
            assert output(node, pod, "main", "echo $ZONE; ulimit -n") == ["b", "4096"]
        finally:
            process.terminate()
    node.remove_all()
