"""ID mappings and namespaces of a specification: what is refused, with the JSON path, and what compilation makes of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers import compile as compiler
from tare.handlers import mappings
from tare.handlers.namespaces import Namespaces, with_dots
from tare.handlers.plans import USER, Directory, Place
from tare.launch import linux
from tare.storage.overlay import Overlay

MAPPING = [{"containerID": 0, "hostID": 1000, "size": 10}]
NEW = [{"type": kind} for kind in ("mount", "pid", "network", "ipc", "uts", "cgroup")]
OVERLAY = Overlay(lowers=(Path("/l/2"), Path("/l/1")), upper=Path("/s/upper"), work=Path("/s/work"))
PLACE = Place(
    streams=Path("/streams"),
    base=Path("/base"),
    join=("/cg/x/cgroup.procs", "/v2/x/cgroup.procs"),
    directory_v2="/v2/x",
)


def spec(user: bool = True, **linux_part: Any) -> dict[str, Any]:
    """A specification with all new namespaces."""
    part: dict[str, Any] = {"namespaces": [*NEW, *([{"type": "user"}] if user else [])]}
    if user:
        part |= {"uidMappings": MAPPING, "gidMappings": MAPPING}
    return {"process": {"args": ["x"], "user": {"uid": 0, "gid": 0}}, "linux": part | linux_part}


def steps_of(
    given: dict[str, Any], root: Any = OVERLAY, place: Place = PLACE
) -> tuple[list[Any], list[Any], compiler.Compiled]:
    """(before, in the child, all)."""
    result = compiler.container(given, root, place, None)
    return result.plan.get("before", []), result.plan["steps"], result


def names(steps: list[Any]) -> list[str]:
    """What they do."""
    return [step[0] for step in steps]


def test_mappings() -> None:
    given = {"uidMappings": MAPPING, "gidMappings": [*MAPPING, {"containerID": 10, "hostID": 0, "size": 1}]}
    found = mappings.of(given, "linux")
    assert found is not None and found.uid == ((0, 1000, 10),) and found.gid == ((0, 1000, 10), (10, 0, 1))
    assert mappings.of({}, "linux") is None
    assert mappings.of({"uidMappings": [], "gidMappings": []}, "linux") is None
    assert mappings.covers(found.uid, 9) and not mappings.covers(found.uid, 10)


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ([{"containerID": 0, "hostID": 0, "size": 0}], "u[0].size"),
        ([{"containerID": 0, "hostID": 0}], "u[0].size"),
        ([{"containerID": 5, "hostID": 0, "size": (1 << 32) - 1}], "u[0].size"),
        ([{"containerID": 0, "hostID": 1 << 32, "size": 1}], "u[0].hostID"),
        ([{"containerID": True, "hostID": 1, "size": 1}], "u[0].containerID"),
        ([*MAPPING, {"containerID": 9, "hostID": 5000, "size": 3}], "u"),
        ([*MAPPING, {"containerID": 50, "hostID": 995, "size": 6}], "u"),
        ([{"containerID": n, "hostID": n, "size": 1} for n in range(341)], "u"),
    ],
)
def test_mappings_that_the_kernel_would_refuse(lines: list[dict[str, int]], path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        mappings.lines(lines, "u")
    assert caught.value.doing == f"read {path}"


def test_the_whole_range_and_the_most_lines_are_taken() -> None:
    assert mappings.lines([{"containerID": 0, "hostID": 0, "size": (1 << 32) - 1}], "u") == ((0, 0, (1 << 32) - 1),)
    assert len(mappings.lines([{"containerID": n, "hostID": n, "size": 1} for n in range(340)], "u")) == 340


@pytest.mark.parametrize(
    ("user", "path"),
    [
        ({"uid": 10, "gid": 0}, "process.user.uid"),
        ({"uid": 0, "gid": 10}, "process.user.gid"),
        ({"uid": 0, "gid": 0, "additionalGids": [3, 77]}, r"process.user.additionalGids\[1\]"),
    ],
)
def test_ids_without_a_mapping(user: dict[str, Any], path: str) -> None:
    given = spec()
    given["process"]["user"] = user
    with pytest.raises(InvalidArgument, match=path):
        Namespaces(given)
    given["linux"]["namespaces"][-1]["path"] = "/proc/7/ns/user"  # whose mappings are known when it is opened
    Namespaces(given)


def test_what_is_done_in_between_and_in_the_child() -> None:
    before, inside, result = steps_of(spec())
    assert result.helper and result.cgroup == ""
    ours = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWUTS
    assert result.clone_flags == ours  # the IPC namespace is made by root of the user namespace
    order = names(before)
    for first, second in (
        ("hide", "new_user_namespace"),
        ("new_user_namespace", "unshare"),
        ("unshare", "stage"),
        ("stage", "lay_layer"),
        ("lay_layer", "own_directory"),
        ("own_directory", "overlay"),
        ("overlay", "lay_root"),
        ("lay_root", "enter_user_namespace"),
        ("enter_user_namespace", "leave_stage"),
    ):
        assert order.index(first) < order.index(second), (first, second)
    assert [step[2:] for step in before if step[0] == "lay_layer"] == [(b"/l/2", USER, b"l0"), (b"/l/1", USER, b"l1")]
    [overlay] = [step for step in before if step[0] == "overlay"]
    assert overlay[3] == (b"/base/l0", b"/base/l1") and b"/base/3" in overlay
    beginning = ["join_cgroup", "join_cgroup", "any_cpu", "become_root", "unshare", "unshare", "loopback"]
    assert names(inside)[:9] == [*beginning, "take", "attach_root"]
    assert "overlay" not in names(inside) and "open_tree" not in names(inside)


def test_without_a_user_namespace_nothing_is_in_between() -> None:
    before, inside, result = steps_of(spec(user=False))
    assert before == [] and not result.helper and result.cgroup == "/v2/x"
    assert [step[2] for step in inside if step[0] == "join_cgroup"] == [b"/cg/x/cgroup.procs"]
    assert not {"take", "become_root", "new_user_namespace"} & set(names(inside))


def test_a_barrier_comes_first_and_joins_all_that_is_left_to_join() -> None:
    for user in (False, True):
        place = Place(
            streams=Path("/s"), base=Path("/b"), join=("/v2/x/cgroup.procs",), directory_v2="/v2/x", barrier=True
        )
        _, inside, result = steps_of(spec(user), place=place)
        assert names(inside)[0] == "barrier" and result.cgroup == ""
        assert [step[2] for step in inside if step[0] == "join_cgroup"] == [b"/v2/x/cgroup.procs"]


def test_mappings_of_mounts_share_a_namespace() -> None:
    given = spec(user=False)
    shifted = {"options": ["bind", "idmap"], "uidMappings": MAPPING, "gidMappings": MAPPING}
    other = shifted | {"gidMappings": [{"containerID": 0, "hostID": 5, "size": 1}]}
    given["mounts"] = [
        {"destination": f"/{index}", "source": "/x", **more} for index, more in enumerate((shifted, other, shifted))
    ]
    before, inside, result = steps_of(given)
    assert result.helper and names(before) == ["hide", "new_user_namespace", "new_user_namespace"]
    slots = [step[2] for step in before[1:]]
    assert [step[3] for step in inside if step[0] == "idmap"] == [slots[0], slots[1], slots[0]]
    assert not set(slots) & {step[2] for step in inside if step[0] == "open_tree"}


def test_a_directory_as_root_is_laid_ready_as_it_is() -> None:
    before, inside, _ = steps_of(spec(), root=Directory("/bundle"))
    assert "overlay" not in names(before) and "own_directory" not in names(before) and "lay_layer" not in names(before)
    assert names(before).index("bind_root") < names(before).index("lay_root")
    assert names(inside).count("take") == 1


@pytest.mark.parametrize(
    ("name", "dotted"),
    [
        ("net.ipv4.ip_forward", "net.ipv4.ip_forward"),
        ("net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("net/ipv4/conf/eth0.100/forwarding", "net.ipv4.conf.eth0/100.forwarding"),
        ("net.ipv4.conf.eth0/100.forwarding", "net.ipv4.conf.eth0/100.forwarding"),
    ],
)
def test_both_ways_to_write_a_sysctl(name: str, dotted: str) -> None:
    assert with_dots(name) == dotted
    given = spec(user=False, sysctl={name: "1"})
    written = [step[2] for step in steps_of(given)[1] if step[0] == "write_file"]
    assert written in ([b"/proc/sys/net/ipv4/ip_forward"], [b"/proc/sys/net/ipv4/conf/eth0.100/forwarding"])
