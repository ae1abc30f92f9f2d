"""From an OCI runtime specification to a launch plan: which primitive steps, in which order. Pure; nothing is opened here.

The order is the design's: cgroup joined → sources opened → namespaces entered → the mount namespace cut off from the node's →
root file system → mounts → devices → masks → pivot → working directory → streams, then (after the gate) limits, credentials, seccomp.
Field names and meanings are those of the OCI runtime specification 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.handlers import attributes, hooks, labels, options, volumes
from tare.handlers.identity import (
    credentials,
    foresee,
    is_early,
    parted_credentials,
    program,
    ready,
    ready_to_fork,
    room_for_limits,
)
from tare.handlers.mounting import Mounts, devices, lay_devices, protect
from tare.handlers.namespaces import BY_PATH, Namespaces
from tare.handlers.options import encoded
from tare.handlers.plans import ROOT, STDERR, STDIN, STDOUT, USER, Compiled, Directory, Filter, Place
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from tare.launch.plan import Plan, Step
    from tare.storage.overlay import Overlay

    Spec = Mapping[str, Any]

__all__ = ["Compiled", "Filter", "Place", "container", "execution"]


def container(
    spec: Spec,
    root: Overlay | Directory,
    place: Place,
    seccomp: Filter | None,
    namespaces: Namespaces | None = None,
) -> Compiled:
    """The plan of a container's main process. Raises InvalidArgument for what cannot be done, naming the field.

    `namespaces` are the specification's, for who has them already.
    """
    linux_part, process = spec.get("linux") or {}, spec["process"]
    namespaces = namespaces or Namespaces(spec)
    mounts = Mounts(spec.get("mounts") or (), place, namespaces)
    apart = is_apart(spec, place, namespaces, mounts)
    mounts.other_proc = place.other_proc if apart else None
    lists: list[list[Step]] = []
    placed = place.directory_v2 if place.directory_v2 and not (place.barrier or namespaces.user) else ""
    own = namespaces.is_new("mount")
    before, steps = (
        with_user_namespace(spec, root, place, namespaces, mounts)
        if namespaces.user
        else without_user_namespace(spec, root, place, namespaces, mounts, placed, apart=apart)
    )
    if own:
        steps += volumes.directories(spec.get("directories") or ())
        steps += mounts.attach()
        steps += devices(linux_part, mounts.fresh_dev, namespaces.user)
    steps.append(("default_signals", "reset signals") if apart else ("session", "make a session"))
    if own:
        steps += terminal(process, "console" if apart else "terminal")
        steps += protect(linux_part, spec.get("root") or {}, mounts)
    steps += hooks.creating(spec, place, lists)
    if own:
        steps.append(("pivot", "pivot_root", *root_propagation(linux_part)))
    else:
        steps += [("change_root", "change the root"), *terminal(process, "exec_terminal")]
        steps += [] if apart else control_terminal(process)
    steps.append(("working_directory", "change to the working directory", encoded(process.get("cwd") or "/")))
    steps += connect_streams(process, place, namespaces.user)
    if apart:
        return made_apart(spec, place, namespaces, seccomp, [*before, *steps], placed)
    steps += ready(process, linux_part.get("personality"))
    steps += foresee(process)
    listener = hooks.listening(
        seccomp, hooks.state(spec, place.id, place.bundle, "created", hooks.PID), hooks.PID, lists
    )
    final = credentials(process, seccomp, hooks.starting(spec, place), listener)
    plan: Plan = {"steps": labels.labelled(steps, linux_part), "final": final, **program(process)}
    helper = bool(before or lists)
    if helper:
        plan |= {
            "before": [("hide", "hide"), *labels.labelled(before, linux_part)],
            "making": "join pid namespace" if namespaces.kinds.get("pid") else "make the container's process",
        }
        plan |= {"outside": lists, "lingers": listener is not None}
    return Compiled(plan=plan, clone_flags=namespaces.clone_flags, helper=helper, cgroup=placed)


def is_apart(spec: Spec, place: Place, namespaces: Namespaces, mounts: Mounts) -> bool:
    """Whether the container's process is to appear in a PID namespace that others live in, and can do so with all its privileges gone.

    Who may trace there gets hold of whatever appears. A /proc of it must be to be had from outside (one that is mounted has no options of its
    own), nobody may have to see the process before (hooks), and its control group needs room for who makes it. With a user namespace nobody in
    there may trace it until its exec.
    """
    if not namespaces.kinds.get("pid") or namespaces.user or place.other_proc is None:
        return False
    if place.other_proc and mounts.has_options("proc"):
        return False
    resources = (spec.get("linux") or {}).get("resources") or {}
    alone = (resources.get("pids") or {}).get("limit") == 1
    seen = any(hooks.parse(spec)[point] for point in hooks.BEFORE_THE_PROGRAM)
    return not alone and not seen


def made_apart(
    spec: Spec, place: Place, namespaces: Namespaces, seccomp: Filter | None, before: list[Step], placed: str
) -> Compiled:
    """The plan of such a process, made as an exec's is: `before` is what takes privileges, and is done in between."""
    linux_part, process = spec.get("linux") or {}, spec["process"]
    told = hooks.state(spec, place.id, place.bundle, "created", hooks.PID)
    lists: list[list[Step]] = []
    heir = is_early(process, seccomp)
    listener = hooks.listening(seccomp, told, hooks.PID, lists, heir=heir)
    own, final = parted_credentials(process, seccomp, listener)
    before = [
        *before,
        *room_for_limits(process),
        *foresee(process),
        *ready_to_fork(process, linux_part.get("personality")),
        *namespaces.enter("pid"),
    ]
    plan: Plan = {
        "before": [("hide", "hide"), *labels.labelled(before, linux_part)],
        "making": "join pid namespace",
        "entered": own,
        "steps": appearing(process, lists, awaits=heir and listener is not None),
        "final": final,
        "outside": lists,
        **program(process),
    }
    return Compiled(plan=plan, clone_flags=0, helper=True, apart=True, cgroup=placed)


def appearing(process: Spec, lists: list[list[Step]], *, awaits: bool) -> list[Step]:
    """What is left for a process that appears among others: its session, and what forks do not inherit, which the helper does."""
    return [
        *([("await_listener", "load the seccomp filter")] if awaits else []),
        ("lead_session", "make a session"),
        *control_terminal(process),
        *hooks.ask(lists, "set the scheduler", attributes.scheduling(process)),
    ]


def without_user_namespace(
    spec: Spec,
    root: Overlay | Directory,
    place: Place,
    namespaces: Namespaces,
    mounts: Mounts,
    placed: str,
    *,
    apart: bool,
) -> tuple[list[Step], list[Step]]:
    """(in between, in the child) as far as the root file system; nothing in between unless a namespace must be there before the child.

    `apart` is for one process to do both: it makes the new namespaces too, and enters the PID namespace later.
    """
    linux_part, process = spec.get("linux") or {}, spec["process"]
    before = [
        *mounts.user_namespaces(),
        *namespaces.time_namespace(),
        *namespaces.open("pid"),
        *([] if apart else namespaces.enter("pid")),
    ]
    steps: list[Step] = [
        *wait_to_be_placed(place),
        ("hide", "hide"),
        ("umask", "set umask", 0),
        *labels.expected(process, linux_part),
        *oom_score(process),
        *join(path for path in place.join if not placed or not path.startswith(placed + "/")),
        *attributes.any_cpu(),
        *namespaces.open(*BY_PATH),
        *open_streams(process, place),
        *namespaces.open("mount"),
        *mounts.open(),
        *(open_root(root, linux_part) if namespaces.is_new("mount") else ()),
        *(namespaces.make() if apart else ()),
        *namespaces.enter(*BY_PATH),
        *namespaces.fresh(),
    ]
    base = os.fsencode(place.base)
    if not namespaces.is_new("mount"):
        return before, [*steps, *namespaces.enter("mount"), root_within(root)]
    steps += [("isolate", "cut the mount namespace off"), *mounts.unions()]
    if not isinstance(root, Directory):
        steps.append(overlay(root, tuple(bytes(path) for path in root.lowers), base))
    steps.append(("attach_root", "mount the root file system", ROOT, base))
    return before, steps


def with_user_namespace(
    spec: Spec, root: Overlay | Directory, place: Place, namespaces: Namespaces, mounts: Mounts
) -> tuple[list[Step], list[Step]]:
    """The same, where all that takes the node's privileges is done in between, in a mount namespace of its own, and laid ready there."""
    linux_part, process = spec.get("linux") or {}, spec["process"]
    base, label = os.fsencode(place.base), "make the root file system"
    before: list[Step] = [
        ("umask", "set umask", 0),
        *labels.expected(process, linux_part),
        *oom_score(process),
        *room_for_limits(process),
        *namespaces.user_namespace(),
        *mounts.user_namespaces(),
        *namespaces.open(*BY_PATH, "pid"),
        *open_streams(process, place),
        *give_streams(process, place),
        ("unshare", "make a mount namespace", b"mnt"),
        *mounts.open(),
        *open_root(root, linux_part),
        ("stage", "lay mounts ready", base, ROOT),
        *mounts.unions(),
        *mounts.lay(),
        *lay_devices(linux_part, mounts.fresh_dev),
    ]
    if not isinstance(root, Directory):
        laid, lowers = mounts.lay_layers(label, tuple(bytes(path) for path in root.lowers))
        owned = [("own_directory", label, bytes(path)) for path in (root.upper, root.work)]
        below = base + b"/%d" % ROOT
        before += [*laid, *owned, overlay(root, lowers, below)]
    before += [
        ("lay_root", label, ROOT),
        *namespaces.enter(*BY_PATH, "pid"),
        ("enter_user_namespace", "enter the user namespace", USER),
        *namespaces.time_namespace(),
        ("leave_stage", "lay mounts ready"),
    ]
    steps: list[Step] = [
        *wait_to_be_placed(place),
        *join(place.join),
        *attributes.any_cpu(),
        ("become_root", "become root of the user namespace"),
        *namespaces.fresh(),
        ("take", "mount the root file system", ROOT),
        ("attach_root", "mount the root file system", ROOT, b"%d" % ROOT),
    ]
    return before, steps


def wait_to_be_placed(place: Place) -> list[Step]:
    """Before all else, where somebody else is to do that."""
    return [("barrier", "wait to be placed")] if place.barrier else []


def join(paths: Iterable[str]) -> list[Step]:
    """Into cgroups, by their cgroup.procs."""
    return [("join_cgroup", f"join cgroup {path}", encoded(path)) for path in paths]


def open_root(root: Overlay | Directory, linux_part: Spec) -> list[Step]:
    """A directory, before any namespace is entered; it is told of the node's mounts there unless something else is asked for."""
    if not isinstance(root, Directory):
        return []
    kind = linux.MS_SLAVE if root_propagation(linux_part)[0] in (0, linux.MS_SLAVE) else linux.MS_PRIVATE
    return [("bind_root", "open the root file system", ROOT, encoded(root.path), kind)]


def root_within(root: Overlay | Directory) -> Step:
    """A directory as a mount namespace that was joined has it."""
    if not isinstance(root, Directory):
        cause = "an image's layers cannot be mounted in a mount namespace that is joined by path, or the node's own"
        raise InvalidArgument("read linux.namespaces", cause=cause)
    return ("root_within", "open the root file system", encoded(root.path))


def overlay(root: Overlay, lowers: tuple[bytes, ...], base: bytes) -> Step:
    """An image's layers, top first, under the container's writable directory."""
    return ("overlay", "make the root file system", ROOT, lowers, bytes(root.upper), bytes(root.work), base)


def root_propagation(linux_part: Spec) -> tuple[int, bool]:
    """(MS_ flag, recursive) of linux.rootfsPropagation; 0 for none. Raises InvalidArgument."""
    wanted = linux_part.get("rootfsPropagation") or ""
    if wanted and wanted not in options.PROPAGATION:
        raise InvalidArgument("make a container", cause=f"linux.rootfsPropagation is {wanted!r}, which is unknown")
    return options.PROPAGATION.get(wanted, (0, False))


def terminal(process: Spec, operation: str) -> list[Step]:
    """A terminal for a process that wants one; "exec_terminal" mounts nothing, and has `control_terminal` after it."""
    if not process.get("terminal"):
        return []
    size = process.get("consoleSize") or {}
    return [(operation, "open a terminal", process["user"]["uid"], size.get("height", 0), size.get("width", 0))]


def control_terminal(process: Spec) -> list[Step]:
    """For the leader of a session, whose standard input is the terminal."""
    return [("control_terminal", "open a terminal")] if process.get("terminal") else []


def execution(
    process: Spec,
    join: Sequence[str],
    namespaces: int,
    seccomp: Filter | None,
    *,
    personality: Spec | None = None,
    state: Spec | None = None,
) -> Plan:
    """The plan of a process within a running container. `namespaces` are CLONE_NEW flags of those to enter.

    `personality` is the container's; `state` is what a seccomp agent is told of the container, where the filter has a listener.
    """
    first, last = attributes.affinity(process)
    before: list[Step] = [
        ("hide", "hide"),
        *labels.expected(process, {}),
        *oom_score(process),
        *room_for_limits(process),
        *first,
        *(("join_cgroup", f"join cgroup {path}", encoded(path)) for path in join),
        *last,
    ]
    cwd = encoded(process.get("cwd") or "/")
    lists: list[list[Step]] = []
    heir = is_early(process, seccomp)
    listener = hooks.listening(seccomp, state or {}, hooks.PID, lists, heir=heir)
    own, final = parted_credentials(process, seccomp, listener)
    steps = appearing(process, lists, awaits=heir and listener is not None)
    entered: list[Step] = [
        *terminal(process, "exec_terminal"),
        ("change_directory", "change to the working directory", cwd),
        ("default_signals", "reset signals"),
        *ready_to_fork(process, personality),
        *own,
    ]
    plan = {"before": before, "namespaces": namespaces, "uid": process["user"]["uid"], "entered": entered}
    return plan | {"steps": steps, "final": final, **program(process)} | ({"outside": lists} if lists else {})


def oom_score(process: Spec) -> list[Step]:
    """Where there is no score, it stays what it is: the specification says so."""
    value = process.get("oomScoreAdj")
    return [] if value is None else [("oom_score", "set oom_score_adj", int(value))]


def open_streams(process: Spec, place: Place) -> list[Step]:
    """The container's ends of its FIFOs. Output is opened for reading too: so no SIGPIPE comes while no logger reads.

    `stdin` is Tare's own field: whether there is such a FIFO. Without one the container's own /dev/null is opened later.
    """
    if process.get("terminal") or place.streams is None:
        return []
    stdin = [("open_stream", "open stdin", STDIN, os.fsencode(place.streams / "stdin"), os.O_RDONLY)]
    return [
        *(stdin if process.get("stdin") else []),
        ("open_stream", "open stdout", STDOUT, os.fsencode(place.streams / "stdout"), os.O_RDWR),
        ("open_stream", "open stderr", STDERR, os.fsencode(place.streams / "stderr"), os.O_RDWR),
    ]


def give_streams(process: Spec, place: Place) -> list[Step]:
    """To the container's user, before a user namespace is entered, in which nobody may. A terminal is made inside."""
    uid = process["user"]["uid"]
    if place.streams is None:
        return [("own_inherited", "own the streams", uid)]
    return [("own_stream", step[1], step[2], uid) for step in open_streams(process, place)]


def connect_streams(process: Spec, place: Place, user: bool) -> list[Step]:
    """As descriptors 0, 1 and 2, owned by the container's user; with a user namespace they are by now."""
    owner = 0 if user else process["user"]["uid"]
    if place.streams is None:
        return [] if user else [("own_streams", "own the streams", owner)]
    if process.get("terminal"):
        return []
    return [("streams", "connect the streams", (STDIN, STDOUT, STDERR), owner)]
