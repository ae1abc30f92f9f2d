"""Which tests run in the guest unless told otherwise: those whose subject the layout of control groups decides, and a short way through
the whole.

The rest makes the same system calls on either layout, and takes too long under emulation; `./dev test-vm tests/kernel` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = ("tests/kernel/test_cgroup*.py",)
CONTAINERS = (
    "tests/kernel/test_container.py",
    "tests/kernel/test_container_failures.py",
    "tests/kernel/test_container_mounts.py",
    "tests/kernel/test_exec.py",
    "tests/kernel/test_launch_order.py",
    "tests/kernel/test_pod_namespaces.py",
)
SYSTEMD = ("tests/kernel/test_systemd*.py",)
# Through the daemon: lives, limits, execs.
LIFECYCLE = "tests/e2e/test_lifecycle.py"
SMOKE = tuple(
    f"{LIFECYCLE}::{name}"
    for name in (
        "test_a_container_from_first_to_last",
        "test_a_shared_pid_namespace_is_reaped_and_its_stragglers_are_killed",
        "test_a_cgroup_parent_that_is_there_stays",
        "test_a_cgroup_parent_that_was_made_goes_with_what_was_made_above_it",
        "test_an_oom_kill_is_called_one",
        "test_a_timeout_kills_the_whole_tree_of_the_exec_and_nothing_else",
    )
)


def arguments(repository: Path, *, systemd: bool) -> tuple[str, ...]:
    """pytest arguments. Under systemd the containers' own tests are left out: they do not ask it for anything."""
    patterns = (*CGROUPS, *SYSTEMD, *SMOKE) if systemd else (*CGROUPS, *CONTAINERS, *SMOKE)
    return tuple(found for pattern in patterns for found in matching(repository, pattern))


def matching(repository: Path, pattern: str) -> Iterator[str]:
    """The files that a pattern names, with what it says behind `::`."""
    files, separator, names = pattern.partition("::")
    for path in sorted(repository.glob(files)):
        yield f"{path.relative_to(repository)}{separator}{names}"
