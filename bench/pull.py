"""Cold pulls: Tare beside containerd and beside skopeo + umoci, from one registry on this machine, by turns.

    .venv/bin/python -m bench.pull [-n TURNS] [--scale PART] [--only NAME] [--json FILE]

Wall time and user CPU time are the least of all turns (creating files gets slower for a while after large removals); memory is the most
that a daemon's processes held during a pull, over what they held before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import peers
from bench.compare import interrupted, temporary, versions
from bench.groups import Group
from bench.images import PAUSE, make
from bench.peers import Peer
from tare.cli.output import print_table
from tare.cri.v1 import api_pb2
from tests.support.images import Node, make_image
from tests.support.registry import Registry

PULL_SECONDS = 600.0
WORDS = 1 << 16
BY_HAND = "skopeo+umoci"


@dataclass(frozen=True)
class Subject:
    """An image to pull: files in all, their bytes in all, layers, compression."""

    name: str
    files: int
    bytes: int
    layers: int
    compression: str


SUBJECTS = (
    Subject("one-gzip", 6_000, 300 << 20, 1, "gzip"),
    Subject("eight-gzip", 20_000, 148 << 20, 8, "gzip"),
    Subject("one-zstd", 6_000, 300 << 20, 1, "zstd"),
    Subject("eight-zstd", 20_000, 148 << 20, 8, "zstd"),
)


@dataclass
class Samples:
    """Seconds of wall and of user CPU time, and bytes, of each pull."""

    wall: list[float] = field(default_factory=list)
    user: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def layout(directory: Path, subject: Subject, scale: float) -> Path:
    """An image of words in random order, which shrinks to about a third, in directories of 50 files."""
    chance = random.Random(subject.name)
    words = [chance.randbytes(chance.randrange(3, 9)).hex().encode() for _ in range(WORDS)]
    count = max(1, int(subject.files * scale / subject.layers))
    size = subject.bytes // subject.files
    layers: list[dict[str, Node]] = []
    for number in range(subject.layers):
        tree: dict[str, Node] = {}
        for index in range(count):
            text = b" ".join(chance.choices(words, k=size // 12))
            tree[f"l{number}/d{index // 50}/f{index}"] = text[:size]
        layers.append(tree)
    return make_image(directory, layers, compression=subject.compression)


def user_seconds(group: Group) -> float:
    """User CPU time of everything in a cgroup."""
    if not group.unified:
        return int((group.path / "cpuacct.usage_user").read_text()) / 1e9
    fields = dict(line.split() for line in (group.path / "cpu.stat").read_text().splitlines())
    return int(fields["user_usec"]) / 1e6


def resident(group: Group, field_name: str) -> int:
    """VmRSS, or VmHWM, of a cgroup's processes together, in bytes."""
    total = 0
    for pid in group.processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(f"{field_name}:"):
                    total += int(line.split()[1]) * 1024
    return total


def forget_peak(group: Group) -> None:
    """VmHWM starts anew (proc(5), clear_refs)."""
    for pid in group.processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def pull(peer: Peer, image: str, samples: Samples) -> None:
    """One cold pull over CRI, and the image removed again. Raises CallFailed."""
    client, spec = peer.client, api_pb2.ImageSpec(image=image)
    forget_peak(peer.group)
    before, cpu = resident(peer.group, "VmRSS"), user_seconds(peer.group)
    began = time.monotonic()
    client.call(client.images.PullImage, api_pb2.PullImageRequest(image=spec), timeout=PULL_SECONDS)
    samples.wall.append(time.monotonic() - began)
    samples.user.append(user_seconds(peer.group) - cpu)
    samples.memory.append(resident(peer.group, "VmHWM") - before)
    client.call(client.images.RemoveImage, api_pb2.RemoveImageRequest(image=spec), timeout=PULL_SECONDS)


def by_hand(group: Group, base: Path, image: str, samples: Samples) -> None:
    """skopeo brings an image into a layout, umoci unpacks it."""
    directory = base / "by-hand"
    directory.mkdir()
    commands: tuple[list[str], ...] = (
        [
            "skopeo",
            "--insecure-policy",
            "copy",
            "-q",
            "--src-tls-verify=false",
            f"docker://{image}",
            f"oci:{directory}/l:1",
        ],
        ["umoci", "unpack", "--image", f"{directory}/l:1", f"{directory}/bundle"],
    )
    cpu, began = user_seconds(group), time.monotonic()
    try:
        for command in commands:
            subprocess.run([*group.wrapper(), *command], check=True, timeout=PULL_SECONDS, capture_output=True)
    except subprocess.CalledProcessError as error:  # Debian 12's umoci does not read zstd
        last = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        print(f"not measured: {command[0]} of {image}: {last[-200:]}", file=sys.stderr)
        return
    finally:
        shutil.rmtree(directory)
    samples.wall.append(time.monotonic() - began)
    samples.user.append(user_seconds(group) - cpu)


@contextlib.contextmanager
def running(base: Path, registry: str, only: str | None) -> Iterator[list[Peer]]:
    """The daemons that are measured."""
    with contextlib.ExitStack() as stack:
        found = []
        if only in (None, "tare"):
            found.append(stack.enter_context(peers.tare(base)))
        if only in (None, "containerd"):
            found.append(stack.enter_context(peers.containerd(base, registry, False)))
        yield found


def measure(base: Path, wanted: argparse.Namespace) -> dict[str, dict[str, Samples]]:
    """Samples by subject and runtime."""
    found: dict[str, dict[str, Samples]] = {}
    with Registry(base / "registry") as registry, Group(f"{base.name}-hand") as hand:
        registry.push(make(base / "layouts")[PAUSE], PAUSE)
        with running(base, registry.url, wanted.only) as daemons:
            for subject in SUBJECTS:
                if wanted.subject and subject.name != wanted.subject:
                    continue
                registry.upload(layout(base / subject.name, subject, wanted.scale), f"bench/{subject.name}:1")
                image = f"{registry.url}/bench/{subject.name}:1"
                table = found.setdefault(subject.name, {})
                for turn in range(wanted.turns):
                    for peer in daemons:
                        os.sync()
                        pull(peer, image, table.setdefault(peer.name, Samples()))
                    hands = table.setdefault(BY_HAND, Samples())
                    if wanted.only in (None, "by-hand") and (turn == 0 or hands.wall):
                        os.sync()
                        by_hand(hand, base, image, hands)
                shutil.rmtree(base / subject.name)
    return found


def rows(found: dict[str, dict[str, Samples]]) -> list[list[str]]:
    """The table: the least wall and user seconds, the most memory."""
    table = []
    for subject, by_name in found.items():
        for name, samples in by_name.items():
            if not samples.wall:
                continue
            memory = f"{max(samples.memory) / 1e6:.0f} MB" if samples.memory else "-"
            table.append([subject, name, f"{min(samples.wall):.2f} s", f"{min(samples.user):.2f} s", memory])
    return table


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.pull", description="Cold pulls.")
    parser.add_argument("-n", "--turns", type=int, default=3, help="pulls of each image by each runtime (3)")
    parser.add_argument("--scale", type=float, default=1.0, help="make images smaller: the part of their files (1.0)")
    parser.add_argument("--subject", choices=[subject.name for subject in SUBJECTS], help="one image alone")
    parser.add_argument("--only", choices=["tare", "containerd", "by-hand"], help="one way alone")
    parser.add_argument("--json", metavar="FILE", help="write all samples there too")
    wanted = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    with temporary() as base:
        found = measure(base, wanted)
    print_table(["IMAGE", "BY", "WALL", "USER CPU", "MEMORY OVER IDLE"], rows(found))
    print("\n" + "; ".join(f"{name} {text}" for name, text in versions().items()))
    if wanted.json:
        document = {s: {name: vars(v) for name, v in by_name.items()} for s, by_name in found.items()}
        Path(wanted.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
