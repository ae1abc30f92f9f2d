"""AppArmor profiles and SELinux contexts of an OCI configuration: the steps they come to, and where the kernel's orders may not go."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers import labels
from tare.launch import labels as orders
from tare.launch.machine import Machine

PROCESS = {"apparmorProfile": "mine", "selinuxLabel": "u:r:t:s0:c1,c2"}
MACHINE = Machine(socket.socket())
MACHINE.status.close()


def test_what_is_asked_for_comes_to_steps() -> None:
    expected = labels.expected(PROCESS, {"mountLabel": "u:r:f:s0"})
    assert expected == [
        ("expect_apparmor", "confine by AppArmor profile mine", b"mine"),
        ("expect_selinux", "apply process.selinuxLabel u:r:t:s0:c1,c2", b"u:r:t:s0:c1,c2"),
        ("expect_selinux", "apply linux.mountLabel u:r:f:s0", b"u:r:f:s0"),
        ("open_proc", "open /proc", labels.SLOT),
    ]
    assert [step[0] for step in labels.keys(PROCESS)] == ["key_context"]
    assert [step[0] for step in labels.orders(PROCESS)] == ["apparmor", "selinux"]
    mount_alone = labels.expected({}, {"mountLabel": "u:r:f:s0"})
    assert [step[0] for step in mount_alone] == ["expect_selinux"]


@pytest.mark.parametrize("process", [{}, {"apparmorProfile": "", "selinuxLabel": None}])
def test_nothing_asked_for_is_nothing_done(process: dict[str, Any]) -> None:
    assert labels.expected(process, {}) == labels.keys(process) == labels.orders(process) == []


@pytest.mark.parametrize(
    ("process", "path"),
    [
        ({"selinuxLabel": "a"}, "process.selinuxLabel"),
        ({"selinuxLabel": 'a:b:c:s0"'}, "process.selinuxLabel"),
        ({"selinuxLabel": "a:b:c d:s0"}, "process.selinuxLabel"),
        ({"selinuxLabel": 5}, "process.selinuxLabel"),
        ({"apparmorProfile": []}, "process.apparmorProfile"),
        ({"apparmorProfile": "a\nb"}, "process.apparmorProfile"),
        ({"apparmorProfile": " a"}, "process.apparmorProfile"),
        ({"apparmorProfile": "a" * 5000}, "process.apparmorProfile"),
    ],
)
def test_what_is_no_label(process: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"read {path}: "):
        labels.expected(process, {})


def test_what_is_no_mount_label() -> None:
    for label in ("a", "a:b:c\0", "a:b:" + "c" * 255, ["a:b:c"]):
        with pytest.raises(InvalidArgument, match=r"read linux\.mountLabel: "):
            labels.expected({}, {"mountLabel": label})


def test_new_file_systems_have_the_mount_label() -> None:
    steps: list[Any] = [
        ("filesystem", "mount /dev", 16, b"tmpfs", 0, ((b"mode", b"755"),)),
        ("filesystem", "mount /proc", 17, b"proc", 0, ()),
        ("open_tree", "mount /data", 18, b"/srv", True),
        ("overlay", "root", 3, (b"/l",), b"/u", b"/w", b"/base"),
        ("union", "mount /models", 19, (b"/l",), b"", 1, b"/base"),
        ("mask", "mask /sys/firmware", 4, b"/sys/firmware"),
    ]
    assert labels.labelled(steps, {}) == steps
    context = (b"context", b"a:b:c:s0")
    assert labels.labelled(steps, {"mountLabel": "a:b:c:s0"}) == [
        ("filesystem", "mount /dev", 16, b"tmpfs", 0, ((b"mode", b"755"), context)),
        *steps[1:3],
        *((*step, b"a:b:c:s0") for step in steps[3:]),
    ]


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def refused(function: Any, *arguments: Any) -> OSError:
    """The error of a step."""
    with pytest.raises(OSError) as caught:
        function(MACHINE, *arguments)
    return caught.value


def test_apparmor_must_be_there_and_know_the_profile(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/"
    absent = refused(orders.expect_apparmor, b"mine", root)
    assert (absent.errno, absent.strerror) == (errno.EOPNOTSUPP, "this node's kernel does not have AppArmor")
    write(tmp_path, "sys/module/apparmor/parameters/enabled", "N\n")
    assert refused(orders.expect_apparmor, b"mine", root).errno == errno.EOPNOTSUPP
    write(tmp_path, "sys/module/apparmor/parameters/enabled", "Y\n")
    orders.expect_apparmor(MACHINE, b"mine", root)  # without securityfs only the order itself can tell
    write(tmp_path, "sys/kernel/security/apparmor/profiles", "mine (enforce)\nwith (braces) in (complain)\n")
    for name in (b"mine", b"with (braces) in", b"unconfined", b":other:mine", b"mine//&other"):
        orders.expect_apparmor(MACHINE, name, root)
    for name in (b"mine (enforce)", b"min", b"with", b""):
        assert refused(orders.expect_apparmor, name, root).errno == errno.ENOENT


def test_selinux_must_be_there(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/"
    absent = refused(orders.expect_selinux, b"u:r:t:s0", root)
    assert (absent.errno, absent.strerror) == (errno.EOPNOTSUPP, "SELinux is off on this node")
    write(tmp_path, "sys/fs/selinux/context", "")
    orders.expect_selinux(MACHINE, b"u:r:t:s0", root)
    assert (tmp_path / "sys/fs/selinux/context").read_bytes() == b"u:r:t:s0\0"


def test_what_looks_like_proc_is_not_taken_for_it(tmp_path: Path) -> None:
    write(tmp_path, "self/attr/exec", "")
    with pytest.raises(OSError) as caught:
        orders.proc_handle(os.fsencode(tmp_path))
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError, match="is not the root of a procfs"):
        orders.proc_handle(b"/proc/self")
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError, match="is not of a procfs"):
            orders.order(fd, orders.APPARMOR_FILES, b"exec mine")
    finally:
        os.close(fd)
    assert (tmp_path / "self/attr/exec").read_text() == ""
