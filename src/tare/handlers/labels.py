"""AppArmor profiles and SELinux contexts of an OCI configuration as launch steps. Pure.

Whether the kernel has what is asked for is found out by the launch's first steps, and is an error where it has not: a container that was
to be confined must not run unconfined. The orders are given last before the gate, and hold for what the process executes then.

Source: OCI runtime specification 1.2, config.md, "apparmorProfile" and "selinuxLabel", and config-linux.md, "Mount Label".
"""

from __future__ import annotations

from tare.errors import InvalidArgument
from tare.handlers.options import encoded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.launch.plan import Step

    Spec = Mapping[str, Any]

LONGEST_PROFILE = 4096
LONGEST_MOUNT_LABEL = 255  # a value that fsconfig(2) takes
PARTS_OF_A_CONTEXT = 3
LABELLED_BY_THE_KERNEL = (b"proc", b"sysfs", b"mqueue", b"cgroup", b"cgroup2")
SLOT = 5
"""The slot of the node's /proc, by which the orders are given."""


def expected(process: Spec, linux_part: Spec) -> list[Step]:
    """In the node's namespaces, before anything else: the kernel must have what is asked for. Raises InvalidArgument."""
    profile = profile_of(process)
    label, mount_label = context_of(process, "process", "selinuxLabel"), mount_context(linux_part)
    steps: list[Step] = []
    if profile:
        steps.append(("expect_apparmor", f"confine by AppArmor profile {profile}", encoded(profile)))
    for name, context in (("process.selinuxLabel", label), ("linux.mountLabel", mount_label)):
        if context:
            steps.append(("expect_selinux", f"apply {name} {context}", encoded(context)))
    if profile or label:
        steps.append(("open_proc", "open /proc", SLOT))
    return steps


def keys(process: Spec) -> list[Step]:
    """What makes the session keyring that is made next the container's."""
    label = context_of(process, "process", "selinuxLabel")
    return [("key_context", f"label the keyring {label}", SLOT, encoded(label))] if label else []


def orders(process: Spec) -> list[Step]:
    """What makes the program run confined."""
    profile, label = profile_of(process), context_of(process, "process", "selinuxLabel")
    steps: list[Step] = []
    if profile:
        steps.append(("apparmor", f"confine by AppArmor profile {profile}", SLOT, encoded(profile)))
    if label:
        steps.append(("selinux", f"apply process.selinuxLabel {label}", SLOT, encoded(label)))
    return steps


def done(process: Spec) -> list[Step]:
    """The node's /proc is let go of: a process that the container may get hold of must not have it."""
    return [("close_slot", "close /proc", SLOT)] if orders(process) else []


def labelled(steps: Sequence[Step], linux_part: Spec) -> list[Step]:
    """Steps whose new file systems have `linux.mountLabel`.

    Not those that the kernel labels file by file, and would not make again with another context: proc, sysfs, mqueue, and control groups.
    """
    context = encoded(mount_context(linux_part))
    if not context:
        return list(steps)
    return [in_context(step, context) for step in steps]


def in_context(step: Step, context: bytes) -> Step:
    """One step, labelled if it makes a file system that has labels."""
    if step[0] == "filesystem" and step[3] not in LABELLED_BY_THE_KERNEL:
        operation, label, slot, kind, flags, data = step
        return (operation, label, slot, kind, flags, (*data, (b"context", context)))
    return (*step, context) if step[0] in ("overlay", "union", "mask") else step


def profile_of(process: Spec) -> str:
    """`process.apparmorProfile`; "" for none. Raises InvalidArgument for what could be no profile's name."""
    profile = text(process, "process", "apparmorProfile")
    if len(profile) > LONGEST_PROFILE or profile != profile.strip() or any(mark in profile for mark in "\0\n"):
        raise InvalidArgument("read process.apparmorProfile", cause=f"{profile!r} is no name of a profile")
    return profile


def mount_context(linux_part: Spec) -> str:
    """`linux.mountLabel`, which new file systems get as their option `context`; "" for none. Raises InvalidArgument."""
    label = context_of(linux_part, "linux", "mountLabel")
    if len(label.encode()) > LONGEST_MOUNT_LABEL:
        raise InvalidArgument("read linux.mountLabel", cause=f"is over {LONGEST_MOUNT_LABEL} bytes long")
    return label


def context_of(section: Spec, path: str, key: str) -> str:
    """A member that is an SELinux context; "" for none."""
    label = text(section, path, key)
    if label and (len(label.split(":")) < PARTS_OF_A_CONTEXT or any(mark.isspace() or mark in '"\0' for mark in label)):
        raise InvalidArgument(f"read {path}.{key}", cause=f"{label!r} is not user:role:type:level")
    return label


def text(section: Spec, path: str, key: str) -> str:
    """A member that is a string; "" where it is absent."""
    value = section.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidArgument(f"read {path}.{key}", cause=f"{value!r} is not a string")
    return value or ""
