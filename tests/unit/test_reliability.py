"""That the table of operations in the documentation is the operations'."""

from __future__ import annotations

from pathlib import Path

from tests.support.victims import CHECKPOINTS, ELSEWHERE, OF_A_TRIP, operations, table

RELIABILITY = Path(__file__).parents[2] / "docs/reliability.md"


def test_the_documentation_shows_the_operations() -> None:
    assert table() in RELIABILITY.read_text(), f"it should have\n{table()}"


def test_no_operation_is_left_out() -> None:
    """Whoever writes one says where it is tested."""
    assert {*OF_A_TRIP, *CHECKPOINTS, *ELSEWHERE} == operations().keys()
