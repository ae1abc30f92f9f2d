"""OCI linux.resources as writes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tare.cgroups.cpu import weight
from tare.cgroups.memory import Room
from tare.cgroups.resources import Plan, plan
from tare.errors import FailedPrecondition, InvalidArgument

V1 = dict.fromkeys(("memory", "cpu", "cpuset", "pids", "hugetlb", "devices", "blkio", "rdma", "net_cls", "net_prio"), 1)
V2 = dict.fromkeys(("memory", "cpu", "cpuset", "pids", "hugetlb", "cgroup", "io", "rdma"), 2)
FULL: dict[str, object] = {
    "memory": {"limit": 64 << 20, "swap": 128 << 20, "reservation": 32 << 20},
    "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1", "mems": "0"},
    "pids": {"limit": 100},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
}


def pairs(found: Plan) -> list[tuple[str, str]]:
    return [(item.file, item.value) for item in found.writes]


def test_v1() -> None:
    found = plan(FULL, V1)
    assert pairs(found) == [
        ("memory.limit_in_bytes", str(64 << 20)),
        ("memory.memsw.limit_in_bytes", str(128 << 20)),
        ("memory.soft_limit_in_bytes", str(32 << 20)),
        ("cpu.shares", "1024"),
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "50000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "100"),
        ("hugetlb.2MB.limit_in_bytes", str(4 << 20)),
        ("hugetlb.2MB.rsvd.limit_in_bytes", str(4 << 20)),
    ]
    assert found.skipped == ()


def test_v2() -> None:
    assert pairs(plan(FULL, V2)) == [
        ("memory.max", str(64 << 20)),
        ("memory.swap.max", str(64 << 20)),
        ("memory.low", str(32 << 20)),
        ("cpu.weight", "100"),
        ("cpu.max", "50000 100000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "100"),
        ("hugetlb.2MB.max", str(4 << 20)),
        ("hugetlb.2MB.rsvd.max", str(4 << 20)),
    ]


def test_hybrid_takes_each_controller_where_it_is() -> None:
    found = plan(FULL, {"memory": 1, "hugetlb": 2})
    files = [item.file for item in found.writes]
    assert files[0] == "memory.limit_in_bytes" and files[-1] == "hugetlb.2MB.rsvd.max"
    assert found.skipped == ("cpu", "cpuset", "pids")


@pytest.mark.parametrize(
    ("resources", "first", "second"),
    [
        ({"memory": {"limit": -1, "swap": -1}}, [("memory.limit_in_bytes", "-1"), ("memory.memsw.limit_in_bytes", "-1")],
         [("memory.max", "max"), ("memory.swap.max", "max")]),
        ({"memory": {"limit": -1}}, [("memory.limit_in_bytes", "-1"), ("memory.memsw.limit_in_bytes", "-1")],
         [("memory.max", "max"), ("memory.swap.max", "max")]),
        ({"memory": {"kernel": 1 << 30, "useHierarchy": True, "disableOOMKiller": False, "checkBeforeUpdate": True}},
         [("memory.oom_control", "0")], []),
        ({"memory": {"kernel": -1, "kernelTCP": -1}}, [("memory.kmem.tcp.limit_in_bytes", "-1")],
         [("memory.kmem.tcp.limit_in_bytes", "-1")]),
        ({"cpu": {"quota": -1}}, [("cpu.cfs_quota_us", "-1")], [("cpu.max", "max")]),
        ({"cpu": {"quota": -1, "period": 5000}}, [("cpu.cfs_period_us", "5000"), ("cpu.cfs_quota_us", "-1")],
         [("cpu.max", "max 5000")]),
        ({"pids": {"limit": -1}}, [("pids.max", "max")], [("pids.max", "max")]),
        ({"pids": {"limit": 0}, "memory": {"limit": 0}, "cpu": {"shares": 0}}, [], []),
        ({"cpu": {"burst": 1000, "idle": 1}}, [("cpu.cfs_burst_us", "1000"), ("cpu.idle", "1")],
         [("cpu.max.burst", "1000"), ("cpu.idle", "1")]),
        ({"memory": None, "cpu": {}}, [], []),
    ],
)  # fmt: skip
def test_no_limit_and_not_set(
    resources: Mapping[str, object], first: list[tuple[str, str]], second: list[tuple[str, str]]
) -> None:
    assert pairs(plan(resources, V1)) == first
    assert pairs(plan(resources, V2)) == second


def test_devices_are_lines_on_v1() -> None:
    rules = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": True, "type": "c", "major": 136, "minor": -1, "access": "rw"},
        {"allow": False, "type": "b", "major": 8, "minor": 0, "access": "w"},
    ]
    found = plan({"devices": rules}, V1)
    assert found.devices == ()
    assert pairs(found) == [
        ("devices.deny", "a"),
        ("devices.allow", "c *:* m"),
        ("devices.allow", "c 1:3 rwm"),
        ("devices.allow", "c 136:* rw"),
        ("devices.deny", "b 8:0 w"),
    ]


def test_allowing_all_devices_first_says_nothing() -> None:
    assert plan({"devices": [{"allow": True, "access": "rwm"}]}, V1).writes == ()


BLOCK: dict[str, object] = {
    "weight": 500,
    "weightDevice": [{"major": 8, "minor": 0, "weight": 1000}, {"major": 8, "minor": 16, "weight": 10}],
    "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1 << 20}, {"major": 8, "minor": 16, "rate": 0}],
    "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 30}],
}


def alternatives(found: Plan) -> list[tuple[str, str]]:
    return [(item.instead.file, item.instead.value) for item in found.writes if item.instead]


def test_block_io_on_v1() -> None:
    leaves = {"leafWeight": 20, "weightDevice": [{"major": 8, "minor": 0, "leafWeight": 30}]}
    found = plan({"blockIO": BLOCK}, V1)
    assert pairs(found) == [
        ("blkio.bfq.weight", "500"),
        ("blkio.bfq.weight_device", "8:0 1000"),
        ("blkio.bfq.weight_device", "8:16 10"),
        ("blkio.throttle.read_bps_device", "8:0 1048576"),
        ("blkio.throttle.read_bps_device", "8:16 0"),
        ("blkio.throttle.write_iops_device", "8:0 30"),
    ]
    assert alternatives(found) == [
        ("blkio.weight", "500"),
        ("blkio.weight_device", "8:0 1000"),
        ("blkio.weight_device", "8:16 10"),
    ]
    assert pairs(plan({"blockIO": leaves}, V1)) == [("blkio.leaf_weight", "20"), ("blkio.leaf_weight_device", "8:0 30")]


def test_block_io_on_v2_has_other_weights_and_one_line_a_device() -> None:
    found = plan({"blockIO": BLOCK}, V2)
    assert pairs(found) == [
        ("io.bfq.weight", "500"),
        ("io.bfq.weight", "8:0 1000"),
        ("io.bfq.weight", "8:16 10"),
        ("io.max", "8:0 rbps=1048576 wiops=30"),
        ("io.max", "8:16 rbps=max"),
    ]
    assert alternatives(found) == [("io.weight", "4950"), ("io.weight", "8:0 10000"), ("io.weight", "8:16 1")]


def test_rdma_and_network() -> None:
    wanted = {
        "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}, "rxe3": {"hcaObjects": 0}},
        "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
    }
    devices = [("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000"), ("rdma.max", "rxe3 hca_object=0")]
    network = [("net_cls.classid", "1048577"), ("net_prio.ifpriomap", "eth0 500")]
    assert pairs(plan(wanted, V1)) == devices + network
    assert pairs(plan(wanted, V2)) == devices


def test_what_v1_alone_has() -> None:
    wanted = {
        "memory": {"swappiness": 10, "disableOOMKiller": True, "kernelTCP": 4096},
        "cpu": {"realtimePeriod": 1000000, "realtimeRuntime": 950000},
    }
    assert pairs(plan(wanted, V1)) == [
        ("memory.kmem.tcp.limit_in_bytes", "4096"),
        ("memory.swappiness", "10"),
        ("memory.oom_control", "1"),
        ("cpu.rt_period_us", "1000000"),
        ("cpu.rt_runtime_us", "950000"),
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        {"memory": {"swappiness": 0}},
        {"memory": {"disableOOMKiller": True}},
        {"cpu": {"realtimePeriod": 1}},
        {"cpu": {"realtimeRuntime": -1}},
        {"blockIO": {"leafWeight": 10}},
        {"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 10}]}},
    ],
)
def test_what_v2_cannot_express_is_an_error(wanted: dict[str, dict[str, object]]) -> None:
    ((member, inner),) = wanted.items()
    key = "leafWeight" if member == "blockIO" else next(iter(inner))
    with pytest.raises(FailedPrecondition, match=rf"linux\.resources\.{member}\.(.*\.)?{key}: .*version 2"):
        plan(wanted, V2)


def test_the_room_that_an_update_needs_is_v2s_affair() -> None:
    asks = {"limit": 1 << 20, "swap": 2 << 20, "checkBeforeUpdate": True}
    assert plan({"memory": asks}, V2).room == Room(1 << 20, 2 << 20)
    assert plan({"memory": asks}, V1).room is None
    assert plan({"memory": {**asks, "swap": -1}}, V2).room == Room(1 << 20, None)
    for less in ({"limit": -1}, {"limit": 0}, {"limit": 1 << 20, "checkBeforeUpdate": False}):
        assert plan({"memory": {"checkBeforeUpdate": True, **less}}, V2).room is None


def test_unified_keys_are_for_v2_and_written_line_by_line() -> None:
    lines = "259:0 rbps=2097152 wiops=120\n253:0 rbps=2097152\n"
    resources = {"unified": {"memory.high": "100M", "cgroup.max.depth": "3", "io.max": lines}}
    assert pairs(plan(resources, {**V2, "io": 2})) == [
        ("memory.high", "100M"),
        ("cgroup.max.depth", "3"),
        ("io.max", "259:0 rbps=2097152 wiops=120"),
        ("io.max", "253:0 rbps=2097152"),
    ]


@pytest.mark.parametrize("key", ["memory.high", "cgroup.max.depth", "io.max"])
def test_unified_keys_of_a_controller_that_is_not_there_are_an_error(key: str) -> None:
    with pytest.raises(FailedPrecondition, match=rf"linux\.resources\.unified\.{key}: there is no controller"):
        plan({"unified": {key: "1"}}, V1)


def test_controllers_that_are_not_there_are_named() -> None:
    wanted = {
        "blockIO": {"weight": 10},
        "rdma": {"mlx4_0": {"hcaHandles": 1}},
        "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 1}]},
        "memory": {"swappiness": 1},
    }
    assert plan(wanted, dict.fromkeys(("cpu", "cgroup"), 2)).skipped == ("memory", "io", "rdma", "net_cls", "net_prio")
    assert plan(wanted, {"cpu": 1}).skipped == ("memory", "blkio", "rdma", "net_cls", "net_prio")
    assert plan({"blockIO": {}, "rdma": {}, "network": {}, "memory": {}}, {"cpu": 1}) == Plan((), ())


def test_a_limit_on_kernel_memory_is_named_since_no_kernel_applies_it() -> None:
    for versions in (V1, V2):
        assert plan({"memory": {"kernel": 1 << 30}}, versions).skipped == ("memory.kmem.limit_in_bytes",)
        assert plan({"memory": {"kernel": -1}}, versions).skipped == ()


@pytest.mark.parametrize(
    ("resources", "word"),
    [
        ({"memory": {"limit": 100}}, r"memory\.limit: 100 bytes are less than a page"),
        ({"memory": {"limit": -2}}, r"memory\.limit: -2 is not between"),
        ({"memory": {"limit": 1 << 64}}, r"memory\.limit: .* is not between"),
        ({"memory": {"limit": "64M"}}, r"memory\.limit: '64M' is not a whole number"),
        ({"memory": {"limit": True}}, r"memory\.limit: True is not a whole number"),
        ({"memory": {"limit": 8192, "swap": 4096}}, r"memory\.swap: 4096 is less than the memory limit"),
        ({"memory": {"limit": -1, "swap": 4096}}, r"memory\.swap: 4096 is less than no memory limit"),
        ({"memory": []}, r"linux\.resources\.memory: is not an object"),
        ({"cpu": {"cpus": "0\n1"}}, r"cpu\.cpus"),
        ({"cpu": {"idle": 2}}, r"cpu\.idle: 2"),
        ({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}, r"hugepageLimits\[0\]\.pageSize"),
        (
            {"hugepageLimits": [{"pageSize": "2Mi", "limit": 1}]},
            r"hugepageLimits\[0\]\.pageSize: '2Mi' is no size of pages",
        ),
        (
            {"hugepageLimits": [{"pageSize": "MB", "limit": 1}]},
            r"hugepageLimits\[0\]\.pageSize: 'MB' is no size of pages",
        ),
        ({"hugepageLimits": [{"pageSize": "2MB"}]}, r"hugepageLimits\[0\]\.limit: is absent"),
        ({"hugepageLimits": {}}, r"hugepageLimits: is not a list"),
        ({"pids": {}}, r"pids\.limit: is absent"),
        ({"devices": [{"access": "rwm"}]}, r"devices\[0\]\.allow: is absent"),
        ({"devices": [{"allow": "yes"}]}, r"devices\[0\]\.allow"),
        ({"devices": [{"allow": True, "type": "z"}]}, r"devices\[0\]\.type"),
        ({"cpu": {"burst": 2000, "quota": 1000}}, r"cpu\.burst: 2000 is more than the quota"),
        ({"cpu": {"realtimeRuntime": "1"}}, r"cpu\.realtimeRuntime"),
        ({"memory": {"kernel": "1"}}, r"memory\.kernel"),
        ({"memory": {"swappiness": 101}}, r"memory\.swappiness"),
        ({"blockIO": {"weight": 9}}, r"blockIO\.weight: 9 is not between 10 and 1000"),
        ({"blockIO": {"weight": 1001}}, r"blockIO\.weight"),
        ({"blockIO": {"weightDevice": [{"major": 8, "minor": 0}]}}, r"weightDevice\[0\]\.weight: there is neither"),
        ({"blockIO": {"weightDevice": [{"major": 8, "weight": 10}]}}, r"weightDevice\[0\]\.minor: is absent"),
        (
            {"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0}]}},
            r"throttleReadBpsDevice\[0\]\.rate: is abs",
        ),
        ({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": -1}]}}, r"\[0\]\.rate: -1"),
        ({"rdma": {"mlx4_0": {}}}, r"rdma\.mlx4_0\.hcaHandles: there is neither"),
        ({"rdma": {"a b": {"hcaHandles": 1}}}, r"'a b' is no name of a device"),
        ({"rdma": {"mlx4_0": 3}}, r"rdma\.mlx4_0: is not an object"),
        ({"network": {"classID": 1 << 32}}, r"network\.classID"),
        ({"network": {"priorities": [{"name": "e 0", "priority": 1}]}}, r"priorities\[0\]\.name"),
        ({"network": {"priorities": [{"name": "e0"}]}}, r"priorities\[0\]\.priority: is absent"),
        ({"unified": {"cgroup.freeze": "1"}}, r"unified\.cgroup\.freeze"),
        ({"unified": {"memory.": "1"}}, r"unified\.memory\."),
        ({"unified": {".max": "1"}}, r"unified\.\.max"),
        ({"unified": {"..": "1"}}, r"unified\.\.\."),
        ({"unified": {"memory.max\n": "1"}}, r"is not one line"),
        ({"unified": {"../memory.max": "1"}}, r"unified\.\.\./memory\.max"),
        ({"unified": {"cgroup.procs": "1"}}, r"unified\.cgroup\.procs"),
        ({"unified": {"memory": "1"}}, r"unified\.memory"),
        ({"unified": {"memory.max": 1}}, r"unified\.memory\.max"),
    ],
)
def test_what_no_kernel_accepts(resources: Mapping[str, object], word: str) -> None:
    for versions in (V1, V2):
        with pytest.raises(InvalidArgument, match=word):
            plan(resources, versions)


def test_swap_without_a_memory_limit_cannot_be_said_in_v2() -> None:
    with pytest.raises(InvalidArgument, match="a swap limit needs a memory limit"):
        plan({"memory": {"swap": 8192}}, V2)


def test_weight_is_the_fields_curve() -> None:
    known = {1: 1, 2: 1, 102: 17, 1024: 100, 2000: 170, 262144: 10000, 1 << 40: 10000}
    assert {shares: weight(shares) for shares in known} == known
    weights = [weight(shares) for shares in range(2, 5000)]
    assert weights == sorted(weights)
