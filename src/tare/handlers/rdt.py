"""Intel RDT: a share of cache and memory bandwidth for a container, as OCI's `linux.intelRdt` asks for it.

A class of service is a directory of the resctrl file system, with a file `schemata` for its shares and a file `tasks` for who is in it;
below it are directories with counters of some of those. What they come to is said by `share` (pure); `apply` and `remove` do it, but for
joining, which is the container's process's own act, as with control groups.

Source: OCI runtime specification 1.2 (and 1.3 for `schemata` and `enableMonitoring`), config-linux.md, "IntelRdt"; kernel filesystems/resctrl.rst.
"""

from __future__ import annotations

import os

from tare.cgroups.section import Section
from tare.errors import FailedPrecondition, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

MOUNT_POINT = "/sys/fs/resctrl"
LONGEST_NAME = 255


class Share:
    """What a container's start has to do.

    `group` is the class's directory. `lines` go to its schemata in order, where the class is made (`make` says whether it may be); where it
    is there, they must be what it has. `remove` says that the directory is the container's own and goes with it; `monitor` is the directory
    of its own counters, "" for none, which goes with it in any case.
    """

    __slots__ = ("group", "lines", "make", "monitor", "remove")

    def __init__(self, *, group: str, lines: tuple[str, ...], make: bool, remove: bool, monitor: str = "") -> None:
        self.group = group
        self.lines = lines
        self.make = make
        self.remove = remove
        self.monitor = monitor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Share) and all(getattr(self, key) == getattr(other, key) for key in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Share({', '.join(f'{key}={getattr(self, key)!r}' for key in self.__slots__)})"

    @property
    def joins(self) -> tuple[str, ...]:
        """The files that the container's process writes itself into, in order."""
        return (f"{self.group}/tasks", *([f"{self.monitor}/tasks"] if self.monitor else []))


def share(wanted: Mapping[str, object], container_id: str, mounted: str | None) -> Share:
    """What `linux.intelRdt` comes to; `mounted` is where resctrl is mounted.

    Raises InvalidArgument with the JSON path that is wrong, FailedPrecondition where resctrl is not mounted.
    """
    section = Section("linux.intelRdt", wanted)
    name = section.text("closID")
    lines = schemata(section, wanted)
    own = name or container_id
    if own != "/":
        check_name(section, own)
    # The first two are of 1.2, where the kernel has no switch for either: both are what a group of counters shows.
    monitored = [section.flag(key) for key in ("enableCMT", "enableMBM", "enableMonitoring")]
    if mounted is None:
        hint = f"mount it where the processor has it: mount -t resctrl resctrl {MOUNT_POINT}"
        raise FailedPrecondition(
            "apply linux.intelRdt", cause="no resctrl file system is mounted on this node", hint=hint
        )
    group = mounted if own == "/" else f"{mounted}/{own}"
    monitor = f"{group}/mon_groups/{container_id}" if any(monitored) else ""
    return Share(group=group, lines=lines, make=not name or bool(lines), remove=not name, monitor=monitor)


def schemata(section: Section, wanted: Mapping[str, object]) -> tuple[str, ...]:
    """The lines for the file: cache, then bandwidth, then any others."""
    lines = [line for line in (section.text("l3CacheSchema"), section.text("memBwSchema")) if line]
    bandwidth = section.text("memBwSchema")
    if bandwidth and not bandwidth.startswith("MB:"):
        raise section.wrong("memBwSchema", f"{bandwidth!r} does not start with MB:")
    more = wanted.get("schemata")
    if more is not None and not isinstance(more, list | tuple):
        raise section.wrong("schemata", "is not a list")
    for index, line in enumerate(more or ()):
        if not isinstance(line, str) or not line or "\n" in line:
            raise section.wrong(f"schemata[{index}]", f"{line!r} is not one line of text")
        lines.append(line)
    return tuple(lines)


def check_name(section: Section, name: str) -> None:
    """Raise InvalidArgument for what names no class of its own."""
    reserved = (".", "..", "info", "mon_data", "mon_groups")
    if name in reserved or "/" in name or len(name) > LONGEST_NAME:
        raise section.wrong("closID", f"{name!r} is no name of a class of service")


def check_existing(wanted: Share, found: str | None) -> None:
    """`found` is the text of the class's schemata, None where it does not exist. Raises FailedPrecondition where it is not as the share says.

    What the file has in another spelling (blanks, zeros before a mask, domains in another order) is the same.
    """
    doing = f"put the container into class of service {wanted.group}"
    if found is None:
        if not wanted.make:
            raise FailedPrecondition(doing, cause="it does not exist, and linux.intelRdt has no schema to make it with")
        return
    if wanted.remove:
        raise FailedPrecondition(doing, cause="it exists already, and is to be the container's own")
    have = dict(parsed(line) for line in found.splitlines() if ":" in line)
    for line in wanted.lines:
        resource, domains = parsed(line)
        if any(have.get(resource, {}).get(domain) != value for domain, value in domains.items()):
            raise FailedPrecondition(doing, cause=f"its schemata {found.strip()!r} does not say {line!r}")


def parsed(line: str) -> tuple[str, dict[str, str]]:
    """("L3", {"0": "f", "1": "ff"}) of "L3:0=f;1=0ff"."""
    resource, _, rest = line.partition(":")
    domains = {}
    for part in rest.split(";"):
        domain, _, value = part.partition("=")
        domains[domain.strip().lstrip("0") or "0"] = value.strip().lower().lstrip("0") or "0"
    return resource.strip(), domains


def mounted_at(mountinfo: str) -> str | None:
    """Where resctrl is mounted, from the text of /proc/self/mountinfo; None where it is not."""
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        if separator and after.split(" ")[0] == "resctrl":
            return before.split(" ")[4]
    return None


def wanted_by(spec: Mapping[str, object]) -> Mapping[str, object] | None:
    """`linux.intelRdt` of a configuration."""
    linux = spec.get("linux")
    wanted = linux.get("intelRdt") if isinstance(linux, dict) else None
    if wanted is not None and not isinstance(wanted, dict):
        raise InvalidArgument("read linux.intelRdt", cause="is not an object")
    return wanted


def of(spec: Mapping[str, object], container_id: str, mountinfo: str = "/proc/self/mountinfo") -> Share | None:
    """The share that a configuration asks for; None where it asks for none. Raises as `share`."""
    wanted = wanted_by(spec)
    if wanted is None:
        return None
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        return share(wanted, container_id, mounted_at(file.read()))


def apply(wanted: Share) -> None:
    """Have the class of service and the group of counters. What was made is removed where the rest fails. Raises FailedPrecondition."""
    check_existing(wanted, schemata_of(wanted.group))
    made: list[str] = []
    try:
        if not os.path.isdir(wanted.group):
            os.mkdir(wanted.group, 0o755)
            made.append(wanted.group)
            for line in wanted.lines:
                write(f"{wanted.group}/schemata", line + "\n")
        if wanted.monitor:
            os.mkdir(wanted.monitor, 0o755)
            made.append(wanted.monitor)
    except OSError as error:
        for directory in reversed(made):
            os.rmdir(directory)
        raise FailedPrecondition(f"make class of service {wanted.group}", cause=explain(error, wanted.group)) from error


def remove(wanted: Share) -> None:
    """What is the container's own goes. Idempotent. Raises OSError."""
    for directory in ([wanted.monitor] if wanted.monitor else []) + ([wanted.group] if wanted.remove else []):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue


def schemata_of(group: str) -> str | None:
    """The text of a class's schemata; None where there is no such class."""
    try:
        with open(f"{group}/schemata", encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return None


def write(path: str, text: str) -> None:
    """One write."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def explain(error: OSError, group: str) -> str:
    """The kernel's words; of a schema that it refuses, those in the file that it writes them to."""
    words = f"{error.strerror}: {error.filename}"
    try:
        with open(f"{os.path.dirname(group)}/info/last_cmd_status", encoding="utf-8") as file:
            said = file.read().strip()
    except OSError:
        return words
    return f"{words}: {said}" if said and said != "ok" else words
