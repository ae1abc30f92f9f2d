"""The SELinux policy of a guest in which it is enforcing: Debian's (`selinux-policy-default`), with `container.cil` built into it.

Kept under the cache, and built anew when either has changed:

    selinux/etc/selinux/        what the guest has as its own
    selinux/var/lib/selinux/    the modules it was built from
    selinux/built               what it was built from, in a word; written last
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODE = Path("/")
KEPT = ("etc/selinux", "var/lib/selinux")
POLICY = "etc/selinux/default/policy"
MODULE = HERE / "container.cil"
CONFIG = "SELINUX=enforcing\nSELINUXTYPE=default\n"


class PolicyUnavailable(Exception):
    """There is no policy to enforce; says why."""


def prepare(cache: Path) -> Path:
    """What the guest is to have at /etc/selinux. Raises PolicyUnavailable."""
    directory, built = cache / "selinux", cache / "selinux/built"
    wanted = fingerprint()
    if not built.exists() or built.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        for name in KEPT:
            shutil.copytree(NODE / name, directory / name, symlinks=True)
        build = ["semodule", "--noreload", "--path", str(directory), "--install", str(MODULE)]
        done = subprocess.run(build, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PolicyUnavailable(f"semodule does not take {MODULE}: {done.stderr.strip()}")
        (directory / "etc/selinux/config").write_text(CONFIG)
        built.write_text(wanted)
    return directory / "etc/selinux"


def fingerprint() -> str:
    """What a policy is built from now. Raises PolicyUnavailable where Debian's is not installed."""
    digest = hashlib.sha256(MODULE.read_bytes())
    try:
        for path in sorted((NODE / POLICY).iterdir()):
            digest.update(path.read_bytes())
    except FileNotFoundError as error:
        raise PolicyUnavailable(f"{error.filename} is not there: is selinux-policy-default installed?") from error
    return digest.hexdigest()
