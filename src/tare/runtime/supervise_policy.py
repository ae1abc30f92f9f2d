"""When a container that has ended is started again, outside Kubernetes: Docker's rules, as values. Pure.

    no                  never
    on-failure[:N]      where its exit code is not 0, at most N times in a row
    always              whenever it ends; where somebody stopped it, when the next daemon starts
    unless-stopped      as always, but one that somebody stopped stays so

The first wait is 100 ms, each further one twice as long, a minute at most; a run of ten seconds or more sets it back.
What is kept of a container (`Supervised`) is in state.db, and holds across daemons and reboots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from tare.errors import InvalidArgument
from tare.runtime.records import ContainerConfig, ContainerRecord, PodConfig, PodRecord

RUN_NAMESPACE = "tare"
RUN_ANNOTATION = "tare/run"  # what `tare run` marks its pods with
KUBELET_LABEL = "io.kubernetes.pod.uid"  # what a kubelet marks its pods with (pkg/kubelet/types/labels.go)
RESTART_ANNOTATION = "tare/restart"
FIRST_DELAY, LAST_DELAY, HEALTHY_RUN = 0.1, 60.0, 10.0  # seconds


class Kind(Enum):
    """The policies."""

    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"
    UNLESS_STOPPED = "unless-stopped"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy; `most` restarts in a row, 0 for any number (on-failure alone)."""

    kind: Kind
    most: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.most}" if self.most else self.kind.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Revival:
    """What a pod is made of anew that a reboot has ended: kept from before the old one is removed until the new one runs."""

    pod: PodConfig
    handler: str
    container: ContainerConfig
    image_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """A pod of `tare run` and the container that is its now. `restarts` counts those in a row; `delay`, seconds, is the last wait.

    `stopped`: somebody has stopped it. `health` is "", "starting", "healthy" or "unhealthy", `streak` how many probes have failed in a row.
    """

    container_id: str
    policy: str = "no"
    restarts: int = 0
    delay: float = 0.0
    stopped: bool = False
    health: str = ""
    streak: int = 0
    revival: Revival | None = None


def parse(text: str) -> Policy:
    """A policy as `--restart` has it. Raises InvalidArgument."""
    name, mark, count = text.partition(":")
    try:
        kind = Kind(name or "no")
    except ValueError:
        known = ", ".join(kind.value for kind in Kind)
        raise InvalidArgument(f"restart policy {text!r}", cause=f"there are {known} and on-failure:N") from None
    if not mark:
        return Policy(kind)
    if kind is not Kind.ON_FAILURE or not count.isascii() or not count.isdigit():
        raise InvalidArgument(f"restart policy {text!r}", cause="on-failure alone takes a number, as on-failure:5")
    return Policy(kind, int(count))


def ours(pod: PodConfig) -> bool:
    """Whether `tare run` made the pod; a kubelet's is never restarted here, whatever it is annotated with."""
    return (
        pod.metadata.namespace == RUN_NAMESPACE
        and RUN_ANNOTATION in pod.annotations
        and KUBELET_LABEL not in pod.labels
    )


def policy_of(config: ContainerConfig) -> Policy:
    """A container's. One that is no policy (it can only come from a client that is not `tare`) is none."""
    try:
        return parse(config.annotations.get(RESTART_ANNOTATION, "no"))
    except InvalidArgument:
        return Policy(Kind.NO)


def started(row: Supervised | None, record: ContainerRecord) -> Supervised:
    """What is kept of a container that has come to run."""
    policy = str(policy_of(record.config))
    if row is None:
        return Supervised(container_id=record.id, policy=policy)
    return replace(row, container_id=record.id, policy=policy, stopped=False, health="", streak=0, revival=None)


def wants_start(row: Supervised, exit_code: int, *, new_daemon: bool) -> bool:
    """Whether a container that does not run is to be started (again)."""
    policy = parse(row.policy)
    if policy.kind is Kind.ALWAYS:
        return new_daemon or not row.stopped
    if row.stopped or policy.kind is Kind.NO:
        return False
    if policy.kind is Kind.ON_FAILURE:
        return exit_code != 0 and not (policy.most and row.restarts >= policy.most)
    return True


def next_wait(row: Supervised, seconds: float) -> Supervised:
    """The row for one more restart, after a run of so many seconds; its `delay` is to be waited for."""
    if seconds >= HEALTHY_RUN or not row.delay:
        return replace(row, delay=FIRST_DELAY, restarts=row.restarts + 1)
    return replace(row, delay=min(row.delay * 2, LAST_DELAY), restarts=row.restarts + 1)


def lasted(record: ContainerRecord) -> float:
    """How many seconds a container ran."""
    return max(0.0, (record.finished_at - record.started_at) / 1e9) if record.started_at else 0.0


def log_name(attempt: int) -> str:
    """The log file of an attempt, in the pod's log directory."""
    return f"{attempt}.log"


def revival_of(pod: PodRecord, container: ContainerConfig, image_id: str) -> Revival:
    """The pod as it was asked for, with the container's next attempt."""
    return Revival(pod=pod.config, handler=pod.handler, container=container, image_id=image_id)
