"""Image references: how the names that people write become the names that registries know. Pure.

    busybox                              docker.io/library/busybox:latest
    grafana/loki:3                       docker.io/grafana/loki:3
    localhost:5000/a/b@sha256:…          as it is
    quay.io/x/y:1@sha256:…               the digest decides, the tag is kept for the record

The rules are those of Docker's distribution/reference grammar and of the OCI distribution spec ("Pulling manifests"). A
word of 64 hex digits is an image ID, not a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tare.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
MAX_NAME = 255
MAX_TEXT = 1024

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


class MalformedReference(InvalidArgument):
    """This can never be the name of an image."""

    def __init__(self, text: str, cause: str, hint: str | None = None) -> None:
        super().__init__(f"malformed image reference {text[:300]!r}", cause=cause, hint=hint)


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised reference; a tag, a digest or both are set."""

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """The repository, "docker.io/library/busybox"."""
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str | None:
        """repository:tag, None where a digest decides."""
        return f"{self.name}:{self.tag}" if self.tag and not self.digest else None

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def at(self, digest: str) -> str:
        """repository@digest."""
        return f"{self.name}@{digest}"

    def with_digest(self, digest: str) -> Reference:
        """The same repository's content of that digest."""
        return replace(self, digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def is_digest(text: str) -> bool:
    """Is it the digest of a known algorithm, in full?"""
    return _DIGEST.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """The reference that `text` means. Raises MalformedReference."""
    if not text:
        raise MalformedReference(text, "it is empty")
    if len(text) > MAX_TEXT:
        raise MalformedReference(text, f"it has more than {MAX_TEXT} characters")
    rest, mark, digest = text.partition("@")
    if mark and not is_digest(digest):
        raise MalformedReference(
            text, f"{digest[:200]!r} is no digest", "a digest is sha256: and 64 lowercase hex digits"
        )
    name, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise MalformedReference(text, f"{tag[:200]!r} is no tag", "a tag has up to 128 letters, digits, _ . -")
    if not digest and tag is None:
        if _HEX64.fullmatch(name):
            raise MalformedReference(text, "64 hex digits are an image ID, not a name")
        tag = DEFAULT_TAG
    domain, path = _split_domain(name)
    _check_name(text, domain, path)
    return Reference(domain, path, tag, digest or None)


def _split_tag(text: str) -> tuple[str, str | None]:
    """A tag follows the last colon after the last slash (a colon before is a port's)."""
    start = text.rfind("/") + 1
    mark = text.find(":", start)
    if mark < 0:
        return text, None
    return text[:mark], text[mark + 1 :]


def _split_domain(name: str) -> tuple[str, str]:
    """A first component with a dot, a colon or an uppercase letter, or "localhost", is a registry's address."""
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        first, rest = DEFAULT_DOMAIN, name
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _check_name(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise MalformedReference(text, f"{domain[:200]!r} is no registry's address")
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            hint = "names are lowercase" if component.lower() != component else "letters, digits and single separators"
            raise MalformedReference(text, f"{component[:200]!r} cannot be part of a repository's name", hint)
    if len(domain) + 1 + len(path) > MAX_NAME:
        raise MalformedReference(text, f"the name has more than {MAX_NAME} characters")
