"""A seccomp filter with a listener: who is to answer gets it, for the container's process and for an exec's, from `tare oci` alone."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.support.oci import Bundle, Runtime
from tests.support.seccomp import agent, number_of

pytestmark = pytest.mark.root


def profile(path: Path) -> dict[str, Any]:
    """mkdir is the agent's."""
    names = ["mkdir", "mkdirat"]
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(path),
        "listenerMetadata": "of mine",
        "syscalls": [{"names": names, "action": "SCMP_ACT_NOTIFY"}],
    }


def test_the_listener_of_a_container_and_of_an_exec(tare: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    bundle.config["linux"]["seccomp"] = profile(path)
    bundle.config["root"]["readonly"] = False
    bundle.config["annotations"] = {"who": "is it"}
    answers = {number_of(name): errno.ENOSPC for name in ("mkdir", "mkdirat")}
    with agent(path, answers) as served:
        name = bundle.create(tare)
        assert served.states == []  # the filter is loaded when the container starts
        pid = tare.state(name)["pid"]
        tare.call("start", name)
        [state] = served.states
        assert state["pid"] == state["state"]["pid"] == pid and state["metadata"] == "of mine"
        assert state["state"]["id"] == name and state["state"]["bundle"] == str(bundle.path)
        assert state["state"]["annotations"] == {"who": "is it"}
        done = tare.call("exec", name, "mkdir", "/tmp/x", check=False)
        assert done.returncode != 0 and "No space left" in done.stdout + done.stderr
        assert len(served.states) == 2 and served.states[1]["state"]["status"] == "running"
        assert served.states[1]["pid"] != pid == served.states[1]["state"]["pid"]
        tare.call("kill", name, "KILL")
        tare.until(name, "stopped")
        tare.call("delete", name)


def test_without_an_agent_the_container_does_not_start(tare: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.config["linux"]["seccomp"] = profile(tmp_path / "nobody.sock")
    name = bundle.create(tare)
    done = tare.call("start", name, check=False)
    assert done.returncode != 0 and "nobody.sock" in done.stderr and "No such file" in done.stderr
    tare.call("delete", "--force", name)
