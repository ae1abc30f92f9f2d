"""Whatever happens in whatever order, the state tables keep their promises."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tare.errors import TareError
from tare.runtime.lifecycle import ContainerEvent, PodEvent, container_after, pod_after
from tare.runtime.records import ContainerState, PodState


@given(st.lists(st.sampled_from(ContainerEvent)))
def test_containers_go_forward_only(events: list[ContainerEvent]) -> None:
    order: dict[ContainerState | None, int] = {
        ContainerState.CREATED: 0,
        ContainerState.RUNNING: 1,
        ContainerState.EXITED: 2,
        None: 3,
    }
    state: ContainerState | None = ContainerState.CREATED
    for event in events:
        before = state
        try:
            state = container_after(state, event, "c")
        except TareError:
            continue
        if before is None:
            assert event is ContainerEvent.CREATE and state is ContainerState.CREATED
        else:
            assert order[state] >= order[before]


@given(st.lists(st.sampled_from(ContainerEvent)))
def test_nothing_is_refused_twice_differently(events: list[ContainerEvent]) -> None:
    """A refusal changes nothing: the same event is refused again."""
    state: ContainerState | None = None
    for event in events:
        try:
            state = container_after(state, event, "c")
        except TareError as first:
            try:
                container_after(state, event, "c")
            except TareError as second:
                assert str(first) == str(second)
            else:
                raise AssertionError("accepted at the second try") from first


@given(st.sampled_from(ContainerState), st.sampled_from(ContainerEvent))
def test_only_a_running_container_is_entered_or_ends(state: ContainerState, event: ContainerEvent) -> None:
    try:
        container_after(state, event, "c")
    except TareError:
        return
    if event in (ContainerEvent.EXEC, ContainerEvent.REOPEN_LOG, ContainerEvent.EXIT, ContainerEvent.LOST):
        assert state is ContainerState.RUNNING


@given(st.lists(st.sampled_from(PodEvent)))
def test_a_pod_is_never_ready_again(events: list[PodEvent]) -> None:
    state: PodState | None = PodState.READY
    was_down = False
    for event in events:
        try:
            state = pod_after(state, event, "p")
        except TareError:
            continue
        was_down = state is not None and (was_down or state is PodState.NOTREADY)
        assert not (was_down and state is PodState.READY)


@given(st.sampled_from(PodState))
def test_stopping_and_losing_are_possible_in_every_state(state: PodState) -> None:
    assert pod_after(state, PodEvent.STOP, "p") is PodState.NOTREADY
    assert pod_after(state, PodEvent.LOST, "p") is PodState.NOTREADY
