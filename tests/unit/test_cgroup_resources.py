"""OCI linux.resources as writes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tare.cgroups.resources import Plan, plan, weight
from tare.errors import InvalidArgument

V1 = dict.fromkeys(("memory", "cpu", "cpuset", "pids", "hugetlb", "devices"), 1)
V2 = dict.fromkeys(("memory", "cpu", "cpuset", "pids", "hugetlb", "cgroup"), 2)
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


def test_unified_keys_are_for_v2() -> None:
    resources = {"unified": {"memory.high": "100M", "cgroup.max.depth": "3"}}
    assert pairs(plan(resources, V2)) == [("memory.high", "100M"), ("cgroup.max.depth", "3")]
    assert plan(resources, V1) == Plan((), ("memory.high", "cgroup.max.depth"))


def test_what_is_not_supported_is_named() -> None:
    assert plan({"blockIO": {"weight": 10}, "rdma": {}}, V2).skipped == ("blockIO",)


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
        ({"hugepageLimits": {}}, r"hugepageLimits: is not a list"),
        ({"devices": [{"allow": "yes"}]}, r"devices\[0\]\.allow"),
        ({"devices": [{"allow": True, "type": "z"}]}, r"devices\[0\]\.type"),
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
