"""Small file systems of their own, to be filled: an ext4 on a loop device, and what fills it."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECTION = 1 << 16


def environment() -> dict[str, str]:
    """Where tools for file systems are found."""
    return {**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}


def image_of(point: Path) -> Path:
    """The file that a small disk is in."""
    return point.with_name("image")


@contextmanager
def small_disk(megabytes: int, *, inodes: int = 0, directory: str = "/var/lib") -> Iterator[Path]:
    """An ext4 of that size, with so many inodes, mounted at the path. No block is kept for root."""
    with tempfile.TemporaryDirectory(prefix="tare-disk-", dir=directory) as name:
        point = Path(name, "disk")
        image = image_of(point)
        point.mkdir()
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        options = ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0", *(["-N", str(inodes)] if inodes else [])]
        subprocess.run(
            ["mkfs.ext4", *options, image],
            check=True,
            timeout=60,
            env=environment(),
        )
        subprocess.run(["mount", "-o", "loop", image, point], check=True, timeout=60)
        try:
            yield point
        finally:
            subprocess.run(["umount", "-l", point], check=True, timeout=60)


def fill_bytes(directory: Path, name: str = "filler") -> Path:
    """Write until not one more byte can be."""
    path = directory / name
    with suppress_full(), path.open("ab", buffering=0) as file:
        for size in (1 << 20, SECTION, 4096, 512, 1):
            with suppress_full():
                while True:
                    file.write(bytes(size))
    os.sync()
    return path


def fill_inodes(directory: Path, name: str = "fillers") -> Path:
    """Make empty files until not one more can be."""
    path = directory / name
    with suppress_full():
        path.mkdir(exist_ok=True)
        number = len(os.listdir(path))
        while True:
            (path / str(number)).touch()
            number += 1
    return path


@contextmanager
def suppress_full() -> Iterator[None]:
    """Until ENOSPC."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def go_read_only(point: Path) -> None:
    """As the kernel does at an error of the disk, with all that is open: an emergency remount of this file system alone."""
    device = subprocess.run(
        ["findmnt", "-no", "SOURCE", point], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", point], check=True, timeout=20)
    Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("asked for")


def go_writable(point: Path) -> None:
    """And back, as somebody does it who has repaired it: nothing may use it meanwhile."""
    subprocess.run(["umount", point], check=True, timeout=20)
    fsck = subprocess.run(
        ["e2fsck", "-fy", image_of(point)], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert fsck.returncode in (0, 1), fsck.stdout  # 1: something was repaired
    subprocess.run(["mount", "-o", "loop", image_of(point), point], check=True, timeout=20)
