"""Containers of other runtimes behind the same socket: the built-in handler is the oracle, and each of them must do as it does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cgroups.layout import detect
from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.daemon import Daemon
from tests.support.handlers import COMMANDS, HANDLERS, NAMES, SHARING, gone, main_pid, running, settings
from tests.support.node import Node, busy_node, cgroups_named

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("hand", settings=settings()) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []


@pytest.fixture(params=SHARING)
def sharing(request: pytest.FixtureRequest) -> str:
    """Each handler whose containers stand on the node's kernel."""
    return str(request.param)


@pytest.fixture(params=HANDLERS)
def handler(request: pytest.FixtureRequest) -> str:
    """Each handler's name."""
    return str(request.param)


# Lives


def test_a_container_from_first_to_last(node: Node, handler: str) -> None:
    pod, container = running(node, handler, "sh", "-c", "echo out; echo err >&2; exit 3")
    status = node.wait(container)
    assert (status.exit_code, status.reason, status.message) == (3, "Error", "")
    assert status.created_at < status.started_at < status.finished_at
    assert sorted(node.log(container)) == ["err", "out"]
    gone(node, container)
    assert node.pod_status(pod).runtime_handler == handler
    good = node.start(node.create(pod, node.container_config("good", "true", attempt=1)))
    assert (node.wait(good).exit_code, node.status(good).reason) == (0, "Completed")


def test_what_it_is_and_where(node: Node, sharing: str) -> None:
    """The pod's names and address, its own processes, its user, its cgroup, and a seccomp filter."""
    security = pb.LinuxContainerSecurityContext(
        run_as_user=pb.Int64Value(value=1000),
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
        no_new_privs=True,
    )
    pod, container = running(node, sharing, "sleep", "1000", security=security, pod=f"web-{sharing}")
    script = "hostname; id -u; ip -4 -o addr show eth0; grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status; echo x > /dev/shm/x; ps"
    out = node.exec(container, "sh", "-c", script).stdout.decode()
    assert out.startswith(f"web-{sharing}\n1000\n")
    assert f"{node.pod_status(pod).network.ip}/" in out
    assert re.search(r"NoNewPrivs:\s1\nSeccomp:\s2", out) and re.search(r"CapEff:\s0+\n", out)
    assert re.search(r"^ *1 +1000 .*sleep 1000$", out, re.MULTILINE)
    pid = main_pid(node, container)
    groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    assert sum(container in line for line in groups) >= (1 if detect().kind == "v2" else 5)


def test_what_a_container_writes_stays_its_own(node: Node, handler: str) -> None:
    pod, first = running(node, handler, "sh", "-c", "echo mine > /etc/own; sleep 1000")
    second = node.start(node.create(pod, node.container_config("second", "sleep", "1000")))
    assert node.exec(first, "cat", "/etc/own").stdout == b"mine\n"
    assert node.exec(second, "cat", "/etc/own").exit_code == 1


def test_many_lines_arrive_in_order(node: Node, handler: str) -> None:
    _, container = running(node, handler, "seq", "20000")
    assert node.wait(container).exit_code == 0
    lines = [line.split(" ", 3) for line in Path(node.status(container).log_path).read_text().splitlines()]
    text = "".join(words + "\n" * (tag == "F") for _, _, tag, words in lines)
    assert text.split() == [str(number) for number in range(1, 20001)]


def test_a_terminal(node: Node, handler: str) -> None:
    _, container = running(node, handler, "sh", "-c", "tty; test -t 1 && test -t 2 && echo both; exit 5", tty=True)
    assert node.wait(container).exit_code == 5
    lines = [line.rstrip("\r") for line in node.log(container)]
    assert lines[1:] == ["both"]
    assert lines[0].startswith("/dev/") or handler == "runsc"  # which has no name for a terminal from outside


def test_stdin_is_open_and_without_it_is_empty(node: Node, handler: str) -> None:
    pod, container = running(node, handler, "sh", "-c", "read line; echo got $line", stdin=True)
    with open(node.daemon.run / "containers" / container / "stdin", "wb") as fifo:
        fifo.write(b"words\n")
    assert node.wait(container).exit_code == 0
    assert node.log(container) == ["got words"]
    other = node.start(node.create(pod, node.container_config("other", "wc", "-c")))
    assert (node.wait(other).exit_code, node.log(other)) == (0, ["0"])


def test_mounts_of_the_request(node: Node, handler: str) -> None:
    source = node.daemon.base / "data"
    source.mkdir(exist_ok=True)
    (source / "file").write_text("shared\n")
    mounts = [pb.Mount(container_path="/data", host_path=str(source), readonly=True)]
    _, container = running(node, handler, "sh", "-c", "cat /data/file; ! touch /data/new", mounts=mounts)
    assert node.wait(container).exit_code == 0
    assert "shared" in node.log(container)
    shutil.rmtree(source)


def test_a_namespace_of_processes_that_a_pod_shares(node: Node, sharing: str) -> None:
    pod = node.run_pod(node.pod_config(next(NAMES), pid=pb.POD), handler=sharing)
    first = node.start(node.create(pod, "first", "sleep", "1000"))
    second = node.start(node.create(pod, "second", "sh", "-c", "sleep 2000 & ps -o args; exit 4"))
    assert node.wait(second).exit_code == 4
    assert "sleep 1000" in node.log(second)
    assert "sleep 2000" not in node.exec(first, "ps", "-o", "args").stdout.decode()


# Ends


def test_stop_asks_and_then_kills(node: Node, handler: str) -> None:
    pod, polite = running(node, handler, "sh", "-c", "trap 'exit 7' TERM; echo up; while true; do sleep 0.05; done")
    deaf = node.start(node.create(pod, "deaf", "sh", "-c", "trap '' TERM; echo up; while true; do sleep 0.05; done"))
    for container in (polite, deaf):
        node.wait_for_log(container, "up")
    node.stop(polite, 30)
    node.stop(deaf, 1)
    assert (node.status(polite).exit_code, node.status(deaf).exit_code) == (7, 137)


def test_memory_that_is_not_there(node: Node, handler: str) -> None:
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    hungry = "head -c 200m /dev/zero | tail -c 190m > /dev/null"
    _, container = running(node, handler, "sh", "-c", f"{hungry}; exit 9", resources=resources)
    status = node.wait(container)
    assert (status.reason, status.exit_code) in (("OOMKilled", 137), ("OOMKilled", 9))


def test_limits_are_those_of_the_group(node: Node, handler: str) -> None:
    """Also one that another runtime would stumble over: huge pages, where v1 and v2 are mixed."""
    pages = [pb.HugepageLimit(page_size="2MB", limit=0)]
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_shares=512, hugepage_limits=pages)
    _, container = running(node, handler, "sleep", "1000", resources=resources)
    groups = cgroups_named(container)
    limits = {
        Path(group, name).read_text().strip()
        for group in groups
        for name in ("memory.limit_in_bytes", "memory.max")
        if Path(group, name).exists()
    }
    assert limits == {str(64 * MIB)}


def test_a_command_that_is_not_there(node: Node, handler: str) -> None:
    pod = node.run_pod(next(NAMES), handler=handler)
    container = node.create(pod, "main", "/no/such/program")
    with pytest.raises(CallFailed) as failure:
        node.start(container)
    assert "o such file" in str(failure.value)
    status = node.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    gone(node, container)


# Execs


def test_execs(node: Node, handler: str) -> None:
    _, container = running(node, handler, "sleep", "1000")
    for script, code, out, err in (
        ("echo out; echo err >&2", 0, b"out\n", b"err\n"),
        ("exit 9", 9, b"", b""),
        ("kill -TERM $$", 143, b"", b""),
        ("sleep 1000 & echo left", 0, b"left\n", b""),
    ):
        result = node.exec(container, "sh", "-c", script)
        assert (result.exit_code, result.stdout, result.stderr) == (code, out, err), script
    large = node.exec(container, "head", "-c", "3000000", "/dev/zero")
    assert large.stdout == bytes(3000000)
    with pytest.raises(CallFailed, match="no/such"):
        node.exec(container, "/no/such/program")
    assert not list(node.daemon.run.glob("bundles/*/exec/*"))


def test_an_exec_whose_time_is_over_ends_with_all_that_it_started(node: Node, sharing: str) -> None:
    _, container = running(node, sharing, "sleep", "1000")
    with pytest.raises(CallFailed) as failure:
        node.exec(container, "sh", "-c", "sleep 3000 & (trap '' TERM; sleep 4000) & sleep 5000", timeout=1)
    assert failure.value.status == "DEADLINE_EXCEEDED"
    left = node.exec(container, "ps", "-o", "args").stdout.decode()
    assert "sleep 1000" in left
    assert not re.search("sleep [345]000", left)
    pid = main_pid(node, container)
    below = leaks.descendants(leaks.processes(), pid)
    assert below == {pid} or not below - {pid}


def test_what_a_sandbox_is(node: Node) -> None:
    """A kernel of its own under the pod's name and address; a command is ended in it when its time is over; no namespace of PIDs is shared."""
    pod, container = running(node, "runsc", "sleep", "1000", pod="boxed")
    out = node.exec(container, "sh", "-c", "hostname; ip -4 -o addr show eth0; dmesg").stdout.decode()
    assert out.startswith("boxed\n") and f"{node.pod_status(pod).network.ip}/" in out and "gVisor" in out
    with pytest.raises(CallFailed) as failure:
        node.exec(container, "sleep", "3000", timeout=1)
    assert failure.value.status == "DEADLINE_EXCEEDED"
    deadline = time.monotonic() + 10
    while "sleep 3000" in node.exec(container, "ps", "-o", "args").stdout.decode():
        assert time.monotonic() < deadline
    shared = node.pod_config("shared", pid=pb.POD)
    node.refused("FAILED_PRECONDITION", "cannot share a PID", lambda: node.run_pod(shared, handler="runsc"))


# Which


def test_one_that_nobody_knows_and_one_whose_program_is_missing(node: Node) -> None:
    node.refused(
        "INVALID_ARGUMENT", "there is no runtime handler none-such", lambda: node.run_pod("x", handler="none-such")
    )
    node.refused(
        "FAILED_PRECONDITION",
        "/usr/local/no/such/runtime: No such file or directory",
        lambda: node.run_pod("x", handler="missing"),
    )


def test_the_status_tells_who_can_be_used(node: Node) -> None:
    client = node.daemon.client
    response = client.call(client.runtime.Status, pb.StatusRequest())
    names = [item.name for item in response.runtime_handlers]
    assert names == ["", *HANDLERS]
    conditions = {item.type: item for item in response.status.conditions}
    assert conditions["RuntimeReady"].status
    handlers = conditions["RuntimeHandlersReady"]
    assert not handlers.status
    assert handlers.message == "missing: /usr/local/no/such/runtime: No such file or directory"


def test_a_program_that_comes_and_goes(tmp_path: Path) -> None:
    """A handler can be used once its program is there, and what it made is taken away when it is gone."""
    assert COMMANDS["runc"] is not None
    program = tmp_path / "runc"
    section = f'[runtime]\ndefault_handler = "late"\n[runtime.handlers.late]\npath = "{program}"\n'
    with busy_node("late", settings=section) as node:
        with pytest.raises(CallFailed, match="No such file"):
            node.run_pod("early")
        shutil.copy(COMMANDS["runc"], program)
        pod = node.run_pod("now")
        assert node.pod_status(pod).runtime_handler == "late"
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        program.unlink()
        restart(node.daemon)
        node.stop(container, 0)
        assert node.status(container).exit_code == 137
        node.remove_pod(pod)
        assert node.settled() == []


def test_the_settings_lose_a_handler_whose_container_runs() -> None:
    with busy_node("lost", settings=settings()) as node:
        pod = node.run_pod("pod", handler="runc")
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        other = node.create(pod, "other", "true")
        node.daemon.settings = ""
        restart(node.daemon)
        node.refused("FAILED_PRECONDITION", "no runtime handler runc any more", node.start, other)
        node.stop(container, 0)
        assert node.status(container).exit_code == 137
        node.remove_pod(pod)
        assert node.settled() == []


def restart(daemon: Daemon) -> None:
    """Another daemon, with the settings of now."""
    daemon.stop()
    daemon.start()


def test_the_command_line_chooses_one(node: Node) -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "tare.cli.main",
            "run",
            f"--runtime={name}",
            node.image,
            "sh",
            "-c",
            "echo out; exit 4",
        ]
        environment = {**os.environ, "TARE_SOCKET": str(node.daemon.socket), "TARE_LOG_DIR": str(node.logs)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    good, bad = run("runc"), run("none-such")
    assert (good.returncode, good.stdout) == (4, "out\n")
    assert bad.returncode == 125 and "there is no runtime handler none-such" in bad.stderr


def test_pods_of_two_handlers_share_no_logger(node: Node) -> None:
    groups = set()
    for name in HANDLERS:
        pod = node.run_pod(name, handler=name)
        client = node.daemon.client
        response = client.call(
            client.runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        )
        groups.add(json.loads(response.info["info"])["loggerGroup"])
    assert len(groups) == len(HANDLERS)
