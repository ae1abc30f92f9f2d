"""What CRIU is told of a container that it is to dump: all that reaches out of it, each thing by a key under which a restore gives another.

    a mount that is bound             mnt[/run/secrets]:/var/run/secrets   its key is the destination in the configuration; what the source has
                                      mnt[/data/sub]:/data/sub             mounted below has its place as the key
    a control group                   mnt[/sys/fs/cgroup/cpu]:/sys/fs/cgroup/cpu
    a masked file                     mnt[/proc/kcore]:/dev/null
    its FIFOs                         file[MOUNT:INODE], hexadecimal
    a network or PID namespace        net[INODE]:extRootNetNS, pid[INODE]:extRootPidNS, as other runtimes call them

Which FIFO is which of the streams is said in `descriptors.json`, a list of three keys beside the images, as other runtimes write it too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tare.errors import FailedPrecondition
from tare.launch import linux
from tare.launch.mounts import IN_ROOT

NET_KEY, PID_KEY = "extRootNetNS", "extRootPidNS"
NULL_KEY = "/dev/null"
STREAMS = ("stdin", "stdout", "stderr")
DESCRIPTORS = "descriptors.json"
CGROUPS = frozenset({"cgroup", "cgroup2"})
MADE_ANEW = frozenset({"proc", "sysfs", "tmpfs", "devpts", "mqueue"})
NULL_DEVICE = os.makedev(1, 3)
ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MountLine:
    """A line of mountinfo (proc(5))."""

    id: int
    parent: int
    device: str
    root: str
    point: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What reaches out of a container: CRIU's `external`, and the keys of its streams ("" for one that is none of its FIFOs)."""

    external: tuple[str, ...]
    streams: tuple[str, str, str]


def look(pid: int, others: Sequence[int], spec: Mapping[str, Any], fifos: Path) -> Outside:
    """Of the container with this main process; `others` are its processes, `fifos` the directory of its streams. Blocks.

    Raises FailedPrecondition for what cannot be dumped, OSError where the processes are gone.
    """
    streams = stream_keys(others, fifos)
    external = [*mounts(pid, spec), *(key for keys in streams.values() for key in keys), *namespaces(pid, spec)]
    for name, keys in streams.items():
        if len(keys) > 1:
            raise FailedPrecondition(
                "look for what reaches out of the container", cause=f"{name} is open by way of {len(keys)} mounts"
            )
    stdin, stdout, stderr = (next(iter(streams[name]), "") for name in STREAMS)
    return Outside(external=tuple(external), streams=(stdin, stdout, stderr))


def namespaces(pid: int, spec: Mapping[str, Any]) -> Iterator[str]:
    """Those that the container shares with its pod. IPC and UTS namespaces are dumped, and joined by a restore."""
    paths = {item["type"]: item.get("path") for item in spec["linux"]["namespaces"]}
    for kind, name, key in (("network", "net", NET_KEY), ("pid", "pid", PID_KEY)):
        if paths.get(kind):
            yield f"{name}[{os.stat(f'/proc/{pid}/ns/{name}').st_ino}]:{key}"


def mounts(pid: int, spec: Mapping[str, Any]) -> Iterator[str]:
    """The mounts that are to be given to a restore."""
    lines = read_mounts(Path(f"/proc/{pid}/mountinfo"))
    devices = {line.device for line in read_mounts(Path("/proc/self/mountinfo"))}
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        bound = {
            mount_at(root, mount["destination"]): mount["destination"] for mount in spec["mounts"] if is_bound(mount)
        }
        keys: dict[int, str] = {}
        points = {line.id: line.point for line in lines}
        for line in sorted(lines, key=lambda line: line.point.count("/") if line.point != "/" else 0):
            key = key_of(line, bound, keys, points, devices, root)
            if key is not None:
                keys[line.id] = key
                yield f"mnt[{line.point}]:{key}"
    finally:
        os.close(root)


def key_of(
    line: MountLine,
    bound: Mapping[int, str],
    keys: Mapping[int, str],
    points: Mapping[int, str],
    devices: set[str],
    root: int,
) -> str | None:
    """A mount's key; None where CRIU makes it anew."""
    if line.point == "/":
        return None
    if line.id in bound:
        return bound[line.id]
    if keys.get(line.parent, NULL_KEY) != NULL_KEY:
        return keys[line.parent] + line.point.removeprefix(points[line.parent])
    if line.kind in CGROUPS:
        return line.point
    if line.kind in MADE_ANEW and (line.device not in devices or line.kind != "tmpfs"):
        return None
    return NULL_KEY if is_null(root, line.point) else line.point


def is_bound(mount: Mapping[str, Any]) -> bool:
    """Whether a mount of the configuration shows something that is there already."""
    options = mount.get("options") or ()
    return mount.get("type") == "overlay" or mount.get("type") == "bind" or "bind" in options or "rbind" in options


def mount_at(root: int, path: str) -> int:
    """The ID of the mount at a path in the container, symbolic links followed within; −1 where nothing is."""
    try:
        place = linux.openat2(root, os.fsencode(path.strip("/") or "."), os.O_PATH, IN_ROOT)
    except OSError:
        return -1
    try:
        return mount_id(Path(f"/proc/self/fdinfo/{place}"))
    finally:
        os.close(place)


def is_null(root: int, path: str) -> bool:
    """Whether the null device is at a path in the container."""
    try:
        place = linux.openat2(root, os.fsencode(path.strip("/")), os.O_PATH, IN_ROOT)
    except OSError:
        return False
    try:
        status = os.fstat(place)
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == NULL_DEVICE
    finally:
        os.close(place)


def mount_id(path: Path) -> int:
    """The mount that an open file is on, by its fdinfo."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return int(value)
    return -1


def read_mounts(path: Path) -> list[MountLine]:
    """The lines of a mountinfo."""
    found = []
    for text in path.read_text(errors="surrogateescape").splitlines():
        before, _, after = text.partition(" - ")
        words = before.split(" ")
        found.append(
            MountLine(
                id=int(words[0]),
                parent=int(words[1]),
                device=words[2],
                root=unescaped(words[3]),
                point=unescaped(words[4]),
                kind=after.split(" ")[0],
            )
        )
    return found


def unescaped(text: str) -> str:
    """A path as it is, out of mountinfo."""
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    return text


def stream_keys(processes: Sequence[int], fifos: Path) -> dict[str, set[str]]:
    """By which keys the container's FIFOs are open in its processes."""
    inodes = {}
    for name in STREAMS:
        try:
            status = os.stat(fifos / name)
        except FileNotFoundError:
            continue
        inodes[status.st_dev, status.st_ino] = name
    found: dict[str, set[str]] = {name: set() for name in STREAMS}
    for pid in processes:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                status = os.stat(f"/proc/{pid}/fd/{number}")
                stream = inodes.get((status.st_dev, status.st_ino))
                if stream is not None:
                    mount = mount_id(Path(f"/proc/{pid}/fdinfo/{number}"))
                    found[stream].add(f"file[{mount:x}:{status.st_ino:x}]")
            except FileNotFoundError:
                continue
    return found
