"""The one place that puts the parts together: a daemon from its settings, from the first lock to the last call.

    locks on both directories ─► databases ─► parts ─► keeper reached ─► images, pods and containers recovered ─► calls taken
    SIGTERM or SIGINT         ─► no more calls; what runs in pods goes on, and the next daemon finds it

What any part does is in its own room. One daemon at a time has a run directory, and one a root directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from tare.api.containers import Containers
from tare.api.service import Images
from tare.api.v1 import tare_pb2
from tare.cgroups.choose import choose
from tare.cgroups.layout import container_mounts
from tare.cgroups.manager import CgroupManager
from tare.config import Config
from tare.cri.dispatch import Service
from tare.cri.server import Server
from tare.errors import FailedPrecondition, InternalError, TareError, describe
from tare.handlers.builtin import BuiltinHandler, Hierarchies
from tare.handlers.logs import Logs
from tare.images.service import ImageService
from tare.images.transfers import Transfers
from tare.network.attach import EmbeddedNetwork
from tare.network.choice import Networks
from tare.network.cni.driver import CniNetwork
from tare.runtime import abilities, apparmor, cdi, labels, recovery
from tare.runtime.exits import Watchers
from tare.runtime.handlers import Handlers
from tare.runtime.interactive import Interactive
from tare.runtime.ports import Parts
from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.service import Runtime
from tare.runtime.store import Store
from tare.state import failpoints
from tare.state.database import Database, checkpoint, open_boot
from tare.state.operations import Operations
from tare.storage.overlay import Snapshots
from tare.streaming.backend import RuntimeBackend, RuntimeUrls
from tare.streaming.server import Server as StreamServer
from tare.streaming.tls import Certificate

log = logging.getLogger(__name__)

THREADS = 32  # for what waits for a disk or the kernel: one that is slow must not keep the others from theirs
STOP_GRACE = 5.0  # seconds for calls under way when the daemon is told to end
MAINTENANCE_SECONDS = 60.0
COLLECT_ROUNDS = 10  # images are looked through for what nobody uses once in so many rounds
WAL_SIZE = 1 << 20  # a database's log is brought into its file when it is longer than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """The parts of a daemon that has not begun to serve, or has ended."""

    config: Config
    state: Database
    boot: Database
    cgroups: CgroupManager
    handler: BuiltinHandler
    handlers: Handlers
    network: Networks
    images: ImageService
    transfers: Transfers
    store: Store
    watchers: Watchers
    runtime: Runtime
    interactive: Interactive


def build(config: Config, cgroups: CgroupManager) -> Daemon:
    """Everything from the settings; nothing is started and nothing on the node is changed but for the databases."""
    run, root = config.run, config.root
    state, boot = Database(root / "state.db"), open_boot(run / "boot.db")
    store, operations = Store(state, boot), Operations(boot)
    compiler = SeccompCompiler(root / "seccomp")
    handler = BuiltinHandler(run, config.runtime, compiler.compile, hierarchies(cgroups))
    logs = Logs(run, handler.start_logger)
    handlers = Handlers(handler, config.runtime, run)
    watchers = Watchers(store, handlers, cgroups, logs)
    network = Networks(
        config.network.mode,
        EmbeddedNetwork(state, config.network, run),
        CniNetwork(state, config.network, handler.commands, active=config.network.mode == "cni"),
    )
    images = ImageService(state, operations, root, config.images, store.layers, commands=handler.commands)
    parts = Parts(
        run=run,
        config=config.runtime,
        store=store,
        operations=operations,
        handler=handlers,
        network=network,
        images=images,
        cgroups=cgroups,
        snapshots=Snapshots(root),
        logs=logs,
        seccomp=compiler.compile,
        confinement=labels.kernel,
        cdi=cdi.Registry(config.runtime.cdi_spec_dirs),
        exits=watchers,
    )
    runtime = Runtime(parts, watchers)
    return Daemon(
        config=config,
        state=state,
        boot=boot,
        cgroups=cgroups,
        handler=handler,
        handlers=handlers,
        network=network,
        images=images,
        transfers=Transfers(images),
        store=store,
        watchers=watchers,
        runtime=runtime,
        interactive=Interactive(
            parts,
            runtime.execs,
            hangup_seconds=config.streaming.hangup_grace,
            orphan_seconds=config.streaming.orphan_grace,
        ),
    )


def stream_server(config: Config, daemon: Daemon) -> StreamServer:
    """The server of exec, attach and port-forward. Raises FailedPrecondition for a certificate that is no use."""
    settings = config.streaming
    files = (settings.tls_cert, settings.tls_key)
    certificate = Certificate(Path(files[0]), Path(files[1])) if any(files) else None
    return StreamServer(
        RuntimeBackend(daemon.interactive),
        host=settings.address,
        port=settings.port,
        tls=certificate.context if certificate is not None else None,
        path=config.run / "streaming.sock",
        idle=settings.idle_timeout,
    )


def hierarchies(cgroups: CgroupManager) -> Hierarchies:
    """The control groups that a container sees, as the handler mounts them."""
    mounts = container_mounts(cgroups.found)
    if cgroups.layout == "v2":
        return Hierarchies()
    first = tuple((mount.name, tuple(mount.options.split(","))) for mount in mounts if mount.kind == "cgroup")
    return Hierarchies(v1=first, unified=next((mount.name for mount in mounts if mount.kind == "cgroup2"), ""))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a directory that only root enters, and be the one daemon that has it. Raises FailedPrecondition, InternalError."""
    doing = f"use the directory {directory}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        fd = os.open(directory / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InternalError(doing, cause=error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "stop it, or give this one its own --root and --run"
            raise FailedPrecondition(doing, cause="another daemon has it", hint=hint) from error
        yield
    finally:
        os.close(fd)


async def begin(daemon: Daemon) -> None:
    """Reach what lives, and make records and the node agree."""
    await daemon.handler.connect()
    await daemon.handlers.begin()
    try:
        await daemon.network.setup()
    except TareError as error:
        log.warning("pods cannot be attached to the network: %s", describe(error))
    await daemon.images.recover()
    await apparmor.load(daemon.handler.commands, labels.kernel())
    daemon.runtime.abilities = await abilities.look(daemon.handlers, daemon.config.run, daemon.config.root)
    await recovery.recover(daemon.runtime, daemon.watchers)
    if daemon.cgroups.missing:
        log.info("control groups of layout %s lack %s", daemon.cgroups.layout, ", ".join(daemon.cgroups.missing))


async def maintain(daemon: Daemon) -> None:
    """What has to be done now and then, for ever. The disk is waited for in a thread."""
    number = 0
    while True:
        await asyncio.sleep(MAINTENANCE_SECONDS)
        number += 1
        try:
            for path in (daemon.state.path, daemon.boot.path):
                if log_size(path) > WAL_SIZE:
                    await asyncio.to_thread(checkpoint, path)
            daemon.network.status()  # makes anew what something has flushed
            await daemon.runtime.sweep()
            await daemon.images.make_room()
            if number % COLLECT_ROUNDS == 0:
                await daemon.images.collect()
        except Exception as error:  # noqa: BLE001 - a full disk must not end the rounds that may free it
            log.warning("maintenance: %s", describe(error))


def log_size(path: Path) -> int:
    """The length of a database's log, in bytes."""
    try:
        return os.stat(f"{path}-wal").st_size
    except FileNotFoundError:
        return 0


async def end(daemon: Daemon) -> None:
    """Leave what runs alone; keeper, launcher and loggers go where nothing needs them."""
    await daemon.images.close()
    await daemon.network.close()
    if not daemon.store.pod_facts and not daemon.store.container_facts:
        await daemon.handler.quit()
    await daemon.images.close()
    daemon.transfers.close()
    daemon.handler.close()
    await daemon.cgroups.leave()
    daemon.cgroups.close()
    daemon.state.close()
    daemon.boot.close()


async def kill_launcher(handler: BuiltinHandler) -> None:
    """For failpoints: the launcher is gone when this returns."""
    pid = handler.launcher_pid()
    if not pid:
        return
    pidfd = os.pidfd_open(pid)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        async with asyncio.timeout(10):
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def hold(flag: Path) -> None:
    """For failpoints: the step waits here, said by a file that this makes, until somebody removes it."""
    flag.touch()
    while flag.exists():
        await asyncio.sleep(0.01)


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="tare"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    daemon = build(config, await choose(config.runtime.cgroup_driver, config.runtime.cgroup_root, config.run))
    failpoints.on("kill-launcher", lambda: kill_launcher(daemon.handler))
    failpoints.on("hold", lambda: hold(config.run / "held"))
    maintenance = asyncio.ensure_future(maintain(daemon))
    try:
        await begin(daemon)
        services = tare_pb2.DESCRIPTOR.services_by_name
        others: list[tuple[ServiceDescriptor, Service]] = [
            (services["Images"], Images(daemon.images, daemon.transfers)),
            (services["Containers"], Containers(daemon.runtime)),
        ]
        streaming = stream_server(config, daemon)
        await streaming.start()
        urls = RuntimeUrls(daemon.interactive, streaming)
        server = Server(config.socket, daemon.runtime, daemon.images, about(config, daemon), others, urls)
        await server.start()
        log.info("serving on %s", config.socket)
        await stop.wait()
        log.info("stopping; containers go on")
        daemon.store.journal.close()
        await server.stop(STOP_GRACE)
        await streaming.stop()
    finally:
        maintenance.cancel()
        await end(daemon)


def about(config: Config, daemon: Daemon) -> Mapping[str, Any]:
    """What a verbose Status says of this daemon."""
    return {
        "root": str(config.root),
        "run": str(config.run),
        "cgroups": daemon.cgroups.layout,
        "missingControllers": daemon.cgroups.missing,
    }


def set_up_logging(level: str) -> None:
    """Plain lines to standard error."""
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def serve(config: Config) -> None:
    """The daemon's life, in the foreground. Raises TareError where it cannot begin."""
    set_up_logging(config.daemon.log_level)
    os.umask(0o022)
    with locked(config.root), locked(config.run):
        asyncio.run(run(config))
