"""A container's life by command: states, signals, exec, terminals, pausing, limits, what is left. The same assertions for each runtime."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.handlers.capabilities import CAPABILITY_BITS
from tests.support.oci import SECONDS, V2, Bundle, Runtime, wait_for

pytestmark = pytest.mark.root
TRAP = 'trap "exit 7" TERM; trap "exit 8" USR1; echo ready >/ready; while :; do sleep 0.05; done'


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def groups(name: str) -> list[Path]:
    """Control groups whose path has a container's name in it."""
    return [path for path in Path("/sys/fs/cgroup").glob("*") if (path / name).is_dir()]


def test_states_from_creation_to_deletion(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["annotations"] = {"one": "1"}
    pid_file = bundle.path / "pid"
    bundle.write("sleep", "1000")
    name = runtime.name_one()
    words = ("--bundle", str(bundle.path), "--pid-file", str(pid_file))
    runtime.quietly("create", *words, name, cwd=bundle.path)
    state = runtime.state(name)
    assert state["status"] == "created"
    assert state["id"] == name
    assert state["bundle"] == str(bundle.path)
    assert state["annotations"] == {"one": "1"}
    assert state["pid"] == int(pid_file.read_text())
    assert state["ociVersion"].startswith("1.")
    assert alive(state["pid"])
    runtime.call("start", name)
    assert runtime.state(name)["status"] == "running"
    assert runtime.call("start", name, check=False).returncode != 0
    refused = runtime.call("delete", name, check=False)
    assert refused.returncode != 0
    assert {"crun": "not in `created` or `stopped`"}.get(runtime.name, "not stopped") in refused.stderr
    runtime.call("kill", name, "SIGKILL")
    runtime.until(name, "stopped")
    assert not alive(state["pid"])
    runtime.call("delete", name)
    gone = runtime.call("state", name, check=False)
    assert gone.returncode != 0
    assert {"crun": "No such file"}.get(runtime.name, "does not exist") in gone.stderr
    assert not (runtime.root / name).exists()


def test_a_created_container_can_be_deleted(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.create(runtime)
    pid = runtime.state(name)["pid"]
    runtime.call("delete", name) if runtime.name != "crun" else runtime.call("delete", "--force", name)
    wait_for(lambda: True if not alive(pid) else None)


def test_the_name_is_taken_once(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.create(runtime)
    done = runtime.call("create", "--bundle", str(bundle.path), name, check=False)
    assert done.returncode != 0
    assert runtime.state(name)["status"] == "created"


@pytest.mark.parametrize(("words", "code"), [(["TERM"], 7), (["SIGTERM"], 7), ([], 7), (["10"], 8), (["usr1"], 8)])
def test_signals_by_name_and_number(runtime: Runtime, bundle: Bundle, words: list[str], code: int) -> None:
    if words == ["usr1"] and runtime.name == "crun":
        words = ["USR1"]
    bundle.config["root"]["readonly"] = False
    bundle.write("sh", "-c", TRAP)
    name = runtime.name_one()
    with open(bundle.path / "output", "ab") as output:
        argv = runtime.argv("run", "--bundle", str(bundle.path), name)
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as running:
            wait_for(lambda: True if (bundle.rootfs / "ready").exists() else None)
            runtime.call("kill", name, *words)
            assert running.wait(SECONDS) == code


def test_a_signal_to_the_command_is_passed_on(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    bundle.write("sh", "-c", TRAP)
    argv = runtime.argv("run", "--bundle", str(bundle.path), runtime.name_one())
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as running:
        wait_for(lambda: True if (bundle.rootfs / "ready").exists() else None)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(SECONDS) == 8


def test_a_program_killed_by_a_signal_has_a_shells_code(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [item for item in bundle.linux["namespaces"] if item["type"] != "pid"]
    assert bundle.shell(runtime, "kill -9 $$", check=False).returncode == 137


def test_kill_all_reaches_every_process(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.start(runtime, "sh", "-c", "sleep 1000 & sleep 1000 & wait")
    pids = wait_for(lambda: found if len(found := processes(runtime, name)) == 3 else None)
    runtime.call("kill", "--all", name, "KILL")
    wait_for(lambda: True if not any(alive(pid) for pid in pids) else None)
    runtime.call("delete", name)


def processes(runtime: Runtime, name: str) -> list[int]:
    """`ps --format json`."""
    found: list[int] = json.loads(runtime.call("ps", "--format", "json", name).stdout)
    return found


def test_ps_shows_the_containers_processes(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.start(runtime, "sleep", "4321")
    assert processes(runtime, name) == [runtime.state(name)["pid"]]
    title, line = runtime.call("ps", name).stdout.strip().splitlines()
    assert "PID" in title
    # crun lists PIDs alone, whatever else the node's ps would say.
    assert line.endswith(str(runtime.state(name)["pid"]) if runtime.name == "crun" else "sleep 4321")


def test_exec_is_within_and_has_its_own_settings(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["env"].append("FROM=config")
    name = bundle.start(runtime)
    pid = runtime.state(name)["pid"]
    script = "for n in pid net ipc uts mnt; do readlink /proc/self/ns/$n; done"
    inside = runtime.call("exec", name, "sh", "-c", script).stdout.split()
    assert inside == [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("pid", "net", "ipc", "uts", "mnt")]
    more = [] if runtime.name == "crun" else ["--additional-gids", "56"]  # which crun 1.8 has not got
    words = ("--env", "ADDED=too", "--cwd", "/etc", "--user", "12:34", *more)
    done = runtime.call(
        "exec", *words, name, "/bin/sh", "-c", "pwd; echo $FROM $ADDED; grep -e Uid -e Gid -e Groups /proc/self/status"
    )
    lines = done.stdout.split("\n")
    # crun 1.8 puts --env in the place of the container's environment, PATH and all.
    assert lines[:2] == ["/etc", "too" if runtime.name == "crun" else "config too"]
    assert [line.split()[1:2] for line in lines[2:5]] == [["12"], ["34"], more[1:]]
    assert runtime.call("exec", name, "sh", "-c", "exit 23", check=False).returncode == 23
    assert runtime.call("exec", name, "cat", stdin="in").stdout == "in"
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    assert runtime.call("exec", name, "cat", "/proc/self/cgroup").stdout.count("\n") == groups.count("\n")


def test_exec_of_what_is_not_there_fails(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.start(runtime)
    done = runtime.call("exec", name, "/no/such/program", check=False)
    assert done.returncode in (1, 127, 255)
    assert "no such file or directory" in done.stderr.lower()


def test_exec_from_a_process_file_detached(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    name = bundle.start(runtime)
    process = {**bundle.process, "args": ["sh", "-c", "echo made >/made; exec sleep 1000"], "cwd": "/tmp"}
    file, pid_file = bundle.path / "process.json", bundle.path / "exec.pid"
    file.write_text(json.dumps(process))
    words = ("exec", "--process", str(file), "--detach", "--pid-file", str(pid_file), name)
    runtime.quietly(*words, cwd=bundle.path)
    wait_for(lambda: True if (bundle.rootfs / "made").exists() else None)
    pid = int(pid_file.read_text())
    assert os.readlink(f"/proc/{pid}/cwd").endswith("/tmp")
    assert pid in processes(runtime, name)


def test_pause_and_resume(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    name = bundle.start(runtime, "sh", "-c", "while :; do date +%s%N >/now; sleep 0.02; done")
    now = bundle.rootfs / "now"
    wait_for(lambda: True if now.exists() and now.read_text() else None)
    runtime.call("pause", name)
    assert runtime.state(name)["status"] == "paused"
    before = now.read_text()
    assert runtime.call("exec", name, "true", check=False).returncode != 0
    assert now.read_text() == before
    runtime.call("resume", name)
    assert runtime.state(name)["status"] == "running"
    wait_for(lambda: True if now.read_text() not in ("", before) else None)


def test_a_paused_container_is_deleted_by_force(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.start(runtime)
    pid = runtime.state(name)["pid"]
    runtime.call("pause", name)
    runtime.call("delete", "--force", name)
    wait_for(lambda: True if not alive(pid) else None)
    assert runtime.call("state", name, check=False).returncode != 0


def limit(name: str, first: str, second: str) -> str:
    """A file of a container's group."""
    top = Path("/sys/fs/cgroup")
    return (
        (top / name / second if V2 else top / first.partition("/")[0] / name / first.partition("/")[2])
        .read_text()
        .strip()
    )


def test_limits_are_changed_in_place(runtime: Runtime, bundle: Bundle) -> None:
    path = runtime.name_one()
    bundle.linux["cgroupsPath"] = f"/{path}"
    bundle.linux["resources"]["pids"] = {"limit": 100}
    name = bundle.start(runtime)
    runtime.call("update", "--pids-limit", "50", name)
    assert limit(path, "pids/pids.max", "pids.max") == "50"
    resources = json.dumps({"memory": {"limit": 32 << 20}, "cpu": {"quota": 20000, "period": 50000}})
    runtime.call("update", "--resources", "-", name, stdin=resources)
    assert limit(path, "memory/memory.limit_in_bytes", "memory.max") == str(32 << 20)
    file = bundle.path / "resources.json"
    file.write_text(json.dumps({"pids": {"limit": 60}}))
    runtime.call("update", "-r", str(file), name)
    assert limit(path, "pids/pids.max", "pids.max") == "60"


def test_list(runtime: Runtime, bundle: Bundle) -> None:
    assert runtime.call("list", "--quiet").stdout == ""
    first, second = bundle.start(runtime), bundle.create(runtime)
    assert sorted(runtime.call("list", "-q").stdout.split()) == sorted([first, second])
    found = json.loads(runtime.call("list", "--format", "json").stdout)
    assert {item["id"]: item["status"] for item in found} == {first: "running", second: "created"}
    table = runtime.call("list").stdout.splitlines()
    assert table[0].split()[:4] == ["NAME" if runtime.name == "crun" else "ID", "PID", "STATUS", "BUNDLE"]


def test_spec_and_features(runtime: Runtime, tmp_path: Path) -> None:
    runtime.call("spec", cwd=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["process"]["args"] == ["sh"]
    assert runtime.call("spec", cwd=tmp_path, check=False).returncode != 0
    if runtime.name != "crun":  # 1.8.1 has no `features`
        found = json.loads(runtime.call("features").stdout)
        assert "CAP_CHOWN" in found["linux"]["capabilities"]
        assert set(found["hooks"]) >= {"prestart", "poststop"}
        assert {"bind", "rbind", "rro"} <= set(found["mountOptions"])


@contextlib.contextmanager
def console(path: Path) -> Iterator[socket.socket]:
    """A listener for a terminal's master."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(SECONDS)
        yield listener


def master(listener: socket.socket) -> int:
    """The descriptor that a runtime sends."""
    connection, _ = listener.accept()
    with connection:
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
    return array.array("i", ancillary[0][2][:4])[0]


def read_until(fd: int, text: str) -> str:
    """What a terminal says, up to a text."""
    found = ""
    while text not in found:
        assert select.select([fd], [], [], SECONDS)[0], found
        found += os.read(fd, 4096).decode()
    return found


def test_a_terminal_goes_to_the_console_socket(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.process["terminal"] = True
    bundle.process["consoleSize"] = {"height": 33, "width": 77}
    bundle.write("sh", "-c", "tty; stty size; ls -l /dev/console; read line; echo got $line; sleep 1000")
    name = runtime.name_one()
    with console(tmp_path / "console") as listener:
        words = ("create", "--bundle", str(bundle.path), "--console-socket", str(tmp_path / "console"), name)
        runtime.quietly(*words, cwd=bundle.path)
        fd = master(listener)
    try:
        runtime.call("start", name)
        found = read_until(fd, "/dev/console")
        assert "/dev/pts/0" in found
        assert "33 77" in found
        os.write(fd, b"this\n")
        assert "got this" in read_until(fd, "got this")
    finally:
        os.close(fd)
    runtime.call("delete", "--force", name)


def test_exec_with_a_terminal(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = bundle.start(runtime)
    with console(tmp_path / "console") as listener:
        words = ("exec", "--tty", "--detach", "--console-socket", str(tmp_path / "console"), name)
        runtime.quietly(*words, "sh", "-c", "tty; read line; echo got $line; sleep 1000", cwd=bundle.path)
        fd = master(listener)
    try:
        assert "/dev/pts/0" in read_until(fd, "/dev/pts/0")
        os.write(fd, b"this\n")
        assert "got this" in read_until(fd, "got this")
    finally:
        os.close(fd)


def test_the_pidfd_goes_to_its_socket(tare: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.write("sleep", "1000")
    name = tare.name_one()
    path = str(tmp_path / "pidfd")
    for words, said in (
        (("create", "--bundle", str(bundle.path), "--pidfd-socket", path, name), b"standard"),
        (
            ("exec", "--detach", "--pidfd-socket", path, "--pid-file", str(tmp_path / "pid"), name, "sleep", "1000"),
            b"setns",
        ),
    ):
        with console(Path(path)) as listener:
            tare.quietly(*words, cwd=bundle.path)
            connection, _ = listener.accept()
            with connection:
                data, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
        assert data.rstrip(b"\0") == said
        pidfd = array.array("i", ancillary[0][2][:4])[0]
        pid = int((tmp_path / "pid").read_text()) if said == b"setns" else tare.state(name)["pid"]
        assert f"Pid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        os.close(pidfd)
        Path(path).unlink()
        if said == b"standard":
            tare.call("start", name)
    done = tare.call("run", "--bundle", str(bundle.path), "--pidfd-socket", path, tare.name_one(), check=False)
    assert done.returncode != 0  # nobody listens
    assert path in done.stderr
    assert not [found for made in tare.made[1:] for found in groups(made) + groups(f"tare-oci-{made}")]


def test_the_waiting_process_has_no_descriptor_of_the_commands(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.create(tare)
    place = Path(f"/proc/{tare.state(name)['pid']}/fd")
    held = [os.readlink(place / fd) for fd in os.listdir(place) if int(fd) > 2]
    # Its root and its null device, as it sees them, the gate, the page.
    expected = ("/", "/dev/null", "socket", "/memfd:tare-outcome (deleted)")
    assert sorted(link.partition(":[")[0] for link in held) == sorted(expected)


def test_nothing_is_left(runtime: Runtime, bundle: Bundle) -> None:
    bundle.shell(runtime, "true")
    assert str(bundle.path.parent) not in Path("/proc/self/mountinfo").read_text()
    assert [path for path in runtime.root.iterdir() if not path.name.startswith(".")] == []
    assert not [found for name in runtime.made for found in groups(name) + groups(f"tare-oci-{name}")]


def test_the_log_is_json_where_asked(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    words = ("--log", str(log), "--log-format", "json", "run", "--bundle", str(bundle.path), runtime.name_one())
    bundle.write("/no/such/program")
    done = runtime.call(*words, check=False)
    assert done.returncode != 0
    entry = json.loads(log.read_text().splitlines()[-1])
    assert entry["level"] == "error"
    assert "no such file or directory" in entry["msg"].lower()


def test_a_terminal_in_the_foreground_is_relayed(tare: Runtime, bundle: Bundle) -> None:
    bundle.process["terminal"] = True
    bundle.write("sh", "-c", "tty; stty size; read line; echo got $line; exit 6")
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 71, 0, 0))
        argv = tare.argv("run", "--bundle", str(bundle.path), tare.name_one())
        with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as running:
            found = read_until(ours, "31 71")
            assert "/dev/pts/0" in found
            os.write(ours, b"this\n")
            read_until(ours, "got this")
            assert running.wait(SECONDS) == 6
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_kept_container_is_stopped_and_there(runtime: Runtime, bundle: Bundle) -> None:
    bundle.write("true")
    name = runtime.name_one()
    # crun 1.8 keeps only what it does not wait for.
    runtime.quietly(
        "run", "--detach" if runtime.name == "crun" else "--keep", "--bundle", str(bundle.path), name, cwd=bundle.path
    )
    assert runtime.until(name, "stopped")["pid"] == 0
    runtime.call("delete", name)


def test_exec_with_more_and_with_fewer_rights(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["noNewPrivileges"] = False
    bundle.process["capabilities"] = {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "permitted")}
    name = bundle.start(runtime)
    facts = "grep -e CapEff -e CapBnd -e NoNewPrivs /proc/self/status"
    done = runtime.call("exec", "--cap", "CAP_NET_RAW", "--no-new-privs", name, "sh", "-c", facts)
    effective, bounding, locked = (line.split()[1] for line in done.stdout.splitlines())
    # "Add", say the helps of all three; crun 1.8 puts it in the place of those that the container has.
    added = 0 if runtime.name == "crun" else CAPABILITY_BITS["CAP_KILL"]
    assert int(effective, 16) == int(bounding, 16) == added | CAPABILITY_BITS["CAP_NET_RAW"]
    assert locked == "1"
    plain = runtime.call("exec", name, "sh", "-c", facts).stdout.splitlines()
    assert [line.split()[1] for line in plain] == [f"{CAPABILITY_BITS['CAP_KILL']:016x}"] * 2 + ["0"]


def test_exec_inherits_descriptors(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.start(runtime)
    reading, writing = os.pipe()
    os.write(writing, b"through")
    os.close(writing)
    words = ("exec", "--preserve-fds", "1", name, "cat", "/proc/self/fd/3")
    done = runtime.call(*words, close_fds=False, preexec_fn=lambda: os.dup2(reading, 3))
    os.close(reading)
    assert done.stdout == "through"


def test_a_paused_container_takes_an_exec_only_if_asked(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.start(tare)
    tare.call("pause", name)
    refused = tare.call("exec", name, "true", check=False)
    assert "paused" in refused.stderr
    with open(bundle.path / "output", "ab") as output:
        argv = tare.argv("exec", "--ignore-paused", name, "true")
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as running:
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(0.5)
            tare.call("resume", name)
            assert running.wait(SECONDS) == 0


def test_a_created_container_is_killed(runtime: Runtime, bundle: Bundle) -> None:
    name = bundle.create(runtime)
    runtime.call("kill", name, "KILL")
    runtime.until(name, "stopped")
    assert runtime.call("start", name, check=False).returncode != 0


def test_exec_in_a_group_below(tare: Runtime, bundle: Bundle) -> None:
    path = tare.name_one()
    bundle.linux["cgroupsPath"] = f"/{path}"
    name = bundle.start(tare)
    top = Path("/sys/fs/cgroup") if V2 else Path("/sys/fs/cgroup/pids")
    (top / path / "below").mkdir()
    words = ("--cgroup", "below") if V2 else ("--cgroup", "pids:/below")
    done = tare.call("exec", *words, name, "cat", "/proc/self/cgroup")
    assert any(line.endswith("/below") for line in done.stdout.splitlines())
    assert tare.call("exec", "--cgroup", "/nowhere", name, "true", check=False).returncode == 1
    assert tare.call("exec", "--cgroup", "../..", name, "true", check=False).returncode == 1
    wait_for(lambda: True if rmdir(top / path / "below") else None)


def rmdir(path: Path) -> bool:
    """Whether a group could be removed: what ran in it may have to be reaped yet."""
    try:
        path.rmdir()
    except OSError:
        return False
    return True
