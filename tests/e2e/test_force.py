"""A daemon that cannot come back is taken down by force, and nothing of it stays: what every other test relies on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.daemon import Daemon, mounts_below
from tests.support.images import busybox_image
from tests.support.registry import Registry

pytestmark = pytest.mark.root
SECONDS = "98761"  # which no other test sleeps


def test_a_broken_daemon_with_a_running_container_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="tare-force-", dir="/var/lib") as name:
        base = Path(name)
        with Registry(base / "registry") as registry:
            registry.push(busybox_image(base / "busybox"), "force/busybox:1")
            daemon = Daemon(base / "tare")
            try:
                daemon.start()
                environment = {**os.environ, "TARE_SOCKET": str(daemon.socket), "TARE_LOG_DIR": str(base / "logs")}
                command = [sys.executable, "-m", "tare.cli.main", "run", "-d", f"{registry.url}/force/busybox:1"]
                started = subprocess.run([*command, "sleep", SECONDS], env=environment, check=True, capture_output=True)
                container = started.stdout.decode().strip()
                daemon.kill()
                (daemon.root / "state.db").write_bytes(b"no database at all" * 1000)
                for suffix in ("-wal", "-shm"):
                    (daemon.root / f"state.db{suffix}").unlink(missing_ok=True)
            finally:
                troubles = daemon.destroy()
        assert any("did not come up" in trouble for trouble in troubles)
        assert any(container in trouble for trouble in troubles)
        assert not daemon.base.exists()
        assert mounts_below(base) == []
        assert not [p for p in leaks.processes() if p.command == f"sleep {SECONDS}" or str(base) in p.command]
        assert not [path for path in leaks.cgroups(Path("/sys/fs/cgroup")) if container in path]
