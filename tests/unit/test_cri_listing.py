"""Lists as bytes are the messages that they stand for, and each item is made once for as long as its record is the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tare.cri import listing
from tare.cri.v1 import api_pb2 as pb


class Thing:
    """A record."""

    def __init__(self, name: str, text: str = "") -> None:
        self.id = name
        self.text = text


class Things:
    """Some of them, with how often each was translated."""

    def __init__(self, *things: Thing) -> None:
        self.all = list(things)
        self.made: list[str] = []
        self.lists = listing.Lists(self.item, pb.ListContainersResponse.CONTAINERS_FIELD_NUMBER, lambda: self.all)

    def item(self, thing: Thing) -> pb.Container:
        """A message of it."""
        self.made.append(thing.id)
        return pb.Container(id=thing.id, labels={"text": thing.text} if thing.text else {})

    def listed(self) -> list[tuple[str, str]]:
        """What a client reads."""
        reply = pb.ListContainersResponse.FromString(self.lists.encoded(self.all))
        return [(item.id, item.labels.get("text", "")) for item in reply.containers]


@given(st.lists(st.text(max_size=5), max_size=20), st.integers(0, 40_000))
def test_the_bytes_are_the_message(names: list[str], length: int) -> None:
    things = Things(*(Thing(f"{number}", name * length) for number, name in enumerate(names)))
    whole = pb.ListContainersResponse(containers=[things.item(thing) for thing in things.all])
    assert pb.ListContainersResponse.FromString(things.lists.encoded(things.all)) == whole


@given(st.integers(0, (1 << 64) - 1))
def test_numbers_are_protobufs(value: int) -> None:
    assert b"\x08" + listing.varint(value) == pb.UInt64Value(value=value).SerializeToString() or value == 0


def test_an_item_is_made_again_where_its_record_is_another() -> None:
    things = Things(Thing("a"), Thing("b"))
    assert things.listed() == things.listed() == [("a", ""), ("b", "")]
    assert things.made == ["a", "b"]
    things.all[0] = Thing("a", "new")
    assert things.listed() == [("a", "new"), ("b", "")]
    assert things.made == ["a", "b", "a"]
    things.all.reverse()
    assert things.listed() == [("b", ""), ("a", "new")]
    assert things.made == ["a", "b", "a"]


def test_what_is_gone_is_not_kept() -> None:
    things = Things(*(Thing(f"{number}") for number in range(listing.SPARE + 10)))
    things.listed()
    things.lists.encoded(things.all[:1])  # a filter's few: the others are there
    things.listed()
    assert len(things.made) == listing.SPARE + 10
    del things.all[5:]
    things.listed()
    assert len(things.lists._known) == 5
