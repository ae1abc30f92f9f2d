"""AppArmor profiles and SELinux contexts: chosen, checked, and what is written for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime.labels import (
    APPARMOR_DEFAULT,
    Contexts,
    Kernel,
    Labels,
    apparmor_profile,
    kernel,
    mount_data,
    parse_contexts,
    selinux_labels,
)
from tare.runtime.records import ProfileType, SecurityProfile, SELinuxOptions

NONE = Kernel()
APPARMOR = Kernel(profiles=frozenset({APPARMOR_DEFAULT, "mine", "snap.x//child"}))
BARE = Kernel(profiles=frozenset())
SELINUX = Kernel(contexts=Contexts())


def wanted(kind: ProfileType, reference: str = "") -> SecurityProfile:
    return SecurityProfile(type=kind, localhost_ref=reference)


DEFAULT, UNCONFINED = wanted(ProfileType.RUNTIME_DEFAULT), wanted(ProfileType.UNCONFINED)
MINE = wanted(ProfileType.LOCALHOST, "localhost/mine")


@pytest.mark.parametrize(
    ("profile", "node", "privileged", "expected"),
    [
        (None, APPARMOR, False, APPARMOR_DEFAULT),
        (None, APPARMOR, True, ""),
        (None, BARE, False, ""),
        (None, NONE, False, ""),
        (DEFAULT, APPARMOR, False, APPARMOR_DEFAULT),
        (DEFAULT, NONE, False, ""),
        (DEFAULT, APPARMOR, True, ""),
        (UNCONFINED, APPARMOR, False, ""),
        (UNCONFINED, NONE, False, ""),
        (MINE, APPARMOR, False, "mine"),
        (MINE, APPARMOR, True, ""),
        (wanted(ProfileType.LOCALHOST, "snap.x//child"), APPARMOR, False, "snap.x//child"),
    ],
)
def test_apparmor(profile: SecurityProfile | None, node: Kernel, privileged: bool, expected: str) -> None:
    assert apparmor_profile(profile, node, privileged=privileged) == expected


@pytest.mark.parametrize(
    ("profile", "node", "error", "words"),
    [
        (MINE, NONE, FailedPrecondition, "this node's kernel does not have AppArmor"),
        (MINE, BARE, FailedPrecondition, "no such profile loaded.*apparmor_parser"),
        (DEFAULT, BARE, FailedPrecondition, "no such profile loaded"),
        (wanted(ProfileType.LOCALHOST), APPARMOR, InvalidArgument, "no name of a profile"),
        (wanted(ProfileType.LOCALHOST, "a\nb"), APPARMOR, InvalidArgument, "no name of a profile"),
        (wanted(ProfileType.LOCALHOST, "mine "), APPARMOR, InvalidArgument, "no name of a profile"),
    ],
)
def test_apparmor_that_cannot_be(profile: SecurityProfile, node: Kernel, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        apparmor_profile(profile, node, privileged=False)


def test_the_option_of_a_mount() -> None:
    assert mount_data("a:b:c:s0:c1,c2") == 'context="a:b:c:s0:c1,c2"'


def test_a_pod_has_categories_of_its_own() -> None:
    first = selinux_labels(None, SELINUX, privileged=False, seed="pod1")
    again = selinux_labels(SELinuxOptions(), SELINUX, privileged=False, seed="pod1")
    other = selinux_labels(None, SELINUX, privileged=False, seed="pod2")
    assert first == again != other
    start, _, pair = first.process.rpartition(":")
    assert start == "system_u:system_r:container_t:s0"
    low, high = (int(word.removeprefix("c")) for word in pair.split(","))
    assert 0 <= low < high < 1024
    assert first.mount == f"system_u:object_r:container_file_t:s0:{pair}"


def test_parts_that_are_given_replace_the_nodes() -> None:
    options = SELinuxOptions(user="u_u", role="r_r", type="spc_t", level="s0:c1,c2")
    expected = Labels(process="u_u:r_r:spc_t:s0:c1,c2", mount="system_u:object_r:container_file_t:s0:c1,c2")
    assert selinux_labels(options, SELINUX, privileged=False, seed="x") == expected
    assert selinux_labels(options, SELINUX, privileged=True, seed="x") == expected
    assert selinux_labels(None, SELINUX, privileged=True, seed="x") == Labels()
    only_type = selinux_labels(SELinuxOptions(type="other_t"), SELINUX, privileged=False, seed="x")
    assert only_type.process.startswith("system_u:system_r:other_t:s0:c")


def test_selinux_that_is_off() -> None:
    assert selinux_labels(None, NONE, privileged=False, seed="x") == Labels()
    assert selinux_labels(SELinuxOptions(), NONE, privileged=False, seed="x") == Labels()
    with pytest.raises(FailedPrecondition, match="SELinux is off on this node"):
        selinux_labels(SELinuxOptions(level="s0"), NONE, privileged=False, seed="x")


@pytest.mark.parametrize(
    "options",
    [
        SELinuxOptions(type="a:b"),
        SELinuxOptions(user="a b"),
        SELinuxOptions(role=","),
        SELinuxOptions(level="c1"),
        SELinuxOptions(level="s0:c1;c2"),
        SELinuxOptions(level="s0:c1,"),
        SELinuxOptions(level="s0\n"),
    ],
)
def test_what_is_no_part_of_a_context(options: SELinuxOptions) -> None:
    with pytest.raises(InvalidArgument, match="is no SELinux"):
        selinux_labels(options, SELINUX, privileged=False, seed="x")


@pytest.mark.parametrize("level", ["s0", "s0-s15", "s0:c1", "s0:c1,c2", "s0:c0.c1023", "s0-s0:c0.c1023", "s0:c1,c3.c5"])
def test_levels(level: str) -> None:
    found = selinux_labels(SELinuxOptions(level=level), SELINUX, privileged=False, seed="x")
    assert found.process == f"system_u:system_r:container_t:{level}"


LXC_CONTEXTS = """
process = "system_u:system_r:svirt_lxc_net_t:s0"
# file = "x"
file = "system_u:object_r:svirt_sandbox_file_t:s0"
content = "system_u:object_r:virt_var_lib_t:s0"
"""


def test_the_nodes_policy() -> None:
    expected = Contexts(
        process="system_u:system_r:svirt_lxc_net_t:s0", files="system_u:object_r:svirt_sandbox_file_t:s0"
    )
    assert parse_contexts(LXC_CONTEXTS) == expected
    assert parse_contexts("") == Contexts()


def test_looking_at_a_node(tmp_path: Path) -> None:
    assert kernel(tmp_path) == Kernel()
    files = {
        "sys/module/apparmor/parameters/enabled": "Y\n",
        "sys/kernel/security/apparmor/profiles": "mine (enforce)\nsnap (x) y (complain)\n",
        "sys/fs/selinux/enforce": "1",
        "etc/selinux/config": "# SELINUXTYPE=x\nSELINUX=enforcing\nSELINUXTYPE=mls\n",
        "etc/selinux/mls/contexts/lxc_contexts": LXC_CONTEXTS,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = kernel(tmp_path)
    assert found.profiles == frozenset({"mine", "snap (x) y"})
    assert found.contexts == parse_contexts(LXC_CONTEXTS)


def test_this_node_can_be_looked_at() -> None:
    found = kernel()
    assert found.profiles is None or isinstance(found.profiles, frozenset)
