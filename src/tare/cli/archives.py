"""`tare save`, `tare load`: images to and from archives, layout directories and pipes."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import click

from tare.cli.client import Client
from tare.errors import FailedPrecondition, InvalidArgument, TareError

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2

PIECE = 1 << 20
LAYOUT_PATH = re.compile(r"oci-layout|index\.json|blobs/sha(256|512)/[0-9a-f]+")


@click.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="PATH", help="Where to.  [default: standard output]")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["oci", "docker", "layout"]),
    default="oci",
    show_default=True,
    help="An OCI archive, one that `docker load` reads too, or an OCI layout in a new directory.",
)
@click.pass_obj
def save(socket: str, images: tuple[str, ...], output: str | None, kind: str) -> None:
    """Save images with all their layers; every digest is kept."""
    from tare.api.v1 import tare_pb2

    request = tare_pb2.SaveRequest(images=images, docker=kind == "docker")
    with Client(socket) as client:
        pieces = (chunk.data for chunk in client.stream(client.tare.Save, request))
        if kind == "layout":
            if output is None:
                raise InvalidArgument("save a layout", cause="it is a directory", hint="name one with -o")
            write_layout(pieces, Path(output))
        elif output is None:
            if sys.stdout.isatty():
                raise InvalidArgument("save to a terminal", hint="name a file with -o, or redirect the output")
            for piece in pieces:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        else:
            write_file(pieces, Path(output))


def write_file(pieces: Iterable[bytes], path: Path) -> None:
    """A file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_layout(pieces: Iterable[bytes], path: Path) -> None:
    """The archive's files in a directory that must be new or empty. Raises FailedPrecondition."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FailedPrecondition(f"save to {path}", cause="there is something already")
    path.mkdir(parents=True, exist_ok=True)
    with piped(pieces) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None or not LAYOUT_PATH.fullmatch(member.name):
                raise TareError(f"save to {path}", cause=f"the daemon sent {member.name!r}")
            target = path / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(content, file, PIECE)


@contextmanager
def piped(pieces: Iterable[bytes]) -> Iterator[IO[bytes]]:
    """What comes, as a file to read; what was wrong with it is raised at the end."""
    reading, writing = os.pipe()
    failures: list[Exception] = []

    def write() -> None:
        try:
            with os.fdopen(writing, "wb") as file:
                for piece in pieces:
                    file.write(piece)
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001 - raised in the thread that reads
            failures.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    trouble: Exception | None = None
    with os.fdopen(reading, "rb") as file:
        try:
            yield file
        except tarfile.TarError as error:
            trouble = error
        if trouble is None:
            while file.read(PIECE):
                continue
    thread.join()
    if failures:
        raise failures[0]
    if trouble is not None:
        raise trouble


@click.command()
@click.argument("path", required=False)
@click.option("-i", "--input", "given", metavar="PATH", help="The same as PATH.")
@click.option("--name", default="", metavar="NAME", help="What to call the only image of an archive.")
@click.pass_obj
def load(socket: str, path: str | None, given: str | None, name: str) -> None:
    """Load images from PATH: an OCI archive or layout directory, or what `docker save` writes, compressed or not.

    Without PATH, or with -, from standard input.
    """
    source = path or given or "-"
    if source != "-" and not os.path.exists(source):
        raise InvalidArgument(f"load {source}", cause="there is no such file")
    with Client(socket) as client:
        answer = client.call(client.tare.Load, requests(pieces_of(source), name), timeout=None)
    for image in answer.images:
        for known in image.names or [image.image_id]:
            print(known)


def requests(pieces: Iterable[bytes], name: str) -> Iterator[tare_pb2.LoadRequest]:
    """The pieces as the daemon takes them, the name first."""
    from tare.api.v1 import tare_pb2

    yield tare_pb2.LoadRequest(name=name)
    for piece in pieces:
        yield tare_pb2.LoadRequest(data=piece)


def pieces_of(source: str) -> Iterator[bytes]:
    """An archive's bytes; a directory's as the archive that it would make."""
    if source == "-":
        yield from iter(lambda: sys.stdin.buffer.read(PIECE), b"")
    elif os.path.isdir(source):
        yield from packed(Path(source))
    else:
        with open(source, "rb") as file:
            yield from iter(lambda: file.read(PIECE), b"")


class Collected:
    """A file to write to, whose bytes are taken again."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        """Keep it."""
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """What was written since the last time."""
        data, self._pieces = b"".join(self._pieces), []
        return data


def packed(directory: Path) -> Iterator[bytes]:
    """A directory's plain files as a tar archive."""
    written = Collected()
    with tarfile.open(fileobj=cast("IO[bytes]", written), mode="w|", bufsize=tarfile.RECORDSIZE) as archive:
        for path in sorted(directory.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            member = archive.gettarinfo(path, str(path.relative_to(directory)))
            archive.addfile(member)  # the header alone
            with path.open("rb") as file:
                while data := file.read(PIECE):
                    archive.fileobj.write(data)
                    yield written.take()
            archive.fileobj.write(bytes(-member.size % tarfile.BLOCKSIZE))
            archive.offset += member.size + -member.size % tarfile.BLOCKSIZE
    yield written.take()
