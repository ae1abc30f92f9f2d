"""The order of system calls between a fork of the launcher and execve: what makes a start safe is when each thing happens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tare.handlers import early
from tare.handlers.compile import Filter
from tests.support.launch import (
    Box,
    Launch,
    bind,
    in_launch,
    line,
    namespaces,
    readable,
    standard_mounts,
    user_namespace,
)
from tests.support.mounts import mounted_tmpfs
from tests.support.trace import Call, Trace, parse

pytestmark = pytest.mark.root

ALLOW_ALL = Filter(program=b"\x06\x00\x00\x00\x00\x00\xff\x7f")
BY_PATH = {
    "open",
    "openat",
    "openat2",
    "open_tree",
    "stat",
    "lstat",
    "newfstatat",
    "statx",
    "statfs",
    "access",
    "faccessat",
}
BY_PATH |= {"faccessat2", "readlink", "readlinkat", "getxattr", "mount", "umount2", "mkdirat", "mknodat", "symlinkat"}
BY_PATH |= {"unlinkat", "chdir", "execve", "fsopen"}
SPEAK = ["sh", "-c", "echo up; sleep 1000"]  # once it has said so, its execve is in the trace


class Order:
    """The calls of one process up to its execve, with questions to ask of them."""

    def __init__(self, calls: list[Call]) -> None:
        end = next(index for index, call in enumerate(calls) if call.name == "execve" and call.result == "0")
        self.calls = calls[: end + 1]

    def first(self, name: str, *words: str) -> int:
        """The place of the first call of this name with these words among its arguments."""
        for index, call in enumerate(self.calls):
            if call.name == name and all(word in call.arguments for word in words):
                return index
        raise AssertionError(f"no {name} with {words}\n" + "\n".join(map(str, self.calls)))

    def last(self, name: str, *words: str) -> int:
        """The place of the last one."""
        turned = Order.__new__(Order)
        turned.calls = self.calls[::-1]
        return len(self.calls) - 1 - turned.first(name, *words)

    def assert_order(self, *places: int) -> None:
        """One after the other."""
        text = [f"{place}: {self.calls[place]}" for place in places]
        assert list(places) == sorted(set(places)), "\n".join(text)

    def between(self, first: int, last: int, *names: str) -> list[str]:
        """Names of calls between two places; of these names, or of all."""
        part = self.calls[first + 1 : last]
        return [call.name for call in part if not names or call.name in names]

    def paths(self, first: int, last: int) -> list[str]:
        """What is named by path between two places, in any way."""
        part = self.calls[first + 1 : last]
        return [word for call in part if call.name in BY_PATH for word in call.words if word]


def container_order(tmp_path: Path, check: Callable[[Order, Launch, Box], None], **changes: Any) -> None:
    """Start a container under strace, in a pod's namespaces, with all that a start can have; look at its calls."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts")
        joined = namespaces(network=pod.pins["net"], ipc=pod.pins["ipc"], uts=pod.pins["uts"])
        (tmp_path / "data").mkdir(exist_ok=True)
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            box = await launch.start(
                SPEAK,
                mounts=[bind("/data", tmp_path / "data", "rslave", "ro")],
                linux={"namespaces": joined},
                cwd="/work/here",
                user={"uid": 5, "gid": 6, "additionalGids": [7]},
                rlimits=[{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
                oomScoreAdj=0,
                **changes,
            )
            assert await line(box) == "up"
        check(Order(trace.calls()[box.process.pid]), launch, box)

    in_launch(tmp_path, body, filter=ALLOW_ALL, cgroups=True)


def test_the_order_of_a_start(tmp_path: Path) -> None:
    def check(order: Order, launch: Launch, box: Box) -> None:
        first = order.first
        joins = [path for path in box.cgroup.join if not path.startswith(f"{box.cgroup.directory_v2}/")]
        cut = first("mount_setattr", 'AT_FDCWD, "/", AT_RECURSIVE', "MS_SLAVE")
        pivot = first("pivot_root")
        order.assert_order(
            first("close_range"),
            order.last("close_range", "4294967295, 0"),
            first("prctl", "PR_SET_DUMPABLE, SUID_DUMP_DISABLE"),
            first("openat", "oom_score_adj"),
            *(first("openat", path) for path in joins),
            first("openat", "pods/p0/net"),
            first("openat", f"containers/{box.id}/stdout"),
            first("open_tree", str(tmp_path / "data"), "OPEN_TREE_CLONE"),
            first("mount_setattr", "MOUNT_ATTR_RDONLY"),
            first("setns", "CLONE_NEWNET"),
            first("setns", "CLONE_NEWIPC"),
            first("setns", "CLONE_NEWUTS"),
            first("unshare", "CLONE_NEWCGROUP"),
            cut,
            first("fsopen", '"overlay"'),
            first("fsmount"),
            first("move_mount", "run/rootfs"),
            first("fsopen", '"proc"'),
            first("mknodat", '"null"'),
            first("setsid"),
            first("openat2", '"proc/sys"'),
            first("openat2", '"proc/keys"'),
            pivot,
            first("umount2", '".", MNT_DETACH'),
            first("mkdirat", '"here"'),
            first("getcwd"),
            first("dup2", ", 0"),
            first("keyctl", "KEYCTL_JOIN_SESSION_KEYRING"),
            order.last("sendmsg"),
            order.last("recvmsg"),
            first("close_range", "CLOSE_RANGE_CLOEXEC"),
            order.last("umask"),
            first("prctl", "PR_CAPBSET_DROP"),
            first("setgroups"),
            first("setresgid"),
            first("setresuid"),
            first("capset"),
            first("prctl", "PR_SET_NO_NEW_PRIVS"),
            first("seccomp", "SECCOMP_SET_MODE_FILTER"),
            len(order.calls) - 1,
        )
        # Nothing is mounted in the new namespace before it is cut off from the node's.
        assert order.between(0, cut, "fsopen", "fsmount", "move_mount", "mount", "umount2", "pivot_root") == []
        # Nothing happens between the exchange of the root and the node's tree being gone from it.
        assert order.between(pivot, first("umount2")) == ["fchdir"]
        # Between filter and execve nothing happens at all.
        assert order.between(first("seccomp"), len(order.calls) - 1) == []
        # Privileges are not needed after they are gone.
        assert set(order.between(first("capset"), len(order.calls) - 1)) == {"prctl", "seccomp"}

    container_order(tmp_path, check)


def test_a_filter_comes_before_capabilities_go_without_no_new_privs(tmp_path: Path) -> None:
    def check(order: Order, launch: Launch, box: Box) -> None:
        seccomp = order.first("seccomp")
        order.assert_order(
            order.first("close_range", "CLOSE_RANGE_CLOEXEC"),
            order.last("prctl", "PR_CAPBSET_DROP"),
            seccomp,
            order.first("setgroups"),
            order.first("setresuid"),
            order.first("capset"),
            len(order.calls) - 1,
        )
        allowed = {"prctl", "setgroups", "setresgid", "setresuid", "capget", "capset"}
        assert set(order.between(seccomp, len(order.calls) - 1)) <= allowed

    container_order(tmp_path, check, noNewPrivileges=False)


def test_no_file_is_opened_by_surprise(tmp_path: Path) -> None:
    """No module, codec, locale, passwd or resolver file: before the namespaces are entered what the plan names, and then less."""

    def check(order: Order, launch: Launch, box: Box) -> None:
        cut = order.first("mount_setattr", "MS_SLAVE")
        run = str(launch.run_directory)
        before = set(order.paths(-1, cut))
        named = {
            "/proc/self/oom_score_adj",
            *box.cgroup.join,
            *(f"{run}/pods/p0/{kind}" for kind in ("net", "ipc", "uts")),
            *(f"{run}/containers/{box.id}/{name}" for name in ("stdout", "stderr")),
            str(tmp_path / "data"),
        }
        assert before <= named, before - named
        pivot, execve = order.first("pivot_root"), len(order.calls) - 1
        after = order.paths(pivot, execve)
        known = {".", "/", "work/here", "work", "here", "/dev/null"}
        assert set(after) <= known, after
        groups = {str(Path(join).parent) for join in box.cgroup.join}
        during = [path for path in order.paths(cut, pivot) if path.startswith("/") and path not in groups]
        assert set(during) <= {f"{run}/rootfs", "/", *STANDARD_LINKS}, during
        everything = " ".join(order.paths(-1, execve))
        for surprise in (".py", "encodings", "passwd", "/etc/group", "nsswitch", "locale", "gconv", "ld.so", "/lib"):
            assert surprise not in everything.replace("symlinkat", ""), surprise

    container_order(tmp_path, check)


STANDARD_LINKS = ("/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2")


def test_every_open_in_the_root_is_by_handle_and_bounded(tmp_path: Path) -> None:
    """Between mounting the root and leaving the node's: openat2 with a RESOLVE_ that cannot leave, or one name in a handle."""

    def check(order: Order, launch: Launch, box: Box) -> None:
        root, pivot = order.first("move_mount", "run/rootfs"), order.first("pivot_root")
        for call in order.calls[root + 1 : pivot]:
            if call.name == "openat2" and '"dev/null"' not in call.arguments:
                assert "RESOLVE_NO_MAGICLINKS" in call.arguments, call
                assert "RESOLVE_IN_ROOT" in call.arguments or "RESOLVE_BENEATH" in call.arguments, call
            elif call.name in ("mkdirat", "mknodat", "symlinkat", "openat", "fchownat"):
                name = call.words[-1] if call.name == "symlinkat" else call.words[0]
                at_root = call.arguments.startswith("AT_FDCWD") and call.words[0] in (
                    "/",
                    f"{launch.run_directory}/rootfs",
                )
                assert "/" not in name or at_root, call
            else:
                assert call.name not in ("open", "stat", "mount", "chdir", "rename", "unlink", "readlink"), call

    container_order(tmp_path, check)


@pytest.mark.parametrize("confined", [True, False])
def test_the_order_of_an_exec(confined: bool, tmp_path: Path) -> None:
    """The process that is made first does all that takes privileges; the one that it makes in the PID namespace has none."""

    async def body(launch: Launch) -> None:
        box = await launch.start(["sleep", "1000"])
        reading, writing = os.pipe2(os.O_CLOEXEC)
        launch.descriptors += (reading, writing)
        changes = {
            "cwd": "/tmp",
            "user": {"uid": 3, "gid": 4},
            "noNewPrivileges": confined,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
        }
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            made = await launch.begin_exec(box, SPEAK, writing, **changes)
            await readable(reading)
        calls = trace.calls()
        [maker] = [pid for pid, found in calls.items() if any(call.name == "setns" for call in found)]
        names = [call.name for call in calls[maker]]
        texts = [str(call) for call in calls[maker]]
        joins = [i for i, text in enumerate(texts) if text.startswith("openat") and "cgroup.procs" in text]
        # v2's group is the clone's.
        assert len(joins) == sum(
            box.cgroup.directory_v2 is None or box.cgroup.directory_v2 not in join for join in box.cgroup.join
        )

        def first_of(*words: str) -> int:
            return next(i for i, text in enumerate(texts) if all(word in text for word in words))

        filter = first_of("seccomp(SECCOMP_SET_MODE_FILTER")
        places = [
            first_of("PR_SET_DUMPABLE"),
            *joins,
            names.index("dup2"),
            names.index("setns"),
            names.index("close_range", names.index("setns")),
            first_of("openat2", '"/tmp"', "RESOLVE_NO_MAGICLINKS"),
            names.index("keyctl"),
            first_of("PR_CAPBSET_DROP"),
            *([] if confined else [filter]),
            names.index("setgroups"),
            names.index("setresuid"),
            names.index("capset"),
            *([first_of("PR_SET_NO_NEW_PRIVS"), filter] if confined else []),
            first_of("clone(", "CLONE_PARENT"),
            names.index("sendmsg"),
        ]
        assert places == sorted(places), texts
        assert not any(path.endswith(".py") for call in calls[maker] if call.name in BY_PATH for path in call.words)
        order = Order(calls[made.pid])
        first = order.first
        order.assert_order(
            first("setsid"), first("sendmsg"), first("recvmsg"), first("prlimit64"), len(order.calls) - 1
        )
        # It has the filter by then: whatever else it did would have to be known to `handlers.early`.
        assert {call.name for call in order.calls} - set(early.MEMORY) <= set(early.TO_MAKE)

    in_launch(tmp_path, body, filter=ALLOW_ALL, cgroups=True)


def test_the_order_of_an_exec_whose_filter_forbids_it(tmp_path: Path) -> None:
    """Then the filter comes where a container's comes; with no_new_privs it alone."""
    lines = [(0x20, 0, 0, 0), (0x15, 0, 1, early.NUMBERS[os.uname().machine]["setsid"])]
    lines += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    refusing = Filter(program=b"".join(early.INSTRUCTION.pack(*line) for line in lines))

    async def body(launch: Launch) -> None:
        box = await launch.start(["sleep", "1000"])
        for confined in (True, False):
            reading, writing = os.pipe2(os.O_CLOEXEC)
            launch.descriptors += (reading, writing)
            seccomp = {"defaultAction": "SCMP_ACT_ALLOW"}
            async with Trace(launch.pid_of("launcher"), tmp_path / f"trace{confined}") as trace:
                made = await launch.begin_exec(box, SPEAK, writing, noNewPrivileges=confined, seccomp=seccomp)
                await readable(reading)
            order = Order(trace.calls()[made.pid])
            after = order.between(order.first("seccomp"), len(order.calls) - 1)
            assert after == [] if confined else after[-1] in ("capset", "prctl"), after
            assert ("capset" in [call.name for call in order.calls]) != confined

    in_launch(tmp_path, body, filter=refusing)


def test_the_order_with_a_user_namespace(tmp_path: Path) -> None:
    """What takes the node's privileges is done in between, in a mount namespace of its own; then the user namespace is entered, then
    the time is set, then the child is made. That joins its cgroups while it has the node's root's ID, and only then becomes root inside.
    """
    (tmp_path / "data").mkdir()

    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "ipc", "uts")
        joined = user_namespace(network=pod.pins["net"], ipc=pod.pins["ipc"])
        joined["namespaces"].append({"type": "time"})
        joined["timeOffsets"] = {"boottime": {"secs": 5}}
        mounts = [*standard_mounts()[:3], bind("/data", tmp_path / "data", "ro", "idmap", "rprivate")]
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            spec = launch.spec(SPEAK, linux=joined, user={"uid": 5, "gid": 6}, hostname="x") | {"mounts": mounts}
            identity, overlay, ends = launch.place()
            cgroup = launch.cgroup(identity)
            made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=cgroup)
            launch.processes[made] = None
            await readable(ends["stdout"])
        calls = trace.calls()
        between = next(found for found in calls.values() if any("CLONE_PARENT" in str(call) for call in found))
        texts = [str(call) for call in between]

        def first(*words: str) -> int:
            return next(i for i, text in enumerate(texts) if all(word in text for word in words))

        places = [
            first("PR_SET_DUMPABLE"),
            first("clone3", "CLONE_NEWUSER"),
            first("openat", "/uid_map"),
            first("openat", "/gid_map"),
            first("openat", "/ns/user"),
            first("openat", "pods/p0/net"),
            first("openat", "stdout"),
            first("fchown", "100005"),
            first("unshare", "CLONE_NEWNS"),
            first("open_tree", str(tmp_path / "data")),
            first("mount_setattr", "MOUNT_ATTR_IDMAP"),
            first("mount_setattr", "MOUNT_ATTR_RDONLY"),
            first("mount_setattr", "MS_SLAVE"),
            first("fsopen", '"tmpfs"'),
            first("mknodat", '"d0"'),
            first("fsopen", '"overlay"'),
            first("setns", "CLONE_NEWNET"),
            first("setns", "CLONE_NEWIPC"),
            first("setns", "CLONE_NEWUSER"),
            first("unshare", "CLONE_NEWTIME"),
            first("openat", "timens_offsets"),
            first("clone3", "CLONE_PARENT"),
        ]
        assert places == sorted(set(places)), [texts[place] for place in places]
        entered = first("setns", "CLONE_NEWUSER")
        assert not [text for text in texts[entered:] if text.startswith(("mount", "fs", "move_mount", "open_tree"))]
        order = Order(calls[made.pid])
        order.assert_order(
            *(order.first("openat", path) for path in cgroup.join),
            order.first("setresuid", "0, 0, 0"),
            order.first("unshare", "CLONE_NEWCGROUP"),
            order.first("sethostname"),
            order.first("open_tree", 'AT_FDCWD, "3"', "OPEN_TREE_CLONE"),
            order.first("move_mount", '"3"'),
            order.first("fsopen", '"proc"'),
            order.first("move_mount", "MOVE_MOUNT_T_EMPTY_PATH"),
            order.first("pivot_root"),
            order.first("umount2", '".", MNT_DETACH'),
            order.last("recvmsg"),
            order.first("setresuid", "5, 5, 5"),
            len(order.calls) - 1,
        )
        # The child has nothing of the node's to open: its mounts are taken from where they lie, by their number.
        pivot = order.first("pivot_root")
        taken = [call.words[0] for call in order.calls[:pivot] if call.name == "open_tree" and call.words[0]]
        assert all(not word.startswith("/") or word in cgroup_folders(cgroup.join) for word in taken), taken

    in_launch(tmp_path, body, filter=ALLOW_ALL, cgroups=True)


def cgroup_folders(join: tuple[str, ...]) -> set[str]:
    """Where these cgroup.procs are."""
    return {str(Path(path).parent) for path in join}


def test_the_launcher_touches_no_path_of_a_pod(tmp_path: Path) -> None:
    """It forks, marks, records and reaps; layers, sources, targets and commands are the children's."""
    with mounted_tmpfs(tmp_path / "far") as far:

        async def body(launch: Launch) -> None:
            launcher = launch.pid_of("launcher")
            async with Trace(launcher, tmp_path / "trace") as trace:
                await launch.handler.check_sources([(str(far), False)])
                await launch.run(["true"], mounts=[bind("/far", far)])
            run = str(launch.run_directory)
            words = [word for call in trace.calls()[launcher] if call.name in BY_PATH for word in call.words]
            assert words and all(
                word.startswith((f"{run}/tasks/", f"{run}/exits/", "/proc/")) or not word for word in words
            ), words

        in_launch(tmp_path, body)


def test_parsing_a_trace() -> None:
    text = '7 openat(1, "a b",  <unfinished ...>\n8 getpid() = 8\n7 <... openat resumed>O_RDONLY) = 3\n7 +++ exited with 0 +++\n'
    assert parse(text) == {8: [Call("getpid", "", "8")], 7: [Call("openat", '1, "a b", O_RDONLY', "3")]}
