"""What CRIU's images say of a container before anything of it is restored, and what must not be so. Pure but for reading files.

An image says what it is in 4 bytes, most after 4 more that are common to them; then come messages, each after its length (32 bits, little
endian). Those that matter here:

    inventory.img, ids-*.img    which namespaces there are              core-*.img     who each thread is, and what it may do
    mountpoints-*.img           what is mounted, from where             files.img      open files: pipes and sockets
    pstree.img                  the processes

CRIU does what the images say with all of root's rights: it would mount the node's disk. So what the new container's configuration
does not allow is refused here. What is not looked at (memory, registers, files by path within the container) cannot reach out of it.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tare.errors import InvalidArgument
from tare.handlers.criu_dump import NET_KEY, PID_KEY
from tare.handlers.v1 import criu_pb2 as pb

M = TypeVar("M", bound=Message)
COMMON = b"\x19\x43\x56\x54"
MAGIC = 4
LENGTH = struct.Struct("<I")
MOST_BYTES = 64 << 20  # of one of these images: the largest, files.img, has some hundred bytes for each open file
INVENTORY, TREE = "inventory.img", "pstree.img"
PIPE = 2
TCP, CLOSED, LISTENING = 6, 7, 10
IPV4, IPV6 = 2, 10
FILTERED = 2
READ_ONLY = 1  # MS_RDONLY
OBJECTS = ("shm", "msg", "sem")
KINDS = {"network": "net_ns_id", "ipc": "ipc_ns_id", "uts": "uts_ns_id"}
PROC, SYSFS, TMPFS, DEVPTS, CGROUP, MQUEUE, OVERLAY, CGROUP2 = 1, 2, 5, 6, 12, 14, 17, 23
MADE_ANEW = frozenset({PROC, SYSFS, TMPFS, DEVPTS, MQUEUE})
"""File systems of which there is a new one for each container: they show nothing of the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the images are of.

    `external` are the keys of mounts that are to be given, by mount point; `pipes` the keys of pipes and FIFOs that may be inherited; `local`
    the addresses of this side of established connections; `namespaces` those ("network", "ipc", "uts") that were not the node's. Of all
    threads: which `capabilities` any may have, whether one has no filter (`unfiltered`), may get `privileges`, or is `root`, and the `profiles` of
    AppArmor or SELinux. `objects`: there are some of System V in the IPC namespace.
    """

    external: Mapping[str, str]
    pipes: frozenset[str]
    local: frozenset[str]
    processes: int
    user_namespace: bool = False
    namespaces: frozenset[str] = frozenset()
    external_network: bool = False
    external_pids: bool = False
    readonly_root: bool = False
    capabilities: int = 0
    unfiltered: bool = False
    privileges: bool = False
    objects: bool = False
    root: bool = False
    profiles: frozenset[str] = frozenset()
    mounts: tuple[pb.MountEntry, ...] = field(default=(), repr=False)


def look(directory: Path) -> Found:
    """Read the images in a directory. Raises InvalidArgument for what are none of a container's."""
    try:
        inventory = first(directory / INVENTORY, pb.Inventory)
        tree = list(entries(directory / TREE, pb.TreeEntry))
        if not tree:
            raise broken(directory / TREE, "there are no processes in it")
        ids = first(directory / f"ids-{tree[0].pid}.img", pb.NamespaceIds)
        mounts = all_entries(directory, "mountpoints", pb.MountEntry)
        files = list(entries(directory / "files.img", pb.FileEntry))
        threads = [entry.thread_core for entry in all_entries(directory, "core", pb.CoreEntry)]
        networks = [entry.ext_key for entry in all_entries(directory, "netns", pb.NetEntry)]
        pids = [entry.ext_key for entry in all_entries(directory, "pidns", pb.PidEntry)]
    except OSError as error:
        raise broken(directory, error) from error
    if sum(entry.mountpoint == "/" for entry in mounts) != 1:
        raise broken(directory, "the container has more than one mount namespace, or none of its own")
    node = inventory.root_ids
    return Found(
        external={entry.mountpoint: entry.ext_key for entry in mounts if entry.ext_key},
        pipes=frozenset(pipes(files)),
        local=frozenset(established(files)),
        processes=len(tree),
        user_namespace=ids.user_ns_id != node.user_ns_id,
        namespaces=frozenset(kind for kind, field in KINDS.items() if getattr(ids, field) != getattr(node, field)),
        external_network=networks == [NET_KEY],
        external_pids=PID_KEY in pids,
        readonly_root=any(entry.mountpoint == "/" and entry.flags & READ_ONLY for entry in mounts),
        capabilities=capabilities(threads),
        unfiltered=any(thread.seccomp_mode != FILTERED for thread in threads),
        privileges=any(not thread.creds.no_new_privs for thread in threads),
        root=any(0 in (thread.creds.uid, thread.creds.euid, thread.creds.suid) for thread in threads),
        profiles=frozenset(thread.creds.lsm_profile for thread in threads),
        objects=any(
            path.stat().st_size > 2 * MAGIC for name in OBJECTS for path in directory.glob(f"ipcns-{name}-*.img")
        ),
        mounts=tuple(mounts),
    )


def all_entries(directory: Path, name: str, kind: type[M]) -> list[M]:
    """The messages of all images of one sort (NAME-*.img)."""
    paths = sorted(directory.glob(f"{name}-*.img"))
    return [entry for path in paths for entry in entries(path, kind)]


def entries(path: Path, kind: type[M]) -> Iterator[M]:
    """The messages of an image. Raises OSError, InvalidArgument."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES or len(data) < MAGIC:
        raise broken(path, f"it has {len(data)} bytes")
    offset = 2 * MAGIC if data.startswith(COMMON) else MAGIC
    while offset < len(data):
        if offset + LENGTH.size > len(data):
            raise broken(path, "it ends in the middle")
        (length,) = LENGTH.unpack_from(data, offset)
        offset += LENGTH.size
        if offset + length > len(data):
            raise broken(path, "it ends in the middle")
        try:
            yield kind.FromString(data[offset : offset + length])
        except DecodeError as error:
            raise broken(path, error) from error
        offset += length


def first(path: Path, kind: type[M]) -> M:
    """The only message of an image that has one."""
    for entry in entries(path, kind):
        return entry
    raise broken(path, "it is empty")


def inherit(directory: Path, kinds: Collection[str]) -> None:
    """Have CRIU take these namespaces ("ipc", "uts") for its own, and leave them as they are: a pod's are not one container's to restore.

    The inventory is written anew: it may be a link to one that others have too. Raises OSError, InvalidArgument.
    """
    path = directory / INVENTORY
    inventory = first(path, pb.Inventory)
    tree = first(directory / TREE, pb.TreeEntry)
    ids = first(directory / f"ids-{tree.pid}.img", pb.NamespaceIds)
    for kind in kinds:
        setattr(inventory.root_ids, KINDS[kind], getattr(ids, KINDS[kind]))
    data = inventory.SerializeToString()
    changed = path.with_suffix(".new")
    changed.write_bytes(path.read_bytes()[:MAGIC] + LENGTH.pack(len(data)) + data)
    changed.replace(path)


def broken(path: Path, cause: BaseException | str) -> InvalidArgument:
    """These are no images that could be restored."""
    return InvalidArgument(f"read CRIU's image {path.name}", cause=cause)


def pipes(files: Sequence[pb.FileEntry]) -> Iterator[str]:
    """Keys by which a descriptor can be given in the place of a pipe, or of a FIFO that was named external."""
    for entry in files:
        if entry.type == PIPE:
            yield f"pipe:[{entry.pipe.pipe_id}]"
        elif entry.HasField("reg") and entry.reg.ext:
            yield entry.reg.name


def established(files: Sequence[pb.FileEntry]) -> Iterator[str]:
    """Addresses of this side of TCP connections that are neither closed nor listening."""
    for entry in files:
        socket = entry.isk
        if entry.HasField("isk") and socket.proto == TCP and socket.state not in (CLOSED, LISTENING):
            yield address(socket.family, socket.src_addr)


def address(family: int, words: Sequence[int]) -> str:
    """An address in words of 32 bits as the machine has them in memory; IPv4 within IPv6 as IPv4."""
    packed = b"".join(struct.pack("=I", word) for word in words)
    if family == IPV4 and len(packed) >= 4:
        return str(ipaddress.IPv4Address(packed[:4]))
    if family == IPV6 and len(packed) == 16:
        found = ipaddress.IPv6Address(packed)
        return str(found.ipv4_mapped or found)
    raise InvalidArgument("read CRIU's image files.img", cause=f"a connection of family {family}")


def capabilities(threads: Sequence[pb.ThreadEntry]) -> int:
    """All that any thread may have, or get by a program: a bit each."""
    found = 0
    for thread in threads:
        for words in (thread.creds.cap_bnd, thread.creds.cap_prm, thread.creds.cap_eff):
            for index, word in enumerate(words):
                found |= word << (32 * index)
    return found


def check(
    found: Found, doing: str, *, capabilities: int, filtered: bool, confined: bool, user: int = 0, profile: str = ""
) -> None:
    """Raise InvalidArgument where the images have what the container's configuration does not allow: `capabilities` is its bounding set,
    `filtered` says that it has a seccomp filter, `confined` that it may get no new privileges; `user` is its user, `profile` its AppArmor
    profile or SELinux label."""
    extra = found.capabilities & ~capabilities
    if extra:
        numbers = ", ".join(str(bit) for bit in range(64) if extra >> bit & 1)
        raise InvalidArgument(
            doing, cause=f"a process of the checkpoint has capabilities that it is not to have: {numbers}"
        )
    if filtered and found.unfiltered:
        raise InvalidArgument(doing, cause="a process of the checkpoint has no seccomp filter, and is to have one")
    if confined and found.privileges:
        raise InvalidArgument(doing, cause="a process of the checkpoint may get new privileges, and is to get none")
    if found.user_namespace:
        raise InvalidArgument(doing, cause="the checkpoint has a user namespace, which Tare does not restore")
    for entry in found.mounts:
        if entry.with_plugin or not (entry.ext_key or harmless(entry)):
            cause = f"the checkpoint mounts {entry.fsname or entry.fstype} ({entry.source}) at {entry.mountpoint}"
            raise InvalidArgument(doing, cause=cause)
    if user and found.root:
        raise InvalidArgument(doing, cause=f"a process of the checkpoint is root, and it is to be user {user}")
    if profile and found.profiles != {profile}:
        words = ", ".join(sorted(found.profiles - {profile})) or "nothing"
        raise InvalidArgument(doing, cause=f"it is to be confined by {profile}, and in the checkpoint is by {words}")


def harmless(entry: pb.MountEntry) -> bool:
    """Whether CRIU makes a mount out of nothing of the node's: the root file system, which it is given, or one that is made anew."""
    return entry.mountpoint == "/" or entry.fstype in MADE_ANEW or entry.fstype in (CGROUP, CGROUP2)
