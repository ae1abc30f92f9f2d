"""Dumps and restores containers of one run directory: `criu` runs the program, `criu_dump` and `criu_restore` know what to tell it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import FailedPrecondition, InternalError
from tare.handlers import criu_dump
from tare.handlers.commands import Commands
from tare.handlers.criu import Criu, Surroundings
from tare.handlers.criu_restore import GHOSTS, Restorer, Restoring, below
from tare.handlers.placing import Hierarchies
from tare.handlers.processes import Process
from tare.handlers.v1 import criu_pb2 as pb

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup
    from tare.storage.overlay import Overlay

OUTLIVE_SECONDS = 30.0
LOG = "dump.log"
IMAGES = "checkpoint"


class Checkpointer:
    """`program` is CRIU, by name or path."""

    def __init__(self, run: Path, program: str, commands: Commands, hierarchies: Hierarchies) -> None:
        self._commands = commands
        self._criu = Criu(program, commands)
        self._restorer = Restorer(run, self._criu, hierarchies)

    async def require(self, doing: str) -> None:
        """Raises FailedPrecondition where CRIU is not there, or too old."""
        await self._criu.require(doing)

    async def outlive(self) -> None:
        """What an earlier daemon has had dumped is dumped."""
        await self._commands.outlive(OUTLIVE_SECONDS)

    def strangers(self, target: Process, processes: Collection[int]) -> list[int]:
        """Which of a container's processes are not below its first one: CRIU could not put them back."""
        return sorted(set(processes) - {target.pid, *below(target.pid)})

    async def dump(
        self,
        target: Process,
        spec: Mapping[str, Any],
        *,
        cgroup: Cgroup,
        fifos: Path,
        directory: Path,
        doing: str,
    ) -> criu_dump.Outside:
        """Have a container that stands still written down in `directory`, below `checkpoint`; it stands still afterwards too.

        Raises CriuFailed, FailedPrecondition.
        """
        try:
            processes = (target.pid, *below(target.pid))
            outside = await asyncio.to_thread(criu_dump.look, target.pid, processes, spec, fifos)
        except OSError as error:
            raise FailedPrecondition(doing, cause=error) from error
        options = pb.Options(
            pid=target.pid,
            leave_running=True,
            tcp_established=True,
            file_locks=True,
            link_remap=True,
            ext_sharing=True,
            ext_masters=True,
            ghost_limit=GHOSTS,
            manage_cgroups_mode=pb.IGNORE,
            network_lock=pb.NFTABLES,
            freeze_cgroup=freezer(cgroup),
            external=outside.external,
        )
        where = Surroundings(patient=True)
        await self._criu.call(pb.DUMP, options, doing, images=directory / IMAGES, work=directory, log=LOG, where=where)
        return outside

    async def restore(
        self,
        container_id: str,
        spec: Mapping[str, Any],
        what: Restoring,
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        freeze: Callable[[], Awaitable[None]],
        place: Callable[[Process], Awaitable[None]] | None,
    ) -> Process:
        """As `criu_restore.Restorer.restore`."""
        return await self._restorer.restore(
            container_id, spec, what, overlay=overlay, cgroup=cgroup, freeze=freeze, place=place
        )

    def check_mounts(self, spec: Mapping[str, Any], external: Sequence[str], doing: str) -> None:
        """As `criu_restore.Restorer.check`."""
        self._restorer.check(spec, external, doing)


def freezer(cgroup: Cgroup) -> str:
    """The directory of the group in the hierarchy that freezes."""
    if cgroup.freezer_file:
        return os.path.dirname(cgroup.freezer_file)
    if cgroup.directory_v2 is None:
        raise InternalError("dump a container", cause="nothing here can freeze its processes")
    return cgroup.directory_v2
