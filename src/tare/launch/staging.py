"""Steps that lay a container's mounts ready before its user namespace is entered: what takes the node's privileges is done by then.

    in between, in a mount namespace of the node's user namespace        child, in its own mount namespace, a copy of that
      tmpfs at the mount point that the root is going to have              cwd is the tmpfs
        N     a bind mount, an image volume, the root (its slot's number)  take N: a bind mount of it, in the slot again
        lN    a layer, idmapped, for overlayfs to take                     …      then as ever: attached beneath the root
        dN    a device node, owned as it is to be inside
        at    a place to borrow

A mount namespace that is copied into another user namespace is locked: no flag that a mount has by then (ro, nosuid, nodev,
noexec, atime) can be cleared in there, of a bind mount of it neither. Mounts attached from descriptors alone would have no such lock.
A layer is taken by its path for overlayfs takes no descriptors before 6.13, and a mount has no other path than where it is attached.
"""

from __future__ import annotations

import os
import stat

from tare.launch import linux, mounts, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

BORROWED = b"at"
EPERM = 1


def stage(machine: Machine, base: bytes, root: int) -> None:
    """In a mount namespace of our own: the tmpfs. Nothing done here reaches the node. `root` is the slot of the root file system."""
    mounts.isolate(machine)
    options = ((b"source", b"tare"), (b"mode", b"755"))
    tree = mounts.new_filesystem(b"tmpfs", linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC, options)
    linux.move_mount(tree, linux.AT_FDCWD, base)
    for name in (BORROWED, b"%d" % root):
        os.mkdir(name, 0o700, dir_fd=tree)
    machine.stage = tree


def lay(machine: Machine, tree: int, name: bytes) -> None:
    """Attach a detached mount in the tmpfs; the descriptor is closed."""
    mounts.make_missing(machine.stage, name, stat.S_ISDIR(os.fstat(tree).st_mode))
    linux.move_mount(tree, machine.stage, name)
    os.close(tree)


def lay_mount(machine: Machine, slot: int) -> None:
    """What is in a slot."""
    lay(machine, machine.slots.pop(slot), b"%d" % slot)


def lay_root(machine: Machine, slot: int) -> None:
    """The root file system, unless mount(2) has put it there (`overlays.old_overlay`)."""
    if machine.root < 0:
        lay_mount(machine, slot)
        return
    os.close(machine.root)
    machine.root = -1


def lay_layer(machine: Machine, path: bytes, by: int, name: bytes) -> None:
    """A layer, idmapped by the user namespace in the slot `by`."""
    tree = linux.open_tree(linux.AT_FDCWD, path, linux.OPEN_TREE_CLONE)
    userns.map_mount(tree, machine.slots[by], path, False)
    lay(machine, tree, name)


def lay_device(
    machine: Machine, name: bytes, path: bytes, mode: int, major: int, minor: int, uid: int, gid: int
) -> None:
    """A device node: in a user namespace nobody may make one. Where Tare may not either, the node's own by that path is taken."""
    number = os.makedev(major, minor)
    try:
        os.mknod(name, mode, number, dir_fd=machine.stage)
    except PermissionError:
        place = mounts.open_device(linux.AT_FDCWD, path, number, os.O_PATH)
        lay(machine, linux.open_tree(place, b"", linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH), name)
        os.close(place)
        return
    os.chown(name, userns.outside(machine.uids, uid), userns.outside(machine.gids, gid), dir_fd=machine.stage)


def leave_stage(machine: Machine) -> None:
    """To the tmpfs by its name: the copy of this process's mount namespace has the working directory in it too, and no other way there."""
    os.fchdir(machine.stage)
    os.close(machine.stage)
    machine.stage = -1


def take(machine: Machine, slot: int) -> None:
    """In the child: what was laid ready, with what is mounted below, in its slot again."""
    flags = linux.OPEN_TREE_CLONE | linux.AT_RECURSIVE
    machine.slots[slot] = linux.open_tree(linux.AT_FDCWD, b"%d" % slot, flags)


def take_device(machine: Machine, name: bytes, path: bytes) -> None:
    """A device beneath the root, where nothing is."""
    parent, _, last = path.strip(b"/").rpartition(b"/")
    above = mounts.find(machine.root, parent, True)
    try:
        if not mounts.make_missing(above, last, False):
            return
        place = linux.openat2(above, last, os.O_PATH | os.O_NOFOLLOW, mounts.STRICT)
        tree = linux.open_tree(linux.AT_FDCWD, name, linux.OPEN_TREE_CLONE)
        linux.move_mount(tree, place)
        os.close(tree)
        os.close(place)
    finally:
        os.close(above)


OPERATIONS: dict[str, Callable[..., None]] = {
    "stage": stage,
    "lay_mount": lay_mount,
    "lay_root": lay_root,
    "lay_layer": lay_layer,
    "lay_device": lay_device,
    "leave_stage": leave_stage,
    "take": take,
    "take_device": take_device,
}
