"""NRI plugins beside a real daemon: what they adjust is seen from within, what they refuse is refused, and what they break is theirs alone."""

from __future__ import annotations

import json
import socket
import stat
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.cni import until
from tests.support.handlers import SHARING, settings
from tests.support.node import Node, busy_node
from tests.support.nri import plugin

pytestmark = pytest.mark.root
MIB = 1 << 20
SETTINGS = "[nri]\nrequest_timeout = 3.0\nregistration_timeout = 6.0\n"  # which a loaded machine's plugins keep to


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("nri", settings=SETTINGS + settings()) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def info(node: Node, container: str) -> dict[str, Any]:
    """What a verbose ContainerStatus adds."""
    client = node.daemon.client
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: dict[str, Any] = json.loads(client.call(client.runtime.ContainerStatus, request).info["info"])
    return found


ADJUSTS = """
def create_container(self, pod, container):
    note("create_container", env=list(container.env), args=list(container.args), state=container.state)
    limits = LinuxResources(memory=LinuxMemory(limit=OptionalInt64(value=64 << 20)), cpu=LinuxCPU(shares=OptionalUInt64(value=512)))
    limits.pids.limit = 77
    linux = LinuxContainerAdjustment(
        devices=[LinuxDevice(path="/dev/mine", type="c", major=1, minor=5, file_mode=OptionalFileMode(value=0o640))],
        resources=limits, oom_score_adj=OptionalInt(value=321), sysctl={"net.ipv4.ip_unprivileged_port_start": "7"})
    linux.io_priority.priority = 6
    setattr(linux.io_priority, "class", 2)
    linux.scheduler.policy, linux.scheduler.nice = 4, 3
    linux.seccomp_policy.default_action = "SCMP_ACT_ALLOW"
    linux.seccomp_policy.syscalls.add(names=["mkdir", "mkdirat"], action="SCMP_ACT_ERRNO").errno_ret.value = 95
    return ContainerAdjustment(
        annotations={"mine": "yes", "-theirs": ""},
        env=[KeyValue(key="ADDED", value=pod.name), KeyValue(key="-GONE"), KeyValue(key="CHANGED", value="new")],
        mounts=[Mount(destination="/given", type="bind", source=DIRECTORY, options=["rbind", "ro"]), Mount(destination="-/etc/hosts")],
        rlimits=[POSIXRlimit(type="RLIMIT_NOFILE", soft=123, hard=456)],
        hooks=Hooks(create_runtime=[Hook(path="/bin/sh", args=["sh", "-c", "cat > " + DIRECTORY + "/told"])]),
        linux=linux)
"""
LOOKS = """
echo env $ADDED $CHANGED ${GONE-gone}
cat /given/file; touch /given/new 2>/dev/null || echo read-only
grep -c ' /etc/hosts ' /proc/self/mountinfo
ulimit -n; ulimit -Hn
stat -c '%t %T %a' /dev/mine; head -c 3 /dev/mine | wc -c
cat /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_unprivileged_port_start
cut -d ' ' -f 19,41 /proc/self/stat
mkdir /new 2>&1 | grep -c supported
"""


def test_everything_that_is_adjusted_is_seen_from_within(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the plugin\n")
    body = ADJUSTS.replace("DIRECTORY", repr(str(tmp_path)))
    envs = [pb.KeyValue(key="GONE", value=b"x"), pb.KeyValue(key="CHANGED", value=b"old")]
    with plugin(node, tmp_path, "10", "adjusts", body) as adjusts:
        pod = node.run_pod("adjusted")
        config = node.container_config("main", "sh", "-c", LOOKS, envs=envs, annotations={"theirs": "x"})
        container = node.create(pod, config)
        shown = adjusts.until("create_container")
        assert "GONE=x" in shown["env"] and shown["args"][:2] == ["sh", "-c"] and shown["state"] == 0
        node.start(container)
        assert node.wait(container).exit_code == 0
    assert node.log(container) == [
        *("env adjusted new gone", "from the plugin", "read-only", "0", "123", "456"),
        *("1 5 640", "3", "321", "7", "3 3", "1"),
    ]
    assert json.loads((tmp_path / "told").read_text())["id"] == container
    spec, limits = info(node, container)["runtimeSpec"], node.status(container).resources.linux
    assert spec["annotations"] == {"mine": "yes"} and node.status(container).annotations == {"theirs": "x"}
    assert spec["linux"]["resources"]["pids"] == {"limit": 77}
    assert (limits.memory_limit_in_bytes, limits.cpu_shares) == (64 * MIB, 512)
    assert spec["process"]["ioPriority"] == {"class": "IOPRIO_CLASS_BE", "priority": 6}


@pytest.mark.parametrize("handler", SHARING)
def test_another_runtimes_containers_are_adjusted_too(node: Node, tmp_path: Path, handler: str) -> None:
    body = """
    def start_container(self, pod, container):
        note("start_container", handler=pod.runtime_handler, pid=container.pid)
    def create_container(self, pod, container):
        return ContainerAdjustment(
            env=[KeyValue(key="A", value="b")], rlimits=[POSIXRlimit(type="RLIMIT_NOFILE", soft=99, hard=99)],
            mounts=[Mount(destination="/given", type="tmpfs", source="tmpfs", options=["size=64k"])])
    """
    with plugin(node, tmp_path, "10", "adjusts", body) as adjusts:
        pod = node.run_pod(f"adjusted-{handler}", handler=handler)
        command = "echo $A; ulimit -n; df -k /given | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"
        container = node.start(node.create(pod, "main", "sh", "-c", command))
        node.wait(container)
        assert node.log(container) == ["b", "99", "64"]
        shown = adjusts.until("start_container")
        assert shown["handler"] == handler and shown["pid"] > 1
        adjusts.until("stop_container")


def test_events_in_order(node: Node, tmp_path: Path) -> None:
    with plugin(node, tmp_path, "10", "events") as events:
        pod = node.run_pod("events")
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        node.update(container, cpu_shares=300)
        node.update_pod(pod, cpu_shares=400)
        node.stop(container, 0)
        second = node.start(node.create(pod, "second", "true"))  # ends by itself
        events.until("stop_container", id=second)
        node.stop_pod(pod)
        node.remove_pod(pod)
        events.until("remove_pod_sandbox")
    first = ["create_container", "post_create_container", "start_container", "post_start_container"]
    last = ["stop_container", "remove_container"]
    assert events.names(id=container) == [*first, "update_container", "post_update_container", *last]
    assert [name for name in events.names(id=second) if name != "post_start_container"] == [*first[:3], *last]
    about = [item["event"] for item in events.events if item.get("pod") == pod and "id" not in item]
    names = ["run", "update", "post_update", "stop", "remove"]
    assert about == [f"{name}_pod_sandbox" for name in names]
    assert events.names().index("stop_pod_sandbox") > events.names().index("stop_container")


FAILS = """
def run_pod_sandbox(self, pod):
    if "pod" in pod.name: raise RuntimeError("no such pod here")
def create_container(self, pod, container):
    if container.name == "create": raise RuntimeError("I will not have it")
def start_container(self, pod, container):
    note("pid", pid=container.pid)
    if container.name == "start": raise RuntimeError("not today")
def update_container(self, pod, container, resources):
    if resources.cpu.shares.value == 777: raise RuntimeError("enough is enough")
def post_start_container(self, pod, container):
    raise RuntimeError("nobody asked me")
"""


def test_one_that_fails_has_the_request_refused_and_undone(node: Node, tmp_path: Path) -> None:
    with plugin(node, tmp_path, "10", "fails", FAILS) as fails:
        node.refused("UNKNOWN", "no such pod here", node.run_pod, "a-pod")
        assert node.daemon.client.pods() == [] and node.settled() == []
        assert fails.names() == ["configure", "synchronize", "stop_pod_sandbox", "remove_pod_sandbox"]
        pod = node.run_pod("fails")
        node.refused("UNKNOWN", "I will not have it", node.create, pod, "create", "true")
        assert node.daemon.client.containers() == [] and list((node.daemon.root / "containers").glob("*")) == []
        fails.until("remove_container")
        container = node.create(pod, "start", "true")
        node.refused("UNKNOWN", "not today", node.start, container)
        status = node.status(container)
        assert (status.reason, status.exit_code) == ("StartError", 128) and "not today" in status.message
        assert fails.until("pid")["pid"] > 1
        fails.until("stop_container", id=container)
        good = node.start(node.create(pod, "good", "sleep", "1000"))  # what it says afterwards changes nothing
        node.refused("UNKNOWN", "enough is enough", lambda: node.update(good, cpu_shares=777))
        assert node.status(good).resources.linux.cpu_shares == 0


STALLS = """
async def create_container(self, pod, container):
    note("asked"); await asyncio.sleep(60)
"""


def test_one_that_stalls_is_disconnected_and_requests_go_on(node: Node, tmp_path: Path) -> None:
    adds = "def create_container(self, pod, container):\n    return ContainerAdjustment(env=[KeyValue(key='A', value='b')])"
    with plugin(node, tmp_path, "20", "adds", adds):
        pod = node.run_pod("stalls")
        with plugin(node, tmp_path, "10", "stalls", STALLS, again=False) as stalls:
            began = time.monotonic()
            container = node.create(pod, "main", "sh", "-c", "echo $A")
            assert 2.9 < time.monotonic() - began < 30.0 and stalls.names().count("asked") == 1
            node.create(pod, "second", "true")
            assert stalls.names().count("asked") == 1
        node.wait(node.start(container))
        assert node.log(container) == ["b"]
    assert "NRI plugin 10-stalls is disconnected" in node.daemon.log.read_text()


def test_plugins_are_asked_by_index_and_may_not_set_the_same(node: Node, tmp_path: Path) -> None:
    first = """
    def create_container(self, pod, container):
        return ContainerAdjustment(env=[KeyValue(key="A", value="first")])
    """
    second = """
    def create_container(self, pod, container):
        note("seen", env=list(container.env))
        if container.name == "same": return ContainerAdjustment(env=[KeyValue(key="A", value="second")])
        if container.name == "other": return ContainerAdjustment(env=[KeyValue(key="-A"), KeyValue(key="A", value="second")])
    """
    with plugin(node, tmp_path, "20", "second", second) as later, plugin(node, tmp_path, "10", "first", first):
        pod = node.run_pod("conflict")
        node.refused(
            "FAILED_PRECONDITION", "plugins 10-first and 20-second both set Env 'A'", node.create, pod, "same", "true"
        )
        assert "A=first" in later.until("seen")["env"]
        client = node.daemon.client
        status = client.call(client.runtime.Status, pb.StatusRequest(verbose=True))
        assert json.loads(status.info["info"])["plugins"] == ["10-first", "20-second"]
        for name, value in (("other", "second"), ("none", "first")):
            container = node.start(node.create(pod, name, "sh", "-c", "echo $A"))
            node.wait(container)
            assert node.log(container) == [value]


CHANGES = """
async def post_start_container(self, pod, container):
    if container.name == "changed":
        asyncio.ensure_future(self.later(container.id))
async def later(self, one):
    limits = LinuxResources(memory=LinuxMemory(limit=OptionalInt64(value=96 << 20)))
    good = ContainerUpdate(container_id=one, linux=LinuxContainerUpdate(resources=limits))
    bad = ContainerUpdate(container_id=one, linux=LinuxContainerUpdate(resources=LinuxResources(cpu=LinuxCPU(cpus="4000"))))
    failed = await self.update([good])
    again = await self.update([bad])
    note("updated", failed=len(failed), again=[item.container_id for item in again])
def update_container(self, pod, container, resources):
    changed = LinuxResources(cpu=LinuxCPU(shares=OptionalUInt64(value=resources.cpu.shares.value * 2)))
    changed.pids.limit = 50
    note("asked", shares=resources.cpu.shares.value)
    return [ContainerUpdate(container_id=container.id, linux=LinuxContainerUpdate(resources=changed))]
def create_container(self, pod, container):
    if container.name == "evicts":
        other = [item for item in self.known if item != container.id][0]
        return CreateContainerResponse(evict=[ContainerEviction(container_id=other, reason="to make room")])
known = []
def post_create_container(self, pod, container):
    self.known.append(container.id)
"""


def test_updates_and_evictions(node: Node, tmp_path: Path) -> None:
    with plugin(node, tmp_path, "10", "changes", CHANGES) as changes:
        pod = node.run_pod("changes")
        limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
        config = node.container_config("changed", "sleep", "1000", resources=limits)
        container = node.start(node.create(pod, config))
        assert changes.until("updated") == {"event": "updated", "failed": 0, "again": [container]}
        assert node.status(container).resources.linux.memory_limit_in_bytes == 96 * MIB
        node.update(container, cpu_shares=300)
        assert changes.until("asked")["shares"] == 300
        assert node.status(container).resources.linux.cpu_shares == 600
        assert info(node, container)["runtimeSpec"]["linux"]["resources"]["pids"] == {"limit": 50}
        node.create(pod, "evicts", "true")
        status = node.status(container)
        assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 137)
    assert "is evicted by NRI plugin 10-changes: to make room" in node.daemon.log.read_text()


WANTS_OTHERS = """
others = {}
def post_create_container(self, pod, container):
    self.others[container.name] = container.id
def update_container(self, pod, container, resources):
    note("update", name=container.name)
    return [ContainerUpdate(container_id=self.others["goes"])]
def stop_container(self, pod, container):
    note("stop", name=container.name)
    return [ContainerUpdate(container_id=self.others["stays"])] if container.name == "goes" else None
"""


def test_two_containers_of_which_each_has_the_other_changed_do_not_wait_for_each_other(
    node: Node, tmp_path: Path
) -> None:
    """One is removed, and held up in that, while the other is updated."""
    held = node.daemon.run / "held"
    node.daemon.stop()
    node.daemon.start({"TARE_FAILPOINTS": "RemoveContainer.kill.after=hold"})
    with plugin(node, tmp_path, "10", "wants", WANTS_OTHERS) as wants, ThreadPoolExecutor(2) as threads:
        pod = node.run_pod("both")
        stays, goes = node.create(pod, "stays", "true"), node.create(pod, "goes", "true")
        removal = threads.submit(node.remove, goes)
        until(held.exists)
        change = threads.submit(node.update, stays, cpu_shares=300)
        wants.until("update", name="stays")
        held.unlink()
        removal.result(60)
        change.result(60)
        wants.until("stop", name="goes")
        assert node.status(stays).resources.linux.cpu_shares == 300


def test_the_next_daemon_shows_what_was_adjusted(node: Node, tmp_path: Path) -> None:
    body = """
    def synchronize(self, pods, containers):
        note("synchronize", pods=[pod.id for pod in pods], containers=[
            {"id": c.id, "env": [e for e in c.env if e[:2] == "A="], "mine": dict(c.annotations), "state": c.state,
             "memory": c.linux.resources.memory.limit.value, "mounts": [m.source for m in c.mounts if m.destination == "/given"],
             "pid": c.pid} for c in containers])
    def create_container(self, pod, container):
        limits = LinuxResources(memory=LinuxMemory(limit=OptionalInt64(value=64 << 20)))
        return ContainerAdjustment(env=[KeyValue(key="A", value="b")], annotations={"mine": "yes"},
            mounts=[Mount(destination="/given", type="tmpfs", source="tmpfs", options=["size=1m"])],
            linux=LinuxContainerAdjustment(resources=limits))
    """
    with plugin(node, tmp_path, "10", "again", body) as again:
        pod = node.run_pod("again")
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        assert again.until("synchronize")["containers"] == []
        node.daemon.kill()
        node.daemon.start()
        shown = again.until("synchronize", 2)
        assert shown["pods"] == [pod]
        [one] = shown["containers"]
        assert one.pop("pid") == info(node, container)["pid"]
        assert one == {
            "id": container,
            "env": ["A=b"],
            "mine": {"mine": "yes"},
            "state": 3,
            "memory": 64 * MIB,
            "mounts": ["tmpfs"],
        }
        other = node.start(node.create(pod, "other", "sh", "-c", "echo $A"))
        node.wait(other)
        assert node.log(other) == ["b"]


def test_what_cannot_be_done_is_refused(node: Node, tmp_path: Path) -> None:
    body = """
    def create_container(self, pod, container):
        adjust = ContainerAdjustment()
        exec(pod.annotations[container.name])
        return adjust
    """
    wrong = {
        "group": ("adjust.linux.cgroups_path = '/nowhere/at/all'", "FAILED_PRECONDITION", "there is no group"),
        "source": (
            "adjust.mounts.add(destination='/a', type='bind', source='/nonexistent', options=['bind'])",
            "INVALID_ARGUMENT",
            "No such file",
        ),
        "user": ("adjust.linux.namespaces.add(type='user', path='/proc/1/ns/user')", "FAILED_PRECONDITION", "user"),
        "block": ("adjust.linux.resources.blockio_class.value = 'gold'", "FAILED_PRECONDITION", "gold"),
        "sysctl": ("adjust.linux.sysctl['kernel.panic'] = '1'", "INVALID_ARGUMENT", "not of a namespace"),
        "device": ("adjust.CDI_devices.add(name='vendor.com/none=a')", "NOT_FOUND", "vendor.com/none=a"),
        "filter": ("adjust.linux.seccomp_policy.default_action = 'ALLOW'", "INVALID_ARGUMENT", "defaultAction"),
    }
    with plugin(node, tmp_path, "10", "wrong", body):
        annotations = {name: code for name, (code, _, _) in wrong.items()}
        pod = node.run_pod(node.pod_config("wrong", annotations=annotations))
        for name, (_, status, words) in wrong.items():
            node.refused(status, words, node.create, pod, name, "true")
        assert node.daemon.client.containers() == []


def test_a_group_of_its_own_choice(node: Node, tmp_path: Path) -> None:
    body = """
    def create_container(self, pod, container):
        path = container.linux.cgroups_path
        note("path", path=path)
        return ContainerAdjustment(linux=LinuxContainerAdjustment(cgroups_path=path.rpartition("/")[0] + "/chosen"))
    """
    held = node.daemon.run / "held"
    node.daemon.stop()
    node.daemon.start({"TARE_FAILPOINTS": "CreateContainer.plugins.after=hold"})
    with plugin(node, tmp_path, "10", "chooses", body) as chooses, ThreadPoolExecutor(1) as threads:
        pod = node.run_pod("chooses")
        words = ("FAILED_PRECONDITION", "it is another's")
        at_once = threads.submit(node.refused, *words, node.create, pod, "at-once", "true")
        until(held.exists)
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        held.unlink()
        at_once.result(60)
        path = chooses.until("path")["path"].rpartition("/")[0] + "/chosen"
        assert info(node, container)["cgroup"] == path
        pid = info(node, container)["pid"]
        assert f":{path}\n" in Path(f"/proc/{pid}/cgroup").read_text()
        node.refused(*words, node.create, pod, "second", "true")


def connect(node: Node) -> socket.socket:
    """A connection of nobody in particular."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(20)
    connected.connect(str(node.daemon.run / "nri.sock"))
    return connected


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 100,
    "huge frame": struct.pack(">II", 2, 0xFFFFFFFF),
    "no protobuf": struct.pack(">IIIIBB", 2, 14, 4, 1, 1, 0) + b"\xff\xff\xff\xff",
    "silence": b"",
}


def test_garbage_is_hung_up_on(node: Node) -> None:
    with ExitStack() as stack:
        strangers = {name: stack.enter_context(connect(node)) for name in GARBAGE}
        for name, stranger in strangers.items():
            stranger.sendall(GARBAGE[name])
        node.remove_pod(node.run_pod("meanwhile"))
        deadline = time.monotonic() + 20
        for name, stranger in strangers.items():
            while stranger.recv(4096):
                assert time.monotonic() < deadline, name


def test_the_socket_is_roots_alone(node: Node) -> None:
    status = (node.daemon.run / "nri.sock").stat()
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_uid == 0
