"""The `hooks` of an OCI configuration: what is run at which point of a container's life, and the state that it is told. Pure.

    create   prestart, createRuntime   by a helper in the node's namespaces, when all is mounted and the root is not exchanged yet
             createContainer           by the container's process, then: the node's tree is still its root
    start    startContainer            by the container's process, as the last but execve (and a filter that comes last)
             poststart                 in the node's namespaces, once the program runs
    delete   poststop                  in the node's namespaces, once nothing is left

A hook that fails before the program runs fails what was asked for; after a poststart hook that fails the container is stopped; a poststop
hook that fails is a warning. Source: OCI runtime specification 1.2, config.md, "POSIX-platform Hooks", runtime.md, "State" and "Lifecycle".
"""

from __future__ import annotations

from tare.errors import InvalidArgument
from tare.handlers import attributes
from tare.handlers.options import encoded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.handlers.plans import Filter, Place
    from tare.launch.plan import Step

    Spec = Mapping[str, Any]

BEFORE_THE_PROGRAM = ("prestart", "createRuntime", "createContainer", "startContainer")
POINTS = (*BEFORE_THE_PROGRAM, "poststart", "poststop")
OCI_VERSION = "1.2.0"
LONGEST_TIMEOUT = 1 << 31
PID = 2_147_483_646  # stands for the PID in a rendered state, where it is not known yet; no process has it


class Hook:
    """One program. `env` is None where the configuration has none: then it is the environment of who runs it."""

    __slots__ = ("args", "env", "path", "point", "timeout")

    def __init__(
        self, *, point: str, path: str, args: tuple[str, ...], env: tuple[str, ...] | None, timeout: int
    ) -> None:
        self.point = point
        self.path = path
        self.args = args
        self.env = env
        self.timeout = timeout

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.point} hook {self.path}"


def parse(spec: Spec) -> dict[str, list[Hook]]:
    """All points with their hooks, in order. Raises InvalidArgument with the JSON path that is wrong."""
    given = spec.get("hooks")
    found: dict[str, list[Hook]] = {point: [] for point in POINTS}
    if given is None:
        return found
    if not isinstance(given, dict):
        raise wrong("hooks", "is not an object")
    for point in POINTS:
        entries = given.get(point)
        if entries is not None and not isinstance(entries, list | tuple):
            raise wrong(f"hooks.{point}", "is not a list")
        found[point] = [hook(point, f"hooks.{point}[{index}]", entry) for index, entry in enumerate(entries or ())]
    return found


def hook(point: str, path: str, given: object) -> Hook:
    """One entry."""
    if not isinstance(given, dict):
        raise wrong(path, "is not an object")
    program = given.get("path")
    if not isinstance(program, str) or not program.startswith("/") or "\0" in program:
        raise wrong(f"{path}.path", f"{program!r} is not an absolute path")
    timeout = given.get("timeout")
    if timeout is not None and (
        not isinstance(timeout, int) or isinstance(timeout, bool) or not 0 < timeout < LONGEST_TIMEOUT
    ):
        raise wrong(f"{path}.timeout", f"{timeout!r} is not a whole number of seconds greater than zero")
    env = None if given.get("env") is None else words(f"{path}.env", given["env"])
    args = words(f"{path}.args", given.get("args") or [])
    return Hook(point=point, path=program, args=args or (program,), env=env, timeout=timeout or 0)


def seconds(spec: Spec, *points: str) -> int:
    """How long the hooks of these points may take that have a time of their own, all together."""
    found = parse(spec)
    return sum(hook.timeout for point in points for hook in found[point])


def words(path: str, given: object) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(given, list | tuple) or not all(isinstance(word, str) and "\0" not in word for word in given):
        raise wrong(path, "is not a list of strings without NUL bytes")
    return tuple(given)


def wrong(path: str, cause: str) -> InvalidArgument:
    """An error about one member."""
    return InvalidArgument(f"read {path}", cause=cause)


def state(spec: Spec, container_id: str, bundle: str, status: str, pid: int = 0) -> dict[str, Any]:
    """A container's state, as the specification has it. Without a PID there is no process (any more)."""
    found: dict[str, Any] = {"ociVersion": OCI_VERSION, "id": container_id, "status": status}
    if pid:
        found["pid"] = pid
    found["bundle"] = bundle
    if spec.get("annotations"):
        found["annotations"] = dict(spec["annotations"])
    return found


def process_state(container: Mapping[str, Any], pid: int, metadata: str) -> dict[str, Any]:
    """What a seccomp agent is told of a process that it is given the listener of; `container` is its container's state."""
    found = {"ociVersion": OCI_VERSION, "fds": ["seccompFd"], "pid": pid}
    if metadata:
        found["metadata"] = metadata
    return found | {"state": container}


def rendered(value: Mapping[str, Any]) -> bytes:
    """As JSON."""
    import json  # not for who has no hooks

    return json.dumps(value, separators=(",", ":")).encode()


def parts(value: Mapping[str, Any]) -> tuple[bytes, ...]:
    """As JSON, parted wherever `PID` is the value of a member "pid": the launcher joins the parts with the PID.

    Text in a configuration cannot look like that: in JSON its quotes have backslashes before them.
    """
    mark = b'"pid":'
    pieces = rendered(value).split(mark + b"%d" % PID)
    return (*(piece + mark for piece in pieces[:-1]), pieces[-1])


def creating(spec: Spec, place: Place, lists: list[list[Step]]) -> list[Step]:
    """Launch steps of prestart, createRuntime and createContainer hooks; the helper's list of steps, if there is one, is added to `lists`."""
    found = parse(spec)
    told = state(spec, place.id, place.bundle, "creating", PID)
    runtime = steps("hook", [*found["prestart"], *found["createRuntime"]], told, None, encoded(place.bundle))
    return [*ask(lists, "run hooks outside", runtime), *steps("hook", found["createContainer"], told)]


def starting(spec: Spec, place: Place) -> list[Step]:
    """Launch steps of startContainer hooks; those without an environment have the container's. Raises InvalidArgument."""
    process, found = spec["process"], parse(spec)["startContainer"]
    if found and not attributes.forks(process):
        cause = "SCHED_DEADLINE without SCHED_FLAG_RESET_ON_FORK lets no startContainer hook be forked (sched(7))"
        raise InvalidArgument("read process.scheduler.policy", cause=cause)
    told = state(spec, place.id, place.bundle, "created", PID)
    return steps("confined_hook", found, told, process.get("env") or ())


def listening(
    seccomp: Filter | None, container: Mapping[str, Any], pid: int, lists: list[list[Step]], *, heir: bool = False
) -> int | None:
    """The number of the helper's list that hands a filter's listener over, which is added to `lists`; None where there is none.

    `container` is the container's state; `PID` stands in it and for `pid` for the process that loads the filter, or with `heir` for that
    which it makes.
    """
    if seccomp is None or not seccomp.listener:
        return None
    told = parts(process_state(container, pid, seccomp.metadata))
    label = f"hand the seccomp listener to {seccomp.listener}"
    lists.append([("heirs_listener" if heir else "listener", label, encoded(seccomp.listener), told)])
    return len(lists) - 1


def ask(lists: list[list[Step]], label: str, wanted: list[Step]) -> list[Step]:
    """The step that has the helper outside do these, which become the last of its lists; none where there are none."""
    if not wanted:
        return []
    lists.append(wanted)
    return [("outside", label, len(lists) - 1)]


def steps(
    operation: str,
    hooks: Sequence[Hook],
    told: Mapping[str, Any],
    environment: Sequence[str] | None = None,
    *more: object,
) -> list[Step]:
    """Launch steps that run these hooks; `environment` is for those that have none. What follows the state is the operation's own."""
    if not hooks:
        return []
    pieces = parts(told)
    made: list[Step] = []
    for item in hooks:
        env = item.env if item.env is not None else environment
        lines = None if env is None else tuple(encoded(line) for line in env)
        args = tuple(encoded(word) for word in item.args)
        made.append((operation, item.label, encoded(item.path), args, lines, item.timeout, pieces, *more))
    return made
