"""`tare doctor` on this node, and on one that lacks things."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tare.cli import examine
from tare.cli.examine import Finding, State
from tare.config import Config, HandlerConfig, RuntimeConfig
from tare.launch import linux
from tare.runtime import abilities

pytestmark = pytest.mark.root


def findings(config: Config | None = None) -> dict[str, Finding]:
    return {found.subject: found for found in asyncio.run(examine.examine(config or Config()))}


def settings(**runtime: object) -> Config:
    return Config(runtime=replace(RuntimeConfig(), **runtime))  # type: ignore[arg-type]


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tare.cli.main", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_nothing_that_this_node_needs_is_missing_and_nothing_is_left() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    found = findings()
    assert not [item for item in found.values() if item.state is State.MISSING]
    assert {"kernel", "control groups", "seccomp", "overlay", "user namespaces", "mapped mounts", "CDI"} <= found.keys()
    assert Path("/proc/self/mountinfo").read_text() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_command_is_content_and_tells_in_json_too() -> None:
    table = doctor()
    assert (table.returncode, table.stderr) == (0, "")
    assert table.stdout.splitlines()[0].split() == ["WHAT", "STATE", "FOUND"]
    told = {item["subject"]: item for item in json.loads(doctor("-o", "json").stdout)}
    assert told["kernel"] == {
        "subject": "kernel",
        "state": "good",
        "text": f"Linux {os.uname().release}",
        "hint": "",
    }


def test_the_command_fails_where_something_needed_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[runtime]\ncgroup_root = "/nowhere"\n')
    told = doctor(f"--config={tmp_path}/config.toml")
    assert told.returncode == 1
    [line] = [line for line in told.stdout.splitlines() if line.startswith("control groups")]
    assert "missing" in line and "no cgroup file system is mounted at /nowhere" in line


@pytest.mark.parametrize(
    ("release", "state"),
    [("5.14.0", State.GOOD), ("6.1.0-18-amd64", State.GOOD), ("10.0-rc1", State.GOOD), ("5.10.0-28-amd64", State.MISSING), ("4.19", State.MISSING)],
)  # fmt: skip
def test_old_kernels(release: str, state: State) -> None:
    assert examine.kernel(release).state is state


def test_missing_controllers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tare.cgroups.layout.EXPECTED_V1", ("cpu", "teapot"))
    monkeypatch.setattr("tare.cgroups.layout.EXPECTED_V2", ("cpu", "teapot"))
    found = findings()["control groups"]
    assert found.state is State.LIMITED and "lack teapot: limits on that are not applied" in found.text


def test_what_the_node_lacks_is_said_and_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), "overlay")

    def none(_: str) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", none)
    monkeypatch.setattr(linux, "fsopen", absent)
    monkeypatch.setattr(abilities, "change", absent)
    (tmp_path / "a.json").write_text("{")
    handlers = {"runsc": HandlerConfig(path=f"{tmp_path}/runsc"), "sh": HandlerConfig(path="/bin/sh")}
    found = findings(settings(handlers=handlers, cdi_spec_dirs=(str(tmp_path),)))
    assert found["seccomp"].state is State.MISSING and "apt install libseccomp2" in found["seccomp"].text
    assert found["overlay"].state is State.MISSING and "No such device" in found["overlay"].text
    assert found["recursive read-only"].state is found["mapped mounts"].state is State.LIMITED
    assert (
        found["handler runsc"].state is State.LIMITED
        and f"{tmp_path}/runsc: No such file" in found["handler runsc"].text
    )
    assert found["handler sh"].state is State.GOOD
    assert found["CDI"].state is State.LIMITED and "a.json" in found["CDI"].text


def test_no_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(linux, "unshare", full)
    found = findings()["user namespaces"]
    assert found.state is State.LIMITED and "No space left on device" in found.text
    assert "max_user_namespaces" in found.hint
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
