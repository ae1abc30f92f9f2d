"""SIGKILL at every step of a command leaves nothing that `delete --force` does not clear.

strace kills the command at the n-th call of a system call, for each n that a run without it has: directories and files made,
renamed and removed, messages to and from the processes that are being made.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oci.test_refusals import assert_nothing_made, mark, marked
from tests.support.oci import SECONDS, Bundle, Runtime, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]
CALLS = (
    "mkdir",
    "rename",
    "sendmsg",
    "recvmsg",
    "unlink",
    "rmdir",
    "write",
    "bind",
    "flock",
    "memfd_create",
    "mkdirat",
)

__all__ = ["mark"]


def traced(runtime: Runtime, bundle: Bundle, options: list[str], words: list[str]) -> int:
    """Run a command under strace: its exit code."""
    argv = ["strace", "-qq", *options, *runtime.argv(*words)]
    with open(bundle.path / "output", "ab") as output:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=SECONDS * 3, check=False
        )
    return done.returncode


def points(runtime: Runtime, bundle: Bundle, words: list[str], after: str) -> Iterator[tuple[str, int]]:
    """(system call, how many of it) for each call that a command makes, from the first that names `after` on."""
    trace = bundle.path / "trace"
    assert traced(runtime, bundle, ["-o", str(trace), "-e", f"trace={','.join(CALLS)}"], words) == 0
    counts: dict[str, int] = {}
    begun = False
    for line in trace.read_text().splitlines():
        found = re.match(r"(\w+)\(", line)
        if found:
            counts[found[1]] = counts.get(found[1], 0) + 1
            begun = begun or after in line
            if begun:
                yield found[1], counts[found[1]]


def clear(runtime: Runtime, container: str, mark: str) -> None:
    """What `delete --force` is to clear, and all has gone."""
    runtime.call("delete", "--force", container)
    wait_for(lambda: True if not marked(mark) else None)
    assert_nothing_made(runtime, container)


def test_create(tare: Runtime, bundle: Bundle, mark: str) -> None:
    clear(tare, bundle.create(tare), mark)  # what is made once for all is made
    first = tare.name_one()
    words = ["create", "--bundle", str(bundle.path), "--pid-file", str(bundle.path / "pid")]
    found = list(points(tare, bundle, [*words, first], str(tare.root)))
    clear(tare, first, mark)
    killed = 0
    for name, number in found:
        container = tare.name_one()
        inject = ["-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"]
        killed += traced(tare, bundle, inject, [*words, container]) != 0
        clear(tare, container, mark)
    # A call that a signal interrupts is made again, so the last of a kind is not always there.
    assert killed > 20


@pytest.mark.parametrize("command", ["start", "delete"])
def test_start_and_delete(tare: Runtime, bundle: Bundle, mark: str, command: str) -> None:
    words = [command] if command == "start" else [command, "--force"]
    first = bundle.create(tare)
    found = list(points(tare, bundle, [*words, first], ""))
    clear(tare, first, mark)
    assert found
    for name, number in found:
        container = bundle.create(tare)
        inject = ["-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"]
        traced(tare, bundle, inject, [*words, container])
        assert not os.path.exists(f"/proc/{container}")
        clear(tare, container, mark)


def test_the_waiting_process_is_killed(tare: Runtime, bundle: Bundle, mark: str) -> None:
    container = bundle.create(tare)
    os.kill(tare.state(container)["pid"], 9)
    assert tare.until(container, "stopped")["pid"] == 0
    assert tare.call("start", container, check=False).returncode == 1
    clear(tare, container, mark)


def test_the_state_directory_is_half_made(tare: Runtime, bundle: Bundle, mark: str) -> None:
    container = tare.name_one()
    Path(tare.root, container).mkdir(parents=True)
    assert tare.state(container)["status"] == "stopped"
    clear(tare, container, mark)
