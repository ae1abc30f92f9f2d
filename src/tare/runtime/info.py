"""What a verbose status adds about a pod or a container, JSON-able, for people: what it is made of, and when."""

from __future__ import annotations

from collections.abc import Mapping

from tare.config import BUILTIN
from tare.errors import TareError
from tare.runtime.bounds import deadline
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerRecord, NamespaceMode, PodRecord, PodState

NETWORK_SECONDS = 30.0  # plugins that check a pod may take their time


async def of_pod(parts: Parts, pod: PodRecord) -> Mapping[str, object]:
    """Its namespaces, its network, where it keeps what. Times are ns since the epoch."""
    facts = parts.store.pod_facts.get(pod.id)
    pins = facts.pins if facts is not None else {}
    return {
        "runtimeHandler": pod.handler or BUILTIN,
        "pid": facts.pause.pid if facts is not None and facts.pause is not None else 0,
        "namespaces": pins,
        "network": {"ips": pod.ips, **await of_network(parts, pod, pins.get("net", ""))},
        "cgroupParent": pod.cgroup_parent,
        "resources": pod.config.resources,
        "overhead": pod.config.overhead,
        "directory": str(parts.pod_directory(pod.id)),
        "loggerGroup": facts.group if facts is not None else "",
        "timings": {"createdAt": pod.created_at},
    }


async def of_network(parts: Parts, pod: PodRecord, netns: str) -> Mapping[str, object]:
    """The way of a pod's packets, and what of it is not as it was made; a pod that was stopped has none."""
    if pod.config.security.namespaces.network is NamespaceMode.NODE:
        return {"mode": "node"}
    if pod.state is not PodState.READY or not netns:
        return {"mode": "none"}
    try:
        async with deadline(NETWORK_SECONDS, f"look at the network of pod {pod.id}"):
            return await parts.network.path(pod.id, netns)
    except TareError as error:
        return {"troubles": [str(error)]}


def of_container(parts: Parts, record: ContainerRecord) -> Mapping[str, object]:
    """Its process, its OCI configuration (with all mounts), where it keeps what. Times are ns since the epoch, 0 for not yet."""
    facts = parts.store.container_facts.get(record.id)
    plan = parts.store.plan(record.id)
    return {
        "sandboxID": record.pod_id,
        "pid": facts.process.pid if facts is not None else 0,
        "startTime": facts.process.start_time if facts is not None else 0,
        "cgroup": plan.cgroup,
        "layers": plan.lowers,
        "snapshot": record.snapshot,
        "runtimeSpec": plan.spec,
        "timings": {
            "createdAt": record.created_at,
            "startedAt": record.started_at,
            "finishedAt": record.finished_at,
        },
    }
