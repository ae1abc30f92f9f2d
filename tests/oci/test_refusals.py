"""Bad input by the command line: the right words, and nothing made: no directory, control group, mount or process."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tare.errors import FailedPrecondition
from tare.oci import arguments, creating, state
from tare.oci.birth import Birth
from tests.oci.test_config import PLACES, RICH, WRONG, changed, kind, path
from tests.support.oci import Bundle, Runtime, wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A variable in the environment of all that a test starts; in the end nothing that has it lives."""
    found = f"TARE_TEST_MARK={uuid.uuid4().hex}"
    monkeypatch.setenv(*found.split("="))
    yield found
    wait_for(lambda: True if not marked(found) else None)


def marked(mark: str) -> list[str]:
    """Processes with the mark, but this one."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environment.split(b"\0"):
                found.append(name)
    return found


def assert_nothing_made(runtime: Runtime, container: str) -> None:
    """No state, no group, no mount."""
    assert not (runtime.root / container).exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/*{container}*")) + list(
        Path("/sys/fs/cgroup").glob(f"*{container}*")
    )
    assert str(runtime.root) not in Path("/proc/self/mountinfo").read_text()


def refused(runtime: Runtime, bundle: Bundle, value: Any) -> str:
    """What `create` says against a configuration; nothing is made."""
    (bundle.path / "config.json").write_text(value if isinstance(value, str) else json.dumps(value))
    container = runtime.name_one()
    done = runtime.call("create", "--bundle", str(bundle.path), container, check=False)
    assert done.returncode == 1
    assert_nothing_made(runtime, container)
    return done.stderr


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(WRONG)
    | st.sampled_from([(place, ["x"] if kind(value) is not list else 7) for place in PLACES if (value := place)])
)
def test_wrong_configurations_make_nothing(
    tare: Runtime, bundle: Bundle, mark: str, wrong: tuple[tuple[str | int, ...], Any]
) -> None:
    place, value = wrong
    current: Any = RICH
    for key in place:
        current = current[key]
    if kind(value) is list and kind(current) is list:
        value = 7
    said = refused(tare, bundle, changed(place, value))
    assert f"{path(place)}: " in said
    assert marked(mark) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "line 1, column 1"), ("{", "line 1"), ('{"a": 1}}', "more after its end"), ("[" * 5000, "nested")],
)
def test_what_is_no_json(tare: Runtime, bundle: Bundle, mark: str, text: str, words: str) -> None:
    assert words in refused(tare, bundle, text)


def test_no_bundle_no_root(tare: Runtime, bundle: Bundle, mark: str) -> None:
    done = tare.call("create", "--bundle", str(bundle.path / "none"), tare.name_one(), check=False)
    assert done.returncode == 1
    assert "config.json: No such file or directory" in done.stderr
    bundle.config["root"]["path"] = "nowhere"
    assert "root.path: " in refused(tare, bundle, bundle.config)
    bundle.config["root"]["path"] = "/"
    assert "root.path: " in refused(tare, bundle, bundle.config)


def test_what_fails_while_it_is_made_is_undone(tare: Runtime, bundle: Bundle, mark: str) -> None:
    bundle.config["mounts"].append(
        {"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]}
    )
    said = refused(tare, bundle, bundle.config)
    assert "mount /x" in said
    assert "/no/such/source" in said
    bundle.config["mounts"][-1] = {"destination": "/x", "type": "nosuchfs", "source": "x"}
    assert "nosuchfs" in refused(tare, bundle, bundle.config)
    del bundle.config["mounts"][-1]
    bundle.linux["resources"]["cpu"] = {"cpus": "4096"}
    assert "cpuset.cpus" in refused(tare, bundle, bundle.config)


def test_a_group_that_is_in_use_is_refused(tare: Runtime, bundle: Bundle) -> None:
    bundle.linux["cgroupsPath"] = f"/{tare.name_one()}"
    bundle.start(tare)
    assert "not empty" in refused(tare, bundle, bundle.config)


def test_a_group_that_is_in_use_is_refused_before_it_is_written_down(
    tare: Runtime, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What state.json names as the container's, `delete --force` kills."""
    bundle.linux["cgroupsPath"] = f"/{tare.name_one()}"
    bundle.start(tare)
    overall, _, options = arguments.parse(["create", "--bundle", str(bundle.path), tare.name_one()])
    monkeypatch.setattr(state, "claim", lambda *_: pytest.fail("it is claimed"))
    with pytest.raises(FailedPrecondition, match="not empty"):
        creating.create(creating.Request(str(tare.root), overall, options), Birth(), held=True)


@pytest.mark.parametrize("container", ["", ".", "..", ".seccomp", "a/b", "a b", "ä", "x" * 1025])
def test_names_that_are_none(tare: Runtime, bundle: Bundle, container: str) -> None:
    bundle.write("true")
    done = tare.call("create", "--bundle", str(bundle.path), container, check=False)
    assert done.returncode == 1
    assert "container ID" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["create"],
        ["create", "a", "b"],
        ["create", "--no-such", "a"],
        ["create", "--bundle"],
        ["--log-format", "xml", "list"],
        ["list", "--format", "xml"],
        ["--rootless", "true", "list"],
        ["kill", "x", "NOSUCH"],
        ["delete", "nobody"],
        ["checkpoint", "x"],
        ["events", "x"],
    ],
    ids=" ".join,
)
def test_command_lines_that_are_wrong(tare: Runtime, words: list[str]) -> None:
    done = tare.call(*words, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "level=error" in done.stderr


def test_version_and_help(tare: Runtime) -> None:
    for flag in ("--version", "-v"):
        first, second = tare.call(flag).stdout.splitlines()
        assert first.split()[:2] == ["tare-oci", "version"]
        assert second.split() == ["spec:", "1.2.0"]
    assert "create" in tare.call("--help").stdout
    assert "--bundle" in tare.call("create", "--help").stdout


def test_a_process_file_that_is_wrong(tare: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = bundle.start(tare)
    file = tmp_path / "process.json"
    file.write_text(json.dumps({**bundle.process, "args": ["ls", 5]}))
    done = tare.call("exec", "--process", str(file), name, check=False)
    assert done.returncode == 1
    assert "args[1]: a string is expected, not a number" in done.stderr


def test_resources_that_are_wrong(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.start(tare)
    done = tare.call("update", "-r", "-", name, stdin='{"pids": {"limit": "many"}}', check=False)
    assert done.returncode == 1
    assert "pids.limit: a number is expected, not a string" in done.stderr
