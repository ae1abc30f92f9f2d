"""What control groups count, from the text of v1's and v2's files, and where each layout keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tare.cgroups import counters, stats
from tare.cgroups.counters import Memory, Pressure, Stall, Transfer
from tare.cgroups.layout import Hierarchy, Layout
from tare.cgroups.stats import Counters, Reader

if TYPE_CHECKING:
    from tare.cgroups.layout import Kind

PATH = "/pod/c1"
PRESSURE = (
    "some avg10=63.91 avg60=69.08 avg300=77.21 total=5855538650\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=7\n"
)
MEMORY_V1 = """cache 10219520
rss 13631488
mapped_file 7049216
pgfault 100
pgmajfault 3
inactive_file 24576
hierarchical_memory_limit 9223372036854771712
total_cache 2497855488
total_rss 649957376
total_mapped_file 390336512
total_dirty 4096
total_writeback 8192
total_workingset_refault_anon 1
total_workingset_refault_file 2632772
total_swap 12288
total_pgfault 412759277
total_pgmajfault 43964
total_inactive_file 612552704
total_active_file 1627074560
"""
MEMORY_V2 = """anon 41943040
file 1073741824
kernel 5242880
kernel_stack 65536
slab 1048576
file_mapped 4096
file_dirty 12288
file_writeback 0
inactive_file 734003200
active_file 339738624
workingset_refault_anon 5
workingset_refault_file 6
pgscan 70
pgsteal 60
pgfault 9000
pgmajfault 12
"""
CPU_V2 = """usage_usec 2500000
user_usec 2000000
system_usec 500000
nice_usec 0
nr_periods 10
nr_throttled 4
throttled_usec 300
nr_bursts 1
burst_usec 20
"""


def tree(directory: Path, version: int, *controllers: str) -> Hierarchy:
    return Hierarchy(
        directory=str(directory), version=1 if version == 1 else 2, controllers=frozenset(controllers), name=""
    )


def layout(kind: Kind, *hierarchies: Hierarchy) -> Layout:
    return Layout(kind=kind, hierarchies=hierarchies)


def write(directory: Path, files: dict[str, str], path: str = PATH) -> None:
    group = directory / path.strip("/")
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name).write_text(text)


@pytest.fixture
def v2(tmp_path: Path) -> Layout:
    root = tmp_path / "v2"
    write(
        root,
        {
            "cpu.stat": CPU_V2,
            "cpu.pressure": PRESSURE,
            "memory.pressure": PRESSURE,
            "io.pressure": "",
            "memory.stat": MEMORY_V2,
            "memory.current": "1120927744\n",
            "memory.max": "2147483648\n",
            "memory.peak": "1220927744\n",
            "memory.events": "low 0\nhigh 8\nmax 9\noom 0\noom_kill 0\noom_group_kill 0\n",
            "memory.swap.current": "8192\n",
            "memory.swap.max": "max\n",
            "pids.current": "7\n",
            "pids.max": "max\n",
            "io.stat": "7:0 254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n",
            "hugetlb.2MB.current": "2097152\n",
            "cgroup.procs": "11\n12\n0\n",
        },
    )
    write(root, {"cgroup.procs": "13\n11\n"}, f"{PATH}/inner")
    return layout("v2", tree(root, 2, "cpu", "memory", "pids", "io", "hugetlb"))


@pytest.fixture
def hybrid(tmp_path: Path) -> Layout:
    write(tmp_path / "cpuacct", {"cpuacct.usage": "77\n", "cpuacct.usage_user": "40\n", "cpuacct.usage_sys": "37\n"})
    write(
        tmp_path / "memory",
        {
            "memory.stat": MEMORY_V1,
            "memory.usage_in_bytes": "3147812864\n",
            "memory.limit_in_bytes": "9223372036854771712\n",
            "memory.memsw.limit_in_bytes": "9223372036854771712\n",
            "memory.max_usage_in_bytes": "4000000000\n",
            "memory.failcnt": "5\n",
            "memory.kmem.usage_in_bytes": "6\n",
        },
    )
    write(tmp_path / "cpu", {"cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 9\nnr_bursts 0\nburst_time 0\n"})
    write(tmp_path / "pids", {"pids.current": "1\n", "pids.max": "64\n", "cgroup.procs": "5\n"}, "tare-detached/c1")
    write(
        tmp_path / "blkio",
        {
            "blkio.throttle.io_service_bytes_recursive": "254:0 Read 4096\n254:0 Write 0\n254:0 Total 4096\nTotal 4096\n",
            "blkio.throttle.io_serviced_recursive": "254:0 Read 1\nTotal 1\n",
        },
    )
    write(tmp_path / "unified", {"cpu.pressure": PRESSURE, "hugetlb.2MB.current": "0\n"}, "tare-detached/c1")
    first = (tree(tmp_path / name, 1, name) for name in ("cpu", "cpuacct", "memory", "pids", "blkio"))
    return layout("hybrid", *first, tree(tmp_path / "unified", 2, "hugetlb"))


@pytest.fixture
def pages(tmp_path: Path) -> str:
    for size in (2048, 1048576):
        (tmp_path / f"pages/hugepages-{size}kB").mkdir(parents=True)
    return str(tmp_path / "pages")


def test_counters_of_v2(v2: Layout) -> None:
    some, full = Stall(5855538650, 63.91, 69.08, 77.21), Stall(7, 0.5, 0.0, 0.0)
    found = Reader(v2).read(PATH)
    assert found == Counters(
        cpu=2_500_000_000,
        memory=Memory(
            usage=1120927744,
            inactive_file=734003200,
            rss=41943040,
            page_faults=9000,
            major_page_faults=12,
            swap=8192,
            limit=2147483648,
            swap_limit=None,
        ),
        cpu_pressure=Pressure(some, full),
        memory_pressure=Pressure(some, full),
        io_pressure=None,
    )
    assert found.memory is not None
    assert (found.memory.working_set, found.memory.available) == (386924544, 1760559104)
    assert found.memory.swap_available is None


def test_counters_of_a_hybrid_layout(hybrid: Layout) -> None:
    found = Reader(hybrid).read(PATH)
    assert found.cpu == 77
    assert found.memory == Memory(
        usage=3147812864,
        inactive_file=612552704,
        rss=649957376,
        page_faults=412759277,
        major_page_faults=43964,
        swap=12288,
    )
    assert (found.memory.available, found.memory.swap_available) == (None, None)
    assert found.cpu_pressure is not None, "in the tree where the group is set aside"
    assert (found.memory_pressure, found.io_pressure) == (None, None)


def test_what_is_used_beyond_a_limit_is_not_available() -> None:
    found = counters.memory_v1({"total_swap": 30}, 100, 60, 80)
    assert (found.available, found.swap_limit, found.swap_available) == (0, 20, 0)


def test_details_of_v2(v2: Layout, pages: str) -> None:
    found = Reader(v2, pages).details(PATH)
    assert (found.user, found.system) == (2_000_000_000, 500_000_000)
    assert found.throttling == {
        "periods": 10,
        "throttled_periods": 4,
        "throttled": 300_000,
        "bursts": 1,
        "burst": 20_000,
    }
    assert (found.threads, found.threads_max) == (7, 0)
    assert found.moved == [
        Transfer(254, 0, "Read", 4096),
        Transfer(254, 0, "Write", 8192),
        Transfer(254, 0, "Discard", 0),
    ]
    assert [item.value for item in found.requests] == [1, 2, 0]
    assert found.hugepages == [("2MB", 2097152, None)]
    expected = {
        "cache": 1073741824,
        "kernel": 5242880,
        "peak": 1220927744,
        "failures": 9,
        "events_high": 8,
        "scanned": 70,
    }
    assert expected.items() <= found.memory.items()


def test_details_of_a_hybrid_layout(hybrid: Layout, pages: str) -> None:
    found = Reader(hybrid, pages).details(PATH)
    assert (found.user, found.system) == (40, 37)
    assert (found.throttling["throttled"], found.throttling["burst"]) == (9, 0)
    assert (found.threads, found.threads_max) == (1, 64), "in the tree where the group is set aside"
    assert [(item.operation, item.value) for item in found.moved] == [("Read", 4096), ("Write", 0), ("Total", 4096)]
    assert found.memory["own_faults"] == 100
    assert found.hugepages == [("2MB", 0, None)]
    assert (found.memory["failures"], found.memory["peak"], found.memory["kernel"]) == (5, 4000000000, 6)
    assert "events_high" not in found.memory


def test_members_are_counted_once_with_those_below(v2: Layout, hybrid: Layout) -> None:
    assert sorted(Reader(v2).members(PATH)) == [11, 12, 13]
    assert Reader(hybrid).members(PATH) == [5]


def test_a_group_that_is_nowhere(v2: Layout, hybrid: Layout, pages: str) -> None:
    for where in (v2, hybrid):
        reader = Reader(where, pages)
        assert reader.read("/pod/gone") == Counters()
        assert reader.details("/pod/gone").memory == {}
        assert reader.members("/pod/gone") == []


def test_a_file_that_comes_later_is_found(v2: Layout, tmp_path: Path) -> None:
    reader = Reader(v2)
    current = tmp_path / "v2/pod/c1/memory.current"
    text = current.read_text()
    current.unlink()
    assert reader.read(PATH).memory is None
    current.write_text(text)
    assert reader.read(PATH).memory is not None


def test_descriptors_are_kept_and_given_back(v2: Layout) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    reader = Reader(v2)
    reader.read(PATH)
    kept = count()
    assert kept > before
    reader.read(PATH)
    assert count() == kept
    reader.keep({PATH})
    assert count() == kept
    reader.keep(set())
    assert count() == before


def test_too_many_groups_are_read_without_keeping_them(v2: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MOST_OPEN", 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = Reader(v2)
    assert reader.read(PATH).cpu == 2_500_000_000
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_long_files_are_read_to_their_end(tmp_path: Path) -> None:
    for length in (0, stats.LARGE - 1, stats.LARGE, 2 * stats.LARGE, 2 * stats.LARGE + 1):
        path = tmp_path / "file"
        path.write_text("x" * length)
        with path.open() as file:
            assert len(stats.whole(file.fileno())) == length
            assert len(stats.whole(file.fileno())) == length


def test_kernel_memory_before_the_kernel_told_its_sum() -> None:
    assert counters.details_v2({"kernel_stack": 3, "slab": 4}, {})["kernel"] == 7


@pytest.mark.parametrize(
    ("text", "value"), [("max\n", None), ("9223372036854771712\n", None), ("-1\n", None), ("0\n", 0), ("4096\n", 4096)]
)
def test_limits(text: str, value: int | None) -> None:
    assert counters.limit(text) == value


def test_pressure_without_full() -> None:
    found = counters.pressure(PRESSURE.splitlines()[0])
    assert found is not None
    assert (found.some.total, found.full) == (5855538650, None)


def test_names_of_page_sizes(pages: str) -> None:
    assert stats.page_sizes(pages) == ("2MB", "1GB")
    assert stats.size_name(64) == "64KB"
    assert stats.page_sizes("/nowhere") == ()
