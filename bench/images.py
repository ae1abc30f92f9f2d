"""The two images that are measured with, made on this machine: busybox to work in, and the smallest pause there can be.

The pause image is what containerd runs in every pod; a program of a few bytes keeps it as light as can be for the peer.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tests.support.images import File, busybox_image, make_image

BUSYBOX = "bench/busybox:1"
PAUSE = "bench/pause:1"
LOAD_ADDRESS = 0x400000
# pause(2) for ever: x86-64 has a system call of that name, arm64 has ppoll(NULL, 0, NULL, NULL).
CODE = {
    "x86_64": (62, bytes.fromhex("b822000000 0f05 ebf7")),
    "aarch64": (183, bytes.fromhex("000080d2 010080d2 020080d2 030080d2 280980d2 010000d4 fbffff17")),
}


def pause_program(machine: str) -> bytes:
    """A static ELF program (elf(5)) that waits for a signal, again and again. Raises KeyError for another machine."""
    number, code = CODE[machine]
    headers = 64 + 56
    entry = LOAD_ADDRESS + headers
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, number, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = headers + len(code)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    return ident + header + segment + code


def make(directory: Path) -> dict[str, Path]:
    """OCI layouts below `directory`, by the name that each is pushed under."""
    program = File(mode=0o755, data=pause_program(os.uname().machine))
    return {
        BUSYBOX: busybox_image(directory / "busybox"),
        PAUSE: make_image(directory / "pause", [{"pause": program}], config={"Entrypoint": ["/pause"]}),
    }
