"""What plugins want of a container that is being made, put into its OCI configuration (pure).

    removals first · annotations, arguments, environment, hooks, limits on the process · mounts · devices and their rules · limits · the rest

What Tare cannot do is refused, and what is wrong too, here and not when the container starts: a plugin's word is as good as the request's, and
no better. Paths of the node are looked at by who calls (`Adjusted.sources`).
"""

from __future__ import annotations

import posixpath
import resource
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from tare.cgroups.resources import plan
from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers import attributes, options
from tare.handlers import hooks as handler_hooks
from tare.handlers.namespaces import Namespaces
from tare.nri import limits
from tare.nri.merge import bare
from tare.nri.v1 import nri_pb2 as pb
from tare.nri.view import POINTS
from tare.runtime import updating
from tare.runtime.cdi_edits import with_mounts, with_variables
from tare.runtime.cdi_spec import Mount
from tare.runtime.plugins import Adjusted
from tare.runtime.records import Resources
from tare.runtime.seccomp_profile import check_profile
from tare.runtime.spec_mounts import clean

DOING = "adjust the container as NRI plugins want it"
LIMIT_NAMES = tuple(name for name in dir(resource) if name.startswith("RLIMIT_"))
ALWAYS = (
    "mount",
    "user",
)  # namespaces that no plugin may choose: without the one nothing is a container's own, the other has to own the rest
SPREADING = {"rshared": "shared", "shared": "shared", "rslave": "slave", "slave": "slave"}
SCORES = (-1000, 1000)
HIGHEST_NUMBER = (1 << 31) - 1

Spec = dict[str, Any]


def adjusted(spec: Spec, adjust: pb.ContainerAdjustment, before: Resources, cgroup: str) -> Adjusted:
    """The configuration as plugins want it; the one that is given is left as it is. Raises InvalidArgument, FailedPrecondition."""
    refuse(adjust)
    linux = adjust.linux
    result = {**spec, "process": {**spec["process"]}, "linux": {**spec["linux"]}}
    result["annotations"] = entries(spec.get("annotations") or {}, adjust.annotations)
    process(result["process"], adjust)
    hooks(result, adjust)
    mounts(result, adjust)
    devices(result["linux"], linux)
    after = limited(result, linux, before)
    attached(result, linux)
    Namespaces(result).fresh()  # which is where a namespace or a sysctl that cannot be is refused
    binds = [item for item in adjust.mounts if not bare(item.destination)[1] and options.of(oci_mount(item)).bind]
    return Adjusted(
        spec=result,
        resources=after,
        cgroup=linux.cgroups_path or cgroup,
        devices=tuple(item.name for item in adjust.CDI_devices),
        sources=tuple(item.source for item in binds),
        spreading=tuple(
            (item.source, SPREADING[option]) for item in binds for option in item.options if option in SPREADING
        ),
    )


def refuse(adjust: pb.ContainerAdjustment) -> None:
    """Raise FailedPrecondition for what Tare does not do, and for what a newer NRI has that this version does not know."""
    if len(UnknownFieldSet(adjust)) or len(UnknownFieldSet(adjust.linux)):
        raise FailedPrecondition(DOING, cause="they set what this version of NRI (0.12) does not have")
    if adjust.linux.net_devices:
        names = ", ".join(bare(name)[0] for name in adjust.linux.net_devices)
        raise FailedPrecondition(DOING, cause=f"net_devices are not supported ({names})")
    if adjust.linux.HasField("memory_policy"):
        raise FailedPrecondition(DOING, cause="memory_policy is not supported")
    limits.check_classes(adjust.linux.resources)


def entries(before: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """A map with its changes: removals, then what is set."""
    removed = {key[1:] for key in given if bare(key)[1]}
    kept = {key: value for key, value in before.items() if key not in removed}
    return kept | {key: value for key, value in given.items() if not bare(key)[1]}


# The process


def process(own: dict[str, Any], adjust: pb.ContainerAdjustment) -> None:
    """Arguments, environment, limits, priorities."""
    if adjust.args:
        own["args"] = [checked(word, "an argument") for word in adjust.args]
    removed = {bare(item.key)[0] for item in adjust.env if bare(item.key)[1]}
    kept = [entry for entry in own.get("env") or () if entry.partition("=")[0] not in removed]
    own["env"] = with_variables(kept, [variable(item) for item in adjust.env if not bare(item.key)[1]])
    if adjust.rlimits:
        found = {item["type"]: item for item in own.get("rlimits") or ()}
        for item in adjust.rlimits:
            name, marked = bare(item.type)
            found.pop(name, None)
            if not marked:
                found[name] = rlimit(item)
        own["rlimits"] = list(found.values())
    priorities(own, adjust.linux)


def checked(text: str, what: str) -> str:
    """Raise InvalidArgument for what execve cannot pass on."""
    if "\0" in text:
        raise InvalidArgument(DOING, cause=f"{what} has a NUL byte in it: {text!r}")
    return text


def variable(item: pb.KeyValue) -> str:
    """NAME=value."""
    if not item.key or "=" in item.key:
        raise InvalidArgument(DOING, cause=f"{item.key!r} is not the name of a variable")
    return checked(f"{item.key}={item.value}", "the environment")


def rlimit(item: pb.POSIXRlimit) -> dict[str, Any]:
    """OCI's."""
    if item.type not in LIMIT_NAMES:
        raise InvalidArgument(DOING, cause=f"there is no limit {item.type!r}; there is RLIMIT_NOFILE, for one")
    if item.soft > item.hard:
        raise InvalidArgument(
            DOING, cause=f"{item.type}: the soft limit {item.soft} is above the hard one, {item.hard}"
        )
    return {"type": item.type, "soft": item.soft, "hard": item.hard}


def named(kind: Any, number: int) -> str:
    """OCI's word for a value of an enum, in which a message may have any number. Raises InvalidArgument for one that is none."""
    if number not in kind.values():
        raise InvalidArgument(DOING, cause=f"{number} is no {kind.DESCRIPTOR.name}")
    return str(kind.Name(number))


def priorities(own: dict[str, Any], linux: pb.LinuxContainerAdjustment) -> None:
    """Scheduler and I/O priority, checked as the handler will read them."""
    if linux.HasField("io_priority"):
        kind = getattr(linux.io_priority, "class")
        if kind == pb.IOPRIO_CLASS_NONE:
            own.pop("ioPriority", None)
        else:
            own["ioPriority"] = {"class": named(pb.IOPrioClass, kind), "priority": linux.io_priority.priority}
            attributes.io_priority(own["ioPriority"])
    if linux.HasField("scheduler"):
        if linux.scheduler.policy == pb.SCHED_NONE:
            own.pop("scheduler", None)
            return
        given = linux.scheduler
        numbers = {key: getattr(given, key) for key in ("nice", "priority", "runtime", "deadline", "period")}
        own["scheduler"] = {
            "policy": named(pb.LinuxSchedulerPolicy, given.policy),
            "flags": [named(pb.LinuxSchedulerFlag, flag) for flag in given.flags],
            **{key: number for key, number in numbers.items() if number},
        }
        attributes.scheduler(own["scheduler"])


def hooks(result: Spec, adjust: pb.ContainerAdjustment) -> None:
    """After those that are there."""
    found = {point: list(items or []) for point, items in (result.get("hooks") or {}).items()}
    for point, own in POINTS.items():
        for item in getattr(adjust.hooks, own):
            hook: dict[str, Any] = {"path": item.path, "args": list(item.args)}
            if item.env:
                hook["env"] = list(item.env)
            if item.HasField("timeout"):
                hook["timeout"] = item.timeout.value
            found.setdefault(point, []).append(hook)
    if found:
        result["hooks"] = found
        handler_hooks.parse(result)


# What is in the container's tree


def mounts(result: Spec, adjust: pb.ContainerAdjustment) -> None:
    """By destination; parents before what lies in them. The root propagates as far as they need it."""
    if not adjust.mounts:
        return
    removed = {posixpath.normpath(bare(item.destination)[0]) for item in adjust.mounts if bare(item.destination)[1]}
    kept = [item for item in result.get("mounts") or () if posixpath.normpath(item["destination"]) not in removed]
    added = [new_mount(item) for item in adjust.mounts if not bare(item.destination)[1]]
    mapped = any(item["type"] == "user" for item in result["linux"]["namespaces"])
    result["mounts"] = with_mounts(kept, added, mapped=mapped)
    spread = {SPREADING[option] for item in added for option in item.options if option in SPREADING}
    if spread and result["linux"].get("rootfsPropagation") != "rshared":
        result["linux"]["rootfsPropagation"] = "rshared" if "shared" in spread else "rslave"


def new_mount(item: pb.Mount) -> Mount:
    """One that a plugin adds."""
    doing = f"mount {item.destination!r}"
    destination = clean(doing, item.destination, "container_path")
    bind = options.of(oci_mount(item)).bind
    if not bind and not item.type:
        raise InvalidArgument(doing, cause="it has neither a type nor the option bind")
    source = clean(doing, item.source, "source") if bind else checked(item.source, "a mount's source")
    return Mount(host_path=source, container_path=destination, options=tuple(item.options), type=item.type)


def oci_mount(item: pb.Mount) -> dict[str, Any]:
    """As OCI has it."""
    return {"destination": item.destination, "type": item.type, "source": item.source, "options": list(item.options)}


def devices(own: dict[str, Any], linux: pb.LinuxContainerAdjustment) -> None:
    """Nodes by path, with the rules by which they may be used."""
    if not linux.devices:
        return
    found = {item["path"]: item for item in own.get("devices") or ()}
    rules = list((own.get("resources") or {}).get("devices") or ())
    for item in linux.devices:
        path, marked = bare(item.path)
        before = found.pop(path, None)
        if before is not None:
            rules = [rule for rule in rules if not only_for(rule, before)]
        if not marked:
            found[path] = new_device(item)
            access = "rwm" if item.type == "b" else "rw"
            if item.type != "p":
                kind = "c" if item.type == "u" else item.type
                rules.append({"allow": True, "type": kind, "major": item.major, "minor": item.minor, "access": access})
    own["devices"] = list(found.values())
    own["resources"] = {**(own.get("resources") or {}), "devices": rules}


def only_for(rule: Mapping[str, Any], device: Mapping[str, Any]) -> bool:
    """Whether a rule is there for this device alone."""
    numbers = (device.get("type"), device.get("major"), device.get("minor"))
    return bool(rule.get("allow")) and (rule.get("type"), rule.get("major"), rule.get("minor")) == numbers


def new_device(item: pb.LinuxDevice) -> dict[str, Any]:
    """One that a plugin adds."""
    doing = f"give the container device {item.path!r}"
    path = clean(doing, item.path, "container_path")
    if item.type not in ("c", "b", "u", "p"):
        raise InvalidArgument(doing, cause=f"its type {item.type!r} is none of c, b, u and p")
    device: dict[str, Any] = {"path": path, "type": item.type}
    if item.type != "p":
        if not (0 <= item.major <= HIGHEST_NUMBER and 0 <= item.minor <= HIGHEST_NUMBER):
            raise InvalidArgument(doing, cause=f"{item.major}:{item.minor} are no numbers of a device")
        device |= {"major": item.major, "minor": item.minor}
    for name, key in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
        if item.HasField(name):
            device[key] = getattr(item, name).value
    return device


# Limits, namespaces, confinement


def limited(result: Spec, linux: pb.LinuxContainerAdjustment, before: Resources) -> Resources:
    """The limits, and what the record says of them."""
    given = linux.resources
    after = limits.after(before, given)
    if linux.HasField("oom_score_adj"):
        score = linux.oom_score_adj.value
        if not SCORES[0] <= score <= SCORES[1]:
            raise InvalidArgument(DOING, cause=f"oom_score_adj {score} is not from {SCORES[0]} to {SCORES[1]}")
        after = limits.with_score(after, score)
    if after != before:
        updating.put_limits(result, after)
    if given.devices:
        own = result["linux"].setdefault("resources", {})
        own["devices"] = [*(own.get("devices") or ()), *(dict(limits.rule(item)) for item in given.devices)]
    if given.HasField("rdt_class"):
        share(result["linux"], {"closID": given.rdt_class.value} if given.rdt_class.value else None)
    if given.HasField("blockio_class"):
        result["linux"].get("resources", {}).pop("blockIO", None)  # "" has it taken away; another is refused
    # What limits can be on any node; whether this one has a controller for each is seen by the start, as of those of a request.
    plan({key: value for key, value in result["linux"].get("resources", {}).items() if key != "unified"}, {})
    return after


def attached(result: Spec, linux: pb.LinuxContainerAdjustment) -> None:
    """Namespaces, sysctls, the filter of system calls, RDT."""
    own = result["linux"]
    if linux.namespaces:
        own["namespaces"] = namespaces(own["namespaces"], linux.namespaces)
    if linux.sysctl:
        own["sysctl"] = entries(own.get("sysctl") or {}, linux.sysctl)
    if linux.HasField("seccomp_policy"):
        own["seccomp"] = seccomp(linux.seccomp_policy)
    if linux.HasField("rdt"):
        given = linux.rdt
        wanted = {} if given.remove else dict(own.get("intelRdt") or {})
        if given.HasField("clos_id"):
            wanted["closID"] = given.clos_id.value
        if given.HasField("schemata"):
            wanted["schemata"] = list(given.schemata.value)
        if given.HasField("enable_monitoring"):
            wanted["enableMonitoring"] = given.enable_monitoring.value
        share(own, wanted or None)
    if linux.cgroups_path:
        own["cgroupsPath"] = linux.cgroups_path


def share(own: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    """A share of cache and memory bandwidth, or none."""
    own.pop("intelRdt", None)
    if wanted is not None:
        own["intelRdt"] = wanted


def namespaces(before: Iterable[Mapping[str, str]], given: Iterable[pb.LinuxNamespace]) -> list[dict[str, str]]:
    """By type; one that is removed is the node's own from then on."""
    found = {item["type"]: dict(item) for item in before}
    for item in given:
        kind, marked = bare(item.type)
        if kind in ALWAYS:
            raise FailedPrecondition(DOING, cause=f"the {kind} namespace is not for plugins to choose")
        found.pop(kind, None)
        if not marked:
            found[kind] = {"type": kind, "path": item.path} if item.path else {"type": kind}
    return list(found.values())


def seccomp(given: pb.LinuxSeccomp) -> dict[str, Any]:
    """As OCI has it, checked; that it can be compiled is seen by who calls."""
    profile: dict[str, Any] = {"defaultAction": given.default_action}
    if given.HasField("default_errno"):
        profile["defaultErrnoRet"] = given.default_errno.value
    words = {"architectures": list(given.architectures), "flags": list(given.flags)}
    paths = {"listenerPath": given.listener_path, "listenerMetadata": given.listener_metadata}
    profile |= {key: value for key, value in {**words, **paths}.items() if value}
    calls = []
    for item in given.syscalls:
        call: dict[str, Any] = {"names": list(item.names), "action": item.action}
        if item.HasField("errno_ret"):
            call["errnoRet"] = item.errno_ret.value
        if item.args:
            call["args"] = [
                {"index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op} for arg in item.args
            ]
        calls.append(call)
    profile["syscalls"] = calls
    check_profile("of an NRI plugin", profile)
    return profile
