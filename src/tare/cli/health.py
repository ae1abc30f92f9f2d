"""Restart policies and health checks of `tare run`: their options, what they come to in a request, and how they are shown."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tare.errors import InvalidArgument

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2
    from tare.cli.client import Client

RESTART_ANNOTATION = "tare/restart"
HEALTH_ANNOTATION = "tare/health"
POLICY = re.compile(r"no|always|unless-stopped|on-failure(:[0-9]+)?")
DURATION = re.compile(r"(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m(?!s))?(?:(?P<s>\d+(?:\.\d+)?)s)?(?:(?P<ms>\d+)ms)?")
UNITS = {"h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6}
POLL_SECONDS = 0.05
LEAST = 10**6  # ns, as in Docker
TIMES = ("interval", "timeout", "start_period", "start_interval")
SUPERVISION = ("restart", "health_cmd", "health_retries", "no_healthcheck", *(f"health_{name}" for name in TIMES))
C = TypeVar("C", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--restart",
        default="no",
        show_default=True,
        metavar="no|on-failure[:N]|always|unless-stopped",
        help="When to start it again once it has ended.",
    ),
    click.option(
        "--health-cmd", default="", metavar="COMMAND", help="What a shell in it runs to see whether it is well."
    ),
    click.option(
        "--health-interval", default="", metavar="TIME", help="Between two looks: 30s, 1m30s.  [default: 30s]"
    ),
    click.option("--health-timeout", default="", metavar="TIME", help="Until a look has failed.  [default: 30s]"),
    click.option(
        "--health-retries",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Failures in a row that count.  [default: 3]",
    ),
    click.option(
        "--health-start-period", default="", metavar="TIME", help="How long failures do not count.  [default: 0s]"
    ),
    click.option(
        "--health-start-interval", default="", metavar="TIME", help="Between two looks in that time.  [default: 5s]"
    ),
    click.option("--no-healthcheck", is_flag=True, help="Do not look, whatever the image says."),
)


def supervision_options(command: C) -> C:
    """`--restart`, `--health-cmd` and those that belong to it."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def duration(text: str, what: str) -> int:
    """Nanoseconds of "1m30s", "500ms", "2h"; 0 for "" and "0". Raises InvalidArgument."""
    if text in ("", "0"):
        return 0
    match = DURATION.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{what} {text!r} is not a time", hint="write it as 30s, 1m30s or 500ms")
    found = sum(float(value) * UNITS[unit] for unit, value in match.groupdict().items() if value)
    if 0 < found < LEAST:
        raise InvalidArgument(f"{what} {text!r} is less than a millisecond")
    return int(found)


def supervision_of(given: Mapping[str, Any]) -> dict[str, str]:
    """What the container says of its supervision, from these options. Raises InvalidArgument."""
    restart, command = given["restart"], given["health_cmd"]
    if not POLICY.fullmatch(restart):
        hint = "there are no, on-failure, on-failure:N, always and unless-stopped"
        raise InvalidArgument(f"restart policy {restart!r}", hint=hint)
    check: dict[str, Any] = {
        **{name: duration(given[f"health_{name}"], f"--health-{name.replace('_', '-')}") for name in TIMES},
        "retries": given["health_retries"],
        "test": ["CMD-SHELL", command] if command else [],
    }
    said = {name: value for name, value in check.items() if value}
    if given["no_healthcheck"]:
        if said:
            raise InvalidArgument("--no-healthcheck excludes the other options on health")
        said = {"test": ["NONE"]}
    found = {RESTART_ANNOTATION: restart} if restart != "no" else {}
    return found | ({HEALTH_ANNOTATION: json.dumps(said)} if said else {})


def supervised(client: Client) -> dict[str, tare_pb2.SupervisedContainer]:
    """All that the daemon supervises, by the pod's ID."""
    from tare.api.v1 import tare_pb2

    answer = client.call(client.supervision.Supervised, tare_pb2.SupervisedRequest())
    return {item.pod_id: item for item in answer.containers}


def next_attempt(client: Client, pod_id: str, ended: str, look: Callable[[], object] = lambda: None) -> str | None:
    """The container that has come in the place of one that has `ended`, once it has; None where none will. `look` is called meanwhile."""
    while (item := supervised(client).get(pod_id)) is not None:
        if item.container_id not in ("", ended):
            return str(item.container_id)
        if item.state == "ended":
            return None
        look()
        time.sleep(POLL_SECONDS)
    return None


def shown(state: str, item: tare_pb2.SupervisedContainer | None, now: int) -> str:
    """A container's state with its health, or when it is started again (times in ns)."""
    if item is None:
        return state
    if item.state == "waiting":
        seconds = max(0, item.next_start - now) / 1e9
        return f"{state}, restart {item.restarts} in {seconds:.1f} s"
    return f"{state} ({item.health})" if item.health and item.state == "running" else state
