"""One group in every tree at once: its files read and written, several values set as one.

Some values depend on others (memory and its sum with swap, quota and period and burst, shares and idle), and which must be
written first depends on what is there. So a value that the kernel refuses is tried again once others of the same call are in place.
"""

from __future__ import annotations

import errno

from tare.cgroups import devices
from tare.cgroups.writes import Write, putting_back
from tare.errors import FailedPrecondition, InvalidArgument, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tare.cgroups.memory import Room
    from tare.cgroups.tree import Tree

# Words of the kernel that are about us, not about the value that was written.
OUR_FAULT = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOMEM, errno.EIO)
# And those that may be about what stands beside the value.
IN_THE_WAY = (errno.EINVAL, errno.EBUSY, errno.ERANGE, errno.ENOSPC)


class Group:
    """`path` is as asked for; `where` its path in each tree that has it; `of` the tree of each controller; `unified` v2's."""

    __slots__ = ("of", "path", "unified", "where")

    def __init__(self, path: str, where: Mapping[Tree, str], of: Mapping[str, Tree], unified: Tree | None) -> None:
        self.path = path
        self.where = where
        self.of = of
        self.unified = unified

    def tree(self, controller: str) -> Tree | None:
        """The tree that has a controller's files for this group (the core, "cgroup", is v2's)."""
        tree = self.of.get(controller, self.unified)
        return tree if tree in self.where else None

    def read(self, controller: str, file: str) -> str:
        """A file's text. Raises OSError; ENOENT where no tree has the controller."""
        tree = self.tree(controller)
        if tree is None:
            raise FileNotFoundError(errno.ENOENT, "no such controller", f"{self.path}/{file}")
        return tree.read(self.where[tree], file)

    def has(self, controller: str) -> bool:
        """Whether the group has a controller: on v1 each does, on v2 the ancestors must have given it (the core is always there)."""
        tree = self.tree(controller)
        if tree is None:
            return False
        if tree.hierarchy.version == 1 or controller == "cgroup":
            return True
        return controller in tree.read(self.where[tree], "cgroup.controllers").split()


class Setting:
    """Values being set. `undo`, where it is kept, are the writes that put back what was there, in the order in which they were displaced."""

    __slots__ = ("group", "skipped", "undo")

    def __init__(self, group: Group, *, keep: bool = False) -> None:
        self.group = group
        self.undo: list[Write] | None = [] if keep else None
        self.skipped: list[str] = []

    def all(self, writes: Sequence[Write]) -> None:
        """Set them in this order, or in one that the kernel takes. Raises InvalidArgument or FailedPrecondition with the first that is refused."""
        pending = list(writes)
        while pending:
            refusals: list[tuple[Write, OSError]] = []
            for item in pending:
                try:
                    self.one(item)
                except OSError as error:
                    refusals.append((item, error))
                    if error.errno not in IN_THE_WAY:
                        raise self.refused(item, error) from error
            if len(refusals) == len(pending):
                first, reason = refusals[0]
                raise self.refused(first, reason) from reason
            pending = [item for item, _ in refusals]

    def one(self, item: Write) -> None:
        """One value, into the first of its files that is there."""
        tree = self.group.tree(item.controller)
        if tree is None:
            self.skipped.append(item.controller)
            return
        try:
            self.write(tree, item)
        except FileNotFoundError as error:
            if item.instead is None:
                self.absent(item, error)
            else:
                self.one(item.instead)

    def write(self, tree: Tree, item: Write) -> None:
        """Write, and remember what was there."""
        place = self.group.where[tree]
        before = None
        if self.undo is not None:
            try:
                before = putting_back(item, tree.read(place, item.file))
            except PermissionError:
                # A file of orders, such as memory.reclaim: it has no value to go back to.
                before = None
        tree.write(place, item.file, item.value)
        if self.undo is not None and before is not None:
            self.undo.append(before)

    def absent(self, item: Write, error: OSError) -> None:
        """What it means that the kernel, or this group, has no such file."""
        if item.absent == "refuse":
            raise self.refused(item, error) from error
        if not self.group.has(item.controller):
            self.skipped.append(item.controller)
        elif item.absent == "skip":
            self.skipped.append(item.file)

    def refused(self, item: Write, error: OSError) -> InvalidArgument | FailedPrecondition:
        """What the kernel says against a value is the request's fault, unless it is one of the words that are about us or the machine."""
        doing = f"set {item.file} of cgroup {self.group.path} to {item.value!r}"
        if error.errno in OUR_FAULT:
            return FailedPrecondition(doing, cause=error, hint="Tare needs write access to the control groups")
        if error.errno == errno.ENOENT and not self.group.has(item.controller):
            cause = f"the groups above it do not give it the controller {item.controller}"
            return FailedPrecondition(doing, cause=cause)
        return InvalidArgument(doing, cause=error)

    def change_devices(self, rules: Sequence[devices.Rule]) -> None:
        """Change a v1 group's list of devices to these rules; where the kernel refuses, it is as it was."""
        before = self.group.read("devices", "devices.list")
        plain = Setting(self.group)
        try:
            plain.all([Write("devices", *line) for line in devices.change(before, rules)])
        except (InvalidArgument, FailedPrecondition):
            now = self.group.read("devices", "devices.list")
            plain.all([Write("devices", *line) for line in devices.change_back(now, before)])
            raise

    def take_back(self) -> list[str]:
        """Put back what was there, the last first. What could not be put back, in words."""
        failures: list[str] = []
        for item in reversed(self.undo or ()):
            try:
                Setting(self.group).all([item])
            except (InvalidArgument, FailedPrecondition) as error:
                failures.append(describe(error))
        return failures


def check_room(group: Group, room: Room) -> None:
    """Raise FailedPrecondition where v2 would answer a limit below what is used with its OOM killer."""
    used = int(group.read("memory", "memory.current"))
    doing = f"set memory.max of cgroup {group.path} to '{room.limit}'"
    hint = "checkBeforeUpdate asks that the limit be refused then"
    if used > room.limit:
        raise FailedPrecondition(doing, cause=f"its processes use {used} bytes", hint=hint)
    if room.swap is None:
        return
    try:
        used += int(group.read("memory", "memory.swap.current"))
    except FileNotFoundError:
        # A kernel without swap has no such file.
        return
    if used > room.swap:
        cause = f"its processes use {used} bytes of memory and swap, and {room.swap} are to be allowed"
        raise FailedPrecondition(doing, cause=cause, hint=hint)
