"""Intel RDT: a share of cache and memory bandwidth for a container, as OCI's `linux.intelRdt` asks for it (pure).

A class of service is a directory of the resctrl file system, with a file `schemata` for its shares and a file `tasks` for who is
in it. What is to be made, compared, written and removed is said here; doing it is the launcher's caller's.

Source: OCI runtime-spec, config-linux.md, "IntelRdt"; kernel arch/x86/resctrl.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tare.cgroups.section import Section
from tare.errors import FailedPrecondition, InvalidArgument

MOUNT_POINT = "/sys/fs/resctrl"
LONGEST_NAME = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a container's start has to do.

    `group` is the class's directory ("" within the mount: the class of all). `lines` go to its schemata in order, where the class is made
    (`make` says whether it may be); where it is there, they must be what it has. `remove` says that the directory is the container's own and
    goes with it; `monitor` is the directory of its own counters, "" for none, which goes with it in any case.
    """

    group: str
    lines: tuple[str, ...]
    make: bool
    remove: bool
    monitor: str = ""


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
    for key in ("enableCMT", "enableMBM"):
        section.flag(key)
    monitored = section.flag("enableMonitoring") or False
    if mounted is None:
        hint = f"mount it where the processor has it: mount -t resctrl resctrl {MOUNT_POINT}"
        raise FailedPrecondition(
            "apply linux.intelRdt", cause="no resctrl file system is mounted on this node", hint=hint
        )
    group = mounted if own == "/" else f"{mounted}/{own}"
    monitor = f"{group}/mon_groups/{container_id}" if monitored else ""
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


def check(wanted: object, container_id: str, mounted: str | None) -> Share | None:
    """`share`, or None where nothing is asked for."""
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping):
        raise InvalidArgument("read linux.intelRdt", cause="is not an object")
    return share(wanted, container_id, mounted)
