"""Leases: which address comes next, and that none is lost or given twice."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, ResourceExhausted
from tare.network.addresses import REST, Leases, capacity, choose, gateway
from tare.state.database import Database

SMALL = ipaddress.IPv4Network("10.9.0.0/29")


class Clock:
    """A clock that tests set, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 1

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "state.db")
    yield opened
    opened.close()


def test_the_first_three_of_a_subnet_and_the_last_are_not_for_pods() -> None:
    assert str(gateway(SMALL)) == "10.9.0.1/29"
    assert capacity(SMALL) == 5
    assert choose(SMALL, (), {}, None) == "10.9.0.2"
    assert choose(SMALL, (), {}, "10.9.0.6") == "10.9.0.2"


@pytest.mark.parametrize(
    ("held", "resting", "last", "chosen"),
    [
        ((), {}, "10.9.0.2", "10.9.0.3"),
        (("10.9.0.3", "10.9.0.4"), {}, "10.9.0.2", "10.9.0.5"),
        ((), {"10.9.0.3": 1}, "10.9.0.2", "10.9.0.4"),
        (("10.9.0.2",), {f"10.9.0.{n}": 10 - n for n in range(3, 7)}, "10.9.0.3", "10.9.0.6"),
        (tuple(f"10.9.0.{n}" for n in range(2, 7)), {}, "10.9.0.3", None),
    ],
)
def test_the_next_in_turn_then_the_longest_rested(
    held: tuple[str, ...], resting: dict[str, int], last: str, chosen: str | None
) -> None:
    assert choose(SMALL, held, resting, last) == chosen


def test_leases_outlive_the_daemon(database: Database) -> None:
    leases = Leases(database)
    assert str(leases.take(SMALL, "a")) == "10.9.0.2"
    leases.release("a")
    again = Leases(database)
    assert str(again.take(SMALL, "b")) == "10.9.0.3"
    assert again.held(str(SMALL)) == {"10.9.0.3": "b"}
    assert again.pods() == {"b"}


def test_a_pod_holds_one_address_whatever_the_network(database: Database) -> None:
    leases = Leases(database)
    first = leases.take(SMALL, "a")
    for subnet in (SMALL, ipaddress.IPv4Network("10.10.0.0/24")):
        with pytest.raises(FailedPrecondition, match="pod a: it holds one already"):
            leases.take(subnet, "a")
    assert leases.of("a") == {str(SMALL): str(first)}
    leases.release("a")
    assert (leases.pods(), leases.of("a")) == (set(), {})
    leases.release("a")


def test_an_exhausted_range_says_which_and_what_to_do(database: Database) -> None:
    leases = Leases(database)
    for pod in "abcde":
        leases.take(SMALL, pod)
    with pytest.raises(ResourceExhausted, match=r"all 5 addresses of 10\.9\.0\.0/29 are held.*\[network\] subnet"):
        leases.take(SMALL, "f")
    leases.release("c")
    assert str(leases.take(SMALL, "f")) == "10.9.0.4"


def test_an_address_rests_a_minute_while_others_are_free(database: Database) -> None:
    clock = Clock()
    leases = Leases(database, clock)
    for pod in "abcd":
        leases.take(SMALL, pod)
    leases.release("a")  # 10.9.0.2
    clock.now += 1
    assert str(leases.take(SMALL, "e")) == "10.9.0.6"
    leases.release("b")  # 10.9.0.3
    leases.release("e")
    clock.now += REST - 1
    assert str(leases.take(SMALL, "f")) == "10.9.0.2"  # rested
    assert str(leases.take(SMALL, "g")) == "10.9.0.3"  # the longest rested of those that still rest
    clock.now += REST
    leases.take(SMALL, "h")
    assert database.execute("SELECT count(*) FROM leases WHERE released_at IS NOT NULL") == [(0,)]


def test_rows_do_not_pile_up(database: Database) -> None:
    clock = Clock()
    leases = Leases(database, clock)
    network = ipaddress.IPv4Network("10.9.0.0/16")
    for number in range(300):
        leases.take(network, str(number))
        leases.release(str(number))
        clock.now += REST
    assert database.execute("SELECT count(*) FROM leases")[0][0] <= 2
    assert str(leases.take(network, "x")) == "10.9.1.46"
