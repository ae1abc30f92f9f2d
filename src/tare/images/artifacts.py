"""OCI artifacts as directories: each blob is a file, named by its title (OCI image spec, "Pre-defined annotation keys"), else by its digest.

An artifact is a manifest whose configuration is no image's (OCI image spec v1.1, "Guidelines for Artifact Usage"). It has no
file system of its own; its directory is kept among the layers under the manifest's digest, and is good for image volumes. Files are hard
links to the blobs, which are therefore kept as long as the artifact is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from tare.images.layer import LayerError, normalise, show
from tare.images.manifest import Descriptor, ManifestError
from tare.images.unpack import PAGE, Unpacked
from tare.storage.content import CHUNK

TITLE = "org.opencontainers.image.title"
MODE = 0o444


class DamagedBlob(ManifestError):
    """A stored blob is not what its name says."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"read blob {digest}", cause="the stored copy is damaged")
        self.digest = digest


def names(blobs: Iterable[Descriptor]) -> dict[bytes, Descriptor]:
    """What each file of an artifact is called: a path relative to its directory. Raises ManifestError for paths that cannot be or clash."""
    files: dict[bytes, Descriptor] = {}
    for blob in blobs:
        title = (blob.annotations or {}).get(TITLE, "")
        try:
            path = (
                normalise(title.encode("utf-8", "surrogateescape")) if title else blob.digest.replace(":", "-").encode()
            )
        except LayerError as error:
            raise ManifestError("read artifact", cause=f"a blob's title cannot be a file's name: {error}") from error
        if not path:
            raise ManifestError("read artifact", cause=f"the title {title[:100]!r} of {blob.digest} names no file")
        if files.setdefault(path, blob).digest != blob.digest:
            raise ManifestError("read artifact", cause=f"two blobs have the title {show(path)}")
    for path in files:
        above = path
        while above := above.rpartition(b"/")[0]:
            if above in files:
                raise ManifestError("read artifact", cause=f"{show(above)} is a file and a directory")
    return files


def assemble(directory: Path, files: Sequence[tuple[bytes, str, Path]]) -> Unpacked:
    """Make a new `directory` of files, each a path, a digest, and the blob of that digest. Blocks.

    Raises DamagedBlob, OSError; nothing of the directory is left then.
    """
    try:
        return _assemble(directory, files)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _assemble(directory: Path, files: Sequence[tuple[bytes, str, Path]]) -> Unpacked:
    folders = {b""}
    copied = 0
    make_folder(directory)
    for path, digest, blob in files:
        check(blob, digest)
        parts = path.split(b"/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = b"/".join(parts[:depth])
            if folder not in folders:
                make_folder(directory / os.fsdecode(folder))
                folders.add(folder)
        copied += put(blob, directory / os.fsdecode(path))
    pages = (copied + PAGE - 1) // PAGE * PAGE
    return Unpacked(size=pages + len(folders) * PAGE, inodes=len(folders), implied=frozenset(folders))


def make_folder(path: Path) -> None:
    """A directory of mode 0755, whatever the umask."""
    path.mkdir()
    path.chmod(0o755)


def put(blob: Path, target: Path) -> int:
    """A blob under another name; returns how many bytes that took anew (a copy where the two are on different disks)."""
    blob.chmod(MODE)  # nobody but root comes to where blobs lie
    try:
        os.link(blob, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK):
            raise
        shutil.copyfile(blob, target)
        target.chmod(MODE)
        return target.stat().st_size
    return 0


def check(blob: Path, digest: str) -> None:
    """Raise DamagedBlob unless a file has this digest."""
    algorithm = digest.partition(":")[0]
    found = hashlib.new(algorithm)
    try:
        with blob.open("rb", buffering=0) as file:
            while data := file.read(CHUNK):
                found.update(data)
    except FileNotFoundError as error:
        raise DamagedBlob(digest) from error
    if f"{algorithm}:{found.hexdigest()}" != digest:
        raise DamagedBlob(digest)
