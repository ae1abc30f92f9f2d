"""The code of the modules that commands import, in one file: Python's own way to a module takes longer than most take to run.

    /run/tare-oci.python/code-<version>-<directory of the package>
        a length (u32), an index (marshal), then the code of each module (marshal)
        index: (directory of the package, {module: (its file, what identifies that file's content, whether a package, offset, length)})

It is believed as a whole, or not at all: if it is root's own, and every file that it was made from is as it was. So no command runs
one module as it was and another as it is; a file that is old, damaged or missing costs time and nothing else. It is written after a
command that had to import something in Python's own way, beside its place and renamed, and not from a file that was changed so
lately that another change might leave no trace. Modules in C are in it by their path alone.
"""

import builtins
import marshal
import posix
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Identity = tuple[int, int, int, int]
    Entry = tuple[str, Identity, bool, int, int]

DIRECTORY = "/run/tare-oci.python"
LENGTH = 4
PACKAGE = __file__.rpartition("/tare/")[0]
FILE = f"{DIRECTORY}/code-{sys.hexversion:x}{PACKAGE.replace('/', '-')}"
SOURCE, EXTENSION = ".py", ".so"
SETTLED = 2_000_000_000  # nanoseconds after which a change of a file has another time than the one before
_before = frozenset(sys.modules) - {"tare", "tare.oci", __name__}
_stocks: "list[Stock]" = []


class Stock:
    """What `import` asks first, with the open file: it makes a module without the specification and locks of Python's own way."""

    def __init__(self, file: int, entries: "dict[str, Entry]", start: int) -> None:
        self.file = file
        self.entries = entries
        self.start = start
        self.otherwise: Callable[..., ModuleType] = builtins.__import__

    def load(
        self,
        name: str,
        globals: "Mapping[str, object] | None" = None,
        locals: "Mapping[str, object] | None" = None,
        fromlist: "Sequence[str] | None" = (),
        level: int = 0,
    ) -> "ModuleType":
        """As `__import__`."""
        if level or name not in self.entries:
            return self.otherwise(name, globals, locals, fromlist, level)
        module = sys.modules.get(name) or self.bring(name)
        for item in fromlist or ():
            child = f"{name}.{item}"
            if child in sys.modules or hasattr(module, item):
                continue
            if child not in self.entries:
                return self.otherwise(name, globals, locals, fromlist, level)
            self.bring(child)
        return module if fromlist else sys.modules[name.partition(".")[0]]

    def bring(self, name: str) -> "ModuleType":
        """Make a module, after the package that it is in."""
        parent, _, last = name.rpartition(".")
        if parent and parent not in sys.modules:
            self.bring(parent)
        path, _, package, *_ = self.entries[name]
        module = extension(name, path) if path.endswith(EXTENSION) else self.run(name, path, package)
        if parent:
            setattr(sys.modules[parent], last, module)
        return module

    def run(self, name: str, path: str, package: bool) -> "ModuleType":
        """A module that is its code's doing."""
        module = type(sys)(name)
        module.__file__ = path
        module.__package__ = name if package else name.rpartition(".")[0]
        if package:
            module.__path__ = [path.rpartition("/")[0]]
        sys.modules[name] = module
        try:
            exec(marshal.loads(self.part(name)), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def part(self, name: str) -> bytes:
        """The bytes of a module's code."""
        *_, offset, length = self.entries[name]
        return posix.pread(self.file, length, self.start + offset)


def extension(name: str, path: str) -> "ModuleType":
    """A module in C."""
    import _imp
    from _frozen_importlib import ModuleSpec

    spec = ModuleSpec(name, None, origin=path)
    module = sys.modules[name] = _imp.create_dynamic(spec)
    _imp.exec_dynamic(module)
    return module


def identity(path: str) -> "Identity":
    """What is different once a file has another content. Raises OSError."""
    status = posix.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def fresh(entry: "Entry") -> bool:
    """Whether a file is as it was."""
    try:
        return identity(entry[0]) == entry[1]
    except OSError:
        return False


def use() -> None:
    """Import from the file from now on, if there is one to be believed."""
    try:
        fd = posix.open(FILE, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return
    stock = opened(fd)
    if stock is None:
        posix.close(fd)
        return
    _stocks.append(stock)
    builtins.__import__ = stock.load


def leave() -> None:
    """Import in Python's own way from now on, in a process that is going to close the file."""
    if _stocks:
        builtins.__import__ = _stocks.pop().otherwise


def opened(fd: int) -> "Stock | None":
    """The open file, if it is to be believed."""
    status = posix.fstat(fd)
    length = int.from_bytes(posix.read(fd, LENGTH), "little")
    if status.st_uid or length > status.st_size:
        return None
    try:
        package, entries = marshal.loads(posix.read(fd, length))
        believed = package == PACKAGE and all(map(fresh, entries.values()))
    except (EOFError, ValueError, TypeError):
        return None
    return Stock(fd, entries, LENGTH + length) if believed else None


def keep() -> None:
    """Write all that was imported, if something of it came in Python's own way. Only root's own file would be believed."""
    found = unknown()
    if posix.geteuid() or not found:
        return
    entries: dict[str, Entry] = {}
    parts: list[bytes] = []
    try:
        for name, (path, known, package, data) in {**stocked(), **read(found)}.items():
            entries[name] = (path, known, package, sum(map(len, parts)), len(data))
            parts.append(data)
    except (OSError, Unsettled):
        return  # the next command writes it
    index = marshal.dumps((PACKAGE, entries))
    write(len(index).to_bytes(LENGTH, "little") + index + b"".join(parts))


class Unsettled(Exception):
    """A file is being changed."""


def unknown() -> "dict[str, ModuleSpec]":
    """What was imported from files that the one in use knows nothing of."""
    left_out = _before.union(*(stock.entries for stock in _stocks))
    found = {}
    for name, module in sys.modules.items():
        spec = getattr(module, "__spec__", None)
        if name not in left_out and spec is not None and (spec.origin or "").endswith((SOURCE, EXTENSION)):
            found[name] = spec
    return found


def stocked() -> "dict[str, tuple[str, Identity, bool, bytes]]":
    """What the file in use has."""
    return {
        name: (path, known, package, stock.part(name))
        for stock in _stocks
        for name, (path, known, package, *_) in stock.entries.items()
    }


def read(specs: "Mapping[str, ModuleSpec]") -> "dict[str, tuple[str, Identity, bool, bytes]]":
    """Modules' code as their files have it now. Raises Unsettled, OSError."""
    found = {}
    for name, spec in specs.items():
        path = str(spec.origin)
        known = identity(path)
        data = b"" if path.endswith(EXTENSION) else marshal.dumps(spec.loader.get_code(name))  # type: ignore[union-attr]
        if identity(path) != known or time.time_ns() - max(known[:2]) < SETTLED:
            raise Unsettled
        found[name] = (path, known, path.endswith("/__init__.py"), data)
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
