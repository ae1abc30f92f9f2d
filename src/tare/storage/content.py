"""The content store: bytes by digest, each stored once, whole or not at all.

    <root>/blobs/sha256/<hex>     complete and verified; a name here is a promise
    <root>/ingest/partial.<algorithm>.<hex>   coming in: readers follow it while it grows; the next process goes on with it
    <root>/ingest/<n>.unnamed     coming in, of a digest that is not known yet
    <root>/ingest/trash.<n>       going out

A blob is verified against digest and size, synced and renamed before anything names it. What an ended process leaves in ingest/
is removed by `recover`, save partial blobs that are not old. Everything here blocks and is called from threads, except the
constructor, `size`, `sizes`,
`forget` and the making of an `Ingest`, which take microseconds. Which blobs are still wanted is not known here.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from tare.errors import NotFound, UnknownError
from tare.storage.durable import sync_directory

CHUNK = 256 * 1024
PARTIAL = "partial."
PAGE = 4096
_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})")


class WrongContent(UnknownError):
    """The bytes that came are not those of the digest."""


class Interrupted(UnknownError):
    """Reading was stopped, because the bytes stopped coming or nobody wants them any more."""


class ContentStore:
    """The blobs under one root directory."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._ingest = root / "ingest"
        self._numbers = itertools.count()
        self._sizes: dict[str, int] = {}
        self._coming: set[str] = set()
        self.suspended = False
        for directory in (self._ingest, self._blobs / "sha256", self._blobs / "sha512"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for algorithm in ("sha256", "sha512"):
            with os.scandir(self._blobs / algorithm) as entries:
                for entry in entries:
                    if _DIGEST.fullmatch(f"{algorithm}:{entry.name}"):
                        self._sizes[f"{algorithm}:{entry.name}"] = entry.stat(follow_symlinks=False).st_size

    def path(self, digest: str) -> Path:
        """Where a blob is or will be. Raises ValueError for what is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is no digest")
        algorithm, _, value = digest.partition(":")
        return self._blobs / algorithm / value

    def size(self, digest: str) -> int | None:
        """Bytes, None where the blob is not here."""
        return self._sizes.get(digest)

    def sizes(self) -> dict[str, int]:
        """All blobs: digest to bytes."""
        return dict(self._sizes)

    def read(self, digest: str) -> bytes:
        """A small blob's bytes. Raises NotFound."""
        try:
            return self.path(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"blob {digest}") from None

    def open(self, digest: str) -> Reader:
        """Read a complete blob. Raises NotFound."""
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"blob {digest}") from None
        return Reader(descriptor, os.fstat(descriptor).st_size)

    def put(self, digest: str, data: bytes) -> None:
        """Store bytes that are at hand. Raises WrongContent."""
        ingest = self.ingest(digest, len(data))
        try:
            ingest.write((data,))
            ingest.commit()
        except BaseException as error:
            ingest.abort(error)
            raise

    def ingest(self, digest: str | None, size: int) -> Ingest:
        """Begin a blob of that many bytes; to be committed or aborted. Without a digest it is to be settled first."""
        if digest is None:
            return Ingest(self, None, size, self._ingest / f"{next(self._numbers)}.unnamed")
        algorithm, _, value = digest.partition(":")
        self.path(digest)
        path = self._ingest / f"{PARTIAL}{algorithm}.{value}"
        if digest in self._coming:  # two that bring the same do not share a file
            path = self._ingest / f"{next(self._numbers)}.again"
        return Ingest(self, digest, size, path)

    def forget(self, digest: str) -> None:
        """A blob is gone from now on; `empty_trash` frees its space."""
        self._sizes.pop(digest, None)
        try:
            self.path(digest).rename(self._ingest / f"trash.{next(self._numbers)}")
        except FileNotFoundError:
            return

    def empty_trash(self) -> None:
        """Free what was forgotten."""
        for path in self._ingest.glob("trash.*"):
            path.unlink(missing_ok=True)

    def recover(self, oldest: float = float("inf")) -> int:
        """Remove what an earlier process had under way, save partial blobs written to since `oldest` (seconds since the epoch).

        Returns how many files were removed. Before the first ingest.
        """
        removed = 0
        for path in self._ingest.iterdir():
            if not path.name.startswith(PARTIAL) or path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def drop_partial(self, oldest: float) -> int:
        """Remove partial blobs that nobody is bringing and that were not written to since `oldest`; returns their bytes on the disk."""
        freed = 0
        for path in self._ingest.glob(f"{PARTIAL}*"):
            if path.name.removeprefix(PARTIAL).replace(".", ":", 1) in self._coming:
                continue
            status = path.stat()
            if status.st_mtime < oldest:
                path.unlink(missing_ok=True)
                freed += status.st_blocks * 512
        return freed

    def suspend(self) -> None:
        """From now on blobs that are given up stay as they are, for the next process."""
        self.suspended = True

    def began(self, digest: str) -> None:
        """An ingest brings this blob."""
        self._coming.add(digest)

    def ended(self, digest: str) -> None:
        """It does not any more."""
        self._coming.discard(digest)

    def arrived(self, digest: str, size: int) -> None:
        """An ingest has put its blob in place."""
        self._sizes[digest] = size


class Ingest:
    """A blob that is coming in. One thread at a time writes, save by `write_at`; any number of readers follow.

    `written` bytes from the beginning are there and hashed; `restored` of them come from an earlier process.
    """

    def __init__(self, store: ContentStore, digest: str | None, size: int, path: Path) -> None:
        self.digest = digest or ""
        self.size = size
        self.written = 0
        self.restored = 0
        self.ended = False
        self._store = store
        self._path = path
        self._hash = hashlib.new(digest.partition(":")[0] if digest else "sha256")
        self._spans: dict[int, int] = {}
        self._absorbing = threading.Lock()
        self._partial = path.name.startswith(PARTIAL)
        fresh = 0 if self._partial else os.O_EXCL
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | fresh, 0o600)
        if self._partial:
            store.began(self.digest)
        self._grown = threading.Condition()
        self._failure: BaseException | None = None

    def write(self, chunks: Iterable[bytes]) -> None:
        """Append. Raises WrongContent as soon as there are more bytes than announced."""
        for chunk in chunks:
            if self.written + len(chunk) > self.size:
                raise WrongContent(f"blob {self.digest}", cause=f"more than the {self.size} bytes that it should have")
            done = 0
            while done < len(chunk):
                done += os.pwrite(self._descriptor, memoryview(chunk)[done:], self.written + done)
            self._hash.update(chunk)
            with self._grown:
                self.written += len(chunk)
                self._grown.notify_all()

    def restore(self) -> None:
        """Take over what an earlier process has brought, up to the first gap. Before the first write. Blocks for as long as hashing takes."""
        length = os.fstat(self._descriptor).st_size
        if not length:
            return
        gap = os.lseek(self._descriptor, 0, os.SEEK_HOLE)
        if gap < length:
            gap -= PAGE  # the page before a gap may be written in part
        end = max(0, min(gap, self.size))
        os.ftruncate(self._descriptor, end)
        self._absorb_to(end)
        self.restored = self.written

    def write_at(self, offset: int, chunks: Iterable[bytes]) -> None:
        """Write a piece ahead of its turn; several threads may, each for pieces of its own. Readers see it once all before it is there."""
        end = offset
        for chunk in chunks:
            if end + len(chunk) > self.size:
                raise WrongContent(f"blob {self.digest}", cause=f"more than the {self.size} bytes that it should have")
            done = 0
            while done < len(chunk):
                done += os.pwrite(self._descriptor, memoryview(chunk)[done:], end + done)
            end += len(chunk)
        with self._absorbing:
            self._spans[offset] = end
            while self.written in self._spans:
                self._absorb_to(self._spans.pop(self.written))

    def _absorb_to(self, end: int) -> None:
        """Hash what is in the file up to `end`, and let readers have it."""
        while self.written < end:
            data = os.pread(self._descriptor, min(CHUNK, end - self.written), self.written)
            self._hash.update(data)
            with self._grown:
                self.written += len(data)
                self._grown.notify_all()
            if not data:
                raise WrongContent(f"blob {self.digest}", cause="its file was cut short meanwhile")

    def settle(self) -> str:
        """The digest of what has come, which is the blob's from now on where it had none."""
        self.digest = self.digest or f"sha256:{self._hash.hexdigest()}"
        return self.digest

    def commit(self) -> None:
        """Verify, sync, and give the blob its name. Raises WrongContent."""
        if self.written != self.size:
            raise WrongContent(f"blob {self.digest}", cause=f"{self.written} bytes instead of {self.size}")
        algorithm = self.digest.partition(":")[0]
        if (actual := f"{algorithm}:{self._hash.hexdigest()}") != self.digest:
            raise WrongContent(f"blob {self.digest}", cause=f"the bytes that came have the digest {actual}")
        os.fsync(self._descriptor)
        target = self._store.path(self.digest)
        self._path.rename(target)
        sync_directory(target.parent)
        self.ended = True
        os.close(self._descriptor)
        self._done()
        self._store.arrived(self.digest, self.size)

    def _done(self) -> None:
        if self._partial:
            self._store.ended(self.digest)

    def abort(self, error: BaseException) -> None:
        """Drop what has come; readers raise Interrupted. Nothing happens after a commit or another abort."""
        if self.ended:
            return
        self.ended = True
        with self._grown:
            self._failure = error
            self._grown.notify_all()
        os.close(self._descriptor)
        self._done()
        if not (self._partial and self._store.suspended):
            self._path.unlink(missing_ok=True)

    def follow(self) -> Reader:
        """Read from the beginning, waiting for what has not come yet."""
        return Reader(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), self.size, self)

    def wait_beyond(self, offset: int, stopped: threading.Event) -> int:
        """How many bytes there are, more than `offset` of them. Raises Interrupted."""
        with self._grown:
            while self.written <= offset:
                if self._failure is not None or stopped.is_set():
                    raise Interrupted(f"blob {self.digest}", cause="it stopped coming")
                self._grown.wait()
            return self.written

    def wake(self) -> None:
        """Let readers look at whether they were stopped."""
        with self._grown:
            self._grown.notify_all()


class Reader:
    """Reads a blob from beginning to end, complete or still growing. `stop` may be called from another thread."""

    def __init__(self, descriptor: int, size: int, ingest: Ingest | None = None) -> None:
        self._descriptor = descriptor
        self._size = size
        self._ingest = ingest
        self._offset = 0
        self._stopped = threading.Event()

    def read(self) -> bytes:
        """The next bytes, at most CHUNK of them, b"" at the end. Raises Interrupted if they will not come."""
        if self._stopped.is_set():
            raise Interrupted("read blob", cause="it is not wanted any more")
        if self._offset >= self._size:
            return b""
        available = self._size if self._ingest is None else self._ingest.wait_beyond(self._offset, self._stopped)
        data = os.pread(self._descriptor, min(CHUNK, available - self._offset), self._offset)
        if not data:
            raise Interrupted("read blob", cause=f"its file ends after {self._offset} of {self._size} bytes")
        self._offset += len(data)
        return data

    def stop(self) -> None:
        """Make the reading thread raise Interrupted."""
        self._stopped.set()
        if self._ingest is not None:
            self._ingest.wake()

    def close(self) -> None:
        """Once, when nobody reads any more."""
        os.close(self._descriptor)
