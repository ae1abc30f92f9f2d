"""Statistics and metrics through the socket, of containers that do what is measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tare.cgroups.layout import detect
from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root

WAIT_SECONDS = 30.0
MIB = 1 << 20
UNKNOWN = "f" * 64
# tail keeps what it was given so far until a line ends, or its input: 24 MiB of memory that stays.
HOLD = "(head -c 25165824 /dev/zero; sleep 1000) | tail -n 1"
LIMITED = pb.LinuxContainerResources(
    cpu_period=100000,
    cpu_quota=50000,
    cpu_shares=512,
    memory_limit_in_bytes=128 * MIB,
    memory_swap_limit_in_bytes=128 * MIB,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("stats") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


@dataclass(frozen=True)
class Ask:
    """The calls."""

    node: Node

    def container(self, container: str) -> pb.ContainerStats:
        client = self.node.daemon.client
        request = pb.ContainerStatsRequest(container_id=container)
        stats: pb.ContainerStats = client.call(client.runtime.ContainerStats, request).stats
        return stats

    def containers(self, **wanted: object) -> list[pb.ContainerStats]:
        client = self.node.daemon.client
        request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(**wanted))  # type: ignore[arg-type]
        return list(client.call(client.runtime.ListContainerStats, request).stats)

    def pod(self, pod: str) -> pb.PodSandboxStats:
        client = self.node.daemon.client
        request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod)
        stats: pb.PodSandboxStats = client.call(client.runtime.PodSandboxStats, request).stats
        return stats

    def pods(self, **wanted: object) -> list[pb.PodSandboxStats]:
        client = self.node.daemon.client
        request = pb.ListPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(**wanted))  # type: ignore[arg-type]
        return list(client.call(client.runtime.ListPodSandboxStats, request).stats)

    def metrics(self) -> list[pb.PodSandboxMetrics]:
        client = self.node.daemon.client
        return list(client.call(client.runtime.ListPodSandboxMetrics, pb.ListPodSandboxMetricsRequest()).pod_metrics)

    def descriptors(self) -> dict[str, pb.MetricDescriptor]:
        client = self.node.daemon.client
        answer = client.call(client.runtime.ListMetricDescriptors, pb.ListMetricDescriptorsRequest())
        return {item.name: item for item in answer.descriptors}


@pytest.fixture
def ask(node: Node) -> Ask:
    return Ask(node)


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def ids(stats: list[pb.ContainerStats]) -> set[str]:
    return {item.attributes.id for item in stats}


def test_cpu_is_counted_and_its_rate_is_of_the_time_between_two_questions(node: Node, ask: Ask) -> None:
    pod = node.run_pod("burn")
    config = node.container_config("main", "sh", "-c", "while :; do :; done", resources=LIMITED)
    burner = node.start(node.create(pod, config))
    idle = node.start(node.create(pod, "idle", "sleep", "1000"))
    first = ask.container(burner)
    assert not first.cpu.HasField("usage_nano_cores")
    until(lambda: ask.container(burner).cpu.timestamp - first.cpu.timestamp > 2_000_000_000, "time does not pass")
    second = ask.container(burner)
    used = second.cpu.usage_core_nano_seconds.value - first.cpu.usage_core_nano_seconds.value
    passed = second.cpu.timestamp - first.cpu.timestamp
    # A quota of half a core, which other work on the machine may keep it from using up.
    assert 0.1 < used / passed < 0.65
    assert 0.05e9 < second.cpu.usage_nano_cores.value < 0.75e9
    ask.container(idle)
    until(lambda: ask.container(idle).cpu.HasField("usage_nano_cores"), "there is no rate")
    assert ask.container(idle).cpu.usage_nano_cores.value < 0.05e9
    if os.path.exists("/proc/pressure/cpu"):
        assert second.cpu.psi.Some.Total > 0, "a quota makes it wait"


def test_a_burner_without_a_quota_uses_about_a_core(node: Node, ask: Ask) -> None:
    pod = node.run_pod("core")
    burner = node.start(node.create(pod, "main", "sh", "-c", "while :; do :; done"))
    first = ask.container(burner).cpu
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.5, "time does not pass")
    second = ask.container(burner).cpu
    used = second.usage_core_nano_seconds.value - first.usage_core_nano_seconds.value
    rate = used / (second.timestamp - first.timestamp)
    # One core, or what other work on the machine leaves of it.
    assert 0.2 < rate < 1.1
    assert abs(second.usage_nano_cores.value / 1e9 - rate) < 0.02
    assert ask.pod(pod).linux.cpu.usage_core_nano_seconds.value >= second.usage_core_nano_seconds.value


def test_memory_of_an_allocation(node: Node, ask: Ask) -> None:
    pod = node.run_pod("memory")
    config = node.container_config("main", "sh", "-c", HOLD, resources=LIMITED)
    container = node.start(node.create(pod, config))
    until(lambda: ask.container(container).memory.rss_bytes.value >= 24 * MIB, "it does not hold its memory")
    stats = ask.container(container)
    memory = stats.memory
    assert 24 * MIB <= memory.working_set_bytes.value <= memory.usage_bytes.value < 128 * MIB
    assert memory.available_bytes.value == 128 * MIB - memory.working_set_bytes.value
    assert memory.page_faults.value > 24 * MIB // 4096 // 2
    assert stats.swap.swap_usage_bytes.value == 0
    of_pod = ask.pod(pod).linux
    assert of_pod.memory.working_set_bytes.value >= 24 * MIB
    assert [item.attributes.id for item in of_pod.containers] == [container]


def test_processes_of_a_pod(node: Node, ask: Ask) -> None:
    pod = node.run_pod("crowd")
    node.start(node.create(pod, "three", "sh", "-c", "sleep 1000 & sleep 1000 & wait"))
    until(lambda: ask.pod(pod).linux.process.process_count.value == 3, "not three")
    node.start(node.create(pod, "one", "sleep", "1000"))
    until(lambda: ask.pod(pod).linux.process.process_count.value == 4, "not four")


def test_what_a_container_writes_shows_in_its_layer(node: Node, ask: Ask) -> None:
    pod = node.run_pod("disk")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    before = ask.container(container).writable_layer
    written = node.exec(
        container, "sh", "-c", "mkdir /many && cd /many && touch 1 2 3 && head -c 3145728 /dev/zero > big"
    )
    assert written.exit_code == 0
    began = time.monotonic()

    def shown() -> bool:
        now = ask.container(container).writable_layer
        return now.used_bytes.value >= before.used_bytes.value + 3 * MIB

    until(shown, "it does not show")
    assert time.monotonic() - began < 5
    after = ask.container(container).writable_layer
    assert after.inodes_used.value == before.inodes_used.value + 5
    assert after.timestamp > before.timestamp
    client = node.daemon.client
    disk = client.call(client.images.ImageFsInfo, pb.ImageFsInfoRequest())
    assert after.fs_id == disk.container_filesystems[0].fs_id


def test_traffic_of_a_pod(node: Node, ask: Ask) -> None:
    pod = node.run_pod("net")
    container = node.start(node.create(pod, "main", "sh", "-c", "httpd -f -h /bin"))
    address = node.pod_status(pod).network.ip
    before = ask.pod(pod).linux.network
    assert before.default_interface.name == "eth0"
    assert [item.name for item in before.interfaces] == [], "loopback is no network"
    for _ in range(3):
        ping = subprocess.run(["ping", "-c", "2", "-s", "1000", "-i", "0.2", address], capture_output=True, timeout=20)
        assert ping.returncode == 0, ping
    after = ask.pod(pod).linux.network
    assert after.default_interface.rx_bytes.value - before.default_interface.rx_bytes.value >= 6000
    assert after.default_interface.tx_bytes.value - before.default_interface.tx_bytes.value >= 6000
    assert after.default_interface.rx_errors.value == 0
    # What goes over loopback is not counted.
    fetched = node.exec(container, "sh", "-c", "ifconfig lo up; wget -qO- http://127.0.0.1/busybox | wc -c")
    assert int(fetched.stdout) > 500_000
    assert ask.pod(pod).linux.network.default_interface.rx_bytes.value < 500_000


def test_a_pod_with_the_nodes_network_has_none_of_its_own(node: Node, ask: Ask) -> None:
    pod = node.run_pod(node.pod_config("host", network=pb.NODE))
    assert not ask.pod(pod).linux.HasField("network")


def test_lists_are_of_what_runs(node: Node, ask: Ask) -> None:
    pod = node.run_pod("some")
    running = node.start(node.create(pod, "running", "sleep", "1000"))
    created = node.create(pod, "created", "true")
    ended = node.start(node.create(pod, "ended", "sh", "-c", "echo x > /file"))
    node.wait(ended)
    assert ids(ask.containers()) == {running}
    for container in (created, ended):
        alone = ask.container(container)
        assert alone.attributes.id == container
        assert not alone.HasField("cpu")
        assert not alone.HasField("memory")
        assert alone.writable_layer.inodes_used.value >= 1
    assert [item.attributes.id for item in ask.pods()] == [pod]
    node.stop_pod(pod)
    assert ask.pods() == []
    assert ask.containers() == []
    assert ask.metrics() == []
    stopped = ask.pod(pod)
    assert (stopped.attributes.id, stopped.linux.HasField("cpu"), len(stopped.linux.containers)) == (pod, False, 0)


def kernel(node: Node, container: str, controller: str, first: str, second: str) -> str:
    """A file of a container's group: `first` in version 1, `second` in version 2."""
    client = node.daemon.client
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    inside = json.loads(client.call(client.runtime.ContainerStatus, request).info["info"])["cgroup"]
    layout = detect()
    tree = layout.tree_of(controller) or layout.unified
    assert tree is not None
    return Path(f"{tree.directory}{inside}/{first if tree.version == 1 else second}").read_text()


def throttled(node: Node, container: str) -> int:
    """How often its quota was used up: never, where others leave it less than that."""
    lines = kernel(node, container, "cpu", "cpu.stat", "cpu.stat").splitlines()
    return int(dict(line.split() for line in lines)["nr_throttled"])


def test_they_are_what_the_kernel_says(node: Node, ask: Ask) -> None:
    pod = node.run_pod("same")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    until(lambda: still(ask, container), "it does not come to rest")
    stats = ask.container(container)
    usage = int(kernel(node, container, "memory", "memory.usage_in_bytes", "memory.current"))
    assert abs(stats.memory.usage_bytes.value - usage) <= usage / 100
    words = kernel(node, container, "cpuacct", "cpuacct.usage", "cpu.stat").split()
    used = int(words[0]) if len(words) == 1 else int(words[1]) * 1000
    assert abs(stats.cpu.usage_core_nano_seconds.value - used) <= used / 100


def still(ask: Ask, container: str) -> bool:
    """Whether it has used no CPU between two questions."""
    first, second = (ask.container(container).cpu.usage_core_nano_seconds.value for _ in range(2))
    return first == second


def test_nothing_is_kept_open_of_what_is_gone(node: Node, ask: Ask) -> None:
    pod = node.run_pod("gone")
    node.start(node.create(pod, "main", "sleep", "1000"))
    assert len(ask.pods()) == 1
    process = node.daemon.process
    assert process is not None

    def of_the_pod() -> list[str]:
        found = []
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(fd))
        return [link for link in found if pod in link and link.startswith("/sys/fs/cgroup")]

    assert of_the_pod() != []
    node.stop_pod(pod)
    assert ask.pods() == []
    assert of_the_pod() == []


def test_filters(node: Node, ask: Ask) -> None:
    pods, containers = [], []
    for name in ("one", "two"):
        pod = node.run_pod(node.pod_config(name, labels={"app": name, "tier": "web"}))
        config = node.container_config("main", "sleep", "1000", labels={"app": name, "tier": "web"})
        pods.append(pod)
        containers.append(node.start(node.create(pod, config)))
    one, two = containers
    assert ids(ask.containers(label_selector={"tier": "web"})) == {one, two}
    assert ids(ask.containers(label_selector={"tier": "web", "app": "one"})) == {one}
    assert ids(ask.containers(pod_sandbox_id=pods[1])) == {two}
    assert ids(ask.containers(id=one[:12], label_selector={"app": "one"})) == {one}
    assert ids(ask.containers(id=one, pod_sandbox_id=pods[1])) == set()
    assert ids(ask.containers(id=UNKNOWN)) == set()
    assert [item.attributes.id for item in ask.pods(label_selector={"app": "two"})] == [pods[1]]
    assert [item.attributes.id for item in ask.pods(id=pods[0][:12])] == [pods[0]]
    found = ask.pods(id=pods[0])[0].attributes
    assert (found.metadata.name, found.labels["app"]) == ("one", "one")


def test_what_is_unknown(node: Node, ask: Ask) -> None:
    node.refused("NOT_FOUND", UNKNOWN, ask.container, UNKNOWN)
    node.refused("NOT_FOUND", UNKNOWN, ask.pod, UNKNOWN)
    node.refused("INVALID_ARGUMENT", "container_id", ask.container, "")
    node.refused("INVALID_ARGUMENT", "pod_sandbox_id", ask.pod, "")


def test_pods_that_share_a_cgroup_are_told_apart(node: Node, ask: Ask) -> None:
    parent = f"/tare-shared-{os.getpid()}"
    pods = []
    for name, command in (("busy", "while :; do :; done"), ("idle", "sleep 1000")):
        linux = node.pod_config(name).linux
        linux.cgroup_parent = parent
        config = node.pod_config(name)
        config.linux.CopyFrom(linux)
        pods.append(node.run_pod(config))
        node.start(node.create(pods[-1], "main", "sh", "-c", command))
    busy, idle = pods
    until(lambda: ask.pod(busy).linux.cpu.usage_core_nano_seconds.value > 1e9, "it is not busy")
    assert ask.pod(idle).linux.cpu.usage_core_nano_seconds.value < 0.5e9


def test_metrics_are_described_and_are_what_runs(node: Node, ask: Ask) -> None:
    described = ask.descriptors()
    assert ask.metrics() == []
    pod = node.run_pod("web")
    config = node.container_config("main", "sh", "-c", "while :; do :; done", resources=LIMITED)
    container = node.start(node.create(pod, config))
    until(lambda: ask.container(container).cpu.usage_core_nano_seconds.value > 1.2e9, "it is not busy")
    before = throttled(node, container)
    (found,) = ask.metrics()
    (inside,) = found.container_metrics
    assert (found.pod_sandbox_id, inside.container_id) == (pod, container)
    series = {}
    for metric in (*found.metrics, *inside.metrics):
        assert len(metric.label_values) == len(described[metric.name].label_keys), metric.name
        labels = dict(zip(described[metric.name].label_keys, metric.label_values, strict=True))
        assert (labels["namespace"], labels["pod"]) == ("tests", "web")
        key = (metric.name, tuple(metric.label_values))
        assert key not in series
        series[key] = metric
        assert abs(metric.timestamp - time.time_ns()) < 60e9
    values = {name: metric.value.value for (name, _), metric in series.items()}
    assert values["container_cpu_usage_seconds_total"] >= 1
    assert values["container_spec_cpu_quota"] == 50000
    assert values["container_spec_memory_limit_bytes"] == 128 * MIB
    assert values["container_cpu_cfs_periods_total"] > 0
    assert before <= values["container_cpu_cfs_throttled_periods_total"] <= throttled(node, container)
    assert (values["container_processes"], values["container_threads"]) == (1, 1)
    assert values["container_file_descriptors"] >= 3
    assert abs(values["container_start_time_seconds"] - time.time()) < 120
    assert values["container_fs_limit_bytes"] > values["container_fs_usage_bytes"] > 0
    names = {metric.name for metric in found.metrics}
    assert names == {name for name in described if name.startswith("container_network_")}
    kinds = {metric.name: metric.metric_type for metric in inside.metrics}
    assert kinds["container_cpu_usage_seconds_total"] == pb.COUNTER
    assert kinds["container_memory_working_set_bytes"] == pb.GAUGE


def test_streams_have_what_their_lists_have(node: Node, ask: Ask) -> None:
    pods = [node.run_pod(f"s{number}") for number in range(3)]
    containers = {node.start(node.create(pod, "main", "sleep", "1000")) for pod in pods}
    client = node.daemon.client
    pieces = list(client.stream(client.runtime.StreamContainerStats, pb.StreamContainerStatsRequest()))
    assert ids([item for piece in pieces for item in piece.container_stats]) == containers
    pieces = list(client.stream(client.runtime.StreamPodSandboxStats, pb.StreamPodSandboxStatsRequest()))
    assert sorted(item.attributes.id for piece in pieces for item in piece.pod_sandbox_stats) == sorted(pods)
    pieces = list(client.stream(client.runtime.StreamPodSandboxMetrics, pb.StreamPodSandboxMetricsRequest()))
    assert sorted(item.pod_sandbox_id for piece in pieces for item in piece.pod_sandbox_metrics) == sorted(pods)
    wanted = pb.StreamContainerStatsRequest(filter=pb.ContainerStatsFilter(id=UNKNOWN))
    assert list(client.stream(client.runtime.StreamContainerStats, wanted)) == []


def test_a_daemon_that_was_started_again_counts_on(node: Node, ask: Ask) -> None:
    pod = node.run_pod("again")
    container = node.start(node.create(pod, "main", "sh", "-c", "while :; do :; done"))
    until(lambda: ask.container(container).cpu.usage_core_nano_seconds.value > 0.5e9, "it is not busy")
    node.daemon.kill()
    node.daemon.start()
    stats = ask.container(container)
    assert stats.cpu.usage_core_nano_seconds.value > 0.5e9
    assert not stats.cpu.HasField("usage_nano_cores")


def test_the_command(node: Node) -> None:
    pod = node.run_pod("shop")
    container = node.start(node.create(pod, "till", "sleep", "1000"))
    node.start(node.create(pod, "other", "sleep", "1000"))

    def tare(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tare.cli.main", "--socket", str(node.daemon.socket), "stats", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    title, first, second = tare("--no-stream").stdout.splitlines()
    assert title.split() == ["CONTAINER", "NAME", "POD", "CPU", "MEMORY", "LIMIT", "SWAP", "DISK"]
    assert (first.split()[1:3], second.split()[1:3]) == (["other", "shop"], ["till", "shop"])
    assert second.split()[3].endswith("%")
    (only,) = json.loads(tare("--no-stream", "-o", "json", "till").stdout)
    assert only["attributes"]["id"] == container
    missing = tare("--no-stream", "nobody")
    assert (missing.returncode, "there is no container nobody" in missing.stderr) == (1, True)
