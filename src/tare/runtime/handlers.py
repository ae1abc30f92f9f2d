"""Runtime handlers: the built-in one, and those of the settings; by name where a pod is made or a container started, and from then on by process.

What there is of an OCI handler's containers is told by their bundles, so a new daemon knows whose a process is before it does anything
else. A bundle whose handler is no longer in the settings is still waited for, signalled and taken away; only what takes the
runtime's own program cannot be done.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.config import BUILTIN, HandlerConfig, RuntimeConfig
from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers.builtin import BuiltinHandler, ExitRecord, PodNamespaces, Process, SourceInfo
from tare.handlers.oci import OciHandler
from tare.handlers.oci_files import Bundle
from tare.runtime.records import NamespaceMode, PodConfig

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup
    from tare.handlers.plans import Mappings
    from tare.storage.overlay import Overlay

log = logging.getLogger(__name__)

GONE = "/nonexistent"  # the program of a handler that the settings do not have any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """What a usable handler can do."""

    name: str
    recursive_read_only: bool
    user_namespaces: bool


class Handlers:
    """All of them, as one (`ports.Handler`). Pods' namespaces, mount sources and the reaping of processes are the built-in one's for all."""

    def __init__(self, builtin: BuiltinHandler, config: RuntimeConfig, run: Path) -> None:
        self._builtin = builtin
        self._run = run
        self._default = config.default_handler
        self._others = {name: OciHandler(name, item, builtin, run) for name, item in config.handlers.items()}
        self._known = dict(self._others)  # and those that only bundles speak of

    async def begin(self) -> None:
        """Know what an earlier daemon made, end the commands that it was running, and see what the programs can do."""
        await self._builtin.commands.end_strays()
        for name in listed(self._run / "bundles"):
            bundle = Bundle(self._run, name)
            self._of_bundle(bundle).adopt(bundle)
        await self.look()
        trouble = self.missing()
        if trouble is not None:
            log.warning("runtime handlers cannot be used: %s", trouble)

    async def look(self) -> None:
        """See what the programs can do that are new or have changed."""
        await asyncio.gather(*(handler.features.look(self._builtin.commands) for handler in self._others.values()))

    def _of_bundle(self, bundle: Bundle) -> OciHandler:
        name = bundle.handler() or "unknown"
        if name not in self._known:
            log.warning("container %s was made by runtime handler %s, which the settings do not have", bundle.id, name)
            self._known[name] = OciHandler(name, HandlerConfig(path=GONE), self._builtin, self._run)
        return self._known[name]

    # By name

    def choose(self, name: str, config: PodConfig) -> str:
        """The handler that a pod which asks for `name` gets ("" for the default one, where that is built in).

        Raises InvalidArgument for an unknown one, FailedPrecondition for one whose program is missing or that cannot do what the pod asks for.
        """
        doing = f"run pod {config.metadata.name}"
        chosen = name or (self._default if self._default != BUILTIN else "")
        if chosen in ("", BUILTIN):
            return chosen
        if chosen not in self._others:
            known = ", ".join([BUILTIN, *self._others])
            raise InvalidArgument(
                doing, cause=f"there is no runtime handler {chosen}", hint=f"the settings have {known}"
            )
        features = self._others[chosen].features
        features.require(chosen)
        if config.security.namespaces.mapped is not None and not features.user_namespaces:
            raise FailedPrecondition(doing, cause=f"runtime handler {chosen} does not support user namespaces")
        if self._others[chosen].settings.sandbox and config.security.namespaces.pid is not NamespaceMode.CONTAINER:
            cause = f"runtime handler {chosen} has a sandbox for each container: they cannot share a PID namespace"
            raise FailedPrecondition(doing, cause=cause, hint="set the pod's namespace_options.pid to CONTAINER")
        return chosen

    def abilities(self) -> Sequence[Ability]:
        """Of those beside the built-in one that can be used."""
        return [
            Ability(
                name=name,
                recursive_read_only=handler.features.recursive_read_only,
                user_namespaces=handler.features.user_namespaces,
            )
            for name, handler in self._others.items()
            if handler.features.trouble() is None
        ]

    def missing(self) -> str | None:
        """Which handlers of the settings cannot be used, and why; None where all can."""
        found = {name: handler.features.trouble() for name, handler in self._others.items()}
        return "; ".join(f"{name}: {trouble}" for name, trouble in found.items() if trouble is not None) or None

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        handler: str,
        overlay: Overlay,
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None,
        on_created: Callable[[Process], Awaitable[None] | None] | None,
        place: Callable[[Process], Awaitable[None]] | None = None,
    ) -> Process:
        """By the handler of that name."""
        return await self._named(handler, f"start container {container_id}").start(
            container_id,
            spec,
            overlay=overlay,
            cgroup=cgroup,
            tty_sink=tty_sink,
            on_created=on_created,
            place=place,
        )

    async def release(self, container_id: str) -> None:
        """Take away what a handler keeps of a container's run beside the process. Idempotent."""
        bundle = Bundle(self._run, container_id)
        if bundle.directory.exists():
            await self._of_bundle(bundle).release(container_id)
        await self._builtin.hooked.release(container_id)

    def bundles(self) -> list[str]:
        """IDs of containers of which something is kept."""
        return [*listed(self._run / "bundles"), *self._builtin.hooked.kept()]

    def _named(self, name: str, doing: str) -> OciHandler | BuiltinHandler:
        if name in ("", BUILTIN):
            return self._builtin
        if name not in self._others:
            raise FailedPrecondition(doing, cause=f"the settings have no runtime handler {name} any more")
        return self._others[name]

    # By process

    def _of(self, process: Process) -> OciHandler | BuiltinHandler:
        return next((handler for handler in self._known.values() if handler.owns(process)), self._builtin)

    async def exec(
        self,
        exec_id: str,
        target: Process,
        process: dict[str, Any],
        *,
        cgroup: Cgroup,
        stdin: int,
        stdout: int,
        stderr: int,
        tty_sink: Callable[[int], Awaitable[None]] | None = None,
    ) -> Process:
        """By the handler that made the target."""
        handler = self._of(target)
        return await handler.exec(
            exec_id, target, process, cgroup=cgroup, stdin=stdin, stdout=stdout, stderr=stderr, tty_sink=tty_sink
        )

    async def terminal(self, container_id: str) -> int | None:
        """The master of a container's terminal: the keeper has it, whoever made it."""
        return await self._builtin.terminal(container_id)

    def root_of(self, process: Process) -> int:
        """The PID of the process that an exec is about: another may stand in for it."""
        handler = self._of(process)
        return handler.root_of(process) if isinstance(handler, OciHandler) else process.pid

    def signal(self, process: Process, number: int) -> bool:
        """False when it is gone."""
        return self._of(process).signal(process, number)

    async def came_to_run(self, process: Process) -> bool:
        """Whether a process that an earlier daemon started came past its exec. It may have ended since."""
        return await self._of(process).came_to_run(process)

    def forget(self, process: Process) -> None:
        """Its end is on record elsewhere now."""
        self._of(process).forget(process)

    def on_lost(self, call: Callable[[], None]) -> None:
        """Have `call` called where a launcher died over a command: of what it did, something may have to be swept up."""
        self._builtin.commands.on_lost = call

    def live_commands(self) -> set[Process]:
        """Commands that are waited for: no strays."""
        return set(self._builtin.commands.live)

    async def end_stray_commands(self, made_before: int | None) -> None:
        """End those that nobody waits for, with all that descends from them; only those made before a time, if one is given."""
        await self._builtin.commands.end_strays(made_before)

    # The built-in one's, for all

    async def pod_namespaces(
        self,
        pod_id: str,
        *,
        kinds: frozenset[str],
        hostname: str,
        sysctls: dict[str, str],
        mappings: Mappings | None = None,
    ) -> PodNamespaces:
        """New namespaces of these kinds, pinned."""
        return await self._builtin.pod_namespaces(
            pod_id, kinds=kinds, hostname=hostname, sysctls=sysctls, mappings=mappings
        )

    async def remove_pod_namespaces(self, pod_id: str, pause: Process | None) -> None:
        """Let them go. Idempotent."""
        await self._builtin.remove_pod_namespaces(pod_id, pause)

    async def check_sources(self, paths: Sequence[tuple[str, bool]]) -> Sequence[SourceInfo]:
        """What is at each path of the node; (path, True) makes a directory where nothing is."""
        return await self._builtin.check_sources(paths)

    async def propagation(self, paths: Sequence[str]) -> Sequence[SourceInfo]:
        """How the mounts spread that paths of the node are on."""
        return await self._builtin.propagation(paths)

    async def relabel(self, paths: Sequence[tuple[str, str]]) -> Sequence[SourceInfo]:
        """Give each path of the node, with all below it, an SELinux label."""
        return await self._builtin.relabel(paths)

    async def wait(self, process: Process) -> ExitRecord:
        """How it ended, once it has."""
        return await self._builtin.wait(process)

    def alive(self, process: Process) -> bool:
        """Whether it has not ended."""
        return self._builtin.alive(process)

    def launcher_start_time(self) -> int:
        """When whatever makes processes now started, in clock ticks since boot."""
        return self._builtin.launcher_start_time()

    async def trouble(self) -> str | None:
        """Why no process can be made now, or None."""
        return await self._builtin.trouble()


def listed(directory: Path) -> list[str]:
    """Names in a directory that may not be there."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
