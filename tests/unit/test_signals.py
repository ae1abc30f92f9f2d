"""Signal names, and which signal stops a container."""

from __future__ import annotations

import pytest

from tare.errors import InvalidArgument
from tare.runtime.signals import signal_number, stop_signal


@pytest.mark.parametrize(
    ("name", "number"),
    [("SIGTERM", 15), ("term", 15), (" 9 ", 9), ("SIGRTMIN", 34), ("SIGRTMIN+3", 37), ("rtmax-1", 63), ("SIGRTMAX", 64),
     ("SIGCLD", 17), ("SIGPOLL", 29), ("IOT", 6), ("64", 64), ("SIGRTMIN+30", 64)],
)  # fmt: skip
def test_names(name: str, number: int) -> None:
    assert signal_number(name) == number


@pytest.mark.parametrize(
    "name",
    [
        "",
        "SIG",
        "SIGNOPE",
        "0",
        "65",
        "-1",
        "SIGRTMIN-1",
        "SIGRTMIN+31",
        "SIGRTMAX+1",
        "SIGRTMIN+",
        "²",
        "SIG_DFL",
        "9999",
    ],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidArgument, match="there is no such signal"):
        signal_number(name)


def test_which_signal_stops() -> None:
    assert stop_signal(0, "") == 15
    assert stop_signal(0, "SIGQUIT") == 3
    assert stop_signal(10, "SIGQUIT") == 10
    with pytest.raises(InvalidArgument):
        stop_signal(0, "nonsense")
