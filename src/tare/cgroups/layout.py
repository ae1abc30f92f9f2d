"""Where this machine's control groups are: v1, v2 or both, from the text of /proc/self/mountinfo.

    v2      /sys/fs/cgroup is a cgroup2 mount                     all controllers in one tree
    v1      /sys/fs/cgroup/<controllers> are cgroup mounts        one tree each
    hybrid  as v1, and a cgroup2 mount beside them                which has what no v1 tree took

Pure but for `detect`, which reads mountinfo and the unified tree's cgroup.controllers. Groups are made in `manager`.
"""

from __future__ import annotations

from tare.cgroups.value import Value
from tare.errors import FailedPrecondition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal

    Kind = Literal["v1", "hybrid", "v2"]

# In the order in which a process joins them: cpuset last of v1's, since it alone may refuse (an empty one takes nobody).
V1_CONTROLLERS = ("freezer", "devices", "memory", "pids", "cpu", "cpuacct", "blkio", "hugetlb", "rdma", "misc")
V2_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io", "hugetlb", "rdma", "misc")
EXPECTED_V1 = ("cpu", "cpuacct", "cpuset", "memory", "pids", "devices", "freezer", "hugetlb", "blkio")
EXPECTED_V2 = ("cpu", "cpuset", "memory", "pids", "hugetlb", "io")


class Hierarchy(Value):
    """One tree of groups. `controllers` is empty for a named v1 tree ("systemd") and may be for a unified one; `options` is v1's mount data."""

    __slots__ = ("controllers", "directory", "name", "options", "version")

    def __init__(
        self, *, directory: str, version: Literal[1, 2], controllers: frozenset[str], name: str = "", options: str = ""
    ) -> None:
        self.directory = directory
        self.version = version
        self.controllers = controllers
        self.name = name
        self.options = options


class Layout(Value):
    """All trees, in the order in which a process joins them; the unified one is last."""

    __slots__ = ("hierarchies", "kind")

    def __init__(self, *, kind: Kind, hierarchies: tuple[Hierarchy, ...]) -> None:
        self.kind = kind
        self.hierarchies = hierarchies

    @property
    def unified(self) -> Hierarchy | None:
        """The v2 tree."""
        return next((tree for tree in self.hierarchies if tree.version == 2), None)

    @property
    def controllers(self) -> frozenset[str]:
        """Every controller that some tree has."""
        return frozenset[str]().union(*(tree.controllers for tree in self.hierarchies))

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that a container runtime uses and this machine does not offer."""
        expected = EXPECTED_V2 if self.kind == "v2" else EXPECTED_V1
        return tuple(name for name in expected if name not in self.controllers)

    def tree_of(self, controller: str) -> Hierarchy | None:
        """The tree that has a controller."""
        return next((tree for tree in self.hierarchies if controller in tree.controllers), None)


def detect(root: str = "/sys/fs/cgroup") -> Layout:
    """The layout of this machine below `root`. Raises FailedPrecondition where no control groups are mounted there."""
    with open("/proc/self/mountinfo") as mounts:
        return parse(mounts.read(), root, read_controllers)


def read_controllers(directory: str) -> str:
    """The text of a unified tree's cgroup.controllers."""
    with open(f"{directory}/cgroup.controllers") as controllers:
        return controllers.read()


def parse(mountinfo: str, root: str, controllers_of: Callable[[str], str]) -> Layout:
    """The layout that mountinfo's text describes; `controllers_of` gives the text of cgroup.controllers of a unified tree's directory."""
    mounts = visible(mountinfo, root)
    trees: list[Hierarchy] = []
    for directory, (kind, options) in mounts.items():
        if kind == "cgroup2":
            controllers = frozenset(controllers_of(directory).split())
            trees.append(Hierarchy(directory=directory, version=2, controllers=controllers))
        elif kind == "cgroup":
            trees.append(first_version(directory, options))
    if not trees:
        raise FailedPrecondition("find control groups", cause=f"no cgroup file system is mounted at {root}")
    unified = [tree for tree in trees if tree.version == 2]
    if any(tree.directory == root for tree in unified):
        return Layout(kind="v2", hierarchies=tuple(tree for tree in unified if tree.directory == root))
    first = [tree for tree in trees if tree.version == 1]
    ordered = (*sorted(distinct(first), key=join_order), *unified[:1])
    return Layout(kind="hybrid" if unified and first else "v1" if first else "v2", hierarchies=ordered)


def visible(mountinfo: str, root: str) -> dict[str, tuple[str, str]]:
    """Mount point → (type, super options) of what is mounted at or right below `root`; of several at one point the last hides the rest."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            continue
        point = unescape(fields[4])
        if point == root or point.rpartition("/")[0] == root:
            if point == root:
                mounts.clear()
            mounts[point] = (rest[0], rest[2])
    return mounts


def unescape(text: str) -> str:
    """mountinfo's octal escapes (proc(5)), a backslash's own among them."""
    first, *rest = text.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def first_version(directory: str, options: str) -> Hierarchy:
    """A v1 tree from its super options, such as "rw,cpu,cpuacct" or "rw,xattr,name=systemd"."""
    words = options.split(",")
    name = next((word.removeprefix("name=") for word in words if word.startswith("name=")), "")
    ignored = {"rw", "ro", "xattr", "clone_children", "noprefix", "none", "favordynmods", "cpuset_v2_mode"}
    controllers = [word for word in words if "=" not in word and word not in ignored]
    data = ",".join(controllers) if controllers else f"none,name={name}"
    return Hierarchy(directory=directory, version=1, controllers=frozenset(controllers), name=name, options=data)


def distinct(trees: Iterable[Hierarchy]) -> list[Hierarchy]:
    """Without the second mount of a tree that is mounted twice (cpu and cpu,cpuacct)."""
    found: dict[str, Hierarchy] = {}
    for tree in trees:
        found.setdefault(tree.options, tree)
    return list(found.values())


def join_order(tree: Hierarchy) -> tuple[int, str]:
    """Sorting key: as V1_CONTROLLERS, then others, then cpuset."""
    if "cpuset" in tree.controllers:
        return (len(V1_CONTROLLERS) + 1, tree.options)
    places = [V1_CONTROLLERS.index(name) for name in tree.controllers if name in V1_CONTROLLERS]
    return (min(places, default=len(V1_CONTROLLERS)), tree.options)


class ContainerMount(Value):
    """How one tree is shown in a container's own cgroup namespace: a fresh mount at /sys/fs/cgroup[/name] ("" : at the top)."""

    __slots__ = ("aliases", "kind", "name", "options")

    def __init__(
        self, *, name: str, kind: Literal["cgroup", "cgroup2"], options: str, aliases: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.kind = kind
        self.options = options
        self.aliases = aliases


def container_mounts(layout: Layout) -> tuple[ContainerMount, ...]:
    """What a container's /sys/fs/cgroup holds: on v2 one cgroup2 mount; else a tmpfs with one mount a tree, and links for co-mounted controllers."""
    if layout.kind == "v2":
        return (ContainerMount(name="", kind="cgroup2", options=""),)
    mounts = []
    for tree in layout.hierarchies:
        name = tree.directory.rpartition("/")[2]
        if tree.version == 2:
            mounts.append(ContainerMount(name=name, kind="cgroup2", options=""))
            continue
        aliases = tuple(sorted(tree.controllers - {name})) if len(tree.controllers) > 1 else ()
        mounts.append(ContainerMount(name=name, kind="cgroup", options=tree.options, aliases=aliases))
    return tuple(mounts)
