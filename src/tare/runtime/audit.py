"""What is on the node, held against what is on record: each thing of ours belongs to a record, and what a record names is there. Pure.

    orphan        it bears our name or lies where only we put things, and no record names it
    lost          a record names it, and it is not there
    unfinished    an operation that could be neither finished nor undone

What bears nobody's name or another's (a bridge, a table, a group of a stranger or of another instance) is nothing to this; so are
things within a container's reach. Images and layers are compared by presence; what is in them is `images.verify`'s.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tare.handlers.pins import PIN_FLAGS, PROC_PIN
from tare.images.collect import garbage
from tare.network import firewall, hostports, nft
from tare.network.attach import Remembered
from tare.runtime.audit_node import Node, Table
from tare.runtime.audit_records import HeldPort, Records
from tare.runtime.podfiles import FILES
from tare.runtime.records import ContainerState, NamespaceMode, PodRecord, PodState, ProcessFact
from tare.runtime.store import PodFacts

SETTLING = 5.0  # seconds: a younger process may be one whose maker has not been told yet
GARBAGE = 1800.0  # seconds until what no image needs should have been collected
FIFOS = ("stdout", "stderr")
NOT_MADE_YET = (".tmp-", ".trash-", ".removed-")


class State(Enum):
    """What is the matter."""

    ORPHAN = "orphan"
    LOST = "lost"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing: `kind` and `name` say which, `owner` is the ID that it goes by ("" for none)."""

    kind: str
    name: str
    owner: str
    state: State
    text: str
    hint: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What else a comparison needs: where things are, and processes that are waited for, by PID.START.

    `held` are digests and chain IDs that a pull works on; `serving` says that a daemon serves.
    """

    run: Path
    root: Path
    awaited: Collection[str] = ()
    held: Collection[str] = ()
    serving: bool = False
    keep_blobs: bool = True


Check = Callable[[Records, Node, Surroundings], Iterator[Finding]]


def orphan(kind: str, name: str, owner: str, text: str, hint: str = "") -> Finding:
    """Something that no record names."""
    return Finding(kind=kind, name=name, owner=owner, state=State.ORPHAN, text=text, hint=hint)


def lost(kind: str, name: str, owner: str, text: str, hint: str = "") -> Finding:
    """Something that is not there."""
    return Finding(kind=kind, name=name, owner=owner, state=State.LOST, text=text, hint=hint)


def compare(records: Records, node: Node, around: Surroundings) -> list[Finding]:
    """All findings, in the order in which they can be mended."""
    return [finding for check in CHECKS for finding in check(records, node, around)]


def ready(records: Records) -> Iterator[tuple[PodRecord, PodFacts]]:
    """Pods that are READY and have facts of this boot."""
    for pod_id, facts in records.pod_facts.items():
        pod = records.pods.get(pod_id)
        if pod is not None and pod.state is PodState.READY:
            yield pod, facts


def running(records: Records) -> Iterator[str]:
    """Containers that RUN, and have facts of this boot."""
    for container_id in records.container_facts:
        record = records.containers.get(container_id)
        if record is not None and record.state is ContainerState.RUNNING:
            yield container_id


def name_of(process: ProcessFact) -> str:
    """As its marker is called."""
    return f"{process.pid}.{process.start_time}"


def processes_of(records: Records) -> Iterator[str]:
    """The processes on record, by their markers."""
    yield from (name_of(facts.process) for facts in records.container_facts.values())
    yield from (name_of(facts.pause) for facts in records.pod_facts.values() if facts.pause is not None)


# Operations and records


def operations(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Intents that stand although nobody is at it. (Those under way are not findings: their subjects are busy.)"""
    for key, intent in records.intents.items():
        subject = " ".join(intent.subject.values())
        owner = intent.subject.get("container") or intent.subject.get("pod") or ""
        text = "; ".join(intent.failures) or "it was cut off"
        yield Finding(
            kind="operation",
            name=f"{key} {intent.operation} {subject}".strip(),
            owner=owner,
            state=State.UNFINISHED,
            text=text,
            hint="" if around.serving else "the daemon takes it up when it starts",
        )


def rows(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Records that speak of things that are on no other record."""
    for container_id, record in records.containers.items():
        if record.pod_id not in records.pods:
            yield orphan("record", f"containers/{container_id}", container_id, f"its pod {record.pod_id} is no more")
        elif record.state is ContainerState.RUNNING and container_id not in records.container_facts:
            yield lost(
                "record", f"container_facts/{container_id}", container_id, "it is RUNNING, and nothing is known of it"
            )
    things = {**records.pods, **records.containers}
    for table, keys, known in (
        ("plans", records.plans, records.containers),
        ("container_facts", records.container_facts, records.containers),
        ("pod_facts", records.pod_facts, records.pods),
        ("offers", records.offers, things),
    ):
        for key in keys:
            if key not in known:
                yield orphan("record", f"{table}/{key}", key, "it speaks of something that is no more")


# Processes


def processes(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Markers and exit records that nobody waits for, and the other way round; keeper, launcher and loggers."""
    known = set(processes_of(records))
    for marker in sorted(set(node.names["run/tasks"]) - known - set(around.awaited)):
        age = node.live.get(marker)
        if age is None:
            yield orphan("file", str(around.run / "tasks" / marker), "", "the mark of a process that is no more")
        elif age > SETTLING:
            yield orphan(
                "process", marker, "", f"process {marker.partition('.')[0]} was made by Tare, and nobody waits for it"
            )
    for name in sorted(set(node.names["run/exits"]) - known - set(around.awaited)):
        if node.names["run/exits"][name] > SETTLING:
            yield orphan("file", str(around.run / "exits" / name), "", "the end of a process that nobody waits for")
    for container_id in running(records):
        marker = name_of(records.container_facts[container_id].process)
        if marker in node.live and marker not in node.names["run/tasks"]:
            path = str(around.run / "tasks" / marker)
            yield lost("file", path, container_id, "without it the container's exit code will be unknown")
    yield from helpers(records, node, around)


def helpers(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Processes of Tare's own."""
    if not records.container_facts and not around.serving:
        return
    for name, there in node.serving.items():
        if not there:
            yield lost("process", name, "", f"there is no {name}", "the daemon starts another")
    for group in {records.container_facts[container_id].group for container_id in running(records)}:
        if group not in node.loggers:
            hint = "it is started again when the daemon needs it"
            yield lost(
                "process", f"logger {group}", "", f"containers' output is not logged: group {group} has no logger", hint
            )
        if "journal" not in node.names.get(f"run/loggers/{group}", {}):
            yield lost(
                "file",
                str(around.run / "loggers" / group / "journal"),
                "",
                "the journal of a logger that serves containers",
            )


# Namespaces, mounts and files of this boot


def pod_files(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Directories of pods with their pins, mounts and files."""
    base = around.run.resolve() / "pods"
    for pod_id, names in ((pod, node.names[f"run/pods/{pod}"]) for pod in node.names["run/pods"]):
        if pod_id in records.pod_facts:
            continue
        for name in names:
            kind = "namespace" if name in PIN_FLAGS else "mount"
            if f"{base}/{pod_id}/{name}" in node.mounts and (name in PIN_FLAGS or name in ("shm", PROC_PIN)):
                yield orphan(kind, f"{base}/{pod_id}/{name}", pod_id, "it is held for a pod that has none in this boot")
        if pod_id not in records.pods:
            yield orphan("directory", f"{base}/{pod_id}", pod_id, "there is no such pod")
    for pod, facts in ready(records):
        for kind, path in facts.pins.items():
            if node.mounts.get(str(Path(path).resolve())) != "nsfs":
                hint = "the pod becomes NOTREADY, and its kubelet makes another"
                yield lost("namespace", path, pod.id, f"the pod's {kind} namespace", hint)
        directory = base / pod.id
        if pod.config.security.namespaces.ipc is not NamespaceMode.NODE and f"{directory}/shm" not in node.mounts:
            yield lost(
                "mount",
                f"{directory}/shm",
                pod.id,
                "the pod's /dev/shm",
                "containers that are started from now on lack it",
            )
        for name in FILES:
            if name not in node.names.get(f"run/pods/{pod.id}", {}):
                yield lost("file", f"{directory}/{name}", pod.id, f"the pod's {name}")


def container_files(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Streams, and what other runtimes and hooks need of a container, in this boot."""
    for container_id in node.names["run/containers"]:
        if container_id not in records.container_facts:
            yield orphan(
                "directory",
                str(around.run / "containers" / container_id),
                container_id,
                "streams of a container that does not run",
            )
    for name in ("bundles", "hooked"):
        for container_id in node.names[f"run/{name}"]:
            if container_id not in records.container_facts:
                yield orphan(
                    "directory",
                    str(around.run / name / container_id),
                    container_id,
                    "kept for a container that does not run",
                )
    for container_id in running(records):
        if records.containers[container_id].config.tty:
            continue
        there = node.names.get(f"run/containers/{container_id}", {})
        for name in FIFOS:
            if name not in there:
                hint = "its output is logged for as long as its logger lives; start it anew"
                yield lost(
                    "file",
                    str(around.run / "containers" / container_id / name),
                    container_id,
                    f"the container's {name}",
                    hint,
                )


# Control groups


def groups(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Those with our mark, deepest first, and those on record."""
    known = {facts.cgroup for facts in records.container_facts.values()} | {
        plan.cgroup for plan in records.plans.values()
    }
    known |= {path for facts in records.pod_facts.values() for path in facts.cgroups}
    known |= {pod.cgroup_parent for pod in records.pods.values()}
    ours = {os.path.basename(path) for path in known} | {"tare-detached"}
    for path, group in sorted(node.groups.items(), key=lambda item: -item[0].count("/")):
        if path in known or os.path.basename(path) in ours:
            continue
        inside = f"; processes {', '.join(map(str, group.pids[:10]))} are in it" if group.pids else ""
        yield orphan("cgroup", path, identifier(path), f"no pod and no container has it{inside}")
    for container_id in running(records):
        path = records.container_facts[container_id].cgroup
        if path not in node.there:
            yield lost("cgroup", path, container_id, "the container's limits are not enforced", "start it anew")


def identifier(path: str) -> str:
    """The ID in a group's name, as pods' and containers' have it."""
    return os.path.basename(path).removeprefix("tare-").removesuffix(".scope").removesuffix(".slice")


# The network


def network(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Links, leases and ports of the embedded network."""
    for name, pod_id in node.links.items():
        if pod_id not in records.pod_facts:
            yield orphan("link", name, pod_id, f"its pod {pod_id[:13]} has no network in this boot")
    for lease in records.leases:
        if lease.pod_id not in records.pod_facts:
            yield orphan(
                "lease",
                lease.address,
                lease.pod_id,
                f"held for pod {lease.pod_id[:13]}, which has no network in this boot",
            )
    for port in records.ports:
        if port.pod_id not in records.pod_facts:
            yield orphan(
                "port",
                f"{port.port}/{port.protocol}",
                port.pod_id,
                f"held for pod {port.pod_id[:13]}, which has no network in this boot",
            )
    held = {lease.pod_id: lease.address for lease in records.leases}
    for pod, facts in ready(records):
        if "net" not in facts.pins or not pod.ips or pod.id in records.by_plugins:
            continue
        if pod.id not in held:
            yield lost("lease", pod.ips[0], pod.id, "another pod may be given the address")
        if pod.id not in node.links.values():
            yield lost(
                "link",
                f"tare{pod.id[:11]}",
                pod.id,
                "the pod has no network",
                "the pod becomes NOTREADY, and its kubelet makes another",
            )


def tables(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Bridges and the packet filter's tables of networks that have pods."""
    addresses = [ipaddress.ip_address(pod.ips[0]) for pod, facts in ready(records) if pod.ips and "net" in facts.pins]
    for name, remembered in records.networks.items():
        if not any(address in ipaddress.ip_network(remembered.subnet) for address in addresses):
            continue
        if name not in node.bridges:
            yield lost("link", name, "", "the bridge of a network that has pods")
        wanted, there = table_of(name, remembered, records.ports), node.tables.get(name, Table())
        if there.rules < wanted.rules:
            yield lost(
                "rule", f"tare-{name}", "", f"table inet tare-{name} has {there.rules} rules of {wanted.rules} or more"
            )
        for which, key, data in sorted(there.entries - wanted.entries):
            yield orphan("rule", f"tare-{name} {which} {key.hex()}", "", f"an entry that leads to {data.hex()}")
        for which, key, data in sorted(wanted.entries - there.entries):
            yield lost("rule", f"tare-{name} {which} {key.hex()}", "", f"an entry that leads to {data.hex()}")


def table_of(bridge: str, remembered: Remembered, ports: Iterable[HeldPort]) -> Table:
    """What a network's table must have at least: it may have more rules, according to the settings."""
    nets = tuple(ipaddress.ip_network(text) for text in (remembered.subnet, remembered.subnet6) if text)
    redirects = [
        hostports.redirect(port.host, port.protocol, port.port, port.target, port.target_port)
        for port in ports
        if any(ipaddress.ip_address(port.target) in net for net in nets)
    ]
    rules = nft.count_rules(firewall.replace(firewall.Table(f"tare-{bridge}", bridge, nets)))
    entries = firewall.entries_of(redirects)
    return Table(rules=rules, entries=frozenset((name, *entry) for name, some in entries.items() for entry in some))


# What lasts


def layers(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """Writable layers, images' layers and blobs."""
    base = around.root / "containers"
    for name in node.names["root/containers"]:
        if name not in records.containers and not name.startswith(NOT_MADE_YET):
            yield orphan("directory", str(base / name), name, "the writable layer of no container")
    for container_id, record in records.containers.items():
        if record.snapshot and record.snapshot not in node.names["root/containers"]:
            yield lost(
                "directory",
                str(base / record.snapshot),
                container_id,
                "the container's writable layer",
                "remove the container",
            )
    known = {chain_id.partition(":")[2]: chain_id for chain_id in records.layers}
    for name in node.names["root/layers"]:
        if name not in known and not name.startswith(NOT_MADE_YET) and f"sha256:{name}" not in around.held:
            yield orphan("layer", f"sha256:{name}", "", "a directory that no image's layer is")
    for name, chain_id in known.items():
        if name not in node.names["root/layers"]:
            yield lost("layer", chain_id, owner_of(records, chain_id), "a layer of an image", "pull the image again")


def blobs(records: Records, node: Node, around: Surroundings) -> Iterator[Finding]:
    """What images are made of, as it came."""
    there = {
        f"{kind}:{name}": age for kind in ("sha256", "sha512") for name, age in node.names[f"root/blobs/{kind}"].items()
    }
    expected = {digest for row in records.expected.values() for digest in row.digests}
    _, unneeded = garbage(
        records.images.values(),
        records.layers,
        there,
        held={*around.held, *expected},
        in_use=(),
        keep_layer_blobs=around.keep_blobs,
    )
    for digest in sorted(unneeded):
        if there[digest] > GARBAGE:
            yield orphan("blob", digest, "", "no image needs it")
    for image in records.images.values():
        for digest in (*image.documents, *(image.layer_digests if around.keep_blobs else ())):
            if digest not in there:
                yield lost(
                    "blob",
                    digest,
                    image.id,
                    f"a part of image {', '.join(image.repo_tags) or image.id}",
                    "tare image repair",
                )


def owner_of(records: Records, chain_id: str) -> str:
    """An image that has the layer, "" where none does."""
    return next((image.id for image in records.images.values() if chain_id in image.chain_ids), "")


CHECKS: tuple[Check, ...] = (
    operations,
    processes,
    pod_files,
    container_files,
    groups,
    network,
    tables,
    layers,
    blobs,
    rows,
)
