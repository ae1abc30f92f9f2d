"""Whose images may be used: the policy file, from repositories' prefixes to what is asked of an image. `signatures.py` says what a signature is.

    default = "accept"                                    # of what no prefix fits; "accept" unless told

    [repositories]                                        # the longest prefix that fits decides, at the borders of path components
    "docker.io" = "reject"
    "registry.example/prod" = { keys = ["prod.pub"] }     # signed by one of these: PEM files (beside the policy file, or absolute), or PEM text

A file that cannot be used refuses everything: an image must not run because of a typing error.
"""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tare.images.errors import SignatureValidationFailed

KEY_FILE_LIMIT = 64 << 10
PEM = "-----BEGIN "


class Verdict(enum.Enum):
    """What is asked of an image."""

    ACCEPT = "accept"
    REJECT = "reject"
    SIGNED = "signed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is asked of the images of a repository, under which `prefix` of the file ("" for its default). `keys` are PEM texts."""

    verdict: Verdict
    prefix: str = ""
    keys: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        return f"the rule of {self.prefix}" if self.prefix else "the default rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy file's rules."""

    default: Rule = Rule(verdict=Verdict.ACCEPT)
    rules: Mapping[str, Rule] = field(default_factory=dict)

    def rule(self, repository: str) -> Rule:
        """The rule of a repository ("docker.io/library/busybox")."""
        name = repository
        while name:
            if name in self.rules:
                return self.rules[name]
            name = name.rpartition("/")[0]
        return self.default


ACCEPT_ALL = Policy()


def parse(text: str, read_key: Callable[[str], bytes]) -> Policy:
    """The policy in a file's text; `read_key` gives the contents of a key's file. Raises ValueError in plain words, OSError."""
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    unknown = set(document) - {"default", "repositories"}
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    repositories = document.get("repositories", {})
    if not isinstance(repositories, dict):
        raise ValueError("repositories is no table")
    rules = {}
    for given, value in repositories.items():
        prefix = given.rstrip("/")
        if not prefix or "://" in prefix or "@" in prefix or prefix in rules:
            raise ValueError(f"repositories: {given!r} is no beginning of a repository's name, or there twice")
        rules[prefix] = _rule(prefix, value, read_key)
    return Policy(default=_rule("", document.get("default", "accept"), read_key), rules=rules)


def _rule(prefix: str, value: object, read_key: Callable[[str], bytes]) -> Rule:
    where = f'repositories."{prefix}"' if prefix else "default"
    if value in (Verdict.ACCEPT.value, Verdict.REJECT.value):
        return Rule(verdict=Verdict(value), prefix=prefix)
    keys = value.get("keys") if isinstance(value, dict) and set(value) == {"keys"} else None
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(f'{where} is neither "accept" nor "reject" nor {{ keys = ["FILE", …] }}')
    texts = tuple(key.encode() if key.lstrip().startswith(PEM) else read_key(key) for key in keys)
    return Rule(verdict=Verdict.SIGNED, prefix=prefix, keys=texts)


def read(path: Path, *, optional: bool) -> Policy:
    """The policy of a file; where it is `optional` and absent, everything is accepted. Blocks. Raises SignatureValidationFailed."""

    def read_key(name: str) -> bytes:
        with open(path.parent / name, "rb") as file:
            return file.read(KEY_FILE_LIMIT)

    try:
        return parse(path.read_text(), read_key)
    except FileNotFoundError as error:
        if optional and error.filename == str(path):
            return ACCEPT_ALL
        raise _unusable(path, error) from error
    except (OSError, ValueError) as error:
        raise _unusable(path, error if isinstance(error, OSError) else str(error)) from error


def _unusable(path: Path, cause: Exception | str) -> SignatureValidationFailed:
    return SignatureValidationFailed(f"read the policy {path}", cause=cause, hint="no image is used until it is right")
