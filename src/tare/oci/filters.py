"""A configuration's seccomp filter as BPF, compiled once for each profile.

    <root>/.seccomp/<key>.bpf     the flags (u32), then the program; the key is a hash over the profile, the machine and libseccomp's file

Compiling takes libseccomp and modules that are slow to load (60 ms): with a program that is kept already none of them is touched.
The directory is root's alone, as all of <root>.
"""

from __future__ import annotations

import os

from tare.handlers.plans import Filter
from tare.launch import linux
from tare.oci import documents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

FORMAT = 2
FLAGS_SIZE = 4
NEW_LISTENER = 8  # SECCOMP_FILTER_FLAG_NEW_LISTENER
DIRECTORY = ".seccomp"
LISTENER = (
    "listenerPath",
    "listenerMetadata",
)  # where the listener goes: another for each container, and nothing of the program
LIBRARY = "libseccomp.so.2"
FOLDERS = ("/usr/lib/{}-linux-gnu/", "/lib/{}-linux-gnu/", "/usr/lib64/", "/usr/lib/", "/lib64/", "/lib/")


def of(spec: Mapping[str, Any], root: str) -> Filter | None:
    """The filter of linux.seccomp; None where there is none. Raises InvalidArgument, FailedPrecondition."""
    profile = (spec.get("linux") or {}).get("seccomp")
    if not profile:
        return None
    path = f"{root}/{DIRECTORY}/{key(profile)}.bpf"
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return compiled(profile, path)
    return filter_of(profile, data[FLAGS_SIZE:], int.from_bytes(data[:FLAGS_SIZE], "little"))


def filter_of(profile: Mapping[str, Any], program: bytes, flags: int) -> Filter:
    """A program as it is loaded; with a listener where some call is for one."""
    if not flags & NEW_LISTENER:
        return Filter(program=program, flags=flags)
    metadata = profile.get("listenerMetadata") or ""
    return Filter(program=program, flags=flags, listener=profile["listenerPath"], metadata=metadata)


def key(profile: Mapping[str, Any]) -> str:
    """A name for what a profile compiles to."""
    from _sha256 import sha256  # type: ignore[import-not-found]

    compiled_from = {name: value for name, value in profile.items() if name not in LISTENER}
    text = b"%d %b %b " % (FORMAT, os.uname().machine.encode(), library()) + documents.encoded(compiled_from)
    digest: str = sha256(text).hexdigest()
    return digest


def library() -> bytes:
    """Which libseccomp this is, by its file's time and size; nothing where it is not in a usual place: then a new one does not count."""
    for folder in FOLDERS:
        try:
            status = os.stat(folder.format(os.uname().machine) + LIBRARY)
        except OSError:
            continue
        return b"%d-%d" % (status.st_mtime_ns, status.st_size)
    return b""


def compiled(profile: Mapping[str, Any], path: str) -> Filter:
    """Compile, and keep the program."""
    from tare.runtime import seccomp_compile, seccomp_profile

    flags = seccomp_compile.filter_flags(profile)
    seccomp_profile.check_profile("of the container", profile)
    program = seccomp_compile.compile_profile(seccomp_compile.load_library(), profile)
    folder = path.rpartition("/")[0]
    os.makedirs(folder, mode=0o700, exist_ok=True)
    linux.replace_file(path, flags.to_bytes(FLAGS_SIZE, "little") + program)
    return filter_of(profile, program, flags)
