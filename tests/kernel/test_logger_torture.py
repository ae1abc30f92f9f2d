"""Loggers killed at random while containers write as fast as they can and logs are rotated: the streams come out as they went in."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
from pathlib import Path

import pytest

from tare.launch import packets, wire
from tests.support.loggers import Box, Group

MEAN_LIFE = 0.003  # seconds that a logger has on average
F_SETPIPE_SZ = 1031


def lines(seed: str, count: int) -> bytes:
    """Numbered lines, some empty, some around the cut at 16 KiB, some of 76 KB, the last one unfinished."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        kind = chance.random()
        if kind < 0.006:
            size = chance.randrange(16000, 76000)
        elif kind < 0.012:
            size = 16384 - 9 + chance.randrange(-2, 3)
        else:
            size = 0 if kind < 0.06 else chance.randrange(180)
        made.append(b"%08d:" % number + bytes([97 + number % 26]) * size if size else b"")
    return b"\n".join(made) + b"\nunfinished"


def write(box: Box, content: dict[str, bytes], seed: str) -> int:
    """A process that writes to both streams in pieces of all sizes: its pidfd."""
    pid = os.fork()
    if pid:
        return os.pidfd_open(pid)
    try:
        chance = random.Random(seed)
        left = {name: memoryview(data) for name, data in content.items()}
        while any(left.values()):
            name = chance.choice([name for name, data in left.items() if data])
            size = chance.choice([7, 200, 4096, 9000, 70000])
            try:
                left[name] = left[name][os.write(box.writers[name], left[name][:size]) :]
            except BlockingIOError:
                select.select([], [box.writers[name]], [])
        os._exit(0)
    finally:
        os._exit(1)


class Chaos:
    """Kills, rotations and resizes until the writer has ended."""

    def __init__(self, group: Group, box: Box, chance: random.Random, resize: bool) -> None:
        self.group = group
        self.box = box
        self.chance = chance
        self.resize = resize
        self.rotated: list[Path] = []
        self.kills = 0

    def run(self, writer: int) -> None:
        while not select.select([writer], [], [], self.chance.expovariate(1 / MEAN_LIFE))[0]:
            asked = self.chance.random() < 0.2
            if asked:
                self.rotate()
            if self.resize:
                size = self.chance.choice([4096, 65536, 1 << 20])
                try:
                    fcntl.fcntl(self.box.spares[self.chance.randrange(2)], F_SETPIPE_SZ, size)
                except OSError as error:
                    assert error.errno == 16, error  # more is in it than would fit
            self.group.kill()
            self.kills += 1
            self.group.start()
            if asked:
                self.group.ask(wire.REOPEN, self.box.id)

    def rotate(self) -> None:
        """As the kubelet does: rename, then ask; the logger is killed before or while it does it, or after."""
        assert self.box.log is not None
        self.rotated.append(self.box.log.rename(self.box.log.with_suffix(f".{len(self.rotated)}")))
        with packets.connect(str(self.group.directory / "sock")) as connection:
            packets.send(connection, wire.REOPEN, 1, (self.box.id,))
            if self.chance.random() < 0.5:
                select.select([connection], [], [], MEAN_LIFE)


@pytest.mark.parametrize("kind", ["blocking", "nonblocking", "resized"])
def test_random_kills_lose_and_double_nothing(tmp_path: Path, kind: str) -> None:
    seed = os.environ.get("TARE_SEED") or str(random.randrange(1 << 32))
    print(f"TARE_SEED={seed}")
    content = {"stdout": lines(seed + "o", 100000), "stderr": lines(seed + "e", 50000)}
    with Group(tmp_path) as group:
        group.start()
        box = group.container("c1", begun=False)
        box.open(flags=os.O_NONBLOCK if kind == "nonblocking" else 0)
        group.add(box)
        chaos = Chaos(group, box, random.Random(seed), kind == "resized")
        writer = write(box, content, seed)
        try:
            chaos.run(writer)
            box.hang_up()
            group.ask(wire.DRAIN, box.id)
        finally:
            signal.pidfd_send_signal(writer, signal.SIGKILL)
            ended = os.waitid(os.P_PIDFD, writer, os.WEXITED)
            os.close(writer)
        assert ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
        said = box.said(*chaos.rotated)
        print(f"{chaos.kills} kills, {len(chaos.rotated)} rotations")
        assert chaos.kills > 5
        assert {name: data + b"\n" for name, data in content.items()} == said
