"""A daemon that is watched: Prometheus asks it, a collector gets its traces, and its log is JSON."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tare.cli.client import CallFailed
from tare.cli.main import tare
from tare.cri.v1 import api_pb2 as pb
from tare.cri.v1 import api_pb2_grpc
from tests.support.collector import Collector, collecting
from tests.support.daemon import Daemon
from tests.support.node import WAIT_SECONDS, Node, busy_node

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="runs pods"),
]
SETTINGS = """
[daemon]
log_format = "json"
[metrics]
address = "127.0.0.1:0"
[tracing]
endpoint = "http://127.0.0.1:{port}"
"""
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
Samples = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Where traces go."""
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def shared(collector: Collector) -> Iterator[Node]:
    """One node for all tests."""
    with busy_node("observe", settings=SETTINGS.format(port=collector.port)) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """A node without pods."""
    yield shared
    shared.remove_all()


def told(node: Node) -> list[dict[str, Any]]:
    """The lines of the daemon's log."""
    return [json.loads(line) for line in node.daemon.log.read_text().splitlines()]


def wait_for_line(node: Node, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first line that fits, once there is one."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        for line in told(node):
            if fits(line):
                return line
        assert time.monotonic() < deadline, "no such line"
        time.sleep(0.02)


def metrics(node: Node) -> dict[str, Metric]:
    """What Prometheus is told, by family."""
    words = "metrics at "
    line = [item for item in told(node) if item["message"].startswith(words)][-1]
    with urllib.request.urlopen(line["message"].removeprefix(words), timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def samples(found: dict[str, Metric], family: str, end: str = "") -> Samples:
    """Values of one family by the values of the labels, in the order of the labels' names."""
    return {
        tuple(sample.labels[name] for name in sorted(sample.labels)): sample.value
        for sample in found[family].samples
        if sample.name == family + end
    }


def test_calls_steps_and_pulls_are_counted(node: Node) -> None:
    before = metrics(node)
    container = node.start(node.create(node.run_pod("counted"), "main", "sleep", "1000"))
    node.refused("NOT_FOUND", "unknown", node.status, "unknown")
    after = metrics(node)
    calls = samples(after, "tare_call_seconds", "_count")
    service = "runtime.v1.RuntimeService"
    assert calls[("OK", "StartContainer", service)] == 1
    assert calls[("NOT_FOUND", "ContainerStatus", service)] == 1
    steps = samples(after, "tare_operation_step_seconds", "_count")
    assert steps[("OK", "RunPodSandbox", "network")] == 1
    assert steps[("OK", "StartContainer", "process")] == 1
    took = samples(after, "tare_operation_step_seconds", "_sum")
    whole = samples(after, "tare_operation_seconds", "_sum")
    parts = sum(seconds for (_, operation, _), seconds in took.items() if operation == "RunPodSandbox")
    assert 0 < parts <= whole[("OK", "RunPodSandbox")]
    assert samples(after, "tare_pods")[("ready",)] == samples(before, "tare_pods")[("ready",)] + 1
    assert samples(after, "tare_containers")[("running",)] == 1
    assert node.status(container).state == pb.CONTAINER_RUNNING


def test_pulls_are_counted_by_outcome_with_their_bytes(node: Node) -> None:
    before = metrics(node)
    node.remove_image()
    node.pull()
    with pytest.raises(CallFailed):
        node.pull(node.image.replace("busybox", "nobody"))
    after = metrics(node)
    blobs = sum(path.stat().st_size for path in (node.daemon.root / "blobs").rglob("*") if path.is_file())
    gained = (
        samples(after, "tare_image_pull_bytes", "_total")[()] - samples(before, "tare_image_pull_bytes", "_total")[()]
    )
    # Manifest and configuration are small, and not counted: what is counted are the blobs of layers.
    assert blobs - 16384 < gained <= blobs
    pulls = samples(after, "tare_image_pull_seconds", "_count")
    failed = {code: count for (code,), count in pulls.items() if code != "OK"}
    assert pulls[("OK",)] == samples(before, "tare_image_pull_seconds", "_count").get(("OK",), 0) + 1
    assert list(failed.values()) == [1]
    assert samples(after, "tare_images")[()] == 1


def test_helpers_that_do_not_answer_are_down(node: Node) -> None:
    node.start(node.create(node.run_pod("health"), "main", "sleep", "1000"))
    found = metrics(node)
    assert samples(found, "tare_helper_up") == {("keeper",): 1, ("launcher",): 1}
    (group,) = samples(found, "tare_logger_up")
    assert samples(found, "tare_logger_up") == {group: 1}
    assert samples(found, "tare_logger_containers") == {group: 1}
    assert samples(found, "tare_logger_lost_lines") == {group: 0}
    began = samples(found, "tare_launcher_start_time_seconds")[()]
    assert began < time.time() < began + 3600
    run = node.daemon.run
    launcher = int((run / "launcher.pid").read_text().split()[0])
    logger = int((run / "loggers" / group[0] / "pid").read_text().split()[0])
    for pid in (launcher, logger):
        os.kill(pid, signal.SIGSTOP)
    try:
        found = metrics(node)
    finally:
        for pid in (launcher, logger):
            os.kill(pid, signal.SIGCONT)
    assert samples(found, "tare_helper_up") == {("keeper",): 1, ("launcher",): 0}
    assert samples(found, "tare_logger_up") == {group: 0}
    assert samples(metrics(node), "tare_helper_up") == {("keeper",): 1, ("launcher",): 1}


def test_what_waits_is_in_a_queue(node: Node) -> None:
    pod = node.run_pod("queue")
    launcher = int((node.daemon.run / "launcher.pid").read_text().split()[0])
    container = node.create(pod, "main", "sleep", "1000")
    client = node.daemon.client
    os.kill(launcher, signal.SIGSTOP)
    try:
        starts = [client.runtime.StartContainer.future(pb.StartContainerRequest(container_id=container))]
        deadline = time.monotonic() + WAIT_SECONDS
        while samples(found := metrics(node), "tare_queue_length")[("launcher",)] < 1:
            assert time.monotonic() < deadline
        stop = pb.StopContainerRequest(container_id=container)
        starts.append(client.runtime.StopContainer.future(stop))
        while samples(found := metrics(node), "tare_queue_length")[("locks",)] < 1:
            assert time.monotonic() < deadline
    finally:
        os.kill(launcher, signal.SIGCONT)
    assert samples(found, "tare_calls")[("StartContainer", "runtime.v1.RuntimeService")] == 1
    for start in starts:
        start.result(30)


def test_a_kubelets_trace_goes_on_in_the_daemon(node: Node, collector: Collector) -> None:
    pod = node.run_pod("traced")
    container = node.create(pod, "main", "sleep", "1000")
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
    with closing(grpc.insecure_channel(f"unix:{node.daemon.socket}")) as channel:
        stub: Any = api_pb2_grpc.RuntimeServiceStub(channel)  # type: ignore[no-untyped-call]
        stub.StartContainer(pb.StartContainerRequest(container_id=container), metadata=metadata, timeout=60)
    trace = bytes.fromhex(TRACE)
    name = "runtime.v1.RuntimeService/StartContainer"
    spans = collector.wait(lambda found: any(span.trace_id == trace and span.name == name for span in found))
    ours = {span.name: span for span in spans if span.trace_id == trace}
    call = ours[name]
    assert call.parent_span_id == bytes.fromhex(PARENT)
    assert ours["StartContainer"].parent_span_id == call.span_id
    assert ours["StartContainer process"].parent_span_id == ours["StartContainer"].span_id
    for name, known in ((call.name, {container}), ("StartContainer process", {container, pod})):
        told_of = {item.key: item.value.string_value for item in ours[name].attributes}
        assert known == {value for key, value in told_of.items() if key in ("tare.container.id", "tare.pod.id")}
    assert collector.resources[-1]["service.name"] == "tare"
    line = wait_for_line(node, lambda item: item["message"] == f"container {container} runs in pod {pod}")
    assert (line["trace_id"], line["method"]) == (TRACE, "StartContainer")


def test_lines_name_pods_and_containers(node: Node) -> None:
    pod = node.run_pod("lines")
    container = node.start(node.create(pod, "main", "true"))
    node.wait(container)
    node.stop_pod(pod)
    node.remove_pod(pod)
    found = {}
    for line in told(node):
        if line.get("pod") == pod:
            words = line["message"].replace(pod, "POD").replace(container, "CONTAINER")
            found[words.split(":")[0]] = (line.get("method"), line.get("container") == container)
    assert found == {
        "pod POD runs": ("RunPodSandbox", False),
        "container CONTAINER created in pod POD": ("CreateContainer", True),
        "container CONTAINER runs in pod POD": ("StartContainer", True),
        "container CONTAINER exited": (None, True),
        "pod POD stopped": ("StopPodSandbox", False),
        "container CONTAINER removed": ("RemovePodSandbox", True),
        "pod POD removed": ("RemovePodSandbox", False),
    }


def test_the_level_is_changed_while_it_runs(node: Node) -> None:
    def command(*words: str) -> str:
        result = CliRunner().invoke(tare, ["--socket", str(node.daemon.socket), "log-level", *words])
        assert result.exit_code == 0, result.output
        return result.output.strip()

    assert command() == "info"
    assert command("error") == "info -> error"
    count = len(told(node))
    pod = node.run_pod("silent")
    assert len(told(node)) == count
    config = node.daemon.base / "config.toml"
    config.write_text(
        config.read_text().replace("[daemon]", '[daemon]\nlog_level = "debug"') + "[images]\ngc_low = 70\n"
    )
    assert node.daemon.process is not None
    node.daemon.process.send_signal(signal.SIGHUP)
    line = wait_for_line(node, lambda item: item["message"].startswith("the settings were read again"))
    assert line["message"].endswith("the log level is debug; a restart is needed for images.gc_low")
    assert command("info") == "debug -> info"
    node.stop_pod(pod)
    assert told(node)[-1]["message"] == f"pod {pod} stopped"
    config.write_text("[daemon]\nlog_level = 7\n")
    node.daemon.process.send_signal(signal.SIGHUP)
    line = wait_for_line(node, lambda item: item["message"].startswith("the settings are not taken"))
    assert "log_level" in line["message"]
    assert command() == "info"
    config.write_text(node.daemon.settings)


def test_a_port_that_is_taken_keeps_the_daemon_from_starting(node: Node) -> None:
    words = "metrics at "
    url = [item for item in told(node) if item["message"].startswith(words)][-1]["message"].removeprefix(words)
    settings = f'[metrics]\naddress = "{url.split("/")[2]}"\n'
    with pytest.raises(RuntimeError, match=r"serve metrics on 127\.0\.0\.1 port \d+: .*address already in use"):
        Daemon(Path(f"{node.daemon.base}-b"), settings=settings).__enter__()
