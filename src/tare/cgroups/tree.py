"""One tree of control groups: directories and files of groups, named by their path below the tree's root ("kubepods/pod1").

Knows what a v1 cpuset and v2's subtree_control want before a group can be used, and nothing of containers.
The root's directory is opened once; every call is relative to it.
"""

from __future__ import annotations

import errno
import os

from tare.cgroups.layout import V2_CONTROLLERS
from tare.cgroups.names import MARK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tare.cgroups.layout import Hierarchy

BUSY = (errno.EBUSY, errno.ENOTEMPTY)
GONE = (errno.ENOENT, errno.ENODEV)
UNMARKABLE = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOSPC)
LARGEST_FILE = 1 << 20


class Tree:
    """A mounted hierarchy. Raises OSError with the absolute path of what failed."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.hierarchy = hierarchy
        self._root = os.open(hierarchy.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let the root's descriptor go."""
        os.close(self._root)

    def absolute(self, path: str) -> str:
        """Where a group or file is in the file system."""
        return f"{self.hierarchy.directory}/{path}" if path else self.hierarchy.directory

    def exists(self, path: str) -> bool:
        """Whether there is such a group (the root always is)."""
        try:
            os.stat(path or ".", dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def make(self, path: str) -> bool:
        """Make one group whose parent exists; False if it was there. A v1 cpuset is made usable."""
        try:
            os.mkdir(path, 0o755, dir_fd=self._root)
            made = True
        except FileExistsError:
            made = False
        except OSError as error:
            error.filename = self.absolute(path)
            raise
        if "cpuset" in self.hierarchy.controllers and self.hierarchy.version == 1:
            try:
                self.fill_cpuset(path)
            except OSError:
                if made:
                    self.remove(path)
                raise
        return made

    def mark(self, path: str, owner: bytes) -> None:
        """Note whose group it is. A kernel or a user namespace that lets nobody do so costs no more than that nobody can tell later."""
        try:
            os.setxattr(self.absolute(path), MARK, owner)
        except OSError as error:
            if error.errno not in (*GONE, *UNMARKABLE):
                raise

    def fill_cpuset(self, path: str) -> None:
        """Give a v1 cpuset that is empty its parent's CPUs and nodes, the parent first: an empty one takes no process."""
        for file in ("cpuset.cpus", "cpuset.mems"):
            self._inherited(path, file)

    def _inherited(self, path: str, file: str) -> str:
        names = path.split("/") if path else []
        depth = len(names)
        value = self.read(path, file).strip()
        while not value and depth:
            depth -= 1
            value = self.read("/".join(names[:depth]), file).strip()
        for below in range(depth + 1, len(names) + 1):
            self.write("/".join(names[:below]), file, value)
        return value

    def read(self, path: str, file: str) -> str:
        """A file of a group."""
        name = f"{path}/{file}" if path else file
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root)
            try:
                parts = []
                while part := os.read(fd, LARGEST_FILE):
                    parts.append(part)
                return b"".join(parts).decode()
            finally:
                os.close(fd)
        except OSError as error:
            error.filename = self.absolute(name)
            raise

    def write(self, path: str, file: str, value: str) -> None:
        """One value, in one write, as the kernel wants it."""
        name = f"{path}/{file}" if path else file
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._root)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            error.filename = self.absolute(name)
            raise

    def own(self, path: str, files: Iterable[str], uid: int) -> None:
        """Make a user the owner of a group's directory and of those of the files that it has."""
        for name in (path, *(f"{path}/{file}" for file in files if "/" not in file)):
            try:
                os.chown(name, uid, -1, dir_fd=self._root, follow_symlinks=False)
            except FileNotFoundError:
                if name == path:
                    raise
            except OSError as error:
                error.filename = self.absolute(name)
                raise

    def enable(self, path: str) -> frozenset[str]:
        """Let groups below `path` have controllers (v2): all that there are, or those that its ancestors can give. What its children have."""
        wanted = self.hierarchy.controllers & frozenset(V2_CONTROLLERS)
        enabled = frozenset(self.read(path, "cgroup.subtree_control").split())
        if wanted <= enabled:
            return enabled
        names = path.split("/") if path else []
        for depth in range(len(names) + 1):
            self._enable_one("/".join(names[:depth]), wanted)
        return frozenset(self.read(path, "cgroup.subtree_control").split())

    def _enable_one(self, path: str, wanted: frozenset[str]) -> None:
        """All at once; else each by itself, since one that is refused (realtime threads, processes in the way) must not cost the others."""
        missing = sorted(wanted - frozenset(self.read(path, "cgroup.subtree_control").split()))
        missing = [name for name in missing if name in self.read(path, "cgroup.controllers").split()]
        attempts = [missing] if len(missing) < 2 else [missing, *([name] for name in missing)]
        for names in attempts:
            try:
                self.write(path, "cgroup.subtree_control", " ".join(f"+{name}" for name in names))
            except OSError as error:
                if error.errno in GONE:
                    raise
                continue
            if names is missing:
                return

    def below(self, path: str) -> list[str]:
        """The groups inside of a group, children before their parents; without the group itself."""
        found: list[str] = []
        pending = [path]
        while pending:
            here = pending.pop()
            try:
                fd = os.open(
                    here or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root
                )
            except FileNotFoundError:
                continue
            try:
                with os.scandir(fd) as entries:
                    children = [f"{here}/{entry.name}" for entry in entries if entry.is_dir(follow_symlinks=False)]
            finally:
                os.close(fd)
            found += children
            pending += children
        found.reverse()
        return found

    def processes(self, path: str) -> list[int]:
        """PIDs in a group and below it, without zombies and without those that this PID namespace does not show."""
        pids: list[int] = []
        for group in (path, *self.below(path)):
            try:
                pids += [int(line) for line in self.read(group, "cgroup.procs").split()]
            except OSError as error:
                # A threaded group has no such list: its processes are in that of the group above.
                if error.errno not in (*GONE, errno.EOPNOTSUPP):
                    raise
        return [pid for pid in dict.fromkeys(pids) if pid]

    def remove(self, path: str) -> bool:
        """Remove a group, and the groups inside of it first. True: it is gone. False: something in it is still busy."""
        if self.remove_one(path):
            return True
        for group in self.below(path):
            self.remove_one(group)
        return self.remove_one(path)

    def remove_one(self, path: str) -> bool:
        """rmdir: True if the group is gone, False if it is busy. Processes that have ended keep it so until the kernel has finished with them."""
        try:
            os.rmdir(path, dir_fd=self._root)
        except OSError as error:
            if error.errno in BUSY:
                return False
            if error.errno not in GONE:
                error.filename = self.absolute(path)
                raise
        return True
