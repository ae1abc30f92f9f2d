"""The `mounts` of a container's OCI configuration, in the order in which they are made (pure).

First the file systems that every container has, then the pod's files and the request's mounts, parents before what lies in
them. A mount of the request takes the place of a default one at the same path, and one on /dev of all that lies in it.

Sources: CRI Mount; OCI runtime-spec, config.md, "Mounts", and config-linux.md, "Default Filesystems".
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from tare.errors import InvalidArgument
from tare.handlers.options import CLEARS, SETS
from tare.runtime.records import (
    ContainerConfig,
    IdMapping,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    Propagation,
    UserNamespace,
)
from tare.runtime.spec_types import PodSurroundings

OciMount = dict[str, Any]

DEFAULT_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
"""What a container may not see, where nobody else says it (a kubelet sends its own list)."""

DEFAULT_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""What a container may not change, likewise."""

PROPAGATIONS = {
    Propagation.PRIVATE: "rprivate",
    Propagation.HOST_TO_CONTAINER: "rslave",
    Propagation.BIDIRECTIONAL: "rshared",
}


TERMINALS_GROUP = 5
"""Whose terminals are, by the convention of Linux distributions (tty)."""


def mounts(
    container: ContainerConfig,
    surroundings: PodSurroundings,
    pod: NamespaceOptions,
    volumes: Mapping[str, str] | None = None,
) -> list[OciMount]:
    """All mounts in order. `volumes` are the options that name image volumes' layers, by container path. Raises InvalidArgument."""
    volumes = volumes or {}
    wanted = [request_mount(mount, volumes.get(mount.container_path, ""), pod.mapped) for mount in container.mounts]
    taken = {mount["destination"] for mount in wanted}
    first = [*base(pod, privileged=container.security.privileged), shared_memory(surroundings, pod.ipc)]
    first = [mount for mount in first if not replaced(mount["destination"], taken)]
    readonly = container.security.readonly_rootfs
    files = [mount for mount in pod_files(surroundings, readonly=readonly) if mount["destination"] not in taken]
    return first + sorted(files + wanted, key=lambda mount: depth(mount["destination"]))


def replaced(destination: str, taken: set[str]) -> bool:
    """Whether a default mount gives way to the request's."""
    return destination in taken or ("/dev" in taken and destination.startswith("/dev/"))


def depth(path: str) -> int:
    """How many names a path has: the fewer, the earlier it is mounted."""
    return len([name for name in path.split("/") if name])


def base(pod: NamespaceOptions, *, privileged: bool) -> list[OciMount]:
    """The kernel's own file systems. /sys and the control groups can be written to by a privileged container alone.

    In a user namespace the kernel mounts those alone that belong to namespaces which it owns: with the node's network, /sys is
    the node's, read-only with all that is mounted in it; with the node's IPC namespace there is no view of message queues.
    """
    access = "rw" if privileged else "ro"
    closed = ["nosuid", "noexec", "nodev"]
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    if pod.mapped is None or pod.mapped.gids[0].length > TERMINALS_GROUP:
        terminals.append(f"gid={TERMINALS_GROUP}")
    found = [
        special("/proc", "proc", "proc", closed),
        special("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        special("/dev/pts", "devpts", "devpts", terminals),
    ]
    if pod.mapped is None or pod.ipc is not NamespaceMode.NODE:
        found.append(special("/dev/mqueue", "mqueue", "mqueue", closed))
    if pod.mapped is None or pod.network is not NamespaceMode.NODE:
        found.append(special("/sys", "sysfs", "sysfs", [*closed, access]))
    else:
        found.append(bind("/sys", "/sys", ["rprivate", "rnosuid", "rnoexec", "rnodev", "rro"]))
    found.append(special("/sys/fs/cgroup", "cgroup", "cgroup", [*closed, "relatime", access]))
    return found


def special(destination: str, kind: str, source: str, options: list[str]) -> OciMount:
    """A file system that is no bind."""
    return {"destination": destination, "type": kind, "source": source, "options": options}


def bind(destination: str, source: str, options: list[str]) -> OciMount:
    """A part of the node's tree."""
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def shared_memory(surroundings: PodSurroundings, ipc: NamespaceMode) -> OciMount:
    """/dev/shm belongs to the IPC namespace: the pod's, or the node's."""
    source = "/dev/shm" if ipc is NamespaceMode.NODE else str(surroundings.directory / "shm")
    return bind("/dev/shm", source, ["rprivate", "rw", "nosuid", "nodev", "noexec"])


def pod_files(surroundings: PodSurroundings, *, readonly: bool) -> list[OciMount]:
    """hosts, hostname and resolv.conf, which all containers of a pod share."""
    access = "ro" if readonly else "rw"
    names = ("hosts", "hostname", "resolv.conf")
    return [bind(f"/etc/{name}", str(surroundings.directory / name), ["rprivate", access]) for name in names]


def request_mount(mount: Mount, layers: str = "", user: UserNamespace | None = None) -> OciMount:
    """One mount of the request; `layers` is the option of an image volume's, `user` the pod's user namespace.

    Raises InvalidArgument for what CRI does not allow.
    One with mappings is mapped with all that is mounted in it: a file system that cannot be is an error, never there unmapped.
    """
    doing = f"mount {mount.container_path!r}"
    destination = clean(doing, mount.container_path, "container_path")
    if mount.image is not None:
        return image_mount(mount, destination, user, layers)
    source = clean(doing, mount.host_path, "host_path")
    options = [PROPAGATIONS[mount.propagation], "ro" if mount.readonly else "rw"]
    if mount.recursive_read_only:
        if not mount.readonly:
            raise InvalidArgument(doing, cause="recursive_read_only is set without readonly")
        if mount.propagation is not Propagation.PRIVATE:
            raise InvalidArgument(doing, cause="recursive_read_only is set with a propagation other than private")
        options.append("rro")
    result = bind(destination, source, options + checked(doing, mount.options))
    if mount.uid_mappings or mount.gid_mappings:
        result["options"].append("ridmap")
        result |= id_mappings(mount.uid_mappings, mount.gid_mappings)
    return result


def image_mount(mount: Mount, destination: str, user: UserNamespace | None, layers: str) -> OciMount:
    """The layers of an image, read-only whatever else is asked for. Devices in an image are of no use to who mounts it.

    Its owners are the image's own, as those of the container's root are, which the handler sees to; other mappings are refused.
    """
    doing = f"mount {mount.container_path!r}"
    if not layers:
        raise InvalidArgument(doing, cause="nothing is known of the image")
    own = (user.uids, user.gids) if user is not None else ((), ())
    if (mount.uid_mappings or mount.gid_mappings) and (mount.uid_mappings, mount.gid_mappings) != own:
        raise InvalidArgument(
            doing, cause="an image can be mounted with the mappings of the pod's user namespace alone"
        )
    options = ["nodev", *checked(doing, mount.options), "ro", layers]
    result: OciMount = {"destination": destination, "type": "overlay", "source": "overlay", "options": options}
    if mount.image_sub_path:
        result["subPath"] = mount.image_sub_path
    return result


def clean(doing: str, path: str, field: str) -> str:
    """An absolute path without dots. Raises InvalidArgument."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(doing, cause=f"{field} {path!r} is not an absolute path")
    cleaned = posixpath.normpath("/" + path.lstrip("/"))
    if cleaned == "/" and field == "container_path":
        raise InvalidArgument(doing, cause="a mount on / would hide the whole container")
    return cleaned


def checked(doing: str, options: Sequence[str]) -> list[str]:
    """The request's mount options: flags alone, each also with an r before it for the mounts below."""
    for option in options:
        if option not in SETS and option not in CLEARS and (option[:1] != "r" or option[1:] not in SETS | CLEARS):
            raise InvalidArgument(doing, cause=f"{option!r} is not an option of a bind mount")
    return list(options)


def id_mappings(uids: Sequence[IdMapping], gids: Sequence[IdMapping]) -> dict[str, Any]:
    """uidMappings and gidMappings, as a mount and `linux` have them: lists of LinuxIDMapping."""
    return {"uidMappings": [mapping(item) for item in uids], "gidMappings": [mapping(item) for item in gids]}


def mapping(item: IdMapping) -> dict[str, int]:
    """LinuxIDMapping."""
    return {"containerID": item.container_id, "hostID": item.host_id, "size": item.length}


def rootfs_propagation(wanted: Sequence[OciMount]) -> str:
    """What the root has to be for a mount's propagation to be possible; "" for private."""
    options = {option for mount in wanted for option in mount["options"]}
    return "rshared" if "rshared" in options else "rslave" if "rslave" in options else ""


def namespaces_of(modes: Mapping[str, str]) -> list[dict[str, str]]:
    """OCI's list from type → path ("" : a new one)."""
    return [{"type": kind, "path": path} if path else {"type": kind} for kind, path in modes.items()]
