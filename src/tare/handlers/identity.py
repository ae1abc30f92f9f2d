"""The `process` of an OCI runtime specification as launch steps: who it is, what it may do and use, and what it executes. Pure.

    ready          before the gate: keyring, scheduling, labels. They take privileges, and what they fail of is heard while it is made
    credentials    after the gate: limits, capabilities, filter, hooks

What the credentials are going to leave out is foreseen, as warnings, before the gate. Without no_new_privs a filter takes CAP_SYS_ADMIN,
so it is loaded before that goes; with it the filter comes last. An exec has its credentials before it appears in the container
(`parted_credentials`). Hooks that run in the container come after all that: the program may be the image's, and must not be more than
the container's process.

Source: OCI runtime specification 1.2, config.md, "Process".
"""

from __future__ import annotations

from tare.errors import InvalidArgument
from tare.handlers import attributes, early, labels
from tare.handlers.capabilities import mask, names
from tare.handlers.options import encoded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.handlers.plans import Filter
    from tare.launch.plan import Step

    Spec = Mapping[str, Any]

UMASK = 0o022
SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
LIMITS = (
    *("RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CORE", "RLIMIT_RSS", "RLIMIT_NPROC"),
    *("RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_AS", "RLIMIT_LOCKS", "RLIMIT_SIGPENDING", "RLIMIT_MSGQUEUE"),
    *("RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_RTTIME"),
)
"""As the kernel numbers them."""
UNLIMITED = (1 << 64) - 1
SIGN = 1 << 63


def ready(process: Spec, personality: Spec | None) -> list[Step]:
    """The last before the gate, with all privileges. `personality` is the container's."""
    return [
        *labels.keys(process),
        ("keyring", "make a session keyring"),
        *attributes.of(process, personality),
        *labels.orders(process),
    ]


def ready_to_fork(process: Spec, personality: Spec | None) -> list[Step]:
    """The same for a process that makes another, which inherits all this, but not everybody's scheduling."""
    return [
        *labels.keys(process),
        ("keyring", "make a session keyring"),
        *attributes.inherited(process, personality),
        *labels.orders(process),
        *labels.done(process),
    ]


def credentials(
    process: Spec, seccomp: Filter | None, hooks: Sequence[Step] = (), listener: int | None = None
) -> list[Step]:
    """Who the process is and what it may do. `hooks` are those that run in it; `listener` is the list that the helper is to be asked for
    where the filter has a listener."""
    operation = "seccomp_last" if process.get("noNewPrivileges") else "seccomp"
    return [*set_limits(process), *become(process, filter_steps(operation, seccomp, listener)), *hooks]


def parted_credentials(
    process: Spec, seccomp: Filter | None, listener: int | None = None
) -> tuple[list[Step], list[Step]]:
    """The same in two parts: before another process is made that goes on, and after its gate. The first takes all that has privileges.

    A filter is in the first if it lets the rest be done. If it does not, one that comes last anyhow is in the second; and without
    no_new_privs all is in the second, since the filter comes before the capabilities go. Limits are in the second, of which some are for
    the making of processes; there is room for them by then (`room_for_limits`).
    """
    confined = bool(process.get("noNewPrivileges"))
    if seccomp is None:
        return become(process, []), set_limits(process)
    if is_early(process, seccomp):
        loaded = filter_steps("seccomp", seccomp, listener, "seccomp_listener_for_heir")
        return become(process, loaded), set_limits(process)
    if confined:
        return become(process, []), [*set_limits(process), *filter_steps("seccomp_last", seccomp, listener)]
    return exposed(process), credentials(process, seccomp, (), listener)


def is_early(process: Spec, seccomp: Filter | None) -> bool:
    """Whether there is a filter that lets the rest be done (`parted_credentials`)."""
    return seccomp is not None and early.lets_through(seccomp.program, bool(process.get("noNewPrivileges")))


def exposed(process: Spec) -> list[Step]:
    """The warning that a filter leaves a process open to who may trace, for a container that may."""
    if not capability_sets(process)[0]["permitted"] & mask(["CAP_SYS_PTRACE"])[0]:
        return []
    words = (
        "the seccomp filter, without no_new_privs, forbids to give capabilities up early: CAP_SYS_PTRACE gets at them"
    )
    return [("warn", "set capabilities", encoded(words))]


def set_limits(process: Spec) -> list[Step]:
    """`process.rlimits`."""
    return [("rlimit", f"set {name}", kind, signed(soft), signed(hard)) for name, kind, soft, hard in limits(process)]


def room_for_limits(process: Spec) -> list[Step]:
    """For hard limits, while this process may raise them."""
    return [
        ("raise_rlimit", f"set {name}", encoded(name), kind, signed(hard)) for name, kind, _, hard in limits(process)
    ]


def become(process: Spec, filter_steps: Sequence[Step]) -> list[Step]:
    """Umask, user and capabilities, and a filter where it belongs among them."""
    user = process["user"]
    uid, gid = user["uid"], user["gid"]
    caps, _ = capability_sets(process)
    sets = (caps["effective"], caps["permitted"], caps["inheritable"], caps["ambient"])
    confined = bool(process.get("noNewPrivileges"))
    return [
        ("umask", "set umask", user.get("umask", UMASK)),
        ("bounding", "drop capabilities", caps["bounding"]),
        *(() if confined else filter_steps),
        ("identity", f"become user {uid}:{gid}", uid, gid, tuple(user.get("additionalGids") or ())),
        ("capabilities", "set capabilities", *sets),
        *((("no_new_privileges", "set no_new_privs"), *filter_steps) if confined else ()),
    ]


def filter_steps(
    operation: str, seccomp: Filter | None, listener: int | None, listening: str = "seccomp_listener"
) -> list[Step]:
    """Load a filter, if there is one: where it has a listener, here and now, since that has to be handed over."""
    if seccomp is None:
        return []
    label = "load the seccomp filter"
    if listener is not None:
        return [(listening, label, seccomp.program, seccomp.flags, listener)]
    return [(operation, label, seccomp.program, seccomp.flags)]


def foresee(process: Spec) -> list[Step]:
    """Warnings of what the credentials are going to leave out, said while there is somebody to hear them."""
    steps: list[Step] = [
        ("foresee_rlimit", f"set {name}", encoded(name), kind, signed(hard)) for name, kind, _, hard in limits(process)
    ]
    caps, warnings = capability_sets(process)
    steps += [("warn", "set capabilities", encoded(warning)) for warning in warnings]
    steps.append(("foresee_capabilities", "set capabilities", caps["permitted"]))
    return steps


def capability_sets(process: Spec) -> tuple[dict[str, int], list[str]]:
    """Masks by name, as the kernel grants them, and warnings of what it does not: that is no failure, says the specification.

    Effective ones must be permitted, inheritable ones in the bounding set, ambient ones permitted and inheritable (capabilities(7)).
    """
    given = process.get("capabilities") or {}
    found: dict[str, int] = {}
    warnings: list[str] = []
    for kind in SETS:
        found[kind], unknown = mask(given.get(kind) or ())
        warnings += [f"{name} of the {kind} set is unknown, and not granted" for name in unknown]
    for kind, needed in (
        ("effective", ("permitted",)),
        ("inheritable", ("bounding",)),
        ("ambient", ("permitted", "inheritable")),
    ):
        allowed = found[kind]
        for other in needed:
            allowed &= found[other]
        refused = found[kind] & ~allowed
        if refused:
            warnings.append(f"{', '.join(names(refused))} cannot be {kind}: not {' and '.join(needed)}")
        found[kind] = allowed
    return found, warnings


def limits(process: Spec) -> list[tuple[str, int, int, int]]:
    """(name, number, soft, hard) of each of `process.rlimits`. Raises InvalidArgument with the JSON path."""
    found: dict[str, tuple[str, int, int, int]] = {}
    for index, item in enumerate(process.get("rlimits") or ()):
        path = f"process.rlimits[{index}]"
        name, soft, hard = item.get("type"), item.get("soft"), item.get("hard")
        if name not in LIMITS:
            raise InvalidArgument(f"read {path}.type", cause=f"{name!r} is unknown")
        if name in found:
            raise InvalidArgument(f"read {path}.type", cause=f"{name} is there twice")
        for key, value in (("soft", soft), ("hard", hard)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= UNLIMITED:
                raise InvalidArgument(f"read {path}.{key}", cause=f"{value!r} is not a whole number of 64 bits")
        if soft > hard:
            raise InvalidArgument(f"read {path}.soft", cause=f"{soft} is over the hard limit of {hard}")
        found[name] = (name, LIMITS.index(name), soft, hard)
    return list(found.values())


def signed(limit: int) -> int:
    """An rlimit as setrlimit takes it, a signed number of 64 bits: −1, the largest unsigned one, is no limit."""
    return limit - (SIGN << 1) if limit >= SIGN else limit


def program(process: Spec) -> dict[str, list[bytes]]:
    """argv, environment, and where argv[0] is looked for: along the container's own PATH unless it has a slash."""
    argv = [encoded(word) for word in process.get("args") or ()]
    environment = [encoded(entry) for entry in process.get("env") or ()]
    if not argv:
        raise InvalidArgument("make a container", cause="process.args is empty: there is nothing to run")
    path = next((entry[5:] for entry in reversed(environment) if entry.startswith(b"PATH=")), b"")
    if b"/" in argv[0] or not argv[0]:
        candidates = [argv[0]]
    else:
        folders = (
            path.split(b":")
            if path
            else [b"/usr/local/sbin", b"/usr/local/bin", b"/usr/sbin", b"/usr/bin", b"/sbin", b"/bin"]
        )
        candidates = [(folder or b".") + b"/" + argv[0] for folder in folders]
    return {"argv": argv, "env": environment, "paths": candidates}
