"""What the parts of `spec` take: values that are not CRI's own (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Spec = dict[str, Any]


class ImageSettings(Protocol):
    """What a container takes from its image's configuration (`images.records.ImageConfig` has it)."""

    @property
    def env(self) -> tuple[str, ...]:
        """ "NAME=value" each."""

    @property
    def entrypoint(self) -> tuple[str, ...]:
        """The words before `cmd`."""

    @property
    def cmd(self) -> tuple[str, ...]:
        """The default arguments, or the whole command."""

    @property
    def working_dir(self) -> str:
        """The default working directory."""

    @property
    def volumes(self) -> tuple[str, ...]:
        """Directories that are to be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNode:
    """A device to make in the container: `kind` "c" or "b", `mode` permission bits, `access` (for the device cgroup) of "rwm"."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int = 0o666
    uid: int = 0
    gid: int = 0
    access: str = "rwm"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSurroundings:
    """What a pod gives each of its containers.

    `pins` maps "net", "ipc", "uts", "pid" to files that hold the pod's own namespaces; `directory` has hosts, hostname,
    resolv.conf and shm/; `hostname` is what $HOSTNAME says ("" : it is not set).
    """

    pins: Mapping[str, Path]
    directory: Path
    hostname: str
