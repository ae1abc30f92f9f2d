"""Who a container's process is: from the request, the image, and the image's own passwd and group files (pure).

    run_as_user │ run_as_username │ image's "user[:group]" │ 0     → UID (the first that is given)
    run_as_group │ the image's ":group" │ passwd's GID │ 0         → GID
    GID, the request's supplemental_groups, and (policy Merge) the groups that list the user as a member    → groups

The files come as bytes that may have been cut at FILE_LIMIT: only whole lines count, and lines are found by searching, not
by reading all of them into objects, so that a file of a million lines costs milliseconds.

Source: CRI LinuxContainerSecurityContext (run_as_*, supplemental_groups_policy); OCI image-spec, config.md, "User"; passwd(5), group(5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tare.errors import InvalidArgument
from tare.runtime.records import GroupsPolicy, User

FILE_LIMIT = 2 << 20
"""How much of a passwd or group file is looked at, in bytes: some 40,000 accounts, searched in 50 ms at worst."""

HIGHEST_ID = (1 << 31) - 1
MOST_GROUPS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUser:
    """The numbers for the kernel, the name in passwd ("" where there is none) and the home directory ("/" where there is none)."""

    user: User
    name: str
    home: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A line of passwd."""

    name: bytes
    uid: int
    gid: int
    home: bytes


def resolve_user(
    *,
    passwd: bytes | None,
    group: bytes | None,
    image_user: str = "",
    run_as_user: int | None = None,
    run_as_username: str = "",
    run_as_group: int | None = None,
    supplemental_groups: Sequence[int] = (),
    policy: GroupsPolicy = GroupsPolicy.MERGE,
) -> ResolvedUser:
    """Who the process runs as. `passwd` and `group` are the files' bytes, None where the image has none.

    Raises InvalidArgument for a user or group that is named and does not exist (also where run_as_username is a number), for numbers
    out of range, and for run_as_group without a user, as CRI asks.
    """
    if run_as_group is not None and run_as_user is None and not run_as_username:
        cause = "run_as_group is given without run_as_user or run_as_username"
        raise InvalidArgument("choose the container's user", cause=cause)
    image_name, _, image_group = image_user.partition(":")
    wanted = str(run_as_user) if run_as_user is not None else run_as_username or image_name or "0"
    account, uid = find_user(passwd or b"", wanted)
    if account is None and run_as_user is None and run_as_username:
        raise unknown("user", run_as_username, "passwd", passwd or b"")
    if run_as_group is not None:
        gid = in_range(run_as_group, "group")
    elif run_as_user is None and not run_as_username and image_group:
        gid = find_group(group or b"", image_group)
    else:
        gid = account.gid if account else 0
    groups = [gid, *(in_range(number, "supplemental group") for number in supplemental_groups)]
    if account and policy is GroupsPolicy.MERGE:
        groups += memberships(group or b"", account.name)
    groups = list(dict.fromkeys(groups))
    if len(groups) > MOST_GROUPS:
        raise InvalidArgument(
            "choose the container's groups", cause=f"{len(groups)} groups are more than {MOST_GROUPS}"
        )
    user = User(uid=uid, gid=gid, groups=tuple(groups))
    home = account.home.decode(errors="surrogateescape") if account else ""
    name = account.name.decode(errors="surrogateescape") if account else ""
    return ResolvedUser(user=user, name=name, home=home or "/")


def find_user(passwd: bytes, wanted: str) -> tuple[Account | None, int]:
    """The line for a user given by name or number, and the UID. A number needs no line; digits are always a number, never a name."""
    number = numeric(wanted)
    if number is not None:
        uid = in_range(number, "user")
        return account_of(passwd, rb"[^:\n]*", b"0*%d" % uid), uid
    account = account_of(passwd, re.escape(wanted.encode(errors="surrogateescape")), rb"\d+")
    if account is None:
        raise unknown("user", wanted, "passwd", passwd)
    return account, in_range(account.uid, "user")


def account_of(passwd: bytes, name: bytes, uid: bytes) -> Account | None:
    """The first well-formed line whose name and UID match these patterns."""
    found = re.search(
        rb"^(%b):[^:\n]*:(%b):(\d{1,10}):[^:\n]*:([^:\n]*)(?::[^\n]*)?\n" % (name, uid), passwd_text(passwd), re.M
    )
    if found is None:
        return None
    return Account(name=found[1], uid=int(found[2]), gid=in_range(int(found[3]), "group"), home=found[4])


def find_group(group: bytes, wanted: str) -> int:
    """The GID of a group given by name or number."""
    number = numeric(wanted)
    if number is not None:
        return in_range(number, "group")
    pattern = rb"^%b:[^:\n]*:(\d{1,10})(?::[^\n]*)?\n" % re.escape(wanted.encode(errors="surrogateescape"))
    found = re.search(pattern, passwd_text(group), re.M)
    if found is None:
        raise unknown("group", wanted, "group", group)
    return in_range(int(found[1]), "group")


def memberships(group: bytes, name: bytes) -> list[int]:
    """GIDs of the groups that list a user as a member, in the file's order."""
    # Not one pattern for a line with the name in it: that takes the square of a line's length where many members have the name.
    lines = re.finditer(rb"^[^:\n]*:[^:\n]*:(\d{1,10}):([^:\n]*)\n", passwd_text(group), re.M)
    gids = (int(found[1]) for found in lines if name in found[2] and is_member(name, found[2]))
    return [in_range(gid, "group") for gid in gids]


def is_member(name: bytes, members: bytes) -> bool:
    """Whether a list with commas has a name."""
    return any(member.strip(b" \t") == name for member in members.split(b","))


def passwd_text(data: bytes) -> bytes:
    """Whole lines alone: what was cut off in the middle of a line is dropped, a last line without its end gets it."""
    if len(data) >= FILE_LIMIT:
        return data[: data.rfind(b"\n", 0, FILE_LIMIT) + 1]
    return data if data.endswith(b"\n") else data + b"\n"


def numeric(text: str) -> int | None:
    """A number in decimal digits, or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def in_range(number: int, what: str) -> int:
    """Raise InvalidArgument for what the kernel cannot have as an ID (-1 among them)."""
    if not 0 <= number <= HIGHEST_ID:
        cause = f"{what} {number} is not between 0 and {HIGHEST_ID}"
        raise InvalidArgument("choose the container's user", cause=cause)
    return number


def unknown(what: str, name: str, file: str, data: bytes) -> InvalidArgument:
    """The error for a name that is not in a file."""
    where = f"the first {FILE_LIMIT >> 20} MiB of the image's" if len(data) >= FILE_LIMIT else "the image's"
    cause = f"there is no {what} {name!r} in {where} /etc/{file}"
    return InvalidArgument(
        "choose the container's user", cause=cause, hint=f"name a {what} that the image has, or a number"
    )
