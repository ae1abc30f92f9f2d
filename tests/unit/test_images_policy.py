"""The policy file: which rule a repository has, and what is refused instead of guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.images.errors import SignatureValidationFailed
from tare.images.policy import ACCEPT_ALL, Verdict, parse, read

TEXT = """
default = "reject"
[repositories]
"docker.io" = "accept"
"registry.example:5000/prod/" = { keys = ["prod.pub", "-----BEGIN PUBLIC KEY-----"] }
"registry.example:5000/prod/tools" = "reject"
"""


def key_named(name: str) -> bytes:
    """The content of a key's file."""
    return f"key {name}".encode()


@pytest.mark.parametrize(
    ("repository", "verdict", "prefix"),
    [
        ("docker.io/library/busybox", Verdict.ACCEPT, "docker.io"),
        ("docker.io.evil.example/x", Verdict.REJECT, ""),
        ("registry.example:5000/prod", Verdict.SIGNED, "registry.example:5000/prod"),
        ("registry.example:5000/prod/a/b", Verdict.SIGNED, "registry.example:5000/prod"),
        ("registry.example:5000/production", Verdict.REJECT, ""),
        ("registry.example:5000/prod/tools/x", Verdict.REJECT, "registry.example:5000/prod/tools"),
        ("", Verdict.REJECT, ""),
    ],
)
def test_the_longest_prefix_decides(repository: str, verdict: Verdict, prefix: str) -> None:
    rule = parse(TEXT, key_named).rule(repository)
    assert (rule.verdict, rule.prefix) == (verdict, prefix)


def test_keys_are_files_or_texts() -> None:
    rule = parse(TEXT, key_named).rule("registry.example:5000/prod/x")
    assert rule.keys == (b"key prod.pub", b"-----BEGIN PUBLIC KEY-----")


def test_what_is_not_said_is_accepted() -> None:
    assert parse("", key_named).rule("any/thing").verdict is Verdict.ACCEPT


@pytest.mark.parametrize(
    "text",
    [
        "default = 1",
        'default = "maybe"',
        'defaults = "accept"',
        "repositories = []",
        '[repositories]\n"a.b" = { keys = [] }',
        '[repositories]\n"a.b" = { keys = [1] }',
        '[repositories]\n"a.b" = { keys = ["k"], other = 1 }',
        '[repositories]\n"https://a.b" = "accept"',
        '[repositories]\n"a.b" = "accept"\n"a.b/" = "reject"',
        '[repositories]\n"" = "accept"',
        "default = ",
        "a = " + "[" * 5000,
    ],
)
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text, key_named)


def test_a_file_that_cannot_be_used_refuses_everything(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    assert read(path, optional=True) == ACCEPT_ALL
    with pytest.raises(SignatureValidationFailed, match=r"^SignatureValidationFailed: read the policy .*policy.toml"):
        read(path, optional=False)
    for text in ("default = 5", '[repositories]\n"a.b" = { keys = ["missing.pub"] }'):
        path.write_text(text)
        with pytest.raises(SignatureValidationFailed):
            read(path, optional=True)
    (tmp_path / "missing.pub").write_text("found")
    assert read(path, optional=True).rule("a.b/c").keys == (b"found",)
    path.unlink()
    path.mkdir()
    with pytest.raises(SignatureValidationFailed):
        read(path, optional=True)
