"""The code of the modules that commands import, in one file: Python looks for each in several directories, and that is half of a start.

    /run/tare-oci.python/code-<version>    a length (u32), an index (marshal), then the code of each module (marshal)
        index: (directory of the package, {module: (source, its mtime in ns, its size, whether a package, offset, length)})

It is written after a command that had to import something in Python's own way, and holds all that was imported. A module whose source
is not as it was is imported in Python's own way; so a file that is old, damaged or missing costs time and nothing else. It is believed
only if it is root's own, as the sources are.
"""

from __future__ import annotations

import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, ModuleType

    Entry = tuple[str, int, int, bool, int, int]

DIRECTORY = "/run/tare-oci.python"
FILE = f"{DIRECTORY}/code-{sys.hexversion:x}"
LENGTH = 4
PACKAGE = __file__.rpartition("/tare/")[0]
_before = frozenset(sys.modules)


class Stock:
    """A finder and loader of modules, from the file's bytes."""

    def __init__(self, data: bytes, entries: dict[str, Entry], start: int) -> None:
        self.data = data
        self.entries = entries
        self.start = start

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A module's spec; None where it is not here, or not as its source is now."""
        entry = self.entries.get(name)
        if entry is None or not fresh(entry):
            return None
        source, _, _, package, _, _ = entry
        spec = ModuleSpec(name, self, origin=source, is_package=package)  # type: ignore[arg-type]
        spec.has_location = True
        if package:
            spec.submodule_search_locations = [source.rpartition("/")[0]]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run its code."""
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, name: str) -> CodeType:
        """A module's code."""
        *_, offset, length = self.entries[name]
        first = self.start + offset
        code: CodeType = marshal.loads(self.data[first : first + length])
        return code


def fresh(entry: Entry) -> bool:
    """Whether a source is as it was."""
    try:
        status = posix.stat(entry[0])
    except OSError:
        return False
    return (status.st_mtime_ns, status.st_size) == entry[1:3]


def use() -> None:
    """Import from the file from now on, if there is one."""
    try:
        fd = posix.open(FILE, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return
    try:
        status = posix.fstat(fd)
        data = posix.read(fd, status.st_size) if status.st_uid == 0 else b""
    finally:
        posix.close(fd)
    try:
        length = int.from_bytes(data[:LENGTH], "little")
        package, entries = marshal.loads(data[LENGTH : LENGTH + length])
    except (EOFError, ValueError, TypeError):
        return
    if package == PACKAGE:
        sys.meta_path.insert(0, Stock(data, entries, LENGTH + length))


def keep() -> None:
    """Write all that was imported, if something of it came in Python's own way. Only root's own file would be believed."""
    found = {
        name: module.__spec__
        for name, module in list(sys.modules.items())
        if name not in _before and getattr(module, "__spec__", None) is not None
    }
    sources = {name: spec for name, spec in found.items() if spec is not None and (spec.origin or "").endswith(".py")}
    if posix.geteuid() or all(isinstance(spec.loader, Stock) for spec in sources.values()):
        return
    entries: dict[str, Entry] = {}
    parts: list[bytes] = []
    for name, code in codes(sources).items():
        source = str(sources[name].origin) if name in sources else stock_of(name)[0]
        status = posix.stat(source)
        part = marshal.dumps(code)
        package = source.endswith("/__init__.py")
        entries[name] = (source, status.st_mtime_ns, status.st_size, package, sum(map(len, parts)), len(part))
        parts.append(part)
    index = marshal.dumps((PACKAGE, entries))
    write(len(index).to_bytes(LENGTH, "little") + index + b"".join(parts))


def stocks() -> list[Stock]:
    """The one in use, if any."""
    return [finder for finder in sys.meta_path if isinstance(finder, Stock)]


def stock_of(name: str) -> Entry:
    """What the one in use says of a module."""
    return stocks()[0].entries[name]


def codes(sources: dict[str, ModuleSpec]) -> dict[str, CodeType]:
    """The code of what was imported now, and of what was here before and is fresh."""
    found: dict[str, CodeType] = {}
    for stock in stocks():
        for name, entry in stock.entries.items():
            if name not in sources and fresh(entry):
                found[name] = stock.get_code(name)
    for name, spec in sources.items():
        code = getattr(spec.loader, "get_code", lambda _: None)(name)
        if code is not None:
            found[name] = code
    return found


def write(data: bytes) -> None:
    """The file, whole or not at all. Where it cannot be, the next command starts as slowly as this one."""
    draft = f"{FILE}.{posix.getpid()}"
    try:
        fd = posix.open(draft, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[posix.write(fd, view) :]
        finally:
            posix.close(fd)
        posix.rename(draft, FILE)
    except OSError:
        return
