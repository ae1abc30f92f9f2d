"""The guest's helpers that need no guest: its stream taken apart, a mirror found in apt's lists, a kernel taken out of a bzImage."""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.vm import policy, selection
from scripts.vm.__main__ import parser, pytest_command, script
from scripts.vm.kernel import ELF, MIRROR, KernelUnavailable, elf, mirror
from scripts.vm.machine import (
    CONFINEMENTS,
    REPOSITORY,
    GuestFailed,
    GuestImpossible,
    GuestTimedOut,
    check_place,
    follow,
)
from scripts.vm.output import Output

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MARK = "tare-guest-ab12"


@given(st.binary().filter(lambda data: MARK.encode() not in data), st.integers(0, 255), st.data())
def test_output_comes_whole_however_it_is_cut(own: bytes, code: int, data: st.DataObject) -> None:
    stream = own + f"\n{MARK} {code}\nafter".encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    output = Output(MARK)
    shown = b"".join(output.feed(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True))
    assert (shown, output.code, output.rest()) == (own, code, b"")


@given(st.binary())
def test_output_without_an_end_comes_whole_too(own: bytes) -> None:
    output = Output(MARK)
    assert output.feed(own) + output.rest() == own
    assert output.code is None


def test_output_is_shown_at_once() -> None:
    output = Output(MARK)
    assert output.feed(b"collecting ...") == b"collecting ..."
    assert output.feed(b"\n") == b""
    assert output.feed(b"done") == b"\ndone"


def test_another_guests_mark_is_output() -> None:
    output = Output(MARK)
    assert output.feed(b"\ntare-guest-ffff 0\n") + output.rest() == b"\ntare-guest-ffff 0\n"
    assert output.code is None


def test_a_guest_that_ends_untold_or_late_is_an_error() -> None:
    shown: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"half a li\ntare-")
        with pytest.raises(GuestTimedOut):
            follow(ours, Output(MARK), 0.01, shown.append)
        theirs.close()
        with pytest.raises(GuestFailed):
            follow(ours, Output(MARK), 20, shown.append)
    assert b"".join(shown) == b"half a li\ntare-"


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ("Types: deb\nURIs: http://near.example/debian\nSuites: bookworm\n", "http://near.example/debian"),
        ("deb [arch=amd64] https://near.example/debian/ bookworm main\n", "https://near.example/debian/"),
        ("URIs: http://near.example/debian-security\n# deb http://x.example/debian a\n", MIRROR),
        ("deb http://x.example/debian-security b\ndeb http://y.example/debian b main", "http://y.example/debian"),
        ("", MIRROR),
    ],
)
def test_the_mirror_is_the_machines_own(lists: str, expected: str) -> None:
    assert mirror(lists) == expected


def bz_image(payload: bytes, *, sectors: int = 3) -> bytes:
    """A bzImage with this zstd frame in it."""
    header = bytearray(512 * (sectors + 1))
    header[0x1F1] = sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", header, 0x248, 100, len(payload) + 4)
    return bytes(header) + bytes(100) + payload + struct.pack("<I", 7) + b"setup code goes on"


def test_a_kernel_is_taken_out_of_its_wrapping() -> None:
    kernel = ELF + bytes(range(256)) * 50
    assert elf(bz_image(zstd.compress(kernel))) == kernel
    for wrong in (b"", b"MZ" + bytes(2000), bz_image(b"\x1f\x8b"), bz_image(zstd.compress(b"not ELF"))):
        with pytest.raises(KernelUnavailable):
            elf(wrong)


def test_what_is_not_ours_is_pytests() -> None:
    options, rest = parser().parse_known_args(["--systemd", "-x", "-k", "oom", "--append", "apparmor=0"])
    assert (options.systemd, options.append, rest) == (True, "apparmor=0", ["-x", "-k", "oom"])
    assert "tests/kernel/test_cgroups.py" in pytest_command(rest, "", systemd=True, colour=False)
    assert pytest_command(["tests/unit"], "", systemd=False, colour=False)[-1] == "tests/unit"


@pytest.mark.parametrize("systemd", [False, True])
@pytest.mark.parametrize("confinement", CONFINEMENTS)
def test_every_guest_has_tests_that_are_there(confinement: str, systemd: bool) -> None:
    chosen = selection.arguments(REPOSITORY, confinement, systemd=systemd)
    assert chosen
    for name in chosen:
        assert (REPOSITORY / name.partition("::")[0]).is_file()


def test_a_selection_of_nothing_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"tests/kernel/test_teapot\*"):
        list(selection.matching(REPOSITORY, "tests/kernel/test_teapot*.py"))


def test_a_policy_needs_debians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "NODE", tmp_path)
    with pytest.raises(policy.PolicyUnavailable, match="is selinux-policy-default installed"):
        policy.prepare(tmp_path / "cache")
    installed = tmp_path / policy.POLICY
    installed.mkdir(parents=True)
    (installed / "policy.33").write_bytes(b"a")
    first = policy.fingerprint()
    (installed / "policy.33").write_bytes(b"b")
    assert policy.fingerprint() != first


def test_the_script_goes_where_the_project_is_and_ends_in_time() -> None:
    lines = script(["echo", "a b"], seconds=50, environment={"A": "b c"}).splitlines()
    assert lines[0] == "export A='b c'"
    assert lines[-1] == "exec timeout --signal=INT --kill-after=30 50 echo 'a b'"


@pytest.mark.parametrize("path", ["/a b/c", "/a\tb", "/a,b", "/50%", "/a$b", "/mnt", "/mnt/tare", '/a"b'])
def test_a_directory_that_the_guest_cannot_be_told_is_refused(path: str) -> None:
    with pytest.raises(GuestImpossible, match=r"^the project's directory is /"):
        check_place("the project's directory", Path(path))


def test_usual_directories_are_not_refused() -> None:
    for path in ("/home/me/tare-1.0_x@y+z", "/mnt2/tare", "/srv/mnt/tare", str(REPOSITORY)):
        check_place("the project's directory", Path(path))
