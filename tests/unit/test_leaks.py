"""The leak check's own parsing and judgement."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.leaks import (
    SESSION_VARIABLE,
    Process,
    Thing,
    belongs_to,
    descendants,
    is_tare,
    left_behind,
    parse_mounts,
    parse_stat,
)

MOUNTINFO = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
40 27 0:5 net:[4026532281] /run/tare/pods/ab/net rw shared:3 master:1 - nsfs nsfs rw
"""


def process(pid: int, parent: int = 1, command: str = "sleep 1", environment: bytes = b"", name: str = "x") -> Process:
    return Process(pid, parent, 100, name, command, environment)


def test_a_mount_is_named_by_its_point_type_and_source() -> None:
    assert list(parse_mounts(MOUNTINFO)) == [
        Thing("mount", "/proc (proc, proc)"),
        Thing("mount", "/run/tare/pods/ab/net (nsfs, nsfs)"),
    ]


def test_a_process_name_may_hold_parentheses_and_spaces() -> None:
    fields = " ".join(["S", "7", *["0"] * 17, "4242", "0"])
    assert parse_stat(f"12 (a) b (c) {fields}") == (7, 4242, "a) b (c")


def test_descendants_are_found_through_their_parents() -> None:
    tree = [process(2, 1), process(3, 2), process(4, 3), process(5, 1)]
    assert descendants(tree, 2) == {3, 4}


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("tare-keeper", "/proc/self/fd/3 -I -S -E -c …", True),
        ("python", "/x/python -m tare serve", True),
        ("tare", "/x/python /x/bin/tare run busybox", True),
        ("python", "/x/python -m tare.cli.main", True),
        ("vi", "vi notes-on-tare-weights.txt", False),
        ("start", "start-here", False),
    ],
)
def test_a_tare_process_is_known_by_its_name_or_command_line(name: str, command: str, expected: bool) -> None:
    assert is_tare(process(9, name=name, command=command)) is expected


def test_another_sessions_process_is_not_ours() -> None:
    other = process(9, name="tare-keeper", environment=f"A=1\0{SESSION_VARIABLE}=other\0".encode())
    assert not belongs_to(other, "mine")
    assert belongs_to(other, "other")
    assert belongs_to(process(9, name="tare-keeper"), "mine")
    assert not belongs_to(process(9), "mine")


def test_what_is_mounted_twice_over_counts_twice() -> None:
    one, two = Thing("mount", "/a (tmpfs, x)"), Thing("link", "tare0")
    assert left_behind(Counter([one]), Counter([one, one, one, two])) == [two, one, one]
