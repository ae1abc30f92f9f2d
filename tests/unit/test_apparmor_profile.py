"""The rules of the default AppArmor profile, as its globs are read (apparmor.d(5), "Globbing")."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tare.runtime.apparmor import PROFILE

OWN = r"domainname|hostname|msg\w*|sem|sem_\w+|shm\w+"
"""Of kernel.*, what namespaces have each for themselves."""


def pattern(glob: str) -> str:
    """A glob as a regular expression."""
    parts = re.findall(r"\*\*|\*|\[\^\w+\]|[{},]|[^*\[{},]+", glob)
    meant = {"**": ".*", "*": "[^/]*", "{": "(?:", "}": ")", ",": "|"}
    return "".join(meant.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)


DENIED = re.compile("|".join(f"(?:{pattern(glob)})" for glob in re.findall(r"deny (/proc/\S+) wklx,", PROFILE)))
NAMES = sorted(path.name for path in Path("/proc/sys/kernel").iterdir())


@pytest.mark.parametrize("name", [*NAMES, "hotplug", "modprobe", "kexec_load_disabled", "domainname", "sem_next_id"])
def test_of_the_kernels_settings_only_those_of_namespaces_are_writable(name: str) -> None:
    below = "/x" if Path("/proc/sys/kernel", name).is_dir() else ""
    denied = DENIED.fullmatch(f"/proc/sys/kernel/{name}{below}") is not None
    assert denied == (re.fullmatch(OWN, name) is None)


def test_networks_settings_are_their_namespaces() -> None:
    assert DENIED.fullmatch("/proc/sys/net/ipv4/ip_forward") is None
    assert DENIED.fullmatch("/proc/sys/vm/swappiness") is not None
