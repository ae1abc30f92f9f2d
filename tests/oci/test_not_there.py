"""What a configuration asks for and this node may not have: an error in plain words, and nothing is left of the container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tare.handlers import rdt
from tests.kernel.test_labels import has_apparmor, has_selinux
from tests.support.oci import Bundle, Runtime

pytestmark = pytest.mark.root


def asked() -> list[tuple[str, str, Any, str]]:
    """(object, member, value, words) of what this node does not have."""
    found: list[tuple[str, str, Any, str]] = []
    if not has_apparmor():
        found.append(("process", "apparmorProfile", "mine", "this node's kernel does not have AppArmor"))
    if not has_selinux():
        found.append(("process", "selinuxLabel", "a_u:b_r:c_t:s0", "SELinux is off on this node"))
        found.append(("linux", "mountLabel", "a_u:b_r:c_t:s0", "SELinux is off on this node"))
    if rdt.mounted_at(Path("/proc/self/mountinfo").read_text()) is None:
        found.append(("linux", "intelRdt", {"closID": "gold"}, "no resctrl file system is mounted on this node"))
    return found


def test_it_is_said_and_undone(tare: Runtime, bundle: Bundle) -> None:
    cases = asked()
    assert cases, "a node with AppArmor, SELinux and resctrl at once"
    for section, member, value, words in cases:
        bundle.config[section][member] = value
        bundle.write("true")
        name = tare.name_one()
        done = tare.call("run", "--bundle", str(bundle.path), name, check=False)
        assert done.returncode != 0 and words in done.stderr, done.stderr
        assert tare.call("state", name, check=False).returncode != 0
        del bundle.config[section][member]
    bundle.write("true")
    assert tare.call("run", "--bundle", str(bundle.path), tare.name_one(), check=False).returncode == 0
