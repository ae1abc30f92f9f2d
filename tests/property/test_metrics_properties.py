"""Whatever is measured, a series comes once, is described, and has a value for each of its labels."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tare.cgroups.counters import Memory, Pressure, Stall, Transfer
from tare.cgroups.stats import Counters, Details
from tare.runtime import metrics
from tare.runtime.census import Census
from tare.runtime.metric_families import Kind
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerRecord,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
    PodRecord,
    PodState,
    Resources,
)
from tare.runtime.stats import ContainerDetails, ContainerStats, FileSystem, PodDetails
from tare.runtime.traffic import Interface
from tare.storage.sizes import Size

NUMBERS = st.integers(0, (1 << 64) - 1)
SOME = st.none() | NUMBERS
NAMES = st.sampled_from(["eth0", "net1", "a", ""])
STALLS = st.builds(Stall, NUMBERS, st.just(0.0), st.just(0.0), st.just(0.0))
PRESSURES = st.none() | st.builds(Pressure, STALLS, st.none() | STALLS)
MEMORIES = st.builds(
    Memory,
    usage=NUMBERS,
    inactive_file=NUMBERS,
    rss=NUMBERS,
    page_faults=NUMBERS,
    major_page_faults=NUMBERS,
    swap=NUMBERS,
    limit=SOME,
    swap_limit=SOME,
)
COUNTERS = st.builds(
    Counters,
    cpu=SOME,
    memory=st.none() | MEMORIES,
    cpu_pressure=PRESSURES,
    memory_pressure=PRESSURES,
    io_pressure=PRESSURES,
)
TRANSFERS = st.lists(
    st.builds(Transfer, st.integers(7, 8), st.integers(0, 1), st.sampled_from(["Read", "Write", "Total"]), NUMBERS),
    max_size=6,
)
MEMORY_KEYS = """
    cache mapped_file active_file inactive_file dirty writeback refault_file refault_anon scanned stolen kernel peak
    failures events_high events_max
"""
FAULTS = st.sampled_from([{}, {"own_faults": 1, "own_major_faults": 2}])
DETAILS = st.builds(
    Details,
    user=SOME,
    system=SOME,
    throttling=st.dictionaries(
        st.sampled_from(["periods", "throttled_periods", "throttled", "bursts", "burst"]), NUMBERS
    ),
    memory=st.builds(
        lambda some, faults: {**some, **faults}, st.dictionaries(st.sampled_from(MEMORY_KEYS.split()), NUMBERS), FAULTS
    ),
    threads=SOME,
    threads_max=SOME,
    moved=TRANSFERS,
    requests=TRANSFERS,
    hugepages=st.lists(st.tuples(st.sampled_from(["2MB", "1GB"]), NUMBERS, SOME), max_size=3),
)
RECORD = st.builds(
    lambda resources, image: ContainerRecord(
        id="c" * 64,
        pod_id="p" * 64,
        config=ContainerConfig(metadata=ContainerMetadata(name="main"), image=image),
        image_id="i",
        image_ref="r",
        state=ContainerState.RUNNING,
        created_at=1,
        started_at=2_000_000_000,
        resources=resources,
    ),
    st.builds(
        Resources,
        cpu_quota=st.integers(-1, 1 << 40),
        memory_limit=st.integers(-1, 1 << 62),
        memory_swap_limit=st.integers(-1, 1 << 62),
        unified=st.dictionaries(
            st.sampled_from(["memory.low", "memory.min"]), st.sampled_from(["max", "12", " ", "²", "9" * 30])
        ),
    ),
    st.builds(ImageRef, image=NAMES, user_specified_image=NAMES),
)
CONTAINERS = st.builds(
    lambda record, counters, details, census, size: ContainerDetails(
        stats=ContainerStats(
            record=record, at=5_000_000_000, counters=counters, nano_cores=None, size=size, file_system="/"
        ),
        cgroup="/pod/c",
        details=details,
        census=census,
        oom_kills=0,
    ),
    RECORD,
    COUNTERS,
    DETAILS,
    st.builds(Census, processes=NUMBERS, descriptors=NUMBERS, sockets=SOME, open_files=SOME),
    st.none() | st.builds(Size, bytes=NUMBERS, inodes=NUMBERS, at=NUMBERS),
)
FIELDS = ("rx_bytes", "rx_packets", "rx_errors", "rx_dropped", "tx_bytes", "tx_packets", "tx_errors", "tx_dropped")
INTERFACES = st.none() | st.lists(
    st.builds(lambda name: Interface(name=name, **dict.fromkeys(FIELDS, 1)), NAMES), max_size=3
).map(tuple)
PODS = st.builds(
    lambda interfaces, containers: PodDetails(
        record=PodRecord(
            id="p" * 64,
            config=PodConfig(metadata=PodMetadata(name="web", uid="u", namespace="shop")),
            handler="",
            state=PodState.READY,
            created_at=1,
        ),
        at=5_000_000_000,
        interfaces=interfaces,
        containers=tuple(containers),
        file_system=FileSystem(major=8, minor=0, bytes=1, inodes=2, inodes_free=3),
    ),
    INTERFACES,
    st.lists(CONTAINERS, max_size=1),
)


def same_name(major: int, minor: int) -> str:
    """Two devices of one name: a partition and a mapping that came in its place."""
    return f"/dev/{major}"


@given(PODS)
def test_each_series_is_described_and_comes_once(pod: PodDetails) -> None:
    described = {item.name: item for item in metrics.descriptions(2)}
    samples = metrics.of_pod(pod)
    for item in pod.containers:
        samples += metrics.of_container(pod, item, same_name)
    assert len({(sample.name, sample.labels) for sample in samples}) == len(samples)
    for sample in samples:
        assert len(sample.labels) == len(described[sample.name].labels)
        assert 0 <= sample.value < 1 << 64
        assert sample.at == 5_000_000_000
        grows = sample.name.endswith(("_total", "_failcnt")) and sample.name != "container_fs_inodes_total"
        assert (sample.kind is Kind.COUNTER) == grows


def test_descriptions_are_whole() -> None:
    for version in (1, 2):
        found = metrics.descriptions(version)
        assert len({item.name for item in found}) == len(found)
        for item in found:
            assert item.help
            assert item.labels[: len(metrics.LABELS)] == metrics.LABELS
            assert len(set(item.labels)) == len(item.labels)
    names = {item.name for item in metrics.descriptions(2)} - {item.name for item in metrics.descriptions(1)}
    assert "container_memory_events_max_total" in names


def test_block_devices_have_the_names_of_the_node(tmp_path: Path) -> None:
    (tmp_path / "block/sda/sda1").mkdir(parents=True)
    (tmp_path / "8:1").symlink_to("block/sda/sda1")
    devices = metrics.Devices(tmp_path)
    assert devices.name(8, 1) == "/dev/sda1"
    assert devices.name(0, 45) == "0:45"
    (tmp_path / "8:1").unlink()
    assert devices.name(8, 1) == "/dev/sda1", "looked up once"
