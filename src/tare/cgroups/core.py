"""Control groups of containers, one call at a time: made with their limits, looked into, killed, removed, in every tree of the machine.

A container's group is the leaf <pod's group>/<container ID>. The pod's group belongs to who made it (a kubelet): it is made
only where it exists in no tree, and removed only by who asked for that. In a v1 tree where a stranger's pod group is absent, making it
would leave it behind, since the stranger does not know of it; there the container's group is /tare-detached/<container ID>.

Calls take some ten microseconds a tree and write. Those that wait say so and block; the daemon's, which do not, are `manager`'s.
Nothing big is imported, for the sake of `tare oci`.
"""

from __future__ import annotations

import errno
import os

from tare.cgroups import devices, freezing, leaf
from tare.cgroups.ending import first_place, kill_pass, members, places
from tare.cgroups.group import Group, Setting, check_room
from tare.cgroups.layout import detect
from tare.cgroups.names import DETACHED, detached, own_path, relative, resolve_parent
from tare.cgroups.resources import plan
from tare.cgroups.tree import GONE, Tree
from tare.cgroups.value import Value
from tare.errors import FailedPrecondition, InvalidArgument, NotFound, TareError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tare.cgroups.layout import Hierarchy, Kind, Layout

DELEGATED_FILE = "/sys/kernel/cgroup/delegate"
DELEGATED = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")


class Cgroup(Value):
    """A container's group in every tree.

    `path` is as asked for ("/kubepods/pod1/<id>"). `join` are the absolute paths of the cgroup.procs files into which a
    process writes "0", the unified tree's last. `directory_v2` is the group's directory in the unified tree, for
    CLONE_INTO_CGROUP (None on v1). `oom_file` is where OOM kills are counted, `kill_file` v2's cgroup.kill, `freezer_file` v1's
    freezer.state; None where there is none. `skipped` names controllers and files that limits were asked of and that are not there.
    """

    __slots__ = ("directory_v2", "freezer_file", "join", "kill_file", "oom_file", "path", "skipped")

    def __init__(
        self,
        *,
        path: str,
        join: tuple[str, ...],
        directory_v2: str | None,
        oom_file: str | None,
        kill_file: str | None,
        freezer_file: str | None,
        skipped: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.join = join
        self.directory_v2 = directory_v2
        self.oom_file = oom_file
        self.kill_file = kill_file
        self.freezer_file = freezer_file
        self.skipped = skipped


class Groups:
    """Groups below `root`.

    `found` is all that `layout.detect` says, `layout` "v1", "hybrid" or "v2", `missing` the usual controllers that this machine does
    not offer, `skipped` how often something was asked of a controller or file that is not there; `warn` is told the first time.
    Groups that are made are marked as `owner`'s, where that is told.
    """

    def __init__(
        self,
        root: str = "/sys/fs/cgroup",
        layout: Layout | None = None,
        warn: Callable[[str], None] = lambda _: None,
        owner: str = "",
    ) -> None:
        found = layout or detect(root)
        self._owner = owner.encode()
        self.found = found
        self.layout: Kind = found.kind
        self.hierarchies: tuple[Hierarchy, ...] = found.hierarchies
        self.controllers: frozenset[str] = found.controllers
        self.missing: tuple[str, ...] = found.missing
        self.skipped: dict[str, int] = {}
        self._warn = warn
        self._trees = [Tree(hierarchy) for hierarchy in found.hierarchies]
        self._of = {name: tree for tree in self._trees for name in tree.hierarchy.controllers}
        self._unified = next((tree for tree in self._trees if tree.hierarchy.version == 2), None)
        self._versions: dict[str, int] = {name: tree.hierarchy.version for name, tree in self._of.items()}
        if self._unified is not None:
            self._versions["cgroup"] = 2

    def close(self) -> None:
        """Let the trees' descriptors go."""
        for tree in self._trees:
            tree.close()

    def trouble(self) -> str | None:
        """What limits cannot be applied here, or were not, in words; None where all are."""
        names = [*self.missing, *(name for name in self.skipped if name not in self.missing)]
        if not names:
            return None
        return f"control groups ({self.layout}) lack {', '.join(names)}: limits on that are not applied"

    # Names

    def resolve_parent(self, cgroup_parent: str, default: str) -> str:
        """The absolute path that a pod's cgroup_parent names, `default` where it is empty. Raises InvalidArgument."""
        return resolve_parent(cgroup_parent) if cgroup_parent else "/" + relative(default)

    def exists(self, path: str) -> bool:
        """Whether the group exists in any tree."""
        name = relative(path)
        return any(place for tree in self._trees for place in places(tree, name))

    def missing_groups(self, path: str) -> tuple[str, ...]:
        """The group and those of its ancestors that exist in no tree, deepest first: what `make_parent_now` is going to make."""
        names = relative(path).split("/")
        paths = ["/".join(names[:depth]) for depth in range(len(names), 0, -1)]
        return tuple(f"/{name}" for name in paths if not any(tree.exists(name) for tree in self._trees))

    # Pods

    def make_parent_now(self, path: str) -> bool:
        """Make a pod's group, with what is missing above it; True if it was made. One that exists in any tree is not touched: False."""
        missing = [relative(group) for group in reversed(self.missing_groups(path))]
        if not missing:
            return False
        above = missing[0].rpartition("/")[0]
        try:
            for tree in self._trees:
                if tree.exists(above):
                    for group in missing:
                        tree.make(group)
                        self._mark(tree, group)
        except OSError as error:
            self._remove_empty(reversed(missing))
            raise not_made(path, error) from error
        return True

    def remove_parent_now(self, path: str) -> bool:
        """One attempt at removing a group that `make_parent_now` made: False where it is busy, or has groups in it."""
        return self._remove_empty([relative(path)])

    def has_below(self, path: str) -> bool:
        """Whether there are groups inside of it."""
        return any(tree.below(relative(path)) for tree in self._trees)

    def _remove_empty(self, names: Iterable[str]) -> bool:
        gone = [tree.remove_one(name) for name in names for tree in self._trees]
        return all(gone)

    # Containers

    def create(self, path: str, resources: Mapping[str, object]) -> Cgroup:
        """Make a container's group with its limits (OCI linux.resources). What was made is removed again on failure.

        Raises InvalidArgument with the file, the value and the kernel's word where a limit is refused, FailedPrecondition
        where this machine does not let Tare make or limit groups.
        """
        name = relative(path)
        planned = plan(resources, self._versions)
        parent = name.rpartition("/")[0]
        above = self.missing_groups(parent) if parent else ()
        try:
            if above:
                self.make_parent_now(parent)
            where = {tree: self._make(tree, name) for tree in self._trees}
            setting = Setting(self._group(path, where))
            setting.all(planned.writes)
            if planned.devices and self._unified is not None:
                setting.skipped += guard(self._unified.absolute(where[self._unified]), planned.devices)
        except BaseException as error:
            self.remove_now(path)
            self._remove_empty(relative(group) for group in above)
            if isinstance(error, OSError):
                raise not_made(path, error) from error
            raise
        return self._handle(path, where, self._note(path, (*planned.skipped, *setting.skipped)))

    def even_out(self, path: str) -> None:
        """What is above a group in some tree is made in all: for who names a group by its whole path, and means that place everywhere.

        What is there in no tree is `create`'s to make. Raises FailedPrecondition.
        """
        names = relative(path).split("/")
        for depth in range(1, len(names)):
            above = "/".join(names[:depth])
            lacking = [tree for tree in self._trees if not tree.exists(above)]
            if len(lacking) == len(self._trees):
                return
            try:
                for tree in lacking:
                    tree.make(above)
            except OSError as error:
                raise not_made(path, error) from error

    def expected(self, path: str) -> Cgroup:
        """What `create` comes to where the group above is there in every tree; nothing is looked at."""
        return self._handle(path, dict.fromkeys(self._trees, relative(path)), ())

    def _make(self, tree: Tree, name: str) -> str:
        """The group's path in a tree, once it is made there."""
        parent = name.rpartition("/")[0]
        if tree.exists(parent):
            self._make_in(tree, parent, name)
            return name
        aside = detached(name)
        for _ in range(10):
            # Another container's removal takes the directory away when it is empty.
            tree.make(DETACHED)
            try:
                self._make_in(tree, DETACHED, aside)
            except FileNotFoundError:
                continue
            return aside
        raise FailedPrecondition(f"make cgroup {tree.absolute(aside)}", cause=f"{DETACHED} vanishes again and again")

    def _make_in(self, tree: Tree, parent: str, name: str) -> None:
        """Make a group, with controllers, in one that exists."""
        if tree.hierarchy.version == 2:
            tree.enable(parent)
        tree.make(name)
        self._mark(tree, name)

    def mark_now(self, path: str) -> None:
        """Note that a group which somebody else has made for us is ours."""
        for tree in self._trees:
            if tree.exists(relative(path)):
                self._mark(tree, relative(path))

    def _mark(self, tree: Tree, name: str) -> None:
        if self._owner:
            tree.mark(name, self._owner)

    def check_free(self, path: str) -> None:
        """Raise FailedPrecondition where a group that a container is to be made in has processes, or is frozen."""
        doing = f"use cgroup {path}"
        if not self.exists(path):
            return
        pids = self.processes(path)
        if pids:
            cause = f"it is not empty: PIDs {', '.join(map(str, pids[:20]))} are in it"
            raise FailedPrecondition(doing, cause=cause)
        if self.frozen(path):
            raise FailedPrecondition(doing, cause="it is frozen", hint="thaw it first")

    def delegate(self, path: str, uid: int) -> None:
        """Give a v2 group to a container's root (a UID of the node's), who may then make groups in it; on v1 and hybrid nothing is given.

        For a container with a cgroup namespace of its own and a writable mount of it: config-linux.md, "Cgroup ownership".
        """
        if self._unified is None or self.layout != "v2":
            return
        try:
            with open(DELEGATED_FILE) as files:
                names = files.read().split()
        except FileNotFoundError:
            names = list(DELEGATED)
        try:
            self._unified.own(self._find(path, "delegate")[self._unified], names, uid)
        except OSError as error:
            raise FailedPrecondition(f"give cgroup {path} to user {uid}", cause=error) from error

    def _group(self, path: str, where: Mapping[Tree, str]) -> Group:
        return Group(path, where, self._of, self._unified)

    def _note(self, path: str, names: Iterable[str]) -> tuple[str, ...]:
        """What was asked for and is not there: counted, and the first time said."""
        found = tuple(dict.fromkeys(names))
        for name in found:
            if name not in self.skipped:
                self._warn(f"cgroup {path}: this node has no {name}, so limits on it are not applied")
            self.skipped[name] = self.skipped.get(name, 0) + 1
        return found

    def update_now(self, path: str, resources: Mapping[str, object]) -> tuple[str, ...]:
        """Change the limits of a group while its processes run; what `resources` does not name stays. What was skipped is returned.

        All or nothing: where one value is refused, those before it are put back. Raises as `create`, NotFound where there is no
        group, and FailedPrecondition where `checkBeforeUpdate` asks that a memory limit below what is used be refused. It may take
        its time, since the kernel may reclaim memory before it answers.
        """
        planned = plan(resources, self._versions)
        where = self._find(path, "update")
        group = self._group(path, where)
        if planned.room is not None and group.has("memory"):
            check_room(group, planned.room)
        setting = Setting(group, keep=True)
        try:
            # What devices a v1 group may use is changed last, from its list so far.
            setting.all([item for item in planned.writes if item.controller != "devices"])
            if planned.rules and self._versions.get("devices") == 1:
                setting.change_devices(planned.rules)
            if planned.devices and self._unified is not None:
                setting.skipped += guard(self._unified.absolute(where[self._unified]), planned.devices, update=True)
        except BaseException as error:
            failures = setting.take_back()
            if isinstance(error, TareError) and failures:
                error.hint = f"and its former limits could not all be put back: {'; '.join(failures)}"
            if isinstance(error, OSError):
                raise FailedPrecondition(f"update cgroup {path}", cause=error) from error
            raise
        return self._note(path, (*planned.skipped, *setting.skipped))

    def _find(self, path: str, verb: str) -> dict[Tree, str]:
        """Where a group is. Raises NotFound."""
        name = relative(path)
        where = {tree: found for tree in self._trees if (found := first_place(tree, name)) is not None}
        if not where:
            raise NotFound(f"{verb} cgroup {path}", cause="it does not exist")
        return where

    def open(self, path: str) -> Cgroup:
        """The handle of a group that exists already. Raises NotFound."""
        return self._handle(path, self._find(path, "open"), ())

    def _handle(self, path: str, where: Mapping[Tree, str], skipped: tuple[str, ...]) -> Cgroup:
        def file(tree: Tree | None, name: str) -> str | None:
            if tree is None or tree not in where:
                return None
            return tree.absolute(f"{where[tree]}/{name}")

        unified, memory = self._unified, self._of.get("memory")
        counter = "memory.events" if self._versions.get("memory") == 2 else "memory.oom_control"
        return Cgroup(
            path=path,
            join=tuple(tree.absolute(f"{place}/cgroup.procs") for tree, place in where.items()),
            directory_v2=tree_directory(unified, where),
            oom_file=file(memory, counter),
            kill_file=file(unified, "cgroup.kill"),
            freezer_file=file(self._of.get("freezer"), "freezer.state"),
            skipped=tuple(dict.fromkeys(skipped)),
        )

    # An exec's own

    def leaf(self, path: str, main: int) -> Cgroup:
        """The handle by which an exec joins a container's group: with a leaf of its own in it, whose path is the handle's (see `leaf`).

        `main` is the PID of the container's main process. Where there can be no leaf, `path` is the handle's. Raises NotFound.
        """
        where, unified = self._find(path, "open"), self._unified
        if unified is None or unified not in where:
            return self._handle(path, where, ())
        above = leaf.beside(unified, where[unified], main)
        made = leaf.make(unified, above)
        return self._handle(f"/{made}" if made else path, where | {unified: made or above}, ())

    def leaf_went(self, path: str) -> bool:
        """Let a leaf go that nothing is in (any more), without blocking: True if it is gone."""
        return self._unified is None or self._unified.remove_one(relative(path))

    def clear_leaf_now(self, path: str) -> None:
        """Let a leaf go; what is in it still goes on as a part of the container. Idempotent."""
        if self._unified is not None:
            leaf.clear(self._unified, relative(path))

    # What is in a group

    def processes(self, path: str) -> list[int]:
        """PIDs in the group and below it, zombies not counted. Empty where the group does not exist."""
        return members(self._trees, relative(path))

    def oom_kills(self, path: str) -> int:
        """How many processes the kernel's OOM killer has killed in the group or below it; 0 where nothing counts them."""
        tree = self._of.get("memory")
        if tree is None:
            return 0
        name, second = relative(path), self._versions["memory"] == 2
        total = 0
        for place in places(tree, name):
            # v2's counter includes the groups below; v1's does not.
            for group in (place,) if second else (place, *tree.below(place)):
                try:
                    total += oom_count(tree.read(group, "memory.events" if second else "memory.oom_control"))
                except OSError as error:
                    if error.errno not in GONE:
                        raise
        return total

    def open_file(self, path: str, controller: str, file: str) -> int | None:
        """A descriptor to read a group's file by; None where there is no such group, controller or file."""
        tree = self._of.get(controller, self._unified)
        if tree is None:
            return None
        for place in places(tree, relative(path)):
            try:
                return os.open(tree.absolute(f"{place}/{file}"), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in GONE:
                    raise
        return None

    # Ending

    def kill_now(self, path: str) -> int:
        """One pass over the group; how many processes were in it (0: it is empty)."""
        return kill_pass(self._trees, relative(path))

    def remove_now(self, path: str) -> bool:
        """One attempt at removing: True when nothing is left, False when something in it is busy."""
        name = relative(path)
        gone = True
        for tree in self._trees:
            gone = tree.remove(name) and gone
            aside = detached(name)
            if tree.exists(aside):
                gone = tree.remove(aside) and gone
                tree.remove_one(DETACHED)
        return gone

    # Freezing

    def freeze_now(self, path: str, timeout: float = 10.0) -> None:
        """Stop all that is in the group and below it; returns when it has stopped. Raises DeadlineExceeded (it goes on then), NotFound."""
        freezing.freeze(self._trees, path, relative(path), timeout)

    def thaw_now(self, path: str, timeout: float = 10.0) -> None:
        """Let it go on. Raises DeadlineExceeded where a group above is frozen, NotFound."""
        freezing.thaw(self._trees, path, relative(path), timeout)

    def frozen(self, path: str) -> bool:
        """Whether all in the group has stopped. Raises NotFound."""
        return freezing.is_frozen(*freezing.find(self._trees, path, relative(path)))

    # Speed

    def warm(self) -> bool:
        """Make joining v1 groups cheap for the next 15 ms or so; call it in a thread when a start is near. False where there is no need.

        Moving a process into a v1 group waits for an RCU grace period (5 to 15 ms) unless another move was a moment ago, or the
        kernel runs with `favordynmods`. This moves the calling process to where it is.
        """
        tree = next((tree for tree in self._trees if tree.hierarchy.version == 1), None)
        if tree is None:
            return False
        with open("/proc/self/cgroup") as groups:
            own = own_path(groups.read(), tree.hierarchy)
        try:
            tree.write(own, "cgroup.procs", "0")
        except OSError:
            # Its group is outside of what is mounted here, or not ours to write: then the next join waits.
            return False
        return True


def tree_directory(tree: Tree | None, where: Mapping[Tree, str]) -> str | None:
    """A group's directory in one tree."""
    return tree.absolute(where[tree]) if tree is not None and tree in where else None


def guard(directory: str, rules: Sequence[devices.Rule], *, update: bool = False) -> list[str]:
    """Attach v2's device program, in an update in the place of the one before.

    ["devices"] where the user namespace that Tare runs in may have none. Raises FailedPrecondition where the kernel refuses it otherwise:
    without it a container could use every device of the node.
    """
    if not update and len(rules) == 1 and rules[0].sweeping and rules[0].allow:
        return []
    from tare.cgroups import bpf

    try:
        bpf.attach(directory, devices.program(rules), replace=update)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EINVAL):
            raise
        if not restricted_user():
            doing = f"restrict the devices of cgroup {directory}"
            raise FailedPrecondition(doing, cause=error, hint="the kernel needs CONFIG_CGROUP_BPF") from error
        return ["devices"]
    return []


def restricted_user() -> bool:
    """Whether this process is in a user namespace of its own: there nobody loads device programs, and nobody makes device nodes."""
    with open("/proc/self/uid_map") as lines:
        return lines.read().split() != ["0", "0", "4294967295"]


def oom_count(text: str) -> int:
    """The kills that memory.events (v2) or memory.oom_control (v1) counts. A kill of a whole group counts each process, and the group besides."""
    counts = {
        key: int(value) for key, _, value in (line.partition(" ") for line in text.splitlines()) if value.isdigit()
    }
    return max(counts.get("oom_kill", 0), counts.get("oom_group_kill", 0))


def not_made(path: str, error: OSError) -> InvalidArgument | FailedPrecondition:
    """Why a group could not be made: by its name, or by the state of the machine (no permission, cgroup.max.descendants, an empty cpuset)."""
    cls = InvalidArgument if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EINVAL) else FailedPrecondition
    return cls(f"make cgroup {path}", cause=error)
