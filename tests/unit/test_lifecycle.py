"""The state tables, and that the picture in the documentation is the tables'."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, NotFound
from tare.runtime.lifecycle import (
    CONTAINER,
    POD,
    ContainerEvent,
    IllegalTransition,
    PodEvent,
    container_after,
    picture,
    pod_after,
)
from tare.runtime.records import ContainerState, PodState

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_a_container_lives_once() -> None:
    state = container_after(None, ContainerEvent.CREATE, "c")
    assert state is ContainerState.CREATED
    state = container_after(state, ContainerEvent.START, "c")
    assert state is ContainerState.RUNNING
    state = container_after(state, ContainerEvent.EXIT, "c")
    assert state is ContainerState.EXITED
    with pytest.raises(IllegalTransition, match="start container c: it is EXITED, not CREATED"):
        container_after(state, ContainerEvent.START, "c")
    assert container_after(state, ContainerEvent.REMOVE, "c") is None


def test_a_running_container_is_not_removed_before_it_ended() -> None:
    with pytest.raises(FailedPrecondition, match="remove container c: it is RUNNING, not CREATED or EXITED"):
        container_after(ContainerState.RUNNING, ContainerEvent.REMOVE, "c")


def test_a_pod_is_stopped_as_often_as_one_likes() -> None:
    state = pod_after(None, PodEvent.RUN, "p")
    for _ in range(3):
        state = pod_after(state, PodEvent.STOP, "p")
        assert state is PodState.NOTREADY
    with pytest.raises(IllegalTransition, match="create a container in pod p: it is NOTREADY, not READY"):
        pod_after(state, PodEvent.CREATE, "p")
    assert pod_after(state, PodEvent.REMOVE, "p") is None


def test_what_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFound):
        pod_after(None, PodEvent.STOP, "p")
    with pytest.raises(NotFound):
        container_after(None, ContainerEvent.EXEC, "c")


def test_every_event_is_in_its_table() -> None:
    assert {event for _, event in POD} == set(PodEvent)
    assert {event for _, event in CONTAINER} == set(ContainerEvent)


def test_the_documentation_shows_the_tables() -> None:
    assert picture() in ARCHITECTURE.read_text()
