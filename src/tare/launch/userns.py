"""Steps that make, join and enter a user namespace, map mounts by one, and make a time namespace.

A user namespace is made by a child that lives only until its maps are written from outside: then it is a descriptor, by which
mounts can be mapped before anybody is in it. Entering it comes later, when nothing takes the node's privileges any more;
becoming its root later still: until then a process may open the files of the node's root (cgroup.procs, those in /proc/self).
"""

from __future__ import annotations

import os
import resource

from tare.launch import credentials, linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

    Map = tuple[tuple[int, int, int], ...]  # (first ID inside, first ID outside, how many) each

EPERM, ESRCH, EINVAL, ENOSPC, EOVERFLOW = 1, 3, 22, 28, 75
FILE_SYSTEMS = {
    0x01021994: "tmpfs",
    0x01021997: "9p",
    0x137D: "ext",
    0x4D44: "vfat",
    0x517B: "smb",
    0x5346544E: "ntfs",
    0x58465342: "xfs",
    0x62656572: "sysfs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0x794C7630: "overlay",
    0x9123683E: "btrfs",
    0x9660: "iso9660",
    0x9FA0: "proc",
    0xC36400: "ceph",
    0xEF53: "ext4",
    0xFE534D42: "cifs",
    0xFF534D42: "cifs",
}
"""By what statfs(2) says, for errors."""


def new_user_namespace(machine: Machine, slot: int, uids: Map, gids: Map, main: bool) -> None:
    """One with these maps in the slot. `setgroups` stays allowed in it: the maps are written with the node's privileges.

    `main` is the container's own, whose maps later steps go by; others are for mounts, and where they are the same, that one does.
    """
    if not main and machine.user >= 0 and (uids, gids) == (machine.uids, machine.gids):
        machine.slots[slot] = os.dup(machine.slots[machine.user])
        return
    helper = Dweller(-1)
    try:
        write_maps(machine, helper.entry, uids, gids)
        machine.slots[slot] = os.open(helper.entry + b"/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        helper.end()
    if main:
        machine.user, machine.uids, machine.gids = slot, uids, gids


def write_maps(machine: Machine, entry: bytes, uids: Map, gids: Map) -> None:
    """The maps of the namespace of a process, which is waiting for them; `entry` is its directory in /proc."""
    for name, mapping in ((b"/uid_map", uids), (b"/gid_map", gids)):
        lines = b"".join(b"%d %d %d\n" % line for line in mapping)
        credentials.write_file(machine, entry + name, lines)


def open_user_namespace(machine: Machine, slot: int, path: bytes) -> None:
    """One that exists in the slot, and its maps, which the kernel tells only of a process that is in it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    machine.slots[slot] = fd
    if os.path.samestat(os.fstat(fd), os.stat(b"/proc/self/ns/user")):
        raise OSError(EINVAL, "is the user namespace that Tare is in, not one of a container", os.fsdecode(path))
    helper = Dweller(fd)
    try:
        machine.uids, machine.gids = read_map(helper.entry + b"/uid_map"), read_map(helper.entry + b"/gid_map")
        machine.user = slot
    except OSError as error:
        error.filename = os.fsdecode(path)
        raise
    finally:
        helper.end()


class Dweller:
    """A child that is in a user namespace and does nothing: in a new one, or in that of a descriptor. `entry` is its directory in /proc.

    Raises OSError where it cannot get there.
    """

    def __init__(self, namespace: int) -> None:
        self.told, telling = os.pipe2(os.O_CLOEXEC)
        waiting, self.gate = os.pipe2(os.O_CLOEXEC)
        self.pid, self.pidfd = fork(linux.CLONE_NEWUSER if namespace < 0 else 0)
        if self.pid == 0:
            os.close(self.gate)
            dwell(namespace, telling, waiting)
        os.close(telling)
        os.close(waiting)
        answer = os.read(self.told, 1)
        if answer != b"\0":
            self.end()
            number = answer[0] if answer else ESRCH
            raise OSError(number, os.strerror(number), "setns user")
        self.entry = b"/proc/%d" % pid_in_proc(self.pidfd)

    def end(self) -> None:
        """Let it go."""
        os.close(self.gate)
        os.close(self.told)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def fork(flags: int) -> tuple[int, int]:
    """clone3(2); for want of room for another namespace the kernel has no words of its own."""
    try:
        return linux.clone3(flags)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        words = "there may be no more user namespaces (sysctl user.max_user_namespaces)"
        raise OSError(ENOSPC, words) from error


def dwell(namespace: int, telling: int, waiting: int) -> None:
    """The child's life: it ends with its maker, whatever becomes of that."""
    number = 0
    try:
        if namespace >= 0:
            linux.setns(namespace, linux.CLONE_NEWUSER)
    except OSError as error:
        number = error.errno or EINVAL
    os.write(telling, bytes((number,)))
    if not number:
        os.read(waiting, 1)
    os._exit(0)


def pid_in_proc(pidfd: int) -> int:
    """A process's PID as the mounted /proc counts, which may be of another PID namespace than this process."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        for line in file:
            if line.startswith(b"Pid:"):
                return int(line[4:])
    raise OSError(ESRCH, os.strerror(ESRCH))


def read_map(path: bytes) -> Map:
    """A uid_map or gid_map, as this process's user namespace sees it."""
    with open(path, "rb") as file:
        lines = [tuple(int(word) for word in line.split()) for line in file]
    return tuple((inside, outside, count) for inside, outside, count in lines)


def outside(mapping: Map, number: int) -> int:
    """The node's ID of one in the container. Raises OSError where there is none."""
    for first, node, count in mapping:
        if first <= number < first + count:
            return node + number - first
    raise OSError(EOVERFLOW, f"ID {number} has no mapping in the container's user namespace")


def enter_user_namespace(machine: Machine, slot: int) -> None:
    """From now on this process may do anything in it, and nothing outside. Its IDs are still the node's root's, which are none inside."""
    fd = machine.slots.pop(slot)
    linux.setns(fd, linux.CLONE_NEWUSER, "user")
    os.close(fd)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # what changes credentials sets it to what the sysctl fs.suid_dumpable says


def become_root(machine: Machine) -> None:
    """Root of the user namespace: what is made from now on is owned by that."""
    os.setgroups(())
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)


def new_time_namespace(machine: Machine, offsets: bytes) -> None:
    """For the children of this process: offsets can be written only while nobody is in it."""
    linux.unshare(linux.CLONE_NEWTIME)
    if offsets:
        credentials.write_file(machine, b"/proc/self/timens_offsets", offsets)


def owner_in(pidfd: int, uid: int) -> int:
    """The node's ID of a user of the namespace that a process is in."""
    return outside(read_map(b"/proc/%d/uid_map" % pid_in_proc(pidfd)), uid)


def raise_rlimit(machine: Machine, name: bytes, kind: int, hard: int) -> None:
    """Room for a limit that is higher than this process's: inside nobody may make it, so it is inherited. Where Tare may not, it is a warning."""
    soft, own = resource.getrlimit(kind)
    if own == resource.RLIM_INFINITY or 0 <= hard <= own:
        return
    try:
        resource.setrlimit(kind, (soft, hard))
    except ValueError:
        machine.warnings.append(b"%b of %d is not permitted here, it stays %d" % (name, hard, own))


def own_stream(machine: Machine, slot: int, uid: int) -> None:
    """Give an open FIFO to a user of the container: inside, nobody may."""
    os.fchown(machine.slots[slot], outside(machine.uids, uid), -1)


def own_inherited(machine: Machine, uid: int) -> None:
    """The same of descriptors 0, 1 and 2, where their file system lets them be."""
    credentials.own_streams(machine, outside(machine.uids, uid))


def own_directory(machine: Machine, path: bytes) -> None:
    """Give a writable layer, once, to the container's root. What is below is the container's own work already, or nothing."""
    uid, gid = outside(machine.uids, 0), outside(machine.gids, 0)
    status = os.stat(path)
    if (status.st_uid, status.st_gid) != (uid, gid):
        os.chown(path, uid, gid)


def idmap(machine: Machine, slot: int, by: int, path: bytes, recursive: bool) -> None:
    """Show the owners of a detached mount as the user namespace in the slot `by` maps them."""
    map_mount(machine.slots[slot], machine.slots[by], path, recursive)


def map_mount(tree: int, namespace: int, path: bytes, recursive: bool) -> None:
    """The same of a descriptor. A file system that cannot is an error that names it, never left as it is."""
    flags = linux.AT_EMPTY_PATH | (linux.AT_RECURSIVE if recursive else 0)
    try:
        linux.mount_setattr(tree, b"", flags, attributes=linux.MOUNT_ATTR_IDMAP, userns=namespace)
    except OSError as error:
        kind = linux.filesystem_type(tree)
        name = FILE_SYSTEMS.get(kind, f"of type {kind:#x}")
        where = "or one below it " if recursive else ""
        why = {EINVAL: "cannot be idmapped", EPERM: "may not be idmapped, or is already"}
        words = why.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"the file system ({name}) {where}{words}", os.fsdecode(path)) from error


OPERATIONS: dict[str, Callable[..., None]] = {
    "new_user_namespace": new_user_namespace,
    "open_user_namespace": open_user_namespace,
    "enter_user_namespace": enter_user_namespace,
    "become_root": become_root,
    "new_time_namespace": new_time_namespace,
    "raise_rlimit": raise_rlimit,
    "own_stream": own_stream,
    "own_inherited": own_inherited,
    "own_directory": own_directory,
    "idmap": idmap,
}
