"""The `process` of an OCI runtime specification as launch steps: who it is, what it may do and use, and what it executes. Pure.

These come after the gate; what they are going to leave out is foreseen, as warnings, before it.
Source: OCI runtime specification 1.2, config.md, "Process".
"""

from __future__ import annotations

import resource

from tare.errors import InvalidArgument
from tare.handlers.capabilities import mask
from tare.handlers.options import encoded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tare.handlers.plans import Filter
    from tare.launch.plan import Step

    Spec = Mapping[str, Any]


def credentials(process: Spec, seccomp: Filter | None) -> list[Step]:
    """Who the process is and what it may do. Without no_new_privs a filter takes CAP_SYS_ADMIN, so it is loaded before that goes."""
    user = process["user"]
    uid, gid = user["uid"], user["gid"]
    caps = {kind: mask(names) for kind, names in (process.get("capabilities") or {}).items()}
    steps: list[Step] = [
        ("rlimit", f"set {item['type']}", rlimit_number(item["type"]), signed(item["soft"]), signed(item["hard"]))
        for item in process.get("rlimits") or ()
    ]
    steps.append(("umask", "set umask", user.get("umask", 0o022)))
    steps.append(("bounding", "drop capabilities", caps.get("bounding", 0)))
    early = seccomp is not None and not process.get("noNewPrivileges")
    if early and seccomp is not None:
        steps.append(("seccomp", "load the seccomp filter", seccomp.program, seccomp.flags))
    steps.append(("identity", f"become user {uid}:{gid}", uid, gid, tuple(user.get("additionalGids") or ())))
    sets = (caps.get("effective", 0), caps.get("permitted", 0), caps.get("inheritable", 0), caps.get("ambient", 0))
    steps.append(("capabilities", "set capabilities", *sets))
    if process.get("noNewPrivileges"):
        steps.append(("no_new_privileges", "set no_new_privs"))
    if seccomp is not None and not early:
        steps.append(("seccomp_last", "load the seccomp filter", seccomp.program, seccomp.flags))
    return steps


def foresee(process: Spec) -> list[Step]:
    """Warnings of what the credentials are going to leave out, said while there is somebody to hear them."""
    steps: list[Step] = [
        (
            "foresee_rlimit",
            f"set {item['type']}",
            encoded(item["type"]),
            rlimit_number(item["type"]),
            signed(item["hard"]),
        )
        for item in process.get("rlimits") or ()
    ]
    permitted = mask((process.get("capabilities") or {}).get("permitted", ()))
    steps.append(("foresee_capabilities", "set capabilities", permitted))
    return steps


def rlimit_number(name: str) -> int:
    """RLIMIT_ by its name. Raises InvalidArgument."""
    number = getattr(resource, name, None) if name.startswith("RLIMIT_") else None
    if not isinstance(number, int):
        raise InvalidArgument("set resource limits", cause=f"unknown limit {name}")
    return number


def signed(limit: int) -> int:
    """An rlimit as setrlimit takes it: the largest unsigned number is no limit."""
    return -1 if limit >= (1 << 64) - 1 else limit


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
