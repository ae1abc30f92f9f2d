"""OCI `linux.resources` as writes to control group files, for v1 and v2 trees (pure).

    memory · cpu · blockio      one member each            writes     what a write is, and how one is undone
    resources                   the small ones, and all of it together

Which version a resource is written for depends on the tree that has its controller, so that on a hybrid machine memory
may be v1 and hugetlb v2. Opening the files, and the kernel's answer, are `manager`'s.

Source: OCI runtime-spec, config-linux.md, "Control groups"; kernel Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

from tare.cgroups import devices
from tare.cgroups.blockio import blkio, io
from tare.cgroups.cpu import cpu_v1, cpu_v2, cpuset
from tare.cgroups.memory import memory_v1, memory_v2, not_applied, room_wanted
from tare.cgroups.section import LARGEST, Section, present
from tare.cgroups.value import Value
from tare.cgroups.writes import Write, bounded
from tare.errors import FailedPrecondition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tare.cgroups.devices import Rule
    from tare.cgroups.memory import Room

    Make = Callable[[Section], list[Write]]

# What moves processes, changes what the tree is, or has a call of its own.
FORBIDDEN_UNIFIED = frozenset(
    f"cgroup.{name}" for name in ("procs", "threads", "subtree_control", "type", "kill", "freeze")
)
WORD = (1 << 32) - 1


class Plan(Value):
    """The writes in order, what was asked for of controllers that are not there, device rules, and what must be free for an update.

    `devices` are the rules that take a program (v2), `rules` all of them, whichever version has them.
    """

    __slots__ = ("devices", "room", "rules", "skipped", "writes")

    def __init__(
        self,
        writes: tuple[Write, ...],
        skipped: tuple[str, ...],
        devices: tuple[Rule, ...] = (),
        rules: tuple[Rule, ...] = (),
        room: Room | None = None,
    ) -> None:
        self.writes = writes
        self.skipped = skipped
        self.devices = devices
        self.rules = rules
        self.room = room


def plan(resources: Mapping[str, object], versions: Mapping[str, int]) -> Plan:
    """The writes for `linux.resources`. `versions` says for each controller that is there whether its tree is v1 or v2.

    Raises InvalidArgument for values that no kernel accepts, FailedPrecondition for what the version that is there cannot express.
    """
    whole = Section("linux.resources", resources)
    writes: list[Write] = []
    skipped = not_applied(whole)
    rules = devices.parse(whole.sections("devices"))
    if versions.get("devices") == 1:
        writes += [Write("devices", *line) for line in devices.lines(rules)]
    for member, choices in DOMAINS:
        if resources.get(member) is None:
            continue
        found = [(name, make) for version, (name, make) in choices.items() if versions.get(name) == version]
        if found:
            writes += found[0][1](whole)
            continue
        # The older version has every setting: it says whether anything is asked for.
        name, make = choices.get(1) or choices[2]
        if make(whole):
            skipped.append(choices[2][0] if 2 in choices and pure(versions) else name)
    writes += unified_writes(whole.section("unified"), versions)
    programmed = rules if versions.get("devices") != 1 else ()
    if programmed and 2 not in versions.values():
        skipped.append("devices")
        programmed = ()
    room = room_wanted(whole) if versions.get("memory") == 2 else None
    return Plan(tuple(writes), tuple(dict.fromkeys(skipped)), programmed, rules, room)


def pure(versions: Mapping[str, int]) -> bool:
    """Whether there is v2 alone."""
    return set(versions.values()) == {2}


def pids(whole: Section) -> list[Write]:
    """0 is not set, below 0 no limit; both versions name the file alike."""
    limit = present(whole, "pids").required("limit", -1, LARGEST)
    return [Write("pids", "pids.max", bounded(limit))] if limit else []


def hugetlb(version: int) -> Callable[[Section], list[Write]]:
    """Limits by page size ("2MB"), and the same on reservations where the kernel counts them."""
    ending = "limit_in_bytes" if version == 1 else "max"

    def writes(whole: Section) -> list[Write]:
        found = []
        for item in whole.sections("hugepageLimits"):
            size, limit = item.text("pageSize"), item.integer("limit", 0, (1 << 64) - 1)
            if limit is None:
                raise item.wrong("limit", "is absent")
            if not page_size(size):
                raise item.wrong("pageSize", f"{size!r} is no size of pages such as 2MB")
            value = bounded(limit if limit <= LARGEST else -1) if version == 2 else str(min(limit, LARGEST))
            found.append(Write("hugetlb", f"hugetlb.{size}.{ending}", value))
            found.append(Write("hugetlb", f"hugetlb.{size}.rsvd.{ending}", value, "ignore"))
        return found

    return writes


def page_size(text: str) -> bool:
    """Whether it is a number with one of the units of bytes that the kernel names pages by ("64KB", "2MB", "1GB")."""
    number, unit = text[:-2], text[-2:]
    return unit in ("KB", "MB", "GB") and number.isascii() and number.isdecimal()


def rdma(whole: Section) -> list[Write]:
    """By device; both versions name the file alike."""
    writes = []
    for device, item in present(whole, "rdma").members().items():
        if not device or device.split() != [device]:
            raise item.wrong("", f"{device!r} is no name of a device")
        handles, objects = item.integer("hcaHandles", 0, WORD), item.integer("hcaObjects", 0, WORD)
        words = [f"hca_handle={handles}"] if handles is not None else []
        words += [f"hca_object={objects}"] if objects is not None else []
        if not words:
            raise item.wrong("hcaHandles", "there is neither hcaHandles nor hcaObjects")
        writes.append(Write("rdma", "rdma.max", " ".join([device, *words])))
    return writes


def net_cls(whole: Section) -> list[Write]:
    """The class of packets (v1 alone)."""
    number = present(whole, "network").integer("classID", 0, WORD)
    return [Write("net_cls", "net_cls.classid", str(number))] if number is not None else []


def net_prio(whole: Section) -> list[Write]:
    """Priorities by interface (v1 alone)."""
    writes = []
    for item in present(whole, "network").sections("priorities"):
        name = item.text("name")
        if name.split() != [name]:
            raise item.wrong("name", f"{name!r} is no name of an interface")
        writes.append(Write("net_prio", "net_prio.ifpriomap", f"{name} {item.required('priority', 0, WORD)}"))
    return writes


def unified_writes(unified: Section | None, versions: Mapping[str, int]) -> list[Write]:
    """v2 files by name, a write for each line. Those that move processes or change what the tree is are refused.

    Raises FailedPrecondition for a controller that v2 does not have here, as the specification asks.
    """
    writes: list[Write] = []
    if unified is None:
        return writes
    for key, value in unified.paragraphs().items():
        controller, dot, file = key.partition(".")
        if not controller or not dot or not file or "/" in key or key in FORBIDDEN_UNIFIED:
            raise unified.wrong(key, "is not the name of a limit in a v2 control group")
        if versions.get(controller) != 2:
            cause = f"there is no controller {controller} of version 2 on this node"
            raise FailedPrecondition(f"apply {unified.path}.{key}", cause=cause)
        lines = [line for line in value.splitlines() if line.strip()] or [value]
        writes += [Write(controller, key, line, "refuse") for line in lines]
    return writes


DOMAINS: tuple[tuple[str, dict[int, tuple[str, Make]]], ...] = (
    ("memory", {1: ("memory", memory_v1), 2: ("memory", memory_v2)}),
    ("cpu", {1: ("cpu", cpu_v1), 2: ("cpu", cpu_v2)}),
    ("cpu", {1: ("cpuset", cpuset), 2: ("cpuset", cpuset)}),
    ("blockIO", {1: ("blkio", blkio), 2: ("io", io)}),
    ("pids", {1: ("pids", pids), 2: ("pids", pids)}),
    ("hugepageLimits", {1: ("hugetlb", hugetlb(1)), 2: ("hugetlb", hugetlb(2))}),
    ("rdma", {1: ("rdma", rdma), 2: ("rdma", rdma)}),
    ("network", {1: ("net_cls", net_cls)}),
    ("network", {1: ("net_prio", net_prio)}),
)
"""(member of linux.resources, {version: (controller, what makes its writes)})."""
