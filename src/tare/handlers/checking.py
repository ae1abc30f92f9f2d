"""What members of an OCI configuration say of one another, after `schema` has had their types and ranges: checks with the JSON path in the error.

A bundle's config.json is checked whole before anything is made of it (`tare oci`). What the daemon puts together itself is right by
construction; where somebody else has had a hand in it (CDI files, plugins) it is checked again. Pure: nothing is opened.
"""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.handlers.schema import CONFIG, PROCESS, RESOURCES
from tare.handlers.shapes import UINT32, InvalidConfig, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Config = Mapping[str, Any]

IPC_SETTINGS = frozenset(
    f"kernel.{name}"
    for name in (
        *("auto_msgmni", "msg_next_id", "msgmax", "msgmnb", "msgmni", "sem", "sem_next_id"),
        *("shm_next_id", "shm_rmid_forced", "shmall", "shmmax", "shmmni"),
    )
)


def check(config: Any) -> None:
    """Raise InvalidConfig for a configuration that no container can be made from, with the path that is wrong."""
    CONFIG(config, "")
    check_version(config["ociVersion"])
    check_relations(config)


def check_edited(doing: str, config: Config) -> None:
    """The same for one of the daemon's that others have edited. A filter is checked where it is compiled. Raises InvalidArgument."""
    try:
        linux = {name: value for name, value in (config.get("linux") or {}).items() if name != "seccomp"}
        CONFIG({**config, "linux": linux}, "")
        check_relations(config)
    except InvalidConfig as error:
        raise InvalidArgument(doing, cause=f"{error.path}: {error.problem}") from error


def check_relations(config: Config) -> None:
    """What the parts of a configuration say of one another."""
    linux = config.get("linux") or {}
    check_process_relations(config["process"], "process")
    kinds = check_namespaces(linux)
    check_names(config, kinds)
    check_mappings(linux, kinds)
    check_mounts(config.get("mounts") or ())
    check_offsets(linux, kinds)
    check_settings(linux.get("sysctl") or {}, kinds)
    check_devices(linux)


def check_process(process: Any, path: str = "process") -> None:
    """The same for a process object alone, as `exec` takes it."""
    PROCESS(process, path)
    check_process_relations(process, path)


def check_resources(resources: Any) -> None:
    """The same for a resources object alone, as `update` takes it."""
    RESOURCES(resources, "")


def check_version(version: str) -> None:
    """Semantic versioning 2.0.0, of the specification's first major version."""
    numbers = version.partition("+")[0].partition("-")[0].split(".")
    whole = all(part.isascii() and part.isdecimal() and (part == "0" or part[0] != "0") for part in numbers)
    if len(numbers) != 3 or not whole:
        raise InvalidConfig("ociVersion", f"{show(version)} is not a version such as 1.2.0")
    if numbers[0] != "1":
        raise InvalidConfig("ociVersion", f"{version} is not a version 1 of the specification")


def check_process_relations(process: Config, path: str) -> None:
    """Limits once each and in order, a scheduler whose numbers fit its policy, a first argument."""
    seen: set[str] = set()
    for index, limit in enumerate(process.get("rlimits") or ()):
        where = f"{path}.rlimits[{index}]"
        if limit["type"] in seen:
            raise InvalidConfig(f"{where}.type", f"{limit['type']} is there twice")
        seen.add(limit["type"])
        if limit["soft"] > limit["hard"]:
            raise InvalidConfig(f"{where}.soft", f"{limit['soft']} is more than the hard limit {limit['hard']}")
    if not process["args"][0]:
        raise InvalidConfig(f"{path}.args[0]", "is empty")
    scheduler = process.get("scheduler")
    if scheduler is not None:
        check_scheduler(scheduler, f"{path}.scheduler")


def check_scheduler(scheduler: Config, path: str) -> None:
    """Which numbers go with which policy (sched_setattr(2))."""
    policy = scheduler["policy"]
    realtime = policy in ("SCHED_FIFO", "SCHED_RR")
    if realtime and not scheduler.get("priority"):
        raise InvalidConfig(f"{path}.priority", f"{policy} needs one from 1 to 99")
    if not realtime and scheduler.get("priority"):
        raise InvalidConfig(f"{path}.priority", f"{policy} has none")
    for name in ("runtime", "deadline", "period"):
        if scheduler.get(name) and policy != "SCHED_DEADLINE":
            raise InvalidConfig(f"{path}.{name}", f"{policy} has none")
    if policy == "SCHED_DEADLINE" and not scheduler.get("runtime"):
        raise InvalidConfig(f"{path}.runtime", "SCHED_DEADLINE needs one")


def check_namespaces(linux: Config) -> dict[str, str]:
    """Kind → path ("" for a new one): each once, by an absolute path."""
    kinds: dict[str, str] = {}
    for index, item in enumerate(linux.get("namespaces") or ()):
        where = f"linux.namespaces[{index}]"
        kind, path = item["type"], item.get("path") or ""
        if kind in kinds:
            raise InvalidConfig(f"{where}.type", f"there are two of type {kind}")
        if path and not path.startswith("/"):
            raise InvalidConfig(f"{where}.path", f"{show(path)} is not an absolute path")
        kinds[kind] = path
    return kinds


def check_names(config: Config, kinds: dict[str, str]) -> None:
    """Host and domain name belong to a UTS namespace."""
    for name in ("hostname", "domainname"):
        if config.get(name) and "uts" not in kinds:
            raise InvalidConfig(name, "would be the node's: linux.namespaces has no uts namespace")


def check_mappings(linux: Config, kinds: dict[str, str]) -> None:
    """A new user namespace has both mappings, and no number is mapped twice."""
    for name in ("uidMappings", "gidMappings"):
        mappings = linux.get(name) or ()
        if mappings and "user" not in kinds:
            raise InvalidConfig(f"linux.{name}", "linux.namespaces has no user namespace")
        if not mappings and kinds.get("user") == "":
            raise InvalidConfig(f"linux.{name}", "a new user namespace needs them")
        check_overlaps(mappings, f"linux.{name}")


def check_overlaps(mappings: Any, path: str) -> None:
    """Ranges within 32 bits, apart from one another on both sides."""
    for side in ("containerID", "hostID"):
        for index, item in enumerate(mappings):
            where = f"{path}[{index}]"
            first, past = item[side], item[side] + item["size"]
            if past > UINT32:
                raise InvalidConfig(f"{where}.size", f"{side} goes past {UINT32}")
            for before, other in enumerate(mappings[:index]):
                if first < other[side] + other["size"] and other[side] < past:
                    raise InvalidConfig(f"{where}.{side}", f"the range overlaps that of {path}[{before}]")


def check_mounts(mounts: Any) -> None:
    """A bind mount has a source, any other a type; both mappings or none."""
    for index, mount in enumerate(mounts):
        where = f"mounts[{index}]"
        options = mount.get("options") or ()
        bind = mount.get("type") == "bind" or "bind" in options or "rbind" in options
        if bind and not mount.get("source"):
            raise InvalidConfig(f"{where}.source", "a bind mount needs one")
        if not bind and not mount.get("type"):
            raise InvalidConfig(f"{where}.type", "is required where the mount is no bind mount")
        mapped = [name for name in ("uidMappings", "gidMappings") if mount.get(name)]
        if len(mapped) == 1:
            missing = "gidMappings" if mapped == ["uidMappings"] else "uidMappings"
            raise InvalidConfig(f"{where}.{missing}", f"is required beside {mapped[0]}")
        for name in mapped:
            check_overlaps(mount[name], f"{where}.{name}")


def check_offsets(linux: Config, kinds: dict[str, str]) -> None:
    """Clocks can be set off only in a new time namespace."""
    if linux.get("timeOffsets") and kinds.get("time") != "":
        raise InvalidConfig("linux.timeOffsets", "linux.namespaces has no new time namespace")


def check_settings(settings: Config, kinds: dict[str, str]) -> None:
    """Only settings of a namespace that is the container's, never the node's."""
    for name in settings:
        path = f"linux.sysctl.{name}"
        kind = setting_kind(name)
        if kind is None:
            raise InvalidConfig(path, "belongs to no namespace: it would be the node's")
        if kind not in kinds:
            raise InvalidConfig(path, f"would be the node's: linux.namespaces has no {kind} namespace")


def setting_kind(name: str) -> str | None:
    """The kind of namespace that a kernel setting belongs to, None for the node's own and for what is no setting's name."""
    dotted = name.replace("/", ".")
    if not all(dotted.split(".")):
        return None
    if dotted.startswith("net."):
        return "network"
    if dotted in IPC_SETTINGS or dotted.startswith("fs.mqueue."):
        return "ipc"
    return "uts" if dotted in ("kernel.domainname", "kernel.hostname") else None


def check_devices(linux: Config) -> None:
    """A node has its numbers, a FIFO needs none; no two at one path."""
    seen: set[str] = set()
    for index, device in enumerate(linux.get("devices") or ()):
        where = f"linux.devices[{index}]"
        if device["type"] != "p":
            for name in ("major", "minor"):
                if device.get(name) is None:
                    raise InvalidConfig(f"{where}.{name}", "is required")
        path = os.path.normpath(device["path"])
        if path in seen:
            raise InvalidConfig(f"{where}.path", f"{show(path)} is there twice")
        seen.add(path)
