"""Which pods and containers a list request means. Pure. All that a filter sets must hold; an ID may be any prefix that fits one thing only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tare.cri import checks
from tare.cri.v1 import api_pb2 as pb
from tare.runtime.records import ContainerRecord, ContainerState, PodRecord, PodState


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFilter:
    """Empty and None stand for any."""

    id: str = ""
    state: PodState | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def select(self, records: Sequence[PodRecord]) -> list[PodRecord]:
        """The records that fit, in their order."""
        if self == PodFilter():
            return list(records)
        wanted = full_id((record.id for record in records), self.id)
        return [
            record
            for record in records
            if (not self.id or record.id == wanted)
            and self.state in (None, record.state)
            and self.labels.items() <= record.config.labels.items()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFilter:
    """Empty and None stand for any."""

    id: str = ""
    pod_id: str = ""
    state: ContainerState | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def select(self, records: Sequence[ContainerRecord]) -> list[ContainerRecord]:
        """The records that fit, in their order."""
        if self == ContainerFilter():
            return list(records)
        wanted = full_id((record.id for record in records), self.id)
        pod = full_id((record.pod_id for record in records), self.pod_id)
        return [
            record
            for record in records
            if (not self.id or record.id == wanted)
            and (not self.pod_id or record.pod_id == pod)
            and self.state in (None, record.state)
            and self.labels.items() <= record.config.labels.items()
        ]


def full_id(ids: Iterable[str], wanted: str) -> str | None:
    """The one ID that is `wanted` or begins with it; None where none does, or several do."""
    if not wanted:
        return None
    found = {candidate for candidate in ids if candidate.startswith(wanted)}
    if wanted in found:
        return wanted
    return found.pop() if len(found) == 1 else None


def pod_filter(request: pb.ListPodSandboxRequest | pb.StreamPodSandboxesRequest) -> PodFilter:
    """Raises InvalidArgument for a state that is not CRI's."""
    wanted = request.filter
    return PodFilter(
        id=wanted.id,
        state=checks.choice(PodState, wanted.state.state, "filter.state") if wanted.HasField("state") else None,
        labels=dict(wanted.label_selector),
    )


def container_filter(request: pb.ListContainersRequest | pb.StreamContainersRequest) -> ContainerFilter:
    """Raises InvalidArgument for a state that is not CRI's."""
    wanted = request.filter
    return ContainerFilter(
        id=wanted.id,
        pod_id=wanted.pod_sandbox_id,
        state=checks.choice(ContainerState, wanted.state.state, "filter.state") if wanted.HasField("state") else None,
        labels=dict(wanted.label_selector),
    )
