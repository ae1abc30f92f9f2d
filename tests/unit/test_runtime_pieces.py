"""The small pure parts of the runtime: logger groups, pod files, bounds, reasons, process trees, captured output."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tare.errors import DeadlineExceeded, InternalError, InvalidArgument, ResourceExhausted, Unavailable
from tare.handlers.builtin import ExitRecord, Process
from tare.runtime import groups, podfiles, strays, sysctls
from tare.runtime.bounds import deadline, kernel_errors, twice
from tare.runtime.creating import is_refused
from tare.runtime.exec import Capture
from tare.runtime.exits import Watchers, ended, lost, reason_of
from tare.runtime.pods import hostname_of, kinds_of
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerRecord,
    ContainerState,
    DnsConfig,
    ImageRef,
    NamespaceMode,
    NamespaceOptions,
    PodConfig,
    PodMetadata,
    PodSecurity,
    ProcessFact,
)
from tare.runtime.trees import Member, parse_stat, tree


def config(namespace: str = "default", **options: Any) -> PodConfig:
    return PodConfig(
        metadata=PodMetadata(name="web", uid="u", namespace=namespace),
        hostname="web",
        dns=DnsConfig(servers=("10.0.0.10",), searches=("svc",), options=("ndots:5",)),
        security=PodSecurity(namespaces=NamespaceOptions(**options)),
    )


RUNNING = ContainerRecord(
    id="c",
    pod_id="p",
    config=ContainerConfig(metadata=ContainerMetadata(name="main"), image=ImageRef(image="busybox")),
    image_id="i",
    image_ref="i",
    state=ContainerState.RUNNING,
    created_at=1,
)


def test_a_logger_serves_so_many_pods_of_one_family() -> None:
    mine, other = groups.family(config(), ""), groups.family(config("kube-system"), "")
    assert mine != other
    assert mine != groups.family(config(), "kata")
    taken: list[str] = []
    for _ in range(5):
        taken.append(groups.choose(mine, [*taken, f"{other}-0"], 2))
    assert taken == [f"{mine}-0", f"{mine}-0", f"{mine}-1", f"{mine}-1", f"{mine}-2"]
    taken.remove(f"{mine}-0")
    assert groups.choose(mine, taken, 2) == f"{mine}-0"
    assert groups.choose(mine, taken, 0) == f"{mine}-3"


def test_namespaces_are_those_that_the_pod_does_not_share_with_the_node() -> None:
    assert kinds_of(config()) == {"net", "uts", "ipc", "pid"}
    assert kinds_of(config(network=NamespaceMode.NODE)) == {"ipc", "pid"}
    assert kinds_of(config(ipc=NamespaceMode.NODE, pid=NamespaceMode.CONTAINER)) == {"net", "uts"}
    assert kinds_of(config(network=NamespaceMode.NODE, ipc=NamespaceMode.NODE, pid=NamespaceMode.NODE)) == set()


def test_a_pod_on_the_nodes_network_has_the_nodes_name() -> None:
    assert hostname_of(config()) == "web"
    assert hostname_of(config(network=NamespaceMode.NODE)) == os.uname().nodename


def test_sysctls_must_be_the_pods_own() -> None:
    sysctls.check(["net.core.somaxconn", "kernel.shmmax", "fs/mqueue/msg_max"], {"net", "ipc"})
    with pytest.raises(InvalidArgument, match=r"kernel\.panic: it is the node's"):
        sysctls.check(["net.core.somaxconn", "kernel.panic"], {"net", "ipc", "uts"})
    with pytest.raises(InvalidArgument, match="shares the node's net namespace"):
        sysctls.check(["net.core.somaxconn"], {"ipc"})


def test_pod_files_say_what_was_asked_for() -> None:
    files = podfiles.contents(config(), "web", ("10.85.0.2",))
    assert files["hostname"] == b"web\n"
    assert files["resolv.conf"] == b"search svc\nnameserver 10.0.0.10\noptions ndots:5\n"
    assert files["hosts"].endswith(b"10.85.0.2\tweb\n")


def test_a_hostname_that_the_kernel_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="64"):
        podfiles.contents(config(), "x" * 65, ())


def test_reasons() -> None:
    assert reason_of(0, 0, True) == "Completed"
    assert reason_of(0, 3, True) == "Completed"
    assert reason_of(1, 0, True) == "Error"
    assert reason_of(137, 0, True) == "Error"
    assert reason_of(137, 1, True) == "OOMKilled"
    assert reason_of(255, 1, False) == "Unknown"


def test_an_end_is_recorded_as_it_was() -> None:
    end = ExitRecord(process=Process(7, 70), code=143, signal=15, finished_at=99)
    after = ended(RUNNING, end, 0)
    assert (after.state, after.exit_code, after.reason, after.finished_at, after.message) == (
        ContainerState.EXITED,
        143,
        "Error",
        99,
        "",
    )


def test_an_end_that_nobody_saw_is_unknown() -> None:
    end = ExitRecord(process=Process(7, 70), code=255, signal=0, finished_at=99, known=False)
    for after in (ended(RUNNING, end, 0), lost(RUNNING, "the node was restarted")):
        assert (after.state, after.exit_code, after.reason) == (ContainerState.EXITED, 255, "Unknown")
        assert after.message


def test_missing_sources_are_refused_by_path() -> None:
    assert is_refused("/etc/hostname", ["/etc/hostname"])
    assert is_refused("/mnt/disk/data", ["/mnt/disk/"])
    assert not is_refused("/mnt/disks", ["/mnt/disk"])
    assert not is_refused("/mnt/disk", [])


def test_a_stat_line_with_a_hostile_name() -> None:
    fields = "S 5 7 8 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4321 0 0"
    assert parse_stat(f"9 (a) S 1 (b) {fields}\n") == Member(9, 5, 8, 4321)
    assert parse_stat("9 (x) Z 5 7 8" + fields[7:]).zombie


def test_a_tree_is_descendants_and_session() -> None:
    members = [
        Member(10, 1, 10, 1),
        Member(11, 10, 10, 2),
        Member(12, 11, 12, 3),  # a session of its own, but a descendant
        Member(13, 1, 10, 4),  # its parent is gone, but it is in the session
        Member(14, 13, 14, 5),
        Member(20, 1, 20, 6),  # another's
        Member(21, 20, 20, 7),
    ]
    assert {member.pid for member in tree(members, 10)} == {10, 11, 12, 13, 14}
    assert {member.pid for member in tree(members[4:], 99)} == set()


def test_both_streams_together_are_cut_and_the_writer_never_blocks() -> None:
    async def test() -> tuple[bytes, bytes]:
        capture = Capture(limit=100)
        out, out_end = capture.pipe()
        err, err_end = capture.pipe()

        def write() -> None:
            for fd, text in ((out_end, b"o" * 60), (err_end, b"e" * 60), (out_end, b"O" * 300_000)):
                while text:
                    text = text[os.write(fd, text) :]
            os.close(out_end)
            os.close(err_end)

        await asyncio.to_thread(write)
        await capture.drain(10)
        return capture.taken(out), capture.taken(err)

    out, err = asyncio.run(test())
    assert len(out) + len(err) == 100
    assert out.startswith(b"o") and err == b"e" * len(err)


def test_a_drain_takes_what_is_there_when_somebody_keeps_the_pipe() -> None:
    async def test() -> bytes:
        capture = Capture()
        out, out_end = capture.pipe()
        os.write(out_end, b"last words")
        await capture.drain(0.0)
        os.close(out_end)
        return capture.taken(out)

    assert asyncio.run(test()) == b"last words"


def test_a_deadline_says_what_was_waited_for() -> None:
    async def test() -> None:
        with pytest.raises(DeadlineExceeded, match=r"attach pod p: no end within 0\.01 s"):
            async with deadline(0.01, "attach pod p"):
                await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            async with deadline(10, "attach pod p"):
                raise TimeoutError(errno.ETIMEDOUT, "the work's own")

    asyncio.run(test())


def test_the_kernels_refusals_get_the_familys_words() -> None:
    with pytest.raises(ResourceExhausted, match="make it: No space left on device"), kernel_errors("make it"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InternalError, match="make it: Permission denied: /x"), kernel_errors("make it"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "/x")


def test_a_lost_helper_is_asked_once_more() -> None:
    async def test() -> list[str]:
        seen: list[str] = []

        async def attempt() -> str:
            seen.append("try")
            if len(seen) == 1:
                raise Unavailable("start", cause="the launcher ended")
            return "done"

        async def clean() -> None:
            seen.append("clean")

        assert await twice(attempt, clean) == "done"
        seen.clear()

        async def hopeless() -> str:
            seen.append("try")
            raise Unavailable("start")

        with pytest.raises(Unavailable):
            await twice(hopeless)
        return seen

    assert asyncio.run(test()) == ["try", "try"]


def test_an_end_is_waited_for_also_where_its_kills_cannot_be_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Waiting:
        """A handler that says when it is asked for an end, which does not come; and groups that cannot be watched."""

        def __init__(self) -> None:
            self.asked = asyncio.Event()

        async def wait(self, process: Process) -> ExitRecord:
            self.asked.set()
            return await asyncio.Future[ExitRecord]()

        def watch(self, path: str) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

    async def body() -> None:
        waiting = Waiting()
        facts = SimpleNamespace(cgroup="/a", process=ProcessFact(pid=1, start_time=2))
        parts: list[Any] = [SimpleNamespace(container_facts={"c": facts}, containers={}), waiting, waiting, None]
        watchers = Watchers(*parts)
        watchers.watch("c")
        async with asyncio.timeout(20):
            await waiting.asked.wait()
        task = watchers._watches["c"].task
        assert task is not None
        task.cancel()

    asyncio.run(body())
    assert "container c: watch for OOM kills: " in caplog.text


def test_records_that_were_cut_off_are_those_of_dead_writers(tmp_path: Path) -> None:
    for folder in ("tasks", "exits"):
        (tmp_path / folder).mkdir()
    for name in ("7.70", f"7.71.{os.getpid()}.tmp", "7.72.4194305.tmp"):  # no PID is so large
        (tmp_path / "exits" / name).touch()
    assert strays.cut_off(tmp_path) == [tmp_path / "exits/7.72.4194305.tmp"]
