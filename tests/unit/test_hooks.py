"""Hooks of a configuration: what is no hook, what they are told, and the steps that they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.errors import InvalidArgument
from tare.handlers import hooks
from tare.handlers.plans import Filter, Place
from tare.launch import hooks as runner

PLACE = Place(streams=Path("/run/c"), base="/run/rootfs", id="c1", bundle="/run/hooked/c1")
PROCESS = {"args": ["x"], "env": ["A=b"], "user": {"uid": 0, "gid": 0}}


def spec(**points: Any) -> dict[str, Any]:
    return {"process": PROCESS, "hooks": points}


def test_no_hooks() -> None:
    nothing: list[dict[str, Any]] = [{}, {"hooks": None}, {"hooks": {}}, spec(prestart=None, poststop=[])]
    for given_spec in nothing:
        assert not any(hooks.parse(given_spec).values())
    lists: list[Any] = []
    assert hooks.creating(spec(), PLACE, lists) == [] and hooks.starting(spec(), PLACE) == [] and lists == []


@pytest.mark.parametrize(
    ("given_hooks", "path"),
    [
        ([], "hooks"),
        ({"prestart": {}}, "hooks.prestart"),
        ({"poststop": ["x"]}, r"hooks.poststop\[0\]"),
        ({"createRuntime": [{"path": "/a"}, {}]}, r"hooks.createRuntime\[1\].path"),
        ({"createRuntime": [{"path": "a"}]}, r"hooks.createRuntime\[0\].path"),
        ({"createContainer": [{"path": "/a\0"}]}, r"hooks.createContainer\[0\].path"),
        ({"startContainer": [{"path": "/a", "args": "a"}]}, r"hooks.startContainer\[0\].args"),
        ({"startContainer": [{"path": "/a", "args": [1]}]}, r"hooks.startContainer\[0\].args"),
        ({"poststart": [{"path": "/a", "env": ["A=\0"]}]}, r"hooks.poststart\[0\].env"),
        ({"poststart": [{"path": "/a", "timeout": 0}]}, r"hooks.poststart\[0\].timeout"),
        ({"poststart": [{"path": "/a", "timeout": -1}]}, r"hooks.poststart\[0\].timeout"),
        ({"poststart": [{"path": "/a", "timeout": 1.5}]}, r"hooks.poststart\[0\].timeout"),
        ({"poststart": [{"path": "/a", "timeout": True}]}, r"hooks.poststart\[0\].timeout"),
    ],
)
def test_what_is_no_hook(given_hooks: Any, path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^read {path}: "):
        hooks.parse({"hooks": given_hooks})


def test_who_runs_which_and_in_which_order() -> None:
    points = {point: [{"path": f"/{point}/{number}"} for number in (1, 2)] for point in hooks.POINTS}
    lists: list[Any] = [["already there"]]
    inside = hooks.creating(spec(**points), PLACE, lists)
    assert inside[0] == ("outside", "run hooks outside", 1)
    assert [step[2] for step in inside[1:]] == [b"/createContainer/1", b"/createContainer/2"]
    assert [step[2] for step in lists[1]] == [b"/prestart/1", b"/prestart/2", b"/createRuntime/1", b"/createRuntime/2"]
    assert {step[0] for step in inside[1:]} == {step[0] for step in lists[1]} == {"hook"}
    assert all(step[-1] == b"/run/hooked/c1" for step in lists[1])
    starting = hooks.starting(spec(**points), PLACE)
    assert [step[:3] for step in starting] == [
        ("confined_hook", f"startContainer hook /startContainer/{number}", b"/startContainer/%d" % number)
        for number in (1, 2)
    ]


def test_arguments_environment_and_time() -> None:
    entry = {"path": "/bin/x", "args": ["zero", "one"], "env": ["K=v"], "timeout": 7}
    [step] = hooks.starting(spec(startContainer=[entry]), PLACE)
    assert step[3:6] == ((b"zero", b"one"), (b"K=v",), 7)
    [bare] = hooks.starting(spec(startContainer=[{"path": "/bin/x"}]), PLACE)
    assert bare[3:6] == ((b"/bin/x",), (b"A=b",), 0)
    [empty] = hooks.starting(spec(startContainer=[{"path": "/bin/x", "env": []}]), PLACE)
    assert empty[4] == ()
    [runtime] = hooks.creating(spec(createContainer=[{"path": "/bin/x"}]), PLACE, [])
    assert runtime[4] is None


TEXT = st.text(max_size=20) | st.sampled_from(['"pid":2147483646', 'pid":2147483646,"x', "2147483646", "\\"])


@given(st.dictionaries(TEXT, TEXT, max_size=5), TEXT, st.integers(1, 1 << 22))
def test_the_pid_is_put_where_it_belongs_and_nowhere_else(annotations: dict[str, str], name: str, pid: int) -> None:
    container = hooks.state({"annotations": annotations}, name, "/bundle", "creating", hooks.PID)
    told = json.loads(runner.around(hooks.parts(container), pid))
    assert told == hooks.state({"annotations": annotations}, name, "/bundle", "creating", pid)
    process = hooks.process_state(container, hooks.PID, name)
    told = json.loads(runner.around(hooks.parts(process), pid))
    assert told["pid"] == told["state"]["pid"] == pid and told["fds"] == ["seccompFd"]
    assert told["state"].get("annotations", {}) == annotations and told.get("metadata", "") == name


def test_a_state_without_a_process() -> None:
    assert hooks.state({}, "c", "/b", "stopped") == {
        "ociVersion": "1.2.0",
        "id": "c",
        "status": "stopped",
        "bundle": "/b",
    }


def test_listeners() -> None:
    lists: list[Any] = []
    assert hooks.listening(None, {}, hooks.PID, lists) is None
    assert hooks.listening(Filter(program=b""), {}, hooks.PID, lists) is None
    assert lists == []
    filter = Filter(program=b"", listener="/run/agent.sock", metadata="m")
    assert hooks.listening(filter, hooks.state({}, "c", "/b", "created", hooks.PID), hooks.PID, lists) == 0
    [[(operation, label, path, parts)]] = lists
    assert (operation, label, path) == ("listener", "hand the seccomp listener to /run/agent.sock", b"/run/agent.sock")
    assert len(parts) == 3


def test_a_deadline_and_a_hook_that_is_to_be_forked() -> None:
    process = PROCESS | {"scheduler": {"policy": "SCHED_DEADLINE", "runtime": 1}}
    wanted = {"process": process, "hooks": {"startContainer": [{"path": "/x"}]}}
    with pytest.raises(InvalidArgument, match=r"^read process\.scheduler\.policy: .*SCHED_FLAG_RESET_ON_FORK"):
        hooks.starting(wanted, PLACE)
    process["scheduler"]["flags"] = ["SCHED_FLAG_RESET_ON_FORK"]  # type: ignore[index]
    assert len(hooks.starting(wanted, PLACE)) == 1
