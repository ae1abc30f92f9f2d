"""Exec, attach and port-forward for a client: finds what a call is about, and joins it to the client (`streams`)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import FailedPrecondition, InvalidArgument, Unavailable, describe
from tare.handlers.builtin import Process
from tare.launch import taps
from tare.runtime import lifecycle, netns, trees
from tare.runtime.arrivals import known
from tare.runtime.descriptors import Descriptor
from tare.runtime.exec import group_of, process_in
from tare.runtime.exits import process_of
from tare.runtime.lifecycle import ContainerEvent
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerRecord, ContainerState, NamespaceMode
from tare.runtime.store import ContainerFacts
from tare.runtime.streams import Attachment, Client, Command, Started, Streams, Window

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup

log = logging.getLogger(__name__)


class Interactive:
    """Sessions of one runtime. `live` are execs that somebody waits for, which a sweep leaves alone."""

    def __init__(self, parts: Parts, live: set[Process], *, hangup_seconds: float, orphan_seconds: float = 0.0) -> None:
        self._parts = parts
        self._graces = {"hangup_seconds": hangup_seconds, "orphan_seconds": orphan_seconds}
        self._live = live
        self._numbers = itertools.count()

    # What a call may be about

    def check_exec(self, container_id: str) -> ContainerRecord:
        """Raises NotFound, FailedPrecondition."""
        record = self._parts.store.container(container_id, ContainerEvent.EXEC.value)
        lifecycle.container_after(record.state, ContainerEvent.EXEC, record.id)
        return record

    def check_attach(self, container_id: str, wanted: Streams) -> ContainerRecord:
        """One that runs, or is yet to start. Raises NotFound, FailedPrecondition, InvalidArgument."""
        record = self._parts.store.container(container_id, ContainerEvent.ATTACH.value)
        lifecycle.container_after(record.state, ContainerEvent.ATTACH, record.id)
        if wanted.tty != record.config.tty:
            have = "has" if record.config.tty else "has no"
            raise InvalidArgument(
                f"attach to container {record.id}", cause=f"tty is {wanted.tty}, but it {have} terminal"
            )
        return record

    def check_forward(self, pod_id: str) -> str:
        """The pod's whole ID. Raises NotFound, FailedPrecondition."""
        pod = self._parts.store.pod(pod_id, "forward ports of")
        if pod.id not in self._parts.store.pod_facts:
            raise FailedPrecondition(f"forward ports of pod {pod.id}", cause="it does not run")
        return pod.id

    # What it does

    async def exec(self, container_id: str, command: tuple[str, ...], wanted: Streams, client: Client) -> int:
        """A command in a container to its end: its exit code. Raises NotFound, FailedPrecondition, StartFailed, Unavailable."""
        record = self.check_exec(container_id)
        parts = self._parts
        facts = parts.store.container_facts[record.id]
        process = process_in(parts.store, record, command, tty=wanted.tty) | {"stdin": wanted.stdin}
        group, leaf = group_of(parts.cgroups, facts, parts.store.pods[record.pod_id].handler)
        started = Started(process=process_of(facts.process))

        async def begin(stdin: int, stdout: int, stderr: int, size: Window | None) -> Started:
            nonlocal started
            if size is not None:
                process["consoleSize"] = {"height": size.height, "width": size.width}
            started = await self._start(record, facts, process, group, (stdin, stdout, stderr))
            self._live.add(started.process)
            return started

        async def wait(made: Process) -> int:
            return (await parts.handler.wait(made)).code

        async def end(made: Process) -> None:
            doing = f"exec {command[0]!r}"
            if leaf:
                await parts.cgroups.kill(leaf)
            await trees.kill(parts.handler.root_of(made), lambda: parts.cgroups.processes(facts.cgroup), doing)
            parts.handler.signal(made, signal.SIGKILL)  # what stands in for it, where that does not end with it

        try:
            return await Command(client, wanted, begin, wait, end, **self._graces).run()
        finally:
            if started.process in self._live:
                self._live.discard(started.process)
                parts.handler.forget(started.process)
            if leaf:
                await parts.cgroups.clear_leaf(leaf)

    async def _start(
        self,
        record: ContainerRecord,
        facts: ContainerFacts,
        process: dict[str, Any],
        group: Cgroup,
        fds: tuple[int, int, int],
    ) -> Started:
        master = -1

        async def terminal(fd: int) -> None:
            nonlocal master
            master = os.dup(fd)

        parts = self._parts
        made = await parts.handler.exec(
            f"{record.id}-client-{next(self._numbers)}",
            process_of(facts.process),
            process,
            cgroup=group,
            stdin=fds[0],
            stdout=fds[1],
            stderr=fds[2],
            tty_sink=terminal if process["terminal"] else None,
        )
        if process["terminal"] and master < 0:
            parts.handler.signal(made, signal.SIGKILL)
            parts.handler.forget(made)
            raise Unavailable(f"exec in container {record.id}", cause="the terminal was lost on its way")
        return Started(process=made, terminal=master)

    async def attach(self, container_id: str, wanted: Streams, client: Client) -> None:
        """Join a container's main process until it ends or the client leaves; one that is yet to start is waited for.

        Raises NotFound, FailedPrecondition, LogFailed.
        """
        record = self.check_attach(container_id, wanted)
        if record.state is ContainerState.CREATED:
            joined = await self._arrive(record, client)
            if joined is None:
                return
        else:
            joined = await self._output(record)
        source, group = joined
        try:
            sink = await self._input(record, wanted)
        except BaseException:
            source.close()
            raise

        async def ended() -> None:
            if record.config.stdin_once and not record.config.tty:
                await self._parts.logs.end_input(group, record.id)

        attachment = Attachment(client, Descriptor(source.detach()), sink, ended, tty=record.config.tty)
        if not await attachment.run() and not client.gone.is_set():
            cause = f"the client took nothing for {taps.PATIENCE:g} s, or what copies the container's output was lost"
            raise Unavailable(f"attach to container {record.id}", cause=cause, hint="attach again")

    async def _output(self, record: ContainerRecord) -> tuple[socket.socket, str]:
        """A copy of what a container writes from now on (`launch.taps`), and its logger's group. Raises FailedPrecondition, LogFailed."""
        facts = self._parts.store.container_facts.get(record.id)
        if facts is None:  # its start failed, or it was removed, while this client was told that it could join
            raise FailedPrecondition(f"attach to container {record.id}", cause="it does not run any more")
        return await self._parts.logs.attach(facts.group, record.id), facts.group

    async def _arrive(self, record: ContainerRecord, client: Client) -> tuple[socket.socket, str] | None:
        """The output of a container that is yet to start, once it has, from its first byte on; None where the client leaves before that.

        Raises FailedPrecondition for one that does not start, LogFailed.
        """
        with self._parts.arrivals.expect(record.id) as arrival:
            if await known(arrival.admitted, client.gone):
                source, group = await self._output(record)
                arrival.joined.set()
                try:
                    if await known(arrival.started, client.gone):
                        return source, group
                except BaseException:
                    source.close()
                    raise
                source.close()
        if client.gone.is_set():
            return None
        raise FailedPrecondition(f"attach to container {record.id}", cause="it did not start")

    async def _input(self, record: ContainerRecord, wanted: Streams) -> Descriptor | None:
        """What writes to a container's stdin, where it has one that this client may use."""
        if not wanted.stdin or not (record.config.stdin or record.config.tty):
            return None
        if record.config.tty:
            master = await self._parts.handler.terminal(record.id)
            if master is None:
                raise Unavailable(f"attach to container {record.id}", cause="nobody has its terminal any more")
            return Descriptor(master)
        path = self._parts.run / "containers" / record.id / "stdin"
        try:
            return Descriptor(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            log.info("container %s reads no input any more: %s", record.id, describe(error))
            return None

    async def dial(self, pod_id: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a port of a pod. Raises NotFound, FailedPrecondition, OSError, TimeoutError."""
        full = self.check_forward(pod_id)
        pod = self._parts.store.pods[full]
        host = pod.config.security.namespaces.network is NamespaceMode.NODE
        pins = self._parts.store.pod_facts[full].pins
        return await netns.connect(None if host else Path(pins["net"]), port)
