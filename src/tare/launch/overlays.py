"""Steps that stack an image's layers: the root file system of a container, and image volumes.

By fsopen(2) where the kernel takes layers one by one; else, and where a path is too long for that, by mount(2).
"""

from __future__ import annotations

import os

from tare.launch import linux, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

MOUNT_DATA = 4096  # bytes that mount(2) takes as options, with the zero at the end
E2BIG, EINVAL, ENAMETOOLONG, ENOSYS = 7, 22, 36, 38


def overlay(
    machine: Machine,
    slot: int,
    lowers: tuple[bytes, ...],
    upper: bytes,
    work: bytes,
    base: bytes,
    context: bytes = b"",
) -> None:
    """The root file system: layers (top first) under a writable directory. With a context that is every file's SELinux label.

    Kernels before 6.5 have no `lowerdir+` (and say so only when all options are there), and a value over 255 bytes fits no
    fsconfig: those get mount(2) on `base`.
    """
    options = [(b"source", b"overlay"), *((b"lowerdir+", lower) for lower in lowers)]
    options += [(b"upperdir", upper), (b"workdir", work)] + ([(b"context", context)] if context else [])
    try:
        machine.slots[slot] = mounts.new_filesystem(b"overlay", 0, tuple(options))
    except OSError as first:
        if first.errno not in (EINVAL, ENOSYS, ENAMETOOLONG):
            raise
        try:
            old_overlay(machine, slot, lowers, upper, work, base, context)
        except OSError as second:
            raise first if first.strerror != os.strerror(first.errno) else second from None


def old_overlay(
    machine: Machine,
    slot: int,
    lowers: tuple[bytes, ...],
    upper: bytes,
    work: bytes,
    base: bytes,
    context: bytes = b"",
) -> None:
    """The same by mount(2), from the layers' common parent so that a page holds the options: it takes its place at `base` at once."""
    labelled = b',context="%b"' % context if context else b""
    mount_overlay(lowers, b",upperdir=%b,workdir=%b%b" % (escaped(upper), escaped(work), labelled), base)
    machine.root = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def mount_overlay(lowers: tuple[bytes, ...], more: bytes, base: bytes) -> None:
    """mount(2) of an overlay at `base`; `more` follows the lower directories."""
    here = os.path.commonpath([os.path.dirname(lower) for lower in lowers])
    os.chdir(here)
    short = [escaped(lower.removeprefix(here.rstrip(b"/") + b"/")) for lower in lowers]
    data = b"lowerdir=%b%b" % (b":".join(short), more)
    if len(data) >= MOUNT_DATA:
        raise OSError(E2BIG, f"{len(lowers)} layers are too many for this kernel", "overlay")
    linux.mount(b"overlay", base, b"overlay", 0, data)
    os.chdir(b"/")


def escaped(path: bytes) -> bytes:
    """A path as a part of overlayfs's mount data."""
    return path.replace(b"\\", b"\\\\").replace(b":", b"\\:").replace(b",", b"\\,")


def union(
    machine: Machine,
    slot: int,
    lowers: tuple[bytes, ...],
    sub_path: bytes,
    attrs: int,
    base: bytes,
    context: bytes = b"",
) -> None:
    """A detached read-only mount of layers (top first), or of what is at a path in them, links followed within. With a context that is every
    file's SELinux label.

    Kernels before 6.15 clone nothing out of a detached mount, so for a path the whole takes its place at `base` for a moment.
    """
    tree = stacked(lowers, base, context)
    if sub_path:
        whole = tree
        try:
            linux.move_mount(whole, linux.AT_FDCWD, base)
            try:
                place = linux.openat2(whole, sub_path, os.O_PATH, mounts.IN_ROOT)
                tree = linux.open_tree(place, b"", linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH)
                os.close(place)
            finally:
                linux.umount(base, linux.MNT_DETACH)
        finally:
            os.close(whole)
    linux.mount_setattr(tree, b"", linux.AT_EMPTY_PATH, attributes=attrs, propagation=linux.MS_PRIVATE)
    machine.slots[slot] = tree


def stacked(lowers: tuple[bytes, ...], base: bytes, context: bytes) -> int:
    """A detached overlay without an upper directory; of a single layer, which overlayfs refuses, a bind mount.

    That has the layer's own labels: where it is to have another, the empty directory `base` is below it.
    """
    if len(lowers) == 1 and not context:
        return linux.open_tree(linux.AT_FDCWD, lowers[0], linux.OPEN_TREE_CLONE)
    lowers = lowers if len(lowers) > 1 else (*lowers, base)
    options = [(b"source", b"overlay"), *((b"lowerdir+", lower) for lower in lowers)]
    options += [(b"context", context)] if context else []
    try:
        return mounts.new_filesystem(b"overlay", linux.MOUNT_ATTR_RDONLY, tuple(options))
    except OSError as first:
        if first.errno not in (EINVAL, ENOSYS, ENAMETOOLONG):
            raise
        mount_overlay(lowers, b',context="%b"' % context if context else b"", base)
    tree = linux.open_tree(linux.AT_FDCWD, base, linux.OPEN_TREE_CLONE)
    linux.umount(base, linux.MNT_DETACH)
    return tree


OPERATIONS: dict[str, Callable[..., None]] = {"overlay": overlay, "old_overlay": old_overlay, "union": union}
