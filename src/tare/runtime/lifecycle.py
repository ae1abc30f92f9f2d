"""The states of pods and containers: one table each, and nothing else decides what may follow what.

    (state, event) → the state after it

`None` stands for a thing that is not there. What is not in the table is refused. Performing a transition, and waiting for
one, is elsewhere; `picture` draws the tables for docs/architecture.md.

CRI's CONTAINER_UNKNOWN is never entered: of what cannot be known any more the end is recorded as code 255, reason Unknown.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

from tare.errors import FailedPrecondition, NotFound
from tare.runtime.records import ContainerState, PodState


class PodEvent(enum.Enum):
    """What happens to a pod; the value is what a person calls it."""

    RUN = "run"
    CREATE = "create a container in"
    START = "start a container in"
    UPDATE = "update the limits of"
    STOP = "stop"
    LOST = "lose"
    REMOVE = "remove"


class ContainerEvent(enum.Enum):
    """What happens to a container; the value is what a person calls it."""

    CREATE = "create"
    START = "start"
    START_FAILED = "fail to start"
    EXEC = "exec in"
    ATTACH = "attach to"
    REOPEN_LOG = "reopen the log of"
    UPDATE = "update the limits of"
    STOP = "stop"
    EXIT = "exit"
    LOST = "lose"
    REMOVE = "remove"


POD: Mapping[tuple[PodState | None, PodEvent], PodState | None] = {
    (None, PodEvent.RUN): PodState.READY,
    (PodState.READY, PodEvent.CREATE): PodState.READY,
    (PodState.READY, PodEvent.START): PodState.READY,
    (PodState.READY, PodEvent.UPDATE): PodState.READY,
    (PodState.READY, PodEvent.STOP): PodState.NOTREADY,
    (PodState.NOTREADY, PodEvent.STOP): PodState.NOTREADY,
    (PodState.READY, PodEvent.LOST): PodState.NOTREADY,
    (PodState.NOTREADY, PodEvent.LOST): PodState.NOTREADY,
    (PodState.NOTREADY, PodEvent.REMOVE): None,
}

CONTAINER: Mapping[tuple[ContainerState | None, ContainerEvent], ContainerState | None] = {
    (None, ContainerEvent.CREATE): ContainerState.CREATED,
    (ContainerState.CREATED, ContainerEvent.UPDATE): ContainerState.CREATED,
    (ContainerState.CREATED, ContainerEvent.START): ContainerState.RUNNING,
    (ContainerState.CREATED, ContainerEvent.START_FAILED): ContainerState.EXITED,
    (ContainerState.RUNNING, ContainerEvent.EXEC): ContainerState.RUNNING,
    (ContainerState.CREATED, ContainerEvent.ATTACH): ContainerState.CREATED,
    (ContainerState.RUNNING, ContainerEvent.ATTACH): ContainerState.RUNNING,
    (ContainerState.RUNNING, ContainerEvent.REOPEN_LOG): ContainerState.RUNNING,
    (ContainerState.RUNNING, ContainerEvent.UPDATE): ContainerState.RUNNING,
    (ContainerState.CREATED, ContainerEvent.STOP): ContainerState.CREATED,
    (ContainerState.RUNNING, ContainerEvent.STOP): ContainerState.RUNNING,
    (ContainerState.EXITED, ContainerEvent.STOP): ContainerState.EXITED,
    (ContainerState.RUNNING, ContainerEvent.EXIT): ContainerState.EXITED,
    (ContainerState.RUNNING, ContainerEvent.LOST): ContainerState.EXITED,
    (ContainerState.CREATED, ContainerEvent.REMOVE): None,
    (ContainerState.EXITED, ContainerEvent.REMOVE): None,
}

S = TypeVar("S", PodState, ContainerState)
E = TypeVar("E", PodEvent, ContainerEvent)


class IllegalTransition(FailedPrecondition):
    """The thing is in a state in which this cannot happen to it."""


def pod_after(state: PodState | None, event: PodEvent, pod_id: str) -> PodState | None:
    """The pod's state after the event. Raises IllegalTransition, or NotFound where there is no such pod."""
    return _after(POD, state, event, f"pod {pod_id}")


def container_after(state: ContainerState | None, event: ContainerEvent, container_id: str) -> ContainerState | None:
    """The container's state after the event. Raises IllegalTransition, or NotFound where there is no such container."""
    return _after(CONTAINER, state, event, f"container {container_id}")


def _after(table: Mapping[tuple[S | None, E], S | None], state: S | None, event: E, what: str) -> S | None:
    if (state, event) in table:
        return table[state, event]
    if state is None:
        raise NotFound(f"{event.value} {what}", cause="there is none with that ID")
    allowed = sorted({known.name for known, kind in table if kind is event and known is not None})
    cause = f"it is {state.name}" + (f", not {' or '.join(allowed)}" if allowed else "")
    raise IllegalTransition(f"{event.value} {what}", cause=cause)


def picture() -> str:
    """Both tables as one mermaid text."""
    lines = ["stateDiagram-v2"]
    for title, table in (("Pod", _edges(POD)), ("Container", _edges(CONTAINER))):
        lines.append(f"    state {title} {{")
        for source, target, events in table:
            lines.append(f"        {source} --> {target}: {', '.join(events)}")
        lines.append("    }")
    return "\n".join(lines) + "\n"


def _edges(table: Mapping[tuple[S | None, E], S | None]) -> list[tuple[str, str, list[str]]]:
    edges: dict[tuple[str, str], list[str]] = {}
    for (source, event), target in table.items():
        edge = (source.name if source is not None else "[*]", target.name if target is not None else "[*]")
        edges.setdefault(edge, []).append(event.name.lower().replace("_", " "))
    return [(source, target, events) for (source, target), events in edges.items()]
