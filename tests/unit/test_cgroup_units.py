"""systemd's names for containers, and their limits as unit properties."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tare.cgroups.section import Section
from tare.cgroups.units import (
    INFINITY,
    Place,
    bits,
    parent_slice,
    place,
    place_of,
    quota_properties,
    resource_properties,
    scope_of,
    scope_properties,
    slice_properties,
)
from tare.errors import InvalidArgument


@pytest.mark.parametrize(
    ("path", "unit", "slice_name", "group"),
    [
        ("", "tare-abc.scope", "system.slice", "/system.slice/tare-abc.scope"),
        ("::", "abc.scope", "system.slice", "/system.slice/abc.scope"),
        ("user.slice:x:y", "x-y.scope", "user.slice", "/user.slice/x-y.scope"),
        ("a-b-c.slice:tare:n", "tare-n.scope", "a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice/tare-n.scope"),
        ("-.slice:tare:n", "tare-n.scope", "-.slice", "/tare-n.scope"),
        ("a.slice:tare:a-b.slice", "a-b.slice", "a.slice", "/a.slice/a-b.slice"),
        (":p:", "p-abc.scope", "system.slice", "/system.slice/p-abc.scope"),
    ],
)
def test_where_a_container_is(path: str, unit: str, slice_name: str, group: str) -> None:
    found = place(path, "abc")
    assert (found.unit, found.slice, found.path) == (unit, slice_name, group)


def test_below_a_pods_parent() -> None:
    expected = Place(slice="kubepods-pod1.slice", unit="tare-abc.scope")
    assert scope_of("kubepods-pod1.slice", "abc") == scope_of("/kubepods.slice/kubepods-pod1.slice/", "abc") == expected


@pytest.mark.parametrize(
    "path",
    [
        "/kubepods/pod1/abc",
        "a:b",
        "a:b:c",
        "a/b.slice:x:y",
        "a--b.slice:x:y",
        "-a.slice:x:y",
        "a.slice:x/..:y",
        "a.slice:x:y z",
        "a.slice:x:" + "y" * 250,
        "a.slice:x:y\n",
        "a.slice::b--c.slice",
        "a.slice:b:c:d",
    ],
)
def test_what_names_no_unit(path: str) -> None:
    with pytest.raises(InvalidArgument):
        place(path, "abc")


def test_slices_of_slices() -> None:
    known = {"a-b-c.slice": "a-b.slice", "a.slice": "-.slice", "a-b.slice": "a.slice"}
    assert {name: parent_slice(name) for name in known} == known


def test_a_scope_is_delegated_and_goes_when_it_is_empty() -> None:
    where = place("a.slice:tare:x", "x")
    properties = dict(scope_properties(where, "container x", [5, 6]))
    assert properties["PIDs"] == ("au", [5, 6])
    assert properties["Slice"] == ("s", "a.slice")
    assert properties["Delegate"] == ("b", True)
    assert properties["CollectMode"] == ("s", "inactive-or-failed")
    assert "PIDs" not in dict(slice_properties(where, "pod"))


@pytest.mark.parametrize(
    ("resources", "first", "second"),
    [
        ({}, {}, {}),
        ({"memory": {"limit": 4096, "swap": 8192, "reservation": 4096}}, {"MemoryLimit": 4096},
         {"MemoryMax": 4096, "MemorySwapMax": 4096, "MemoryLow": 4096}),
        ({"memory": {"limit": -1}}, {"MemoryLimit": INFINITY}, {"MemoryMax": INFINITY, "MemorySwapMax": INFINITY}),
        ({"cpu": {"shares": 1024}}, {"CPUShares": 1024}, {"CPUWeight": 100}),
        ({"cpu": {"idle": 1}}, {}, {"CPUWeight": 0}),
        ({"cpu": {"cpus": "0-1,8"}}, {}, {"AllowedCPUs": b"\x03\x01"}),
        ({"pids": {"limit": 7}}, {"TasksMax": 7}, {"TasksMax": 7}),
        ({"pids": {"limit": -1}}, {"TasksMax": INFINITY}, {"TasksMax": INFINITY}),
        ({"pids": {"limit": 0}, "blockIO": {"weight": 0}}, {}, {}),
        ({"blockIO": {"weight": 500}}, {"BlockIOWeight": 500}, {"IOWeight": 4950}),
    ],
)  # fmt: skip
def test_limits(resources: Mapping[str, object], first: dict[str, object], second: dict[str, object]) -> None:
    for version, expected in ((1, first), (2, second)):
        assert {name: value for name, (_, value) in resource_properties(resources, version)} == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [
        (0, 0, {}),
        (50000, 100000, {"CPUQuotaPerSecUSec": 500000, "CPUQuotaPeriodUSec": 100000}),
        (50000, 0, {"CPUQuotaPerSecUSec": 500000}),
        (-1, 0, {"CPUQuotaPerSecUSec": INFINITY}),
        (0, 5000, {"CPUQuotaPerSecUSec": INFINITY, "CPUQuotaPeriodUSec": 5000}),
        (1000, 99999, {"CPUQuotaPerSecUSec": 20000, "CPUQuotaPeriodUSec": 99999}),
    ],
)
def test_quotas_are_rounded_up_to_what_systemd_keeps(quota: int, period: int, expected: dict[str, int]) -> None:
    assert {name: value for name, (_, value) in quota_properties(quota, period)} == expected


def test_unified_keys_that_systemd_knows_and_others() -> None:
    unified = {
        "memory.high": "50M",
        "memory.max": "max",
        "pids.max": "5",
        "cpu.max": "1000 20000",
        "cpu.idle": "1",
        "cpuset.cpus": "1",
        "hugetlb.2MB.max": "0",
    }
    assert {name: value for name, (_, value) in resource_properties({"unified": unified}, 2)} == {
        "MemoryHigh": 50 << 20,
        "MemoryMax": INFINITY,
        "TasksMax": 5,
        "CPUQuotaPeriodUSec": 20000,
        "CPUQuotaPerSecUSec": 50000,
        "CPUWeight": 0,
        "AllowedCPUs": b"\x02",
    }
    with pytest.raises(InvalidArgument, match=r"unified\.memory\.high: 'much' is not a number"):
        resource_properties({"unified": {"memory.high": "much"}}, 2)


DENIED = {"allow": False, "access": "rwm"}


@pytest.mark.parametrize(
    ("rules", "policy", "allowed"),
    [
        ([{"allow": True, "access": "rwm"}], "auto", []),
        ([DENIED], "strict", []),
        (
            [
                DENIED,
                {"allow": True, "type": "c", "access": "m"},
                {"allow": True, "type": "c", "major": 136, "access": "rw"},
                {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "r"},
                {"allow": True, "type": "c", "minor": 7, "access": "r"},
            ],
            "strict",
            [("char-*", "rm"), ("char-136", "rw"), ("/dev/block/8:0", "r")],
        ),
        ([DENIED, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"},
          {"allow": False, "type": "c", "major": 1, "minor": 3, "access": "r"}], "strict", []),
    ],
)  # fmt: skip
def test_devices(rules: list[dict[str, object]], policy: str, allowed: list[tuple[str, str]]) -> None:
    found = dict(resource_properties({"devices": rules}, 2))
    assert found == {"DevicePolicy": ("s", policy), "DeviceAllow": ("a(ss)", allowed)}


@pytest.mark.parametrize("text", ["", "x", "3-1", "0-9000", "1,,2", "-1"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"cpu\.cpus"):
        bits(text, Section("cpu", {}), "cpus")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/kubepods.slice/kubepods-pod1.slice/tare-abc.scope", ("kubepods-pod1.slice", "tare-abc.scope")),
        ("/tare-abc.scope", ("-.slice", "tare-abc.scope")),
        ("/kubepods.slice/kubepods-pod1.slice", ("kubepods.slice", "kubepods-pod1.slice")),
        ("/kubepods.slice", ("-.slice", "kubepods.slice")),
        ("/kubepods-pod1.slice", None),
        ("/elsewhere/kubepods.slice", None),
        ("/kubepods/pod1/abc.scope", None),
        ("/kubepods.slice/a b.scope", None),
        ("/tare-pod1/abc", None),
    ],
)
def test_the_unit_that_a_group_is(path: str, found: tuple[str, str] | None) -> None:
    where = place_of(path)
    assert (where and (where.slice, where.unit)) == found
    if where is not None:
        assert where.path == path
