"""What this node's kernel allows, tried once when a daemon begins: a kubelet is told, and a request for more is refused with the reason.

A version number says little (a filter, a setting or a file system may stand in the way), so that each thing is done on a small scale:
a user namespace is made and pinned like a pod's, and the directory of the layers is cloned and mapped by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tare.errors import FailedPrecondition, TareError, UnknownError, describe
from tare.handlers.plans import Mappings
from tare.launch import linux
from tare.runtime.handlers import Ability
from tare.runtime.ports import Handler
from tare.runtime.records import ContainerConfig, PodConfig

PROBE = "probe"  # in the place of a pod's ID, which has 64 digits
RANGE = ((0, 1 << 16, 1 << 16),)
UNKNOWN = "this daemon has not tried it yet"


class RecursiveReadOnlyUnsupported(UnknownError):
    """A mount cannot be made read-only with all that is mounted in it. The kubelet matches the message's first word."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"RROUnsupported: mount {path} read-only with all that is mounted in it", cause=cause)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """Why something cannot be done on this node; None where it can."""

    user_namespaces: str | None = UNKNOWN
    recursive_read_only: str | None = UNKNOWN

    def check_pod(self, config: PodConfig) -> None:
        """Raise FailedPrecondition where the pod asks for what there is not."""
        if config.security.namespaces.mapped is not None and self.user_namespaces is not None:
            doing = f"run pod {config.metadata.name} in a user namespace"
            raise FailedPrecondition(doing, cause=self.user_namespaces, hint="run it without one (hostUsers)")

    def check_container(self, config: ContainerConfig) -> None:
        """Raise RecursiveReadOnlyUnsupported where the container asks for what there is not."""
        for mount in config.mounts:
            if mount.recursive_read_only and self.recursive_read_only is not None:
                raise RecursiveReadOnlyUnsupported(mount.container_path, self.recursive_read_only)


def check_handler(config: ContainerConfig, name: str, others: Iterable[Ability]) -> None:
    """Raise RecursiveReadOnlyUnsupported where the container asks for what its pod's handler, one of these, does not have."""
    if any(other.name == name and not other.recursive_read_only for other in others):
        for mount in config.mounts:
            if mount.recursive_read_only:
                cause = f"runtime handler {name} does not support it"
                raise RecursiveReadOnlyUnsupported(mount.container_path, cause)


async def look(handler: Handler, run: Path, layers: Path) -> Abilities:
    """Try. `layers` is a directory of the file system that containers' roots are on."""
    return Abilities(
        user_namespaces=await user_namespaces(handler, run, layers), recursive_read_only=recursive_read_only(run)
    )


async def user_namespaces(handler: Handler, run: Path, layers: Path) -> str | None:
    """Whether a pod can have one, and a container's root be mapped by it."""
    directory = run / "pods" / PROBE
    mappings = Mappings(uid=RANGE, gid=RANGE)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        await handler.remove_pod_namespaces(PROBE, None)  # of a daemon that was killed while it tried
        try:
            kinds = frozenset({"user"})
            made = await handler.pod_namespaces(PROBE, kinds=kinds, hostname="", sysctls={}, mappings=mappings)
            return mapped(made.pins["user"], layers)
        finally:
            await handler.remove_pod_namespaces(PROBE, None)
            directory.rmdir()
    except (TareError, OSError) as error:
        return describe(error)


def mapped(namespace: Path, directory: Path) -> str | None:
    """Whether a directory can be mounted mapped by a user namespace. Raises OSError where there is no such namespace."""
    user = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        change(directory, linux.AT_EMPTY_PATH, linux.MOUNT_ATTR_IDMAP, user)
    except OSError as error:
        return f"the file system of {directory} cannot be mounted with mapped owners: {describe(error)}"
    finally:
        os.close(user)
    return None


def recursive_read_only(directory: Path) -> str | None:
    """Whether a mount can be made read-only with all that is mounted in it."""
    try:
        change(directory, linux.AT_EMPTY_PATH | linux.AT_RECURSIVE, linux.MOUNT_ATTR_RDONLY)
    except OSError as error:
        return describe(error)
    return None


def change(directory: Path, flags: int, attributes: int, user: int = 0) -> None:
    """Give a clone of a mount, which nobody sees and which ends here, these attributes. Raises OSError."""
    tree = linux.open_tree(linux.AT_FDCWD, bytes(directory), linux.OPEN_TREE_CLONE)
    try:
        linux.mount_setattr(tree, b"", flags, attributes=attributes, userns=user)
    finally:
        os.close(tree)
