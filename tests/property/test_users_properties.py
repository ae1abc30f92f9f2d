"""Searching passwd and group by pattern finds what reading them line by line finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tare.errors import InvalidArgument
from tare.runtime.users import resolve_user

WORD = st.sampled_from([b"a", b"b", b"ab", b"", b"0", b"1", b"00", b"7", b"x y", b"-1", b"99999999999", b"\xff"])
LINE = st.lists(WORD, max_size=8).map(b":".join) | st.binary(max_size=12)
FILE = st.lists(LINE, max_size=8).map(b"\n".join)
MEMBERS = st.lists(st.sampled_from([b"a", b"b", b"ab", b" a", b""]), max_size=3).map(b",".join)
GROUPS = st.lists(
    st.tuples(WORD, st.just(b"x"), st.sampled_from([b"5", b"6", b"", b"z"]), MEMBERS).map(b":".join), max_size=5
).map(b"\n".join)


def accounts(passwd: bytes) -> list[tuple[bytes, int, int, bytes]]:
    """passwd(5), read simply."""
    found = []
    for line in passwd.split(b"\n"):
        fields = line.split(b":", 6)
        if len(fields) >= 6 and fields[2].isdigit() and fields[3].isdigit() and len(fields[3]) <= 10:
            found.append((fields[0], int(fields[2]), int(fields[3]), fields[5]))
    return found


@given(FILE, st.sampled_from(["a", "b", "ab", "x y"]))
def test_users_by_name(passwd: bytes, name: str) -> None:
    expected = next((item for item in accounts(passwd) if item[0] == name.encode()), None)
    try:
        found = resolve_user(passwd=passwd, group=None, image_user=name)
    except InvalidArgument:
        assert expected is None or max(expected[1:3]) >= 1 << 31
        return
    assert expected is not None
    assert (found.user.uid, found.user.gid) == expected[1:3]
    assert found.home.encode(errors="surrogateescape") == (expected[3] or b"/")


@given(FILE, st.sampled_from([0, 1, 7]))
def test_users_by_number(passwd: bytes, uid: int) -> None:
    expected = next((item for item in accounts(passwd) if item[1] == uid), (b"", uid, 0, b""))
    try:
        found = resolve_user(passwd=passwd, group=None, run_as_user=uid)
    except InvalidArgument:
        assert expected[2] >= 1 << 31
        return
    assert (found.name.encode(errors="surrogateescape"), found.user.uid, found.user.gid) == expected[:3]


@given(GROUPS)
def test_memberships(group: bytes) -> None:
    expected = [9]
    for line in group.split(b"\n"):
        fields = line.split(b":")
        if len(fields) == 4 and fields[2].isdigit() and b"a" in [name.strip(b" \t") for name in fields[3].split(b",")]:
            expected.append(int(fields[2]))
    found = resolve_user(passwd=b"a:x:8:9::/:", group=group, image_user="a")
    assert found.user.groups == tuple(dict.fromkeys(expected))


@given(st.binary(max_size=60), st.binary(max_size=60), st.text(max_size=8))
def test_any_bytes_are_a_user_or_an_error(passwd: bytes, group: bytes, name: str) -> None:
    try:
        found = resolve_user(passwd=passwd, group=group, image_user=name)
    except InvalidArgument:
        return
    assert 0 <= found.user.uid < 1 << 31 and found.user.groups[0] == found.user.gid
