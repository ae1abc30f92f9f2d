"""What needs another machine than this one: guests with pure control groups v2, under a plain init and under systemd.

Each guest runs its own selection of tests (`scripts/vm/selection.py`), and says which of them failed; one by itself: `./dev test-vm`.
"""

from __future__ import annotations

import pytest

from tests.vm.conftest import GUEST_SECONDS, GUESTS, Guests

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.mark.timeout(len(GUESTS) * (GUEST_SECONDS + 120))
@pytest.mark.parametrize("name", GUESTS)
def test_in_a_guest(name: str, guests: Guests) -> None:
    code, told = guests.result(name)
    print(told)
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert (code, failed) == (0, []), told[-2000:]
