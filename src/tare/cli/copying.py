"""`tare cp`: files between this machine and a running container, through the root of its main process; nothing is run inside."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tare.cli import tars, trees
from tare.cli.client import Client
from tare.cli.containers import container_candidates
from tare.cli.lookup import pick
from tare.errors import FailedPrecondition, InvalidArgument
from tare.launch import linux

if TYPE_CHECKING:
    from tare.cli.trees import Place

STREAM = "-"
KERNEL = frozenset(
    ("proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "debugfs", "tracefs", "securityfs", "bpf")
)


def split(word: str) -> tuple[str, str]:
    """(container, path); no container for a path of this machine: one that begins with /, . or : may hold a colon."""
    if word.startswith(("/", ".", ":")) or ":" not in word:
        return "", word
    container, _, path = word.partition(":")
    return container, path


@click.command("cp")
@click.option(
    "-a", "--archive", is_flag=True, help="Keep owners; without it they are root's, or in a container its root's."
)
@click.option("-L", "--follow-link", is_flag=True, help="Copy what a link leads to.")
@click.argument("source", metavar="CONTAINER:PATH|PATH|-")
@click.argument("target", metavar="CONTAINER:PATH|PATH|-")
@click.pass_obj
def copy(socket: str, archive: bool, follow_link: bool, source: str, target: str) -> None:
    """Copy files into or out of a running CONTAINER. With - a tar stream is read, or written."""
    (container, path), (other, elsewhere) = split(source), split(target)
    if bool(container) == bool(other):
        raise click.UsageError("one of the two must be CONTAINER:PATH, and the other must not")
    with Client(socket) as client, inside(client, container or other, path if container else elsewhere) as there:
        if source == STREAM:
            tars.unpack(sys.stdin.buffer, there, keep_owners=archive, warn=warn)
        elif target == STREAM:
            if os.isatty(sys.stdout.fileno()):
                raise click.UsageError("a tar stream is not for a terminal: redirect it")
            tars.pack(there, sys.stdout.buffer, warn)
        else:
            with here(path if other else elsewhere) as ours:
                pair = (there, ours) if container else (ours, there)
                trees.copy(*pair, follow=follow_link, keep_owners=archive, warn=warn)


def warn(text: str) -> None:
    """What was left out."""
    sys.stderr.write(f"tare: {text}\n")


@contextmanager
def here(path: str) -> Iterator[Place]:
    """A path of this machine."""
    whole = os.path.join(os.getcwd(), path) if path not in ("", ".") else f"{os.getcwd()}/."
    with trees.opened(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        yield trees.Place(root=root, path=whole, said=path, kernel=kernel_of("self"))


@contextmanager
def inside(client: Client, word: str, path: str) -> Iterator[Place]:
    """A path of a running container. Raises FailedPrecondition, InvalidArgument."""
    from tare.cri.v1 import api_pb2

    if not path.startswith("/"):
        raise InvalidArgument(f"copy {word}:{path}", cause="a container's path begins with /")
    target = pick(container_candidates(client.containers()), word, "container")
    request = api_pb2.ContainerStatusRequest(container_id=target.id, verbose=True)
    answer = client.call(client.runtime.ContainerStatus, request)
    info = json.loads(answer.info["info"])
    doing = f"copy {word}:{path}"
    if answer.status.state != api_pb2.CONTAINER_RUNNING or not info["pid"]:
        raise FailedPrecondition(doing, cause="the container does not run", hint="start it, or copy while it runs")
    try:
        pid = str(info["pid"])
        owners, kernel = trees.Owners(rows_of(pid, "uid"), rows_of(pid, "gid")), kernel_of(pid)
        root = root_of(int(info["pid"]), int(info["startTime"]))  # last: it looks whether this was that process
    except OSError as error:
        raise FailedPrecondition(doing, cause=error) from error
    with trees.opened(root):
        yield trees.Place(root=root, path=path, said=f"{word}:{path}", owners=owners, kernel=kernel)


def root_of(pid: int, start_time: int) -> int:
    """The root of a process, which must be that which started then. Raises OSError."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if not linux.same_process(pid, start_time):
        os.close(root)
        raise ProcessLookupError(3, "the container has ended")
    return root


def rows_of(pid: str, kind: str) -> tuple[trees.Row, ...]:
    """The map of user or group IDs of a process. Raises OSError."""
    with open(f"/proc/{pid}/{kind}_map", encoding="ascii") as file:
        rows = [[int(word) for word in line.split()] for line in file]
    return tuple((row[0], row[1], row[2]) for row in rows)


def kernel_of(pid: str) -> frozenset[int]:
    """The devices of the kernel's own file systems that a process sees. Raises OSError."""
    found = set()
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, kind = line.partition(" - ")
            if kind.split(" ", 1)[0] in KERNEL:
                major, minor = fields.split(" ")[2].split(":")
                found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)
