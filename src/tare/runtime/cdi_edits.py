"""What CDI changes in a container's OCI configuration (pure, but for `look`, which stats device nodes).

Source: Container Device Interface specification 1.1.0, "OCI Edits". What the container had for a path or a variable gives way.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tare.errors import FailedPrecondition, NotFound
from tare.runtime.cdi_spec import DeviceNode, Edits, Hook, IntelRdt, Mount
from tare.runtime.spec_types import Spec

TYPES = {stat.S_IFBLK: "b", stat.S_IFCHR: "c", stat.S_IFIFO: "p"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A device node of which all is known. `access` is of "rwm"; owners that are None are the container's user."""

    path: str
    type: str
    major: int
    minor: int
    mode: int | None
    uid: int | None
    gid: int | None
    access: str


def look(edits: Edits) -> tuple[Node, ...]:
    """The device nodes of edits, with what they leave open taken from the node's own. Touches paths of the node: call it in a thread.

    Raises NotFound for a device that is absent and not described, FailedPrecondition for one that is of another type.
    """
    return tuple(node(device) for device in edits.device_nodes)


def node(device: DeviceNode) -> Node:
    """One device."""
    path = device.host_path or device.path
    described = device.type != "" and (device.major != 0 or device.type == "p")
    doing = f"give the container CDI device node {device.path}"
    kind, major, minor, mode = device.type, device.major, device.minor, device.file_mode
    try:
        status = os.stat(path)
    except OSError as error:
        if not described:
            raise NotFound(doing, cause=error) from error
    else:
        found = TYPES.get(stat.S_IFMT(status.st_mode))
        if not described and (found is None or kind not in ("", found, "u" if found == "c" else found)):
            what = f"a device of type {found}" if found else "no device"
            raise FailedPrecondition(doing, cause=f"{path} is {what}, not one of type {kind or 'b, c or p'}")
        mode = stat.S_IMODE(status.st_mode) if mode is None and found else mode
        if not described:
            kind = kind or found or ""
            if kind != "p" and not major:
                major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    access = {"": "rwm", "none": ""}.get(device.permissions, device.permissions)
    return Node(
        path=device.path, type=kind, major=major, minor=minor, mode=mode, uid=device.uid, gid=device.gid, access=access
    )


def apply(spec: Spec, edits: Edits, nodes: Sequence[Node]) -> Spec:
    """The configuration with edits made; the one that is given is left as it is. `nodes` are those of `look`."""
    if edits.net_devices:
        names = ", ".join(device.host_interface_name for device in edits.net_devices)
        raise FailedPrecondition("give the container CDI devices", cause=f"netDevices are not supported ({names})")
    result: Spec = dict(spec)
    linux: dict[str, Any] = dict(result.get("linux") or {})
    process: dict[str, Any] = dict(result.get("process") or {})
    if edits.env:
        process["env"] = with_variables(process.get("env") or [], edits.env)
    gids = [gid for gid in edits.additional_gids if gid]
    if gids:
        user = dict(process.get("user") or {})
        user["additionalGids"] = list(dict.fromkeys([*(user.get("additionalGids") or []), *gids]))
        process["user"] = user
    if nodes:
        linux["devices"] = with_devices(linux.get("devices") or [], nodes, process.get("user") or {})
        resources = dict(linux.get("resources") or {})
        resources["devices"] = [*(resources.get("devices") or []), *rules(nodes)]
        linux["resources"] = resources
    if edits.intel_rdt is not None:
        linux["intelRdt"] = rdt(edits.intel_rdt)
    if edits.mounts:
        mapped = any(item.get("type") == "user" for item in linux.get("namespaces") or [])
        result["mounts"] = with_mounts(result.get("mounts") or [], edits.mounts, mapped=mapped)
    if edits.hooks:
        result["hooks"] = with_hooks(result.get("hooks") or {}, edits.hooks)
    for key, value in (("process", process), ("linux", linux)):
        if value:
            result[key] = value
    return result


def with_variables(env: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Variables by name: a new value is in the old one's place."""
    found = {entry.partition("=")[0]: entry for entry in env}
    found.update((entry.partition("=")[0], entry) for entry in wanted)
    return list(found.values())


def with_devices(
    devices: Iterable[Mapping[str, Any]], nodes: Sequence[Node], user: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """OCI devices by path."""
    found = {item["path"]: dict(item) for item in devices}
    for item in nodes:
        device: dict[str, Any] = {"path": item.path, "type": item.type}
        if item.type != "p":
            device |= {"major": item.major, "minor": item.minor}
        if item.mode is not None:
            device["fileMode"] = item.mode
        for key, own in (("uid", item.uid), ("gid", item.gid)):
            owner = user.get(key) if own is None else own
            if owner:
                device[key] = owner
        found[item.path] = device
    return list(found.values())


def rules(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """What the device cgroup allows besides."""
    return [
        {"allow": True, "type": "c" if item.type == "u" else item.type, "major": item.major, "minor": item.minor,
         "access": item.access}
        for item in nodes
        if item.type != "p" and item.access
    ]  # fmt: skip


def with_mounts(mounts: Iterable[Mapping[str, Any]], wanted: Sequence[Mount], *, mapped: bool) -> list[dict[str, Any]]:
    """OCI mounts by destination, parents before what lies in them. In a user namespace a bind is seen with the container's own IDs."""
    found = {posixpath.normpath(item["destination"]): dict(item) for item in mounts}
    for item in wanted:
        destination = posixpath.normpath(item.container_path)
        options = list(item.options)
        if mapped and {"bind", "rbind"} & set(options) and not {"idmap", "ridmap"} & set(options):
            options.append("idmap")
        mount: dict[str, Any] = {"destination": destination, "source": item.host_path, "options": options}
        if item.type:
            mount["type"] = item.type
        found.pop(destination, None)
        found[destination] = mount
    return sorted(found.values(), key=lambda item: len([name for name in item["destination"].split("/") if name]))


def with_hooks(hooks: Mapping[str, Any], wanted: Sequence[Hook]) -> dict[str, Any]:
    """OCI hooks by point, after those that are there."""
    found = {point: list(entries or []) for point, entries in hooks.items()}
    for item in wanted:
        hook: dict[str, Any] = {"path": item.path}
        if item.args:
            hook["args"] = list(item.args)
        if item.env:
            hook["env"] = list(item.env)
        if item.timeout is not None:
            hook["timeout"] = item.timeout
        found.setdefault(item.hook_name, []).append(hook)
    return found


def rdt(wanted: IntelRdt) -> dict[str, Any]:
    """OCI's intelRdt."""
    fields = {
        "closID": wanted.clos_id,
        "l3CacheSchema": wanted.l3_cache_schema,
        "memBwSchema": wanted.mem_bw_schema,
        "schemata": list(wanted.schemata),
        "enableCMT": wanted.enable_cmt,
        "enableMBM": wanted.enable_mbm,
        "enableMonitoring": wanted.enable_monitoring,
    }
    return {key: value for key, value in fields.items() if value}
