"""Hooks at all six points, in their order and with their state; what a failing one undoes. The same assertions for each runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.oci import Bundle, Runtime

pytestmark = pytest.mark.root

POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
STATUS = {
    "prestart": ("created", "creating"),  # runc: created, the specification: creating
    "createRuntime": ("created", "creating"),
    "createContainer": ("created", "creating"),
    "startContainer": (
        "created",
        "running",
        "starting",
    ),  # the specification: created; runc: running; crun: a word of its own
    "poststart": ("running", "created"),  # runc 1.1, which runs it too early: created
    "poststop": ("stopped",),
}

SPECIFIED = dict(zip(POINTS, ("creating", "creating", "creating", "created", "running", "stopped"), strict=True))


def hook(point: str, log: Path, *, end: int = 0) -> dict[str, Any]:
    """A hook that notes its point and the state that it is told."""
    script = f"state=$(cat); echo {point} $state >>{log}; exit {end}"
    return {"path": "/bin/busybox", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 10}


def noted(log: Path) -> list[tuple[str, dict[str, Any]]]:
    """(point, state) in the order in which they were."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.partition(" ")[0], json.loads(line.partition(" ")[2])) for line in lines]


def log_of(bundle: Bundle) -> Path:
    """A file by the same path on the node and in the container."""
    shared = bundle.path / "shared"
    shared.mkdir()
    bundle.config["mounts"].append(
        {"destination": str(shared), "type": "bind", "source": str(shared), "options": ["rbind", "rw"]}
    )
    bundle.config["root"]["readonly"] = False
    return shared / "log"


def test_every_point_in_its_order_with_its_state(runtime: Runtime, bundle: Bundle) -> None:
    log = log_of(bundle)
    bundle.config["annotations"] = {"who": "is it"}
    bundle.config["hooks"] = {point: [hook(point, log)] for point in POINTS}
    name = bundle.create(runtime)
    made = [point for point, _ in noted(log)]
    # runc 1.1 runs poststart when it creates; the specification: after the user-specified process is executed.
    assert made == ["prestart", "createRuntime", "createContainer", *(["poststart"] if runtime.name == "runc" else [])]
    pid = runtime.state(name)["pid"]
    runtime.call("start", name)
    runtime.call("kill", name, "KILL")
    runtime.until(name, "stopped")
    runtime.call("delete", name)
    found = noted(log)
    assert sorted(point for point, _ in found) == sorted(POINTS)
    # crun 1.8 begins with poststart while startContainer may still be under way; the specification: when the program has been executed.
    assert runtime.name != "tare" or [point for point, _ in found] == list(POINTS)
    for point, state in found:
        assert state["id"] == name
        assert state["status"] in STATUS[point], point
        assert runtime.name != "tare" or state["status"] == SPECIFIED[point], point
        if (runtime.name, point) != ("crun", "startContainer"):  # where crun 1.8 says what is "/" to the container
            assert state["bundle"] == str(bundle.path)
        assert state["annotations"] == {"who": "is it"}
        if point in ("prestart", "createRuntime", "poststart"):
            assert state["pid"] == pid, point


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer"])
def test_one_that_fails_undoes_the_container(runtime: Runtime, bundle: Bundle, point: str) -> None:
    log = log_of(bundle)
    bundle.config["hooks"] = {point: [hook(point, log, end=3)]}
    bundle.write("sh", "-c", f"echo program >>{log}")
    name = runtime.name_one()
    done = runtime.call("run", "--bundle", str(bundle.path), name, check=False)
    assert done.returncode != 0
    assert [line.partition(" ")[0] for line in log.read_text().splitlines()] == [point]
    assert runtime.call("state", name, check=False).returncode != 0


def test_a_failing_start_hook_keeps_the_program_from_running(runtime: Runtime, bundle: Bundle) -> None:
    log = log_of(bundle)
    bundle.config["hooks"] = {"startContainer": [hook("startContainer", log, end=3)]}
    bundle.write("sh", "-c", f"echo program >>{log}")
    name = runtime.name_one()
    done = runtime.call("run", "--bundle", str(bundle.path), name, check=False)
    assert done.returncode != 0
    assert "program" not in log.read_text()


def test_one_that_takes_too_long_is_ended(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]}
    bundle.write("true")
    done = runtime.call("run", "--bundle", str(bundle.path), runtime.name_one(), check=False)
    assert done.returncode != 0


def test_a_hook_may_call_the_runtime_for_its_container(runtime: Runtime, bundle: Bundle) -> None:
    """Poststart: it runs by then. Poststop: it is deleted by then, says the specification."""
    log = log_of(bundle)
    words = " ".join(runtime.argv("state"))
    script = f'{words} "$0" >>{log} 2>&1; echo $? >>{log}'
    name = runtime.name_one()
    hooks = ["poststop"] if runtime.name == "runc" else ["poststart", "poststop"]  # runc 1.1 runs poststart too early
    bundle.config["hooks"] = {
        point: [{"path": "/bin/sh", "args": ["sh", "-c", script, name], "env": ["PATH=/usr/bin:/bin"], "timeout": 10}]
        for point in hooks
    }
    bundle.write("sleep", "1000")
    runtime.quietly("create", "--bundle", str(bundle.path), name, cwd=bundle.path)
    runtime.call("start", name)
    if "poststart" in hooks:
        assert '"status": "running"' in log.read_text()
        assert log.read_text().splitlines()[-1] == "0"
    runtime.call("kill", name, "KILL")
    runtime.until(name, "stopped")
    runtime.call("delete", name)
    # crun 1.8 deletes it after them.
    assert log.read_text().splitlines()[-1] == "0" if runtime.name == "crun" else "does not exist" in log.read_text()


def test_one_that_deletes_its_container(tare: Runtime, bundle: Bundle) -> None:
    """Nothing waits for itself: a poststart hook that deletes by force ends the container, one after its end finds nothing."""
    name = tare.name_one()
    words = [*tare.argv("delete", "--force", name)]
    once = {"path": words[0], "args": words, "env": ["PATH=/usr/bin:/bin"], "timeout": 10}
    bundle.config["hooks"] = {"poststart": [once], "poststop": [once]}
    bundle.write("sleep", "1000")
    tare.quietly("create", "--bundle", str(bundle.path), name, cwd=bundle.path)
    tare.call("start", name)
    assert tare.call("state", name, check=False).returncode == 1
