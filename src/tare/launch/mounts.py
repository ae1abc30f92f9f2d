"""Steps that build a container's file system, descriptor to descriptor.

Sources are opened before anything is mounted; targets are found beneath the root by openat2, so that a symbolic link in an
image leads nowhere outside of it; a mount gets its flags while it is detached, so that it is never visible without them.
"""

from __future__ import annotations

import os
import stat

from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

IN_ROOT = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
STRICT = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
NULL_DEVICE, PTMX_DEVICE = os.makedev(1, 3), os.makedev(5, 2)
MAX_LINKS = 40
PROC_MAGIC, PROC_ROOT_INODE = 0x9FA0, 1
HIDDEN = ", or something is mounted over a part of the node's own"
OWNERS = {
    b"proc": "the user namespace does not own the PID namespace" + HIDDEN,
    b"sysfs": "the user namespace does not own the network namespace" + HIDDEN,
    b"mqueue": "the user namespace does not own the IPC namespace",
    b"cgroup": "the user namespace does not own the cgroup namespace",
    b"cgroup2": "the user namespace does not own the cgroup namespace",
}
"""Why a user namespace may not have a file system of these kinds."""
EPERM, ENOENT, ENODEV, ENOTDIR, EINVAL, ELOOP = 1, 2, 19, 20, 22, 40


def open_tree(machine: Machine, slot: int, path: bytes, recursive: bool) -> None:
    """A detached bind mount of a path of the node."""
    flags = linux.OPEN_TREE_CLONE | (linux.AT_RECURSIVE if recursive else 0)
    machine.slots[slot] = linux.open_tree(linux.AT_FDCWD, path, flags)


def make_filesystem(
    machine: Machine, slot: int, kind: bytes, attributes: int, options: tuple[tuple[bytes, bytes | None], ...]
) -> None:
    """A detached mount of a new file system; an option without a value is a flag."""
    try:
        machine.slots[slot] = new_filesystem(kind, attributes, options)
    except OSError as error:
        if error.errno == EPERM and kind in OWNERS and machine.uids:
            words = f"the kernel refuses a new {kind.decode()} here: {OWNERS[kind]}"
            raise OSError(EPERM, words, error.filename) from error
        raise


def make_proc(
    machine: Machine, slot: int, pids: int, attributes: int, options: tuple[tuple[bytes, bytes | None], ...]
) -> None:
    """A new /proc of the PID namespace in the slot `pids`, which this process is not in (Linux 6.17)."""
    machine.slots[slot] = new_filesystem(b"proc", attributes, options, machine.slots[pids])


def shows_other_pids() -> bool:
    """Whether the kernel can do that."""
    context = linux.fsopen(b"proc")
    own = os.open(b"/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.fsconfig(context, linux.FSCONFIG_SET_FD, b"pidns", None, own)
    except OSError as error:
        if error.errno != EINVAL:
            raise
        return False
    finally:
        os.close(own)
        os.close(context)
    return True


def new_filesystem(
    kind: bytes, attributes: int, options: tuple[tuple[bytes, bytes | None], ...], pids: int = -1
) -> int:
    context = linux.fsopen(kind)
    try:
        if pids >= 0:
            linux.fsconfig(context, linux.FSCONFIG_SET_FD, b"pidns", None, pids)
        for key, value in options:
            command = linux.FSCONFIG_SET_FLAG if value is None else linux.FSCONFIG_SET_STRING
            linux.fsconfig(context, command, key, value)
        linux.fsconfig(context, linux.FSCONFIG_CMD_CREATE)
        return linux.fsmount(context, attributes)
    finally:
        os.close(context)


def bind_root(machine: Machine, slot: int, path: bytes, kind: int) -> None:
    """A directory of the node as the root file system. `kind` is MS_SLAVE, to be told of what the node mounts there, or MS_PRIVATE."""
    tree = linux.open_tree(linux.AT_FDCWD, path, linux.OPEN_TREE_CLONE | linux.AT_RECURSIVE)
    if not stat.S_ISDIR(os.fstat(tree).st_mode):
        raise OSError(ENOTDIR, os.strerror(ENOTDIR), os.fsdecode(path))
    linux.mount_setattr(tree, b"", linux.AT_EMPTY_PATH | linux.AT_RECURSIVE, propagation=kind)
    machine.slots[slot] = tree


def propagation(machine: Machine, slot: int, kind: int, recursive: bool) -> None:
    """MS_PRIVATE, MS_SLAVE, MS_SHARED or MS_UNBINDABLE for a detached mount."""
    flags = linux.AT_EMPTY_PATH | (linux.AT_RECURSIVE if recursive else 0)
    linux.mount_setattr(machine.slots[slot], b"", flags, propagation=kind)


def attributes(machine: Machine, slot: int, attrs: int, clear: int, recursive: bool) -> None:
    """MOUNT_ATTR_ flags for a detached mount."""
    flags = linux.AT_EMPTY_PATH | (linux.AT_RECURSIVE if recursive else 0)
    linux.mount_setattr(machine.slots[slot], b"", flags, attributes=attrs, clear=clear)


def isolate(machine: Machine) -> None:
    """First act in the new mount namespace: nothing done here reaches the node."""
    linux.mount_setattr(linux.AT_FDCWD, b"/", linux.AT_RECURSIVE, propagation=linux.MS_SLAVE)


def attach_root(machine: Machine, slot: int, base: bytes) -> None:
    """The root file system takes its place at `base` in this mount namespace, unless `old_overlay` has put it there."""
    if machine.root >= 0:
        return
    tree = machine.slots.pop(slot)
    linux.move_mount(tree, linux.AT_FDCWD, base)
    os.close(tree)
    machine.root = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def attach(machine: Machine, slot: int, target: bytes, strict: bool) -> None:
    """Attach a detached mount at a path beneath the root, which is made if it is absent.

    `strict` paths (/proc and below, /sys, /dev) may not be reached through a symbolic link at all; others lead nowhere into
    the container's /proc, where a mount would put a file in the place of the kernel's answers (CVE-2019-16884, CVE-2019-19921).
    """
    tree = machine.slots.pop(slot)
    try:
        status = os.fstat(tree)
        device, directory = status.st_dev, stat.S_ISDIR(status.st_mode)
        place = find(machine.root, target, directory, strict)
        try:
            status = os.fstat(place)
            if not strict and status.st_dev == machine.proc:
                raise OSError(EPERM, "leads into /proc")
            if os.path.samestat(status, os.fstat(machine.root)):
                raise OSError(EPERM, "leads to the root, which would be hidden")
            if stat.S_ISDIR(status.st_mode) != directory:
                raise OSError(ENOTDIR, "a directory can be mounted on a directory only, a file on a file")
            linux.move_mount(tree, place)
        finally:
            os.close(place)
    except OSError as error:
        error.filename = os.fsdecode(target)
        raise
    finally:
        os.close(tree)
    if target == b"/proc":
        machine.proc = device


def expect_proc(machine: Machine, slot: int) -> None:
    """What is to be bound on /proc must be one: the steps that give orders to the kernel go by it (CVE-2019-16884)."""
    tree = machine.slots[slot]
    if linux.filesystem_type(tree) != PROC_MAGIC or os.fstat(tree).st_ino != PROC_ROOT_INODE:
        raise OSError(EINVAL, "nothing but a proc file system can be mounted on /proc")


def bind_groups(machine: Machine, target: bytes, attrs: int, groups: tuple[tuple[bytes, bytes], ...]) -> None:
    """Cgroups of the container's own, (name, directory) each, bound at names in a new tmpfs of ours, in which nobody else makes anything."""
    folder = linux.openat2(machine.root, target.strip(b"/"), os.O_PATH | os.O_DIRECTORY, IN_ROOT)
    for name, source in groups:
        os.mkdir(name, 0o755, dir_fd=folder)
        tree = linux.open_tree(linux.AT_FDCWD, source, linux.OPEN_TREE_CLONE)
        linux.mount_setattr(tree, b"", linux.AT_EMPTY_PATH, attributes=attrs, propagation=linux.MS_PRIVATE)
        linux.move_mount(tree, folder, name)
        os.close(tree)
    os.close(folder)


def find(root: int, path: bytes, directory: bool, strict: bool = False) -> int:
    """An O_PATH descriptor of a path beneath the root; what is missing of it is made, also where a symbolic link leads to nothing."""
    relative = path.strip(b"/") or b"."
    resolve = STRICT if strict else IN_ROOT
    place = open_or_none(root, relative, os.O_PATH, resolve)
    if place is not None:
        return place
    parent, _, name = relative.rpartition(b"/")
    above = open_or_none(root, parent or b".", os.O_PATH | os.O_DIRECTORY, resolve)
    if above is not None:
        try:
            if name not in (b".", b"..") and make_missing(above, name, directory):
                return linux.openat2(above, name, os.O_PATH | os.O_NOFOLLOW, STRICT)
        finally:
            os.close(above)
    return make_path(root, relative, directory, strict)


def open_or_none(directory: int, path: bytes, flags: int, resolve: int) -> int | None:
    """openat2(2); None where there is nothing at the path."""
    try:
        return linux.openat2(directory, path, flags, resolve)
    except OSError as error:
        if error.errno != ENOENT:
            raise
        return None


def make_path(root: int, path: bytes, directory: bool, strict: bool) -> int:
    """As `find`, where more than the last name is missing: directories of mode 0755, and at the end a directory or an empty file.

    Symbolic links are followed here, by their text, as if the root were /; every open is of a path without any.
    """
    done: list[bytes] = []
    left = path.split(b"/")[::-1]
    links = 0
    while left:
        name = left.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            del done[-1:]
            continue
        link = make_one(root, b"/".join(done), name, directory or bool(left))
        if link is None:
            done.append(name)
            continue
        links += 1
        if strict or links > MAX_LINKS:
            raise OSError(ELOOP, os.strerror(ELOOP), os.fsdecode(path))
        if link.startswith(b"/"):
            done.clear()
        left += link.rstrip(b"/").split(b"/")[::-1]
    return linux.openat2(root, b"/".join(done) or b".", os.O_PATH, STRICT)


def make_one(root: int, above: bytes, name: bytes, directory: bool) -> bytes | None:
    """Have one name in a directory beneath the root: None, or the text of the symbolic link that it is."""
    folder = linux.openat2(root, above or b".", os.O_PATH | os.O_DIRECTORY, STRICT)
    try:
        place = open_or_none(folder, name, os.O_PATH | os.O_NOFOLLOW, STRICT)
        if place is None:
            make_missing(folder, name, directory)
            return None
        try:
            if not stat.S_ISLNK(os.fstat(place).st_mode):
                return None
            refuse_magic(folder, name)
            return os.readlink(b"", dir_fd=place)
        finally:
            os.close(place)
    finally:
        os.close(folder)


def refuse_magic(folder: int, name: bytes) -> None:
    """Raise ELOOP for a symbolic link of /proc that is no text but leads elsewhere. Nothing outside of the folder is looked at."""
    try:
        os.close(linux.openat2(folder, name, os.O_PATH, linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS))
    except OSError as error:
        if error.errno == ELOOP:
            raise


def make_missing(above: int, name: bytes, directory: bool) -> bool:
    """Make a directory or an empty file; False where something is by that name (a symbolic link that leads to nothing)."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=above)
        else:
            os.close(os.open(name, flags, 0o644, dir_fd=above))
    except FileExistsError:
        return False
    return True


def slot_directory(machine: Machine, slot: int, name: bytes, mode: int) -> None:
    """A directory within a detached file system of ours."""
    os.mkdir(name, mode, dir_fd=machine.slots[slot])


def directory(machine: Machine, path: bytes) -> None:
    """Something at a path beneath the root: a directory where nothing was."""
    os.close(find(machine.root, path, True))


def device(machine: Machine, path: bytes, mode: int, major: int, minor: int, uid: int, gid: int) -> None:
    """A device node beneath the root, where nothing is: a mount of the container's own at its path stays (/dev/urandom on /dev/random)."""
    parent, _, name = path.strip(b"/").rpartition(b"/")
    above = find(machine.root, parent, True)
    try:
        os.mknod(name, mode, os.makedev(major, minor), dir_fd=above)
        os.chown(name, uid, gid, dir_fd=above, follow_symlinks=False)
    except FileExistsError:
        return
    finally:
        os.close(above)


def symlink(machine: Machine, path: bytes, target: bytes) -> None:
    """A symbolic link beneath the root, where nothing is by that name."""
    parent, _, name = path.strip(b"/").rpartition(b"/")
    above = find(machine.root, parent, True)
    try:
        os.symlink(target, name, dir_fd=above)
    except FileExistsError:
        return
    finally:
        os.close(above)


def open_null(machine: Machine, slot: int, own: bool) -> None:
    """The null device, verified to be that, for `mask` to bind: the container's own where its /dev is of our making, else the node's."""
    directory, path = (machine.root, b"dev/null") if own else (linux.AT_FDCWD, b"/dev/null")
    machine.slots[slot] = open_device(directory, path, NULL_DEVICE, os.O_PATH)


def open_device(directory: int, path: bytes, number: int, flags: int, resolve: int = 0) -> int:
    """A character device that must have this number, and what is there instead is never opened (CVE-2025-31133), nor used if it comes meanwhile."""
    if not flags & os.O_PATH:
        os.close(open_device(directory, path, number, os.O_PATH, resolve))
    fd = linux.openat2(directory, path, flags | os.O_NOFOLLOW, resolve)
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == number:
        return fd
    os.close(fd)
    name = f"{os.major(number)}:{os.minor(number)}"
    raise OSError(ENODEV, f"is not the device {name}", "/" + os.fsdecode(path).lstrip("/"))


def mask(machine: Machine, null: int, path: bytes, context: bytes = b"") -> None:
    """Hide a path beneath the root: a file behind the null device, a directory behind an empty one; both read-only, also for chmod.

    The context is the SELinux label of the empty directory.
    """
    place = find_protected(machine, path)
    if place is None:
        return
    if stat.S_ISDIR(os.fstat(place).st_mode):
        label = ((b"context", context),) if context else ()
        tree = new_filesystem(b"tmpfs", linux.MOUNT_ATTR_RDONLY, ((b"source", b"tmpfs"), (b"nr_inodes", b"2"), *label))
    else:
        tree = linux.open_tree(machine.slots[null], b"", linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH)
        linux.mount_setattr(tree, b"", linux.AT_EMPTY_PATH, attributes=linux.MOUNT_ATTR_RDONLY)
    linux.move_mount(tree, place)
    os.close(tree)
    os.close(place)


def find_protected(machine: Machine, path: bytes) -> int | None:
    """A path that is to be masked or read-only; None where there is no such thing."""
    try:
        return open_or_none(machine.root, path.strip(b"/"), os.O_PATH, IN_ROOT)
    except NotADirectoryError:
        return None


def readonly_path(machine: Machine, path: bytes) -> None:
    """Bind a path beneath the root onto itself, read-only, with all that is mounted below."""
    place = find_protected(machine, path)
    if place is None:
        return
    recursive = linux.AT_EMPTY_PATH | linux.AT_RECURSIVE
    tree = linux.open_tree(place, b"", linux.OPEN_TREE_CLONE | recursive)
    linux.mount_setattr(tree, b"", recursive, attributes=linux.MOUNT_ATTR_RDONLY)
    linux.move_mount(tree, place)
    os.close(tree)
    os.close(place)


def readonly_root(machine: Machine) -> None:
    """The root file system, without what is mounted below, becomes read-only."""
    linux.mount_setattr(machine.root, b"", linux.AT_EMPTY_PATH, attributes=linux.MOUNT_ATTR_RDONLY)


def readonly_mount(machine: Machine, path: bytes) -> None:
    """A mount of ours, filled by now, becomes read-only."""
    place = linux.openat2(machine.root, path.strip(b"/"), os.O_PATH, STRICT)
    linux.mount_setattr(place, b"", linux.AT_EMPTY_PATH, attributes=linux.MOUNT_ATTR_RDONLY)
    os.close(place)


def pivot(machine: Machine, kind: int, recursive: bool) -> None:
    """Exchange the root: the node's tree is detached from this namespace, whole. `kind` is the new root's propagation, 0 to leave it.

    It comes last: a root that is shared cannot be exchanged, and of one that is unbindable no path can be made read-only.
    """
    old = os.open(b"/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(machine.root)
    linux.pivot_root(b".", b".")
    os.fchdir(old)
    linux.umount(b".", linux.MNT_DETACH)
    os.close(old)
    os.chdir(b"/")
    if kind:
        linux.mount_setattr(linux.AT_FDCWD, b"/", linux.AT_RECURSIVE if recursive else 0, propagation=kind)


def working_directory(machine: Machine, path: bytes) -> None:
    """chdir, with missing parts made, and the check that this is beneath the root (CVE-2024-21626)."""
    enter_directory(find(machine.root, path, True), path)


def enter_directory(place: int, path: bytes) -> None:
    """fchdir; the descriptor is closed. What the kernel says of the new directory must begin with / to be beneath the root."""
    try:
        os.fchdir(place)
    except OSError as error:
        error.filename = os.fsdecode(path)
        raise
    finally:
        os.close(place)
    if not os.getcwdb().startswith(b"/"):
        raise OSError(ENOENT, "is not beneath the container's root", os.fsdecode(path))


OPERATIONS: dict[str, Callable[..., None]] = {
    "open_tree": open_tree,
    "filesystem": make_filesystem,
    "proc": make_proc,
    "bind_root": bind_root,
    "propagation": propagation,
    "attributes": attributes,
    "isolate": isolate,
    "attach_root": attach_root,
    "attach": attach,
    "expect_proc": expect_proc,
    "bind_groups": bind_groups,
    "slot_directory": slot_directory,
    "directory": directory,
    "device": device,
    "symlink": symlink,
    "open_null": open_null,
    "mask": mask,
    "readonly_path": readonly_path,
    "readonly_root": readonly_root,
    "readonly_mount": readonly_mount,
    "pivot": pivot,
    "working_directory": working_directory,
}
