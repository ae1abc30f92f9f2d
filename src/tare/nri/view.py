"""Pods and containers as NRI's messages (pure): what plugins are shown.

A container is shown as its OCI configuration has it, which is kept with its record: so what plugins have adjusted is there also after the
daemon was started anew. Text that is no UTF-8 (an environment may hold any bytes) is shown with marks in place of what is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from tare.nri import limits
from tare.nri.v1 import nri_pb2 as pb
from tare.runtime.plugins import Subject
from tare.runtime.records import ContainerRecord, ContainerState, PodRecord, ProfileType
from tare.runtime.store import PodFacts

STATES = {
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_STOPPED,
}
PROFILES = {
    ProfileType.RUNTIME_DEFAULT: pb.SecurityProfile.RUNTIME_DEFAULT,
    ProfileType.UNCONFINED: pb.SecurityProfile.UNCONFINED,
    ProfileType.LOCALHOST: pb.SecurityProfile.LOCALHOST,
}
KINDS = {"net": "network"}
POINTS = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}
"""OCI's names of the points at which hooks are run, and NRI's."""


def pod(record: PodRecord, facts: PodFacts | None) -> pb.PodSandbox:
    """A pod; `facts` are None once it is stopped."""
    config = record.config
    linux = pb.LinuxPodSandbox(cgroup_parent=config.cgroup_parent, cgroups_path=record.cgroup_parent)
    if config.overhead is not None:
        linux.pod_overhead.CopyFrom(limits.message(config.overhead))
    if config.resources is not None:
        linux.pod_resources.CopyFrom(limits.message(config.resources))
    pins = facts.pins if facts is not None else {}
    linux.namespaces.extend(pb.LinuxNamespace(type=KINDS.get(kind, kind), path=path) for kind, path in pins.items())
    return pb.PodSandbox(
        id=record.id,
        name=config.metadata.name,
        uid=config.metadata.uid,
        namespace=config.metadata.namespace,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.handler,
        linux=linux,
        pid=facts.pause.pid if facts is not None and facts.pause is not None else 0,
        ips=record.ips,
    )


def container(subject: Subject) -> pb.Container:
    """A container; it may not be on record yet, or any more."""
    record, spec = subject.container, subject.spec
    assert record is not None
    process: Mapping[str, Any] = spec.get("process") or {}
    user: Mapping[str, Any] = process.get("user") or {}
    config = record.config
    return pb.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        name=config.metadata.name,
        state=pb.CONTAINER_UNKNOWN if subject.unborn else STATES[record.state],
        labels=config.labels,
        annotations={**(spec.get("annotations") or {})},
        args=texts(process.get("args")),
        env=texts(process.get("env")),
        mounts=[mount(item) for item in spec.get("mounts") or ()],
        hooks=hooks(spec.get("hooks") or {}),
        linux=linux_part(record, spec),
        pid=subject.pid,
        rlimits=[
            pb.POSIXRlimit(type=item["type"], hard=item["hard"], soft=item["soft"])
            for item in process.get("rlimits") or ()
        ],
        CDI_devices=[pb.CDIDevice(name=name) for name in config.cdi_devices],
        user=pb.User(uid=user.get("uid", 0), gid=user.get("gid", 0), additional_gids=user.get("additionalGids") or ()),
        image=pb.Image(
            name=config.image.user_specified_image or config.image.image,
            digest=record.image_ref.partition("@")[2],
            config_digest=record.image_id,
        ),
        **({} if subject.unborn else ending(record)),
    )


def ending(record: ContainerRecord) -> dict[str, Any]:
    """When it was what, and how it ended."""
    return {
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "exit_code": record.exit_code,
        "status_reason": record.reason,
        "status_message": record.message,
    }


def text(value: str) -> str:
    """With marks for what is no UTF-8."""
    return value if value.isascii() else os.fsencode(value).decode(errors="replace")


def texts(values: Iterable[str] | None) -> list[str]:
    """Likewise."""
    return [text(value) for value in values or ()]


def mount(item: Mapping[str, Any]) -> pb.Mount:
    """OCI's."""
    return pb.Mount(
        destination=text(item["destination"]),
        type=item.get("type", ""),
        source=text(item.get("source", "")),
        options=texts(item.get("options")),
    )


def hooks(found: Mapping[str, Any]) -> pb.Hooks:
    """OCI's, by point."""
    shown = pb.Hooks()
    for point, own in POINTS.items():
        for entry in found.get(point) or ():
            hook = getattr(shown, own).add(
                path=entry["path"], args=texts(entry.get("args")), env=texts(entry.get("env"))
            )
            if entry.get("timeout") is not None:
                hook.timeout.value = entry["timeout"]
    return shown


def linux_part(record: ContainerRecord, spec: Mapping[str, Any]) -> pb.LinuxContainer:
    """What is Linux's alone."""
    linux: Mapping[str, Any] = spec.get("linux") or {}
    process: Mapping[str, Any] = spec.get("process") or {}
    resources = limits.message(record.resources)
    resources.devices.extend(limits.rules((linux.get("resources") or {}).get("devices")))
    found = pb.LinuxContainer(
        namespaces=[
            pb.LinuxNamespace(type=item["type"], path=item.get("path", "")) for item in linux.get("namespaces") or ()
        ],
        devices=[device(item) for item in linux.get("devices") or ()],
        resources=resources,
        cgroups_path=linux.get("cgroupsPath", ""),
        sysctl=linux.get("sysctl") or {},
        net_devices={
            name: pb.LinuxNetDevice(name=item.get("name", "")) for name, item in (linux.get("netDevices") or {}).items()
        },
    )
    if process.get("oomScoreAdj") is not None:
        found.oom_score_adj.value = process["oomScoreAdj"]
    asked = record.config.security.seccomp
    if asked is not None:
        found.seccomp_profile.profile_type = PROFILES[asked.type]
        found.seccomp_profile.localhost_ref = asked.localhost_ref
    if linux.get("seccomp") is not None:
        found.seccomp_policy.CopyFrom(seccomp(linux["seccomp"]))
    if process.get("ioPriority") is not None:
        found.io_priority.priority = process["ioPriority"].get("priority", 0)
        setattr(found.io_priority, "class", pb.IOPrioClass.Value(process["ioPriority"]["class"]))
    if process.get("scheduler") is not None:
        found.scheduler.CopyFrom(scheduler(process["scheduler"]))
    if linux.get("intelRdt") is not None:
        found.rdt.CopyFrom(rdt(linux["intelRdt"]))
    return found


def device(item: Mapping[str, Any]) -> pb.LinuxDevice:
    """OCI's."""
    found = pb.LinuxDevice(
        path=text(item["path"]), type=item.get("type", ""), major=item.get("major", 0), minor=item.get("minor", 0)
    )
    for name, key in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
        if item.get(key) is not None:
            getattr(found, name).value = item[key]
    return found


def scheduler(item: Mapping[str, Any]) -> pb.LinuxScheduler:
    """OCI's."""
    return pb.LinuxScheduler(
        policy=item["policy"],
        flags=item.get("flags") or (),
        **{key: item.get(key, 0) for key in ("nice", "priority", "runtime", "deadline", "period")},
    )


def rdt(item: Mapping[str, Any]) -> pb.LinuxRdt:
    """OCI's."""
    found = pb.LinuxRdt()
    if item.get("closID"):
        found.clos_id.value = item["closID"]
    if item.get("schemata"):
        found.schemata.value.extend(item["schemata"])
    if item.get("enableMonitoring") is not None:
        found.enable_monitoring.value = item["enableMonitoring"]
    return found


def seccomp(item: Mapping[str, Any]) -> pb.LinuxSeccomp:
    """OCI's."""
    found = pb.LinuxSeccomp(
        default_action=item["defaultAction"],
        architectures=item.get("architectures") or (),
        flags=item.get("flags") or (),
        listener_path=item.get("listenerPath", ""),
        listener_metadata=item.get("listenerMetadata", ""),
    )
    if item.get("defaultErrnoRet") is not None:
        found.default_errno.value = item["defaultErrnoRet"]
    for entry in item.get("syscalls") or ():
        call = found.syscalls.add(names=entry["names"], action=entry["action"])
        if entry.get("errnoRet") is not None:
            call.errno_ret.value = entry["errnoRet"]
        for arg in entry.get("args") or ():
            call.args.add(index=arg["index"], value=arg["value"], value_two=arg.get("valueTwo", 0), op=arg["op"])
    return found
