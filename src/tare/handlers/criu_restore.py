"""A container out of CRIU's images: where its process is restored, and how it stands still until it is started.

    child of the launcher: joins the container's cgroups ─► in a mount namespace of its own lays ready what the configuration mounts
        ─► makes a cgroup namespace ─► execs CRIU
    CRIU: restores it over what lies ready (root, bind mounts, FIFOs, the pod's namespaces) ─► "pre-resume"
    daemon: takes CRIU out of the container's freezer, freezes that ─► CRIU lets go of the processes, which stand still, and ends

So nothing of a restore is mounted on the node, whatever is killed; all that is made is in the container's cgroup, by which it is ended; and
the first process, the keeper's child by then, has a marker before it can do anything, so that its end is recorded like any other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import InternalError, InvalidArgument
from tare.handlers import criu_images, labels
from tare.handlers.commands import children
from tare.handlers.compile import join, open_root, overlay
from tare.handlers.criu import FIRST_MORE, Criu, Surroundings
from tare.handlers.criu_dump import NET_KEY, NULL_KEY, PID_KEY
from tare.handlers.failures import StartFailed
from tare.handlers.mounting import Mounts, laid, normal
from tare.handlers.namespaces import Namespaces
from tare.handlers.placing import Hierarchies
from tare.handlers.plans import ROOT, Place
from tare.handlers.processes import Process
from tare.handlers.v1 import criu_pb2 as pb
from tare.launch import linux, tasks

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup
    from tare.launch.plan import Step
    from tare.storage.overlay import Overlay

log = logging.getLogger(__name__)

LOG = "restore.log"
SYSTEM_GROUPS = "/sys/fs/cgroup"
GHOSTS = 1 << 30  # bytes of a file that is open and has no name any more, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """What is to be restored: `images` is CRIU's directory, `work` where it may write; `external` the keys of mounts that are to be given;
    `streams` the keys of stdin, stdout and stderr ("": none that is inherited); `established`: TCP connections go on, else they are closed;
    `objects`: what was in the IPC namespace is put into the pod's."""

    images: Path
    work: Path
    external: tuple[str, ...]
    streams: tuple[str, str, str]
    established: bool = True
    objects: bool = False


class Restorer:
    """Restores containers of one run directory."""

    def __init__(self, run: Path, criu: Criu, hierarchies: Hierarchies) -> None:
        self._run = run
        self._criu = criu
        self._hierarchies = hierarchies

    async def restore(
        self,
        container_id: str,
        spec: Mapping[str, Any],
        what: Restoring,
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        freeze: Callable[[], Awaitable[None]],
        place: Callable[[Process], Awaitable[None]] | None,
    ) -> Process:
        """The container's first process, which stands still with all that is below it: `freeze` has done that. Raises as `Criu.call`, StartFailed."""
        doing = f"restore container {container_id}"
        where = self._place(container_id, cgroup, barrier=place is not None)
        joined = ("ipc",) if what.objects else ()
        options = self._options(spec, what, where, joined)
        own = [kind for kind in ("ipc", "uts") if namespace_paths(spec).get(kind) and kind not in joined]
        try:
            await asyncio.to_thread(criu_images.inherit, what.images, own)
        except OSError as error:
            raise InternalError(doing, cause=error) from error

        first = 0

        async def notify(criu: Process, script: str, pid: int) -> None:
            nonlocal first
            first = pid or first  # which is told only where it is new
            if script == "pre-resume":
                stand_aside(cgroup, criu.pid, first)
                await freeze()

        with contextlib.ExitStack() as stack:
            more = self._inherit(stack, options, spec, what, container_id)
            surroundings = Surroundings(more=more, steps=steps(spec, overlay, where, own), place=place)
            response = await self._criu.call(
                pb.RESTORE,
                options,
                doing,
                images=what.images,
                work=what.work,
                log=LOG,
                where=surroundings,
                notify=notify,
            )
        pid = response.restore.pid
        try:
            process = Process(pid, linux.start_time(pid))
            tasks.mark(str(self._run), process.pid, process.start_time)
        except OSError as error:
            raise StartFailed(doing, step="restore", cause=f"its first process is gone: {error}", errno=0) from error
        return process

    def _options(self, spec: Mapping[str, Any], what: Restoring, where: Place, joined: Sequence[str]) -> pb.Options:
        options = pb.Options(
            root=f"{where.base}/{ROOT}",
            tcp_established=what.established,
            tcp_close=not what.established,
            file_locks=True,
            link_remap=True,
            ext_sharing=True,
            ext_masters=True,
            ghost_limit=GHOSTS,
            notify_scripts=True,
            manage_cgroups_mode=pb.IGNORE,
            network_lock=pb.NFTABLES,
        )
        for key, path in sources(spec, where, what.external).items():
            options.external.append(f"mnt[{key}]:{path}")
        paths = namespace_paths(spec)
        for name in joined:
            options.join_ns.append(pb.JoinNamespace(ns=name, ns_file=paths[name]))
        return options

    def _inherit(
        self,
        stack: contextlib.ExitStack,
        options: pb.Options,
        spec: Mapping[str, Any],
        what: Restoring,
        container_id: str,
    ) -> list[int]:
        """Descriptors that CRIU is to have, named in the options by their numbers there."""
        more: list[int] = []

        def give(key: str, path: str | Path, flags: int) -> None:
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            if flags & os.O_NONBLOCK:
                os.set_blocking(fd, True)
            options.inherit_fd.append(pb.InheritFd(key=key, fd=FIRST_MORE + len(more)))
            more.append(fd)

        paths = namespace_paths(spec)
        for kind, key in (("network", NET_KEY), ("pid", PID_KEY)):
            if paths.get(kind):
                give(key, paths[kind], os.O_RDONLY)
        directory = self._run / "containers" / container_id
        for name, key in zip(("stdin", "stdout", "stderr"), what.streams, strict=True):
            if key:
                # Output is opened for reading too: so no SIGPIPE comes while no logger reads. A writer to stdin may be on its way.
                give(key, directory / name, os.O_RDONLY | os.O_NONBLOCK if name == "stdin" else os.O_RDWR)
        return more

    def _place(self, container_id: str, cgroup: Cgroup, *, barrier: bool) -> Place:
        return Place(
            streams=None,
            base=self._run / "rootfs",
            join=cgroup.join,
            hierarchies=self._hierarchies.v1,
            unified=self._hierarchies.unified,
            groups=self._hierarchies.groups(cgroup),
            directory_v2=cgroup.directory_v2,
            barrier=barrier,
            id=container_id,
        )

    def check(self, spec: Mapping[str, Any], external: Sequence[str], doing: str) -> None:
        """Raise InvalidArgument for mounts of a checkpoint of which the configuration does not say what is to be there."""
        names = dict.fromkeys((*(name for name, _ in self._hierarchies.v1), self._hierarchies.unified), "/")
        groups = {name: path for name, path in names.items() if name}
        anywhere = Place(
            streams=None,
            base=self._run / "rootfs",
            hierarchies=self._hierarchies.v1,
            unified=self._hierarchies.unified,
            groups=groups,
            directory_v2=None if self._hierarchies.v1 else "/",
        )
        known = sources(spec, anywhere, external)
        missing = [key for key in external if key not in known]
        if missing:
            cause = f"the checkpoint has mounts at {', '.join(sorted(missing))}, of which the request says nothing"
            raise InvalidArgument(doing, cause=cause, hint="ask for a mount at each of these paths")


def steps(spec: Mapping[str, Any], root: Overlay, where: Place, own: Sequence[str]) -> list[Step]:
    """What the child walks before it execs CRIU; `own` are the pod's namespaces that are to be CRIU's own."""
    linux_part = spec.get("linux") or {}
    namespaces = Namespaces(spec)
    mounts = Mounts(spec.get("mounts") or (), where, namespaces, staged=True)
    base = os.fsencode(where.base)
    made: list[Step] = [
        *([("barrier", "wait to be placed")] if where.barrier else []),
        ("umask", "set umask", 0),
        *join(where.join),
        *mounts.user_namespaces(),
        *namespaces.open(*own),
        ("unshare", "make a mount namespace", b"mnt"),
        *mounts.open(),
        *open_root(root, linux_part),
        ("stage", "lay mounts ready", base, ROOT),
        *mounts.unions(),
        *mounts.lay(),
        overlay(root, tuple(bytes(path) for path in root.lowers), base + b"/%d" % ROOT),
        ("lay_root", "make the root file system", ROOT),
        *namespaces.enter(*own),
    ]
    if namespaces.is_new("cgroup"):
        made.append(("unshare", "make a cgroup namespace", b"cgroup"))
    return labels.labelled(made, linux_part)


def sources(spec: Mapping[str, Any], where: Place, external: Sequence[str]) -> dict[str, str]:
    """What there is for each key, as CRIU sees it: where it lies ready, or a control group. Keys of which nothing is known are left out."""
    mounts = Mounts(spec.get("mounts") or (), where, Namespaces(spec), staged=True)
    ready = {target: f"{where.base}/{slot}" for slot, target, mount, flags in mounts.mounts if laid(mount, flags)}
    groups = cgroup_sources(where, own="cgroup" in namespace_kinds(spec))
    found: dict[str, str] = {}
    for key in external:
        if key == NULL_KEY:
            found[key] = NULL_KEY
            continue
        path = normal(key)
        above = max(
            (target for target in ready if path == target or path.startswith(f"{target}/")), key=len, default=""
        )
        if above:
            found[key] = ready[above] + path.removeprefix(above)
        elif path in groups:
            found[key] = groups[path]
    return found


def cgroup_sources(where: Place, *, own: bool) -> dict[str, str]:
    """The node's directories of what a container sees of control groups: its own group, or all of them."""
    if not where.hierarchies:
        return {SYSTEM_GROUPS: (where.directory_v2 or SYSTEM_GROUPS) if own else SYSTEM_GROUPS}
    folders = [name for name, _ in where.hierarchies] + [where.unified] * bool(where.unified)
    if not own:
        return {f"{SYSTEM_GROUPS}/{name}": f"{SYSTEM_GROUPS}/{name}" for name in folders}
    return {f"{SYSTEM_GROUPS}/{name}": where.groups[name] for name in folders if name in where.groups}


def namespace_paths(spec: Mapping[str, Any]) -> dict[str, str]:
    """The namespaces that exist, by kind."""
    return {item["type"]: item["path"] for item in spec["linux"]["namespaces"] if item.get("path")}


def namespace_kinds(spec: Mapping[str, Any]) -> frozenset[str]:
    """Those that are not the node's."""
    return frozenset(item["type"] for item in spec["linux"]["namespaces"])


def stand_aside(cgroup: Cgroup, criu: int, first: int) -> None:
    """Move CRIU, and what else there is in the container's group that is not restored, out of what is going to be frozen."""
    folder = os.path.dirname(cgroup.freezer_file) if cgroup.freezer_file else cgroup.directory_v2
    if folder is None or not first:
        cause = "nothing here can freeze its processes" if first else "CRIU does not say which is its first process"
        raise InternalError("restore a container", cause=cause)
    root = folder.removesuffix(cgroup.path)
    restored = {first, *below(first)}
    try:
        target = f"{root}{own_group(root)}/cgroup.procs"
        with open(f"{folder}/cgroup.procs") as members:
            others = [int(word) for word in members.read().split() if int(word) not in restored]
        for pid in dict.fromkeys((criu, *others)):
            with open(target, "w") as procs, contextlib.suppress(ProcessLookupError):
                procs.write(str(pid))
                procs.flush()
    except OSError as error:
        raise InternalError("take CRIU out of the container's control group", cause=error) from error


def own_group(root: str) -> str:
    """This process's group in the hierarchy that is mounted at `root`."""
    name = os.path.basename(root)
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if (not controllers and root == SYSTEM_GROUPS) or name in controllers.split(","):
                return "" if path == "/" else path
    return ""


def below(pid: int) -> Iterator[int]:
    """The processes below one."""
    for child in children(pid):
        yield child
        yield from below(child)
