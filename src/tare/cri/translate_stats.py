"""Statistics and metrics → replies. Pure. What was not measured is left unset, which a kubelet tells from 0."""

from __future__ import annotations

from collections.abc import Iterable

from tare.cgroups.counters import Memory, Pressure, Stall
from tare.cri.v1 import api_pb2 as pb
from tare.runtime.metrics import Description, Sample
from tare.runtime.records import ContainerRecord, PodRecord
from tare.runtime.stats import ContainerStats, PodStats
from tare.runtime.traffic import Interface
from tare.storage.sizes import Size

Number = pb.UInt64Value


def optional(value: int | None) -> pb.UInt64Value | None:
    """A number, or none."""
    return None if value is None else Number(value=value)


def container_stats(stats: ContainerStats) -> pb.ContainerStats:
    """A container's."""
    counters = stats.counters
    return pb.ContainerStats(
        attributes=_container(stats.record),
        cpu=_cpu(stats.at, counters.cpu, stats.nano_cores, counters.cpu_pressure),
        memory=_memory(stats.at, counters.memory, counters.memory_pressure),
        writable_layer=_file_system(stats.size, stats.file_system) if stats.size is not None else None,
        swap=_swap(stats.at, counters.memory),
        io=_io(stats.at, counters.io_pressure),
    )


def pod_stats(stats: PodStats) -> pb.PodSandboxStats:
    """A pod's, with its containers'."""
    counters = stats.counters
    return pb.PodSandboxStats(
        attributes=_pod(stats.record),
        linux=pb.LinuxPodSandboxStats(
            cpu=_cpu(stats.at, counters.cpu, stats.nano_cores, counters.cpu_pressure),
            memory=_memory(stats.at, counters.memory, counters.memory_pressure),
            network=_network(stats.at, stats.interfaces) if stats.interfaces is not None else None,
            process=pb.ProcessUsage(timestamp=stats.at, process_count=Number(value=stats.processes)),
            containers=[container_stats(item) for item in stats.containers],
            io=_io(stats.at, counters.io_pressure),
        ),
    )


def _container(record: ContainerRecord) -> pb.ContainerAttributes:
    metadata = record.config.metadata
    return pb.ContainerAttributes(
        id=record.id,
        metadata=pb.ContainerMetadata(name=metadata.name, attempt=metadata.attempt),
        labels=record.config.labels,
        annotations=record.config.annotations,
    )


def _pod(record: PodRecord) -> pb.PodSandboxAttributes:
    metadata = record.config.metadata
    return pb.PodSandboxAttributes(
        id=record.id,
        metadata=pb.PodSandboxMetadata(
            name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
        ),
        labels=record.config.labels,
        annotations=record.config.annotations,
    )


def _cpu(at: int, usage: int | None, nano_cores: int | None, pressure: Pressure | None) -> pb.CpuUsage | None:
    if usage is None:
        return None
    return pb.CpuUsage(
        timestamp=at,
        usage_core_nano_seconds=Number(value=usage),
        usage_nano_cores=optional(nano_cores),
        psi=_psi(pressure),
    )


def _memory(at: int, memory: Memory | None, pressure: Pressure | None) -> pb.MemoryUsage | None:
    if memory is None:
        return None
    return pb.MemoryUsage(
        timestamp=at,
        working_set_bytes=Number(value=memory.working_set),
        available_bytes=optional(memory.available),
        usage_bytes=Number(value=memory.usage),
        rss_bytes=Number(value=memory.rss),
        page_faults=Number(value=memory.page_faults),
        major_page_faults=Number(value=memory.major_page_faults),
        psi=_psi(pressure),
    )


def _swap(at: int, memory: Memory | None) -> pb.SwapUsage | None:
    if memory is None:
        return None
    return pb.SwapUsage(
        timestamp=at,
        swap_available_bytes=optional(memory.swap_available),
        swap_usage_bytes=Number(value=memory.swap),
    )


def _io(at: int, pressure: Pressure | None) -> pb.IoUsage | None:
    return None if pressure is None else pb.IoUsage(timestamp=at, psi=_psi(pressure))


def _psi(pressure: Pressure | None) -> pb.PsiStats | None:
    if pressure is None:
        return None
    return pb.PsiStats(Some=_stall(pressure.some), Full=_stall(pressure.full) if pressure.full is not None else None)


def _stall(stall: Stall) -> pb.PsiData:
    return pb.PsiData(Total=stall.total, Avg10=stall.avg10, Avg60=stall.avg60, Avg300=stall.avg300)


def _file_system(size: Size, mountpoint: str) -> pb.FilesystemUsage:
    """The same path as ImageFsInfo's, by which a kubelet finds the file system."""
    return pb.FilesystemUsage(
        timestamp=size.at,
        fs_id=pb.FilesystemIdentifier(mountpoint=mountpoint),
        used_bytes=Number(value=size.bytes),
        inodes_used=Number(value=size.inodes),
    )


def _network(at: int, interfaces: tuple[Interface, ...]) -> pb.NetworkUsage:
    """The first interface is the default one, which CRI wants by itself and not among the others."""
    shown = [_interface(item) for item in interfaces]
    return pb.NetworkUsage(timestamp=at, default_interface=shown[0] if shown else None, interfaces=shown[1:])


def _interface(item: Interface) -> pb.NetworkInterfaceUsage:
    return pb.NetworkInterfaceUsage(
        name=item.name,
        rx_bytes=Number(value=item.rx_bytes),
        rx_errors=Number(value=item.rx_errors),
        tx_bytes=Number(value=item.tx_bytes),
        tx_errors=Number(value=item.tx_errors),
    )


def descriptor(description: Description) -> pb.MetricDescriptor:
    """A family of metrics."""
    return pb.MetricDescriptor(name=description.name, help=description.help, label_keys=description.labels)


def metrics(samples: Iterable[Sample]) -> list[pb.Metric]:
    """Numbers of metrics."""
    return [
        pb.Metric(
            name=sample.name,
            timestamp=sample.at,
            metric_type=pb.GAUGE if sample.kind else pb.COUNTER,
            label_values=sample.labels,
            value=Number(value=sample.value),
        )
        for sample in samples
    ]
