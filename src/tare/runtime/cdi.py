"""Devices by name, as vendors describe them on the node (Container Device Interface): found, and put into a container's configuration.

    vendor.com/class=name     asked for in CRI's cdi_devices, or in annotations "cdi.k8s.io/…" as a list with commas
    /etc/cdi, /var/run/cdi    unless the settings name others: files *.json and *.yaml; a device of a later directory hides an earlier one's

A device that two files of one directory describe cannot be used. A file that is wrong costs its own devices alone. Whether
something changed is looked at for each request, by names, inodes, sizes and times; only then are files read again.

    cdi_spec   one file        cdi_edits   what it changes        cdi   directories, names, requests
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from tare.errors import FailedPrecondition, InvalidArgument, NotFound, describe
from tare.runtime.cdi_edits import apply, look
from tare.runtime.cdi_spec import DEVICE_NAME, Edits, File, is_kind, parse
from tare.runtime.records import ContainerConfig
from tare.runtime.spec_types import Spec

log = logging.getLogger(__name__)

ANNOTATIONS = "cdi.k8s.io/"
ENDINGS = (".json", ".yaml")
FILE_LIMIT = 1 << 20

Mark = tuple[str, int, int, int, int]
"""(path, device, inode, size, time of the last change)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A device, and the file that describes it."""

    path: str
    file: File
    edits: Edits


@dataclass(slots=True)
class Known:
    """What the directories hold: devices by qualified name, those in conflict with their files, and files that are wrong."""

    devices: dict[str, Entry] = field(default_factory=dict)
    conflicts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def requested(config: ContainerConfig) -> tuple[str, ...]:
    """The names that a container asks for, each once, in order. Raises InvalidArgument for what is no qualified name."""
    names = list(config.cdi_devices)
    for key in sorted(config.annotations):
        if key.startswith(ANNOTATIONS):
            names += config.annotations[key].split(",")
    for name in names:
        check_name(name)
    return tuple(dict.fromkeys(names))


def check_name(name: str) -> None:
    """Raise InvalidArgument for what is not vendor/class=name."""
    kind, _, device = name.partition("=")
    vendor, _, class_name = kind.partition("/")
    if not is_kind(vendor, class_name) or not DEVICE_NAME.fullmatch(device):
        raise InvalidArgument(f"give the container CDI device {name!r}", cause="it is not vendor/class=name")


class Registry:
    """The devices that the node's CDI files describe. Its calls touch the file system: make them in a thread."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = tuple(directories)
        self._lock = threading.Lock()
        self._seen: object = None
        self._known = Known()

    def inject(self, spec: Spec, names: Sequence[str]) -> Spec:
        """The configuration with these devices in it. Raises as `resolve`, and for device nodes that are not on this node."""
        if not names:
            return spec
        edits = self.resolve(names)
        return apply(spec, edits, look(edits))

    def resolve(self, names: Sequence[str]) -> Edits:
        """What these devices change: for each its file's common edits, once, and its own.

        Raises InvalidArgument for what is no qualified name, NotFound for devices that no file describes, FailedPrecondition for those that
        two files of a directory describe.
        """
        for name in names:
            check_name(name)
        known = self.known()
        missing = [name for name in names if name not in known.devices and name not in known.conflicts]
        if missing:
            wrong = "; ".join(known.problems.values())
            raise NotFound(
                f"give the container CDI devices {', '.join(missing)}",
                cause=f"no file in {' or '.join(self._directories)} describes them",
                hint=f"some files are wrong: {wrong}" if wrong else None,
            )
        for name in names:
            if name in known.conflicts:
                cause = f"{' and '.join(known.conflicts[name])} describe it both"
                raise FailedPrecondition(f"give the container CDI device {name}", cause=cause)
        edits, seen = Edits(), set[str]()
        for name in dict.fromkeys(names):
            entry = known.devices[name]
            if entry.path not in seen:
                seen.add(entry.path)
                edits += entry.file.container_edits
            edits += entry.edits
        return edits

    def problems(self) -> tuple[str, ...]:
        """What is wrong with the files, and which devices two of them describe, in words."""
        known = self.known()
        conflicts = (f"{' and '.join(paths)} describe {name} both" for name, paths in sorted(known.conflicts.items()))
        return (*known.problems.values(), *conflicts)

    def known(self) -> Known:
        """What the directories hold now."""
        with self._lock:
            problems: dict[str, str] = {}
            marks = tuple(marks_of(directory, problems) for directory in self._directories)
            seen = (marks, tuple(problems.values()))
            if seen != self._seen:
                self._known = read(marks, problems)
                self._seen = seen
                for problem in self._known.problems.values():
                    log.warning("%s", problem)
            return self._known


def marks_of(directory: str, problems: dict[str, str]) -> tuple[Mark, ...]:
    """The CDI files of a directory, with what tells one version of them from another. A directory that cannot be read is a problem."""
    try:
        with os.scandir(directory) as entries:
            paths = sorted(entry.path for entry in entries if entry.name.endswith(ENDINGS))
    except FileNotFoundError:
        return ()
    except OSError as error:
        problems[directory] = f"read CDI directory {directory}: {describe(error)}"
        return ()
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            # It went, or it is a link to nothing.
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((path, status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns))
    return tuple(found)


def read(directories: Sequence[Sequence[Mark]], problems: dict[str, str]) -> Known:
    """All files, those of later directories over those of earlier ones."""
    known = Known(problems=problems)
    for marks in directories:
        here: dict[str, list[Entry]] = {}
        for path, *_ in marks:
            try:
                file = parse(path, content(path))
            except (InvalidArgument, OSError) as error:
                known.problems[path] = describe(error)
                continue
            for device in file.devices:
                entry = Entry(path, file, device.container_edits)
                here.setdefault(f"{file.kind}={device.name}", []).append(entry)
        for name, entries in here.items():
            known.devices.pop(name, None)
            known.conflicts.pop(name, None)
            if len(entries) > 1:
                known.conflicts[name] = tuple(entry.path for entry in entries)
            else:
                known.devices[name] = entries[0]
    return known


def content(path: str) -> bytes:
    """A file's bytes. Raises InvalidArgument where there are too many, OSError."""
    with open(path, "rb") as file:
        text = file.read(FILE_LIMIT + 1)
    if len(text) > FILE_LIMIT:
        raise InvalidArgument(f"read CDI file {path}", cause=f"it is larger than {FILE_LIMIT} bytes")
    return text
