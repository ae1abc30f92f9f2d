"""Other runtimes for tests of the whole: those that this machine has, as runtime handlers of a node, and short ways to their containers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

from tare.cgroups.layout import detect
from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, cgroups_named

BIN = Path(__file__).parents[2] / ".venv/bin"
COMMANDS = {"runc": shutil.which("runc"), "tare": str(BIN / "tare-oci")}
# crun runs nothing where cgroup v2 has controllers beside v1, whatever its options.
if detect().kind != "hybrid":
    COMMANDS["crun"] = shutil.which("crun")
RUNSC = BIN / "runsc"
SANDBOX = ["--platform=systrap", "--network=host"]
SHARING = ("builtin", *COMMANDS)
HANDLERS = (*SHARING, "runsc")
NAMES = (f"pod-{number}" for number in itertools.count())


def settings() -> str:
    """The handlers, and one whose program is not there."""
    programs = {**COMMANDS, "missing": "/usr/local/no/such/runtime"}
    sections = [f'[runtime.handlers.{name}]\ntype = "oci"\npath = "{path}"\n' for name, path in programs.items()]
    sections.append(f'[runtime.handlers.runsc]\npath = "{RUNSC}"\noptions = {json.dumps(SANDBOX)}\nsandbox = true\n')
    return "\n".join(sections)


def running(node: Node, handler: str, *command: str, pod: str = "", **config: object) -> tuple[str, str]:
    """A pod with one container that runs: their IDs."""
    made = node.run_pod(pod or next(NAMES), handler=handler)
    container = node.create(made, node.container_config("main", *command, **config))  # type: ignore[arg-type] # fields
    return made, node.start(container)


def info(node: Node, container: str) -> dict[str, object]:
    """What a verbose status adds."""
    client = node.daemon.client
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    response = client.call(client.runtime.ContainerStatus, request)
    found: dict[str, object] = json.loads(response.info["info"])
    return found


def main_pid(node: Node, container: str) -> int:
    """The main process as the node sees it."""
    return int(str(info(node, container)["pid"]))


def gone(node: Node, container: str) -> None:
    """Until nothing of the container's run is left."""
    deadline = time.monotonic() + 10
    while cgroups_named(container) or (node.daemon.run / "bundles" / container).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def launcher_pid(node: Node) -> int:
    """The launcher's PID."""
    return int((node.daemon.run / "launcher.pid").read_text().split()[0])


def kill_launcher(node: Node) -> None:
    """It is killed, and there is another one."""
    old = launcher_pid(node)
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while launcher_pid(node) == old:
        assert time.monotonic() < deadline
        time.sleep(0.01)
