"""The `process` part of a container's OCI configuration: command, environment, directory, user, capabilities (pure).

Sources: OCI image-spec, config.md and conversion.md; CRI ContainerConfig; OCI runtime-spec, config.md, "Process".
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from typing import Any

from tare.errors import InvalidArgument
from tare.handlers.capabilities import CAPABILITIES
from tare.runtime.records import Capabilities, ContainerConfig, User
from tare.runtime.spec_types import ImageSettings

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UMASK = 0o022

ALL_CAPABILITIES = tuple(f"CAP_{name}" for name in CAPABILITIES)

DEFAULT_CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    )
)
"""What root in a container may do unless told otherwise: the same fourteen in Docker, containerd and Podman's Docker mode."""


def process(container: ContainerConfig, image: ImageSettings, user: User, home: str, hostname: str) -> dict[str, Any]:
    """The whole object. "stdin" is an addition to the specification: whether a client may write to the container's input."""
    security = container.security
    return {
        "terminal": container.tty,
        "stdin": container.stdin,
        "user": {"uid": user.uid, "gid": user.gid, "umask": UMASK, "additionalGids": list(user.groups)},
        "args": arguments(container.command, container.args, image.entrypoint, image.cmd),
        "env": environment(container, image, home, hostname),
        "cwd": working_directory(container.working_dir or image.working_dir),
        "capabilities": capabilities(security.capabilities, privileged=security.privileged),
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": container.resources.oom_score_adj,
    }


def arguments(command: Sequence[str], args: Sequence[str], entrypoint: Sequence[str], cmd: Sequence[str]) -> list[str]:
    """argv: `command` takes the place of the image's entrypoint and its cmd, `args` that of its cmd alone.

    Raises InvalidArgument where nothing is left to run.
    """
    if command:
        words = [*command, *args]
    elif args:
        words = [*entrypoint, *args]
    else:
        words = [*entrypoint, *cmd]
    if not words or not words[0]:
        cause = "no command: neither the request nor the image names one"
        raise InvalidArgument("choose the container's command", cause=cause, hint="give a command or args")
    for word in words:
        check_text("choose the container's command", word)
    return words


def environment(container: ContainerConfig, image: ImageSettings, home: str, hostname: str) -> list[str]:
    """NAME=value each, later ones over earlier: PATH, the image's, HOSTNAME, TERM with a terminal, the request's; HOME where it is unset."""
    doing = "set the container's environment"
    values = {"PATH": DEFAULT_PATH}
    for entry in image.env:
        name, mark, value = entry.partition("=")
        if name and mark:
            values[name] = value
    if hostname:
        values["HOSTNAME"] = hostname
    if container.tty:
        values.setdefault("TERM", "xterm")
    for name, data in container.envs:
        if not name or "=" in name:
            raise InvalidArgument(doing, cause=f"{name!r} is not the name of a variable")
        values[name] = os.fsdecode(data)
    values.setdefault("HOME", home)
    for name, value in values.items():
        check_text(doing, name + value)
    return [f"{name}={value}" for name, value in values.items()]


def working_directory(path: str) -> str:
    """An absolute path; "/" where none is given."""
    check_text("choose the working directory", path)
    return posixpath.normpath("/" + path.lstrip("/"))


def check_text(doing: str, text: str) -> None:
    """Raise InvalidArgument for what execve cannot pass on."""
    if "\0" in text:
        raise InvalidArgument(doing, cause=f"{text!r} has a NUL byte in it")


def capabilities(wanted: Capabilities, *, privileged: bool = False) -> dict[str, list[str]]:
    """The five sets. "ALL" is added or dropped first, then the single ones are added, then dropped.

    Inheritable has what is ambient and nothing else: more would come back through files of other users (CVE-2022-29162).
    For a user other than root the kernel clears permitted and effective at setuid, except for what is ambient.
    """
    chosen = dict.fromkeys(ALL_CAPABILITIES if privileged else DEFAULT_CAPABILITIES)
    add, drop = normal_names(wanted.add), normal_names(wanted.drop)
    if "CAP_ALL" in add:
        chosen = dict.fromkeys(ALL_CAPABILITIES)
    if "CAP_ALL" in drop:
        chosen = {}
    ambient = [name for name in normal_names(wanted.add_ambient) if name != "CAP_ALL"]
    if "CAP_ALL" in normal_names(wanted.add_ambient):
        ambient = list(ALL_CAPABILITIES)
    chosen.update(dict.fromkeys(name for name in (*add, *ambient) if name != "CAP_ALL"))
    for name in drop:
        chosen.pop(name, None)
    names = [name for name in ALL_CAPABILITIES if name in chosen]
    kept = [name for name in names if name in ambient]
    return {
        "bounding": names,
        "effective": list(names),
        "permitted": list(names),
        "inheritable": kept,
        "ambient": list(kept),
    }


def normal_names(names: Sequence[str]) -> list[str]:
    """CAP_ names in capitals. Raises InvalidArgument for one that Linux does not have."""
    normal = []
    for name in names:
        full = "CAP_" + name.upper().removeprefix("CAP_")
        if full != "CAP_ALL" and full not in ALL_CAPABILITIES:
            raise InvalidArgument("set the container's capabilities", cause=f"there is no capability {name!r}")
        normal.append(full)
    return normal
