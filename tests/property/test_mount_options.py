"""Mount options come to flags that the kernel takes together, whatever their order and however they contradict each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tare.handlers import options
from tare.launch import linux

FLAGS = sorted({*options.SETS, *options.CLEARS})
KNOWN = [*FLAGS, *(f"r{name}" for name in FLAGS), *options.PROPAGATION, *options.NOTHING, "bind", "rbind"]
NAMES = st.sampled_from(KNOWN)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
WORDS = TEXT.filter(lambda word: word != "" and word not in KNOWN)
ATIME = linux.MOUNT_ATTR_ATIME


@given(st.lists(NAMES, max_size=12))
def test_the_kernel_takes_what_any_options_come_to(given_options: list[str]) -> None:
    flags = options.parse(given_options)
    for attributes, clear in ((flags.set, flags.clear), (flags.recursive_set, flags.recursive_clear)):
        # mount_setattr(2): access times are set by clearing their whole field, to one of three values.
        assert clear & ATIME in (0, ATIME)
        assert attributes & ATIME in (0, linux.MOUNT_ATTR_NOATIME, linux.MOUNT_ATTR_STRICTATIME)
        assert not attributes & ATIME or clear & ATIME == ATIME
        assert not attributes & clear & ~ATIME
    assert flags.data == ()


@given(st.lists(NAMES, max_size=8), st.sampled_from(sorted(options.SETS)))
def test_the_last_of_two_holds(before: list[str], last: str) -> None:
    flags = options.parse([*before, last])
    if last in options.ACCESS_TIME_OPTIONS:
        assert flags.set & ATIME == options.SETS[last] and flags.clear & ATIME == ATIME
    else:
        assert flags.set & options.SETS[last] and not flags.clear & options.SETS[last]


@given(st.lists(NAMES, max_size=8), st.sampled_from(["rw", "suid", "dev", "exec", "diratime", "symfollow"]))
def test_the_last_of_two_holds_when_it_takes_away(before: list[str], last: str) -> None:
    flags = options.parse([*before, last])
    assert not flags.set & options.CLEARS[last] and flags.clear & options.CLEARS[last]


@given(st.lists(NAMES, max_size=8), st.sampled_from(sorted(options.PROPAGATION)))
def test_the_last_propagation_holds(before: list[str], last: str) -> None:
    assert options.parse([*before, last]).propagation == options.PROPAGATION[last]


@given(st.lists(WORDS))
def test_what_is_no_flag_is_the_file_systems_own(words: list[str]) -> None:
    flags = options.parse(words)
    assert flags.data == tuple(options.pair(word) for word in words)
    assert (flags.set, flags.clear, flags.recursive_set, flags.recursive_clear, flags.bind) == (0, 0, 0, 0, False)


@given(TEXT.filter(lambda text: "=" not in text), TEXT)
def test_pairs(key: str, value: str) -> None:
    assert options.pair(f"{key}={value}") == (key.encode(), value.encode())
    assert options.pair(key) == (key.encode(), None)
