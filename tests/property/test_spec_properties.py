"""What holds for every container's configuration, and for every set of limits, rules and profiles."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path, PurePosixPath
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tare.cgroups import devices
from tare.cgroups.devices import Rule
from tare.cgroups.resources import plan
from tare.errors import InvalidArgument
from tare.runtime.records import Capabilities, ContainerConfig, ContainerMetadata, ImageRef, Mount, NamespaceOptions
from tare.runtime.seccomp_profile import check_profile
from tare.runtime.signals import signal_number
from tare.runtime.spec_mounts import mounts
from tare.runtime.spec_process import ALL_CAPABILITIES, arguments, capabilities
from tare.runtime.spec_types import PodSurroundings
from tests.support.bpf import run

NAMES = st.lists(
    st.sampled_from(["ALL", "CAP_ALL", "kill", "CAP_NET_RAW", "SYS_ADMIN", "MKNOD", "bogus"]), max_size=4
).map(tuple)
WORDS = st.lists(st.text(max_size=3), max_size=3)
SEGMENT = st.sampled_from(["dev", "etc", "hosts", "shm", "proc", "sys", "a", "b", "..", "."])
PATH = st.lists(SEGMENT, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 66), 1 << 66) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "memory": st.dictionaries(st.sampled_from(["limit", "swap", "reservation", "swappiness"]), st.integers(-2, 1 << 20)) | JSON,
        "cpu": st.dictionaries(st.sampled_from(["shares", "quota", "period", "burst", "idle"]), st.integers(-2, 300000)) | JSON,
        "pids": st.fixed_dictionaries({"limit": st.integers(-2, 1 << 40)}) | JSON,
        "hugepageLimits": st.lists(st.fixed_dictionaries({"pageSize": st.text(max_size=4), "limit": st.integers()}), max_size=2) | JSON,
        "unified": st.dictionaries(st.sampled_from(["memory.max", "cpu.weight", "x", "cgroup.procs"]), st.text(max_size=3)) | JSON,
        "devices": JSON,
    },
)  # fmt: skip
NUMBER = st.sampled_from([None, 0, 1, 5])
RULES = st.lists(
    st.builds(
        Rule,
        allow=st.booleans(),
        type=st.sampled_from([None, devices.BLOCK, devices.CHARACTER]),
        major=NUMBER,
        minor=NUMBER,
        access=st.integers(1, 7),
    ),
    max_size=6,
)


@given(NAMES, NAMES, NAMES, st.booleans())
def test_capability_sets(
    add: tuple[str, ...], drop: tuple[str, ...], ambient: tuple[str, ...], privileged: bool
) -> None:
    wanted = Capabilities(add=add, drop=drop, add_ambient=ambient)
    try:
        found = capabilities(wanted, privileged=privileged)
    except InvalidArgument as error:
        assert "bogus" in {*add, *drop, *ambient} and "bogus" in str(error)
        return
    bounding = set(found["bounding"])
    assert bounding <= set(ALL_CAPABILITIES) and len(found["bounding"]) == len(bounding)
    assert found["effective"] == found["permitted"] == found["bounding"]
    assert found["inheritable"] == found["ambient"] and set(found["ambient"]) <= bounding
    dropped = {"CAP_" + name.upper().removeprefix("CAP_") for name in drop}
    assert not bounding & dropped


@given(WORDS, WORDS, WORDS, WORDS)
def test_arguments(command: list[str], args: list[str], entrypoint: list[str], cmd: list[str]) -> None:
    try:
        words = arguments(command, args, entrypoint, cmd)
    except InvalidArgument:
        return
    assert words and words[0] and not any("\0" in word for word in words)
    assert words == (command or entrypoint) + (args or ([] if command else cmd))


@given(st.lists(PATH, max_size=5), st.booleans())
def test_mounts_come_after_what_they_lie_in(paths: list[str], readonly: bool) -> None:
    wanted = tuple(Mount(container_path=path, host_path="/x", readonly=readonly) for path in paths)
    container = ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i"), mounts=wanted)
    surroundings = PodSurroundings(pins={}, directory=Path("/p"), hostname="")
    try:
        found = mounts(container, surroundings, NamespaceOptions())
    except InvalidArgument:
        assert any(posixpath.normpath(path).strip("/") == "" for path in paths)
        return
    places = [PurePosixPath(mount["destination"]) for mount in found]
    own = [place for place, mount in zip(places, found, strict=True) if mount["source"] == "/x"]
    assert len(own) == len(paths)
    for index, place in enumerate(places):
        assert ".." not in place.parts
        later = [other for other in places[index + 1 :] if other in place.parents and other in own]
        # Only a default file system can be below a mount of the request that comes later: it was there before.
        assert not later or found[index]["type"] != "bind" or place == PurePosixPath("/dev/shm")
    defaults = [place for place, mount in zip(places, found, strict=True) if mount["source"] != "/x"]
    assert not set(defaults) & set(own) and len(set(defaults)) == len(defaults)


@given(LIMITS | st.dictionaries(st.text(max_size=6), JSON, max_size=3), st.sampled_from([1, 2]))
def test_limits_are_lines_or_an_error(resources: dict[str, Any], version: int) -> None:
    versions = dict.fromkeys(("memory", "cpu", "cpuset", "pids", "hugetlb"), version)
    try:
        found = plan(resources, versions)
    except InvalidArgument as error:
        assert "linux.resources" in str(error)
        return
    for item in found.writes:
        assert item.value and "/" not in item.file and "\n" not in item.value


@given(
    RULES,
    st.sampled_from([devices.BLOCK, devices.CHARACTER]),
    st.integers(1, 7),
    st.sampled_from([0, 1, 5, 9]),
    st.sampled_from([0, 1, 9]),
)
def test_device_programs_do_what_the_rules_say(
    rules: list[Rule], kind: int, access: int, major: int, minor: int
) -> None:
    expected = 0
    for rule in devices.merged(rules):
        wanted = ((rule.type, kind), (rule.major, major), (rule.minor, minor))
        about = all(mine is None or mine == theirs for mine, theirs in wanted)
        if about and (access & ~rule.access == 0 if rule.allow else access & rule.access != 0):
            expected = int(rule.allow)
    assert run(devices.program(rules), kind, access, major, minor) == expected


@given(RULES)
def test_merging_rules_only_ever_allows_what_one_of_them_allows(rules: list[Rule]) -> None:
    allowed = {(rule.type, rule.major, rule.minor) for rule in rules if rule.allow}
    denied = [rule for rule in rules if not rule.allow]
    merged = devices.merged(rules)
    assert {(rule.type, rule.major, rule.minor) for rule in merged if rule.allow} <= allowed
    assert [rule for rule in merged if not rule.allow] == denied[len(denied) - sum(not rule.allow for rule in merged) :]


@given(JSON | st.fixed_dictionaries({"defaultAction": st.just("SCMP_ACT_ALLOW"), "syscalls": JSON}))
def test_any_json_is_a_profile_or_an_error(value: object) -> None:
    try:
        check_profile("p", json.loads(json.dumps(value)))
    except InvalidArgument as error:
        assert str(error).startswith("read seccomp profile p")
    else:
        assert isinstance(value, dict)


@given(st.text(max_size=12) | st.integers().map(str))
def test_any_text_is_a_signal_or_an_error(name: str) -> None:
    try:
        assert 1 <= signal_number(name) <= 64
    except InvalidArgument:
        return
