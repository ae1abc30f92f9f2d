"""The leak check against real leftovers, each taken away again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import leaks

pytestmark = pytest.mark.root


def test_a_mount_and_a_file_are_seen_and_gone_when_taken_away(tmp_path: Path) -> None:
    before = leaks.snapshot("none")
    file = Path(f"/dev/shm/tare-leak-test-{os.getpid()}")
    ours = {leaks.Thing("mount", f"{tmp_path} (tmpfs, leak)"), leaks.Thing("file", str(file))}
    subprocess.run(["mount", "-t", "tmpfs", "leak", str(tmp_path)], check=True)
    try:
        file.touch()
        assert ours <= set(leaks.left_behind(before, leaks.snapshot("none")))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
        file.unlink()
    assert not ours & set(leaks.left_behind(before, leaks.snapshot("none")))


def test_an_orphan_of_the_session_is_known_by_its_mark() -> None:
    session = "leak-test"
    environment = {**os.environ, leaks.SESSION_VARIABLE: session}
    script = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    orphan = int(result.stdout)
    pidfd = os.pidfd_open(orphan)
    try:
        assert orphan in {process.pid for process in leaks.our_processes(session)}
    finally:
        os.kill(orphan, 9)
        os.close(pidfd)
