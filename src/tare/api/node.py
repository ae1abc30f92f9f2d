"""The service tare.v1.Node, beside CRI's: the node held against the records."""

from __future__ import annotations

from tare.api.v1 import tare_pb2 as pb
from tare.config import Config
from tare.images.service import ImageService
from tare.images.verify import Verifier
from tare.network.choice import Networks
from tare.runtime.audit_live import Auditor, Outcome
from tare.runtime.audit_mend import Tools
from tare.runtime.service import Runtime
from tare.state.database import Database
from tare.state.operations import Operations


def auditor(
    config: Config, runtime: Runtime, network: Networks, images: ImageService, state: Database, operations: Operations
) -> Auditor:
    """Who holds the node against the records, from a daemon's parts."""
    parts = runtime.parts
    tools = Tools(
        parts=parts,
        network=network,
        images=images,
        verifier=Verifier(images),
        root=config.root,
        database=state,
    )
    return Auditor(
        config,
        tools,
        runtime.locks,
        awaited=lambda: runtime.execs | parts.handler.live_commands(),
        busy=operations.busy,
    )


class Node:
    """Over one auditor. A repair goes on when its caller leaves."""

    lasting: frozenset[str] = frozenset({"Audit"})

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor

    async def Audit(self, request: pb.AuditRequest) -> pb.AuditReply:
        """What is the matter, and what was done about it."""
        return pb.AuditReply(findings=map(finding, await self._auditor.audit(repair=request.repair)))


def finding(outcome: Outcome) -> pb.AuditFinding:
    """A finding as a message."""
    item = outcome.finding
    return pb.AuditFinding(
        kind=item.kind,
        name=item.name,
        owner=item.owner,
        state=item.state.value,
        text=item.text,
        hint=item.hint,
        outcome=outcome.said,
        mended=outcome.mended,
    )
