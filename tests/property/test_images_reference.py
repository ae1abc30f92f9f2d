"""References of any shape: what parses stays what it is when written out, and nothing else than MalformedReference is raised."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tare.images.reference import MalformedReference, parse

component = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,8}){0,2}", fullmatch=True)
domain = st.from_regex(r"[a-z0-9]{1,8}(\.[a-z0-9]{1,8}){1,2}(:[0-9]{1,5})?|localhost(:[0-9]{1,4})?", fullmatch=True)
tag = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
digest = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)


@given(domain, st.lists(component, min_size=1, max_size=4), st.none() | tag, st.none() | digest)
def test_well_formed_names_parse_into_their_parts(
    where: str, path: list[str], label: str | None, hash: str | None
) -> None:
    text = f"{where}/{'/'.join(path)}" + (f":{label}" if label else "") + (f"@{hash}" if hash else "")
    reference = parse(text)
    assert (reference.domain, reference.digest) == (where, hash)
    assert reference.path == "/".join(path)
    assert reference.tag == (label or (None if hash else "latest"))
    assert parse(str(reference)) == reference


@given(st.text(max_size=300) | st.from_regex(r"[a-zA-Z0-9./:@_\[\]-]{0,80}", fullmatch=True))
@example("a:b:c@d@e")
@example("[::1]")
def test_anything_is_a_reference_or_malformed(text: str) -> None:
    try:
        reference = parse(text)
    except MalformedReference:
        return
    assert parse(str(reference)) == reference
    assert ".." not in reference.path.split("/")
    assert not reference.domain.startswith(".") and "/" not in reference.domain
