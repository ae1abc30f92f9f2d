"""Unpacked layers: how a blob becomes a directory, and which directories there are.

    <root>/layers/<chain ID's hex>    a layer in overlayfs form; exists only whole, and after its data is on disk
    <root>/layers/.tmp-<random>       being unpacked
    <root>/layers/.trash-<n>          going out

A chain ID names a layer together with all below it (OCI image config, "Layer ChainID"). The pipeline of one layer:

    blob ─► read, decompress, hash (a thread) ─► bounded channel ─► unpack (another) ─► diff ID compared ─► synced ─► renamed

Unpacking is one short system call after the other, and Python's lock changes hands at each where several threads are at it. So no
more than AT_IT unpack at one time, a chunk each; who waits for bytes is not counted.
`unpack_blob`, `sync`, `place`, `empty_trash`, `leftovers` and `missing` block and are for threads; records are kept by the thread
that owns the database.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from tare.images.chunks import Abandoned, Channel
from tare.images.decompress import decompressed
from tare.images.encryption import Secret, decrypting
from tare.images.errors import LayerError, PullError
from tare.images.inherit import inherit
from tare.images.records import LayerRecord
from tare.images.unpack import Limits, Unpacked, unpack
from tare.state.database import Database
from tare.storage.content import Reader
from tare.storage.durable import sync_directory, sync_filesystem

AT_IT = threading.Semaphore(2)
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h
FS_TOPDIR_FL = 0x00020000


def chain_ids(diff_ids: Iterable[str]) -> tuple[str, ...]:
    """The chain ID of each layer, bottom first, from the layers' diff IDs."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append("sha256:" + hashlib.sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest() if chain else diff_id)
    return tuple(chain)


def unpack_blob(
    reader: Reader,
    diff_id: str,
    directory: Path,
    secret: Secret | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Unpacked:
    """Unpack a layer's blob, complete or still coming, into a new `directory`, and compare its diff ID. `secret` is an encrypted layer's.

    Raises PullError where the tar archive is not that of the diff ID, LayerError where it is none, Interrupted where the
    blob stops coming. The directory is removed unless all went well. The reader is read to its end or stopped, not closed.
    """
    channel = Channel()
    digest, size = hashlib.new(diff_id.partition(":")[0]), 0

    def produce() -> None:
        try:
            for chunk in decompressed(decrypting(reader.read, secret) if secret else reader.read):
                channel.put(chunk)
                digest.update(chunk)
                nonlocal size
                size += len(chunk)
                if size > limits.archive:
                    raise LayerError("unpack layer", cause=f"its archive has more than {limits.archive} bytes")
        except Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that takes the chunks
            channel.finish(error)
        else:
            channel.finish()

    producer = threading.Thread(target=produce, name="layer-decompress", daemon=True)
    producer.start()
    try:
        directory.mkdir(mode=0o755)
        os.chmod(directory, 0o755)
        with AT_IT:
            unpacked = unpack(partial(waiting, channel.get), directory, limits)
        actual = f"{diff_id.partition(':')[0]}:{digest.hexdigest()}"
        if actual != diff_id:
            raise PullError(
                "unpack layer",
                cause=f"its tar archive has the digest {actual}; the image's configuration says {diff_id}",
            )
        return unpacked
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        channel.abandon()
        reader.stop()
        producer.join()


def spread(directory: Path) -> None:
    """Let the file system lay the directories in `directory` far apart, as trees that have nothing to do with each other.

    ext4 passes over inodes that were freed in the last minutes one by one (fs/ext4/ialloc.c, recently_deleted): where a layer was removed
    a moment ago, unpacking another takes several times as long. With this flag (chattr +T) a hash of its name chooses where a directory goes.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = array.array("I", [0])
        with contextlib.suppress(OSError):  # a hint, which other file systems do not know
            fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, flags)
            flags[0] |= FS_TOPDIR_FL
            fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, flags)
    finally:
        os.close(descriptor)


def waiting(get: Callable[[], bytes]) -> bytes:
    """What `get` brings; meanwhile another may unpack."""
    AT_IT.release()
    try:
        return get()
    finally:
        AT_IT.acquire()


class LayerStore:
    """The layers under one root directory, and their records in `state.db`."""

    def __init__(self, root: Path, database: Database) -> None:
        self.root = root / "layers"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        spread(self.root)
        self._numbers = itertools.count()
        self._table = database.table("layers", LayerRecord)
        self._records = dict(self._table.items())

    def path(self, chain_id: str) -> Path:
        """Where a layer is or will be."""
        return self.root / chain_id.partition(":")[2]

    def get(self, chain_id: str) -> LayerRecord | None:
        """The record of a layer that exists."""
        return self._records.get(chain_id)

    def records(self) -> dict[str, LayerRecord]:
        """All layers by chain ID."""
        return dict(self._records)

    def new_directory(self) -> Path:
        """A name for a layer that is about to be unpacked: a new one each time, see `spread`."""
        return self.root / f".tmp-{os.urandom(8).hex()}"

    def sync(self) -> None:
        """All that was unpacked until now is on disk when this returns."""
        sync_filesystem(self.root)

    def place(self, directory: Path, unpacked: Unpacked, chain_id: str, below: Sequence[str]) -> None:
        """An unpacked and synced layer takes its place over the layers `below` (chain IDs, topmost first), which are in theirs."""
        inherit(directory, unpacked.implied, [self.path(lower) for lower in below])
        target = self.path(chain_id)
        if target.exists():  # without a record: left by a crash between the renaming and the record
            target.rename(self.root / f".trash-{next(self._numbers)}")
        directory.rename(target)
        sync_directory(self.root)

    def record(self, record: LayerRecord) -> None:
        """Note a layer that has taken its place."""
        self._table.put(record.chain_id, record)
        self._records[record.chain_id] = record

    def forget(self, chain_id: str) -> None:
        """A layer is gone from now on; `empty_trash` frees its space."""
        self._table.delete(chain_id)
        self._records.pop(chain_id, None)
        try:
            self.path(chain_id).rename(self.root / f".trash-{next(self._numbers)}")
        except FileNotFoundError:
            return

    def empty_trash(self) -> None:
        """Free what was forgotten."""
        for path in self.root.glob(".trash-*"):
            shutil.rmtree(path, ignore_errors=True)

    def leftovers(self) -> list[Path]:
        """What an earlier process had under way, and directories that no record names. Before the first unpacking."""
        known = {chain_id.partition(":")[2] for chain_id in self._records}
        return [path for path in self.root.iterdir() if path.name not in known]

    def missing(self) -> list[str]:
        """Records whose directory is gone."""
        return [chain_id for chain_id in self._records if not self.path(chain_id).is_dir()]
