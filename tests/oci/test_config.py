"""Every wrong configuration is refused with the path that is wrong: by property over the schema, by example for what members say of each other."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.handlers import checking
from tare.handlers.shapes import InvalidConfig
from tare.oci import config, documents, templates

Place = tuple[str | int, ...]

RICH: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "inside",
    "domainname": "example.org",
    "annotations": {"one": "1", "two.three": ""},
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3, 4], "username": ""},
        "args": ["sh", "-c", ""],
        "env": ["PATH=/bin", "A="],
        "cwd": "/",
        "capabilities": {
            kind: ["CAP_CHOWN"] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        "noNewPrivileges": True,
        "apparmorProfile": "",
        "selinuxLabel": "",
        "oomScoreAdj": 100,
        "scheduler": {"policy": "SCHED_FIFO", "nice": 0, "priority": 1, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "execCPUAffinity": {"initial": "0", "final": "0-1"},
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/data",
            "source": "/srv",
            "options": ["rbind", "ro"],
            "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 10}],
            "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 10}],
        },
    ],
    "hooks": {
        point: [{"path": "/bin/hook", "args": ["hook"], "env": ["A=b"], "timeout": 5}]
        for point in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    },
    "linux": {
        "namespaces": [
            {"type": kind} for kind in ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")
        ],
        "uidMappings": [
            {"containerID": 0, "hostID": 100000, "size": 1000},
            {"containerID": 1000, "hostID": 200000, "size": 9},
        ],
        "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 1000}],
        "timeOffsets": {"monotonic": {"secs": 5, "nanosecs": 6}, "boottime": {"secs": -5, "nanosecs": 0}},
        "devices": [
            {"path": "/dev/a", "type": "c", "major": 1, "minor": 5, "fileMode": 420, "uid": 0, "gid": 0},
            {"path": "/dev/b", "type": "p"},
        ],
        "cgroupsPath": "/some/group",
        "resources": {
            "unified": {"memory.high": "max"},
            "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}],
            "memory": {
                "limit": 1, "reservation": 1, "swap": -1, "kernel": -1, "kernelTCP": -1, "swappiness": 60,
                "disableOOMKiller": False, "useHierarchy": True, "checkBeforeUpdate": True,
            },
            "cpu": {
                "shares": 2, "quota": -1, "burst": 0, "period": 1000, "realtimeRuntime": 1, "realtimePeriod": 2,
                "cpus": "0", "mems": "0", "idle": 0,
            },
            "pids": {"limit": 10},
            "blockIO": {
                "weight": 10, "leafWeight": 10,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 100, "leafWeight": 10}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 1}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
            "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 1}]},
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 4}},
        },
        "intelRdt": {"closID": "a", "l3CacheSchema": "", "memBwSchema": "", "enableCMT": False, "enableMBM": False},
        "sysctl": {"net.core.somaxconn": "1", "kernel.msgmax": "1"},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "", "listenerMetadata": "", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {
                    "names": ["read"], "action": "SCMP_ACT_ALLOW", "errnoRet": 1,
                    "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "rootfsPropagation": "rslave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "",
        "personality": {"domain": "LINUX", "flags": []},
    },
}  # fmt: skip


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Every place in a value below its top."""
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*here, key)
        yield from places(item, (*here, key))


def path(place: Place) -> str:
    """A place as errors name it."""
    text = ""
    for key in place:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def at(value: Any, place: Place) -> Any:
    """What is at a place."""
    for key in place:
        value = value[key]
    return value


def changed(place: Place, new: Any) -> dict[str, Any]:
    """The rich configuration with something else in one place."""
    found = copy.deepcopy(RICH)
    at(found, place[:-1])[place[-1]] = new
    return found


def wrong_path(value: Any) -> str:
    """The path that a configuration is refused for."""
    with pytest.raises(InvalidConfig) as refused:
        checking.check(value)
    assert str(refused.value).startswith(f"{refused.value.path}: ")
    return refused.value.path


PLACES = list(places(RICH))
MAPS = ("annotations", "sysctl", "unified", "rdma")
OTHERS: tuple[Any, ...] = (7, 1.5, True, "text", ["x"], {"x": 1})


def kind(value: Any) -> type:
    """What JSON tells apart."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def test_the_rich_one_and_the_template_are_right() -> None:
    checking.check(RICH)
    checking.check(templates.spec())
    assert config.parse(documents.encoded(RICH)) == RICH


@given(st.sampled_from(PLACES), st.sampled_from(OTHERS))
def test_another_type_is_refused_at_its_place(place: Place, other: Any) -> None:
    if kind(other) is kind(at(RICH, place)) and not (isinstance(other, float) and isinstance(at(RICH, place), int)):
        return
    assert wrong_path(changed(place, other)) == path(place)


@given(st.sampled_from(PLACES))
def test_nothing_in_an_array_or_map_is_refused_and_elsewhere_it_is_absence(place: Place) -> None:
    value = changed(place, None)
    without = copy.deepcopy(RICH)
    if isinstance(place[-1], int) or place[-2:-1] in [(name,) for name in MAPS]:
        assert wrong_path(value) == path(place)
        return
    del at(without, place[:-1])[place[-1]]
    assert outcome(value) == outcome(without)


def outcome(value: Any) -> str:
    """The path that is wrong, or nothing."""
    try:
        checking.check(value)
    except InvalidConfig as error:
        return error.path
    return ""


@given(st.sampled_from([place for place in PLACES if isinstance(at(RICH, place), dict)]), st.sampled_from(OTHERS))
def test_unknown_members_are_ignored(place: Place, value: Any) -> None:
    if place[-1] in MAPS:
        return
    extended = copy.deepcopy(RICH)
    at(extended, place)["x-unknown"] = value
    checking.check(extended)


@given(st.sampled_from([place for place in PLACES if isinstance(at(RICH, place), str)]))
def test_a_string_with_a_zero_byte_is_refused(place: Place) -> None:
    assert wrong_path(changed(place, "a\0b")) == path(place)


@pytest.mark.parametrize(
    "place",
    [
        ("ociVersion",), ("root",), ("process",), ("root", "path"), ("process", "args"), ("process", "cwd"),
        ("process", "user"), ("process", "user", "uid"), ("process", "rlimits", 0, "soft"),
        ("process", "consoleSize", "width"), ("process", "scheduler", "policy"), ("process", "ioPriority", "class"),
        ("mounts", 0, "destination"), ("hooks", "poststop", 0, "path"), ("linux", "namespaces", 3, "type"),
        ("linux", "uidMappings", 1, "size"), ("linux", "devices", 0, "major"), ("linux", "devices", 0, "type"),
        ("linux", "resources", "devices", 0, "allow"), ("linux", "resources", "hugepageLimits", 0, "limit"),
        ("linux", "seccomp", "defaultAction"), ("linux", "seccomp", "syscalls", 0, "names"),
        ("linux", "seccomp", "syscalls", 0, "args", 0, "op"), ("linux", "personality", "domain"),
    ],
    ids=path,
)  # fmt: skip
def test_what_is_required_is_missed(place: Place) -> None:
    value = copy.deepcopy(RICH)
    del at(value, place[:-1])[place[-1]]
    assert wrong_path(value) == path(place)


WRONG: list[tuple[Place, Any]] = [
    (("ociVersion",), "1.2"),
    (("ociVersion",), "2.0.0"),
    (("ociVersion",), "01.0.0"),
    (("root", "path"), ""),
    (("process", "args"), []),
    (("process", "args", 0), ""),
    (("process", "cwd"), "relative"),
    (("process", "env", 1), "novalue"),
    (("process", "env", 1), "=x"),
    (("process", "oomScoreAdj"), 1001),
    (("process", "oomScoreAdj"), -1001),
    (("process", "user", "uid"), -1),
    (("process", "user", "uid"), 1 << 32),
    (("process", "user", "umask"), 0o1000),
    (("process", "rlimits", 0, "type"), "RLIMIT_NONE"),
    (("process", "rlimits", 1, "type"), "RLIMIT_NOFILE"),
    (("process", "rlimits", 0, "soft"), 3),
    (("process", "rlimits", 0, "hard"), 1 << 64),
    (("process", "scheduler", "policy"), "SCHED_FAIR"),
    (("process", "scheduler", "priority"), 0),
    (("process", "scheduler", "priority"), 100),
    (("process", "scheduler", "nice"), 20),
    (("process", "ioPriority", "priority"), 8),
    (("mounts", 0, "destination"), "proc"),
    (("mounts", 0, "type"), ""),
    (("mounts", 1, "source"), ""),
    (("mounts", 1, "gidMappings"), []),
    (("hooks", "prestart", 0, "path"), "hook"),
    (("hooks", "prestart", 0, "timeout"), 0),
    (("linux", "namespaces", 0, "type"), "pids"),
    (("linux", "namespaces", 0, "path"), "proc/1/ns/pid"),
    (("linux", "namespaces", 1, "type"), "pid"),
    (("linux", "uidMappings", 0, "size"), 0),
    (("linux", "uidMappings", 1, "containerID"), 999),
    (("linux", "uidMappings", 1, "hostID"), 100999),
    (("linux", "gidMappings", 0, "size"), (1 << 32) - 1),
    (("linux", "gidMappings"), []),
    (("linux", "timeOffsets", "monotonic", "nanosecs"), 10**9),
    (("linux", "devices", 0, "path"), "dev/a"),
    (("linux", "devices", 1, "path"), "/dev/a"),
    (("linux", "devices", 0, "type"), "x"),
    (("linux", "devices", 0, "fileMode"), 0o200000),
    (("linux", "cgroupsPath"), "/a/../b"),
    (("linux", "rootfsPropagation"), "sideways"),
    (("linux", "maskedPaths", 0), "proc/kcore"),
    (("linux", "readonlyPaths", 0), ""),
    (("linux", "resources", "devices", 0, "access"), "rwx"),
    (("linux", "resources", "devices", 1, "type"), "d"),
    (("linux", "resources", "hugepageLimits", 0, "pageSize"), "2 MB"),
    (("linux", "resources", "hugepageLimits", 0, "pageSize"), "0MB"),
    (("linux", "resources", "cpu", "idle"), 2),
    (("linux", "resources", "cpu", "shares"), -1),
    (("linux", "resources", "blockIO", "weight"), 1001),
    (("linux", "resources", "rdma", "mlx5_1", "hcaHandles"), -1),
    (("linux", "seccomp", "defaultAction"), "ALLOW"),
    (("linux", "seccomp", "architectures", 0), "x86_64"),
    (("linux", "seccomp", "flags", 0), "FAST"),
    (("linux", "seccomp", "syscalls", 0, "names"), []),
    (("linux", "seccomp", "syscalls", 0, "args", 0, "index"), 6),
    (("linux", "seccomp", "syscalls", 0, "args", 0, "op"), "EQ"),
    (("linux", "personality", "domain"), "BSD"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), WRONG, ids=[f"{path(place)}={value!r}" for place, value in WRONG])
def test_a_wrong_value_is_refused_at_its_place(place: Place, value: Any) -> None:
    assert wrong_path(changed(place, value)) == path(place)


def without(kind_of_namespace: str) -> dict[str, Any]:
    """The rich configuration without one namespace."""
    found = copy.deepcopy(RICH)
    found["linux"]["namespaces"] = [item for item in RICH["linux"]["namespaces"] if item["type"] != kind_of_namespace]
    return found


@pytest.mark.parametrize(
    ("kind_of_namespace", "wrong"),
    [
        ("uts", "hostname"),
        ("user", "linux.uidMappings"),
        ("time", "linux.timeOffsets"),
        ("network", "linux.sysctl.net.core.somaxconn"),
        ("ipc", "linux.sysctl.kernel.msgmax"),
    ],
)
def test_what_a_namespace_is_needed_for(kind_of_namespace: str, wrong: str) -> None:
    assert wrong_path(without(kind_of_namespace)) == wrong


@pytest.mark.parametrize("name", ["kernel.panic", "vm.swappiness", "net..x", "fs.file-max", ""])
def test_settings_of_the_node_are_refused(name: str) -> None:
    assert wrong_path(changed(("linux", "sysctl", name), "1")) == f"linux.sysctl.{name}"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_goes_out_and_in_as_pythons_does(value: Any) -> None:
    assert documents.decoded(documents.encoded(value)) == value
    assert json.loads(documents.encoded(value, 2)) == value
    assert documents.decoded(json.dumps(value).encode()) == value


@given(st.binary(max_size=40))
def test_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        expected = json.loads(data.decode("utf-8-sig"), parse_constant=pytest.fail)
    except (ValueError, RecursionError, pytest.fail.Exception):
        with pytest.raises(InvalidConfig):
            documents.decoded(data)
        return
    assert documents.decoded(data) == expected
