"""Challenges of any shape are read without a crash, and well-formed ones come back whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tare.images.auth import parse_challenges

token = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,10}", fullmatch=True)
text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@given(st.lists(st.text(max_size=100) | st.from_regex(r'[a-zA-Z=",\\ ]{0,40}', fullmatch=True), max_size=3))
def test_anything_is_read(values: list[str]) -> None:
    for challenge in parse_challenges(values):
        assert challenge.scheme == challenge.scheme.lower()


@given(
    st.lists(
        st.tuples(token, st.dictionaries(token.map(str.lower), text, min_size=1, max_size=3)), min_size=1, max_size=3
    )
)
def test_what_is_written_is_read(challenges: list[tuple[str, dict[str, str]]]) -> None:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"')

    header = ", ".join(
        f"{scheme} " + ", ".join(f'{name}="{quoted(value)}"' for name, value in parameters.items())
        for scheme, parameters in challenges
    )
    found = [(challenge.scheme, challenge.parameters) for challenge in parse_challenges([header])]
    assert found == [(scheme.lower(), parameters) for scheme, parameters in challenges]
