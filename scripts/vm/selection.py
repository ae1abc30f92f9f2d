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
    "tests/kernel/test_container_mounts.py::test_the_file_systems_of_a_container",
    *(
        f"tests/kernel/test_exec.py::{name}"
        for name in (
            "test_all_namespaces_and_the_root_are_joined",
            "test_what_it_is",
            "test_limits_are_no_hindrance_to_its_making",
            "test_failures",
            "test_a_container_that_is_gone",
            "test_into_a_container_that_dies_meanwhile",
            "test_cancelled_execs_are_not_left_running",
        )
    ),
    "tests/kernel/test_criu.py",
    "tests/kernel/test_launch_order.py",
    "tests/kernel/test_pod_namespaces.py",
    *(
        f"tests/kernel/test_userns.py::{name}"
        for name in (
            "test_a_new_user_namespace_owns_all_others",
            "test_the_user_namespace_of_a_pod",
            "test_what_is_read_only_stays_so",
            "test_without_its_own_network_there_is_no_sysfs_but_the_nodes",
        )
    ),
)
# The suite of bundles, on Tare's command line and its rivals: here crun is one of them, which refuses v1 and v2 side by side.
BUNDLES = (
    "tests/oci/test_inside.py",
    "tests/oci/test_hooks.py::test_every_point_in_its_order_with_its_state",
    *(
        f"tests/oci/test_lifecycle.py::{name}"
        for name in (
            "test_kill_all_reaches_every_process",
            "test_pause_and_resume",
            "test_limits_are_changed_in_place",
            "test_exec_in_a_group_below",
        )
    ),
)
SYSTEMD = (
    "tests/kernel/test_systemd*.py",
    "tests/kernel/test_barrier.py",
    "tests/vm/systemd_driver.py",
    "tests/vm/systemd_service.py",
)
LABELS = ("tests/kernel/test_labels*.py",)
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


def arguments(repository: Path, confinement: str, *, systemd: bool) -> tuple[str, ...]:
    """pytest arguments. Under systemd the tests of containers alone are left out: what it does for them is in those of its driver."""
    patterns = (*CGROUPS, *SYSTEMD) if systemd else (*CGROUPS, *CONTAINERS, *SMOKE, *BUNDLES)
    if confinement:
        patterns = LABELS
    return tuple(found for pattern in patterns for found in matching(repository, pattern))


def matching(repository: Path, pattern: str) -> Iterator[str]:
    """The files that a pattern names, with what it says behind `::`. Raises FileNotFoundError: without a name pytest would run all there is."""
    files, separator, names = pattern.partition("::")
    found = sorted(repository.glob(files))
    if not found:
        raise FileNotFoundError(f"{repository} has no {files}")
    for path in found:
        yield f"{path.relative_to(repository)}{separator}{names}"
