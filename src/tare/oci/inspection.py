"""The commands that look at containers or change what they may use: state, list, ps, pause, resume, update, features, spec."""

from __future__ import annotations

import os
import sys

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.handlers import checking
from tare.oci import config, documents, groups, logs, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tare.oci.arguments import Options
    from tare.oci.state import Container

COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


def run(command: str, root: str, options: Options) -> int:
    """One of these commands. Raises TareError, OSError."""
    made: dict[str, Callable[[str, Options], None]] = {
        "state": show_state,
        "list": show_list,
        "ps": show_processes,
        "pause": pause,
        "resume": resume,
        "update": update,
        "features": features,
        "spec": specification,
    }
    if command not in made:
        raise FailedPrecondition(command, cause="is not supported")
    made[command](root, options)
    return 0


def say(value: Any, indent: int = 2) -> None:
    """JSON on standard output."""
    sys.stdout.write(documents.encoded(value, indent).decode() + "\n")


def show_state(root: str, options: Options) -> None:
    """`state`: the specification's JSON."""
    say(report(state.load(root, options.words[0])))


def report(container: Container) -> dict[str, Any]:
    """A container's state with its owner's name."""
    found = container.report()
    found["owner"] = user_name(found["owner"])
    return found


def user_name(uid: object) -> str:
    """A user of the node by name, or else by number."""
    import pwd

    try:
        return pwd.getpwuid(int(str(uid))).pw_name
    except (KeyError, ValueError):
        return str(uid)


def show_list(root: str, options: Options) -> None:
    """`list`: a table, JSON, or IDs alone."""
    form = one_form(options, ("table", "json"))
    names = state.names(root)
    if options.given("quiet"):
        for name in names:
            print(name)
        return
    found = []
    for name in names:
        try:
            found.append(report(state.load(root, name)))
        except NotFound:
            continue  # deleted meanwhile
        except (FailedPrecondition, InvalidArgument) as error:
            logs.warning(str(error))
    if form == "json":
        say(found or None, 0)
        return
    rows = [COLUMNS, *((*(str(item[key.lower()]) for key in COLUMNS),) for item in found)]
    print(table(rows))


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def one_form(options: Options, forms: tuple[str, ...]) -> str:
    """--format. Raises InvalidArgument."""
    form = options.text("format", forms[0])
    if form not in forms:
        raise InvalidArgument("read the command line", cause=f"--format is {' or '.join(forms)}, not {form!r}")
    return form


def show_processes(root: str, options: Options) -> None:
    """`ps`: the container's PIDs as the node has them, or what the node's ps says of them."""
    form = one_form(options, ("table", "json"))
    container = state.load(root, options.words[0])
    pids = groups.members(container.cgroup) if container.cgroup else []
    if form == "json":
        say(pids or None, 0)
        return
    import subprocess

    arguments = options.words[1:] or ["-ef"]
    done = subprocess.run(["ps", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FailedPrecondition("ps", cause=f"the node's ps ended with {done.returncode}")
    first, *lines = done.stdout.splitlines()
    titles = first.split()
    if "PID" not in titles:
        raise InvalidArgument("ps", cause=f"ps {' '.join(arguments)} shows no PID")
    column = titles.index("PID")
    print(first)
    for line in lines:
        words = line.split()
        if len(words) > column and words[column].isdecimal() and int(words[column]) in pids:
            print(line)


def pause(root: str, options: Options) -> None:
    """`pause`. Raises FailedPrecondition where it does not run."""
    container = state.load(root, options.words[0])
    status = container.status()
    if status not in ("running", "created"):
        raise FailedPrecondition(f"pause container {container.id}", cause=f"container not running: it is {status}")
    groups.tree().freeze_now(container.cgroup)


def resume(root: str, options: Options) -> None:
    """`resume`. Raises FailedPrecondition where it is not paused."""
    container = state.load(root, options.words[0])
    if container.status() != "paused":
        raise FailedPrecondition(f"resume container {container.id}", cause="container not paused")
    groups.tree().thaw_now(container.cgroup)


def update(root: str, options: Options) -> None:
    """`update`: from a file, standard input, or flags. Raises FailedPrecondition, InvalidConfig."""
    container = state.load(root, options.words[0])
    if container.status() == "stopped":
        raise FailedPrecondition(f"update container {container.id}", cause="container not running")
    if options.text("resources"):
        name = options.text("resources")
        data = sys.stdin.buffer.read() if name == "-" else config.read(name)
        resources = documents.decoded(data)
    else:
        resources = from_flags(options)
    checking.check_resources(resources)
    # Which devices a container may use is settled when it is made: containerd sends all of its resources, with a rule that denies every device.
    resources.pop("devices", None)
    if any(options.text(name) for name in ("l3-cache-schema", "mem-bw-schema")):
        raise FailedPrecondition(
            "update", cause="cache and bandwidth schemata cannot be changed while the container runs"
        )
    if container.facts.get("unit"):
        from tare.oci import scopes

        scopes.update(str(container.facts["unit"]), container.cgroup, resources)
    else:
        groups.tree().update_now(container.cgroup, resources)


def from_flags(options: Options) -> dict[str, Any]:
    """update's flags as OCI resources."""
    memory = {
        key: size(options.text(flag))
        for flag, key in (
            ("memory", "limit"),
            ("memory-reservation", "reservation"),
            ("memory-swap", "swap"),
            ("kernel-memory", "kernel"),
            ("kernel-memory-tcp", "kernelTCP"),
        )
        if options.text(flag)
    }
    cpu: dict[str, Any] = {
        key: options.number(flag)
        for flag, key in (
            ("cpu-period", "period"),
            ("cpu-quota", "quota"),
            ("cpu-burst", "burst"),
            ("cpu-share", "shares"),
            ("cpu-rt-period", "realtimePeriod"),
            ("cpu-rt-runtime", "realtimeRuntime"),
            ("cpu-idle", "idle"),
        )
        if options.text(flag)
    }
    for flag, key in (("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")):
        if options.text(flag):
            cpu[key] = options.text(flag)
    found: dict[str, Any] = {}
    if memory:
        found["memory"] = memory
    if cpu:
        found["cpu"] = cpu
    if options.text("pids-limit"):
        found["pids"] = {"limit": options.number("pids-limit")}
    if options.text("blkio-weight"):
        found["blockIO"] = {"weight": options.number("blkio-weight")}
    return found


def size(text: str) -> int:
    """Bytes, with k, m, g, t or p behind the number; −1 is no limit. Raises InvalidArgument."""
    word = text.lower().removesuffix("ib").removesuffix("b")
    digits, unit = (word[:-1], word[-1]) if word[-1:] in UNITS and word[-1:] else (word, "")
    try:
        return int(digits) * UNITS[unit]
    except ValueError:
        raise InvalidArgument("read the command line", cause=f"{text!r} is not a size") from None


def features(root: str, options: Options) -> None:
    """`features`: what is implemented (specification, features.md)."""
    from tare.oci import templates

    say(templates.features())


def specification(root: str, options: Options) -> None:
    """`spec`: a config.json to begin with. Raises FailedPrecondition where there is one."""
    from tare.oci import templates

    if options.given("rootless"):
        raise FailedPrecondition("spec", cause="--rootless is not supported: Tare runs as root")
    path = os.path.join(options.text("bundle", "."), config.FILE)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise FailedPrecondition(f"write {path}", cause="it is there already") from None
    with open(fd, "wb") as file:
        file.write(documents.encoded(templates.spec(), 4) + b"\n")
