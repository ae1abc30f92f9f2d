"""What resctrl looks like to who uses it (kernel filesystems/resctrl.rst), for machines whose processor has none: a FUSE file system.

    info/last_cmd_status              why the last write was refused
    schemata  tasks  mon_groups/      the default class of service, in which everybody is
    <class>/schemata tasks mon_groups/<group>/tasks

A directory made in the root is a class, one made in mon_groups a group of counters, each with its files; who is written into `tasks` leaves
the class that he was in. The kernel's own name for the type of file system is not to be had by FUSE: whoever looks for it is told.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import string
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tare.launch import linux

HEADER, REPLY = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
ATTRIBUTES, ENTRY, ATTR_OUT = struct.Struct("<6Q10I"), struct.Struct("<4Q2I"), struct.Struct("<QII")
LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, RMDIR, OPEN, READ, WRITE = 1, 2, 3, 4, 9, 11, 14, 15, 16
STATFS, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR = 17, 18, 26, 27, 28, 29
DIRECT_IO = 1
ROOT = 1
HEXADECIMAL = "0123456789abcdef"
FULL = {"L3": {"0": 0xFFF, "1": 0xFFF}, "MB": {"0": 100, "1": 100}}


class Node:
    """A directory (`children` not None), or a file."""

    def __init__(self, number: int, parent: Node | None, *, directory: bool, text: str = "") -> None:
        self.number = number
        self.parent = parent
        self.children: dict[str, Node] | None = {} if directory else None
        self.text = text
        self.tasks: list[int] = []
        self.schemata = {resource: dict(domains) for resource, domains in FULL.items()}


class Resctrl:
    """The file system, served by a thread until `stop`. `group(path)` is a directory as it is now, "" the default class."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._numbers = itertools.count(ROOT)
        self._nodes: dict[int, Node] = {}
        self.root = self._class(None)
        info = self._add(self.root, "info", directory=True)
        self.status = self._add(info, "last_cmd_status", text="ok\n")
        self._answers: dict[int, Callable[[Node, int, bytes], bytes]] = {
            INIT: lambda *_: struct.pack("<4I2H2I2HI28x", 7, 31, 0, 0, 16, 12, 65536, 1, 16, 0, 0),
            LOOKUP: lambda node, _, data: self._entry(self._child(node, data)),
            GETATTR: lambda node, *_: ATTR_OUT.pack(0, 0, 0) + self._attributes(node),
            SETATTR: lambda node, *_: ATTR_OUT.pack(0, 0, 0) + self._attributes(node),
            MKDIR: self._mkdir,
            RMDIR: self._rmdir,
            OPEN: lambda *_: struct.pack("<QII", 0, DIRECT_IO, 0),
            OPENDIR: lambda *_: struct.pack("<QII", 0, 0, 0),
            READ: self._read,
            WRITE: self._write,
            READDIR: self._readdir,
            STATFS: lambda *_: struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0),
            RELEASE: lambda *_: b"",
            RELEASEDIR: lambda *_: b"",
        }
        self._thread = threading.Thread(target=self._serve, name="resctrl", daemon=True)
        self._thread.start()

    def group(self, path: str) -> Node | None:
        """None where there is no such directory."""
        node: Node | None = self.root
        for name in filter(None, path.split("/")):
            node = (node.children or {}).get(name) if node is not None else None
        return node

    def _serve(self) -> None:
        while True:
            try:
                packet = os.read(self._fd, 1 << 17)
            except OSError:  # unmounted
                return
            _, opcode, unique, number, _, _, pid, _ = HEADER.unpack_from(packet)
            if opcode == FORGET:
                continue
            try:
                answer = self._answers.get(opcode)
                if answer is None:
                    raise OSError(errno.ENOSYS, "")
                data, error = answer(self._nodes[number or ROOT], pid, packet[HEADER.size :]), 0
            except OSError as failure:
                data, error = b"", -(failure.errno or errno.EIO)
            with contextlib.suppress(OSError):  # whoever asked has been killed
                os.write(self._fd, REPLY.pack(REPLY.size + len(data), error, unique) + data)

    # Nodes

    def _add(self, parent: Node | None, name: str, *, directory: bool = False, text: str = "") -> Node:
        node = Node(next(self._numbers), parent, directory=directory, text=text)
        self._nodes[node.number] = node
        if parent is not None and parent.children is not None:
            parent.children[name] = node
        return node

    def _class(self, parent: Node | None, name: str = "") -> Node:
        made = self._add(parent, name, directory=True)
        for file in ("schemata", "tasks"):
            self._add(made, file)
        self._add(made, "mon_groups", directory=True)
        return made

    def _child(self, node: Node, data: bytes) -> Node:
        found = (node.children or {}).get(data.split(b"\0")[0].decode())
        if found is None:
            raise OSError(errno.ENOENT, "")
        return found

    def _name_of(self, node: Node) -> str:
        return next(name for name, child in ((node.parent and node.parent.children) or {}).items() if child is node)

    def _attributes(self, node: Node) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node.children is not None else stat.S_IFREG | 0o644
        return ATTRIBUTES.pack(node.number, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _entry(self, node: Node) -> bytes:
        return ENTRY.pack(node.number, 0, 0, 0, 0, 0) + self._attributes(node)

    # What can be done

    def _mkdir(self, node: Node, _: int, data: bytes) -> bytes:
        name = data[8:].split(b"\0")[0].decode()
        if node.children is None or (node is not self.root and self._name_of(node) != "mon_groups"):
            raise OSError(errno.EPERM, "")
        if name in node.children:
            raise OSError(errno.EEXIST, "")
        if node is self.root:
            return self._entry(self._class(node, name))
        made = self._add(node, name, directory=True)
        self._add(made, "tasks")
        return self._entry(made)

    def _rmdir(self, node: Node, _: int, data: bytes) -> bytes:
        gone = self._child(node, data)
        self.root.tasks += gone.tasks
        assert node.children is not None
        del node.children[data.split(b"\0")[0].decode()]
        return b""

    def _read(self, node: Node, _: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        return self._content(node).encode()[offset : offset + size]

    def _content(self, node: Node) -> str:
        name = self._name_of(node)
        assert node.parent is not None
        if name == "tasks":
            return "".join(f"{pid}\n" for pid in node.parent.tasks)
        if name == "schemata":
            shares = node.parent.schemata.items()
            return "".join(f"{kind:>6}:{';'.join(shown(kind, domains))}\n" for kind, domains in shares)
        return node.text

    def _write(self, node: Node, pid: int, data: bytes) -> bytes:
        size = struct.unpack_from("<QQI", data)[2]
        text = data[40 : 40 + size].decode()
        name, owner = self._name_of(node), node.parent
        assert owner is not None
        self.status.text = "ok\n"
        if name == "tasks":
            self._join(owner, int(text) or pid)
        elif name == "schemata":
            for line in text.splitlines():
                self._share(owner, line)
        else:
            raise OSError(errno.EPERM, "")
        return struct.pack("<II", size, 0)

    def _join(self, owner: Node, pid: int) -> None:
        counters = owner.parent is not None and owner.parent is not self.root
        alike = [node for node in self._nodes.values() if (node.parent not in (None, self.root)) == counters]
        for node in alike:
            node.tasks = [other for other in node.tasks if other != pid]
        owner.tasks.append(pid)

    def _share(self, owner: Node, line: str) -> None:
        kind, _, rest = line.partition(":")
        for part in rest.split(";"):
            domain, _, value = part.partition("=")
            digits = HEXADECIMAL if kind == "L3" else string.digits
            number = int(value, len(digits)) if value and set(value) <= set(digits) else 0
            if domain not in owner.schemata.get(kind, {}) or not 0 < number <= FULL[kind][domain]:
                self.status.text = f"Unknown or unsupported value in {line}\n"
                raise OSError(errno.EINVAL, "")
            owner.schemata[kind][domain] = number

    def _readdir(self, node: Node, _: int, data: bytes) -> bytes:
        offset = struct.unpack_from("<QQ", data)[1]
        listed = b""
        for index, (name, child) in enumerate((node.children or {}).items()):
            kind = stat.S_IFDIR >> 12 if child.children is not None else stat.S_IFREG >> 12
            raw = name.encode()
            listed += struct.pack("<QQII", child.number, index + 1, len(raw), kind) + raw + bytes(-len(raw) % 8)
        return listed if not offset else b""


def shown(kind: str, domains: dict[str, int]) -> list[str]:
    """A resource's shares as its file has them."""
    return [f"{domain}={value:x}" if kind == "L3" else f"{domain}={value}" for domain, value in domains.items()]


@contextlib.contextmanager
def resctrl(path: Path) -> Iterator[Resctrl]:
    """Mounted at a path, which is made."""
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % fd
        linux.mount(b"resctrl", bytes(path), b"fuse", 0, options)
        try:
            yield Resctrl(fd)
        finally:
            linux.umount(bytes(path), linux.MNT_DETACH)
    finally:
        os.close(fd)
