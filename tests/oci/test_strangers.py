"""What is not the container's stays as it is: another's unit, a stranger in its group, files in its way; what is damaged can be cleared."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tare.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition
from tare.oci import arguments, creating, filters, groups, inspection, lifecycle, scopes, state
from tests.support.oci import SECONDS, V2, Bundle, Runtime

pytestmark = pytest.mark.root


def request_of(root: Path, container: str) -> creating.Request:
    """A create with --systemd-cgroup."""
    overall, _, options = arguments.parse(["--systemd-cgroup", "create", container])
    return creating.Request(str(root), overall, options)


def test_a_unit_of_a_taken_name_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object) -> str:
        raise AlreadyExists("start unit tare-oci-c.scope", cause="it is there")

    stopped: list[str] = []
    monkeypatch.setattr(scopes, "start", taken)
    monkeypatch.setattr(scopes, "stop", stopped.append)
    container = state.claim(str(tmp_path / "root"), "c", {"unit": ""})
    undo = creating.Undo()
    with pytest.raises(AlreadyExists):
        creating.place(request_of(tmp_path, "c"), container, {}, 1, undo)
    undo.all()
    assert stopped == []
    assert state.load(str(tmp_path / "root"), "c").facts["unit"] == ""


def test_a_unit_of_its_own_is_on_record_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    monkeypatch.setattr(scopes, "start", lambda *_: "/tare-test-absent/c")
    monkeypatch.setattr(scopes, "stop", stopped.append)
    container = state.claim(str(tmp_path / "root"), "c", {"unit": ""})
    undo = creating.Undo()
    creating.place(request_of(tmp_path, "c"), container, {}, 1, undo)
    facts = state.load(str(tmp_path / "root"), "c").facts
    assert (facts["unit"], facts["cgroup"]) == ("tare-oci-c.scope", "/tare-test-absent/c")
    undo.all()
    assert stopped == ["tare-oci-c.scope"]


def test_a_stranger_in_the_group_of_a_stopped_container_lives(
    tare: Runtime, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/{tare.name_one()}"
    bundle.linux["cgroupsPath"] = path
    name = bundle.start(tare, "sleep", "0.2")
    tare.until(name, "stopped")
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        try:
            for file in groups.tree().open(path).join:
                Path(file).write_text(str(stranger.pid))
            monkeypatch.setattr(groups, "remove", functools.partial(groups.remove, seconds=0.1))
            with pytest.raises(DeadlineExceeded, match="busy"):
                lifecycle.remove(state.load(str(tare.root), name))
            assert stranger.poll() is None
        finally:
            stranger.send_signal(signal.SIGKILL)
    tare.call("delete", "--force", name)
    assert not groups.tree().exists(path)


def test_a_path_is_the_same_place_in_every_tree(tare: Runtime, bundle: Bundle) -> None:
    """Also where somebody has made what is above it in one tree alone: config-linux.md, "Cgroups Path"."""
    top = tare.name_one()
    first, *_ = trees = [hierarchy.directory for hierarchy in groups.tree().hierarchies]
    os.mkdir(f"{first}/{top}")
    try:
        bundle.linux["cgroupsPath"] = f"/{top}/below/leaf"
        name = bundle.start(tare)
        found = Path(f"/proc/{tare.state(name)['pid']}/cgroup").read_text().splitlines()
        used = [line for line in found if line.partition(":")[2].partition(":")[2] != "/"]
        assert len(used) >= len(trees)
        assert all(line.endswith(f":/{top}/below/leaf") for line in used)
        tare.call("delete", "--force", name)
        assert not groups.tree().exists(f"/{top}/below/leaf")
    finally:
        for tree in trees:
            for path in (f"{tree}/{top}/below", f"{tree}/{top}"):
                if os.path.isdir(path):
                    os.rmdir(path)


def test_an_update_changes_no_devices(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.start(tare)
    resources = '{"devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 77}}'
    tare.call("update", "--resources", "-", name, stdin=resources)
    assert tare.call("exec", name, "sh", "-c", "echo x >/dev/null && echo fine").stdout.strip() == "fine"
    top = Path("/sys/fs/cgroup") if V2 else Path("/sys/fs/cgroup/pids")
    assert (top / f"tare-oci-{name}" / "pids.max").read_text().strip() == "77"


def test_a_paused_container_dies_by_sigkill(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.start(tare)
    tare.call("pause", name)
    tare.call("kill", name, "KILL")
    tare.until(name, "stopped")


def test_a_cut_state_is_told_and_cleared_by_force(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.create(tare)
    file = tare.root / name / state.STATE
    whole = file.read_bytes()
    tare.call("kill", name, "KILL")
    tare.until(name, "stopped")
    for damage in (whole[: len(whole) // 2], b"", b"[]"):
        file.write_bytes(damage)
        assert "read the state" in tare.call("state", name, check=False).stderr
        assert tare.call("delete", name, check=False).returncode == 1
    assert "read the state" in tare.call("--debug", "delete", "--force", name).stderr
    assert not (tare.root / name).exists()
    groups.remove(f"{groups.PREFIX}{name}")


def test_a_container_that_goes_while_all_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state, "names", lambda _: ["gone"])
    _, _, options = arguments.parse(["list"])
    inspection.show_list(str(tmp_path), options)
    assert capsys.readouterr().out.split() == list(inspection.COLUMNS)


def test_a_pid_file_is_written_through_no_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".pid").symlink_to(other)
    creating.write_pid(str(tmp_path / "pid"), 7)
    assert (tmp_path / "pid").read_text() == "7"
    assert other.read_text() == "mine" and not (tmp_path / "pid").is_symlink()
    with pytest.raises(FailedPrecondition):
        creating.write_pid(str(tmp_path / "nowhere" / "pid"), 7)


def test_filters_are_one_for_all_listeners_and_anew_for_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    profile: dict[str, Any] = {"defaultAction": "SCMP_ACT_NOTIFY"}
    first = filters.key(profile | {"listenerPath": "/a", "listenerMetadata": "1"})
    assert filters.key(profile | {"listenerPath": "/b"}) == first
    assert filters.key({"defaultAction": "SCMP_ACT_ALLOW"}) != first
    assert filters.library()
    monkeypatch.setattr(filters, "library", lambda: b"1-2")
    assert filters.key(profile) != first


def run_with_terminal(
    tare: Runtime, bundle: Bundle, script: str, stdin: int, stdout: int
) -> tuple[str, subprocess.Popen[bytes]]:
    """`run` of a script with a terminal, relayed between these."""
    bundle.process["terminal"] = True
    bundle.write("sh", "-c", script)
    name = tare.name_one()
    argv = tare.argv("run", "--bundle", str(bundle.path), name)
    return name, subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL)


def test_nobody_reads_what_a_terminal_shows(tare: Runtime, bundle: Bundle) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    script = "for number in 1 2 3 4 5 6 7 8 9; do echo $number; sleep 0.02; done; exit 5"
    name, running = run_with_terminal(tare, bundle, script, subprocess.DEVNULL, writing)
    os.close(writing)
    assert running.wait(SECONDS) == 5
    assert not (tare.root / name).exists()


def test_the_terminal_of_the_command_hangs_up(tare: Runtime, bundle: Bundle) -> None:
    ours, theirs = os.openpty()
    script = "touch /began; sleep 0.5; exit 4"
    bundle.config["root"]["readonly"] = False
    name, running = run_with_terminal(tare, bundle, script, theirs, theirs)
    os.close(theirs)
    try:
        while not (bundle.rootfs / "began").exists():
            assert running.poll() is None
    finally:
        os.close(ours)
    assert running.wait(SECONDS) == 4
    assert not (tare.root / name).exists()


def test_a_program_that_writes_much_and_reads_nothing(tare: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "much").write_bytes(b"x" * 1_000_000)
    script = "stty raw -echo; echo; sleep 0.3; head -c 1000000 /dev/zero; exit 3"
    with open(tmp_path / "much", "rb") as source, open(tmp_path / "shown", "wb") as shown:
        _, running = run_with_terminal(tare, bundle, script, source.fileno(), shown.fileno())
        try:
            assert running.wait(SECONDS) == 3
        finally:
            running.kill()
            running.wait()
    assert (tmp_path / "shown").read_bytes().count(b"\0") == 1_000_000
