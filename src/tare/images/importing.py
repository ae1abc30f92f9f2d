"""`tare load`: an archive of images becomes blobs, and those become images, by the steps that a pull has after its resolving.

    archive, chunk by chunk ─► decompressed ─► entries ─► blobs (verified against their digests, held) ─► fetch ─► unpack ─► record

The archive is read once, in a thread, and is never on the disk as a whole. What is not a blob of a layout is kept by its path
until it is known whether Docker's manifest.json names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

from tare.images.archive import ArchiveError, Found, blob_digest, made_manifest, read_docker, read_index
from tare.images.chunks import ChunkReader
from tare.images.decompress import GZIP_MAGIC, ZSTD_MAGIC, decompressed
from tare.images.layer import BLOCK, Entry, Extension, HeaderReader, Kind
from tare.images.manifest import OCI_CONFIG, Descriptor
from tare.images.pull import Pull, discard, fetch, unpack
from tare.images.reference import Reference
from tare.images.registry import Registry
from tare.images.transport import Patience
from tare.state.operations import Operation, Step
from tare.storage.content import ContentStore

MAX_MEMBERS = 100_000
PIECE = 256 << 10
LAYER = "application/vnd.oci.image.layer.v1.tar"


class Absent(Registry):
    """Where nothing can be fetched: what the archive has not, an image in it cannot have."""

    def __init__(self, reference: Reference, executor: Executor) -> None:
        super().__init__(reference, (), Patience(), 0, executor)

    async def _each(self, step: str, ask: object, *, by_tag: bool = False) -> NoReturn:
        raise ArchiveError(step, cause="the archive does not have it")

    def _check_size(self, size: int) -> None:
        """Nothing comes over a wire."""


@dataclass(slots=True)
class Members:
    """What an archive had: the small files by path, and the digest and size of every other file by path; links by path."""

    small: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, Descriptor] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def blob(self, path: str) -> Descriptor:
        """The file at `path`, or at the link there. Raises ArchiveError."""
        found = self.blobs.get(path) or self.blobs.get(self.links.get(path, ""))
        if found is None:
            raise ArchiveError("read archive", cause=f"{path!r} is not in it")
        return found


def read_members(
    read: Callable[[], bytes], content: ContentStore, hold: Callable[[str], None], max_document: int
) -> Members:
    """Store an archive's blobs. `hold` is called with each digest before the blob has its name. Blocks; for a thread.

    Raises ArchiveError, LayerError, WrongContent, OSError, and what `read` raises.
    """
    stream = ChunkReader(partial(next, decompressed(read), b""))
    headers, members, count = HeaderReader(), Members(), 0
    while block := stream.take(BLOCK):
        header = headers.read(block)
        if header is None:
            break
        if isinstance(header, Extension):
            headers.extend(stream.take(header.size))
            stream.skip(-header.size % BLOCK)
            continue
        count += 1
        if count > MAX_MEMBERS:
            raise ArchiveError("read archive", cause=f"more than {MAX_MEMBERS} members")
        _member(header, stream, content, hold, members, max_document)
        stream.skip(-header.size % BLOCK)
    stream.drain()
    return members


def _member(
    entry: Entry,
    stream: ChunkReader,
    content: ContentStore,
    hold: Callable[[str], None],
    members: Members,
    max_document: int,
) -> None:
    path = entry.path.decode("utf-8", "replace")
    if entry.kind in (Kind.SYMLINK, Kind.HARDLINK):
        members.links[path] = _target(path, entry)
    if entry.kind is not Kind.FILE:
        return
    digest = blob_digest(path)
    if _is_document(path) and entry.size <= max_document:
        members.small[path] = stream.take(entry.size)
        if len(members.small[path]) != entry.size:
            raise ArchiveError("read archive", cause=f"it ends in the middle of {path!r}")
        return
    if digest is not None:
        hold(digest)
        if content.size(digest) == entry.size:
            members.blobs[path] = Descriptor(digest=digest, size=entry.size)
            if stream.skip(entry.size) != entry.size:
                raise ArchiveError("read archive", cause=f"it ends in the middle of {path!r}")
            return
    ingest = content.ingest(digest, entry.size)
    try:
        first, left = b"", entry.size
        while left:
            piece = stream.take(min(PIECE, left))
            if not piece:
                raise ArchiveError("read archive", cause=f"it ends in the middle of {path!r}")
            ingest.write((piece,))
            first = first or piece[: len(ZSTD_MAGIC)]
            left -= len(piece)
        if digest is None:
            digest = ingest.settle()
            hold(digest)
        ingest.commit()
    except BaseException as error:
        ingest.abort(error)
        raise
    packed = "+gzip" if first.startswith(GZIP_MAGIC) else "+zstd" if first == ZSTD_MAGIC else ""
    members.blobs[path] = Descriptor(digest=digest, size=entry.size, media_type=LAYER + packed)


def _is_document(path: str) -> bool:
    return "/" not in path and (path.endswith(".json") or path == "oci-layout")


def _target(path: str, entry: Entry) -> str:
    """Where a link in an archive leads, as a path in it (old `docker save` links layers that are the same)."""
    parts = [] if entry.kind is Kind.HARDLINK else path.split("/")[:-1]
    for part in entry.link.decode("utf-8", "replace").split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def images_of(members: Members, content: ContentStore, hold: Callable[[str], None], name: str | None) -> list[Found]:
    """What images an archive has. For Docker's own archives manifests are made and stored. Blocks; for a thread. Raises ArchiveError."""
    small = members.small
    if "index.json" in small and "oci-layout" in small:
        return read_index(small["index.json"], name)
    if "manifest.json" not in small:
        raise ArchiveError(
            "read archive", cause="it has neither index.json nor manifest.json", hint="give it what `tare save` writes"
        )
    found = []
    for config_path, layer_paths, references in read_docker(small["manifest.json"], name):
        listed = small.get(config_path)
        config = members.blob(config_path) if listed is None else _store(listed, content, hold)
        layers = [replace_type(members.blob(path)) for path in layer_paths]
        manifest = made_manifest(replace_type(config, OCI_CONFIG), layers)
        found.append(Found(_store(manifest, content, hold).digest, references, genuine=False))
    return found


def replace_type(descriptor: Descriptor, media_type: str = "") -> Descriptor:
    """The descriptor with a media type: the one given, else its own, else that of a plain layer."""
    return Descriptor(
        digest=descriptor.digest, size=descriptor.size, media_type=media_type or descriptor.media_type or LAYER
    )


def _store(data: bytes, content: ContentStore, hold: Callable[[str], None]) -> Descriptor:
    ingest = content.ingest(None, len(data))
    try:
        ingest.write((data,))
        digest = ingest.settle()
        hold(digest)
        ingest.commit()
    except BaseException as error:
        ingest.abort(error)
        raise
    return Descriptor(digest=digest, size=len(data))


@dataclass(slots=True, eq=False, kw_only=True)
class Load(Pull):
    """One image of an archive whose blobs are in the store."""

    names: tuple[Reference, ...]
    genuine: bool

    def expect(self, blobs: Iterable[Descriptor]) -> None:
        """They have come."""


async def record(load: Load) -> None:
    """Note the image under the archive's names."""
    assert load.image is not None
    image = replace(load.image, repo_tags=tuple(sorted({name.tagged or "" for name in load.names} - {""})))
    if load.genuine:
        image = replace(image, repo_digests=tuple(sorted({name.at(load.digest) for name in load.names})))
    load.image = load.workers.store.add(image)


LOAD_IMAGE: Operation[Load] = Operation(
    "LoadImage", (Step("fetch", fetch, discard), Step("unpack", unpack, discard), Step("record", record))
)
