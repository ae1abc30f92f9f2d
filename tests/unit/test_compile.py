"""From an OCI configuration to a launch plan: the steps, their order, and what is refused before anything is made."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers import capabilities
from tare.handlers import compile as compiler
from tare.handlers.plans import Directory
from tare.launch import linux, steps
from tare.storage.overlay import Overlay

OVERLAY = Overlay(lowers=(Path("/l/top"), Path("/l/bottom")), upper=Path("/c/upper"), work=Path("/c/work"))
PLACE = compiler.Place(
    streams=Path("/run/c"), base=Path("/run/rootfs"), join=("/cg/cpu/cgroup.procs", "/cg/mem/cgroup.procs")
)
KINDS = ("mount", "pid", "ipc", "uts", "network", "cgroup")
FILTER = compiler.Filter(program=b"\x06\0\0\0\0\0\xff\x7f")
PROC = {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}
DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}


def spec(**process: Any) -> dict[str, Any]:
    """A small configuration."""
    return {
        "process": {"args": ["sh"], "env": ["PATH=/bin"], "cwd": "/w", "user": {"uid": 5, "gid": 6}} | process,
        "root": {},
        "mounts": [PROC, DEV, {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]}],
        "linux": {
            "namespaces": [{"type": kind} for kind in KINDS],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        },
    }


def compiled(given: dict[str, Any], filter: compiler.Filter | None = None) -> compiler.Compiled:
    """Its plan."""
    return compiler.container(given, OVERLAY, PLACE, filter)


def names(given: list[Any]) -> list[str]:
    """The operations of steps."""
    return [step[0] for step in given]


def of(given: list[Any], operation: str) -> list[Any]:
    """The steps of one operation."""
    return [step for step in given if step[0] == operation]


def test_the_order_of_the_whole() -> None:
    plan = compiled(spec()).plan
    order = names(plan["steps"])
    assert order[0] == "hide"
    essential = [
        "join_cgroup",
        "open_stream",
        "open_tree",
        "propagation",
        "unshare",
        "isolate",
        "overlay",
        "attach_root",
        "filesystem",
        "attach",
        "device",
        "session",
        "readonly_path",
        "open_null",
        "mask",
        "pivot",
        "working_directory",
        "streams",
        "keyring",
    ]
    places = [order.index(name) for name in essential]
    assert places == sorted(places), order
    # The node's tree is looked at before the namespace is cut off, and nothing is attached before that.
    cut = order.index("isolate")
    assert "open_tree" not in order[cut:] and not {"overlay", "attach", "attach_root", "filesystem"} & set(order[:cut])
    assert names(plan["final"]) == ["umask", "bounding", "identity", "capabilities"]


def test_every_step_is_one_that_the_launcher_knows() -> None:
    for terminal in (False, True):
        plan = compiled(spec(terminal=terminal, noNewPrivileges=True, rlimits=[nofile(1, 2)]), FILTER).plan
        steps.resolve(plan["steps"] + plan["final"])


def nofile(soft: int, hard: int) -> dict[str, Any]:
    """A limit of open files."""
    return {"type": "RLIMIT_NOFILE", "soft": soft, "hard": hard}


def test_a_filter_comes_last_with_no_new_privileges_and_early_without() -> None:
    last = compiled(spec(noNewPrivileges=True), FILTER).plan["final"]
    assert names(last) == ["umask", "bounding", "identity", "capabilities", "no_new_privileges", "seccomp_last"]
    early = compiled(spec(), FILTER).plan["final"]
    assert names(early) == ["umask", "bounding", "seccomp", "identity", "capabilities"]
    assert last[-1][2:] == early[2][2:] == (FILTER.program, 0)


def test_limits_come_before_identity_and_are_foreseen_before_the_gate() -> None:
    plan = compiled(spec(rlimits=[nofile(10, (1 << 64) - 1)])).plan
    assert plan["final"][0] == ("rlimit", "set RLIMIT_NOFILE", resource.RLIMIT_NOFILE, 10, -1)
    assert of(plan["steps"], "foresee_rlimit") == [
        ("foresee_rlimit", "set RLIMIT_NOFILE", b"RLIMIT_NOFILE", resource.RLIMIT_NOFILE, -1)
    ]


def test_namespaces_are_made_by_clone_or_entered() -> None:
    given = spec()
    given["linux"]["namespaces"] = [
        {"type": "mount"},
        {"type": "uts", "path": "/p/uts"},
        {"type": "network", "path": "/p/net"},
        {"type": "ipc"},
        {"type": "pid", "path": "/p/pid"},
    ]
    result = compiled(given)
    assert result.clone_flags == linux.CLONE_NEWNS | linux.CLONE_NEWIPC
    assert result.helper
    assert [step[0] for step in result.plan["before"]] == ["hide", "open_namespace", "enter"]
    assert result.plan["before"][1][3] == b"/p/pid"
    opened = [step[3] for step in of(result.plan["steps"], "open_namespace")]
    entered = [step[3] for step in of(result.plan["steps"], "enter")]
    assert opened == [b"/p/net", b"/p/uts"] and entered == [b"net", b"uts"]
    assert not of(result.plan["steps"], "unshare")


def test_all_new_namespaces() -> None:
    result = compiled(spec())
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWNET
    assert result.clone_flags == flags and not result.helper
    assert of(result.plan["steps"], "unshare") == [("unshare", "make a cgroup namespace", b"cgroup")]


@pytest.mark.parametrize(
    "namespaces",
    [
        [{"type": "user", "path": "/proc/1/ns/user"}],
        [{"type": "mount", "path": "/proc/1/ns/mnt"}, {"type": "user", "path": "/proc/1/ns/user"}],
        [{"type": "mount"}, {"type": "clock"}],
        [{"type": "mount"}, {"type": "ipc", "path": "proc/1/ns/ipc"}],
        [{"type": "mount"}, {"type": "pid"}, {"type": "pid", "path": "/x"}],
    ],
)
def test_namespaces_that_would_leave_a_container_in_the_nodes_are_refused(namespaces: list[dict[str, str]]) -> None:
    given = spec()
    given["linux"]["namespaces"] = namespaces
    with pytest.raises(InvalidArgument, match=r"linux\.namespaces"):
        compiled(given)


@pytest.mark.parametrize("namespaces", [[], [{"type": "pid"}], [{"type": "mount", "path": "/proc/1/ns/mnt"}]])
def test_nothing_is_mounted_in_a_mount_namespace_that_others_have(namespaces: list[dict[str, str]]) -> None:
    given = spec()
    given["linux"] = {"namespaces": namespaces}
    for key, path in (("mounts", "mounts"), ("root", "root.readonly")):
        given["mounts"] = given["mounts"] if key == "mounts" else []
        given["root"] = {"path": "x", "readonly": True}
        with pytest.raises(InvalidArgument, match=f"read {path}"):
            compiled(given)
    given["root"] = {"path": "x"}
    with pytest.raises(InvalidArgument, match="layers"):
        compiled(given)
    made = compiler.container(given, Directory("/bundle/rootfs"), PLACE, None)
    assert names(made.plan["steps"])[-1] != "pivot" and of(made.plan["steps"], "change_root")
    assert not [step for step in made.plan["steps"] if step[0] in ("pivot", "isolate", "attach", "mask", "device")]


def test_mounts_keep_their_order_and_flags() -> None:
    given = spec()
    given["mounts"] += [
        {"destination": "/a", "type": "bind", "source": "/1", "options": ["bind", "rro", "rslave", "noatime"]},
        {"destination": "/b/../c/", "type": "tmpfs", "source": "x", "options": ["ro", "size=1m"]},
    ]
    plan = compiled(given).plan
    attached = [(step[3], step[4]) for step in of(plan["steps"], "attach")]
    assert attached == [(b"/proc", True), (b"/dev", True), (b"/data", False), (b"/a", False), (b"/c", False)]
    trees = of(plan["steps"], "open_tree")
    assert [step[3:] for step in trees] == [(b"/srv", True), (b"/1", False)]
    attributes = [step[3:] for step in of(plan["steps"], "attributes")]
    assert attributes == [
        (linux.MOUNT_ATTR_RDONLY, 0, False),
        (linux.MOUNT_ATTR_RDONLY, 0, True),
        (linux.MOUNT_ATTR_NOATIME, linux.MOUNT_ATTR_ATIME, False),
    ]
    assert [step[3:] for step in of(plan["steps"], "propagation")] == [(linux.MS_PRIVATE, True), (linux.MS_SLAVE, True)]
    tmpfs = [step for step in of(plan["steps"], "filesystem") if step[1] == "mount /c"]
    assert tmpfs[0][3:] == (b"tmpfs", linux.MOUNT_ATTR_RDONLY, ((b"source", b"x"), (b"size", b"1m")))


def test_a_read_only_dev_is_filled_first() -> None:
    given = spec()
    given["mounts"][1] = DEV | {"destination": "/dev/", "options": ["ro", "mode=755"]}
    plan = compiled(given).plan
    order = names(plan["steps"])
    assert of(plan["steps"], "readonly_mount") == [("readonly_mount", "make /dev read-only", b"/dev")]
    last_device = max(index for index, name in enumerate(order) if name == "device")
    assert order.index("readonly_mount") > last_device


def test_devices_are_made_in_a_dev_of_our_own_only() -> None:
    given = spec()
    given["linux"]["devices"] = [
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 1}
    ]
    own = compiled(given).plan["steps"]
    assert [step[2] for step in of(own, "device")] == [
        b"/dev/zero",
        b"/dev/full",
        b"/dev/random",
        b"/dev/urandom",
        b"/dev/tty",
        b"/dev/null",
    ]
    assert of(own, "device")[-1][3:] == (0o020600, 1, 3, 1, 0)
    assert of(own, "open_null")[0][3] is True
    given["mounts"][1] = {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]}
    nodes = compiled(given).plan["steps"]
    assert [step[2] for step in of(nodes, "device")] == [b"/dev/null"] and not of(nodes, "symlink")
    assert of(nodes, "open_null")[0][3] is False


def test_control_groups_of_version_1() -> None:
    given = spec()
    given["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro", "nosuid"]})
    place = compiler.Place(
        streams=PLACE.streams, base=PLACE.base, hierarchies=(("cpu", ("cpu", "cpuacct")),), unified="unified"
    )
    plan = compiler.container(given, OVERLAY, place, None).plan
    made = [step[3:6] for step in of(plan["steps"], "filesystem")][2:]
    assert made == [
        (b"tmpfs", linux.MOUNT_ATTR_NOSUID, ((b"source", b"tmpfs"), (b"mode", b"755"))),
        (b"cgroup", 3, ((b"source", b"cgroup"), (b"cpu", None), (b"cpuacct", None))),
        (b"cgroup2", 3, ((b"source", b"cgroup"),)),
    ]
    assert [step[3] for step in of(plan["steps"], "attach")][-3:] == [
        b"/sys/fs/cgroup",
        b"/sys/fs/cgroup/cpu",
        b"/sys/fs/cgroup/unified",
    ]
    assert of(plan["steps"], "readonly_mount")[0][2] == b"/sys/fs/cgroup"


def test_controllers_that_share_a_hierarchy_have_links_by_their_names() -> None:
    given = spec()
    given["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]})
    hierarchies = (
        ("cpu,cpuacct", ("cpu", "cpuacct")),
        ("memory", ("memory",)),
        ("systemd", ("none", "name=systemd")),
        ("net_cls", ("net_cls", "net_prio")),
        ("net_prio", ("net_cls", "net_prio")),
    )
    place = compiler.Place(streams=PLACE.streams, base=PLACE.base, hierarchies=hierarchies)
    steps = compiler.container(given, OVERLAY, place, None).plan["steps"]
    assert [step[2:] for step in of(steps, "symlink") if step[2].startswith(b"/sys")] == [
        (b"/sys/fs/cgroup/cpu", b"cpu,cpuacct"),
        (b"/sys/fs/cgroup/cpuacct", b"cpu,cpuacct"),
    ]
    assert names(steps).index("readonly_mount") > max(i for i, name in enumerate(names(steps)) if name == "symlink")


def test_control_groups_of_version_2() -> None:
    given = spec()
    given["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]})
    plan = compiled(given).plan
    assert of(plan["steps"], "filesystem")[-1][3:] == (b"cgroup2", linux.MOUNT_ATTR_RDONLY, ((b"source", b"cgroup"),))


def test_control_groups_of_version_2_in_the_nodes_namespace_are_bound() -> None:
    given = spec()
    given["linux"]["namespaces"] = [item for item in given["linux"]["namespaces"] if item["type"] != "cgroup"]
    given["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]})
    steps = compiled(given).plan["steps"]
    assert (b"/sys/fs/cgroup", True) in [step[3:] for step in of(steps, "open_tree")]
    assert b"cgroup2" not in [step[3] for step in of(steps, "filesystem")]


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ({"destination": "/proc", "type": "tmpfs", "source": "x"}, "on /proc"),
        ({"destination": "/x", "type": "tmpfs", "options": ["remount"]}, "remount"),
        ({"destination": "/x", "type": "ramfs", "options": ["tmpcopyup"]}, "tmpcopyup"),
        ({"destination": "/proc/self/attr", "type": "bind", "source": "/x"}, "within /proc"),
        ({"destination": "/tmp/../proc/sys", "type": "tmpfs", "source": "x"}, "within /proc"),
        ({"destination": "/", "type": "bind", "source": "/x"}, "mount on /"),
        ({"destination": "/x", "type": "bind"}, "needs a source"),
        ({"destination": "/x", "type": "bind", "source": "/a\0b"}, "NUL"),
        ({"destination": "/x\0y", "type": "bind", "source": "/a"}, "NUL"),
    ],
)
def test_mounts_that_are_refused(mount: dict[str, Any], words: str) -> None:
    given = spec()
    given["mounts"].append(mount)
    with pytest.raises(InvalidArgument, match=words):
        compiled(given)


def test_a_bind_on_proc_is_looked_at_before_it_is_mounted() -> None:
    given = spec()
    given["mounts"] = [{"destination": "//proc/.", "type": "none", "source": "/x", "options": ["rbind"]}]
    steps = compiled(given).plan["steps"]
    slot = of(steps, "open_tree")[0][2]
    assert of(steps, "expect_proc") == [("expect_proc", "mount /proc", slot)]


def test_own_views_of_some_proc_files_are_allowed() -> None:
    given = spec()
    given["mounts"].append({"destination": "/proc/meminfo", "type": "bind", "source": "/lxcfs/meminfo"})
    assert of(compiled(given).plan["steps"], "attach")[-1][3:] == (b"/proc/meminfo", True)


def test_streams() -> None:
    plain = compiled(spec()).plan["steps"]
    assert [step[3] for step in of(plain, "open_stream")] == [b"/run/c/stdout", b"/run/c/stderr"]
    assert {step[4] for step in of(plain, "open_stream")} == {os.O_RDWR}
    with_input = compiled(spec(stdin=True)).plan["steps"]
    assert of(with_input, "open_stream")[0][3:] == (b"/run/c/stdin", os.O_RDONLY)
    with_terminal = compiled(spec(terminal=True, consoleSize={"height": 24, "width": 80})).plan["steps"]
    assert not of(with_terminal, "open_stream") and not of(with_terminal, "streams")
    assert of(with_terminal, "terminal")[0][2:] == (5, 24, 80)
    order = names(with_terminal)
    assert order.index("session") < order.index("terminal") < order.index("pivot")


def test_capability_masks() -> None:
    capabilities = {
        "bounding": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_KILL"],
        "permitted": ["CAP_KILL"],
        "ambient": [],
    }
    final = compiled(spec(capabilities=capabilities)).plan["final"]
    assert of(final, "bounding")[0][2] == 0b100001
    assert of(final, "capabilities")[0][2:] == (0b100000, 0b100000, 0, 0)
    nothing = compiled(spec()).plan["final"]
    assert of(nothing, "bounding")[0][2] == 0 and of(nothing, "capabilities")[0][2:] == (0, 0, 0, 0)


def test_the_capability_table_is_the_kernels() -> None:
    assert capabilities.CAPABILITY_BITS["CAP_SYS_ADMIN"] == 1 << 21
    assert capabilities.CAPABILITY_BITS["CAP_CHECKPOINT_RESTORE"] == 1 << 40
    assert len(capabilities.CAPABILITIES) == 41


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rlimits": [{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}]}, "RLIMIT_FUN"),
        ({"rlimits": [{"type": "getrlimit", "soft": 1, "hard": 1}]}, "getrlimit"),
        ({"args": []}, "nothing to run"),
        ({"args": ["a\0b"]}, "NUL"),
        ({"env": ["A=\0"]}, "NUL"),
        ({"cwd": "/a\0b"}, "NUL"),
    ],
)
def test_processes_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        compiled(spec(**changes))


@pytest.mark.parametrize(
    ("command", "env", "candidates"),
    [
        ("/bin/x", ["PATH=/a"], [b"/bin/x"]),
        ("./x", ["PATH=/a"], [b"./x"]),
        ("x", ["PATH=/a:/b/c"], [b"/a/x", b"/b/c/x"]),
        ("x", ["PATH=/a", "PATH=/b"], [b"/b/x"]),
        ("x", ["PATH=/a::/b:"], [b"/a/x", b"./x", b"/b/x", b"./x"]),
        (
            "x",
            ["MYPATH=/a"],
            [b"/usr/local/sbin/x", b"/usr/local/bin/x", b"/usr/sbin/x", b"/usr/bin/x", b"/sbin/x", b"/bin/x"],
        ),
        ("", ["PATH=/a"], [b""]),
    ],
)
def test_where_a_command_is_looked_for(command: str, env: list[str], candidates: list[bytes]) -> None:
    plan = compiled(spec(args=[command, "é"], env=env)).plan
    assert plan["paths"] == candidates
    assert plan["argv"] == [command.encode(), "é".encode()] and plan["env"] == [entry.encode() for entry in env]


def test_bytes_that_are_no_text_stay_what_they_are() -> None:
    raw = os.fsdecode(b"/caf\xe9")
    plan = compiled(spec(args=[raw], env=[f"A={raw}"])).plan
    assert plan["argv"] == [b"/caf\xe9"] and plan["env"] == [b"A=/caf\xe9"]


def test_an_exec_joins_before_it_becomes() -> None:
    process = spec(noNewPrivileges=True, oomScoreAdj=100)["process"]
    plan = compiler.execution(process, PLACE.join, linux.CLONE_NEWNS, FILTER)
    assert names(plan["before"])[:2] == ["hide", "oom_score"]
    assert names(plan["before"])[-3:] == ["join_cgroup", "join_cgroup", "any_cpu"]
    assert plan["before"][1][2] == 100
    assert plan["namespaces"] == linux.CLONE_NEWNS and plan["uid"] == 5


REFUSING = b"\x06\x00\x00\x00\x01\x00\x05\x00"  # EPERM for everything
PASSING = FILTER.program
BECOMING = ["umask", "bounding", "identity", "capabilities"]


@pytest.mark.parametrize(
    ("confined", "program", "entered", "final"),
    [
        (True, b"", [*BECOMING, "no_new_privileges"], []),
        (True, PASSING, [*BECOMING, "no_new_privileges", "seccomp"], []),
        (True, REFUSING, [*BECOMING, "no_new_privileges"], ["seccomp_last"]),
        (False, b"", BECOMING, []),
        (False, PASSING, ["umask", "bounding", "seccomp", "identity", "capabilities"], []),
        (False, REFUSING, [], ["umask", "bounding", "seccomp", "identity", "capabilities"]),
    ],
)
def test_an_exec_is_no_more_than_the_container_when_it_appears_there(
    confined: bool, program: bytes, entered: list[str], final: list[str]
) -> None:
    """All that takes privileges is done by the process that makes it, as far as the filter lets that be."""
    process = spec(noNewPrivileges=confined, terminal=True, rlimits=[nofile(10, 20)])["process"]
    process |= {"apparmorProfile": "tight", "scheduler": {"policy": "SCHED_OTHER", "nice": 1}}
    plan = compiler.execution(process, (), linux.CLONE_NEWNS, compiler.Filter(program=program) if program else None)
    first = ["exec_terminal", "change_directory", "default_signals", "keyring", "apparmor", "close_slot"]
    assert names(plan["entered"]) == first + entered
    assert names(plan["steps"]) == ["lead_session", "control_terminal", "outside"]
    assert [names(one) for one in plan["outside"]] == [["scheduler"]]
    assert names(plan["final"]) == ["rlimit", *final]
    assert "raise_rlimit" in names(plan["before"])


@pytest.mark.parametrize("confined", [True, False])
def test_a_filter_with_a_listener_is_handed_over_of_the_process_that_runs_the_program(confined: bool) -> None:
    process = spec(noNewPrivileges=confined, scheduler={"policy": "SCHED_OTHER"})["process"]
    for program, loads, hands in (
        (PASSING, "seccomp_listener_for_heir", "heirs_listener"),
        (REFUSING, "seccomp_listener", "listener"),
    ):
        listening = compiler.Filter(program=program, listener="/agent.sock")
        plan = compiler.execution(process, (), linux.CLONE_NEWNS, listening)
        early = program == PASSING
        [step] = of(plan["entered"] if early else plan["final"], loads)
        assert names(plan["outside"][step[-1]]) == [hands]
        # The helper hears of nothing else until it knows the heir.
        assert (names(plan["steps"])[0] == "await_listener") == early
        assert ("capabilities" in names(plan["entered"])) == (early or confined)


def test_where_a_filter_leaves_an_exec_open_to_who_may_trace_there_is_a_warning() -> None:
    tracer = {kind: ["CAP_SYS_PTRACE"] for kind in ("bounding", "effective", "permitted")}
    for confined, program, sets, warned in (
        (False, REFUSING, tracer, True),
        (False, REFUSING, {}, False),
        (False, PASSING, tracer, False),
        (True, REFUSING, tracer, False),
    ):
        process = spec(noNewPrivileges=confined, capabilities=sets)["process"]
        plan = compiler.execution(process, (), linux.CLONE_NEWNS, compiler.Filter(program=program))
        assert ("warn" in names(plan["entered"])) == warned


def test_read_only_root_and_propagation() -> None:
    given = spec()
    given["root"] = {"readonly": True}
    given["linux"]["rootfsPropagation"] = "rslave"
    order = compiled(given).plan["steps"]
    assert of(order, "pivot")[0][2] == linux.MS_SLAVE
    assert names(order).index("readonly_root") == names(order).index("pivot") - 1
