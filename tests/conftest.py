"""What holds for the whole test session: nothing is left on the machine, and where TARE_NO_SKIPS is set no test is skipped.

Leftovers fail the session by name. They are looked for after each test module as well, to say which one left them.
TARE_LEAKS=warn prints them only: for a machine on which another session runs meanwhile.

Property tests try the same examples each time, so that a run says something of the change and not of its luck; TARE_EXPLORE=1 makes them
try new ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tare.oci import seals, state
from tests.support import leaks

SETTLE_SECONDS = 5.0
settings.register_profile("same", derandomize=True)
settings.register_profile("explore")
settings.load_profile("explore" if os.environ.get("TARE_EXPLORE") else "same")


class Guard:
    """The state of the session-wide checks."""

    def __init__(self) -> None:
        self.session = uuid.uuid4().hex
        os.environ[leaks.SESSION_VARIABLE] = self.session
        self.before = leaks.snapshot(self.session)
        self.first_seen: dict[leaks.Thing, str] = {}
        self.left: list[leaks.Thing] = []
        self.skipped: list[str] = []

    def note(self, module: str) -> None:
        """Remember which module was the first after which a thing was there."""
        for thing in leaks.left_behind(self.before, leaks.snapshot(self.session)):
            self.first_seen.setdefault(thing, module)

    def finish(self) -> None:
        """Take the last look."""
        self.left = leaks.settle(self.before, self.session, SETTLE_SECONDS)

    def failures(self) -> list[str]:
        """Headlines of what fails the session."""
        found = []
        if self.left and os.environ.get("TARE_LEAKS") != "warn":
            found.append(f"{len(self.left)} left behind")
        if self.skipped and os.environ.get("TARE_NO_SKIPS"):
            found.append(f"{len(self.skipped)} skipped where none may be")
        return found


GUARD = pytest.StashKey[Guard]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[GUARD] = Guard()


@pytest.fixture(scope="session", autouse=True)
def seal_is_temporary() -> Iterator[None]:
    """The mount is made once for each boot, and meant to stay; here it goes, where it was not there before."""
    before = os.path.exists(seals.DIRECTORY)
    root = os.path.exists(state.DEFAULT_ROOT)
    yield
    if not root and os.path.exists(state.DEFAULT_ROOT):
        shutil.rmtree(state.DEFAULT_ROOT)  # podman's calls name no other; what it holds by now is compiled filters
    if not before and os.path.exists(seals.DIRECTORY):
        for place in Path(seals.DIRECTORY).glob(f"{seals.PREFIX}*/{seals.INTERPRETER}"):
            if seals.mounted(str(place)):
                subprocess.run(["umount", str(place)], check=True)
        shutil.rmtree(seals.DIRECTORY)


@pytest.fixture(scope="module", autouse=True)
def leftovers_by_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attribute what stays to the module after which it first stayed."""
    yield
    request.config.stash[GUARD].note(request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        item.config.stash[GUARD].skipped.append(item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        collector.config.stash[GUARD].skipped.append(collector.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    guard = session.config.stash[GUARD]
    guard.finish()
    if guard.failures() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    guard = config.stash[GUARD]
    if guard.left:
        terminalreporter.section("left behind on this machine", red=True)
        for thing in guard.left:
            terminalreporter.line(f"{thing}  (first seen after {guard.first_seen.get(thing, 'the last module')})")
        terminalreporter.line("if another session on this machine made them: TARE_LEAKS=warn")
    for failure in guard.failures():
        terminalreporter.line(f"FAILED session: {failure}", red=True)
