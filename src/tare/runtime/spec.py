"""A container as the OCI runtime specification 1.2 describes it, from CRI's request, its image, its pod (pure).

    spec_process   command, environment, user, capabilities       users     who the user is
    spec_mounts    mounts                                         devices   the node's devices (I/O)
    spec           the rest, and all of it together               signals   which signal stops it

What names something of the node (sources, devices, pinned namespaces) is taken as it is: nothing is looked at here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tare.errors import InternalError, InvalidArgument
from tare.runtime.labels import Labels
from tare.runtime.records import (
    ContainerConfig,
    NamespaceMode,
    NamespaceOptions,
    PodConfig,
    Resources,
    User,
    UserNamespace,
)
from tare.runtime.spec_mounts import (
    DEFAULT_MASKED_PATHS,
    DEFAULT_READONLY_PATHS,
    id_mappings,
    mounts,
    namespaces_of,
    rootfs_propagation,
)
from tare.runtime.spec_process import ALL_CAPABILITIES, DEFAULT_CAPABILITIES, check_text, process
from tare.runtime.spec_types import DeviceNode, ImageSettings, PodSurroundings, Spec

__all__ = [
    "ALL_CAPABILITIES",
    "DEFAULT_CAPABILITIES",
    "DEFAULT_MASKED_PATHS",
    "DEFAULT_READONLY_PATHS",
    "DeviceNode",
    "ImageSettings",
    "PodSurroundings",
    "Spec",
    "container_spec",
    "exec_process",
    "resources",
]

VERSION = "1.2.0"
NO_LABELS = Labels()

DEFAULT_DEVICE_RULES = (
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 136, None, "rwm"),
)
"""What every container may use: null, zero, full, random, urandom, tty, console, ptmx, terminals. Nodes may be made of any device, but not opened."""


def container_spec(
    *,
    pod: PodConfig,
    surroundings: PodSurroundings,
    container: ContainerConfig,
    image: ImageSettings,
    user: User,
    home: str,
    cgroup_path: str,
    rootfs: Path,
    devices: Sequence[DeviceNode] = (),
    seccomp: Mapping[str, Any] | None = None,
    target_pid: int | None = None,
    annotations: Mapping[str, str] | None = None,
    volumes: Mapping[str, str] | None = None,
    apparmor: str = "",
    labels: Labels = NO_LABELS,
) -> Spec:
    """The whole configuration, with a field of Tare's own: `directories` are to be there, made in the writable layer if need be.

    `devices` are those asked for (a privileged container's: all of the node's), `rootfs` is root.path, `target_pid` the
    main process of the container that TARGET names, `volumes` mount options of image volumes by container path, `apparmor` and
    `labels` what the process is confined by. Raises InvalidArgument.
    """
    security = container.security
    shared = pod.security.namespaces
    check_security(pod, container, user)
    wanted = mounts(container, surroundings, shared, volumes)
    modes = namespaces(shared, security.namespaces or shared, surroundings.pins, target_pid, security.privileged)
    linux: dict[str, Any] = {
        "namespaces": namespaces_of(modes),
        **(id_mappings(shared.mapped.uids, shared.mapped.gids) if shared.mapped is not None else {}),
        "cgroupsPath": cgroup_path,
        "resources": resources(container.resources, devices, privileged=security.privileged),
        "devices": [device(node) for node in devices],
        "maskedPaths": [] if security.privileged else list(security.masked_paths),
        "readonlyPaths": [] if security.privileged else list(security.readonly_paths),
    }
    given = {"rootfsPropagation": rootfs_propagation(wanted), "mountLabel": labels.mount}
    linux |= {key: value for key, value in given.items() if value}
    if seccomp is not None and not security.privileged:
        linux["seccomp"] = dict(seccomp)
    confined = {"apparmorProfile": apparmor, "selinuxLabel": labels.process}
    return {
        "ociVersion": VERSION,
        "root": {"path": str(rootfs), "readonly": security.readonly_rootfs},
        "process": process(container, image, user, home, surroundings.hostname)
        | {key: value for key, value in confined.items() if value},
        "mounts": wanted,
        "directories": declared(image, wanted),
        "annotations": dict(annotations or {}),
        "linux": linux,
    }


def declared(image: ImageSettings, mounts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The directories that the image's configuration names as volumes, but for those that are mounted upon."""
    taken = {mount["destination"] for mount in mounts}
    paths = dict.fromkeys(posixpath.normpath("/" + path.lstrip("/")) for path in image.volumes if "\0" not in path)
    return [path for path in paths if path != "/" and path not in taken]


def check_security(pod: PodConfig, container: ContainerConfig, user: User) -> None:
    """What a container may ask for in its pod: privileges where the pod has been announced as having them, the pod's user namespace, and
    IDs that this one maps. Raises InvalidArgument."""
    doing = f"make container {container.metadata.name}"
    security, shared = container.security, pod.security.namespaces
    if security.privileged and not pod.security.privileged:
        raise InvalidArgument(doing, cause="it is privileged, and its pod is not", hint="set privileged of the pod too")
    own = security.namespaces
    if own is not None and own.user is not None and own.mapped != shared.mapped:
        raise InvalidArgument(doing, cause="its user namespace is not its pod's", hint="ask for that one, or for none")
    if shared.mapped is not None:
        check_mapped(doing, user, shared.mapped)


def check_mapped(doing: str, user: User, namespace: UserNamespace) -> None:
    """Raise InvalidArgument for an ID that is nobody's in the user namespace."""
    asked = [("user", user.uid, namespace.uids), *(("group", gid, namespace.gids) for gid in (user.gid, *user.groups))]
    for what, number, mappings in asked:
        if not any(0 <= number - item.container_id < item.length for item in mappings):
            raise InvalidArgument(doing, cause=f"{what} {number} is not mapped in the pod's user namespace")


def namespaces(
    pod: NamespaceOptions,
    container: NamespaceOptions,
    pins: Mapping[str, Path],
    target_pid: int | None,
    privileged: bool,
) -> dict[str, str]:
    """OCI namespace type → path; "" for a new one, absent for the node's.

    Network and IPC are the pod's, whatever a container says; the UTS namespace is there if the pod has one of its own.
    The control groups' is new, except where all of them are to be seen (privileged); in a user namespace the kernel shows no other.
    """
    modes = {"mount": ""}
    if pod.mapped is not None:
        modes["user"] = pinned(pins, "user")
    if pod.network is not NamespaceMode.NODE:
        modes["network"] = pinned(pins, "net")
    if pod.ipc is not NamespaceMode.NODE:
        modes["ipc"] = pinned(pins, "ipc")
    if "uts" in pins:
        modes["uts"] = str(pins["uts"])
    mode = container.pid
    if mode is NamespaceMode.POD and "pid" not in pins:
        mode = pod.pid
    if mode is NamespaceMode.CONTAINER:
        modes["pid"] = ""
    elif mode is NamespaceMode.POD:
        modes["pid"] = pinned(pins, "pid")
    elif mode is NamespaceMode.TARGET:
        if target_pid is None:
            cause = f"container {container.target_id or '(none)'} does not run"
            raise InvalidArgument("share a container's PID namespace", cause=cause)
        modes["pid"] = f"/proc/{target_pid}/ns/pid"
    elif pod.mapped is not None:
        cause = "it asks for the node's PID namespace, of which a user namespace has no /proc"
        raise InvalidArgument("describe the container", cause=cause)
    if not privileged or pod.mapped is not None:
        modes["cgroup"] = ""
    return modes


def pinned(pins: Mapping[str, Path], kind: str) -> str:
    """The pod's own namespace, which must have been made."""
    if kind not in pins:
        raise InternalError("describe the container", cause=f"the pod has no {kind} namespace of its own")
    return str(pins[kind])


def resources(wanted: Resources, devices: Sequence[DeviceNode] = (), *, privileged: bool = False) -> dict[str, Any]:
    """`linux.resources`. Where no swap limit is set, a memory limit is one on memory and swap together, as the kubelet expects."""
    memory = {"limit": wanted.memory_limit, "swap": wanted.memory_swap_limit or max(wanted.memory_limit, 0)}
    cpu = {
        "shares": wanted.cpu_shares,
        "quota": wanted.cpu_quota,
        "period": wanted.cpu_period,
        "cpus": wanted.cpuset_cpus,
        "mems": wanted.cpuset_mems,
    }
    result: dict[str, Any] = {
        "devices": device_rules(devices, privileged=privileged),
        "memory": {key: value for key, value in memory.items() if value},
        "cpu": {key: value for key, value in cpu.items() if value},
        "hugepageLimits": [{"pageSize": item.page_size, "limit": item.limit} for item in wanted.hugepage_limits],
        "unified": dict(wanted.unified),
    }
    for path, number in wanted.more.items():
        section, _, name = path.partition(".")
        result.setdefault(section, {})[name] = number
    return {key: value for key, value in result.items() if value}


def device_rules(devices: Sequence[DeviceNode], *, privileged: bool) -> list[dict[str, Any]]:
    """The device cgroup's rules: all is allowed, or nothing but the defaults and what was asked for."""
    if privileged:
        return [{"allow": True, "access": "rwm"}]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    asked = [(node.kind, node.major, node.minor, node.access) for node in devices]
    for kind, major, minor, access in (*DEFAULT_DEVICE_RULES, *asked):
        numbers = {"major": major, "minor": minor}
        given = {key: number for key, number in numbers.items() if number is not None}
        rules.append({"allow": True, "type": kind, **given, "access": access})
    return rules


def device(node: DeviceNode) -> dict[str, Any]:
    """LinuxDevice."""
    return {
        "path": node.path,
        "type": node.kind,
        "major": node.major,
        "minor": node.minor,
        "fileMode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
    }


def exec_process(spec: Spec, argv: Sequence[str], *, tty: bool) -> dict[str, Any]:
    """OCI `process` of a further process in a container: its user, environment, directory, rights; "seccomp" is the container's filter.

    Raises InvalidArgument for an empty command.
    """
    if not argv or not argv[0]:
        raise InvalidArgument("exec in the container", cause="no command")
    for word in argv:
        check_text("exec in the container", word)
    own: dict[str, Any] = spec["process"]
    result = {**own, "args": list(argv), "terminal": tty, "stdin": False}
    names = {entry.partition("=")[0] for entry in own["env"]}
    if tty and "TERM" not in names:
        result["env"] = [*own["env"], "TERM=xterm"]
    if "seccomp" in spec["linux"]:
        result["seccomp"] = spec["linux"]["seccomp"]
    return result
