"""CPU and memory of everything that a runtime runs: its processes live below one cgroup, where the kernel counts for us.

A runtime's daemon is started in `<name>/runtime`, where all that it starts stays (shims, runc, keeper, loggers), and its pods are
given `<name>/pods` as their parent. So what `<name>` used is what the runtime and its containers used, the dead included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
EMPTY_SECONDS = 20.0


def counting_hierarchy() -> tuple[Path, bool]:
    """Where CPU time is counted, and whether that is cgroup v2."""
    v1 = ROOT / "cpuacct"
    return (v1, False) if v1.is_dir() else (ROOT, True)


class Group:
    """The cgroup of one runtime. A context manager, which removes it in every hierarchy."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hierarchy, self.unified = counting_hierarchy()
        self.path = self.hierarchy / name

    def __enter__(self) -> Group:
        (self.path / "runtime").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def cgroup_parent(self) -> str:
        """What a pod's configuration says."""
        return f"/{self.name}/pods"

    def wrapper(self) -> list[str]:
        """The beginning of a command line that runs the rest of it inside."""
        return ["sh", "-c", f'echo 0 > {self.path}/runtime/cgroup.procs && exec "$@"', "sh"]

    def cpu_seconds(self) -> float:
        """CPU time used so far."""
        if not self.unified:
            return int((self.path / "cpuacct.usage").read_text()) / 1e9
        fields = dict(line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6

    def processes(self) -> list[int]:
        """All PIDs in it."""
        found = set()
        for directory, _, _ in os.walk(self.path):
            with contextlib.suppress(FileNotFoundError):
                found |= {int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()}
        return sorted(found)

    def remove(self) -> None:
        """Kill what is still in it, and remove it. Raises OSError where it stays busy."""
        deadline = time.monotonic() + EMPTY_SECONDS
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise OSError(f"{self.path} does not empty: {pids}")
            time.sleep(0.01)
        for hierarchy in hierarchies():
            for directory, _, _ in os.walk(hierarchy / self.name, topdown=False):
                os.rmdir(directory)


def hierarchies() -> Iterator[Path]:
    """The mount points of all cgroup hierarchies."""
    if not counting_hierarchy()[1]:
        yield from (path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink())
    else:
        yield ROOT


def pss(pid: int) -> int:
    """A process's proportional set size in bytes; 0 where it has ended. proc(5), smaps_rollup."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0
