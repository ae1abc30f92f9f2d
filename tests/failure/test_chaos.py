"""The chaos run: a random workload under random kills, for TARE_CHAOS_SECONDS with TARE_CHAOS_SEED (see `tests.support.chaos`)."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.chaos import RETRY_SECONDS, Chaos
from tests.support.daemon import Daemon
from tests.support.images import busybox_image
from tests.support.node import Node
from tests.support.registry import Registry

pytestmark = pytest.mark.root
SECONDS = float(os.environ.get("TARE_CHAOS_SECONDS", "120"))
KEEP = os.environ.get("TARE_CHAOS_KEEP", "")  # a directory for what a run that failed leaves to read
WORKERS = 4


@pytest.mark.timeout(int(SECONDS + 8 * RETRY_SECONDS))
def test_nothing_is_lost_whoever_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("TARE_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
    with tempfile.TemporaryDirectory(prefix="tare-chaos-", dir="/var/lib") as name:
        base = Path(name)
        with Registry(base / "registry") as registry, Daemon(base / "tare") as daemon:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            registry.push(busybox_image(base / "other", extra=[{"noise": os.urandom(1 << 20)}]), "tests/busybox:2")
            node = Node(daemon, f"{registry.url}/tests/busybox:1")
            node.pull()
            chaos = Chaos(node, seed, SECONDS)
            began = time.monotonic()
            chaos.run(WORKERS)
            told = ", ".join(f"{number} {what}" for what, number in sorted(chaos.counts.items()))
            with capsys.disabled():
                print(f"\nchaos: TARE_CHAOS_SEED={seed}, {time.monotonic() - began:.0f} s: {told}")
            if chaos.broken and KEEP:
                keep(daemon, chaos, Path(KEEP))
            assert chaos.broken == [], f"TARE_CHAOS_SEED={seed}; kills: {chaos.told()}"
            assert chaos.counts.get("pods", 0) > 0
            node.remove_all()
            assert node.settled() == []


def keep(daemon: Daemon, chaos: Chaos, directory: Path) -> None:
    """Its logs, what went wrong, and the containers' logs."""
    directory.mkdir(parents=True)
    shutil.copy(daemon.log, directory)
    shutil.copy(daemon.run / "launch.log", directory)
    shutil.copytree(chaos.node.logs, directory / "containers")
    (directory / "broken").write_text("\n".join((*chaos.broken, chaos.told())))
