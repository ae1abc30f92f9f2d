"""What `tare doctor` looks at on a node: each thing that pods need is found or tried, and said in plain words.

Nothing is left behind and no daemon is asked: what is tried is done in a child that ends, or on a clone of a mount that nobody sees.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tare.cgroups.choose import choose
from tare.config import Config
from tare.errors import TareError, describe
from tare.handlers.oci_features import Features
from tare.launch import linux
from tare.runtime import abilities, cdi, labels
from tare.runtime.seccomp_compile import load_library, version

OLDEST = (5, 14)
MOST_NAMESPACES = "/proc/sys/user/max_user_namespaces"


class State(Enum):
    """GOOD; LIMITED: pods run, and something of them does not work; MISSING: they do not run."""

    GOOD = "good"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at, and what there is to do about it ("" for nothing)."""

    subject: str
    state: State
    text: str
    hint: str = ""


async def examine(config: Config) -> list[Finding]:
    """All of it. Raises nothing: what cannot be looked at is a finding."""
    found = [privileges(), kernel(os.uname().release), await control_groups(config)]
    for subject, look in CHECKS.items():
        try:
            found.append(look())
        except (TareError, OSError) as error:
            found.append(Finding(subject=subject, state=State.MISSING, text=describe(error)))
    found += user_namespaces(config.root)
    found += handlers(config)
    return [*found, devices(config)]


def privileges() -> Finding:
    """Whether this is root, without whom little can be tried."""
    if os.geteuid() == 0:
        return Finding(subject="user", state=State.GOOD, text="root")
    return Finding(subject="user", state=State.MISSING, text="not root", hint="run it as root: sudo tare doctor")


def kernel(release: str) -> Finding:
    """Its version, by its release ("6.1.0-18-amd64")."""
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    if numbers >= OLDEST:
        return Finding(subject="kernel", state=State.GOOD, text=f"Linux {release}")
    hint = f"Tare needs {OLDEST[0]}.{OLDEST[1]} or later"
    return Finding(subject="kernel", state=State.MISSING, text=f"Linux {release}", hint=hint)


async def control_groups(config: Config) -> Finding:
    """Their layout, who makes them, and which controllers are not there."""
    subject = "control groups"
    try:
        groups = await choose(config.runtime.cgroup_driver, config.runtime.cgroup_root, config.run)
    except (TareError, OSError) as error:
        return Finding(subject=subject, state=State.MISSING, text=describe(error))
    try:
        text = f"{groups.layout}, made by {groups.driver}"
        trouble = groups.trouble()
    finally:
        await groups.leave()
        groups.close()
    if trouble is None:
        return Finding(subject=subject, state=State.GOOD, text=text)
    return Finding(subject=subject, state=State.LIMITED, text=f"{text}; {trouble}")


def seccomp() -> Finding:
    """The library that compiles profiles. Raises FailedPrecondition."""
    return Finding(subject="seccomp", state=State.GOOD, text=f"libseccomp {version(load_library())}")


def overlay() -> Finding:
    """The file system of containers' roots. Raises OSError where the kernel has none, or does not let us mount it."""
    os.close(linux.fsopen(b"overlay"))
    return Finding(subject="overlay", state=State.GOOD, text="containers' roots can be mounted")


def read_only_mounts() -> Finding:
    """Whether a mount becomes read-only with all that is mounted in it."""
    trouble = abilities.recursive_read_only(Path("/"))
    if trouble is None:
        return Finding(subject="recursive read-only", state=State.GOOD, text="mounts can be made read-only recursively")
    return Finding(subject="recursive read-only", state=State.LIMITED, text=trouble)


def confinement() -> Finding:
    """What else the node enforces."""
    node = labels.kernel()
    there = [name for name, has in (("AppArmor", node.profiles), ("SELinux", node.contexts)) if has is not None]
    text = f"{' and '.join(there)} enforced" if there else "neither AppArmor nor SELinux"
    return Finding(subject="confinement", state=State.GOOD, text=text)


CHECKS: dict[str, Callable[[], Finding]] = {
    "seccomp": seccomp,
    "overlay": overlay,
    "recursive read-only": read_only_mounts,
    "confinement": confinement,
}


def user_namespaces(root: Path) -> Iterator[Finding]:
    """Whether pods can have one of their own, and layers below `root` be mapped by it."""
    subject = "user namespaces"
    layers = next(path for path in (root, *root.parents) if path.exists())
    try:
        namespace, child = mapped_child()
    except OSError as error:
        hint = f"see {MOST_NAMESPACES}"
        yield Finding(subject=subject, state=State.LIMITED, text=describe(error), hint=hint)
        return
    try:
        yield Finding(subject=subject, state=State.GOOD, text="pods can have their own")
        trouble = abilities.mapped(Path(namespace), layers)
    finally:
        child()
    if trouble is None:
        yield Finding(subject="mapped mounts", state=State.GOOD, text=f"layers in {layers} can be mapped")
    else:
        yield Finding(
            subject="mapped mounts", state=State.LIMITED, text=trouble, hint="pods in user namespaces need it"
        )


def mapped_child() -> tuple[str, Callable[[], None]]:
    """A user namespace with a mapping: its path, and what ends the child that holds it. Raises OSError with what the kernel said."""
    ready, told = os.pipe2(os.O_CLOEXEC)
    waiting, gate = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(gate)
            linux.unshare(linux.CLONE_NEWUSER)
            os.write(told, b"0")
            os.read(waiting, 1)
        except OSError as error:
            os.write(told, str(error.errno).encode())
        finally:
            os._exit(0)

    def end() -> None:
        os.close(gate)
        os.waitpid(pid, 0)

    try:
        os.close(told)
        os.close(waiting)
        number = int(os.read(ready, 16) or errno.EIO)
        if number:
            raise OSError(number, os.strerror(number), "user namespace")
        first, size = abilities.RANGE[0][1:]
        for kind in ("uid", "gid"):
            Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {first} {size}")
    except BaseException:
        end()
        raise
    finally:
        os.close(ready)
    return f"/proc/{pid}/ns/user", end


def handlers(config: Config) -> Iterator[Finding]:
    """The binaries of runtime handlers beside the built-in one."""
    for name, settings in config.runtime.handlers.items():
        trouble = Features(settings).trouble()
        subject = f"handler {name}"
        if trouble is None:
            yield Finding(subject=subject, state=State.GOOD, text=settings.path)
        else:
            yield Finding(subject=subject, state=State.LIMITED, text=trouble, hint="is it installed?")


def devices(config: Config) -> Finding:
    """The files that describe devices (CDI)."""
    directories = config.runtime.cdi_spec_dirs
    problems = cdi.Registry(directories).problems()
    if problems:
        return Finding(subject="CDI", state=State.LIMITED, text="; ".join(problems))
    return Finding(subject="CDI", state=State.GOOD, text=f"no problem in {', '.join(directories)}")
