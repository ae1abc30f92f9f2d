"""The code of the modules that commands import, in files that are read at once: Python's own way to a module takes longer than most take to run.

    /run/tare-oci.python/code-<version>-<kind>-<directory of the package>
        (marshal) {module: (its file, what identifies that file's content, whether a package, its code)}

`kind` is "make" for the commands that make processes, "look" for the others. `tare-oci` reads its file and runs this module from it
before there is any import. It is believed as a whole, or not at all: if it is root's own, and every file that it was made from is as
it was. So no command runs one module as it was and another as it is; a file that is old, damaged or missing costs time and nothing
else. It is written after a command that had to import something in Python's own way, beside its place and renamed, and not from a
file that was changed so lately that another change might leave no trace. Modules in C are in it by their path alone.

What few commands need (compiling a filter, say) is not kept: all of a file is read each time.
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
    from types import CodeType, ModuleType

    Identity = tuple[int, int, int, int]
    Entry = tuple[str, Identity, bool, CodeType | None]

DIRECTORY = "/run/tare-oci.python"
SOURCE, EXTENSION = ".py", ".so"
SETTLED = 2_000_000_000  # nanoseconds after which a change of a file has another time than the one before
RARE = ("tare.runtime.", "tare.images.", "tare.config.")
NEEDED = ("__future__", "struct", "_ctypes", "_json", "mmap", "resource")
_stocks: "list[Stock]" = []


class Stock:
    """What `import` asks first: it makes a module without the specification and locks of Python's own way."""

    def __init__(self, entries: "dict[str, Entry]") -> None:
        self.entries = entries
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
            if hasattr(module, item):
                continue
            child = f"{name}.{item}"
            if child not in self.entries:
                return self.otherwise(name, globals, locals, fromlist, level)
            self.bring(child)
        return module if fromlist else sys.modules[name.partition(".")[0]]

    def bring(self, name: str) -> "ModuleType":
        """Make a module, after the package that it is in."""
        parent, _, last = name.rpartition(".")
        if parent and parent not in sys.modules:
            self.bring(parent)
        path, _, package, code = self.entries[name]
        module = sys.modules.get(name)  # this one is there, and not yet known to its package
        if module is None:
            module = extension(name, path) if code is None else self.run(name, path, package, code)
        if parent:
            setattr(sys.modules[parent], last, module)
        return module

    def run(self, name: str, path: str, package: bool, code: "CodeType") -> "ModuleType":
        """A module that is its code's doing."""
        module = type(sys)(name)
        module.__file__ = path
        module.__package__ = name if package else name.rpartition(".")[0]
        if package:
            module.__path__ = [path.rpartition("/")[0]]
        sys.modules[name] = module
        try:
            exec(code, module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module


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


def use(entries: "dict[str, Entry]") -> None:
    """Import from these from now on. Raises LookupError where they are not to be believed."""
    if not all(map(fresh, entries.values())):
        raise LookupError
    stock = Stock(entries)
    _stocks.append(stock)
    builtins.__import__ = stock.load


def leave() -> None:
    """Import in Python's own way from now on, in a process that is going to be a container's."""
    if _stocks:
        builtins.__import__ = _stocks.pop().otherwise


def keep(file: str) -> None:
    """Write all that was imported and is not rare, if something of it came in Python's own way. Only root's own file would be believed."""
    found = unknown()
    if not file or posix.geteuid() or not found:
        return
    try:
        entries = {**(_stocks[0].entries if _stocks else {}), **read(found)}
    except (OSError, Unsettled):
        return  # the next command writes it
    write(file, marshal.dumps(entries))


class Unsettled(Exception):
    """A file is being changed."""


def unknown() -> "dict[str, ModuleSpec]":
    """What was imported from files that the one in use knows nothing of."""
    known = _stocks[0].entries if _stocks else {}
    found = {}
    for name, module in sys.modules.items():
        spec = getattr(module, "__spec__", None)
        if name not in known and kept(name) and spec is not None and str(spec.origin).endswith((SOURCE, EXTENSION)):
            found[name] = spec
    return found


def kept(name: str) -> bool:
    """Whether a module is one that most commands need."""
    return name in NEEDED or (name.partition(".")[0] == "tare" and not f"{name}.".startswith(RARE))


def read(specs: "Mapping[str, ModuleSpec]") -> "dict[str, Entry]":
    """Modules' code as their files have it now. Raises Unsettled, OSError."""
    found: dict[str, Entry] = {}
    for name, spec in specs.items():
        path = str(spec.origin)
        known = identity(path)
        code = None if path.endswith(EXTENSION) else spec.loader.get_code(name)  # type: ignore[union-attr]
        if identity(path) != known or time.time_ns() - max(known[:2]) < SETTLED:
            raise Unsettled
        found[name] = (path, known, path.endswith("/__init__.py"), code)
    return found


def write(file: str, data: bytes) -> None:
    """The file, whole or not at all. Where it cannot be, the next command starts as slowly as this one."""
    draft = f"{file}.{posix.getpid()}"
    try:
        fd = posix.open(draft, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[posix.write(fd, view) :]
        finally:
            posix.close(fd)
        posix.rename(draft, file)
    except OSError:
        return
