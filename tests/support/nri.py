"""NRI plugins as processes of their own: scripts of a few lines, written with `tare.nri` as anybody would.

    with plugin(node, tmp_path, "10", "mine", '''
        def create_container(self, pod, container):
            return ContainerAdjustment(env=[KeyValue(key="A", value="1")])
    ''') as mine:
        mine.until("synchronize")

A script's `note(event, **what)` adds a line to what the test reads as `events`; every event of pods and containers is noted, unless the
script has a method of its own for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.node import Node

WAIT_SECONDS = 20.0
HEAD = """\
#!{python}
import asyncio, json, sys, time
from tare.nri import *

def note(event, **what):
    with open({log!r}, "a") as file:
        file.write(json.dumps({{"event": event, **what}}) + "\\n")

class Noting(Plugin):
    def configure(self, config, runtime, version):
        note("configure", config=config, runtime=runtime)
    def synchronize(self, pods, containers):
        note("synchronize", pods=[pod.id for pod in pods], containers=[container.id for container in containers])
    def shutdown(self):
        note("shutdown")

def noting(event):
    def method(self, pod, *more):
        of = [item for item in more if isinstance(item, Container)]
        note(event, pod=pod.id, name=pod.name, **({{"id": of[0].id, "container": of[0].name}} if of else {{}}))
    return method

for event in {events!r}:
    setattr(Noting, event, noting(event))

class Mine(Noting):
{body}

run(Mine(), {arguments})
"""
EVENTS = (
    *("run_pod_sandbox", "update_pod_sandbox", "post_update_pod_sandbox", "stop_pod_sandbox", "remove_pod_sandbox"),
    *("create_container", "post_create_container", "start_container", "post_start_container", "update_container"),
    *("post_update_container", "stop_container", "remove_container"),
)


def script(path: Path, log: Path, body: str, arguments: str) -> Path:
    """A plugin's program."""
    text = HEAD.format(
        python=sys.executable,
        log=str(log),
        events=EVENTS,
        body=textwrap.indent(textwrap.dedent(body) or "pass", "    "),
        arguments=arguments,
    )
    path.write_text(text)
    path.chmod(0o755)
    return path


class Noted:
    """What a plugin has noted so far."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @property
    def events(self) -> list[dict[str, Any]]:
        """In order."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def names(self, **what: object) -> list[str]:
        """The events in which these are so."""
        return [item["event"] for item in self.events if all(item.get(key) == value for key, value in what.items())]

    def until(self, event: str, count: int = 1, **what: object) -> dict[str, Any]:
        """Wait until there are so many of these events; the last of them."""
        deadline = time.monotonic() + WAIT_SECONDS
        while len(found := [item for item in self.events if item["event"] == event and within(what, item)]) < count:
            assert time.monotonic() < deadline, f"{event} {what} did not come: {self.events}"
            time.sleep(0.01)
        return found[-1]


def within(part: Mapping[str, object], whole: Mapping[str, object]) -> bool:
    """Whether what one says is so in the other."""
    return all(whole.get(key) == value for key, value in part.items())


class PluginProcess(Noted):
    """A plugin that runs."""

    def __init__(self, log: Path, command: list[str]) -> None:
        super().__init__(log)
        self.said = log.with_suffix(".said")
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)

    def stop(self) -> None:
        """SIGTERM, and its end."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # one that blocks
            self.process.kill()
            self.process.wait()


@contextmanager
def plugin(
    node: Node, directory: Path, index: str, name: str, body: str = "", again: bool = True
) -> Iterator[PluginProcess]:
    """One that is connected and synchronized within the block."""
    log = directory / f"{index}-{name}.log"
    arguments = f"name={name!r}, index={index!r}, path={str(node.daemon.run / 'nri.sock')!r}, again={again}"
    path = script(directory / f"{index}-{name}.py", log, body, arguments)
    before = joins(node, f"{index}-{name}")
    running = PluginProcess(log, [sys.executable, str(path)])
    try:
        joined(node, f"{index}-{name}", running, before)
        yield running
    finally:
        running.stop()
        left(node, f"{index}-{name}")


def joins(node: Node, title: str) -> int:
    """How often one of that name has come to take part."""
    return node.daemon.log.read_text(errors="replace").count(f"NRI plugin {title} is connected")


def joined(node: Node, title: str, running: PluginProcess, before: int) -> None:
    """Wait until it takes part."""
    deadline = time.monotonic() + WAIT_SECONDS
    while joins(node, title) <= before:
        assert running.process.poll() is None and time.monotonic() < deadline, running.said.read_text()
        time.sleep(0.01)


def left(node: Node, title: str) -> None:
    """Wait until the daemon has seen it go, unless that has gone itself."""
    deadline = time.monotonic() + WAIT_SECONDS
    while node.daemon.process is not None and node.daemon.process.poll() is None:
        text = node.daemon.log.read_text(errors="replace")
        if text.rfind(f"NRI plugin {title} is connected") <= text.rfind(f"NRI plugin {title} is gone"):
            return
        assert time.monotonic() < deadline, text[-2000:]
        time.sleep(0.01)
