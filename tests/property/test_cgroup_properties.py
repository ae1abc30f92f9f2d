"""Whatever `linux.resources` holds, it becomes writes or is refused by name; and device lists are brought to what is wanted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.cgroups import devices
from tare.cgroups.resources import plan
from tare.cgroups.units import resource_properties
from tare.cgroups.writes import putting_back
from tare.errors import FailedPrecondition, InvalidArgument

WORDS = """
    memory limit swap reservation swappiness disableOOMKiller checkBeforeUpdate kernelTCP cpu shares quota period burst idle cpus mems
    realtimeRuntime blockIO weight leafWeight weightDevice throttleReadBpsDevice throttleWriteIOPSDevice major minor rate pids rdma
    hcaHandles hcaObjects network classID priorities name priority hugepageLimits pageSize unified memory.high io.max devices allow type access
"""
KEYS = st.sampled_from(WORDS.split())
TEXTS = st.one_of(
    st.sampled_from(["0-3", "eth0", "2MB", "c", "rwm", "max", "8:0 rbps=1\n8:1 wbps=2"]), st.text(max_size=5)
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 64), st.integers(0, 1000), TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)
VERSIONS = st.dictionaries(
    st.sampled_from(["memory", "cpu", "cpuset", "io", "blkio", "pids", "rdma", "hugetlb", "devices", "net_cls", "cgroup"]),
    st.sampled_from([1, 2]),
)  # fmt: skip


@given(st.dictionaries(KEYS, VALUES, max_size=6), VERSIONS)
def test_any_resources(resources: dict[str, object], versions: dict[str, int]) -> None:
    try:
        planned = plan(resources, versions)
    except (InvalidArgument, FailedPrecondition) as error:
        assert "linux.resources" in str(error)
        return
    for item in planned.writes:
        assert "/" not in item.file and "\n" not in item.value
        assert item.controller in versions
        putting_back(item, "")


@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from([1, 2]))
def test_any_resources_as_properties(resources: dict[str, object], version: int) -> None:
    try:
        found = resource_properties(resources, version)
    except (InvalidArgument, FailedPrecondition) as error:
        assert "linux.resources" in str(error)
        return
    for _, (signature, value) in found:
        if signature == "t":
            assert isinstance(value, int) and 0 <= value < 1 << 64


NUMBERS = st.one_of(st.none(), st.integers(0, 2))
RULES = st.lists(
    st.builds(
        lambda allow, kind, major, minor, access: devices.Rule(
            allow=allow, type=kind, major=major, minor=minor, access=access
        ),
        st.booleans(),
        st.sampled_from([devices.BLOCK, devices.CHARACTER, None]),
        NUMBERS,
        NUMBERS,
        st.integers(1, 7),
    ),
    max_size=6,
)
DENIED = devices.Rule(allow=False)


def listed(allowed: dict[str, int]) -> str:
    """devices.list of a group that may use these."""
    return "".join(f"{device} {devices.letters(bits)}\n" for device, bits in allowed.items() if bits)


@pytest.mark.parametrize("back", [False, True])
@given(RULES, RULES)
def test_from_any_list_of_devices_to_any_other(
    back: bool, first: list[devices.Rule], second: list[devices.Rule]
) -> None:
    def without_all(rules: list[devices.Rule]) -> list[devices.Rule]:
        return [DENIED, *(rule for rule in rules if not rule.sweeping)]

    _, before = devices.evaluated(without_all(first))
    _, wanted = devices.evaluated(without_all(second))
    steps = (
        devices.change_back(listed(before), listed(wanted))
        if back
        else devices.change(listed(before), without_all(second))
    )
    now = {device: bits for device, bits in before.items() if bits}
    seen_denial = False
    for file, line in steps:
        device, _, access = line.rpartition(" ")
        bits = sum(devices.LETTERS[letter] for letter in access)
        if file == "devices.allow":
            assert not seen_denial
            now[device] = now.get(device, 0) | bits
        else:
            seen_denial = True
            now[device] &= ~bits
    assert {device: bits for device, bits in now.items() if bits} == {
        device: bits for device, bits in wanted.items() if bits
    }
