"""From an OCI runtime specification to a launch plan: which primitive steps, in which order. Pure; nothing is opened here.

The order is the design's: cgroup joined → sources opened → namespaces entered → the mount namespace cut off from the node's →
root file system → mounts → devices → masks → pivot → working directory → streams, then (after the gate) limits, credentials, seccomp.
Field names and meanings are those of the OCI runtime specification 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.handlers import options, volumes
from tare.handlers.identity import credentials, foresee, program
from tare.handlers.mounting import Mounts, devices, protect
from tare.handlers.options import encoded
from tare.handlers.plans import ROOT, STDERR, STDIN, STDOUT, Compiled, Filter, Place
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.launch.plan import Plan, Step
    from tare.storage.overlay import Overlay

    Spec = Mapping[str, Any]

__all__ = ["Compiled", "Filter", "Place", "container", "execution"]

NAMESPACE_KINDS = {"network": b"net", "ipc": b"ipc", "uts": b"uts", "cgroup": b"cgroup"}
SUPPORTED_NAMESPACES = frozenset({"mount", "pid", *NAMESPACE_KINDS})
CLONE_FLAGS = {
    "pid": linux.CLONE_NEWPID,
    "network": linux.CLONE_NEWNET,
    "mount": linux.CLONE_NEWNS,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}


def container(spec: Spec, overlay: Overlay, place: Place, seccomp: Filter | None) -> Compiled:
    """The plan of a container's main process. Raises InvalidArgument for what cannot be done, naming the field."""
    linux_part = spec.get("linux", {})
    process = spec["process"]
    namespaces = namespaces_of(linux_part)
    own_groups = place.groups if namespaces.get("cgroup") == "" else {}
    mounts = Mounts(spec.get("mounts", ()), place, own_groups)
    steps: list[Step] = [("hide", "hide"), ("umask", "set umask", 0)]
    steps.append(("oom_score", "set oom_score_adj", int(process.get("oomScoreAdj") or 0)))
    steps += [("join_cgroup", f"join cgroup {path}", encoded(path)) for path in place.join]
    steps += open_namespaces(namespaces)
    steps += open_streams(process, place)
    steps += mounts.open()
    steps += enter_namespaces(namespaces)
    if spec.get("hostname") and namespaces.get("uts") == "":
        steps.append(("hostname", "set the host name", encoded(spec["hostname"])))
    steps.append(("isolate", "cut the mount namespace off"))
    steps += mounts.unions()
    steps += root_file_system(overlay, place)
    steps += volumes.directories(spec.get("directories") or ())
    steps += mounts.attach()
    steps += devices(linux_part, mounts.fresh_dev)
    steps.append(("session", "make a session"))
    if process.get("terminal"):
        size = process.get("consoleSize") or {}
        label = "open a terminal"
        steps.append(("terminal", label, process["user"]["uid"], size.get("height", 0), size.get("width", 0)))
    steps += protect(linux_part, spec.get("root", {}), mounts)
    propagation = options.PROPAGATION.get(linux_part.get("rootfsPropagation", ""), (0, False))[0]
    steps.append(("pivot", "pivot_root", propagation))
    steps.append(("working_directory", "change to the working directory", encoded(process.get("cwd") or "/")))
    if not process.get("terminal"):
        steps.append(("streams", "connect the streams", (STDIN, STDOUT, STDERR), process["user"]["uid"]))
    steps.append(("keyring", "make a session keyring"))
    steps += foresee(process)
    plan = {"steps": steps, "final": credentials(process, seccomp), **program(process)}
    flags = sum(flag for kind, flag in CLONE_FLAGS.items() if kind in namespaces and not namespaces[kind])
    return Compiled(plan=plan, clone_flags=flags, pid_namespace=namespaces.get("pid", ""))


def execution(process: Spec, join: Sequence[str], namespaces: int, seccomp: Filter | None) -> Plan:
    """The plan of a process within a running container. `namespaces` are CLONE_NEW flags of those to enter."""
    before: list[Step] = [
        ("hide", "hide"),
        ("oom_score", "set oom_score_adj", int(process.get("oomScoreAdj") or 0)),
        *(("join_cgroup", f"join cgroup {path}", encoded(path)) for path in join),
    ]
    cwd = encoded(process.get("cwd") or "/")
    steps: list[Step] = [
        ("session", "make a session"),
        ("change_directory", "change to the working directory", cwd),
        ("keyring", "make a session keyring"),
    ]
    final = credentials(process, seccomp)
    user = process["user"]["uid"]
    return {"before": before, "namespaces": namespaces, "uid": user, "steps": steps, "final": final, **program(process)}


def namespaces_of(linux_part: Spec) -> dict[str, str]:
    """Type → path ("" : a new one). Raises InvalidArgument for what would leave the container in one of the node's by mistake."""
    doing = "make a container"
    namespaces: dict[str, str] = {}
    for item in linux_part.get("namespaces") or ():
        kind, path = item["type"], item.get("path") or ""
        if kind not in SUPPORTED_NAMESPACES or kind in namespaces:
            raise InvalidArgument(doing, cause=f"linux.namespaces has {kind!r}, which is unknown or there twice")
        namespaces[kind] = path
    if namespaces.get("mount") != "":
        raise InvalidArgument(doing, cause="linux.namespaces has no new mount namespace")
    return namespaces


def open_namespaces(namespaces: Mapping[str, str]) -> list[Step]:
    """Files of namespaces that exist, in slots 8 to 15. The PID namespace is the launcher's business."""
    return [
        ("open_namespace", f"open {kind} namespace {path}", 8 + index, encoded(path))
        for index, (kind, path) in enumerate(joined(namespaces))
    ]


def joined(namespaces: Mapping[str, str]) -> list[tuple[str, str]]:
    """Namespaces to enter by path."""
    order = ("network", "ipc", "uts", "cgroup")
    return [(kind, namespaces[kind]) for kind in order if namespaces.get(kind)]


def enter_namespaces(namespaces: Mapping[str, str]) -> list[Step]:
    """setns into what exists; a new cgroup namespace only now, when the cgroup has been joined."""
    steps: list[Step] = [
        ("enter", f"enter {kind} namespace", 8 + index, NAMESPACE_KINDS[kind])
        for index, (kind, _) in enumerate(joined(namespaces))
    ]
    if namespaces.get("cgroup") == "":
        steps.append(("unshare", "make a cgroup namespace", b"cgroup"))
    return steps


def open_streams(process: Spec, place: Place) -> list[Step]:
    """The container's ends of its FIFOs. Output is opened for reading too: so no SIGPIPE comes while no logger reads.

    `stdin` is Tare's own field: whether there is such a FIFO. Without one the container's own /dev/null is opened later.
    """
    if process.get("terminal"):
        return []
    stdin = [("open_stream", "open stdin", STDIN, os.fsencode(place.streams / "stdin"), os.O_RDONLY)]
    return [
        *(stdin if process.get("stdin") else []),
        ("open_stream", "open stdout", STDOUT, os.fsencode(place.streams / "stdout"), os.O_RDWR),
        ("open_stream", "open stderr", STDERR, os.fsencode(place.streams / "stderr"), os.O_RDWR),
    ]


def root_file_system(overlay: Overlay, place: Place) -> list[Step]:
    """The overlay of an image's layers under the container's writable directory."""
    lowers = tuple(bytes(path) for path in overlay.lowers)
    upper, work = bytes(overlay.upper), bytes(overlay.work)
    return [
        ("overlay", "make the root file system", ROOT, lowers, upper, work, bytes(place.base)),
        ("attach_root", "mount the root file system", ROOT, bytes(place.base)),
    ]
