"""RunPodSandbox, StopPodSandbox and RemovePodSandbox as lists of steps.

    run      cgroup ─ directory ─ shm ─ namespaces ─ network ─ files ─ plugins ─ record      undone when it fails
    stop     containers ─ plugins ─ network ─ namespaces ─ shm ─ cgroup ─ record             finished after a crash
    remove   (stopped and empty) directory ─ cgroup ─ record                       finished after a crash

A pod is on record only once all of it exists. Steps know nothing of locks and of who waits (`service`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tare.handlers.builtin import PodNamespaces
from tare.handlers.plans import Mappings
from tare.network import bandwidth, hostports
from tare.network.hostports import Port
from tare.network.wishes import Wishes
from tare.runtime import groups, labels, lifecycle, podfiles, sysctls, updating
from tare.runtime.bounds import deadline, kernel_errors, twice
from tare.runtime.exits import process_of
from tare.runtime.plugins import Moment, Subject, of_pod
from tare.runtime.ports import Parts
from tare.runtime.records import DnsConfig, IdMapping, NamespaceMode, PodConfig, PodRecord, ProcessFact, Resources
from tare.runtime.store import PodFacts
from tare.state.operations import Operation, Step

NAMESPACES_SECONDS = 30.0
NETWORK_SECONDS = 90.0  # each plugin of a chain has a deadline of its own, which says more


@dataclass(slots=True, kw_only=True)
class PodRun:
    """A pod on its way: `config` is None when it is being undone after a crash, from `names` alone."""

    parts: Parts
    id: str
    name: str
    made_cgroups: tuple[str, ...]
    cgroup_parent: str = ""
    config: PodConfig | None = None
    owner: podfiles.Owner = field(default_factory=podfiles.Owner)
    handler: str = ""
    namespaces: PodNamespaces | None = None
    ips: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """What recovery needs to find all of it again."""
        return {"pod": self.id, "name": self.name, "made": "\n".join(self.made_cgroups)}

    @property
    def request(self) -> PodConfig:
        """The configuration, which a pod being made has."""
        assert self.config is not None
        return self.config


def restore(parts: Parts, names: Mapping[str, str]) -> PodRun:
    """The pod that an intent speaks of."""
    made = tuple(filter(None, names["made"].split("\n")))
    return PodRun(parts=parts, id=names["pod"], name=names["name"], made_cgroups=made)


def begin(parts: Parts, pod_id: str, config: PodConfig, handler: str) -> PodRun:
    """Check what can be checked before anything is made. Raises InvalidArgument, FailedPrecondition."""
    podfiles.contents(config, hostname_of(config), ())
    with kernel_errors("see what AppArmor and SELinux enforce"):
        node = parts.confinement()
    labels.apparmor_profile(config.security.apparmor, node, privileged=config.security.privileged)
    sysctls.check(config.sysctls, kinds_of(config))
    if "net" in kinds_of(config):
        hostports.check(wishes(config, Path()).ports)
    parent = parts.cgroups.resolve_parent(config.cgroup_parent, f"/tare-{pod_id}")
    return PodRun(
        parts=parts,
        id=pod_id,
        name=config.metadata.key,
        cgroup_parent=parent,
        made_cgroups=parts.cgroups.missing_groups(parent),
        config=config,
        owner=owner_of(pod_id, config, node),
        handler=handler,
    )


def hostname_of(config: PodConfig) -> str:
    """The pod's host name: the node's where none is asked for, or where the pod has the node's network."""
    if config.security.namespaces.network is NamespaceMode.NODE or not config.hostname:
        return os.uname().nodename
    return config.hostname


def kinds_of(config: PodConfig) -> frozenset[str]:
    """The namespaces that the pod's containers share and that are the pod's own."""
    options = config.security.namespaces
    kinds = set()
    if options.mapped is not None:
        kinds.add("user")
    if options.network is not NamespaceMode.NODE:
        kinds |= {"net", "uts"}
    if options.ipc is not NamespaceMode.NODE:
        kinds.add("ipc")
    if options.pid is NamespaceMode.POD:
        kinds.add("pid")
    return frozenset(kinds)


def mappings_of(config: PodConfig) -> Mappings | None:
    """Those of the pod's user namespace."""
    user = config.security.namespaces.mapped
    return Mappings(ranges(user.uids), ranges(user.gids)) if user is not None else None


def ranges(mappings: Iterable[IdMapping]) -> tuple[tuple[int, int, int], ...]:
    """(first ID in the pod, first ID on the node, how many) each."""
    return tuple((item.container_id, item.host_id, item.length) for item in mappings)


def owner_of(pod_id: str, config: PodConfig, node: labels.Kernel) -> podfiles.Owner:
    """Whose the pod's files are. Raises as `labels.selinux_labels`."""
    security = config.security
    label = labels.selinux_labels(security.selinux, node, privileged=False, seed=pod_id).mount
    uid, gid = security.namespaces.mapped.root if security.namespaces.mapped is not None else (0, 0)
    return podfiles.Owner(uid=uid, gid=gid, label=label)


# RunPodSandbox


async def make_cgroup(run: PodRun) -> None:
    """The parent of the containers' groups, with the pod's limits, where the kubelet has not made it: its own has them already."""
    if run.made_cgroups and await run.parts.cgroups.make_parent(run.cgroup_parent):
        changes = updating.limits(run.request.resources or Resources())
        if changes:
            await run.parts.cgroups.update(run.cgroup_parent, changes)


async def remove_cgroup(run: PodRun) -> None:
    """What of it was made here goes."""
    await _let_cgroups_go(run.parts, run.made_cgroups)


async def _let_cgroups_go(parts: Parts, made: Iterable[str]) -> None:
    """Deepest first, as far as nobody else is in them."""
    for path in made:
        if not await parts.cgroups.remove_parent(path):
            return


async def make_directory(run: PodRun) -> None:
    """The directory that everything of the pod's boot is in."""
    with kernel_errors(f"make the directory of pod {run.id}"):
        run.parts.pod_directory(run.id).mkdir(mode=0o700, exist_ok=True)


async def remove_directory(run: PodRun) -> None:
    """It goes with its files."""
    with kernel_errors(f"remove the directory of pod {run.id}"):
        podfiles.remove(run.parts.pod_directory(run.id))


async def make_shm(run: PodRun) -> None:
    """/dev/shm of the pod's IPC namespace."""
    if run.request.security.namespaces.ipc is not NamespaceMode.NODE:
        with kernel_errors(f"mount /dev/shm of pod {run.id}"):
            podfiles.mount_shm(run.parts.pod_directory(run.id), run.owner)


async def remove_shm(run: PodRun) -> None:
    """It is unmounted."""
    with kernel_errors(f"unmount /dev/shm of pod {run.id}"):
        podfiles.unmount_shm(run.parts.pod_directory(run.id))


async def make_namespaces(run: PodRun) -> None:
    """What the containers share."""

    async def attempt() -> PodNamespaces:
        async with deadline(NAMESPACES_SECONDS, f"make the namespaces of pod {run.id}"):
            return await run.parts.handler.pod_namespaces(
                run.id,
                kinds=kinds_of(run.request),
                hostname=hostname_of(run.request),
                sysctls=sysctls.of_pod(run.request.sysctls, kinds_of(run.request)),
                mappings=mappings_of(run.request),
            )

    run.namespaces = await twice(attempt, lambda: remove_namespaces(run))
    run.parts.store.put_pod_facts(run.id, facts_of(run))


def facts_of(run: PodRun, group: str = "") -> PodFacts:
    """What there is of the pod in this boot."""
    pins = run.namespaces.pins if run.namespaces is not None else {}
    pause = run.namespaces.pause if run.namespaces is not None else None
    return PodFacts(
        pins={kind: str(path) for kind, path in pins.items()},
        pause=ProcessFact(pid=pause.pid, start_time=pause.start_time) if pause is not None else None,
        group=group,
        cgroups=run.made_cgroups,
    )


async def remove_namespaces(run: PodRun) -> None:
    """They go, with their pins and their PID 1."""
    if run.namespaces is not None and run.namespaces.netlink is not None:
        run.namespaces.netlink.close()
    await _let_namespaces_go(run.parts, run.id)
    run.parts.store.drop_pod_facts(run.id)


async def _let_namespaces_go(parts: Parts, pod_id: str) -> None:
    parts.exits.unwatch_pod(pod_id)
    facts = parts.store.pod_facts.get(pod_id)
    pause = process_of(facts.pause) if facts is not None and facts.pause is not None else None
    async with deadline(NAMESPACES_SECONDS, f"remove the namespaces of pod {pod_id}"):
        await parts.handler.remove_pod_namespaces(pod_id, pause)


def wishes(config: PodConfig, netns: Path) -> Wishes:
    """What a pod asks of its network."""
    ports = (
        Port(protocol=item.protocol, host_port=item.host_port, container_port=item.container_port, host_ip=item.host_ip)
        for item in config.port_mappings
        if item.host_port
    )
    dns = config.dns or DnsConfig()
    return Wishes(
        name=config.metadata.name,
        namespace=config.metadata.namespace,
        uid=config.metadata.uid,
        netns=netns,
        ports=tuple(ports),
        ingress=bandwidth.rate(config.annotations, bandwidth.INGRESS),
        egress=bandwidth.rate(config.annotations, bandwidth.EGRESS),
        annotations=config.annotations,
        servers=dns.servers,
        searches=dns.searches,
        options=dns.options,
        cgroup_parent=config.cgroup_parent,
    )


async def attach(run: PodRun) -> None:
    """An address on the pod network."""
    namespaces = run.namespaces
    if namespaces is None or namespaces.netlink is None:
        return
    netns = os.open(namespaces.pins["net"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        async with deadline(NETWORK_SECONDS, f"attach pod {run.id} to the network"):
            wanted = wishes(run.request, namespaces.pins["net"])
            attachment = await run.parts.network.attach(run.id, netns, namespaces.netlink, wanted)
    finally:
        os.close(netns)
        namespaces.netlink.close()
    run.ips = attachment.ips


async def detach(run: PodRun) -> None:
    """The address goes back."""
    await _let_network_go(run.parts, run.id)


async def _let_network_go(parts: Parts, pod_id: str) -> None:
    async with deadline(NETWORK_SECONDS, f"detach pod {pod_id} from the network"):
        await parts.network.detach(pod_id)


async def write_files(run: PodRun) -> None:
    """hosts, hostname and resolv.conf."""
    with kernel_errors(f"write the files of pod {run.id}"):
        texts = podfiles.contents(run.request, hostname_of(run.request), run.ips)
        podfiles.write(run.parts.pod_directory(run.id), texts, run.owner)


async def ask_plugins(run: PodRun) -> None:
    """Those of the node agree, with everything in place and nothing to be seen yet."""
    plugins = run.parts.plugins
    await plugins.making(run.id)
    if plugins.active:
        await plugins.ask(Moment.RUN_POD, Subject(pod=as_record(run), facts=facts_of(run)))


async def tell_plugins(run: PodRun) -> None:
    """They are told that it is not made after all; those of a later daemon have not heard of it."""
    plugins = run.parts.plugins
    if run.config is not None and plugins.active:
        subject = Subject(pod=as_record(run), facts=facts_of(run))
        await plugins.tell(Moment.STOP_POD, subject)
        await plugins.tell(Moment.REMOVE_POD, subject)


def as_record(run: PodRun) -> PodRecord:
    """The pod as it is put on record."""
    state = lifecycle.pod_after(None, lifecycle.PodEvent.RUN, run.id)
    assert state is not None
    return PodRecord(
        id=run.id,
        config=run.request,
        handler=run.handler,
        state=state,
        created_at=time.time_ns(),
        ips=run.ips,
        cgroup_parent=run.cgroup_parent,
        owns_cgroup_parent=bool(run.made_cgroups),
    )


async def record(run: PodRun) -> None:
    """From here on the pod exists."""
    store = run.parts.store
    taken = (facts.group for facts in store.pod_facts.values())
    family = groups.family(run.request, run.handler)
    group = groups.choose(family, taken, run.parts.config.pods_per_logger)
    store.add_pod(as_record(run), facts_of(run, group))


async def unrecord(run: PodRun) -> None:
    """It does not exist; what was made for it still does."""
    facts = run.parts.store.pod_facts.get(run.id)
    run.parts.store.drop_pod(run.id)
    if facts is not None:
        run.parts.store.put_pod_facts(run.id, facts)


RUN_POD: Operation[PodRun] = Operation(
    "RunPodSandbox",
    (
        Step("cgroup", make_cgroup, remove_cgroup),
        Step("directory", make_directory, remove_directory),
        Step("shm", make_shm, remove_shm),
        Step("namespaces", make_namespaces, remove_namespaces),
        Step("network", attach, detach),
        Step("files", write_files),
        Step("plugins", ask_plugins, tell_plugins),
        Step("record", record, unrecord),
    ),
)


# StopPodSandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRef:
    """A pod that is being stopped or removed."""

    parts: Parts
    id: str

    @property
    def names(self) -> dict[str, str]:
        """What recovery finds it by."""
        return {"pod": self.id}


def restore_ref(parts: Parts, names: Mapping[str, str]) -> PodRef:
    """The pod that an intent speaks of."""
    return PodRef(parts=parts, id=names["pod"])


async def stop_containers(pod: PodRef) -> None:
    """All of its containers end, at once."""
    kills = (pod.parts.exits.kill(member, f"stop pod {pod.id}") for member in pod.parts.store.members(pod.id))
    await asyncio.gather(*kills)


async def tell_of_stop(pod: PodRef) -> None:
    """Plugins hear of it while what the pod has is there."""
    record = pod.parts.store.pods.get(pod.id)
    if pod.parts.plugins.active and record is not None:
        await pod.parts.plugins.tell(Moment.STOP_POD, of_pod(pod.parts.store, record))


async def stop_network(pod: PodRef) -> None:
    """The address goes back, also where the namespace is gone."""
    await _let_network_go(pod.parts, pod.id)


async def stop_namespaces(pod: PodRef) -> None:
    """What the containers shared goes."""
    await _let_namespaces_go(pod.parts, pod.id)


async def stop_shm(pod: PodRef) -> None:
    """Its memory is given back."""
    with kernel_errors(f"unmount /dev/shm of pod {pod.id}"):
        podfiles.unmount_shm(pod.parts.pod_directory(pod.id))


async def stop_cgroups(pod: PodRef) -> None:
    """The parent of the containers' groups goes, where the pod made it."""
    facts = pod.parts.store.pod_facts.get(pod.id)
    if facts is not None:
        await _let_cgroups_go(pod.parts, facts.cgroups)


async def record_stopped(pod: PodRef) -> None:
    """NOTREADY, with nothing of this boot left but the directory."""
    record_state(pod.parts, pod.id, lifecycle.PodEvent.STOP)
    pod.parts.store.drop_pod_facts(pod.id)


def record_state(parts: Parts, pod_id: str, event: lifecycle.PodEvent) -> None:
    """The pod's state after the event; nothing where there is no such pod (any more)."""
    pod = parts.store.pods.get(pod_id)
    if pod is None:
        return
    state = lifecycle.pod_after(pod.state, event, pod_id)
    if state is not None and state is not pod.state:
        parts.store.put_pod(replace(pod, state=state))


STOP_POD: Operation[PodRef] = Operation(
    "StopPodSandbox",
    (
        Step("containers", stop_containers),
        Step("plugins", tell_of_stop),
        Step("network", stop_network),
        Step("namespaces", stop_namespaces),
        Step("shm", stop_shm),
        Step("cgroup", stop_cgroups),
        Step("record", record_stopped),
    ),
    finish=True,
)


# RemovePodSandbox


async def clear_directory(pod: PodRef) -> None:
    """The directory goes with its files."""
    with kernel_errors(f"remove the directory of pod {pod.id}"):
        podfiles.remove(pod.parts.pod_directory(pod.id))


async def clear_cgroup(pod: PodRef) -> None:
    """The parent of the containers' groups goes, if the pod made it and it was not empty before."""
    record = pod.parts.store.pods.get(pod.id)
    if record is not None and record.owns_cgroup_parent and pod.parts.cgroups.exists(record.cgroup_parent):
        await pod.parts.cgroups.remove_parent(record.cgroup_parent)


async def clear_record(pod: PodRef) -> None:
    """The pod is no more."""
    pod.parts.store.drop_pod(pod.id)


REMOVE_POD: Operation[PodRef] = Operation(
    "RemovePodSandbox",
    (
        Step("directory", clear_directory),
        Step("cgroup", clear_cgroup),
        Step("record", clear_record),
    ),
    finish=True,
)
