"""One file of the Container Device Interface: read and checked (pure).

    kind "vendor.com/class" · devices [{name, containerEdits}] · containerEdits (with any of them)

What the declared version does not have is refused, as is any field that no version has: a misspelt one must not be silently nothing.

Source: Container Device Interface specification 1.1.0, SPEC.md, "CDI JSON Specification".
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from typing import Any

import msgspec
import yaml

from tare.errors import InvalidArgument

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
KIND_PART = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
DEVICE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
LONGEST_VENDOR, LONGEST_CLASS, LONGEST_CLOSID = 253, 63, 4095
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
DEVICE_TYPES = ("", "b", "c", "u", "p")
MOST_VALUES = 100_000


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """An object of the file. Field names are the file's, in camel case there."""


class DeviceNode(Part, frozen=True):
    """A device to make; what is not said of it is taken from the node's own at `host_path`, or else at `path`."""

    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class NetDevice(Part, frozen=True):
    """A network interface of the node that moves into the container."""

    host_interface_name: str
    name: str


class Mount(Part, frozen=True):
    """OCI's mount."""

    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""


class Hook(Part, frozen=True):
    """OCI's hook; `timeout` in seconds."""

    hook_name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class IntelRdt(Part, frozen=True):
    """OCI's intelRdt."""

    clos_id: str = msgspec.field(name="closID", default="")
    l3_cache_schema: str = msgspec.field(name="l3CacheSchema", default="")
    mem_bw_schema: str = ""
    enable_cmt: bool = msgspec.field(name="enableCMT", default=False)
    enable_mbm: bool = msgspec.field(name="enableMBM", default=False)
    schemata: tuple[str, ...] = ()
    enable_monitoring: bool = False


class Edits(Part, frozen=True):
    """What is changed in a container's OCI configuration."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    net_devices: tuple[NetDevice, ...] = ()
    hooks: tuple[Hook, ...] = ()
    mounts: tuple[Mount, ...] = ()
    intel_rdt: IntelRdt | None = None
    additional_gids: tuple[int, ...] = ()

    def __add__(self, other: Edits) -> Edits:
        """Both, in this order; of two settings for cache and bandwidth the later."""
        return Edits(
            env=self.env + other.env,
            device_nodes=self.device_nodes + other.device_nodes,
            net_devices=self.net_devices + other.net_devices,
            hooks=self.hooks + other.hooks,
            mounts=self.mounts + other.mounts,
            intel_rdt=other.intel_rdt or self.intel_rdt,
            additional_gids=self.additional_gids + other.additional_gids,
        )


class Device(Part, frozen=True):
    """A device that can be asked for."""

    name: str
    annotations: dict[str, str] = {}
    container_edits: Edits = Edits()


class File(Part, frozen=True):
    """A whole file."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...]
    annotations: dict[str, str] = {}
    container_edits: Edits = Edits()

    @property
    def edits(self) -> Iterator[Edits]:
        """The edits of all, and of each device."""
        yield self.container_edits
        yield from (device.container_edits for device in self.devices)


class Unique(yaml.SafeLoader):
    """YAML's plain types, without keys that are there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping's keys and values."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def parse(path: str, text: bytes) -> File:
    """The file of that name, JSON or YAML by its ending. Raises InvalidArgument with the JSON path that is wrong."""
    doing = f"read CDI file {path}"
    try:
        value = json.loads(text, object_pairs_hook=unique) if path.endswith(".json") else yaml.load(text, Unique)
        bounded(value)
        file = msgspec.convert(present(value), File)
    except (ValueError, RecursionError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise InvalidArgument(doing, cause=" ".join(str(error).split())) from error
    check(doing, file)
    return file


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without keys that are there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def bounded(value: object) -> None:
    """Raise ValueError for what YAML's aliases made too large to look at, and for text that the kernel cannot take."""
    pending, count = [value], 0
    while pending:
        item = pending.pop()
        inner = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []
        count += 1 + len(inner)
        if isinstance(item, str) and "\0" in item:
            raise ValueError(f"there is a NUL byte in {item!r}")
        if count > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values")
        pending += inner


def present(value: Any) -> Any:
    """Without members that are null, which count as absent."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    return [present(item) for item in value] if isinstance(value, list) else value


def check(doing: str, file: File) -> None:
    """Raise InvalidArgument for what no types express."""
    version = file.cdi_version.removeprefix("v")
    if version not in VERSIONS:
        raise InvalidArgument(doing, cause=f"cdiVersion {file.cdi_version!r} is none of {', '.join(VERSIONS)}")
    vendor, _, class_name = file.kind.partition("/")
    if not is_kind(vendor, class_name):
        raise InvalidArgument(doing, cause=f"kind {file.kind!r} is not vendor/class")
    if not file.devices:
        raise InvalidArgument(doing, cause="devices is empty")
    names = [device.name for device in file.devices]
    for name in names:
        if not DEVICE_NAME.fullmatch(name):
            raise InvalidArgument(doing, cause=f"{name!r} is no name of a device")
        if names.count(name) > 1:
            raise InvalidArgument(doing, cause=f"device {name!r} is there twice")
    needed = needed_version(file)
    if VERSIONS.index(needed) > VERSIONS.index(version):
        raise InvalidArgument(doing, cause=f"it uses what cdiVersion {needed} brought, and says {version}")
    for index, edits in enumerate(file.edits):
        where = f"devices[{index - 1}].containerEdits" if index else "containerEdits"
        problem = problem_of(edits)
        if problem:
            raise InvalidArgument(doing, cause=f"{where}.{problem}")


def is_kind(vendor: str, class_name: str) -> bool:
    """Whether these are names of a vendor and of a class of devices."""
    lengths = len(vendor) <= LONGEST_VENDOR and len(class_name) <= LONGEST_CLASS
    return lengths and bool(KIND_PART.fullmatch(vendor) and KIND_PART.fullmatch(class_name))


def needed_version(file: File) -> str:
    """The version that brought the newest of what a file uses."""
    edits = list(file.edits)
    rdt = [item.intel_rdt for item in edits if item.intel_rdt is not None]
    uses = {
        "1.1.0": any(item.net_devices for item in edits) or any(i.schemata or i.enable_monitoring for i in rdt),
        "0.7.0": bool(rdt) or any(item.additional_gids for item in edits),
        "0.6.0": bool(file.annotations)
        or any(d.annotations for d in file.devices)
        or "." in file.kind.partition("/")[2],
        "0.5.0": any(d.name[0].isdigit() for d in file.devices)
        or any(n.host_path for e in edits for n in e.device_nodes),
        "0.4.0": any(mount.type for item in edits for mount in item.mounts),
    }
    return next((version for version, used in uses.items() if used), VERSIONS[0])


def problem_of(edits: Edits) -> str:
    """What is wrong with edits, as a path and words; "" where nothing is."""
    for index, entry in enumerate(edits.env):
        if not is_variable(entry):
            return f"env[{index}]: {entry!r} is not NAME=value"
    for index, node in enumerate(edits.device_nodes):
        if problem := node_problem(node):
            return f"deviceNodes[{index}]: {problem}"
    for index, hook in enumerate(edits.hooks):
        if problem := hook_problem(hook):
            return f"hooks[{index}]: {problem}"
    for index, mount in enumerate(edits.mounts):
        if not mount.host_path or not mount.container_path.startswith("/"):
            return f"mounts[{index}]: it needs a hostPath, and a containerPath that is absolute"
    for index, gid in enumerate(edits.additional_gids):
        if not 0 <= gid < 1 << 32:
            return f"additionalGids[{index}]: {gid} is no group"
    names = [name for device in edits.net_devices for name in (device.host_interface_name, device.name)]
    if not all(names) or any(len(set(column)) < len(column) for column in (names[::2], names[1::2])):
        return "netDevices: a name is empty or there twice"
    return rdt_problem(edits.intel_rdt) if edits.intel_rdt is not None else ""


def is_variable(entry: str) -> bool:
    """ "NAME=value"."""
    return entry.find("=") > 0 and "\0" not in entry


def node_problem(node: DeviceNode) -> str:
    """What is wrong with a device node."""
    if not node.path.startswith("/") or (node.host_path and not node.host_path.startswith("/")):
        return f"path {node.path!r} or hostPath {node.host_path!r} is not absolute"
    if node.type not in DEVICE_TYPES:
        return f"type {node.type!r} is none of b, c, u and p"
    if node.permissions != "none" and not set(node.permissions) <= set("rwm"):
        return f"permissions {node.permissions!r} are not of r, w and m"
    for name, number, most in (("major", node.major, 32), ("minor", node.minor, 32), ("uid", node.uid, 32), ("gid", node.gid, 32),
                               ("fileMode", node.file_mode, 32)):  # fmt: skip
        if number is not None and not 0 <= number < 1 << most:
            return f"{name} {number} is out of range"
    return ""


def hook_problem(hook: Hook) -> str:
    """What is wrong with a hook."""
    if hook.hook_name not in HOOKS:
        return f"hookName {hook.hook_name!r} is none of {', '.join(HOOKS)}"
    if not hook.path.startswith("/"):
        return f"path {hook.path!r} is not absolute"
    if hook.timeout is not None and hook.timeout <= 0:
        return f"timeout {hook.timeout} is not more than 0"
    return "" if all(is_variable(entry) for entry in hook.env) else "env is not NAME=value"


def rdt_problem(rdt: IntelRdt) -> str:
    """What is wrong with settings for cache and bandwidth. "/" is the class that all are in that have no other."""
    name = rdt.clos_id
    if name != "/" and (name in (".", "..") or "/" in name or "\n" in name or len(name) > LONGEST_CLOSID):
        return f"intelRdt.closID: {name!r} is no name of a class"
    return ""
