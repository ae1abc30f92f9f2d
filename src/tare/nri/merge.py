"""What several plugins want of a container, made one (pure): each sees what those before it have set, and none sets what another has.

creation    the request, which changes for who comes later · one adjustment (`adjusts`: if any) · updates of others · evictions
update      the limits asked for, which change likewise · updates of other containers · evictions
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, MutableSequence
from typing import Any

from google.protobuf.message import Message

from tare.errors import FailedPrecondition, TareError
from tare.nri.owners import REMOVED, Owners
from tare.nri.v1 import nri_pb2 as pb
from tare.nri.view import POINTS

NUMBERS = {
    "memory": {
        "limit": pb.MemLimit,
        "reservation": pb.MemReservation,
        "swap": pb.MemSwapLimit,
        "kernel": pb.MemKernelLimit,
        "kernel_tcp": pb.MemTCPLimit,
        "swappiness": pb.MemSwappiness,
        "disable_oom_killer": pb.MemDisableOomKiller,
        "use_hierarchy": pb.MemUseHierarchy,
    },
    "cpu": {
        "shares": pb.CPUShares,
        "quota": pb.CPUQuota,
        "period": pb.CPUPeriod,
        "realtime_runtime": pb.CPURealtimeRuntime,
        "realtime_period": pb.CPURealtimePeriod,
    },
}
"""Limits that are there or not: message → field → what it is called when it is owned."""
SETS = {"cpus": pb.CPUSetCPUs, "mems": pb.CPUSetMems}
WHOLE = {
    "oom_score_adj": pb.OomScoreAdj,
    "io_priority": pb.IoPriority,
    "seccomp_policy": pb.SeccompPolicy,
    "scheduler": pb.LinuxSched,
    "memory_policy": pb.MemoryPolicy,
}
"""What of `linux` is set as a whole."""


def bare(key: str) -> tuple[str, bool]:
    """A key without the mark of a removal, and whether it had one."""
    return (key[1:], True) if key.startswith(REMOVED) else (key, False)


class Updates:
    """Updates of containers that are there already, by container, and evictions."""

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self.found: dict[str, pb.ContainerUpdate] = {}
        self.evicted: dict[str, tuple[str, str]] = {}

    def add(self, wanted: Iterable[pb.ContainerUpdate], plugin: str, begin: pb.LinuxResources | None = None) -> None:
        """A plugin's; `begin` is what the first of a container is put over. Raises Conflict, unless that is to be passed over."""
        for update in wanted:
            known = self.found.get(update.container_id)
            limits = pb.LinuxResources()
            if known is not None:
                limits.CopyFrom(known.linux.resources)
            elif begin is not None:
                limits.CopyFrom(begin)
            try:
                set_limits(limits, update.linux.resources, self._owners, update.container_id, plugin)
            except TareError:
                if not update.ignore_failure:
                    raise
                continue
            ignore = update.ignore_failure and (known is None or known.ignore_failure)
            merged = pb.ContainerUpdate(container_id=update.container_id, ignore_failure=ignore)
            merged.linux.resources.CopyFrom(limits)
            self.found[update.container_id] = merged

    def evict(self, wanted: Iterable[pb.ContainerEviction], plugin: str) -> None:
        """Which containers are to end, and who wants it why."""
        for eviction in wanted:
            self.evicted.setdefault(eviction.container_id, (plugin, eviction.reason))


def set_limits(
    limits: pb.LinuxResources, given: pb.LinuxResources, owners: Owners, container: str, plugin: str
) -> None:
    """What is given, over the limits, as the plugin's. Raises Conflict."""
    for part, numbers in NUMBERS.items():
        of = getattr(given, part)
        for name, thing in numbers.items():
            if of.HasField(name):
                owners.claim(container, thing, plugin)
                getattr(getattr(limits, part), name).CopyFrom(getattr(of, name))
    for name, thing in SETS.items():
        if value := getattr(given.cpu, name):
            owners.claim(container, thing, plugin)
            setattr(limits.cpu, name, value)
    for page in given.hugepage_limits:
        owners.claim(container, pb.HugepageLimits, plugin, page.page_size)
        kept = [item for item in limits.hugepage_limits if item.page_size != page.page_size]
        replace(limits.hugepage_limits, [*kept, page])
    for key, value in given.unified.items():
        owners.claim(container, pb.CgroupsUnified, plugin, key)
        limits.unified[key] = value
    for name, thing in (("blockio_class", pb.BlockioClass), ("rdt_class", pb.RdtClass), ("pids", pb.PidsLimit)):
        if given.HasField(name):
            owners.claim(container, thing, plugin)
            getattr(limits, name).CopyFrom(getattr(given, name))
    if given.devices:
        limits.devices.extend(given.devices)


def replace(items: Any, values: Iterable[Message]) -> None:
    """A repeated field has these now."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del items[:]
    items.extend(copies)


class Creation:
    """A container that is being made."""

    def __init__(self, request: pb.CreateContainerRequest) -> None:
        self.request = request
        self.adjust = pb.ContainerAdjustment()
        self.owners = Owners()
        self.updates = Updates(self.owners)
        self.adjusts = False
        self._id = request.container.id

    def add(self, answer: pb.CreateContainerResponse, plugin: str) -> None:
        """What one more plugin wants. Raises Conflict, FailedPrecondition."""
        given, shown = answer.adjust, self.request.container
        self.adjusts = self.adjusts or bool(given.ByteSize())
        self._map(pb.Annotations, given.annotations, self.adjust.annotations, shown.annotations, plugin)
        self._mounts(given, plugin)
        self._environment(given, plugin)
        self._arguments(given, plugin)
        self._hooks(given, plugin)
        if given.HasField("linux"):
            self._linux(given.linux, plugin)
        self._rlimits(given, plugin)
        for device in given.CDI_devices:
            self.owners.claim(self._id, pb.CdiDevices, plugin, device.name)
            self.adjust.CDI_devices.append(device)
        for update in answer.update:
            if update.container_id == self._id:
                cause = f"plugin {plugin} wants container {self._id} updated, which is being made"
                raise FailedPrecondition("make a container", cause=cause, hint="adjust it")
        self.updates.add(answer.update, plugin)
        self.updates.evict(answer.evict, plugin)

    def _map(
        self,
        thing: int,
        given: MutableMapping[str, Any],
        merged: MutableMapping[str, Any],
        shown: MutableMapping[str, Any],
        plugin: str,
        put: Callable[[MutableMapping[str, Any], str, Any], None] = lambda to, key, value: to.__setitem__(key, value),
    ) -> None:
        """Entries by key, those that are removed first."""
        for marked, value in sorted(given.items(), key=lambda item: not bare(item[0])[1]):
            key, removed = bare(marked)
            if removed:
                self.owners.clear(self._id, thing, plugin, key)
                merged.pop(key, None)
                shown.pop(key, None)
            else:
                self.owners.claim(self._id, thing, plugin, key)
                put(shown, key, value)
            put(merged, marked, value)

    def _list(
        self, thing: int, given: Iterable[Any], merged: MutableSequence[Any], key_of: str, plugin: str
    ) -> tuple[set[str], list[Any]]:
        """Entries that have a key: (keys of those that are not what they were, those that are new or changed)."""
        entries = list(given)
        removed = {bare(getattr(item, key_of))[0] for item in entries if bare(getattr(item, key_of))[1]}
        added = [item for item in entries if not bare(getattr(item, key_of))[1]]
        for key in removed:
            self.owners.clear(self._id, thing, plugin, key)
        for item in added:
            self.owners.claim(self._id, thing, plugin, getattr(item, key_of))
        kept = [item for item in merged if bare(getattr(item, key_of))[0] not in removed]
        marks = [item for item in entries if bare(getattr(item, key_of))[1]]
        replace(merged, [*kept, *marks, *added])
        return removed | {getattr(item, key_of) for item in added}, added

    def _mounts(self, given: pb.ContainerAdjustment, plugin: str) -> None:
        gone, added = self._list(pb.Mounts, given.mounts, self.adjust.mounts, "destination", plugin)
        shown = self.request.container.mounts
        replace(shown, [*(item for item in shown if item.destination not in gone), *added])

    def _environment(self, given: pb.ContainerAdjustment, plugin: str) -> None:
        gone, added = self._list(pb.Env, given.env, self.adjust.env, "key", plugin)
        shown = self.request.container.env
        kept = [entry for entry in shown if entry.partition("=")[0] not in gone]
        del shown[:]
        shown.extend([*kept, *(f"{item.key}={item.value}" for item in added)])

    def _rlimits(self, given: pb.ContainerAdjustment, plugin: str) -> None:
        gone, added = self._list(pb.Rlimits, given.rlimits, self.adjust.rlimits, "type", plugin)
        shown = self.request.container.rlimits
        replace(shown, [*(item for item in shown if item.type not in gone), *added])

    def _arguments(self, given: pb.ContainerAdjustment, plugin: str) -> None:
        args = list(given.args)
        if not args:
            return
        if not args[0]:
            self.owners.clear(self._id, pb.Args, plugin)
            del args[0]
        self.owners.claim(self._id, pb.Args, plugin)
        for of in (self.adjust, self.request.container):
            del of.args[:]
            of.args.extend(args)

    def _hooks(self, given: pb.ContainerAdjustment, plugin: str) -> None:
        """Everybody's are run, in order."""
        if any(len(getattr(given.hooks, point)) for point in POINTS.values()):
            self.owners.add(self._id, pb.OciHooks, plugin)
            self.adjust.hooks.MergeFrom(given.hooks)
            self.request.container.hooks.MergeFrom(given.hooks)

    def _linux(self, given: pb.LinuxContainerAdjustment, plugin: str) -> None:
        merged, shown = self.adjust.linux, self.request.container.linux
        gone, added = self._list(pb.Devices, given.devices, merged.devices, "path", plugin)
        replace(shown.devices, [*(item for item in shown.devices if item.path not in gone), *added])
        gone, added = self._list(pb.Namespace, given.namespaces, merged.namespaces, "type", plugin)
        replace(shown.namespaces, [*(item for item in shown.namespaces if item.type not in gone), *added])
        self._map(pb.Sysctl, given.sysctl, merged.sysctl, shown.sysctl, plugin)
        self._map(pb.LinuxNetDevices, given.net_devices, merged.net_devices, shown.net_devices, plugin, put_message)
        if given.HasField("resources"):
            set_limits(merged.resources, given.resources, self.owners, self._id, plugin)
            set_limits(shown.resources, given.resources, Owners(), self._id, plugin)
        if given.cgroups_path:
            self.owners.claim(self._id, pb.CgroupsPath, plugin)
            merged.cgroups_path = shown.cgroups_path = given.cgroups_path
        for name, thing in WHOLE.items():
            if given.HasField(name):
                self.owners.claim(self._id, thing, plugin)
                getattr(merged, name).CopyFrom(getattr(given, name))
                if name in shown.DESCRIPTOR.fields_by_name:
                    getattr(shown, name).CopyFrom(getattr(given, name))
        if given.HasField("rdt"):
            self._rdt(given.rdt, plugin)

    def _rdt(self, given: pb.LinuxRdt, plugin: str) -> None:
        merged, shown = self.adjust.linux.rdt, self.request.container.linux.rdt
        things = {"clos_id": pb.RdtClosID, "schemata": pb.RdtSchemata, "enable_monitoring": pb.RdtEnableMonitoring}
        if given.remove:
            for thing in things.values():
                self.owners.clear(self._id, thing, plugin)
            shown.Clear()
            merged.Clear()
            merged.remove = True
        for name, thing in things.items():
            if given.HasField(name):
                self.owners.claim(self._id, thing, plugin)
                for of in (merged, shown):
                    getattr(of, name).CopyFrom(getattr(given, name))


def put_message(to: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Into a map of messages, which takes none by assignment."""
    to[key].CopyFrom(value)  # a map of messages has an entry for whatever key is looked at


class Change:
    """Limits of a container that are about to change."""

    def __init__(self, request: pb.UpdateContainerRequest) -> None:
        self.request = request
        self.owners = Owners()
        self.updates = Updates(self.owners)
        self.own = Updates(self.owners)
        self._id = request.container.id

    def add(self, answer: pb.UpdateContainerResponse, plugin: str) -> None:
        """What one more plugin wants. Raises Conflict."""
        own = [item for item in answer.update if item.container_id == self._id]
        self.own.add(own, plugin, self.request.linux_resources)
        if self._id in self.own.found:
            self.request.linux_resources.CopyFrom(self.own.found[self._id].linux.resources)
        self.updates.add((item for item in answer.update if item.container_id != self._id), plugin)
        self.updates.evict(answer.evict, plugin)

    @property
    def limits(self) -> pb.LinuxResources | None:
        """What they are to be; None where no plugin has changed that."""
        return self.request.linux_resources if self._id in self.own.found else None
