"""OOM kills in groups that somebody else may remove as soon as they are empty, as systemd does with a scope.

A group's counter goes with it. So it is read whenever the kernel says that it changed, which is before the killed process is gone, as a
rule; that is told at most every 10 ms. What is missed shows in the counter of the group above, which keeps what happened
below it: a kill there that no group has counted belongs to the one that vanished untold.

What has been counted is kept in a file, so that the same holds for a daemon that was away:

    {"groups": {PATH: kills}, "above": {PATH of the group above: kills there that some group has counted}}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
from collections.abc import Callable
from pathlib import Path

from tare.cgroups.core import oom_count
from tare.launch import linux

COUNTER = "memory.events"
LARGEST = 4096
GONE = -1


class Watch:
    """One group: `file` is its counter, held open (GONE once it is), `count` the kills that were seen."""

    __slots__ = ("count", "file", "parent")

    def __init__(self, file: int, parent: str, count: int) -> None:
        self.file = file
        self.parent = parent
        self.count = count


class Kills:
    """Watches groups of v2; of others nothing is known but what can be read when it is asked for.

    `opened` and `counted` are `Groups.open_file` and `Groups.oom_kills`; `kept` is the file.
    """

    def __init__(
        self, opened: Callable[[str, str, str], int | None], counted: Callable[[str], int], kept: Path
    ) -> None:
        self._opened = opened
        self._counted = counted
        self._kept = kept
        self._watches: dict[str, Watch] = {}
        self._by_file: dict[int, Watch] = {}
        self._before, self._above = self._load()
        self._poll: select.epoll | None = None

    def watch(self, path: str) -> None:
        """From now on, or again. Idempotent; nothing where there is no such group and never was, or it counts nothing."""
        if path in self._watches:
            return
        file, before = self._opened(path, "memory", COUNTER), self._before.pop(path, None)
        if file is None and before is None:
            return
        parent = path.rpartition("/")[0]
        if parent not in self._above:
            self._above[parent] = self._total(parent)
        # What a group that is new here has counted so far is counted above as well.
        watch = Watch(GONE if file is None else file, parent, self._counted(path) if before is None else before)
        self._watches[path] = watch
        if file is not None:
            self._by_file[file] = watch
            if self._poll is None:
                self._poll = select.epoll()
                asyncio.get_running_loop().add_reader(self._poll, self._changed)
            self._poll.register(file, select.EPOLLPRI)
            self._read(watch)
        self._save()

    def count(self, path: str) -> int:
        """How many there were. Also of a group that is gone, until it is forgotten."""
        watch = self._watches.get(path)
        if watch is None:
            return self._counted(path)
        self._read(watch)
        if watch.file == GONE:
            untold = self._total(watch.parent) - self._above[watch.parent]
            self._tell(watch, watch.count + untold)
        return watch.count

    def forget(self, path: str) -> None:
        """Watch it no more. Idempotent."""
        watch, before = self._watches.pop(path, None), self._before.pop(path, None)
        if watch is not None:
            self._let_go(watch)
        if watch is not None or before is not None:
            self._save()

    def close(self) -> None:
        """Watch nothing more; the next one goes on from the file."""
        for watch in self._watches.values():
            self._let_go(watch)
        self._watches.clear()
        if self._poll is not None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended
                asyncio.get_running_loop().remove_reader(self._poll)
            self._poll.close()
            self._poll = None

    def _total(self, parent: str) -> int:
        return self._counted(parent) if parent else 0

    def _changed(self) -> None:
        """Some counters may have."""
        assert self._poll is not None
        for file, _ in self._poll.poll(0):
            self._read(self._by_file[file])

    def _read(self, watch: Watch) -> None:
        """Reading is also what makes the next change one that is told."""
        if watch.file == GONE:
            return
        try:
            self._tell(watch, oom_count(os.pread(watch.file, LARGEST, 0).decode()))
        except OSError:
            # The group is gone (ENODEV).
            self._let_go(watch)

    def _tell(self, watch: Watch, count: int) -> None:
        """A group has so many now, and the one above has them too."""
        if count > watch.count:
            self._above[watch.parent] += count - watch.count
            watch.count = count
            self._save()

    def _let_go(self, watch: Watch) -> None:
        if watch.file == GONE:
            return
        assert self._poll is not None
        self._poll.unregister(watch.file)
        del self._by_file[watch.file]
        os.close(watch.file)
        watch.file = GONE

    def _load(self) -> tuple[dict[str, int], dict[str, int]]:
        """What an earlier one has kept."""
        try:
            kept = json.loads(self._kept.read_text())
            return dict(kept["groups"]), dict(kept["above"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or cut short by a crash of the node
            return {}, {}

    def _save(self) -> None:
        """Keep what is known of the groups that are watched, and of those that may be again."""
        groups = self._before | {path: watch.count for path, watch in self._watches.items()}
        parents = {path.rpartition("/")[0] for path in groups}
        self._above = {parent: count for parent, count in self._above.items() if parent in parents}
        linux.replace_file(str(self._kept), json.dumps({"groups": groups, "above": self._above}).encode())
