"""Pods and containers through the gRPC socket of a real daemon: their lives, their ends, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node, cgroups_named

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("life", settings='[runtime]\nrefuse_missing_sources = ["/var/lib/tare-life-refused"]\n') as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def running(node: Node, name: str, *command: str, **config: Any) -> tuple[str, str]:
    """A pod with one container that runs: their IDs."""
    pod = node.run_pod(name)
    container = node.create(pod, node.container_config("main", *command, **config))
    return pod, node.start(container)


# Lives


def test_a_container_from_first_to_last(node: Node) -> None:
    pod, container = running(node, "first", "sh", "-c", "echo out; echo err >&2; exit 3")
    status = node.wait(container)
    assert (status.exit_code, status.reason, status.message) == (3, "Error", "")
    assert status.created_at < status.started_at < status.finished_at
    assert status.image_id == node.pull() and status.image.image == node.image
    assert status.image_ref.startswith(node.image.rpartition(":")[0] + "@sha256:")
    assert sorted(node.log(container)) == ["err", "out"]
    assert re.fullmatch("[0-9a-f]{64}", container) and re.fullmatch("[0-9a-f]{64}", pod)
    assert cgroups_named(container) == []


def test_a_good_end_is_completed(node: Node) -> None:
    _, container = running(node, "good", "true")
    status = node.wait(container)
    assert (status.exit_code, status.reason) == (0, "Completed")


def test_a_pod_has_an_address_names_and_shared_memory(node: Node) -> None:
    pod, container = running(node, "web", "sleep", "1000")
    ip = node.pod_status(pod).network.ip
    script = "hostname; cat /etc/hostname; ip -4 -o addr show eth0; cat /etc/hosts; echo x > /dev/shm/x; df -k /dev/shm"
    out = node.exec(container, "sh", "-c", script).stdout.decode()
    assert out.startswith("web\nweb\n")
    assert f"{ip}/" in out
    assert f"{ip}\tweb" in out
    assert re.search(r"65536 +\d+ +\d+ +\d+% /dev/shm", out)


def test_resolv_conf_is_the_requests(node: Node) -> None:
    config = node.pod_config("dns", dns_config=pb.DNSConfig(servers=["10.0.0.10"], searches=["a.b", "b"]))
    pod = node.run_pod(config)
    container = node.start(node.create(pod, "main", "cat", "/etc/resolv.conf"))
    node.wait(container)
    assert node.log(container) == ["search a.b b", "nameserver 10.0.0.10"]


def test_containers_of_a_pod_share_its_network_and_pods_reach_each_other(node: Node) -> None:
    pod, server = running(node, "server", "sh", "-c", "while true; do echo hello | nc -l -p 8000; done")
    ip = node.pod_status(pod).network.ip
    fetch = 'for i in $(seq 200); do out=$(nc {} 8000 </dev/null); [ "$out" ] && echo $out && exit; usleep 50000; done; exit 1'
    beside = node.start(node.create(pod, "beside", "sh", "-c", fetch.format("127.0.0.1")))
    assert node.wait(beside).exit_code == 0
    assert node.log(beside) == ["hello"]
    _, other = running(node, "client", "sh", "-c", fetch.format(ip))
    assert node.wait(other).exit_code == 0
    assert node.log(other) == ["hello"]
    assert node.status(server).state == pb.CONTAINER_RUNNING


def test_a_pod_on_the_nodes_network_has_no_address_of_its_own(node: Node) -> None:
    pod = node.run_pod(node.pod_config("host", network=pb.NODE))
    assert node.pod_status(pod).network.ip == ""
    container = node.start(node.create(pod, "main", "readlink", "/proc/self/ns/net"))
    node.wait(container)
    assert node.log(container) == [os.readlink("/proc/self/ns/net")]


def test_a_shared_pid_namespace_is_reaped_and_its_stragglers_are_killed(node: Node) -> None:
    pod = node.run_pod(node.pod_config("pids", pid=pb.POD))
    first = node.start(node.create(pod, "first", "sleep", "1000"))
    second = node.start(node.create(pod, "second", "sh", "-c", "sleep 2000 & sleep 3000 & ps -o args; exit 4"))
    assert node.wait(second).exit_code == 4
    assert "sleep 1000" in node.log(second)
    left = node.exec(first, "ps", "-o", "args").stdout.decode()
    assert "sleep 1000" in left
    assert "sleep 2000" not in left
    assert "sleep 3000" not in left


def test_a_bind_source_that_is_missing_is_made_or_refused(node: Node) -> None:
    made = node.daemon.base / "made" / "deep"
    mount = pb.Mount(container_path="/data", host_path=str(made))
    _, container = running(node, "binds", "sh", "-c", "echo kept > /data/file", mounts=[mount])
    assert node.wait(container).exit_code == 0
    assert (made / "file").read_text() == "kept\n"
    assert made.stat().st_mode & 0o7777 == 0o755
    pod = node.run_pod("refused")
    refused = pb.Mount(container_path="/data", host_path="/var/lib/tare-life-refused/x")
    config = node.container_config("main", "true", mounts=[refused])
    node.refused("FAILED_PRECONDITION", "/var/lib/tare-life-refused/x", node.create, pod, config)
    assert not Path("/var/lib/tare-life-refused").exists()


def test_a_cgroup_parent_that_is_there_stays(node: Node) -> None:
    name = f"tare-life-{os.getpid()}"
    parent = Path("/sys/fs/cgroup/memory", name)
    if not parent.parent.is_dir():
        parent = Path("/sys/fs/cgroup", name)
    parent.mkdir()
    try:
        linux = pb.LinuxPodSandboxConfig(cgroup_parent=f"/{name}")
        config = node.pod_config("parent")
        config.linux.MergeFrom(linux)
        pod = node.run_pod(config)
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        assert any(path.endswith(f"/{name}/{container}") for path in cgroups_named(container))
        node.remove_pod(pod)
        assert parent.is_dir()
    finally:
        parent.rmdir()


def test_a_cgroup_parent_that_was_made_goes_with_what_was_made_above_it(node: Node) -> None:
    name = f"tare-life-made-{os.getpid()}"
    config = node.pod_config("made")
    config.linux.cgroup_parent = f"/{name}/a/b"
    pod = node.run_pod(config)
    node.start(node.create(pod, "main", "sleep", "1000"))
    assert cgroups_named(name)
    node.stop_pod(pod)
    assert cgroups_named(name) == []


def test_a_pod_has_kernel_settings_of_its_own_but_not_the_nodes(node: Node) -> None:
    config = node.pod_config("sysctl")
    config.linux.sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
    config.linux.sysctls["kernel.shmmni"] = "1234"
    pod = node.run_pod(config)
    files = ["/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/kernel/shmmni"]
    container = node.start(node.create(pod, "main", "cat", *files))
    node.wait(container)
    assert node.log(container) == ["0", "1234"]
    bad = node.pod_config("sysctl", attempt=1)
    bad.linux.sysctls["kernel.panic"] = "1"
    node.refused("INVALID_ARGUMENT", "kernel.panic", node.run_pod, bad)


def test_a_terminal_is_logged_as_one_stream(node: Node) -> None:
    _, container = running(node, "tty", "sh", "-c", "tty; echo err >&2; stty size", tty=True)
    assert node.wait(container).exit_code == 0
    lines = [line.rstrip("\r") for line in node.log(container)]
    assert lines[0].startswith("/dev/")
    assert lines[1:2] == ["err"]


# Ends


def test_the_stop_signal_comes_once_and_the_code_is_the_containers(node: Node) -> None:
    script = "trap 'echo got; sleep 0.3; exit 9' USR1; echo ready; while true; do sleep 0.05; done"
    _, container = running(node, "signal", "sh", "-c", script, stop_signal=pb.SIGNAL_SIGUSR1)
    node.wait_for_log(container, "ready")
    node.stop(container, 20)
    status = node.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 9, "Error")
    assert node.log(container) == ["ready", "got"]
    node.stop(container)


def test_a_later_stop_shortens_the_grace_of_an_earlier_one(node: Node) -> None:
    script = "trap 'echo got' TERM; echo ready; while true; do sleep 0.05; done"
    _, container = running(node, "grace", "sh", "-c", script)
    node.wait_for_log(container, "ready")
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(node.stop, container, 1000)
        node.wait_for_log(container, "got")
        begin = time.monotonic()
        node.stop(container, 0)
        patient.result(timeout=20)
    assert time.monotonic() - begin < 20
    status = node.status(container)
    assert (status.exit_code, status.reason) == (137, "Error")
    assert node.log(container) == ["ready", "got"]


def test_three_stops_and_removals_in_a_row_are_fine(node: Node) -> None:
    pod, container = running(node, "thrice", "sleep", "1000")
    for _ in range(3):
        node.stop_pod(pod)
    assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY
    assert node.status(container).exit_code == 137
    for _ in range(3):
        node.remove_pod(pod)
    node.stop(container)
    node.remove(container)


def test_stops_and_removal_when_the_network_namespace_is_gone_already(node: Node) -> None:
    pod, _ = running(node, "no-netns", "sleep", "1000")
    pin = node.daemon.run / "pods" / pod / "net"
    subprocess.run(["umount", str(pin)], check=True, timeout=10)
    pin.unlink()
    for _ in range(3):
        node.stop_pod(pod)
    node.remove_pod(pod)


def test_a_running_container_is_removed_by_force(node: Node) -> None:
    pod, container = running(node, "force", "sleep", "1000")
    node.remove(container)
    node.refused("NOT_FOUND", container, node.status, container)
    assert node.pod_status(pod).state == pb.SANDBOX_READY
    node.create(pod, "main", "true")


def test_an_oom_kill_is_called_one(node: Node) -> None:
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB)
    config = node.container_config("main", "sh", "-c", "tail /dev/zero", resources=limits)
    pod = node.run_pod("oom")
    status = node.wait(node.start(node.create(pod, config)))
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert status.resources.linux.memory_limit_in_bytes == 32 * MIB


def test_a_limit_that_is_not_applied_is_told_and_the_node_is_ready(node: Node) -> None:
    pages = [pb.HugepageLimit(page_size="1KB", limit=1 << 20)]
    config = node.container_config("main", "true", resources=pb.LinuxContainerResources(hugepage_limits=pages))
    assert node.wait(node.start(node.create(node.run_pod("pages"), config))).exit_code == 0
    client = node.daemon.client
    answer = client.call(client.runtime.Status, pb.StatusRequest(verbose=True))
    conditions = {condition.type: condition for condition in answer.status.conditions}
    assert conditions["RuntimeReady"].status and conditions["NetworkReady"].status
    limits = conditions["CgroupControllersReady"]
    assert (limits.status, limits.reason) == (False, "ControllersMissing")
    assert re.search(r"lack .*hugetlb.*: limits on that are not applied", limits.message)
    [info] = answer.info.values()
    assert "hugetlb" in str(json.loads(info)["skippedLimits"])


def test_a_pod_whose_pid_namespace_ends_is_not_ready(node: Node) -> None:
    pod = node.run_pod(node.pod_config("pause", pid=pb.POD))
    pid = int(re.search(r'"pid":(\d+)', pod_info(node, pod)).group(1))  # type: ignore[union-attr]
    os.kill(pid, 9)
    deadline = time.monotonic() + 10
    while node.pod_status(pod).state == pb.SANDBOX_READY:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    node.refused("FAILED_PRECONDITION", "NOTREADY", node.create, pod, "main", "true")


def pod_info(node: Node, pod: str) -> str:
    client = node.daemon.client
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    return str(client.call(client.runtime.PodSandboxStatus, request).info["info"])


# Starts that fail


@pytest.mark.parametrize(
    ("command", "words"),
    [(("/no/such/program",), "No such file"), (("/etc/passwd",), "Permission denied")],
)
def test_a_failed_start_is_an_exited_container_that_says_why(node: Node, command: tuple[str, ...], words: str) -> None:
    pod = node.run_pod("failed")
    container = node.create(pod, "main", *command)
    with pytest.raises(CallFailed, match=words):
        node.start(container)
    status = node.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert words in status.message
    assert status.finished_at > 0
    assert Path(status.log_path).read_text() == ""
    assert cgroups_named(container) == []
    node.refused("FAILED_PRECONDITION", "EXITED", node.start, container)


# Exec


def test_exec_returns_both_streams_and_the_code(node: Node) -> None:
    _, container = running(node, "exec", "sleep", "1000", envs=[pb.KeyValue(key="WHO", value=b"me")])
    result = node.exec(container, "sh", "-c", "echo $WHO; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit_code) == (b"me\n", b"err\n", 7)
    assert node.exec(container, "sh", "-c", "kill -9 $$").exit_code == 137
    with pytest.raises(CallFailed, match="No such file"):
        node.exec(container, "/no/such/program")


def test_a_timeout_kills_the_whole_tree_of_the_exec_and_nothing_else(node: Node) -> None:
    _, container = running(node, "tree", "sh", "-c", "sleep 1000 & wait")
    script = "sleep 2001 & (sleep 2002 & setsid sleep 2003 & wait) & setsid sh -c 'sleep 2004 & wait' & wait"
    node.refused(
        "DEADLINE_EXCEEDED", "did not end within 1 s", lambda: node.exec(container, "sh", "-c", script, timeout=1)
    )
    left = node.exec(container, "ps", "-o", "args").stdout.decode()
    assert not re.search(r"sleep 200\d", left), left
    assert "sleep 1000" in left
    assert node.status(container).state == pb.CONTAINER_RUNNING


def test_an_exec_ends_with_its_process_whatever_holds_the_pipes(node: Node) -> None:
    _, container = running(node, "pipes", "sleep", "1000")
    begin = time.monotonic()
    result = node.exec(container, "sh", "-c", "sleep 500 & echo done")
    assert (result.stdout, result.exit_code) == (b"done\n", 0)
    assert time.monotonic() - begin < 100


def test_an_exec_writes_more_than_a_message_can_hold(node: Node) -> None:
    _, container = running(node, "much", "sleep", "1000")
    script = (
        "dd if=/dev/zero bs=1048576 count=20 2>/dev/null; dd if=/dev/zero bs=1048576 count=20 >&2 2>/dev/null; exit 5"
    )
    result = node.exec(container, "sh", "-c", script)
    assert result.exit_code == 5
    assert 15 * MIB < len(result.stdout) + len(result.stderr) < 16 * MIB


def test_an_exec_that_its_caller_leaves_is_killed(node: Node) -> None:
    _, container = running(node, "left", "sleep", "1000")
    client = node.daemon.client
    request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "2222"])
    node.refused("DEADLINE_EXCEEDED", "", lambda: client.call(client.runtime.ExecSync, request, 0.5))
    deadline = time.monotonic() + 10
    while "sleep 2222" in node.exec(container, "ps", "-o", "args").stdout.decode():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Refusals


def test_names_are_unique_and_the_holder_is_named(node: Node) -> None:
    pod = node.run_pod("name")
    node.refused("ALREADY_EXISTS", pod, node.run_pod, "name")
    other = node.run_pod(node.pod_config("name", attempt=1))
    assert other != pod
    container = node.create(pod, "main", "true")
    node.refused("ALREADY_EXISTS", container, node.create, pod, "main", "true")
    node.create(pod, node.container_config("main", "true", attempt=1))
    node.create(other, "main", "true")


def test_illegal_transitions_are_refused(node: Node) -> None:
    pod = node.run_pod("illegal")
    container = node.create(pod, "main", "sleep", "1000")
    node.refused("FAILED_PRECONDITION", "CREATED", node.exec, container, "true")
    node.start(container)
    node.refused("FAILED_PRECONDITION", "RUNNING", node.start, container)
    other = node.create(pod, "other", "true")
    node.stop_pod(pod)
    node.refused("FAILED_PRECONDITION", "NOTREADY", node.start, other)
    node.refused("FAILED_PRECONDITION", "NOTREADY", node.create, pod, "third", "true")
    node.refused("FAILED_PRECONDITION", "EXITED", node.exec, container, "true")


def test_what_is_unknown_is_not_found_or_fine(node: Node) -> None:
    unknown = "f" * 64
    node.refused("NOT_FOUND", unknown, node.status, unknown)
    node.refused("NOT_FOUND", unknown, node.pod_status, unknown)
    node.refused("NOT_FOUND", unknown, node.start, unknown)
    node.refused("NOT_FOUND", unknown, node.exec, unknown, "true")
    node.stop(unknown)
    node.remove(unknown)
    node.stop_pod(unknown)
    node.remove_pod(unknown)


def test_unique_prefixes_name_things(node: Node) -> None:
    pod, container = running(node, "prefix", "sleep", "1000")
    assert node.status(container[:12]).id == container
    assert node.pod_status(pod[:12]).id == pod
    node.stop(container[:12], 0)
    node.remove_pod(pod[:12])


def test_what_cannot_be_made_leaves_nothing_half_made(node: Node) -> None:
    pod = node.run_pod("bad")
    cases = [
        (node.container_config("main", "true"), "NOT_FOUND", "no image"),
        (node.container_config("main", "true"), "INVALID_ARGUMENT", "no user 'nobody-knows'"),
    ]
    cases[0][0].image.image = "no/such:image"
    cases[1][0].linux.security_context.run_as_username = "nobody-knows"
    for config, status, words in cases:
        node.refused(status, words, node.create, pod, config)
    assert node.daemon.client.containers() == []
    assert list((node.daemon.root / "containers").glob("*")) == []
    bad = node.pod_config("long", hostname="x" * 65)
    node.refused("INVALID_ARGUMENT", "64", node.run_pod, bad)
    handler = pb.RunPodSandboxRequest(config=node.pod_config("handler"), runtime_handler="none-such")
    client = node.daemon.client
    node.refused("INVALID_ARGUMENT", "none-such", client.call, client.runtime.RunPodSandbox, handler)
    assert [item.id for item in client.pods()] == [pod]


# Callers that leave


def test_many_pods_at_once(node: Node) -> None:
    with ThreadPoolExecutor(8) as pool:
        pods = list(pool.map(node.run_pod, [f"many-{number}" for number in range(16)]))
        made = list(pool.map(lambda pod: node.create(pod, "main", "sh", "-c", "exit 5"), pods))
        assert {node.wait(container).exit_code for container in pool.map(node.start, made)} == {5}
        addresses = {node.pod_status(pod).network.ip for pod in pods}
    assert len(addresses) == len(set(pods)) == 16
