"""Applies a layer's entries to a directory, in the form that overlayfs stacks. Nothing outside the directory is touched, whatever the archive says.

Every path is walked component by component from the layer's root with O_NOFOLLOW, and every system call names one
component relative to an open directory: the kernel follows no link of the archive's. Where a directory's name is a link,
it is read here and followed only if it is relative and stays inside (an archive with lib → usr/lib and then lib/x).

What an entry becomes: whiteouts are character devices 0:0, opaque directories carry trusted.overlay.opaque=y
(kernel docs, "overlayfs": whiteouts and opaque directories). Of entries with one name the last wins. Directories that
the archive only implies are reported, since what they look like is for the layers below to say (`inherit.py`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tare.images.chunks import ChunkReader
from tare.images.layer import BLOCK, MAX_DEPTH, MAX_PATH, Entry, Extension, HeaderReader, Kind, LayerError, number, show
from tare.images.sparse import complete

MAX_LINKS = 40  # as many as the kernel follows (path_resolution(7))
OPEN_DIRECTORIES = 64
OPAQUE = b"trusted.overlay.opaque"
PAGE = 4096
HEADERS = 2048  # bytes for each entry, as much as is usual and more
# What says something of this machine, not of the archive.
MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM})

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a layer may be: bytes of all its files, and entries."""

    size: int = 64 << 30
    entries: int = 2_000_000

    @property
    def archive(self) -> int:
        """Bytes of its archive, headers and padding included: what more there is, is there to fill disks or time."""
        return self.size + self.entries * HEADERS


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a layer took: bytes on disk (files in whole pages), inodes, and the directories that it implied without an entry of their own."""

    size: int
    inodes: int
    implied: frozenset[bytes]


def unpack(read: Callable[[], bytes], root: Path, limits: Limits = Limits()) -> Unpacked:
    """Unpack the tar archive that `read` gives chunk by chunk (b"" at the end) into the empty directory `root`.

    Reads to the very end, past the archive's own. Blocks; for a thread. Raises LayerError for the archive, OSError for the machine, and
    what `read` raises.
    """
    stream = ChunkReader(read)
    headers = HeaderReader()
    with Unpacker(root) as unpacker:
        count = size = 0
        while block := stream.take(BLOCK):
            header = headers.read(block)
            if header is None:
                break
            if isinstance(header, Extension):
                headers.extend(stream.take(header.size))
                stream.skip(-header.size % BLOCK)
                continue
            count += 1
            size += header.sparse.length if header.sparse else header.size
            if count > limits.entries:
                raise LayerError("unpack layer", cause=f"more than {limits.entries} entries")
            if size > limits.size:
                raise LayerError("unpack layer", cause=f"files of more than {limits.size} bytes")
            unpacker.apply(header, stream)
        stream.drain()
        return unpacker.finish()


def unmasked_bits() -> int:
    """The mode bits that opening or making a file leaves as asked: those not in the process's umask, and never setuid, setgid, sticky.

    umask(2) itself can only be read by changing it, for all threads at once.
    """
    found = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 0o777 & ~int(found[1], 8) if found else 0


class Directories:
    """The layer's directories by path, opened without following links; at most OPEN_DIRECTORIES stay open.

    `implied` are those made because something lies in them, `whiteouts` the paths of whiteouts made so far.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self.implied: set[bytes] = {b""}
        self.whiteouts: set[bytes] = set()
        self._open: dict[bytes, int] = {}

    def open(self, path: bytes) -> tuple[int, bytes]:
        """The directory at `path`, made if missing: a descriptor, borrowed until the next call, and its path without links. Raises LayerError."""
        for _ in range(MAX_LINKS):
            found = self._walk(path)
            if isinstance(found, int):
                return found, path
            path = found
        raise LayerError(f"unpack below {show(path)}", cause="too many symbolic links")

    def existing(self, path: bytes) -> int | None:
        """The directory at `path` if there is one, without a link in its path; a descriptor, borrowed until the next call."""
        try:
            found = self._walk(path, existing=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        assert isinstance(found, int)
        return found

    def _walk(self, path: bytes, *, existing: bool = False) -> int | bytes:
        """The directory's descriptor, or the path to try instead because a link stood in the way."""
        if not path:
            return self.root
        known, rest = path, []
        while known and known not in self._open:
            known, _, name = known.rpartition(b"/")
            rest.append(name)
        descriptor = self.root
        if known:
            descriptor = self._open[known] = self._open.pop(known)  # the latest used is the last to be closed
        while rest:
            name = rest.pop()
            inner = known + b"/" + name if known else name
            try:
                entered = os.open(name, _DIRECTORY, dir_fd=descriptor)
            except (FileNotFoundError, NotADirectoryError) as error:
                if existing:
                    raise
                if isinstance(error, NotADirectoryError) and inner not in self.whiteouts:
                    target = _join(known, _link_target(descriptor, inner, name), path)
                    return b"/".join(filter(None, (target, *reversed(rest))))
                entered = self._make(descriptor, inner, name)
            self._keep(inner, entered)
            known, descriptor = inner, entered
        return descriptor

    def _make(self, parent: int, path: bytes, name: bytes) -> int:
        """Make the directory that entries below it imply."""
        hidden = path in self.whiteouts
        if hidden:
            os.unlink(name, dir_fd=parent)
            self.whiteouts.discard(path)
        else:
            self.implied.add(path)
        os.mkdir(name, 0o755, dir_fd=parent)
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        os.fchmod(descriptor, 0o755)
        if hidden:
            os.setxattr(descriptor, OPAQUE, b"y")
        return descriptor

    def _keep(self, path: bytes, descriptor: int) -> None:
        self._open[path] = descriptor
        if len(self._open) > OPEN_DIRECTORIES:
            os.close(self._open.pop(next(iter(self._open))))

    def gone(self, path: bytes) -> None:
        """What was at `path` is no more; nor is what was below."""
        for known in [known for known in self._open if known == path or known.startswith(path + b"/")]:
            os.close(self._open.pop(known))
        self.whiteouts.discard(path)
        self.implied.discard(path)

    def close(self) -> None:
        """Once, at the end."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _link_target(parent: int, path: bytes, name: bytes) -> bytes:
    try:
        target = os.readlink(name, dir_fd=parent)
    except OSError:
        raise LayerError(f"unpack below {show(path)}", cause="it is no directory") from None
    if target.startswith(b"/"):
        raise LayerError(
            f"unpack below {show(path)}", cause=f"it is a symbolic link to {show(target)}, outside the layer"
        )
    return target


def _join(directory: bytes, target: bytes, asked: bytes) -> bytes:
    """Where a relative link in `directory` (whose components are no links) leads. Raises LayerError if that is outside."""
    parts = directory.split(b"/") if directory else []
    for part in target.split(b"/"):
        if part == b"..":
            if not parts:
                raise LayerError(
                    f"unpack below {show(asked)}", cause=f"the symbolic link to {show(target)} leads out of the layer"
                )
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    if len(parts) > MAX_DEPTH or sum(map(len, parts)) > MAX_PATH:
        raise LayerError(f"unpack below {show(asked)}", cause="symbolic links that make the path too long")
    return b"/".join(parts)


class Unpacker:
    """One layer being unpacked; a context manager that closes its descriptors."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        disown(self._root)
        self._directories = Directories(self._root)
        # Of directories: the mtime, and the mode where it is setgid, else 0.
        self._late: dict[bytes, tuple[int, int]] = {}
        self._size = 0
        self._inodes = 0
        self._as_asked = unmasked_bits()
        self._make: dict[Kind, Callable[[Entry, int, bytes], None]] = {
            Kind.DIRECTORY: self._directory,
            Kind.SYMLINK: self._symlink,
            Kind.HARDLINK: self._hardlink,
            Kind.CHARACTER: self._node,
            Kind.BLOCK: self._node,
            Kind.FIFO: self._node,
            Kind.WHITEOUT: self._whiteout,
        }

    def __enter__(self) -> Unpacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._directories.close()
        os.close(self._root)

    def apply(self, entry: Entry, stream: ChunkReader) -> None:
        """Make what the entry says; its data come from `stream`. Raises LayerError."""
        kind, path = entry.kind, entry.path
        try:
            if entry.sparse is not None:
                sparse, left = complete(entry.sparse, entry.size, stream.take, number)
                entry = entry._replace(sparse=sparse, size=left)
            if kind is Kind.SKIPPED:
                stream.skip(entry.size + -entry.size % BLOCK)
                return
            if not path or kind is Kind.OPAQUE:
                self._directory_itself(entry)
                stream.skip(entry.size + -entry.size % BLOCK)
                return
            directory, _, name = path.rpartition(b"/")
            parent, real = self._directories.open(directory)
            if real != directory:
                entry = entry._replace(path=real + b"/" + name if real else name)
            if kind is Kind.FILE:
                self._file(entry, parent, name, stream)
            else:
                self._make[kind](entry, parent, name)
                stream.skip(entry.size + -entry.size % BLOCK)
        except OSError as error:
            if error.errno in MACHINE:
                raise
            raise LayerError(f"unpack {show(path)}", cause=error.strerror) from error

    def finish(self) -> Unpacked:
        """Set what would have been inherited by what was made in the directories (setgid), and their times, which that has changed."""
        implied = frozenset(self._directories.implied)
        for path, (mtime, mode) in self._late.items():
            descriptor = self._directories.existing(path)
            if descriptor is not None:
                if mode:
                    os.fchmod(descriptor, mode)
                os.utime(descriptor, ns=(mtime, mtime))
                self._size += os.fstat(descriptor).st_blocks * 512
        return Unpacked(self._size + PAGE * len(implied), self._inodes + len(implied), implied)

    def _file(self, entry: Entry, parent: int, name: bytes, stream: ChunkReader) -> None:
        size, mode = entry.size, entry.mode
        try:
            descriptor = os.open(name, _NEW_FILE, mode & 0o777, dir_fd=parent)
        except FileExistsError:
            self._clear(entry.path, parent, name)
            descriptor = os.open(name, _NEW_FILE, mode & 0o777, dir_fd=parent)
        try:
            if size:
                self._data(entry, stream, descriptor)
                stream.skip(-size % BLOCK)
            if entry.sparse is not None:
                os.ftruncate(descriptor, entry.sparse.length)
                size = os.fstat(descriptor).st_blocks * 512
            if entry.uid or entry.gid:
                os.fchown(descriptor, entry.uid, entry.gid)
            if mode & ~self._as_asked:
                os.fchmod(descriptor, mode)
            if entry.xattrs:
                set_xattrs(descriptor, entry)
            os.utime(descriptor, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(descriptor)
        self._count(size)

    def _data(self, entry: Entry, stream: ChunkReader, descriptor: int) -> None:
        pieces = entry.sparse.segments if entry.sparse is not None else ((0, entry.size),)
        for offset, size in pieces:
            if offset:
                os.lseek(descriptor, offset, os.SEEK_SET)
            if stream.copy(size, descriptor) != size:
                raise LayerError(f"unpack {show(entry.path)}", cause="the archive ends in the middle of the file")

    def _directory(self, entry: Entry, parent: int, name: bytes) -> None:
        path, there = entry.path, False
        try:
            os.mkdir(name, entry.mode & 0o777, dir_fd=parent)
        except FileExistsError:
            there = stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            if not there:
                hidden = path in self._directories.whiteouts
                self._clear(path, parent, name)
                os.mkdir(name, entry.mode & 0o777, dir_fd=parent)
                if hidden:
                    os.setxattr(beneath(parent, name), OPAQUE, b"y", follow_symlinks=False)
        self._directories.implied.discard(path)
        if there or entry.uid or entry.gid:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        mode = entry.mode & ~stat.S_ISGID
        if there or mode & ~self._as_asked:
            # No link: it was just made, or seen to be a directory, in a tree of ours alone.
            os.chmod(name, mode, dir_fd=parent)
        if entry.xattrs:
            set_xattrs(beneath(parent, name), entry)
        if path not in self._late:
            self._inodes += 1
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        """What is to be set once nothing more is made in this directory."""
        self._late[entry.path] = entry.mtime, entry.mode if entry.mode & stat.S_ISGID else 0

    def _directory_itself(self, entry: Entry) -> None:
        """An entry that speaks of a directory as it is: the root's own, or an opaque mark."""
        if entry.kind is Kind.OPAQUE:
            if not entry.path:
                raise LayerError(
                    "unpack layer", cause="it hides all of the layers below, which overlayfs cannot express"
                )
            os.setxattr(self._directories.open(entry.path)[0], OPAQUE, b"y")
            return
        if entry.kind is not Kind.DIRECTORY:
            raise LayerError("unpack layer", cause="its root is not a directory")
        self._directories.implied.discard(b"")
        os.fchown(self._root, entry.uid, entry.gid)
        os.fchmod(self._root, entry.mode & ~stat.S_ISGID)
        set_xattrs(self._root, entry)
        self._note(entry)

    def _symlink(self, entry: Entry, parent: int, name: bytes) -> None:
        try:
            os.symlink(entry.link, name, dir_fd=parent)
        except FileExistsError:
            self._clear(entry.path, parent, name)
            os.symlink(entry.link, name, dir_fd=parent)
        if entry.uid or entry.gid:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        self._finish_special(entry, parent, name)

    def _hardlink(self, entry: Entry, parent: int, name: bytes) -> None:
        directory, _, source = entry.link.rpartition(b"/")
        # Opening the other directory may close this one, and clearing the name may close the other.
        here = os.dup(parent)
        there = -1
        try:
            borrowed, real = self._directories.open(directory)
            there = os.dup(borrowed)
            target = real + b"/" + source if real else source
            if target == entry.path:
                return
            if target in self._directories.whiteouts:
                raise LayerError(
                    f"unpack {show(entry.path)}", cause=f"a hard link to {show(target)}, which the layer removes"
                )
            self._link(entry, there, source, here, name)
        finally:
            os.close(here)
            if there >= 0:
                os.close(there)

    def _link(self, entry: Entry, there: int, source: bytes, here: int, name: bytes) -> None:
        try:
            try:
                os.link(source, name, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
            except FileExistsError:
                self._clear(entry.path, here, name)
                os.link(source, name, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
        except OSError as error:
            if error.errno in MACHINE:
                raise
            cause = f"a hard link to {show(entry.link)}: {error.strerror}"
            raise LayerError(f"unpack {show(entry.path)}", cause=cause) from error

    def _node(self, entry: Entry, parent: int, name: bytes) -> None:
        kinds = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}
        mode, device = kinds[entry.kind] | (entry.mode & 0o777), os.makedev(*entry.device)
        if entry.kind is Kind.CHARACTER and not device:
            self._whiteout(entry, parent, name)  # overlayfs would take it for one
            return
        try:
            os.mknod(name, mode, device, dir_fd=parent)
        except FileExistsError:
            self._clear(entry.path, parent, name)
            os.mknod(name, mode, device, dir_fd=parent)
        os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(name, entry.mode, dir_fd=parent)
        self._finish_special(entry, parent, name)

    def _finish_special(self, entry: Entry, parent: int, name: bytes) -> None:
        if entry.xattrs:
            set_xattrs(beneath(parent, name), entry)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)
        self._count(0)

    def _whiteout(self, entry: Entry, parent: int, name: bytes) -> None:
        """Hide what the layers below have there, but not what this layer has (OCI layer spec: whiteouts apply to lower layers only)."""
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.setxattr(beneath(parent, name), OPAQUE, b"y", follow_symlinks=False)
                self._directories.implied.discard(entry.path)
            return
        self._directories.whiteouts.add(entry.path)
        self._count(0)

    def _clear(self, path: bytes, parent: int, name: bytes) -> None:
        """An earlier entry of this name gives way."""
        self._directories.gone(path)
        try:
            os.unlink(name, dir_fd=parent)
        except IsADirectoryError:
            self._remove(path, parent, name)

    def _remove(self, path: bytes, parent: int, name: bytes) -> None:
        """Remove a directory and what is known of it. It takes as long as what is removed is large, for an archive may have this done often."""
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            with os.scandir(descriptor) as entries:
                found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
            for inner, is_directory in found:
                if is_directory:
                    self._remove(path + b"/" + inner, descriptor, inner)
                else:
                    os.unlink(inner, dir_fd=descriptor)
                    self._directories.whiteouts.discard(path + b"/" + inner)
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=parent)
        self._directories.implied.discard(path)
        self._late.pop(path, None)

    def _count(self, size: int) -> None:
        self._size += (size + PAGE - 1) // PAGE * PAGE
        self._inodes += 1


def disown(directory: int) -> None:
    """A new directory in a setgid one has its group, and would hand it on to all that is made in it."""
    status = os.fstat(directory)
    if status.st_mode & stat.S_ISGID:
        os.fchown(directory, -1, os.getegid())
        os.fchmod(directory, stat.S_IMODE(status.st_mode) & ~stat.S_ISGID)


def beneath(parent: int, name: bytes) -> str:
    """A path for the calls on extended attributes, which know no directory descriptors. Its last component is not followed."""
    return f"/proc/self/fd/{parent}/{os.fsdecode(name)}"


def set_xattrs(target: int | str, entry: Entry) -> None:
    """Set an entry's attributes. Where a file cannot have user.* ones (links, devices, some filesystems) those are left out."""
    for name, value in entry.xattrs.items():
        try:
            if isinstance(target, int):
                os.setxattr(target, name, value)
            else:
                os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as error:
            if not name.startswith(b"user.") or error.errno not in (errno.EPERM, errno.ENOTSUP):
                raise
