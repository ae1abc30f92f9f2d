"""Restart policies and health: Docker's rules, as values."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from tare.cli import health as options
from tare.cli import request, restart
from tare.errors import InvalidArgument, NotFound, Unavailable
from tare.runtime import health
from tare.runtime import supervise_policy as policy
from tare.runtime.health import HEALTHY, SECOND, STARTING, UNHEALTHY, Check, Monitor, assess
from tare.runtime.supervise_policy import Kind, Policy, Supervised


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", Policy(Kind.NO)),
        ("no", Policy(Kind.NO)),
        ("always", Policy(Kind.ALWAYS)),
        ("unless-stopped", Policy(Kind.UNLESS_STOPPED)),
        ("on-failure", Policy(Kind.ON_FAILURE)),
        ("on-failure:5", Policy(Kind.ON_FAILURE, 5)),
    ],
)
def test_policies_are_read(text: str, wanted: Policy) -> None:
    assert policy.parse(text) == wanted
    assert policy.parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text", ["sometimes", "always:3", "on-failure:", "on-failure:-1", "on-failure:x", "on-failure:²"]
)
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        policy.parse(text)


@pytest.mark.parametrize(
    "name, code, stopped, new_daemon, wanted",
    [
        ("no", 1, False, False, False),
        ("no", 1, False, True, False),
        ("always", 0, False, False, True),
        ("always", 0, True, False, False),
        ("always", 0, True, True, True),
        ("unless-stopped", 0, False, False, True),
        ("unless-stopped", 1, True, False, False),
        ("unless-stopped", 1, True, True, False),
        ("unless-stopped", 1, False, True, True),
        ("on-failure", 0, False, False, False),
        ("on-failure", 1, False, False, True),
        ("on-failure", 255, False, True, True),
        ("on-failure", 1, True, True, False),
    ],
)
def test_what_is_started_again(name: str, code: int, stopped: bool, new_daemon: bool, wanted: bool) -> None:
    row = Supervised(container_id="c", policy=name, stopped=stopped)
    assert policy.wants_start(row, code, new_daemon=new_daemon) is wanted


def test_on_failure_so_often() -> None:
    row = Supervised(container_id="c", policy="on-failure:2")
    for _ in range(2):
        assert policy.wants_start(row, 1, new_daemon=False)
        row = policy.next_wait(row, 0.0)
    assert not policy.wants_start(row, 1, new_daemon=False)


def test_waits_double_up_to_a_minute_and_a_good_run_sets_them_back() -> None:
    row, waits = Supervised(container_id="c", policy="always"), []
    for _ in range(12):
        row = policy.next_wait(row, 9.9)
        waits.append(row.delay)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0, 60.0])
    assert policy.next_wait(row, 10.0).delay == 0.1


def test_the_command_line_and_the_daemon_mean_the_same() -> None:
    """They share no module, so that a command starts quickly."""
    assert (options.RESTART_ANNOTATION, options.HEALTH_ANNOTATION) == (policy.RESTART_ANNOTATION, health.ANNOTATION)
    assert (request.NAMESPACE, request.RUN_ANNOTATION) == (policy.RUN_NAMESPACE, policy.RUN_ANNOTATION)
    assert restart.KUBELET_LABEL == policy.KUBELET_LABEL


def given(**some: object) -> dict[str, object]:
    """Options as click gives them."""
    usual = dict.fromkeys(options.SUPERVISION, "") | {"restart": "no", "health_retries": 0, "no_healthcheck": False}
    return usual | some


def test_options_come_to_annotations() -> None:
    assert options.supervision_of(given()) == {}
    found = options.supervision_of(
        given(restart="on-failure:3", health_cmd="true", health_interval="1m30s", health_timeout="500ms")
    )
    assert found[policy.RESTART_ANNOTATION] == "on-failure:3"
    check = health.decode(found[health.ANNOTATION])
    assert check == Check(test=("CMD-SHELL", "true"), interval=90 * SECOND, timeout=SECOND // 2)
    off = options.supervision_of(given(no_healthcheck=True))
    assert health.decode(off[health.ANNOTATION]).command == ()
    for wrong in (
        {"restart": "never"},
        {"no_healthcheck": True, "health_cmd": "true"},
        {"health_interval": "soon"},
        {"health_timeout": "1us"},
    ):
        with pytest.raises(InvalidArgument):
            options.supervision_of(given(**wrong))


@pytest.mark.parametrize(
    "text, wanted",
    [("30s", 30.0), ("1m30s", 90.0), ("2h", 7200.0), ("500ms", 0.5), ("0.25s", 0.25), ("0", 0), ("1h1m1s", 3661)],
)
def test_times(text: str, wanted: float) -> None:
    assert options.duration(text, "it") == wanted * SECOND


def test_what_an_image_says_and_what_counts() -> None:
    document = {"config": {"Healthcheck": {"Test": ["CMD", "probe", "-q"], "Interval": 5 * SECOND, "Retries": 7}}}
    image = health.of_image(document)
    assert image == Check(test=("CMD", "probe", "-q"), interval=5 * SECOND, retries=7)
    merged = health.merged(Check(interval=SECOND), image)
    assert (merged.command, merged.interval, merged.retries, merged.timeout) == (
        ("probe", "-q"),
        SECOND,
        7,
        30 * SECOND,
    )
    for amiss in (
        {},
        {"config": None},
        {"config": {"Healthcheck": "x"}},
        {"config": {"Healthcheck": {"Test": "x", "Interval": "y"}}},
    ):
        assert health.of_image(amiss) == Check()
    assert health.merged(Check(test=("NONE",)), image).command == ()
    assert health.decode(health.encode(merged)) == merged
    for wrong in ("[]", '{"what": 1}', "no json"):
        with pytest.raises(ValueError):
            health.decode(wrong)


def test_what_probes_come_to() -> None:
    assert assess(STARTING, 0, True, starting=True, retries=1) == (STARTING, 0)
    assert assess(STARTING, 0, True, starting=False, retries=2) == (STARTING, 1)
    assert assess(STARTING, 1, True, starting=False, retries=2) == (UNHEALTHY, 2)
    assert assess(HEALTHY, 0, True, starting=True, retries=1) == (UNHEALTHY, 1)  # once well, failures count
    assert assess(UNHEALTHY, 9, False, starting=False, retries=2) == (HEALTHY, 0)


def test_a_monitor_ends_with_its_container_and_bears_with_ours() -> None:
    """A launcher that was lost over a probe is a failed probe; a container that is no more is the end."""
    answers: list[object] = [Unavailable("exec"), (1, b"x" * 9000), (0, b"well"), NotFound("exec")]
    told: list[tuple[str, int]] = []

    async def run(command: tuple[str, ...], timeout: float) -> tuple[int, bytes]:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, tuple)
        return answer

    check = health.merged(Check(test=("CMD", "probe"), interval=1000, retries=2))
    monitor = Monitor(replace(check, start_period=0), run, lambda status, streak: told.append((status, streak)))
    asyncio.run(asyncio.wait_for(monitor.watch(), 20))
    assert told == [(STARTING, 0), (STARTING, 1), (UNHEALTHY, 2), (HEALTHY, 0)]
    assert [probe.exit_code for probe in monitor.probes] == [126, 1, 0]
    assert len(monitor.probes[1].output) == health.OUTPUT
    assert json.dumps(monitor.probes[2].output) == '"well"'
