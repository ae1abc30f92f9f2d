"""What a container of the built-in handler has beside its process, where its configuration asks for it: hooks that run in the node's
namespaces after its start and its end, a bundle that hooks can read, a class of service.

    <run>/hooked/<container>/config.json     the configuration; `root.path` is where a createContainer hook sees the root file system

The file is what a later daemon knows of it: while it is there, there is something to take away.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tare.errors import TareError, describe
from tare.handlers import hooks, rdt
from tare.handlers.channel import Refused
from tare.handlers.commands import ENVIRONMENT, Commands
from tare.handlers.failures import StartFailed
from tare.handlers.processes import Process
from tare.launch import linux

log = logging.getLogger(__name__)

START_SECONDS, STOP_SECONDS = 60.0, 10.0
"""How long poststart and poststop hooks may take that have no time of their own: in a daemon nothing waits for ever."""


class HookFailed(TareError):
    """A hook that did not end well."""


class Hooked:
    """Hooks and classes of service of the containers of one run directory."""

    def __init__(self, run: Path, commands: Commands) -> None:
        self._root = run / "hooked"
        self._rootfs = run / "rootfs"
        self._commands = commands

    def bundle(self, container_id: str) -> Path:
        """The directory that hooks are told of."""
        return self._root / container_id

    def kept(self) -> list[str]:
        """IDs of the containers of which there is something."""
        return sorted(os.listdir(self._root)) if self._root.is_dir() else []

    def prepare(self, container_id: str, spec: Mapping[str, Any]) -> tuple[str, ...]:
        """Before the process is made: the bundle and the class of service; the files by which the process joins that.

        Raises InvalidArgument, FailedPrecondition; `release` takes away what there is then.
        """
        share = rdt.of(spec, container_id)
        if share is not None:
            rdt.check_existing(share, rdt.schemata_of(share.group))
        if share is None and not any(hooks.parse(spec).values()):
            return ()
        self.bundle(container_id).mkdir(mode=0o700, parents=True, exist_ok=True)
        shown = {**spec, "root": {**(spec.get("root") or {}), "path": str(self._rootfs)}}
        linux.replace_file(str(self.bundle(container_id) / "config.json"), hooks.rendered(shown))
        if share is None:
            return ()
        rdt.apply(share)
        return share.joins

    def state(self, container_id: str, spec: Mapping[str, Any], process: Process) -> dict[str, Any]:
        """Of a running container."""
        return hooks.state(spec, container_id, str(self.bundle(container_id)), "running", process.pid)

    async def started(self, container_id: str, spec: Mapping[str, Any], process: Process) -> None:
        """The poststart hooks. Raises StartFailed for the first that fails: the container is to be stopped then."""
        found = hooks.parse(spec)["poststart"]
        bundle = str(self.bundle(container_id))
        for hook in found:
            try:
                await self._run(hook, self.state(container_id, spec, process), bundle)
            except TareError as error:
                doing = f"start container {container_id}"
                raise StartFailed(doing, step=hook.label, cause=describe(error), errno=0) from error

    async def release(self, container_id: str) -> None:
        """When nothing is left of the container's run: its class of service goes, then its poststop hooks run. Idempotent; failures are warnings."""
        bundle = self.bundle(container_id)
        try:
            spec = json.loads((bundle / "config.json").read_bytes())
        except FileNotFoundError:
            shutil.rmtree(bundle, ignore_errors=True)  # of a daemon that was killed before it had written it
            return
        try:
            share = rdt.of(spec, container_id)
            if share is not None:
                rdt.remove(share)
        except (TareError, OSError) as error:
            log.warning("container %s: remove its class of service: %s", container_id, describe(error))
        for hook in hooks.parse(spec)["poststop"]:
            try:
                await self._run(hook, hooks.state(spec, container_id, str(bundle), "stopped"), str(bundle))
            except TareError as error:
                log.warning("container %s: %s: %s", container_id, hook.label, describe(error))
        shutil.rmtree(bundle)

    async def _run(self, hook: hooks.Hook, state: Mapping[str, Any], cwd: str) -> None:
        """One hook, in the node's namespaces, to its end. Raises HookFailed."""
        env = ENVIRONMENT if hook.env is None else dict(line.partition("=")[::2] for line in hook.env)
        seconds = hook.timeout or (STOP_SECONDS if hook.point == "poststop" else START_SECONDS)
        try:
            ended = await self._commands.run(
                hook.args, program=hook.path, env=env, cwd=cwd, stdin=hooks.rendered(state), timeout=seconds
            )
        except Refused as error:
            raise HookFailed(f"run {hook.path}", cause=error.cause) from error
        if ended.code:
            words = f"it ended with {ended.code}" + (f": {ended.words}" if ended.words else "")
            raise HookFailed(f"run {hook.path}", cause=words)
