"""The guest's kernel: Debian 13's cloud kernel, fetched by apt, unpacked so that it boots fast under emulation.

apt works with directories of its own, so the machine's apt state is untouched, and checks what it fetches by Debian's archive keys.
Kept under ~/.cache/tare-vm (or XDG_CACHE_HOME) until that is removed:

    kernel/version              the kernel's release; written last, so where it is the rest is whole
    kernel/vmlinux              the ELF out of the package's bzImage: the guest need not unpack it
    kernel/modules/RELEASE/     its modules, not compressed, with depmod's indexes

Running it is `machine`'s.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITE = "trixie"
META_PACKAGE = "linux-image-cloud-amd64"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SOURCES = Path("/etc/apt")
MIRROR = "http://deb.debian.org/debian"
ELF = b"\x7fELF"
ZSTD = b"\x28\xb5\x2f\xfd"
FETCH_SECONDS = 300


class KernelUnavailable(Exception):
    """There is no kernel to boot; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel ready to boot. `modules` is what the guest wants at /lib/modules, with a folder `release` in it."""

    release: str
    image: Path
    modules: Path


def cache() -> Path:
    """Where fetched things are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tare-vm"


def prepare(directory: Path) -> Kernel:
    """The kernel kept in `directory`, fetched first if there is none. Raises KernelUnavailable."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "kernel"
    with locked(directory / "lock"):
        if not (target / "version").exists():
            shutil.rmtree(target, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix="fetch-") as work:
                build(fetch(Path(work)), Path(work) / "kernel")
                (Path(work) / "kernel").rename(target)
    release = (target / "version").read_text().strip()
    return Kernel(release=release, image=target / "vmlinux", modules=target / "modules")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mirror(sources: str) -> str:
    """The Debian mirror that apt's source lists (either format) name; the security archive is none."""
    lines = (line for line in sources.splitlines() if not line.lstrip().startswith("#"))
    found = re.search(r"\bhttps?://[^\s/]\S*/debian/?(?=\s|$)", "\n".join(lines))
    return found[0] if found else MIRROR


def source_lists() -> str:
    """The text of apt's source lists."""
    files = [SOURCES / "sources.list", *sorted(SOURCES.glob("sources.list.d/*"))]
    return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())


def fetch(work: Path) -> Path:
    """The kernel's package, fetched into `work` and unpacked there. Returns the unpacked tree."""
    print(f"test-vm: fetching Debian {SUITE}'s kernel", file=sys.stderr, flush=True)
    for part in ("lists/partial", "cache/archives/partial", "sources", "tree"):
        (work / part).mkdir(parents=True)
    (work / "sources/guest.sources").write_text(
        f"Types: deb\nURIs: {mirror(source_lists())}\nSuites: {SUITE}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    (work / "apt.conf").write_text(
        f'Dir::State::lists "{work}/lists";\nDir::Cache "{work}/cache";\n'
        f'Dir::Etc::SourceList "/dev/null";\nDir::Etc::SourceParts "{work}/sources";\n'
        # The fetching user _apt cannot enter a cache in somebody's home.
        'APT::Architecture "amd64";\nAPT::Sandbox::User "root";\nAcquire::Languages "none";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C.UTF-8"}
    run(["apt-get", "-q", "update", "--error-on=any"], work, environment)
    depends = run(["apt-cache", "depends", "--important", META_PACKAGE], work, environment)
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    if package is None:
        raise KernelUnavailable(f"{META_PACKAGE} of {SUITE} depends on no kernel: {depends.strip()}")
    run(["apt-get", "-q", "download", package[1]], work, environment)
    run(["dpkg-deb", "-x", str(next(work.glob("*.deb"))), str(work / "tree")], work, environment)
    return work / "tree"


def run(command: list[str], work: Path, environment: dict[str, str]) -> str:
    """A command's standard output. Raises KernelUnavailable with what it said."""
    try:
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise KernelUnavailable(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def build(tree: Path, target: Path) -> None:
    """What `prepare` promises, from an unpacked package."""
    (release,) = (entry.name for entry in (tree / "usr/lib/modules").iterdir())
    (target / "lib").mkdir(parents=True)
    (target / "vmlinux").write_bytes(elf((tree / "boot" / f"vmlinuz-{release}").read_bytes()))
    modules = target / "modules"
    (tree / "usr/lib/modules").rename(modules)
    for packed in modules.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    (target / "lib/modules").symlink_to("../modules")
    run(["depmod", "-b", str(target), release], target, dict(os.environ))
    (target / "version").write_text(f"{release}\n")


def elf(image: bytes) -> bytes:
    """The kernel as ELF out of a bzImage with a zstd payload (Linux Documentation/arch/x86/boot.rst). Raises KernelUnavailable.

    The payload's last four bytes are its length unpacked, not part of the zstd frame.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise KernelUnavailable("the package's kernel is not a bzImage")
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length - 4]
    if not payload.startswith(ZSTD):
        raise KernelUnavailable(f"the kernel's payload is not zstd: it begins with {payload[:4].hex()}")
    plain = unzstd(payload)
    if not plain.startswith(ELF):
        raise KernelUnavailable(f"the kernel's payload is not ELF: it begins with {plain[:4].hex()}")
    return plain


def unzstd(data: bytes) -> bytes:
    """One zstd frame, unpacked."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.decompress(data)
