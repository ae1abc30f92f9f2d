"""A container's checkpoint as an archive: the form that Podman began, and that CRI-O, containerd and checkpointctl write and read.

    checkpoint/*            CRIU's images, and descriptors.json: the keys of the container's streams
    config.dump             which container this was, of which image, when            spec.dump      its OCI configuration
    status.dump, status     its CRI status, as CRI-O and containerd have it           bind.mounts    what its bind mounts were: files or directories
    rootfs-diff.tar         what is new or changed in its root file system            deleted.files  what is gone there, a JSON list of paths
    devshm-checkpoint.tar   what is in the pod's /dev/shm
    dump.log, stats-dump    what CRIU said, and how long it took                      container.log  the container's log so far

An archive may come from anywhere. Of what is in it only plain files with these names are taken, each into a directory of its own
container, as many bytes as there is room for; everything else is passed over.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from tare.errors import InvalidArgument, ResourceExhausted
from tare.images.chunks import ChunkReader
from tare.images.decompress import decompressed
from tare.images.errors import LayerError
from tare.images.inherit import inherit
from tare.images.layer import BLOCK, Entry, Extension, HeaderReader, Kind
from tare.images.unpack import Limits, unpack
from tare.runtime.records import ContainerRecord, PodRecord
from tare.storage import difference
from tare.storage.difference import Guarded, Stop

IMAGES = "checkpoint"
CONFIG, SPEC, STATUS_DUMP, STATUS = "config.dump", "spec.dump", "status.dump", "status"
DIFFERENCE, DELETED, LOG, BOUND = "rootfs-diff.tar", "deleted.files", "container.log", "bind.mounts"
SHARED = "devshm-checkpoint.tar"
DUMP_LOG, STATS = "dump.log", "stats-dump"
NEEDED = frozenset({CONFIG, SPEC})
TAKEN = frozenset({CONFIG, SPEC, DIFFERENCE, DELETED, SHARED})
"""What a restore makes use of, beside the images."""
MOST_FILES = 100_000
MOST_JSON = 16 << 20
MOST_DELETED = 1_000_000
RESERVE = 64 << 20
CHUNK = 1 << 20
OWN_FIELDS = ("directories",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What an archive says of itself: of which container and image it is, with which configuration, and what is gone in its root file system."""

    name: str
    image: str
    image_ref: str
    spec: Mapping[str, Any]
    deleted: tuple[str, ...] = ()
    streams: tuple[str, str, str] = ("", "", "")
    checkpointed_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A container that is written down: its record, its pod's, its OCI configuration, its PID, and who wrote its images."""

    container: ContainerRecord
    pod: PodRecord
    spec: Mapping[str, Any]
    pid: int
    handler: str = "tare"
    streams: tuple[str, str, str] = ("", "", "")
    lowers: tuple[Path, ...] = field(default=())
    upper: Path = Path()
    shared: Path | None = None


# Writing


def describe(subject: Subject, directory: Path, stop: Stop) -> None:
    """Write all but the images, which CRIU has put there, into the directory of a container that stands still. Blocks. Raises Stopped."""
    record = subject.container
    put(directory / CONFIG, config(subject))
    put(directory / SPEC, specification(subject))
    put(directory / STATUS_DUMP, status_dump(record))
    put(directory / STATUS, status(subject))
    put(directory / BOUND, bound(subject.spec))
    put(directory / IMAGES / "descriptors.json", [key or "/dev/null" for key in subject.streams])
    with (directory / DIFFERENCE).open("xb") as file:
        put(directory / DELETED, difference.write(subject.upper, subject.lowers, file, stop))
    if subject.shared is not None:
        with (directory / SHARED).open("xb") as file:
            difference.write(subject.shared, (), file, stop)
    copy(Path(record.log_path), directory / LOG, stop)


def put(path: Path, value: object) -> None:
    """A JSON file that only root reads."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(value, file, indent=2)


def copy(source: Path, target: Path, stop: Stop) -> None:
    """A file that is a plain one, if there is one."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    with os.fdopen(fd, "rb") as file:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            with target.open("xb") as written:
                while chunk := file.read(CHUNK):
                    stop.check()
                    written.write(chunk)


def config(subject: Subject) -> dict[str, object]:
    """config.dump."""
    record = subject.container
    image = record.config.image
    return {
        "id": record.id,
        "name": record.config.metadata.name,
        "rootfsImage": image.user_specified_image or image.image,
        "rootfsImageRef": record.image_id,
        "rootfsImageName": record.image_ref,
        "runtime": subject.handler,
        "createdTime": stamp(record.created_at),
        "checkpointedTime": datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z"),
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": False,
    }


def stamp(nanoseconds: int) -> str:
    """A time as RFC 3339 has it."""
    moment = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 10**9:09d}Z"


def specification(subject: Subject) -> dict[str, Any]:
    """spec.dump: the configuration, with the annotations by which others know containers of Kubernetes."""
    record, pod = subject.container, subject.pod.config
    config = record.config
    ours = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": config.metadata.name,
        "io.kubernetes.cri.image-name": config.image.user_specified_image or config.image.image,
        "io.kubernetes.cri.sandbox-id": record.pod_id,
        "io.kubernetes.cri.sandbox-name": pod.metadata.name,
        "io.kubernetes.cri.sandbox-namespace": pod.metadata.namespace,
        "io.kubernetes.cri.sandbox-uid": pod.metadata.uid,
        "io.kubernetes.cri-o.Annotations": json.dumps(dict(config.annotations)),
        "io.kubernetes.cri-o.Labels": json.dumps(dict(config.labels)),
        "io.kubernetes.cri-o.Metadata": json.dumps({"name": config.metadata.name, "attempt": config.metadata.attempt}),
    }
    kept = {key: value for key, value in subject.spec.items() if key not in OWN_FIELDS}
    process = {key: value for key, value in subject.spec["process"].items() if key != "stdin"}
    return kept | {"process": process, "annotations": {**subject.spec.get("annotations", {}), **ours}}


def status_dump(record: ContainerRecord) -> dict[str, object]:
    """status.dump: what CRI's ContainerStatus says."""
    return {
        "id": record.id,
        "metadata": {"name": record.config.metadata.name, "attempt": record.config.metadata.attempt},
        "state": int(record.state),
        "created_at": record.created_at,
        "started_at": record.started_at,
        "image": {"image": record.config.image.image},
        "image_ref": record.image_ref,
        "image_id": record.image_id,
        "labels": dict(record.config.labels),
        "annotations": dict(record.config.annotations),
        "log_path": record.log_path,
    }


def status(subject: Subject) -> dict[str, object]:
    """status: as containerd keeps it."""
    record = subject.container
    return {
        "Version": "v1",
        "CreatedAt": record.created_at,
        "StartedAt": record.started_at,
        "FinishedAt": 0,
        "ExitCode": 0,
        "Pid": subject.pid,
        "Reason": "",
        "Message": "",
    }


def bound(spec: Mapping[str, Any]) -> list[dict[str, object]]:
    """bind.mounts: whether each was of a directory or a file, as who restores without Kubernetes has to make one."""
    found = []
    for mount in spec["mounts"]:
        if mount.get("type") != "bind" or mount["destination"] == "/dev/shm":
            continue
        try:
            mode = os.stat(mount["source"]).st_mode
        except OSError:
            continue
        found.append(
            {
                "source": mount["source"],
                "destination": mount["destination"],
                "file_type": "directory" if stat.S_ISDIR(mode) else "file",
                "permissions": stat.S_IMODE(mode) & 0o777,
            }
        )
    return found


def pack(directory: Path, target: Path, stop: Stop) -> None:
    """All that is in a directory as an archive that only root reads, on the disk when this returns. Blocks. Raises Stopped."""
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(directory.rglob("*")):
                stop.check()
                entry = archive.gettarinfo(path, path.relative_to(directory).as_posix())
                if entry.isreg():
                    with path.open("rb") as content:
                        archive.addfile(entry, cast("IO[bytes]", Guarded(content, stop)))
                else:
                    archive.addfile(entry)
        file.flush()
        os.fsync(file.fileno())


# Reading


def take(archive: Path, directory: Path, doing: str) -> None:
    """What a restore needs of an archive, into an empty directory. Blocks. Raises InvalidArgument, ResourceExhausted, OSError."""
    fd = os.open(archive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument(doing, cause=f"{archive} is no plain file")
        (directory / IMAGES).mkdir(mode=0o700)
        try:
            extract(decompressed(lambda: file.read(CHUNK)), directory, doing)
        except LayerError as error:
            raise InvalidArgument(doing, cause=f"{archive} is no archive of a checkpoint: {error}") from error
    check(directory, doing)


def members(stream: ChunkReader) -> Iterator[Entry]:
    """The entries of an archive; whoever takes one reads its bytes from the stream, all of them. Raises LayerError."""
    headers = HeaderReader()
    while block := stream.take(BLOCK):
        entry = headers.read(block)
        if entry is None:
            return
        if isinstance(entry, Extension):
            headers.extend(stream.take(entry.size))
        else:
            yield entry
        stream.skip(-entry.size % BLOCK)


def extract(chunks: Iterator[bytes], directory: Path, doing: str) -> None:
    """The files that are wanted."""
    stream = ChunkReader(lambda: next(chunks, b""))
    room = free(directory)
    for count, entry in enumerate(members(stream)):
        if count >= MOST_FILES:
            raise InvalidArgument(doing, cause=f"the checkpoint has more than {MOST_FILES} files")
        target = wanted(entry.path)
        if target is None or entry.kind is Kind.DIRECTORY:
            stream.skip(entry.size)
            continue
        if entry.kind is not Kind.FILE or entry.sparse is not None:
            raise InvalidArgument(doing, cause=f"{target} in the checkpoint is no plain file")
        room -= entry.size
        if room < 0:
            raise ResourceExhausted(doing, cause="there is no room on the disk for the checkpoint")
        (directory / target).unlink(missing_ok=True)  # of two with one name the last counts, as for tar
        write(stream, directory / target, entry, doing)


def wanted(path: bytes) -> str | None:
    """Where a file of an archive belongs; None for one that is passed over."""
    try:
        name = path.decode()
    except UnicodeDecodeError:
        return None
    folder, _, last = name.rpartition("/")
    return name if (folder == IMAGES and last) or name in TAKEN else None


def write(stream: ChunkReader, target: Path, entry: Entry, doing: str) -> None:
    """A new file of an entry's bytes."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if stream.copy(entry.size, fd) != entry.size:
            raise InvalidArgument(doing, cause=f"the checkpoint ends in the middle of {target.name}")
    finally:
        os.close(fd)


def free(directory: Path) -> int:
    """Bytes that may be written."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize - RESERVE


def check(directory: Path, doing: str) -> None:
    """Raise InvalidArgument where a directory has not what a checkpoint has, or something in it is no plain file."""
    missing = [name for name in NEEDED if not (directory / name).is_file()]
    if missing or not (directory / IMAGES / "inventory.img").is_file():
        cause = f"it has no {', '.join(sorted(missing)) or f'{IMAGES}/inventory.img'}"
        raise InvalidArgument(doing, cause=cause, hint="is it the archive of a checkpoint?")
    if not stat.S_ISDIR(os.lstat(directory / IMAGES).st_mode):
        raise InvalidArgument(doing, cause=f"{IMAGES} in the checkpoint is no directory")
    for path in (*(directory / name for name in TAKEN), *(directory / IMAGES).iterdir()):
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise InvalidArgument(doing, cause=f"{path.name} in the checkpoint is no plain file")


def read(directory: Path, doing: str) -> Described:
    """What is said in the files of a checkpoint. Raises InvalidArgument for what is said wrongly."""
    config = document(directory / CONFIG, dict, doing)
    spec = document(directory / SPEC, dict, doing)
    deleted = document(directory / DELETED, list, doing) if (directory / DELETED).exists() else []
    keys = directory / IMAGES / "descriptors.json"
    streams = document(keys, list, doing) if keys.exists() else []
    texts = [config.get(key) or "" for key in ("name", "rootfsImageName", "rootfsImage", "rootfsImageRef")]
    if not all(isinstance(item, str) for item in (*texts, *deleted, *streams)) or len(deleted) > MOST_DELETED:
        raise InvalidArgument(doing, cause="the checkpoint describes itself in another form than is usual")
    name, image_name, image, image_ref = texts
    stdin, stdout, stderr = (key if is_key(key) else "" for key in (*streams, "", "", "")[:3])
    return Described(
        name=name,
        image=image or image_name,
        image_ref=image_ref,
        spec=spec,
        deleted=tuple(deleted),
        streams=(stdin, stdout, stderr),
        checkpointed_at=str(config.get("checkpointedTime") or ""),
    )


def is_key(text: str) -> bool:
    """Whether a stream was a pipe, or a FIFO of Tare's."""
    return text.startswith(("pipe:[", "file["))


def document(path: Path, kind: type, doing: str) -> Any:
    """A JSON file with a value of this kind."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_JSON + 1)
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(doing, cause=f"{path.name} in the checkpoint: {error}") from error
    if len(text) > MOST_JSON or not isinstance(value, kind):
        raise InvalidArgument(doing, cause=f"{path.name} in the checkpoint is not what it is to be")
    return value


def lay(
    directory: Path, deleted: Sequence[str], upper: Path, lowers: Sequence[Path], limits: Limits, doing: str
) -> None:
    """What the container had changed, into its new and empty writable layer. Blocks. Raises InvalidArgument, OSError."""
    changed = directory / DIFFERENCE
    with changed.open("rb") if changed.exists() else io.BytesIO(EMPTY) as file:
        gone = io.BytesIO(whiteouts(deleted, doing))
        chunks = join(lambda: gone.read(CHUNK), decompressed(lambda: file.read(CHUNK)))
        try:
            unpacked = unpack(lambda: next(chunks, b""), upper, limits)
        except LayerError as error:
            raise InvalidArgument(doing, cause=f"{DIFFERENCE} in the checkpoint: {error}") from error
    inherit(upper, unpacked.implied, lowers)


EMPTY = bytes(2 * BLOCK)


def join(first: Callable[[], bytes], then: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks of the one and then of the other."""
    yield from iter(first, b"")
    yield from then


def whiteouts(deleted: Sequence[str], doing: str) -> bytes:
    """Entries that say what is gone, as layers have them, without an archive's end: what is new comes after them."""
    entries = []
    for path in deleted:
        folder, _, name = path.strip("/").rpartition("/")
        if not name or name in (".", "..") or "\0" in path:
            raise InvalidArgument(doing, cause=f"{DELETED} in the checkpoint names {path!r}")
        entry = tarfile.TarInfo(f"{folder}/.wh.{name}" if folder else f".wh.{name}")
        entries.append(entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    return b"".join(entries)


def lay_shared(directory: Path, shared: Path, doing: str) -> None:
    """What was in the pod's /dev/shm, as far as there is nothing by those names now. Blocks. Raises InvalidArgument, OSError."""
    with (directory / SHARED).open("rb") as file:
        stream = ChunkReader(lambda: file.read(CHUNK))
        try:
            for entry in members(stream):
                target = shared / os.fsdecode(entry.path)
                if entry.kind is not Kind.FILE or b"/" in entry.path or os.path.lexists(target):
                    stream.skip(entry.size)
                    continue
                write(stream, target, entry, doing)
                os.chown(target, entry.uid, entry.gid, follow_symlinks=False)
                os.chmod(target, entry.mode & 0o777)
        except LayerError as error:
            raise InvalidArgument(doing, cause=f"{SHARED} in the checkpoint: {error}") from error
