"""The runtimes that are measured: each started with its own directories, and taken down with all that it made."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import images
from bench.groups import Group
from tare.cli.client import CallFailed, Client
from tare.cri.v1 import api_pb2
from tests.support.daemon import Daemon, mounts_below
from tests.support.oci import command

START_SECONDS = 30.0
CONTAINERD_BRIDGE = "tarebenchctd0"
CONTAINERD_SUBNET = "10.213.0.0/16"
CONFIG = """
version = 2
root = "{base}/root"
state = "{base}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{base}/containerd.sock"
[debug]
  level = "warn"
[plugins."io.containerd.internal.v1.opt"]
  path = "{base}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{registry}/{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{base}/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{base}/hosts"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "runc"
        Root = "{base}/runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
        BinaryName = "crun"
        Root = "{base}/crun"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.tare]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.tare.options]
        BinaryName = "{tare}"
        Root = "{base}/tare"
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A runtime that serves CRI: a client of it, its cgroup, where its logs go, and the handler its pods are to have.

    `kill` ends its daemon and nothing else, `begin` starts the next one, at `address`. `daemon` is Tare's, which can be stopped and started.
    """

    name: str
    client: Client
    group: Group
    logs: Path
    address: str
    kill: Callable[[], None]
    begin: Callable[[], None]
    handler: str = ""
    daemon: Daemon | None = None


@contextlib.contextmanager
def tare(base: Path) -> Iterator[Peer]:
    """Tare from this checkout."""
    with Group(f"{base.name}-tare") as group:
        daemon = Daemon(base / "tare", prefix=group.wrapper())
        with daemon:
            ways = (str(daemon.socket), daemon.kill, daemon.begin)
            yield Peer("tare", daemon.client, group, base / "logs-tare", *ways, daemon=daemon)


class Containerd:
    """Its daemon, which `running` is."""

    def __init__(self, directory: Path, wrapper: Sequence[str]) -> None:
        self.directory = directory
        self.command = [*wrapper, "containerd", "--config", str(directory / "config.toml")]
        self.begin()

    def begin(self) -> None:
        """Start it."""
        with (self.directory / "log").open("ab") as log:
            self.running = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"/usr/sbin:/sbin:{os.environ['PATH']}"},
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL, and nothing for its shims."""
        self.running.kill()
        self.running.wait()


@contextlib.contextmanager
def containerd(base: Path, registry: str, masquerade: bool) -> Iterator[Peer]:
    """Debian's containerd with runc. Its pods hang on a bridge; with `masquerade` they reach outside, as Tare's do."""
    directory = base / "containerd"
    configure(directory, registry, masquerade)
    had_run = Path("/run/containerd").exists()
    tables = nat_tables()
    with Group(f"{base.name}-containerd") as group:
        process = Containerd(directory, group.wrapper())
        address = str(directory / "containerd.sock")
        client = Client(address)
        try:
            wait_ready(client, process.running, directory / "log")
            ways = (address, process.kill, process.begin)
            yield Peer("containerd", client, group, base / "logs-containerd", *ways)
        finally:
            stop_containerd(client, process.running)
            group.remove()
            clean(directory, had_run)
            remove_empty(nat_tables() - tables)


def configure(directory: Path, registry: str, masquerade: bool) -> None:
    """Write containerd's configuration, its network and its registry hosts."""
    (directory / "cni").mkdir(parents=True)
    (directory / "config.toml").write_text(
        CONFIG.format(base=directory, registry=registry, pause=images.PAUSE, tare=command("tare")[0])
    )
    bridge = {
        "type": "bridge",
        "bridge": CONTAINERD_BRIDGE,
        "isGateway": True,
        "ipMasq": masquerade,
        "ipam": {
            "type": "host-local",
            "dataDir": str(directory / "ipam"),
            "ranges": [[{"subnet": CONTAINERD_SUBNET}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    network = {"cniVersion": "1.0.0", "name": directory.parent.name, "plugins": [bridge]}
    (directory / "cni/10-bench.conflist").write_text(json.dumps(network))
    hosts = directory / "hosts" / registry
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "http://{registry}"\n')


def wait_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until its network is ready. Raises RuntimeError with its log."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(CallFailed):
            answer = client.call(client.runtime.Status, api_pb2.StatusRequest(), timeout=5)
            if all(condition.status for condition in answer.status.conditions):
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"containerd did not come up:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)


def remove_pods(client: Client) -> None:
    """Stop and remove every pod. Raises CallFailed."""
    for pod in client.pods():
        client.call(client.runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod.id))
        client.call(client.runtime.RemovePodSandbox, api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def stop_containerd(client: Client, process: subprocess.Popen[bytes]) -> None:
    """Its pods, then the daemon."""
    with contextlib.suppress(CallFailed):  # what is left then is taken away by force
        remove_pods(client)
    client.__exit__()
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def clean(directory: Path, had_run: bool) -> None:
    """What outlives containerd and its shims: mounts, the bridge, CNI's notes, sockets' directories."""
    for point in reversed(mounts_below(directory)):
        subprocess.run(["umount", "-l", point], check=True)
    if Path("/sys/class/net", CONTAINERD_BRIDGE).exists():
        subprocess.run(["ip", "link", "delete", CONTAINERD_BRIDGE], check=True)
    for note in Path("/var/lib/cni/results").glob(f"{directory.parent.name}-*"):
        note.unlink()
    if not had_run:
        shutil.rmtree("/run/containerd", ignore_errors=True)
    shutil.rmtree(directory)


def nat_tables() -> set[str]:
    """Those of the tables that iptables makes which exist: "ip nat", "ip6 nat"."""
    result = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return {line.removeprefix("table ") for line in result.stdout.splitlines()} & {"ip nat", "ip6 nat"}


def remove_empty(tables: set[str]) -> None:
    """Remove tables that hold no rule: the masquerade plugin's, whose own rules went with its pods."""
    for table in tables:
        listed = subprocess.run(
            ["nft", "-j", "list", "table", *table.split()], capture_output=True, text=True, check=True
        )
        if not any("rule" in entry for entry in json.loads(listed.stdout)["nftables"]):
            subprocess.run(["nft", "delete", "table", *table.split()], check=True)
