"""UpdateContainerResources and UpdatePodSandboxResources: limits changed in place, all of them or none.

    container    record ─ limits               undone when it fails, by the daemon or by the next one: limits and record are as before
    pod          record ─ limits ─ overhead    the same, where the pod's control group is ours; a kubelet changes its own before it asks

A container that has not started has no group yet: its plan is edited, and the start uses that. What a request leaves at zero stays as it
is. The rules about devices are never part of an update, nor is `oom_score_adj` of a container that runs: it is its processes' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tare.runtime import lifecycle, spec
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerRecord, ContainerState, HugepageLimit, PodRecord, Resources
from tare.runtime.store import Plan
from tare.state.operations import Operation, Step

CPU = ("cpu_shares", "cpu_quota", "cpu_period", "cpuset_cpus", "cpuset_mems")
MEMORY = ("memory_limit", "memory_swap_limit")
SECTIONS = ("memory", "cpu", "hugepageLimits", "unified", "pids")
UNLIMITED: Mapping[str, int] = {
    "memory_limit": -1,
    "memory_swap_limit": -1,
    "cpu_shares": 1024,
    "cpu_quota": -1,
    "cpu_period": 100_000,
}
"""What the kernel has where nothing was ever set."""
UNLIMITED_MORE: Mapping[str, int | bool] = {
    "memory.kernelTCP": -1,
    "memory.disableOOMKiller": False,
    "pids.limit": -1,
}
"""Likewise, of `Resources.more`."""
NO_PAGES = (1 << 64) - 1


def merged(before: Resources, wanted: Resources) -> Resources:
    """What holds after an update. A memory limit and the one on memory and swap together are set as a pair."""
    changes = {name: value for name in (*CPU, "oom_score_adj") if (value := getattr(wanted, name))}
    if wanted.memory_limit:
        changes |= {"memory_limit": wanted.memory_limit, "memory_swap_limit": wanted.memory_swap_limit}
    elif wanted.memory_swap_limit:
        changes["memory_swap_limit"] = wanted.memory_swap_limit
    pages = {item.page_size: item for item in (*before.hugepage_limits, *wanted.hugepage_limits)}
    unified = {**before.unified, **wanted.unified}
    more = {**before.more, **wanted.more}
    return replace(before, **changes, hugepage_limits=tuple(pages.values()), unified=unified, more=more)


def live(wanted: Resources, after: Resources) -> dict[str, Any]:
    """`linux.resources` of what a request names, with what belongs to it: a quota is nothing without its period."""
    named = replace(
        Resources(),
        **{name: getattr(after, name) for name in CPU if any(getattr(wanted, other) for other in CPU)},
        **{name: getattr(after, name) for name in MEMORY if any(getattr(wanted, other) for other in MEMORY)},
        hugepage_limits=wanted.hugepage_limits,
        unified=wanted.unified,
        more=wanted.more,
    )
    found = limits(named)
    if "memory" in found:
        # Version 2's answer to a limit below what is used would be its OOM killer.
        found["memory"]["checkBeforeUpdate"] = True
    return found


def limits(value: Resources) -> dict[str, Any]:
    """`linux.resources` without the rules about devices."""
    return {key: item for key, item in spec.resources(value).items() if key in SECTIONS}


def undoing(before: Resources, wanted: Resources) -> dict[str, Any]:
    """`linux.resources` that puts back what a request has changed: what was not set before is set to what the kernel begins with.

    For sets of CPUs, files of `unified` and some of `more` that were not set there is no such value: those stay.
    """
    earlier = {item.page_size: item for item in before.hugepage_limits}
    values: dict[str, Any] = {}
    for group in (CPU, MEMORY):
        if any(getattr(wanted, name) for name in group):
            values |= {name: getattr(before, name) or UNLIMITED.get(name, "") for name in group}
    if before.memory_limit and not before.memory_swap_limit and "memory_limit" in values:
        values["memory_swap_limit"] = before.memory_limit
    pages = (
        earlier.get(item.page_size, HugepageLimit(page_size=item.page_size, limit=NO_PAGES))
        for item in wanted.hugepage_limits
    )
    unified = {key: before.unified[key] for key in wanted.unified if key in before.unified}
    known = {**UNLIMITED_MORE, **before.more}
    more = {key: known[key] for key in wanted.more if key in known}
    return limits(Resources(**values, hugepage_limits=tuple(pages), unified=unified, more=more))


def edited(plan: Plan, after: Resources) -> Plan:
    """A container's plan with these limits."""
    whole = plan.spec
    put_limits(whole, after)
    return replace(plan, document=Plan.of(whole, plan.cgroup, ()).document)


def put_limits(whole: spec.Spec, after: Resources) -> None:
    """A configuration has these limits, and nothing else of it changes."""
    kept = {key: item for key, item in whole["linux"].get("resources", {}).items() if key not in SECTIONS}
    whole["linux"]["resources"] = {**kept, **limits(after)}
    whole["process"]["oomScoreAdj"] = after.oom_score_adj


@dataclass(slots=True, kw_only=True)
class Update:
    """A change of limits. `names` hold in full what was before; `overhead` is noted of a pod when all else is done."""

    parts: Parts
    id: str
    before: Resources
    wanted: Resources
    overhead: Resources | None = None

    @property
    def names(self) -> dict[str, str]:
        """The thing, what it had, what is asked for."""
        return {
            "id": self.id,
            "before": msgspec.json.encode(self.before).decode(),
            "wanted": msgspec.json.encode(self.wanted).decode(),
        }

    @property
    def container(self) -> ContainerRecord | None:
        """The container, if there is one of that ID still."""
        return self.parts.store.containers.get(self.id)

    @property
    def pod(self) -> PodRecord | None:
        """The pod, likewise."""
        return self.parts.store.pods.get(self.id)


def restore(parts: Parts, names: Mapping[str, str]) -> Update:
    """The update that an intent speaks of."""
    before, wanted = (msgspec.json.decode(names[key], type=Resources) for key in ("before", "wanted"))
    return Update(parts=parts, id=names["id"], before=before, wanted=wanted)


# UpdateContainerResources


def container_update(parts: Parts, record: ContainerRecord, wanted: Resources) -> Update:
    """The update of a container that is CREATED or RUNNING. Raises FailedPrecondition for another."""
    lifecycle.container_after(record.state, lifecycle.ContainerEvent.UPDATE, record.id)
    if record.state is ContainerState.RUNNING:
        wanted = replace(wanted, oom_score_adj=0)
    return Update(parts=parts, id=record.id, before=record.resources, wanted=wanted)


async def record_container(update: Update) -> None:
    """The limits are on record, in the status and in the plan."""
    put_container(update, merged(update.before, update.wanted))


async def unrecord_container(update: Update) -> None:
    """As before."""
    put_container(update, update.before)


def put_container(update: Update, resources: Resources) -> None:
    """The container with these limits; nothing where it is gone."""
    record, store = update.container, update.parts.store
    if record is not None:
        store.put_planned(replace(record, resources=resources), edited(store.plan(update.id), resources))


async def limit_container(update: Update) -> None:
    """The kernel has them, where the container runs."""
    facts = update.parts.store.container_facts.get(update.id)
    if facts is not None and (changes := live(update.wanted, merged(update.before, update.wanted))):
        await update.parts.cgroups.update(facts.cgroup, changes)


async def unlimit_container(update: Update) -> None:
    """It has the former ones, where there is a group still."""
    facts = update.parts.store.container_facts.get(update.id)
    changes = undoing(update.before, update.wanted)
    if facts is not None and changes and update.parts.cgroups.exists(facts.cgroup):
        await update.parts.cgroups.update(facts.cgroup, changes)


UPDATE_CONTAINER: Operation[Update] = Operation(
    "UpdateContainerResources",
    (
        Step("record", record_container, unrecord_container),
        Step("limits", limit_container, unlimit_container),
    ),
)


# UpdatePodSandboxResources


def pod_update(parts: Parts, pod: PodRecord, wanted: Resources, overhead: Resources | None) -> Update:
    """The update of a pod that is READY. Raises FailedPrecondition for another."""
    lifecycle.pod_after(pod.state, lifecycle.PodEvent.UPDATE, pod.id)
    before = pod.config.resources or Resources()
    return Update(parts=parts, id=pod.id, before=before, wanted=wanted, overhead=overhead)


async def record_pod(update: Update) -> None:
    """The limits are on record."""
    put_pod(update, merged(update.before, update.wanted))


async def unrecord_pod(update: Update) -> None:
    """As before."""
    put_pod(update, update.before)


def put_pod(update: Update, resources: Resources) -> None:
    """The pod with these limits; nothing where it is gone."""
    pod = update.pod
    if pod is not None:
        update.parts.store.put_pod(replace(pod, config=replace(pod.config, resources=resources)))


async def limit_pod(update: Update) -> None:
    """The kernel has them, where the group was made by Tare."""
    await set_pod_limits(update, live(update.wanted, merged(update.before, update.wanted)))


async def unlimit_pod(update: Update) -> None:
    """It has the former ones."""
    await set_pod_limits(update, undoing(update.before, update.wanted))


async def record_overhead(update: Update) -> None:
    """What the pod takes beside its containers is on record: nothing of Tare's own depends on it."""
    pod = update.pod
    if pod is not None and update.overhead is not None:
        overhead = merged(pod.config.overhead or Resources(), update.overhead)
        update.parts.store.put_pod(replace(pod, config=replace(pod.config, overhead=overhead)))


async def set_pod_limits(update: Update, changes: Mapping[str, Any]) -> None:
    """In the pod's group, if it is ours and there."""
    pod, cgroups = update.pod, update.parts.cgroups
    if pod is not None and pod.owns_cgroup_parent and changes and cgroups.exists(pod.cgroup_parent):
        await cgroups.update(pod.cgroup_parent, changes)


UPDATE_POD: Operation[Update] = Operation(
    "UpdatePodSandboxResources",
    (
        Step("record", record_pod, unrecord_pod),
        Step("limits", limit_pod, unlimit_pod),
        Step("overhead", record_overhead),
    ),
)
