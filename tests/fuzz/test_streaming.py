"""The fuzzer finds nothing in a few seconds, from seeds of what real clients say; how to let it run for longer is in its own file."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tare.streaming.spdy_headers import DICTIONARY

SECONDS = 10
ROOT = Path(__file__).parents[2]


def seeds() -> list[bytes]:
    """One for each protocol."""
    plain = struct.pack(">I", 1) + struct.pack(">I", 10) + b"streamtype" + struct.pack(">I", 5) + b"stdin"
    deflate = zlib.compressobj(zdict=DICTIONARY)
    block = deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)
    opened = struct.pack(">HHI", 0x8003, 1, len(block) + 10) + struct.pack(">IIH", 1, 0, 0) + block
    said = struct.pack(">II", 1, 1 << 24 | 5) + b"hello"
    return [
        b"\0\xff" + opened + said,
        b"\0\0" + opened + said,
        b"\1\0" + block,
        b"\2\0\0words",
        b"\2\0\xff\0",
        b"\2\2" + b"0aGVsbG8=",
        b'\3\5{"Width":80,"Height":24}{"Width":1',
    ]


@pytest.mark.slow
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-max_total_time={SECONDS}", "-max_len=4096", f"-artifact_prefix={tmp_path}/", "-rss_limit_mb=2048"]
    command = [sys.executable, "-m", "tests.fuzz.streaming", *options, str(corpus)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS + 60, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None, done.stderr[-4000:]
    assert int(runs[1]) > 1000
