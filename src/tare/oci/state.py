"""What is known of a container, in a directory of its own, and what state that comes to.

    <root>/<id>/               0700; its making is what claims the name
        state.json             written beside its place and renamed: (version, pid 0) before anything is made, the PID before create ends
        config.json            the bundle's, as it was
        start                  the unix socket that the waiting process holds; gone once it was told to go on

    creating   no PID yet               created    its process waits at the socket
    running    the program runs         paused     its control group is frozen          stopped    its process is gone

Whatever a killed command leaves here, `delete --force` clears.
"""

from __future__ import annotations

import fcntl
import os

from tare.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, describe
from tare.handlers.shapes import InvalidConfig
from tare.launch import linux
from tare.oci import documents, logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_ROOT = "/run/tare-oci"
VERSION = 1
OCI_VERSION = "1.2.0"
STATE, CONFIG, GATE = "state.json", "config.json", "start"
ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
LONGEST_NAME = 1024


class Container:
    """A container's directory and what its state.json says. Absent members are those of a container whose making was cut short."""

    def __init__(self, root: str, container_id: str, facts: dict[str, Any]) -> None:
        self.id = container_id
        self.directory = f"{root}/{container_id}"
        self.facts = facts
        self.lock = -1

    @property
    def pid(self) -> int:
        """The PID of its process; 0 where there is none yet."""
        return int(self.facts.get("pid") or 0)

    @property
    def cgroup(self) -> str:
        """Its control group's path; "" where it was not settled yet."""
        return str(self.facts.get("cgroup") or "")

    @property
    def gate(self) -> str:
        """Where its process waits to be started."""
        return f"{self.directory}/{GATE}"

    def path(self, name: str) -> str:
        """A file in its directory."""
        return f"{self.directory}/{name}"

    def save(self) -> None:
        """Write state.json, whole or not at all. Raises OSError."""
        linux.replace_file(self.path(STATE), documents.encoded(self.facts))

    def alive(self) -> bool:
        """Whether its process is there and no zombie."""
        return self.pid > 0 and process_state(self.pid, int(self.facts.get("start") or 0)) not in ("", "Z", "X")

    def waits(self) -> bool:
        """Whether its process is still before its exec: the socket is there, and it runs the interpreter that made it."""
        if not os.path.exists(self.gate):
            return False
        try:
            status = os.stat(f"/proc/{self.pid}/exe")
        except OSError:
            return False
        return [status.st_dev, status.st_ino] == self.facts.get("image")

    def status(self) -> str:
        """One of the specification's words, or `paused`, as runc has it."""
        if not self.pid:
            return "creating" if self.maker_lives() else "stopped"
        if not self.alive():
            return "stopped"
        if self.frozen():
            return "paused"
        return "created" if self.waits() else "running"

    def maker_lives(self) -> bool:
        """Whether the command that makes it is still at work."""
        maker = self.facts.get("maker") or [0, 0]
        return process_state(int(maker[0]), int(maker[1])) not in ("", "Z", "X")

    def frozen(self) -> bool:
        """Whether its control group is frozen."""
        if not self.cgroup:
            return False
        from tare.oci import groups

        try:
            return groups.tree().frozen(self.cgroup)
        except (NotFound, FailedPrecondition, OSError):
            return False

    def report(self) -> dict[str, Any]:
        """What `state` prints: the specification's state, and rootfs, created and owner as runc has them."""
        status = self.status()
        return {
            "ociVersion": self.facts.get("ociVersion", OCI_VERSION),
            "id": self.id,
            "pid": 0 if status == "stopped" else self.pid,
            "status": status,
            "bundle": self.facts.get("bundle", ""),
            "rootfs": self.facts.get("rootfs", ""),
            "created": self.facts.get("created", ""),
            "annotations": self.facts.get("annotations") or {},
            "owner": self.facts.get("owner", ""),
        }

    def hold(self) -> None:
        """Take the container for a command that changes it, once others are done with it. Raises NotFound where it is gone by then."""
        try:
            self.lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            if os.fstat(self.lock).st_nlink == 0:
                raise FileNotFoundError
        except FileNotFoundError:
            raise NotFound(f"container {self.id}", cause="does not exist") from None

    def release(self) -> None:
        """Let others have it: those may be waited for from here on."""
        os.close(self.lock)
        self.lock = -1

    def forget(self) -> None:
        """Remove the directory: state.json last, so that one that is cut short is found again. Idempotent."""
        try:
            names = sorted(os.listdir(self.directory), key=lambda name: name == STATE)
        except FileNotFoundError:
            return
        for name in names:
            os.unlink(self.path(name))
        os.rmdir(self.directory)


def check_id(container_id: str) -> str:
    """A name that is no path. Raises InvalidArgument."""
    if not container_id or not ALLOWED.issuperset(container_id) or container_id.startswith("."):
        raise InvalidArgument(
            f"use the container ID {container_id!r}",
            cause="it may have letters, digits, and _ + - . in it, and begins with none of these dots",
        )
    if len(container_id) > LONGEST_NAME:
        raise InvalidArgument("use the container ID", cause=f"it is longer than {LONGEST_NAME} characters")
    return container_id


def claim(root: str, container_id: str, facts: dict[str, Any]) -> Container:
    """A new container's directory. Raises AlreadyExists."""
    container = Container(root, check_id(container_id), facts)
    try:
        os.makedirs(root, mode=0o711, exist_ok=True)
        os.mkdir(container.directory, 0o700)
    except FileExistsError:
        raise AlreadyExists(f"container {container_id}", cause="exists already") from None
    except OSError as error:
        raise FailedPrecondition(f"make container {container_id}", step="state directory", cause=error) from error
    try:
        container.save()
    except BaseException:
        container.forget()
        raise
    return container


def load(root: str, container_id: str, *, damaged: bool = False) -> Container:
    """A container that is there. Raises NotFound, FailedPrecondition; with `damaged` one whose state.json is no JSON has no facts."""
    container = Container(root, check_id(container_id), {})
    try:
        with open(container.path(STATE), "rb") as file:
            container.facts = facts_of(file.read(), container_id, damaged=damaged)
    except FileNotFoundError:
        if not os.path.isdir(container.directory):
            raise NotFound(f"container {container_id}", cause="does not exist") from None
    except OSError as error:
        raise FailedPrecondition(f"read the state of container {container_id}", cause=describe(error)) from error
    return container


def facts_of(data: bytes, container_id: str, *, damaged: bool) -> dict[str, Any]:
    """What a state.json says. It is renamed into its place whole, but a crash of the node, or a hand, can leave it cut."""
    doing = f"read the state of container {container_id}"
    try:
        facts = documents.decoded(data)
        if isinstance(facts, dict):
            return facts
        cause = "it is no object"
    except InvalidConfig as error:
        cause = error.cause or describe(error)
    if not damaged:
        raise FailedPrecondition(doing, cause=cause, hint="delete --force clears it")
    logs.warning(f"{doing}: {cause}: what it ran is not known")
    return {}


def names(root: str) -> list[str]:
    """The IDs of all containers."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")]


def process_state(pid: int, start: int) -> str:
    """The letter of /proc/PID/stat; "" where there is no such process, or another by that number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return fields[0].decode() if int(fields[19]) == start else ""
