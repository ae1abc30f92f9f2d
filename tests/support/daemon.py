"""A real `tare serve` with directories of its own, and the certainty that nothing of it is left afterwards.

    with Daemon(Path("/run/tare-test-x")) as daemon:        # base/root, base/run, base/run/tare.sock
        daemon.client.call(daemon.client.runtime.Version, api_pb2.VersionRequest())
        daemon.kill()                                       # the daemon alone, as a crash would
        daemon.start()

Leaving the context takes down all pods over CRI, ends daemon and keeper, and removes bridge, table and directories. Where that
does not work (the daemon is broken, which is what a test may be about) it is done by force, and `destroy` says so.

The base directory's path is short, since a unix socket's is at most 107 bytes long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tare.cli.client import CallFailed, Client
from tare.config import Config, load
from tare.cri.v1 import api_pb2
from tare.launch import packets, wire
from tare.network.embedded import EmbeddedNetworks
from tare.state.database import Database
from tests.support import leaks

START_SECONDS = 120.0
STOP_SECONDS = 20.0
CGROUPS = Path("/sys/fs/cgroup")


class Daemon:
    """One instance of Tare. `settings` is its configuration (TOML), `environment` is added to ours, `prefix` begins its command line."""

    def __init__(
        self,
        base: Path,
        *,
        settings: str = "",
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.base = base
        self.root = base / "root"
        self.run = base / "run"
        self.socket = self.run / "tare.sock"
        self.log = base / "daemon.log"
        self.settings = settings
        self.environment = dict(environment or {})
        self.prefix = tuple(prefix)
        self.process: subprocess.Popen[bytes] | None = None
        self.handed: tuple[int, ...] = ()  # descriptors that it is started with
        self.containers: set[str] = set()
        self.served = False
        self._client: Client | None = None

    def __enter__(self) -> Daemon:
        try:
            self.start()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        troubles = self.destroy()
        if troubles and error is None:
            raise RuntimeError("the daemon had to be taken down by force: " + "; ".join(troubles))

    @property
    def client(self) -> Client:
        """A connection to this daemon; kept across restarts."""
        if self._client is None:
            self._client = Client(str(self.socket))
        return self._client

    @property
    def configuration(self) -> Config:
        """The settings that it runs with."""
        return load(str(self.base / "config.toml"), root=str(self.root), run=str(self.run))

    def command(self) -> list[str]:
        """Its command line."""
        options = [f"--config={self.base}/config.toml", f"--root={self.root}", f"--run={self.run}"]
        return [*self.prefix, sys.executable, "-m", "tare.cli.main", "serve", *options]

    def begin(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the daemon, and wait for nothing."""
        self.base.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.base / "config.toml").write_text(self.settings)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, **(environment or {})},
                start_new_session=True,
                pass_fds=self.handed,
            )

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the daemon and wait until it answers. Raises RuntimeError with its log."""
        self.begin(environment)
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tare serve did not come up:\n{self.told()}")
            time.sleep(0.02)
        self.served = True

    def told(self) -> str:
        """The end of what daemon, keeper and launcher have said."""
        logs = [
            path.read_text(errors="replace")[-4000:] for path in (self.log, self.run / "launch.log") if path.exists()
        ]
        return "\n".join(logs)

    def answers(self) -> bool:
        """Whether the daemon serves CRI now."""
        try:
            with Client(str(self.socket)) as client:
                client.call(client.runtime.Version, api_pb2.VersionRequest(), timeout=5)
        except CallFailed:
            return False
        return True

    def stop(self) -> bool:
        """SIGTERM; whether it ended in time (it is killed otherwise)."""
        if self.process is None:
            return True
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        self.process = None
        return True

    def kill(self) -> None:
        """SIGKILL for the daemon alone; containers and keeper live on."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def remove_pods(self) -> None:
        """Stop and remove every pod over CRI. Raises CallFailed."""
        with Client(str(self.socket)) as client:
            self.containers |= {container.id for container in client.containers()}
            for pod in client.pods():
                stop = api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod.id)
                client.call(client.runtime.StopPodSandbox, stop, timeout=60)
                remove = api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
                client.call(client.runtime.RemovePodSandbox, remove, timeout=60)

    def destroy(self) -> list[str]:
        """Take all of the instance away, whatever state it is in. Returns what did not go by itself."""
        troubles = []
        if self._client is not None:
            self._client.__exit__()
            self._client = None
        if self.run.exists():
            troubles += self._take_down()
            troubles += self._force()
        shutil.rmtree(self.base, ignore_errors=False) if self.base.exists() else None
        return troubles

    def _take_down(self) -> list[str]:
        troubles = []
        try:
            if self.served:
                if self.process is None or self.process.poll() is not None:
                    self.start()  # the next one knows what the last one made
                self.remove_pods()
        except (RuntimeError, CallFailed) as error:
            troubles.append(f"pods: {error}")
        if not self.stop():
            troubles.append("the daemon did not end on SIGTERM")
        if not quit_keeper(self.run):
            troubles.append("the keeper would not end")
        return troubles

    def _force(self) -> list[str]:
        troubles = []
        for process in leaks.processes():
            if str(self.run) in process.command.split(" "):
                troubles.append(f"process {process.pid} {process.name}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        names = self.containers | listed(self.run / "containers")
        names |= {f"tare-{pod}" for pod in listed(self.run / "pods")}
        troubles += [f"cgroup {path}" for path in remove_cgroups(names)]
        for point in reversed(mounts_below(self.base)):
            troubles.append(f"mount {point}")
            subprocess.run(["umount", "-l", point], check=True)
        asyncio.run(self._remove_network())
        return troubles

    async def _remove_network(self) -> None:
        database = Database(self.base / "teardown.db")  # its own may be what is broken, and no lease matters any more
        try:
            await EmbeddedNetworks(database, self.configuration.network, self.run).teardown()
        finally:
            database.close()


def quit_keeper(run: Path) -> bool:
    """Ask the keeper of a run directory to end; True where it does or there is none."""
    try:
        connection = packets.connect(f"{run}/keeper.sock")
    except OSError:
        return True
    with connection:
        connection.settimeout(STOP_SECONDS)
        packets.send(connection, wire.QUIT, 1)
        try:
            while packets.receive(connection)[0] != wire.FAILED:
                continue
        except packets.Closed:
            return True
    return False


def listed(directory: Path) -> set[str]:
    """Names in a directory that may not exist."""
    return set(os.listdir(directory)) if directory.is_dir() else set()


def mounts_below(directory: Path) -> list[str]:
    """Mount points at or below a directory, outer ones first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point == str(directory) or point.startswith(f"{directory}/")]


def remove_cgroups(names: set[str]) -> list[str]:
    """Kill what runs in the cgroups so named and remove them, in every hierarchy; returns their paths."""
    found = []
    for directory, children, _ in os.walk(CGROUPS, topdown=False):
        for name in names & set(children):
            path = Path(directory, name)
            found.append(str(path))
            end_cgroup(path)
    return found


def end_cgroup(path: Path) -> None:
    """Kill a cgroup's processes and remove it. Raises OSError where it stays busy."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)
