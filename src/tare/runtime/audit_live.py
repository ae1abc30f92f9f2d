"""The audit beside a serving daemon: what is under way is no finding, and what is mended is under lock meanwhile.

    look ─► what is busy left out ─► a pause ─► look again: what is no finding any more left out ─► locks of the owners had
         ─► look again ─► what is left is so ─► (repair: each mended) ─► look once more: what is left then was not mended

Looking reads files in a thread and holds nobody up; the locks are held for one look, and for mending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from tare.cgroups.layout import Layout
from tare.config import Config
from tare.errors import DeadlineExceeded, TareError, describe
from tare.handlers.processes import Process
from tare.runtime import audit, audit_node, audit_records
from tare.runtime.audit import Finding, State
from tare.runtime.audit_mend import REPAIR, Mend, Tools
from tare.runtime.locks import Locks

PAUSES = (0.3, 1.0)  # seconds: what the kernel or a thread takes a while to finish is done by then
PATIENCE = 10.0  # seconds for the locks of one finding's owner: who has it longer is at work on it


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finding, and what a repair did or why it did not ("" without one)."""

    finding: Finding
    said: str = ""
    mended: bool = False


def known_groups(records: audit_records.Records) -> set[str]:
    """Paths of control groups on record."""
    return {facts.cgroup for facts in records.container_facts.values()}


def look(config: Config, layout: Layout, around: audit.Surroundings) -> list[Finding]:
    """One look at records and node. Blocks."""
    records = audit_records.read(config.root, config.run)
    node = audit_node.look(config, layout, known_groups(records), records.networks, audit.processes_of(records))
    return audit.compare(records, node, around)


class Auditor:
    """`awaited` are processes that somebody waits for, `busy` says what operations are at work on beside what `locks` has."""

    def __init__(
        self,
        config: Config,
        tools: Tools,
        locks: Locks,
        awaited: Callable[[], Collection[Process]],
        busy: Callable[[], set[str]],
    ) -> None:
        self._config = config
        self._tools = tools
        self._locks = locks
        self._awaited = awaited
        self._busy = busy
        self._alone = asyncio.Lock()

    async def recover(self) -> None:
        """Strike out what repairs of an earlier daemon have left: what they were to mend is found anew, if it is still so."""
        await self._tools.parts.operations.recover(REPAIR, self._restored)

    def _restored(self, names: Mapping[str, str]) -> Mend:
        finding = Finding(kind=names["kind"], name=names["name"], owner="", state=State.ORPHAN, text="")
        return Mend(tools=self._tools, finding=finding)

    async def audit(self, *, repair: bool = False) -> list[Outcome]:
        """What is the matter; with `repair` what was done about it. Raises InternalError where it cannot be looked at."""
        async with self._alone:
            found = await self._look(set())
            for pause in PAUSES:
                if not found:
                    return []
                await asyncio.sleep(pause)
                again = set(await self._look(set()))
                found = [finding for finding in found if finding in again]
            return await self._confirm(found, repair=repair)

    async def _look(self, ours: set[str]) -> list[Finding]:
        """Findings but for those about what somebody is at work on; `ours` are the locks that we have ourselves."""
        before = self._at_work() - ours
        awaited = {f"{process.pid}.{process.start_time}" for process in self._awaited()}
        store = self._tools.images.store
        around = audit.Surroundings(
            run=self._config.run,
            root=self._config.root,
            awaited=awaited,
            held=store.held() | store.layers.records().keys(),
            serving=True,
            keep_blobs=self._config.images.keep_blobs,
        )
        found = await asyncio.to_thread(look, self._config, self._tools.parts.cgroups.found, around)
        busy = before | (self._at_work() - ours)
        return [finding for finding in found if not concerned(finding, busy)]

    def _at_work(self) -> set[str]:
        return self._locks.held() | self._busy()

    async def _confirm(self, found: Iterable[Finding], *, repair: bool) -> list[Outcome]:
        """What is still so while nobody else can be at work on it."""
        async with AsyncExitStack() as stack:
            ours = await self._hold({finding.owner for finding in found if finding.owner}, stack)
            again = set(await self._look(ours))
            sure = [finding for finding in found if finding in again and finding.owner in {"", *ours}]
            if not repair:
                return [Outcome(finding) for finding in sure]
            done = [await self._mend(finding) for finding in sure]
            left = set(await self._look(ours))
            return [Outcome(out.finding, out.said, out.mended and out.finding not in left) for out in done]

    async def _hold(self, owners: set[str], stack: AsyncExitStack) -> set[str]:
        """The locks of these, but for those that are not to be had. Pods come before containers, as everywhere."""
        held = set()
        containers = self._tools.parts.store.containers
        for owner in sorted(owners, key=lambda owner: (owner in containers, owner)):
            try:
                async with asyncio.timeout(PATIENCE):
                    await stack.enter_async_context(self._locks.hold(owner, f"audit {owner}"))
            except (TimeoutError, DeadlineExceeded):
                continue
            held.add(owner)
        return held

    async def _mend(self, finding: Finding) -> Outcome:
        mend = Mend(tools=self._tools, finding=finding)
        try:
            await self._tools.parts.operations.run(REPAIR, mend, {"kind": finding.kind, "name": finding.name})
        except (TareError, OSError) as error:
            return Outcome(finding, f"left: {describe(error)}")
        return Outcome(finding, mend.said, mended=True)


def concerned(finding: Finding, busy: Collection[str]) -> bool:
    """Whether it is about something that somebody is at work on. An operation's intent is named by its key."""
    if finding.kind == "operation":
        return finding.name.partition(" ")[0] in busy
    if finding.kind == "process" or (finding.kind == "file" and Path(finding.name).parent.name in ("tasks", "exits")):
        return False
    return finding.owner in busy
