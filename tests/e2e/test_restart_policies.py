"""`tare run --restart` and `--health-cmd` through a real daemon: what starts again, how often, and what survives the daemon and a reboot."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from tare.api.v1 import tare_pb2
from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support.daemon import mounts_below, quit_keeper
from tests.support.images import busybox_image
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
WAIT_SECONDS = 90.0


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("restart") as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(node: Node) -> Iterator[None]:
    yield
    if not node.daemon.answers():
        node.daemon.start()
    for container in ps(node):
        tare(node, "rm", "-f", container["id"])
    node.remove_all()
    assert supervised(node) == {}


def command(node: Node, *arguments: str) -> list[str]:
    """The command line for this node."""
    return [sys.executable, "-m", "tare.cli.main", f"--socket={node.daemon.socket}", *arguments]


def tare(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    environment = {**os.environ, "TARE_LOG_DIR": str(node.daemon.base / "run-logs")}
    return subprocess.run(command(node, *arguments), capture_output=True, text=True, timeout=110, env=environment)


def run(node: Node, *options: str, script: str, name: str = "box") -> str:
    """A container in the background that runs a shell script: its ID."""
    done = tare(node, "run", "-d", "--name", name, *options, node.image, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ps(node: Node) -> list[dict[str, Any]]:
    """All containers."""
    found: list[dict[str, Any]] = json.loads(tare(node, "ps", "-a", "-o", "json").stdout)["containers"]
    return found


def supervised(node: Node) -> dict[str, Any]:
    """What is supervised, by the pod's name."""
    client = node.daemon.client
    names = {pod.id: pod.metadata.name for pod in client.pods()}
    answer = client.call(client.supervision.Supervised, tare_pb2.SupervisedRequest())
    return {names.get(item.pod_id, item.pod_id): item for item in answer.containers}


def until(what: str, condition: Callable[[], Any]) -> Any:
    """What it comes to, once that is something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)
    return found


def attempts(node: Node, name: str = "box") -> list[pb.Container]:
    """All that there are of a container, oldest first."""
    found = [item for item in node.daemon.client.containers() if item.metadata.name == name]
    return sorted(found, key=lambda item: item.metadata.attempt)


def running(node: Node, at_least: int, name: str = "box") -> pb.Container | None:
    """The last attempt, if it runs and is not one of the first."""
    found = attempts(node, name)
    last = found[-1] if found else None
    runs = last is not None and last.state == pb.CONTAINER_RUNNING and last.metadata.attempt >= at_least
    return last if runs else None


def test_on_failure_so_often_with_pauses_that_grow(node: Node) -> None:
    """Three times after the first, 100, 200 and 400 ms apart at least; the code stays; old attempts and their logs are bounded."""
    run(node, "--restart=on-failure:3", script="echo try; exit 7")
    until("the end", lambda: (item := supervised(node)["box"]).state == "ended" and item.restarts == 3)
    found = attempts(node)
    assert [item.metadata.attempt for item in found] == [0, 1, 2, 3]
    ends = [node.status(item.id) for item in found]
    assert {(end.exit_code, end.reason) for end in ends} == {(7, "Error")}
    pauses = [(after.started_at - before.finished_at) / 1e9 for before, after in itertools.pairwise(ends)]
    assert [pause >= wanted for pause, wanted in zip(pauses, (0.1, 0.2, 0.4), strict=True)] == [True] * 3, pauses
    assert tare(node, "logs", "box").stdout == "try\n" * 4
    assert tare(node, "logs", "-n", "2", "box").stdout == "try\n" * 2
    inspected = json.loads(tare(node, "inspect", "box").stdout)[0]
    assert inspected["status"]["metadata"]["attempt"] == 3
    assert (inspected["supervision"]["policy"], inspected["supervision"]["restarts"]) == ("on-failure:3", "3")


def test_what_ends_well_is_left_by_on_failure_and_no(node: Node) -> None:
    run(node, "--restart=on-failure", script="exit 0", name="well")
    run(node, script="exit 1", name="never")
    until("both ends", lambda: all(item.state == pb.CONTAINER_EXITED for item in node.daemon.client.containers()))
    time.sleep(0.5)  # five times the pause
    assert [
        (item.metadata.name, item.metadata.attempt) for item in attempts(node, "well") + attempts(node, "never")
    ] == [
        ("well", 0),
        ("never", 0),
    ]
    assert supervised(node).keys() == {"well"}


def test_always_goes_on_and_logs_follow_until_it_is_stopped(node: Node) -> None:
    """Many attempts: few are kept, the log is one to who follows it, a stop ends it for good."""
    first = run(node, "--restart=always", script="echo up; sleep 0.05; exit 0")
    follower = subprocess.Popen(command(node, "logs", "-f", "box"), stdout=subprocess.PIPE, text=True)
    try:
        last = until("a fifth attempt", lambda: running(node, 4))
        assert len(attempts(node)) <= 5
        assert last.id != first
        assert tare(node, "stop", "-t", "0", "box").returncode == 0
        output, _ = follower.communicate(timeout=60)
    finally:
        follower.kill()
        follower.wait()
    assert output.count("up\n") >= 5
    count = attempts(node)[-1].metadata.attempt
    time.sleep(1.0)
    assert attempts(node)[-1].metadata.attempt == count
    assert supervised(node)["box"].state == "ended"
    assert tare(node, "rm", "box").returncode == 0
    assert not list((node.daemon.base / "run-logs").glob("*/*"))


def test_one_that_waits_for_its_next_start_is_shown_and_can_be_stopped(node: Node) -> None:
    run(node, "--restart=unless-stopped", script="exit 3")
    until("a long pause", lambda: (item := supervised(node)["box"]).state == "waiting" and item.restarts >= 4)
    until("it to be listed", lambda: "restart" in tare(node, "ps").stdout)
    assert tare(node, "stop", "box").returncode == 0
    assert supervised(node)["box"].state == "ended"
    count = attempts(node)[-1].metadata.attempt
    time.sleep(2.5)
    assert attempts(node)[-1].metadata.attempt == count


def test_it_goes_on_under_the_next_daemon(node: Node) -> None:
    """What ended while there was none is started; what somebody stopped only with `always`."""
    for name, policy in (
        ("always", "always"),
        ("unless", "unless-stopped"),
        ("stopped", "unless-stopped"),
        ("ended", "always"),
    ):
        run(node, f"--restart={policy}", script="sleep 1000", name=name)
    assert tare(node, "stop", "-t", "0", "stopped", "always").returncode == 0
    node.daemon.kill()
    os.kill(pid_of(node, "ended"), 9)
    node.daemon.start()
    until("ended", lambda: running(node, 1, "ended"))
    until("always", lambda: running(node, 1, "always"))
    assert [item.state for item in attempts(node, "unless")] == [pb.CONTAINER_RUNNING]
    assert [item.state for item in attempts(node, "stopped")] == [pb.CONTAINER_EXITED]
    ended = node.status(attempts(node, "ended")[0].id)
    assert (ended.exit_code, ended.reason) == (137, "Error")


def pid_of(node: Node, name: str) -> int:
    """The main process of a running container, from the databases: there is no daemon."""
    with closing(sqlite3.connect(node.daemon.root / "state.db")) as state:
        rows = state.execute("SELECT key, value FROM containers").fetchall()
    ids = [key for key, value in rows if json.loads(value)["config"]["metadata"]["name"] == name]
    with closing(sqlite3.connect(node.daemon.run / "boot.db")) as boot:
        (value,) = boot.execute("SELECT value FROM container_facts WHERE key = ?", (ids[0],)).fetchone()
    return int(json.loads(value)["process"]["pid"])


def test_a_reboot(node: Node) -> None:
    """The run directory is gone and nothing runs: the pod is made anew, with its name, and its container's next attempt; a kubelet's is not."""
    run(node, "--restart=always", script="echo here; sleep 1000")
    run(node, "--restart=on-failure", script="sleep 1000", name="failing")
    kubelets = node.pod_config("kubelets", labels={"io.kubernetes.pod.uid": "u"}, annotations={"tare/run": "x"})
    kubelets.metadata.namespace = "tare"
    pod = node.run_pod(kubelets)
    config = node.container_config("main", "sleep", "1000")
    config.annotations["tare/restart"] = "always"
    node.start(create(node, pod, config, kubelets))
    reboot(node)
    node.daemon.start()
    last = until("the next attempt", lambda: running(node, 1))
    until("the other", lambda: running(node, 1, "failing"))
    assert node.pod_status(last.pod_sandbox_id).metadata.name == "box"
    assert tare(node, "logs", "box").stdout.startswith("here\n")
    assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY
    assert [item.state for item in attempts(node, "main")] == [pb.CONTAINER_EXITED]
    assert len([item for item in node.daemon.client.pods() if item.metadata.name == "box"]) == 1


def create(node: Node, pod: str, config: pb.ContainerConfig, sandbox: pb.PodSandboxConfig) -> str:
    """CreateContainer in a pod of that configuration."""
    client = node.daemon.client
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=sandbox)
    return str(client.call(client.runtime.CreateContainer, request).container_id)


def reboot(node: Node) -> None:
    """As one would leave it: no process, no mount, no run directory, and a root directory as it was."""
    node.daemon.kill()
    pids = [pid for name in os.listdir(node.daemon.run / "tasks") if (pid := int(name.partition(".")[0]))]
    for pid in pids:
        os.kill(pid, 9)
    until("their ends", lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    assert quit_keeper(node.daemon.run)
    until("the keeper's end", lambda: not (node.daemon.run / "keeper.sock").exists())
    for point in reversed(mounts_below(node.daemon.run)):
        subprocess.run(["umount", "-l", point], check=True)
    shutil.rmtree(node.daemon.run)
    node.daemon.run.mkdir(mode=0o700)


def test_a_run_that_waits_follows_over_restarts(node: Node) -> None:
    """It ends with the code of the last attempt, and what the container is stays for who looks."""
    done = tare(node, "run", "--name", "box", "--restart=on-failure:2", node.image, "sh", "-c", "echo once; exit 5")
    assert (done.returncode, done.stdout) == (5, "once\n" * 3)
    assert [item.metadata.attempt for item in attempts(node)] == [0, 1, 2]
    refused = tare(node, "run", "--rm", "--restart=always", node.image, "true")
    assert (refused.returncode, "exclude each other" in refused.stderr) == (125, True)
    wrong = tare(node, "run", "--restart=sometimes", node.image, "true")
    assert (wrong.returncode, "sometimes" in wrong.stderr) == (125, True)


def test_health(node: Node) -> None:
    """Starting, healthy, unhealthy; the start period; what is told of probes; and it outlives the daemon."""
    options = (
        "--health-cmd=test -e /well || { echo no file; exit 1; }",
        "--health-interval=100ms",
        "--health-retries=2",
    )
    container = run(node, *options, "--health-start-period=30s", "--health-start-interval=50ms", script="sleep 1000")
    until("a probe", lambda: supervised(node)["box"].probes)
    item = supervised(node)["box"]
    assert (item.health, item.failing_streak) == ("starting", 0)
    assert (item.probes[-1].exit_code, item.probes[-1].output) == (1, "no file\n")
    node.exec(container, "touch", "/well")
    until("health", lambda: supervised(node)["box"].health == "healthy")
    assert "(healthy)" in tare(node, "ps").stdout
    node.daemon.kill()
    node.daemon.start()
    assert supervised(node)["box"].health == "healthy"
    node.exec(container, "rm", "/well")
    until("illness", lambda: (item := supervised(node)["box"]).health == "unhealthy" and item.failing_streak >= 2)
    inspected = json.loads(tare(node, "inspect", "box").stdout)[0]["supervision"]
    assert (inspected["health"], len(inspected["probes"]) <= 5) == ("unhealthy", True)
    assert node.status(container).state == pb.CONTAINER_RUNNING
    run(
        node,
        "--health-cmd=sleep 1000",
        "--health-timeout=200ms",
        "--health-interval=100ms",
        script="sleep 1000",
        name="slow",
    )
    until("a late probe", lambda: supervised(node)["slow"].health and supervised(node)["slow"].probes)
    probe = supervised(node)["slow"].probes[-1]
    assert (probe.exit_code, probe.output) == (-1, "no end within 0.2 s")


def test_what_an_image_says_of_health(node: Node) -> None:
    """It holds where `tare run` says nothing, in part where it says something, and not at all where that is asked for."""
    test = {"Test": ["CMD", "test", "-e", "/etc/passwd"], "Interval": 100_000_000}
    layout = busybox_image(node.daemon.base / "layout", config={"Healthcheck": test})
    loaded = tare(node, "load", "--name", "localhost/healthy:1", str(layout))
    assert loaded.returncode == 0, loaded.stderr
    for name, more in (
        ("said", ()),
        ("other", ("--health-cmd=false", "--health-retries=1")),
        ("none", ("--no-healthcheck",)),
    ):
        done = tare(node, "run", "-d", "--name", name, *more, "localhost/healthy:1", "sleep", "1000")
        assert done.returncode == 0, done.stderr
    until(
        "health",
        lambda: supervised(node)["said"].health == "healthy" and supervised(node)["other"].health == "unhealthy",
    )
    assert "none" not in supervised(node)


def test_pods_of_others_are_left_alone(node: Node) -> None:
    """Annotations alone do not make a container ours."""
    pod = node.run_pod("plain")
    config = node.container_config("main", "false")
    config.annotations["tare/restart"] = "always"
    container = node.start(node.create(pod, config))
    node.wait(container)
    time.sleep(0.5)
    assert [item.id for item in attempts(node, "main")] == [container]
    assert supervised(node) == {}


def test_a_stop_in_the_middle_of_restarts_ends_them(node: Node) -> None:
    """Whatever moment it comes at."""
    for number in range(6):
        name = f"race-{number}"
        run(node, "--restart=always", script="exit 1", name=name)
        thread = threading.Timer(0.03 * number, stop_last, (node, name))
        thread.start()
        thread.join()
        until("the end", functools.partial(has_ended, node, name))
        count = attempts(node, name)[-1].metadata.attempt
        time.sleep(0.4)
        assert (attempts(node, name)[-1].metadata.attempt, supervised(node)[name].state) == (count, "ended")


def has_ended(node: Node, name: str) -> bool:
    """Whether nothing is going to be started."""
    return bool(supervised(node)[name].state == "ended")


def stop_last(node: Node, name: str) -> None:
    """StopContainer for what is the last attempt now."""
    try:
        node.stop(attempts(node, name)[-1].id, 0)
    except CallFailed as error:
        assert error.status == "NOT_FOUND", error
