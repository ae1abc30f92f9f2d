"""Which pod, container or image a word on the command line means (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tare.errors import InvalidArgument, NotFound


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that can be meant: `kind` is "pod" or "container"."""

    kind: str
    id: str
    name: str


def pick(candidates: Sequence[Candidate], word: str, what: str) -> Candidate:
    """The one whose ID is `word`, else whose name is, else whose ID begins so.

    `what` names the kinds looked for ("container", "pod or container"). Raises NotFound, and InvalidArgument where several fit.
    """
    tests = (
        [c for c in candidates if c.id == word],
        [c for c in candidates if c.name == word],
        [c for c in candidates if c.id.startswith(word)],
    )
    for found in tests:
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f"{c.kind} {c.id[:13]} ({c.name})" for c in found)
            raise InvalidArgument(f"{word} fits several: {names}", hint="use more of the ID")
    raise NotFound(f"there is no {what} {word}")
