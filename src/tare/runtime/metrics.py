"""The metrics that a kubelet forwards to Prometheus: descriptions, and samples from what `stats` has looked up.

A family is described from the first call, whether or not there is anything to measure, and each of its samples has a value for every
label. A series (a name with its label values) comes once in an answer. What a container has is in `metric_families`; a pod of its own
has its network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tare.runtime.metric_families import FAMILIES, Kind, Subject
from tare.runtime.stats import ContainerDetails, PodDetails
from tare.runtime.traffic import Interface

BLOCK_DEVICES = Path("/sys/dev/block")
# cAdvisor's: `id` is the cgroup, `name` the container's ID, `container` its name. Of a pod's own series `container` is empty.
LABELS = ("id", "name", "image", "namespace", "pod", "container")
# Of a pod, by interface: name, meaning, field of Interface.
NETWORK = (
    ("container_network_receive_bytes_total", "Bytes received.", "rx_bytes"),
    ("container_network_receive_packets_total", "Packets received.", "rx_packets"),
    ("container_network_receive_packets_dropped_total", "Packets dropped on their way in.", "rx_dropped"),
    ("container_network_receive_errors_total", "Errors while receiving.", "rx_errors"),
    ("container_network_transmit_bytes_total", "Bytes sent.", "tx_bytes"),
    ("container_network_transmit_packets_total", "Packets sent.", "tx_packets"),
    ("container_network_transmit_packets_dropped_total", "Packets dropped on their way out.", "tx_dropped"),
    ("container_network_transmit_errors_total", "Errors while sending.", "tx_errors"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One number. `at` is ns since the epoch."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    value: int
    at: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a name means, and its labels in the order of their values."""

    name: str
    help: str
    labels: tuple[str, ...]


def descriptions(cgroup_version: int) -> list[Description]:
    """Every family that can have a series with these control groups."""
    families = (family for family in FAMILIES if cgroup_version == 2 or not family.v2)
    return [
        *(Description(family.name, family.help, (*LABELS, *family.labels)) for family in families),
        *(Description(name, help, (*LABELS, "interface")) for name, help, _ in NETWORK),
    ]


def of_pod(pod: PodDetails) -> list[Sample]:
    """A pod's own: its network."""
    metadata = pod.record.config.metadata
    labels = (pod.record.cgroup_parent, pod.record.id, "", metadata.namespace, metadata.name, "")
    return once(
        Sample(name, Kind.COUNTER, (*labels, interface.name), value_of(interface, field), pod.at)
        for interface in pod.interfaces or ()
        for name, _, field in NETWORK
    )


def value_of(interface: Interface, field: str) -> int:
    """A counter of an interface."""
    value: int = getattr(interface, field)
    return value


def of_container(pod: PodDetails, item: ContainerDetails, device: Callable[[int, int], str]) -> list[Sample]:
    """A container's; `device` names a block device by its numbers."""
    metadata, record = pod.record.config.metadata, item.stats.record
    image = record.config.image.user_specified_image or record.config.image.image
    labels = (item.cgroup, record.id, image, metadata.namespace, metadata.name, record.config.metadata.name)
    subject = Subject(item, pod.file_system, device)
    return once(
        Sample(family.name, family.kind, (*labels, *more), value, item.stats.at)
        for family in FAMILIES
        for more, value in family.values(subject)
    )


def once(samples: Iterable[Sample]) -> list[Sample]:
    """Each series once: the first, where two devices have one name."""
    found: dict[tuple[str, tuple[str, ...]], Sample] = {}
    for sample in samples:
        found.setdefault((sample.name, sample.labels), sample)
    return list(found.values())


class Devices:
    """Names of block devices by their numbers: "/dev/vda", or "254:0" for one that sysfs does not have. Looked up once."""

    def __init__(self, directory: Path = BLOCK_DEVICES) -> None:
        self._directory = directory
        self._names: dict[tuple[int, int], str] = {}

    def name(self, major: int, minor: int) -> str:
        """Of one device."""
        found = self._names.get((major, minor))
        if found is None:
            numbers = f"{major}:{minor}"
            link = self._directory / numbers
            found = f"/dev/{link.resolve().name}" if link.is_symlink() else numbers
            self._names[(major, minor)] = found
        return found
