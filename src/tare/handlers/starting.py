"""The main process of a container: made by the launcher from a plan, told of while it waits, and let go.

    created   plan compiled ─► CREATE ─► it is set up, as far as its gate ─► told of ─► START ─► it is the program

    begun     BEGIN ─► BORN, told of ─┐
              plan compiled meanwhile ┴─► PROCEED ─► it is set up ─► it is the program

What is begun is forked while its plan is compiled, and nothing is asked of the daemon between its set-up and its exec. That is for a process
that nobody has to look at in between and nobody else sees: with a PID namespace of its own, and no hooks, terminal, or process that makes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import InternalError, InvalidArgument, Unavailable
from tare.handlers import compile as compiler
from tare.handlers import hooks
from tare.handlers.channel import Refused, text
from tare.handlers.failures import failed
from tare.handlers.namespaces import Namespaces
from tare.handlers.pins import PROC_PIN
from tare.handlers.placing import Hierarchies, opened
from tare.handlers.processes import Process, Processes
from tare.launch import mounts, packets, plan, wire

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup
    from tare.handlers.commands import SendPlan
    from tare.handlers.hooked import Hooked
    from tare.handlers.plans import Directory
    from tare.storage.overlay import Overlay

log = logging.getLogger(__name__)

SETUP_TIMEOUT = 60.0  # a child that is kept waiting by a mount source longer than this is given up

Spec = Mapping[str, Any]
Answer = tuple[list[bytes | int], list[int]]
OnCreated = Callable[[Process], Awaitable[None] | None]
TerminalSink = Callable[[int], Awaitable[None]]
Placing = Callable[[Process], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What can be asked of the launcher, and done about its processes: the built-in handler's own."""

    ask: Callable[..., Awaitable[Answer]]
    send_plan: SendPlan
    abandon: Callable[[bytes], Coroutine[Any, Any, None]]
    end: Callable[[Process], Coroutine[Any, Any, None]]
    run_errand: Callable[[Coroutine[Any, Any, None]], None]


class Starts:
    """Makes the processes of one run directory's containers."""

    def __init__(
        self,
        run: Path,
        ways: Ways,
        processes: Processes,
        hooked: Hooked,
        seccomp: Callable[[Spec], Awaitable[compiler.Filter]],
        hierarchies: Hierarchies,
    ) -> None:
        self._run = run
        self._ways = ways
        self._processes = processes
        self._hooked = hooked
        self._seccomp = seccomp
        self._hierarchies = hierarchies
        self._begins = True  # whether the launcher knows how, which an older one does not

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay | Directory,
        cgroup: Cgroup,
        tty_sink: TerminalSink | None = None,
        on_created: OnCreated | None = None,
        place: Placing | None = None,
    ) -> Process:
        """As `builtin.BuiltinHandler.start`."""
        process = None
        if self._begins and place is None and goes_alone(spec):
            process = await self._begin(container_id, spec, overlay, cgroup, on_created)
        if process is None:
            process = await self.create(
                container_id,
                spec,
                overlay=overlay,
                cgroup=cgroup,
                tty_sink=tty_sink,
                on_created=on_created,
                place=place,
            )
            patience = SETUP_TIMEOUT + hooks.seconds(spec, "startContainer")
            await self._let_go(wire.START, container_id, spec, process, (), patience)
        with self._ended_where_this_fails(process):
            await self._hooked.started(container_id, spec, process)
        return process

    async def create(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay | Directory,
        cgroup: Cgroup,
        tty_sink: TerminalSink | None = None,
        on_created: OnCreated | None = None,
        place: Placing | None = None,
    ) -> Process:
        """Make the process as far as its gate: all is set up, only credentials, filter and exec are to come.

        With `place` the process waits before all else, until that has put it into its cgroups; those of `cgroup.join` it joins then.
        """
        doing = f"start container {container_id}"
        where = self._place(container_id, spec, cgroup, barrier=place is not None)
        compiled = compiler.container(spec, overlay, where, await self._filter(spec))
        fields = (container_id.encode(), compiled.clone_flags, compiled.maker)
        patience = SETUP_TIMEOUT + hooks.seconds(spec, "prestart", "createRuntime", "createContainer")
        try:
            with opened(compiled.cgroup) as fds:
                answer, received = await self._ways.send_plan(wire.CREATE, fields, compiled.plan, fds, doing, patience)
            process = self._adopted(answer, received)
            if place is not None:
                answer, received = await self._put(container_id, process, place, doing, patience)
                process = self._adopted(answer, received, instead_of=process)
        except Refused as error:
            raise failed(error, doing, spec["process"]) from error
        warn(container_id, answer)
        try:
            with self._ended_where_this_fails(process):
                await tell(on_created, process)
                if tty_sink is not None and len(received) > 1:
                    await tty_sink(received[1])
        finally:
            packets.close_all(received[1:])
        return process

    async def _begin(
        self,
        container_id: str,
        spec: dict[str, Any],
        overlay: Overlay | Directory,
        cgroup: Cgroup,
        on_created: OnCreated | None,
    ) -> Process | None:
        """The process, past its exec; None where it has to be created instead."""
        doing, name = f"start container {container_id}", container_id.encode()
        namespaces = Namespaces(spec)
        with opened(cgroup.directory_v2 or "") as fds:
            asking = self._ways.ask(wire.BEGIN, (name, namespaces.clone_flags), fds, doing=doing, timeout=SETUP_TIMEOUT)
            born = asyncio.ensure_future(asking)
            try:
                await asyncio.sleep(0)  # so that it is asked now
                where = self._place(container_id, spec, cgroup, barrier=False)
                compiled = compiler.container(spec, overlay, where, await self._filter(spec), namespaces)
                sealed = -1 if compiled.helper else seal(compiled.plan, doing)
            except BaseException:
                await self._unwanted(born, name)
                raise
            if sealed < 0:
                await self._unwanted(born, name)
                return None
            try:
                process = await self._born(born, name, doing, spec)
                if process is not None:
                    with self._ended_where_this_fails(process):
                        await tell(on_created, process)
                    await self._let_go(wire.PROCEED, container_id, spec, process, (sealed,), SETUP_TIMEOUT)
            finally:
                os.close(sealed)
        return process

    async def _born(self, born: asyncio.Future[Answer], name: bytes, doing: str, spec: Spec) -> Process | None:
        """The process that waits for its plan; None where the launcher does not know how to make one."""
        try:
            answer, received = await born
        except asyncio.CancelledError:  # it may have been there by then
            await self._unwanted(born, name)
            raise
        except Refused as error:
            if error.step == "launcher" and error.errno == errno.ENOSYS:
                self._begins = False
                return None
            raise failed(error, doing, spec["process"]) from error
        return self._adopted(answer, received)

    async def _unwanted(self, born: asyncio.Future[Answer], name: bytes) -> None:
        """End the process that was asked for, whether it is there yet or not."""
        born.cancel()
        for answer in await asyncio.gather(born, return_exceptions=True):
            if not isinstance(answer, BaseException):
                packets.close_all(answer[1])
                await self._ways.abandon(name)

    def _adopted(
        self, answer: Sequence[wire.Field], received: Sequence[int], instead_of: Process | None = None
    ) -> Process:
        """The process of an answer. Who was placed may be another, that has made it."""
        process = Process(int(answer[0]), int(answer[1]))
        self._processes.adopt(process, received[0])
        if instead_of is not None and instead_of != process:
            self._processes.forget(instead_of)
        return process

    async def _let_go(
        self, kind: int, container_id: str, spec: Spec, process: Process, fds: Sequence[int], patience: float
    ) -> None:
        """START or PROCEED: it goes on, and is the program when this returns."""
        doing, name = f"start container {container_id}", container_id.encode()
        try:
            answer, received = await self._ways.ask(kind, (name,), fds, doing=doing, timeout=patience)
        except Refused as error:
            if error.step == "gate":  # its launcher was lost between the two requests, and it ended with that
                self._ways.run_errand(self._ways.end(process))
                raise Unavailable(doing, cause=error) from error
            self._processes.forget(process)
            raise failed(error, doing, spec["process"]) from error
        except Unavailable as error:  # nor may the answer alone be lost: what runs is not to run twice
            if await self._processes.came_to_run(process):
                log.warning("%s: %s; it runs", doing, error)
                return
            self._ways.run_errand(self._ways.end(process))
            raise
        except BaseException:
            self._ways.run_errand(self._ways.end(process))
            raise
        packets.close_all(received)
        warn(container_id, answer)

    @contextlib.contextmanager
    def _ended_where_this_fails(self, process: Process) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._ways.run_errand(self._ways.end(process))
            raise

    async def _put(self, container_id: str, process: Process, place: Placing, doing: str, patience: float) -> Answer:
        """Have a process placed that waits for it, and go on: the rest of CREATE's answer."""
        name = container_id.encode()
        try:
            await place(process)
            return await self._ways.ask(wire.PROCEED, (name,), (), doing=doing, timeout=patience)
        except BaseException:
            self._ways.run_errand(self._ways.abandon(name))
            self._processes.forget(process)
            raise

    async def _filter(self, spec: Spec) -> compiler.Filter | None:
        seccomp = spec.get("linux", {}).get("seccomp")
        return await self._seccomp(seccomp) if seccomp else None

    def _place(self, container_id: str, spec: Spec, cgroup: Cgroup, *, barrier: bool) -> compiler.Place:
        return compiler.Place(
            streams=self._run / "containers" / container_id,
            base=self._run / "rootfs",
            join=(*cgroup.join, *self._hooked.prepare(container_id, spec)),
            hierarchies=self._hierarchies.v1,
            unified=self._hierarchies.unified,
            groups=self._hierarchies.groups(cgroup),
            directory_v2=cgroup.directory_v2,
            barrier=barrier,
            other_proc=other_proc(spec),
            id=container_id,
            bundle=str(self._hooked.bundle(container_id)),
        )


def other_proc(spec: Spec) -> str | None:
    """As `Place` has it, for the PID namespace that a container joins: a pod's is beside its pin, where the kernel makes no new one."""
    kinds = {item["type"]: item.get("path") or "" for item in (spec.get("linux") or {}).get("namespaces") or ()}
    joined = kinds.get("pid")
    if not joined:
        return None
    if mounts.shows_other_pids():
        return ""
    beside = os.path.join(os.path.dirname(joined), PROC_PIN)
    return beside if os.path.basename(joined) == "pid" and os.path.ismount(beside) else None


def goes_alone(spec: Spec) -> bool:
    """Whether a container's process may go on to its exec unseen: nobody else is in its PID namespace, and nobody waits for it in between."""
    kinds = {item["type"]: item.get("path") or "" for item in (spec.get("linux") or {}).get("namespaces") or ()}
    makes_itself = kinds.get("pid") == "" and "user" not in kinds and kinds.get("time") != ""
    return makes_itself and not spec["process"].get("terminal") and not any(hooks.parse(spec).values())


async def tell(on_created: OnCreated | None, process: Process) -> None:
    """Whoever wants to know that there is a process, and has it wait until that is done."""
    answer = on_created(process) if on_created is not None else None
    if answer is not None:
        await answer


def seal(work: plan.Plan, doing: str) -> int:
    """The plan's memfd, which is the caller's. Raises InvalidArgument for one that is too long, InternalError."""
    try:
        return plan.seal(work)
    except OSError as error:
        raise (InvalidArgument if error.errno == errno.E2BIG else InternalError)(doing, cause=error) from error


def warn(container_id: str, answer: Sequence[wire.Field]) -> None:
    """What the process has carried on from, after its PID and start time."""
    for warning in answer[2:]:
        log.warning("container %s: %s", container_id, text(warning))
