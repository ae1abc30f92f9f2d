"""A logger killed at any opcode, or at random under load: no byte of output is lost or doubled, no line is malformed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tare.launch import wire
from tests.support.loggers import Group

# How many of a scenario's opcodes are tried; TARE_EXHAUSTIVE=1 tries all (a quarter of an hour).
SAMPLE = 300

FIRST = b"".join(b"line %05d %s\n" % (number, b"y" * (number % 300)) for number in range(150)) + b"z" * 20000
SECOND = b"\n" + b"".join(b"more %05d\n" % number for number in range(50)) + b"last without newline"


class Mortal(Group):
    """A group whose first logger is killed before one opcode, and the second before another (0: not at all)."""

    def __init__(self, base: Path, *kills: int) -> None:
        super().__init__(base)
        self.kills = iter(kills)

    def start(self, *, kill_at: int = 0, before: Callable[[], None] | None = None) -> int:
        return super().start(kill_at=kill_at or next(self.kills, 0), before=before)


def scenario(base: Path, *kills: int) -> int:
    """Everything that a logger does, with some of them killed: how many were."""
    with Mortal(base, *kills) as group:
        group.start()
        box = group.container("c1")
        assert box.log is not None
        group.add(box)
        os.write(box.writers["stdout"], FIRST)
        os.write(box.writers["stderr"], b"an error")
        group.settle(box)
        rotated = box.log.rename(box.log.with_suffix(".1"))
        group.ask(wire.REOPEN, box.id)
        os.write(box.writers["stdout"], SECOND)
        os.write(box.writers["stderr"], b" goes on\n")
        box.hang_up()
        group.ask(wire.DRAIN, box.id)
        assert box.said(rotated) == {"stdout": FIRST + SECOND + b"\n", "stderr": b"an error goes on\n"}
        group.ask(wire.REMOVE, box.id)
        assert os.listdir(group.directory / "slots") == []
        return group.deaths


def points(base: Path) -> Iterator[int]:
    """Opcodes to be killed at."""
    low, high = 1, 1 << 14
    while low < high:  # the last opcode at which there is still something to kill
        middle = (low + high) // 2
        if scenario(base / f"probe{middle}", middle):
            low = middle + 1
        else:
            high = middle
    seed = random.randrange(1 << 32)
    print(f"{low} opcodes, seed {seed}")
    chosen = random.Random(seed)
    everything = range(1, low)
    yield from everything if os.environ.get("TARE_EXHAUSTIVE") else sorted(chosen.sample(everything, SAMPLE))


def test_killed_before_an_opcode_and_again(tmp_path: Path) -> None:
    deaths = 0
    for point in points(tmp_path):
        deaths += scenario(tmp_path / str(point), point, random.randrange(1, 3000))
    assert deaths > SAMPLE
