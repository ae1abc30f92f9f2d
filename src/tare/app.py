"""The one place that puts the parts together: a daemon from its settings, from the first lock to the last call.

    locks on both directories ─► databases ─► parts ─► keeper reached ─► images, pods and containers recovered ─► calls taken
    SIGTERM or SIGINT         ─► no more calls; what runs in pods goes on, and the next daemon finds it
    SIGHUP                    ─► the settings' log level holds; what else has changed in them is told

What any part does is in its own room. One daemon at a time has a run directory, and one a root directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import fcntl
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from tare.api.containers import Containers
from tare.api.daemon import Daemon as DaemonService
from tare.api.networks import Networks as NetworksService
from tare.api.node import Node, auditor
from tare.api.service import Images
from tare.api.supervision import Supervision, checks_of, probing
from tare.api.v1 import tare_pb2
from tare.cgroups.choose import choose
from tare.cgroups.layout import container_mounts
from tare.cgroups.manager import CgroupManager
from tare.config import Config, differences
from tare.cri.dispatch import Service
from tare.cri.server import Server
from tare.errors import FailedPrecondition, InternalError, ResourceExhausted, TareError, describe
from tare.handlers.builtin import BuiltinHandler, Hierarchies
from tare.handlers.checkpointer import Checkpointer
from tare.handlers.logs import Logs
from tare.handlers.manager import Manager
from tare.images.service import ImageService
from tare.images.transfers import Transfers
from tare.network.choice import Networks
from tare.network.cni.driver import CniNetwork
from tare.network.embedded import EmbeddedNetworks
from tare.nri.front import Front
from tare.nri.server import Server as PluginServer
from tare.observe import logs as daemon_log
from tare.observe.observers import Observers
from tare.observe.sources import Sources
from tare.runtime import abilities, apparmor, cdi, labels, recovery
from tare.runtime.audit_live import Outcome
from tare.runtime.exits import Watchers
from tare.runtime.handlers import Handlers
from tare.runtime.interactive import Interactive
from tare.runtime.ports import Parts
from tare.runtime.records import PodState
from tare.runtime.retrying import Retries
from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.service import Runtime
from tare.runtime.store import Store
from tare.runtime.supervise import Supervisor
from tare.state import failpoints
from tare.state.database import Database, checkpoint, open_boot
from tare.state.operations import Operations
from tare.storage import room
from tare.storage.ballast import Ballast
from tare.storage.checkpoints import Checkpoints
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
    operations: Operations
    store: Store
    watchers: Watchers
    plugins: PluginServer
    runtime: Runtime
    interactive: Interactive
    supervisor: Supervisor
    ballast: Ballast


def networks(config: Config, state: Database, handler: BuiltinHandler) -> Networks:
    """Both kinds: pods of the one that the settings do not name may be there still."""
    return Networks(
        config.network.mode,
        EmbeddedNetworks(state, config.network, config.run),
        CniNetwork(state, config.network, handler.commands, active=config.network.mode == "cni"),
    )


def build(config: Config, cgroups: CgroupManager, observers: Observers) -> Daemon:
    """Everything from the settings; nothing is started and nothing on the node is changed but for the databases."""
    run, root = config.run, config.root
    ballast = Ballast(root)
    refuge = run / "state.db"  # where records go while what lasts cannot be written
    state = Database(root / "state.db", ballast.give_up, refuge)
    boot = open_boot(run / "boot.db", ballast.give_up)
    store, operations = Store(state, boot), Operations(boot, observers.watch)
    compiler = SeccompCompiler(root / "seccomp")
    handler = BuiltinHandler(run, config.runtime, compiler.compile, hierarchies(cgroups))
    logs = Logs(run, handler.start_logger)
    handlers = Handlers(handler, config.runtime, run)
    watchers = Watchers(store, handlers, cgroups, logs)
    network = networks(config, state, handler)
    images = ImageService(state, operations, root, config.images, store.layers, commands=handler.commands)
    front = Front(config.nri, store)
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
        criu=Checkpointer(run, config.runtime.criu, handler.commands, hierarchies(cgroups)),
        checkpoints=Checkpoints(root),
        exits=watchers,
        plugins=front,
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
        operations=operations,
        store=store,
        watchers=watchers,
        plugins=PluginServer(config.nri, run, front, handler.commands, handler),
        runtime=runtime,
        interactive=Interactive(
            parts,
            runtime.execs,
            hangup_seconds=config.streaming.hangup_grace,
            orphan_seconds=config.streaming.orphan_grace,
        ),
        ballast=ballast,
        supervisor=Supervisor(runtime, store, state, probing(runtime), checks_of(images)),
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
        fd = open_lock(directory)
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


def open_lock(directory: Path) -> int:
    """The file to lock. On a file system that has become read-only it is there already, and need not be written. Raises OSError."""
    path = directory / "daemon.lock"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def taken(root: Path, run: Path) -> Iterator[bool]:
    """Whether no daemon has these directories; then none begins to have them within the block. Nothing is made that is not there."""
    with contextlib.ExitStack() as stack:
        free = True
        for directory in (root, run):
            try:
                lock = stack.enter_context((directory / "daemon.lock").open("rb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                free = False
                break
        if not free:
            stack.close()  # what of it we have is not ours to hold up
        yield free


async def begin(daemon: Daemon) -> None:
    """Reach what lives, and make records and the node agree."""
    room.watch(daemon.config.root, daemon.config.run)
    await asyncio.to_thread(daemon.ballast.keep)
    await daemon.handler.connect()
    await daemon.handlers.begin()
    try:
        await daemon.network.setup()
    except TareError as error:
        log.warning("pods cannot be attached to the network: %s", describe(error))
    try:
        await daemon.images.recover()
    except (OSError, ResourceExhausted) as error:  # a disk that takes nothing: what is whole of images can be used
        log.warning("what earlier pulls have left stays: %s", describe(error))
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
            daemon.state.look_after()
            await asyncio.to_thread(daemon.ballast.keep)
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
    await daemon.supervisor.close()
    await daemon.plugins.close()
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


async def run(config: Config, observers: Observers, again: Callable[[], Config]) -> None:
    """Serve until SIGTERM or SIGINT. `again` reads the settings anew."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tare")
    loop.set_default_executor(threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload, config, again)
    cgroups = await choose(config.runtime.cgroup_driver, config.runtime.cgroup_root, config.run)
    daemon = build(config, cgroups, observers)
    manager = daemon.handler.manager = Manager.find(os.environ)
    failpoints.on("kill-launcher", lambda: kill_launcher(daemon.handler))
    failpoints.on("hold", lambda: hold(config.run / "held"))
    chores = [asyncio.ensure_future(maintain(daemon))]
    try:
        await begin(daemon)
        await daemon.plugins.start(daemon.runtime)
        chores.append(asyncio.ensure_future(Retries(daemon.runtime).run()))
        daemon.supervisor.recover()
        audits = auditor(config, daemon.runtime, daemon.network, daemon.images, daemon.state, daemon.operations)
        await audits.recover()
        services = tare_pb2.DESCRIPTOR.services_by_name
        others: list[tuple[ServiceDescriptor, Service]] = [
            (services["Images"], Images(daemon.images, daemon.transfers)),
            (services["Containers"], Containers(daemon.runtime)),
            (services["Networks"], NetworksService(daemon.network, lambda: namespaces(daemon.store))),
            (services["Daemon"], DaemonService(daemon_log)),
            (services["Node"], Node(audits)),
            (services["Supervision"], Supervision(daemon.supervisor)),
        ]
        streaming = stream_server(config, daemon)
        await streaming.start()
        urls = RuntimeUrls(daemon.interactive, streaming)
        told = about(config, daemon)
        server = Server(config.socket, daemon.runtime, daemon.images, told, others, urls, observers.watch)
        await observers.start(sources(daemon, threads), server.lasting)
        await server.start()
        log.info("serving on %s", config.socket)
        manager.say(READY=1)
        chores.append(asyncio.ensure_future(manager.keep_calm(lambda: f"{len(daemon.store.pod_facts)} pods")))
        await stop.wait()
        manager.say(STOPPING=1)
        log.info("stopping; containers go on")
        daemon.store.journal.close()
        await server.stop(STOP_GRACE)
        await streaming.stop()
    finally:
        for chore in chores:
            chore.cancel()
        await observers.stop()
        await end(daemon)
        await observers.close()


def mend(config: Config) -> list[Outcome]:
    """What a daemon does that starts, and then an audit with repair; nobody is served. The directories' locks are the caller's."""
    return asyncio.run(mended(config))


async def mended(config: Config) -> list[Outcome]:
    """As `mend`."""
    observers = Observers(config)
    cgroups = await choose(config.runtime.cgroup_driver, config.runtime.cgroup_root, config.run)
    daemon = build(config, cgroups, observers)
    try:
        await begin(daemon)
        audits = auditor(config, daemon.runtime, daemon.network, daemon.images, daemon.state, daemon.operations)
        return await audits.audit(repair=True)
    finally:
        await end(daemon)


def namespaces(store: Store) -> Mapping[str, str]:
    """Where the network namespaces of pods that run are pinned."""
    ready = (pod.id for pod in store.pods.values() if pod.state is PodState.READY)
    pins = {pod_id: store.pod_facts[pod_id].pins for pod_id in ready if pod_id in store.pod_facts}
    return {pod_id: found["net"] for pod_id, found in pins.items() if "net" in found}


def about(config: Config, daemon: Daemon) -> Mapping[str, Any]:
    """What a verbose Status says of this daemon."""
    return {
        "root": str(config.root),
        "run": str(config.run),
        "cgroups": daemon.cgroups.layout,
        "missingControllers": daemon.cgroups.missing,
        "launch": daemon.handler.outdated or "of this version",
    }


def sources(daemon: Daemon, threads: ThreadPoolExecutor) -> Sources:
    """What metrics tell of the moment."""
    return Sources(
        run=daemon.config.run,
        store=daemon.store,
        operations=daemon.operations,
        handler=daemon.handler,
        images=daemon.images,
        runtime=daemon.runtime,
        threads=threads,
    )


def reload(config: Config, again: Callable[[], Config]) -> None:
    """The log level that the settings have by now holds; what else has changed in them is told. Broken ones change nothing."""
    try:
        found = again()
    except TareError as error:
        log.warning("the settings are not taken: %s", describe(error))
        return
    daemon_log.set_level(found.daemon.log_level)
    changed = [key for key in differences(config, found) if key != "daemon.log_level"]
    rest = f"; a restart is needed for {', '.join(changed)}" if changed else ""
    log.warning("the settings were read again: the log level is %s%s", found.daemon.log_level, rest)


def serve(config: Config, again: Callable[[], Config]) -> None:
    """The daemon's life, in the foreground; `again` reads the settings anew. Raises TareError where it cannot begin."""
    observers = Observers(config)
    daemon_log.set_up(config.daemon.log_level, config.daemon.log_format, observers.trace_ids)
    faulthandler.enable()  # a service manager ends who hangs by SIGABRT: its stacks tell where
    os.umask(0o022)
    with locked(config.root), locked(config.run):
        asyncio.run(run(config, observers, again))
