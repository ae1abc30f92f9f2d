"""A systemd to test against: the node's where it runs the node, else one of the test's own.

The test's own is a user manager in a PID namespace and in control groups that belong to it alone.
A manager takes every process of the group that it finds itself in under its wing. So it starts in a group of its own, in every
hierarchy, and only after it has looked that it is there; and what its namespace does not show it, it cannot move.
It answers only whom it sees: a relay in its namespace passes bytes on.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tare.cgroups.choose import running
from tare.cgroups.manager import CgroupManager
from tare.cgroups.systemd import BUS, PRIVATE

NUMBERS = itertools.count()

START = """
import os, sys
group, joins = sys.argv[1], sys.argv[2].split(":")
for path in joins:
    open(path, "w").write("0")
for line in open("/proc/self/cgroup"):
    if line.rstrip().split(":", 2)[2] != group:
        sys.exit(f"this is not a group of its own: {line}")
script = '''
mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system || exit 1
/lib/systemd/systemd --user --unit=tare-test.target &
exec "$0" -c "$1" "$2"
'''
inside = ["sh", "-c", script, sys.executable, sys.argv[3], sys.argv[4]]
os.execvp("unshare", ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", *inside])
"""

RELAY = """
import asyncio, os, socket, sys
async def pump(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
async def serve(reader, writer):
    there, back = await asyncio.open_unix_connection(sys.argv[1] + "/run/systemd/private")
    await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
async def main():
    async with await asyncio.start_unix_server(serve, sys.argv[1] + "/private"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.sendto(b"RELAY=1", os.environ["NOTIFY_SOCKET"])
        await asyncio.Event().wait()
asyncio.run(main())
"""

ENTER = """
import os, sys
from tare.launch import linux
namespace = os.open(f"/proc/{sys.argv[1]}/ns/pid_for_children", os.O_RDONLY)
linux.setns(namespace, linux.CLONE_NEWPID)
if os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(7)
os.wait()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """`addresses` are its sockets; `group` the control group that is its root; `pid` a process whose children are in its PID namespace.

    `node`: it is the node's.
    """

    addresses: tuple[str, ...]
    group: str
    pid: int

    @property
    def node(self) -> bool:
        """Whether it runs the node."""
        return not self.group

    @contextmanager
    def process(self) -> Iterator[tuple[int, subprocess.Popen[str]]]:
        """(its PID as systemd sees it, its parent): a process that ends when its input does."""
        command = [sys.executable, "-c", ENTER, str(self.pid)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.stdin.close()
            process.wait(20)
            process.stdout.close()


@contextmanager
def instance() -> Iterator[Instance]:
    """Run until the block ends; nothing of it is left."""
    if running():
        yield Instance(addresses=(BUS, PRIVATE), group="", pid=os.getpid())
        return
    group = f"/tare-systemd-{os.getpid()}-{next(NUMBERS)}"
    groups = CgroupManager()
    home = Path(tempfile.mkdtemp(prefix="tare-systemd-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        joins = groups.create(group, {}).join
        process = start(group, joins, home)
        yield Instance(addresses=(f"unix:path={home}/private",), group=group, pid=process.pid)
    finally:
        if process is not None:
            process.kill()
            process.wait(20)
        asyncio.run(groups.kill(group))
        asyncio.run(groups.remove(group))
        groups.close()
        shutil.rmtree(home)


def start(group: str, joins: tuple[str, ...], home: Path) -> subprocess.Popen[bytes]:
    """The parent of the manager, when that has said that it is ready."""
    units = home / "units"
    for directory in (units, home / "run"):
        directory.mkdir(mode=0o700)
    (units / "tare-test.target").write_text("[Unit]\nDescription=Nothing but a manager\nDefaultDependencies=no\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{home}/ready")
        ready.settimeout(30)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_RUNTIME_DIR": f"{home}/run",
            # With what it makes itself, which it looks for where it usually is.
            "SYSTEMD_UNIT_PATH": f"{units}:",
            "NOTIFY_SOCKET": f"{home}/ready",
        }
        command = [sys.executable, "-c", START, group, ":".join(joins), RELAY, str(home)]
        with open(home / "log", "wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            awaited = {b"READY=1", b"RELAY=1"}
            while awaited:
                awaited -= set(ready.recv(4096).splitlines())
        except BaseException:
            process.kill()
            process.wait(20)
            sys.stderr.write((home / "log").read_text())
            raise
    return process
