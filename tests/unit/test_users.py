"""Who a container's process is."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.runtime.records import GroupsPolicy, User
from tare.runtime.users import FILE_LIMIT, resolve_user

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a comment
broken
web:x:33:34:web server:/var/www:/usr/sbin/nologin
app:x:1000:1000::/home/app
nohome:x:1001:1001:::/bin/sh
twice:x:1000:5:second:/elsewhere:/bin/sh
huge:x:1002:4294967295::/:/bin/sh
"""
GROUP = b"""root:x:0:
www:x:34:
staff:x:50:web,app
video:x:44: app ,web
wheel:x:10:applepie,xapp
empty::60
app:x:1000:
"""


def resolve(**arguments: Any) -> User:
    return resolve_user(passwd=PASSWD, group=GROUP, **arguments).user


@pytest.mark.parametrize(
    ("arguments", "user"),
    [
        ({}, User(uid=0, gid=0, groups=(0,))),
        ({"image_user": "web"}, User(uid=33, gid=34, groups=(34, 50, 44))),
        ({"image_user": "app"}, User(uid=1000, gid=1000, groups=(1000, 50, 44))),
        ({"image_user": "1000"}, User(uid=1000, gid=1000, groups=(1000, 50, 44))),
        ({"image_user": "4711"}, User(uid=4711, gid=0, groups=(0,))),
        ({"image_user": "4711:50"}, User(uid=4711, gid=50, groups=(50,))),
        ({"image_user": "web:video"}, User(uid=33, gid=44, groups=(44, 50))),
        ({"image_user": ":video"}, User(uid=0, gid=44, groups=(44,))),
        ({"image_user": "app:", "run_as_user": None}, User(uid=1000, gid=1000, groups=(1000, 50, 44))),
        ({"image_user": "web:video", "run_as_user": 1000}, User(uid=1000, gid=1000, groups=(1000, 50, 44))),
        ({"image_user": "web", "run_as_username": "app"}, User(uid=1000, gid=1000, groups=(1000, 50, 44))),
        ({"run_as_username": "app", "run_as_user": 33}, User(uid=33, gid=34, groups=(34, 50, 44))),
        ({"run_as_user": 0}, User(uid=0, gid=0, groups=(0,))),
        ({"run_as_user": 33, "run_as_group": 7}, User(uid=33, gid=7, groups=(7, 50, 44))),
        ({"run_as_username": "web", "run_as_group": 0}, User(uid=33, gid=0, groups=(0, 50, 44))),
        ({"supplemental_groups": (7, 0, 7)}, User(uid=0, gid=0, groups=(0, 7))),
        (
            {"run_as_user": 1000, "supplemental_groups": (1234,), "policy": GroupsPolicy.STRICT},
            User(uid=1000, gid=1000, groups=(1000, 1234)),
        ),
        ({"run_as_user": 1000, "supplemental_groups": (1234,)}, User(uid=1000, gid=1000, groups=(1000, 1234, 50, 44))),
    ],
)
def test_who_it_is(arguments: dict[str, Any], user: User) -> None:
    assert resolve(**arguments) == user


def test_home_and_name() -> None:
    found = resolve_user(passwd=PASSWD, group=None, image_user="33")
    assert (found.name, found.home) == ("web", "/var/www")
    assert resolve_user(passwd=PASSWD, group=None, image_user="app").home == "/home/app"
    assert resolve_user(passwd=PASSWD, group=None, image_user="nohome").home == "/"
    assert resolve_user(passwd=PASSWD, group=None, image_user="4711").home == "/"


def test_an_image_without_files_has_numbers_alone() -> None:
    assert resolve_user(passwd=None, group=None, image_user="5:6").user == User(uid=5, gid=6, groups=(6,))
    with pytest.raises(InvalidArgument, match="no user 'root' in the image's /etc/passwd"):
        resolve_user(passwd=None, group=None, image_user="root")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_user": "nobody"}, "there is no user 'nobody' in the image's /etc/passwd"),
        ({"image_user": "web:nogroup"}, "there is no group 'nogroup' in the image's /etc/group"),
        ({"run_as_username": "w.b"}, "there is no user 'w.b'"),
        ({"run_as_username": "4711"}, "there is no user '4711'"),
        ({"run_as_username": "web:video"}, "there is no user 'web:video'"),
        ({"run_as_group": 5}, "without run_as_user"),
        ({"image_user": "web", "run_as_group": 5}, "without run_as_user"),
        ({"run_as_user": -1}, "no user '-1'|user -1"),
        ({"run_as_user": 1 << 31}, "user 2147483648 is not between 0 and 2147483647"),
        ({"run_as_user": 1 << 80}, "user"),
        ({"image_user": "4294967295"}, "user 4294967295"),
        ({"image_user": "huge"}, "group 4294967295"),
        ({"run_as_user": 5, "run_as_group": -1}, "group -1"),
        ({"supplemental_groups": (-1,)}, "supplemental group -1"),
        ({"supplemental_groups": tuple(range(70000))}, "70000 groups are more than 65536"),
        ({"image_user": "²"}, "no user '²'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        resolve(**arguments)


def test_a_million_lines_do_not_hurt() -> None:
    passwd = b"".join(b"user%d:x:%d:%d::/home/user%d:/bin/sh\n" % (i, i, i, i) for i in range(200_000))[:FILE_LIMIT]
    group = b"".join(b"group%d:x:%d:user%d,other\n" % (i, i, i) for i in range(200_000))[:FILE_LIMIT]
    start = time.process_time()
    found = resolve_user(passwd=passwd, group=group, image_user="user40000")
    assert found.user == User(uid=40000, gid=40000, groups=(40000,))
    with pytest.raises(InvalidArgument, match="no user 'user190000' in the first 2 MiB of the image's"):
        resolve_user(passwd=passwd, group=group, image_user="user190000")
    assert time.process_time() - start < 2


def test_a_line_that_was_cut_off_does_not_count() -> None:
    line = b"last:x:12345:1::/:/bin/sh\n"
    filler = b"#" * (FILE_LIMIT - 10) + b"\n"
    with pytest.raises(InvalidArgument, match="no user 'last'"):
        resolve_user(passwd=(filler + line)[:FILE_LIMIT], group=None, image_user="last")


@pytest.mark.parametrize(
    "evil",
    [
        b"a:x:" + b"0" * (1 << 20),
        b"a:x:5:" + b"0" * (1 << 20),
        b"g:x:5:" + b"a," * (1 << 19),
        b"g:x:5:" + b"a," * (1 << 19) + b":\n",
        b"g:x:5:" + b"a, " * (1 << 19) + b"b:\n",
        b":" * (1 << 20),
        b"\n" * (1 << 20),
        b"a:x:5\n" * (1 << 18),
        b"g:x:5:a\n" * (1 << 17),
        b"g:x:5:" + b" " * (1 << 20),
    ],
    ids=lambda evil: f"{evil[:9]!r} …",
)
def test_evil_lines_take_no_time(evil: bytes) -> None:
    """A daemon that looks at them serves nobody meanwhile."""
    start = time.process_time()
    resolve_user(passwd=b"a:x:5:5::/:\n" + evil, group=evil, run_as_user=5)
    with contextlib.suppress(InvalidArgument):
        resolve_user(passwd=evil, group=evil, image_user="a:g")
    assert time.process_time() - start < 1
