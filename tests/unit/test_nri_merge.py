"""What several NRI plugins want of a container, made one; and that put into its configuration, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from tare.config import ValidatorConfig
from tare.errors import FailedPrecondition, InvalidArgument, TareError
from tare.nri import adjust, limits, validator, view
from tare.nri.merge import Change, Creation, Updates
from tare.nri.owners import Conflict, Owners
from tare.nri.v1 import nri_pb2 as pb
from tare.runtime import updating
from tare.runtime.plugins import Adjusted
from tare.runtime.records import HugepageLimit, Resources

Linux = pb.LinuxContainerAdjustment


def creation(**shown: Any) -> Creation:
    """A container that is being made."""
    return Creation(pb.CreateContainerRequest(container=pb.Container(id="c", **shown)))


def answer(*updates: pb.ContainerUpdate, **wanted: Any) -> pb.CreateContainerResponse:
    """What a plugin says."""
    return pb.CreateContainerResponse(adjust=pb.ContainerAdjustment(**wanted), update=updates)


def limit(**values: int) -> pb.LinuxResources:
    """Limits on memory."""
    found = pb.LinuxResources()
    for name, value in values.items():
        getattr(found.memory, name).value = value
    return found


def update(container: str, resources: pb.LinuxResources, *, ignore: bool = False) -> pb.ContainerUpdate:
    """One of another container."""
    return pb.ContainerUpdate(
        container_id=container, linux=pb.LinuxContainerUpdate(resources=resources), ignore_failure=ignore
    )


def env(**values: str) -> list[pb.KeyValue]:
    """Variables; a name that begins with "no_" is one that is removed."""
    return [
        pb.KeyValue(key=f"-{key[3:]}" if key.startswith("no_") else key, value=value) for key, value in values.items()
    ]


SETTERS: dict[str, Callable[[], pb.CreateContainerResponse]] = {
    "annotations": lambda: answer(annotations={"a": "1"}),
    "environment": lambda: answer(env=env(A="1")),
    "arguments": lambda: answer(args=["sh"]),
    "mounts": lambda: answer(mounts=[pb.Mount(destination="/a")]),
    "devices": lambda: answer(linux=Linux(devices=[pb.LinuxDevice(path="/dev/a")])),
    "CDI": lambda: answer(CDI_devices=[pb.CDIDevice(name="a/b=c")]),
    "rlimits": lambda: answer(rlimits=[pb.POSIXRlimit(type="RLIMIT_CORE")]),
    "memory": lambda: answer(linux=Linux(resources=limit(limit=4096))),
    "swap": lambda: answer(linux=Linux(resources=limit(swap=4096))),
    "cpus": lambda: answer(linux=Linux(resources=pb.LinuxResources(cpu=pb.LinuxCPU(cpus="0")))),
    "pids": lambda: answer(linux=Linux(resources=pb.LinuxResources(pids=pb.LinuxPids(limit=5)))),
    "unified": lambda: answer(linux=Linux(resources=pb.LinuxResources(unified={"memory.high": "5"}))),
    "pages": lambda: answer(
        linux=Linux(resources=pb.LinuxResources(hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=5)]))
    ),
    "group": lambda: answer(linux=Linux(cgroups_path="/a/b")),
    "score": lambda: answer(linux=Linux(oom_score_adj=pb.OptionalInt(value=5))),
    "priority": lambda: answer(linux=Linux(io_priority=pb.LinuxIOPriority(priority=1))),
    "filter": lambda: answer(linux=Linux(seccomp_policy=pb.LinuxSeccomp(default_action="SCMP_ACT_ALLOW"))),
    "namespaces": lambda: answer(linux=Linux(namespaces=[pb.LinuxNamespace(type="ipc")])),
    "sysctl": lambda: answer(linux=Linux(sysctl={"net.a": "1"})),
    "links": lambda: answer(linux=Linux(net_devices={"eth1": pb.LinuxNetDevice(name="a")})),
    "scheduler": lambda: answer(linux=Linux(scheduler=pb.LinuxScheduler(policy=pb.SCHED_BATCH))),
    "RDT": lambda: answer(linux=Linux(rdt=pb.LinuxRdt(clos_id=pb.OptionalString(value="gold")))),
    "class": lambda: answer(linux=Linux(resources=pb.LinuxResources(rdt_class=pb.OptionalString(value="gold")))),
    "policy": lambda: answer(linux=Linux(memory_policy=pb.LinuxMemoryPolicy(nodes="0"))),
}


@pytest.mark.parametrize("name", SETTERS)
def test_two_may_not_set_one_thing(name: str) -> None:
    both = creation()
    both.add(SETTERS[name](), "10-a")
    with pytest.raises(Conflict, match="10-a and 20-b both set"):
        both.add(SETTERS[name](), "20-b")
    assert both.adjusts


def test_two_may_set_different_things() -> None:
    for one, other in itertools.combinations(SETTERS, 2):
        both = creation()
        both.add(SETTERS[one](), "10-a")
        both.add(SETTERS[other](), "20-b")
        expected = SETTERS[one]().adjust
        expected.MergeFrom(SETTERS[other]().adjust)
        assert both.adjust == expected, (one, other)


def test_nor_may_one_set_it_twice() -> None:
    with pytest.raises(Conflict, match="plugin 10-a sets Env 'A' twice"):
        creation().add(answer(env=[pb.KeyValue(key="A"), pb.KeyValue(key="A")]), "10-a")


def test_hooks_are_everybodys() -> None:
    both = creation()
    for name in ("10-a", "20-b"):
        both.add(answer(hooks=pb.Hooks(poststop=[pb.Hook(path=f"/{name}")])), name)
    assert [hook.path for hook in both.adjust.hooks.poststop] == ["/10-a", "/20-b"]
    assert [hook.path for hook in both.request.container.hooks.poststop] == ["/10-a", "/20-b"]
    assert both.owners.holder("c", pb.OciHooks) == "10-a,20-b"


def test_who_removes_has_it_for_itself() -> None:
    three = creation(env=["A=0", "B=0"], annotations={"k": "0"}, mounts=[pb.Mount(destination="/a", source="old")])
    three.add(answer(env=env(A="1"), annotations={"k": "1"}, mounts=[pb.Mount(destination="/b")]), "10-a")
    three.add(
        answer(
            env=env(no_A="", A="2", no_B=""),
            annotations={"-k": ""},
            mounts=[pb.Mount(destination="-/a"), pb.Mount(destination="-/b"), pb.Mount(destination="/b", source="new")],
        ),
        "20-b",
    )
    shown = three.request.container
    assert (list(shown.env), dict(shown.annotations)) == (["A=2"], {})
    assert [(mount.destination, mount.source) for mount in shown.mounts] == [("/b", "new")]
    for wanted in (answer(env=env(A="3")), answer(env=env(B="3")), answer(annotations={"k": "3"})):
        with pytest.raises(Conflict):
            three.add(wanted, "30-c")


def test_arguments_are_replaced_by_who_says_so() -> None:
    both = creation(args=["a"])
    both.add(answer(args=["b", "c"]), "10-a")
    both.add(answer(args=["", "d"]), "20-b")
    assert list(both.adjust.args) == list(both.request.container.args) == ["d"]


def test_rdt_is_taken_away_before_it_is_set() -> None:
    both = creation()
    both.add(answer(linux=Linux(rdt=pb.LinuxRdt(clos_id=pb.OptionalString(value="gold")))), "10-a")
    both.add(answer(linux=Linux(rdt=pb.LinuxRdt(remove=True, enable_monitoring=pb.OptionalBool(value=True)))), "20-b")
    assert both.adjust.linux.rdt == pb.LinuxRdt(remove=True, enable_monitoring=pb.OptionalBool(value=True))


def test_updates_of_others() -> None:
    one = creation()
    one.add(answer(update("x", limit(limit=5)), update("y", limit(limit=6))), "10-a")
    one.add(answer(update("x", limit(reservation=4))), "20-b")
    one.add(answer(update("y", limit(limit=7), ignore=True)), "20-b")  # a conflict that is to be passed over
    expected = limit(limit=5, reservation=4)
    assert one.updates.found["x"].linux.resources == expected
    assert one.updates.found["y"].linux.resources == limit(limit=6) and not one.updates.found["y"].ignore_failure
    with pytest.raises(Conflict):
        one.add(answer(update("y", limit(limit=8))), "30-c")
    with pytest.raises(FailedPrecondition, match="which is being made"):
        one.add(answer(update("c", limit(limit=8))), "30-c")


def test_limits_that_are_about_to_change() -> None:
    change = Change(pb.UpdateContainerRequest(container=pb.Container(id="c"), linux_resources=limit(limit=5, swap=9)))
    assert change.limits is None
    change.add(pb.UpdateContainerResponse(update=[update("x", limit(limit=1))]), "10-a")
    assert change.limits is None and list(change.updates.found) == ["x"]
    change.add(pb.UpdateContainerResponse(update=[update("c", limit(limit=7))]), "20-b")
    assert change.limits == limit(limit=7, swap=9) == change.request.linux_resources
    with pytest.raises(Conflict):
        change.add(pb.UpdateContainerResponse(update=[update("c", limit(limit=8))]), "30-c")


def test_evictions_are_of_who_asked_first() -> None:
    found = Updates(Owners())
    found.evict([pb.ContainerEviction(container_id="x", reason="first")], "10-a")
    found.evict([pb.ContainerEviction(container_id="x", reason="second")], "20-b")
    assert found.evicted == {"x": ("10-a", "first")}


# Put into a configuration

SPEC: dict[str, Any] = {
    "process": {"args": ["sh"], "env": ["A=1", "B=2"], "user": {"uid": 0, "gid": 0}, "oomScoreAdj": 0},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": []},
        {"destination": "/a/b", "type": "bind", "source": "/x", "options": ["rbind"]},
    ],
    "annotations": {"k": "v"},
    "linux": {
        "namespaces": [{"type": "mount"}, {"type": "network", "path": "/n"}, {"type": "ipc", "path": "/i"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 9, "minor": 9}],
        "cgroupsPath": "/p/c",
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 9, "minor": 9, "access": "rwm"},
            ],
            "memory": {"limit": 100 << 20, "swap": 100 << 20},
        },
    },
}
BEFORE = Resources(memory_limit=100 << 20, hugepage_limits=(HugepageLimit(page_size="2MB", limit=0),))


def applied(**wanted: Any) -> Adjusted:
    """The configuration with an adjustment."""
    return adjust.adjusted(SPEC, pb.ContainerAdjustment(**wanted), BEFORE, "/p/c")


def test_nothing_changes_but_what_is_wanted() -> None:
    done = applied(annotations={"l": "w"})
    assert done.spec == {**SPEC, "annotations": {"k": "v", "l": "w"}}
    assert (done.resources, done.cgroup, done.devices, done.sources) == (BEFORE, "/p/c", (), ())


def test_environment_in_its_place() -> None:
    assert applied(env=env(A="9", C="3", no_B="")).spec["process"]["env"] == ["A=9", "C=3"]


def test_mounts_have_their_place_and_are_looked_at() -> None:
    wanted = [
        pb.Mount(destination="/a", type="bind", source="/y", options=["rbind", "rslave"]),
        pb.Mount(destination="-/a/b/"),
        pb.Mount(destination="/t", type="tmpfs", source="tmpfs"),
    ]
    done = applied(mounts=wanted)
    assert [mount["destination"] for mount in done.spec["mounts"]] == ["/proc", "/a", "/t"]
    assert done.spec["linux"]["rootfsPropagation"] == "rslave"
    assert (done.sources, done.spreading) == (("/y",), (("/y", "slave"),))


def test_devices_come_with_rules_and_go_with_them() -> None:
    new = pb.LinuxDevice(path="/dev/y", type="b", major=8, minor=1)
    done = applied(linux=Linux(devices=[pb.LinuxDevice(path="-/dev/x"), new]))
    linux = done.spec["linux"]
    assert linux["devices"] == [{"path": "/dev/y", "type": "b", "major": 8, "minor": 1}]
    assert linux["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "b", "major": 8, "minor": 1, "access": "rwm"},
    ]


def test_limits_are_in_the_configuration_and_in_the_record() -> None:
    given = limit(limit=50 << 20, reservation=1 << 20, swappiness=10)
    given.cpu.shares.value, given.cpu.cpus, given.pids.limit = 300, "0-1", 9
    given.hugepage_limits.add(page_size="2MB", limit=2 << 20)
    done = applied(linux=Linux(resources=given, oom_score_adj=pb.OptionalInt(value=-5)))
    assert done.spec["linux"]["resources"] == {
        "devices": SPEC["linux"]["resources"]["devices"],
        "memory": {"limit": 50 << 20, "swap": 50 << 20, "reservation": 1 << 20, "swappiness": 10},
        "cpu": {"shares": 300, "cpus": "0-1"},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 2 << 20}],
        "pids": {"limit": 9},
    }
    assert done.spec["process"]["oomScoreAdj"] == -5
    assert limits.message(done.resources) == given


def test_limits_that_cri_has_not_are_changed_and_undone_with_the_others() -> None:
    before = Resources(memory_limit=1 << 20, more={"pids.limit": 5})
    wanted = Resources(more={"pids.limit": 9, "memory.reservation": 4096, "memory.disableOOMKiller": True})
    after = updating.merged(before, wanted)
    assert after.more == {**wanted.more} and after.memory_limit == 1 << 20
    assert updating.live(wanted, after) == {
        "pids": {"limit": 9},
        "memory": {"reservation": 4096, "disableOOMKiller": True, "checkBeforeUpdate": True},
    }
    assert updating.undoing(before, wanted) == {"pids": {"limit": 5}, "memory": {"disableOOMKiller": False}}
    assert updating.undoing(Resources(), Resources(more={"pids.limit": 9})) == {"pids": {"limit": -1}}
    noted = updating.Update(parts=None, id="c", before=before, wanted=wanted).names  # type: ignore[arg-type]
    restored = updating.restore(None, noted)  # type: ignore[arg-type]
    assert (restored.before, restored.wanted) == (before, wanted)


def test_the_rest() -> None:
    linux = Linux(
        sysctl={"net.core.somaxconn": "9"},
        namespaces=[pb.LinuxNamespace(type="-ipc"), pb.LinuxNamespace(type="uts")],
        rdt=pb.LinuxRdt(clos_id=pb.OptionalString(value="gold"), schemata=pb.OptionalRepeatedString(value=["L3:0=f"])),
        scheduler=pb.LinuxScheduler(policy=pb.SCHED_FIFO, priority=5, flags=[pb.SCHED_FLAG_RESET_ON_FORK]),
    )
    done = applied(linux=linux, args=["a", "b"], CDI_devices=[pb.CDIDevice(name="a/b=c")])
    assert done.spec["process"]["args"] == ["a", "b"] and done.devices == ("a/b=c",)
    assert done.spec["process"]["scheduler"] == {
        "policy": "SCHED_FIFO",
        "flags": ["SCHED_FLAG_RESET_ON_FORK"],
        "priority": 5,
    }
    assert done.spec["linux"]["sysctl"] == {"net.core.somaxconn": "9"}
    assert [item["type"] for item in done.spec["linux"]["namespaces"]] == ["mount", "network", "uts"]
    assert done.spec["linux"]["intelRdt"] == {"closID": "gold", "schemata": ["L3:0=f"]}
    assert view.rdt(done.spec["linux"]["intelRdt"]) == linux.rdt
    assert view.scheduler(done.spec["process"]["scheduler"]) == linux.scheduler


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], type[TareError], str]] = {
    "variable": (lambda: {"env": env(**{"": "x"})}, InvalidArgument, "name of a variable"),
    "NUL": (lambda: {"args": ["a\0"]}, InvalidArgument, "NUL"),
    "limit": (lambda: {"rlimits": [pb.POSIXRlimit(type="RLIMIT_X")]}, InvalidArgument, "no limit 'RLIMIT_X'"),
    "soft": (lambda: {"rlimits": [pb.POSIXRlimit(type="RLIMIT_CORE", soft=2, hard=1)]}, InvalidArgument, "above"),
    "root": (lambda: {"mounts": [pb.Mount(destination="/", type="tmpfs")]}, InvalidArgument, "hide the whole"),
    "relative": (lambda: {"mounts": [pb.Mount(destination="a", type="tmpfs")]}, InvalidArgument, "absolute"),
    "remount": (
        lambda: {"mounts": [pb.Mount(destination="/a", type="bind", source="/b", options=["remount"])]},
        InvalidArgument,
        "remount",
    ),
    "no type": (lambda: {"mounts": [pb.Mount(destination="/a", source="/b")]}, InvalidArgument, "neither a type"),
    "source": (lambda: {"mounts": [pb.Mount(destination="/a", type="bind", source="b")]}, InvalidArgument, "source"),
    "hook": (lambda: {"hooks": pb.Hooks(poststart=[pb.Hook(path="sh")])}, InvalidArgument, "hooks.poststart"),
    "device": (lambda: {"linux": Linux(devices=[pb.LinuxDevice(path="/dev/a", type="x")])}, InvalidArgument, "type"),
    "score": (lambda: {"linux": Linux(oom_score_adj=pb.OptionalInt(value=1001))}, InvalidArgument, "1001"),
    "scheduler": (
        lambda: {"linux": Linux(scheduler=pb.LinuxScheduler(policy=pb.SCHED_OTHER, priority=9))},
        InvalidArgument,
        "process.scheduler.priority",
    ),
    "priority": (
        lambda: {"linux": Linux(io_priority=pb.LinuxIOPriority(**{"class": pb.IOPRIO_CLASS_BE}, priority=9))},
        InvalidArgument,
        "process.ioPriority.priority",
    ),
    "sysctl": (lambda: {"linux": Linux(sysctl={"kernel.panic": "1"})}, InvalidArgument, "kernel.panic"),
    "mount namespace": (
        lambda: {"linux": Linux(namespaces=[pb.LinuxNamespace(type="-mount")])},
        FailedPrecondition,
        "mount namespace",
    ),
    "namespace": (lambda: {"linux": Linux(namespaces=[pb.LinuxNamespace(type="x")])}, InvalidArgument, "namespaces"),
    "no policy": (
        lambda: {"linux": Linux(scheduler=pb.LinuxScheduler(policy=77))},  # type: ignore[arg-type]
        InvalidArgument,
        "77 is no LinuxSchedulerPolicy",
    ),
    "numbers": (
        lambda: {"linux": Linux(devices=[pb.LinuxDevice(path="/dev/a", type="c", major=-1)])},
        InvalidArgument,
        "-1:0 are no numbers",
    ),
    "memory": (lambda: {"linux": Linux(resources=limit(limit=5))}, InvalidArgument, "less than a page"),
    "rule": (
        lambda: {"linux": Linux(resources=pb.LinuxResources(devices=[pb.LinuxDeviceCgroup(access="x")]))},
        InvalidArgument,
        "no device rule",
    ),
    "NUL in a source": (
        lambda: {"mounts": [pb.Mount(destination="/a", type="tmpfs", source="a\0")]},
        InvalidArgument,
        "NUL",
    ),
    "quota": (
        lambda: {"linux": Linux(resources=pb.LinuxResources(cpu=pb.LinuxCPU(quota=pb.OptionalInt64(value=-7))))},
        InvalidArgument,
        "cpu_quota",
    ),
    "class": (
        lambda: {"linux": Linux(resources=pb.LinuxResources(blockio_class=pb.OptionalString(value="gold")))},
        FailedPrecondition,
        "gold",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name: str) -> None:
    wanted, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        applied(**wanted())


def test_what_a_newer_nri_has_is_refused() -> None:
    newer: Message = pb.ContainerAdjustment()
    newer.ParseFromString(b"\xfa\x07\x01x")  # field 127
    with pytest.raises(FailedPrecondition, match=r"0\.12"):
        adjust.adjusted(SPEC, newer, BEFORE, "/p/c")  # type: ignore[arg-type]


# What the settings allow


def judged(settings: ValidatorConfig, wanted: pb.CreateContainerResponse, **pod: Any) -> None:
    """An adjustment by 10-a, held against the settings."""
    made = creation(name="main")
    made.add(wanted, "10-a")
    before = pb.Container(id="c", name="main")
    if "profile" in pod:
        before.linux.seccomp_profile.profile_type = pod.pop("profile")
    validator.check(settings, pb.PodSandbox(**pod), before, made.owners, [("10", "a")])


REJECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hooks": ("reject_oci_hook_adjustment", "hooks", {}),
    "unconfined": ("reject_unconfined_seccomp_adjustment", "filter", {}),
    "default": ("reject_runtime_default_seccomp_adjustment", "filter", {"profile": pb.SecurityProfile.RUNTIME_DEFAULT}),
    "custom": ("reject_custom_seccomp_adjustment", "filter", {"profile": pb.SecurityProfile.LOCALHOST}),
    "namespaces": ("reject_namespace_adjustment", "namespaces", {}),
    "sysctl": ("reject_sysctl_adjustment", "sysctl", {}),
}


@pytest.mark.parametrize("name", REJECTS)
def test_what_the_settings_reject(name: str) -> None:
    key, what, pod = REJECTS[name]
    hooks = answer(hooks=pb.Hooks(poststop=[pb.Hook(path="/a")]))
    wanted = hooks if what == "hooks" else SETTERS[what]()
    settings = ValidatorConfig(enable=True, **{key: True})  # type: ignore[arg-type]
    with pytest.raises(validator.Refused, match="10-a adjusts"):
        judged(settings, wanted, **pod)
    judged(settings, SETTERS["environment"](), **pod)
    others = {other: True for other, _, _ in REJECTS.values() if other != key}
    judged(ValidatorConfig(enable=True, **others), wanted, **pod)  # type: ignore[arg-type]
    judged(ValidatorConfig(**{key: True}), wanted, **pod)  # type: ignore[arg-type]


def test_plugins_that_must_have_been_asked() -> None:
    settings = ValidatorConfig(
        enable=True, required_plugins=("a", "10-a", "b"), tolerate_missing_plugins_annotation="tolerate"
    )
    nothing = pb.CreateContainerResponse()
    with pytest.raises(validator.Refused, match="not there: b"):
        judged(settings, nothing)
    judged(settings, nothing, annotations={"tolerate": "true"})
    judged(settings, nothing, annotations={"tolerate/container.main": "true", "tolerate": "false"})
    with pytest.raises(validator.Refused, match="neither true nor false"):
        judged(settings, nothing, annotations={"tolerate": "perhaps"})
    settings = ValidatorConfig(enable=True)
    judged(settings, nothing, annotations={validator.REQUIRED: "[a, 10-a]"})
    judged(settings, nothing, annotations={f"{validator.REQUIRED}/container.other": "[c]"})
    for text, words in (
        ("[c]", "not there: c"),
        ("{", "annotation"),
        ("[1]", "no list of names"),
        ("2001-99-99", "month must be in"),
        ("- " * (validator.LONGEST // 2), "recursion"),
        ("[[a]]", "no plain list"),
        ("[" + "a, " * validator.LONGEST, f"at most {validator.LONGEST} characters"),
    ):
        with pytest.raises(validator.Refused, match=words):
            judged(settings, nothing, annotations={f"{validator.REQUIRED}/pod": text})
