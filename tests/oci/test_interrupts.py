"""Ctrl-C and its like leave nothing behind, whenever they come and however often: no directory, control group or process.

strace sends the signal at the n-th call of a system call, for each n that a run without it has, as in `test_kills`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tare.oci import creating, interrupts
from tests.oci.test_kills import points, traced
from tests.oci.test_refusals import assert_nothing_made, mark, marked
from tests.support.oci import SECONDS, Bundle, Runtime, wait_for

pytestmark = pytest.mark.root
__all__ = ["mark"]
# Where something is made, and where the command waits.
CALLS = ("mkdir", "mkdirat", "rename", "sendmsg", "recvmsg")


def assert_all_gone(runtime: Runtime, container: str, mark: str) -> None:
    """Without `delete`."""
    wait_for(lambda: True if not marked(mark) else None)
    assert_nothing_made(runtime, container)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_at_any_step_of_run(tare: Runtime, bundle: Bundle, mark: str) -> None:
    bundle.write("true")
    words = ["run", "--bundle", str(bundle.path)]
    tare.call(*words, tare.name_one())  # what is made once for all is made
    interrupted = 0
    for name, number in points(tare, bundle, [*words, tare.name_one()], str(tare.root)):
        if name in CALLS:
            container = tare.name_one()
            inject = ["-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=INT:when={number}"]
            interrupted += traced(tare, bundle, inject, [*words, container]) != 0
            assert_all_gone(tare, container, mark)
    assert interrupted > 3  # each v1 tree adds one more


@pytest.mark.parametrize("number", interrupts.NUMBERS)
def test_many_while_it_is_made_and_undone(tare: Runtime, bundle: Bundle, mark: str, number: signal.Signals) -> None:
    began = bundle.path / "began"
    script = f"touch {began}; sleep 1000"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", mark]}
    bundle.config["hooks"] = {"createRuntime": [hook]}
    bundle.write("true")
    container = tare.name_one()
    with open(bundle.path / "output", "wb") as output:
        argv = tare.argv("run", "--bundle", str(bundle.path), container)
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as running:
            wait_for(lambda: True if began.exists() else None)
            deadline = time.monotonic() + SECONDS
            while running.poll() is None:
                assert time.monotonic() < deadline
                running.send_signal(number)
                time.sleep(0.0005)
            assert running.returncode == 1
    assert "interrupted" in (bundle.path / "output").read_text()
    assert_all_gone(tare, container, mark)


def test_a_created_container_ends_by_one(tare: Runtime, bundle: Bundle, mark: str) -> None:
    """The process that waits to be started has none of the command's answers to signals."""
    bundle.linux["namespaces"] = [item for item in bundle.linux["namespaces"] if item["type"] != "pid"]
    for number in interrupts.NUMBERS:
        container = bundle.create(tare)
        tare.call("kill", container, str(int(number)))
        tare.until(container, "stopped")


@pytest.fixture
def answers() -> Iterator[None]:
    """What this process answers with, as it was."""
    before = {number: signal.getsignal(number) for number in interrupts.NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    interrupts.pending()
    for number, answer in before.items():
        signal.signal(number, answer)


def test_they_are_kept_heeded_and_no_more_then(answers: None) -> None:
    interrupts.take()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        interrupts.heed()
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.pending() == [signal.SIGTERM]
    interrupts.take()
    interrupts.heed()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as the caller wants it


def test_what_undoes_is_not_interrupted(answers: None) -> None:
    interrupts.take()
    undo = creating.Undo()
    done: list[int] = []

    def action() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append(len(done))

    for _ in range(3):
        undo.add("it", action)
    interrupts.heed()
    undo.all()
    assert done == [0, 1, 2]
