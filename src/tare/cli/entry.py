"""What the `tare` script calls: `tare oci` is another program, which starts in milliseconds; anything else is `main`'s."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["oci"]:
        path = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "tare-oci")
        os.execv(path, [path, *sys.argv[2:]])
    from tare.cli.main import main as command

    command()
