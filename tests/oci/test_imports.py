"""What a command imports is what it starts slowly by: none of the modules that take as long as a container's namespaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tare

HEAVY = {
    *(
        "argparse",
        "asyncio",
        "contextlib",
        "ctypes",
        "dataclasses",
        "enum",
        "inspect",
        "json",
        "logging",
        "pathlib",
        "re",
    ),
    *(
        "selectors",
        "signal",
        "site",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
        "typing",
        "click",
        "grpc",
        "msgspec",
    ),
}
COMMANDS = (
    "main, stock, seals, birth, child, creating, execution, groups, hooks, inspection, lifecycle, state, terminals"
)


def test_commands_import_nothing_heavy() -> None:
    source = Path(tare.__file__).parents[1]
    script = f"import sys; sys.path.insert(0, {str(source)!r}); from tare.oci import {COMMANDS}; print(*sys.modules)"
    base = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run([base, "-ISE", "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())
    assert "tare.launch.steps" in done.stdout.split()
