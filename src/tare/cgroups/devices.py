"""The device cgroup: OCI's rules as lines for v1's files, and as the BPF program of a v2 group (pure; `bpf` attaches it).

The rules are in order, and the last that matches decides; where none matches, nothing is allowed. Of an access that asks
for several things (read and write), an allowing rule must have all and a denying one any.

Source: OCI runtime-spec, config-linux.md, "Allowed Device list"; kernel bpf(2), struct bpf_cgroup_dev_ctx.
"""

from __future__ import annotations

import struct

from tare.cgroups.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tare.cgroups.section import Section

MKNOD, READ, WRITE = 1, 2, 4
LETTERS = {"r": READ, "w": WRITE, "m": MKNOD}
EVERYTHING = MKNOD | READ | WRITE
BLOCK, CHARACTER = 1, 2
TYPES = {"a": None, "b": BLOCK, "c": CHARACTER, "u": CHARACTER}
HIGHEST = (1 << 31) - 1

INSTRUCTION = struct.Struct("<BBhi")
LOAD_WORD, MOVE_REGISTER, MOVE, AND, SHIFT_RIGHT, JUMP_EQUAL, JUMP_UNEQUAL, EXIT = (
    0x61, 0xBF, 0xB7, 0x54, 0x74, 0x15, 0x55, 0x95,
)  # fmt: skip
ANSWER, CONTEXT, TYPE, ACCESS, MAJOR, MINOR = 0, 1, 2, 3, 4, 5


class Rule(Value):
    """`type` BLOCK, CHARACTER or None for both; None for a number is any; `access` bits of MKNOD, READ, WRITE."""

    __slots__ = ("access", "allow", "major", "minor", "type")

    def __init__(
        self,
        *,
        allow: bool,
        type: int | None = None,
        major: int | None = None,
        minor: int | None = None,
        access: int = EVERYTHING,
    ) -> None:
        self.allow = allow
        self.type = type
        self.major = major
        self.minor = minor
        self.access = access

    @property
    def sweeping(self) -> bool:
        """Whether it is about all devices and all that can be done to them."""
        return (self.type, self.major, self.minor, self.access) == (None, None, None, EVERYTHING)


def parse(sections: Iterable[Section]) -> tuple[Rule, ...]:
    """`linux.resources.devices`. Raises InvalidArgument."""
    rules = []
    for section in sections:
        kind, access = section.text("type") or "a", section.text("access") or "rwm"
        if kind == "p":
            continue
        if kind not in TYPES or not set(access) <= set(LETTERS):
            raise section.wrong("type", f"{kind!r} with access {access!r} is no device rule")
        numbers = [section.integer(key, -1, HIGHEST) for key in ("major", "minor")]
        major, minor = (None if number is None or number < 0 else number for number in numbers)
        bits = sum(LETTERS[letter] for letter in set(access))
        allow = section.flag("allow")
        if allow is None:
            raise section.wrong("allow", "is absent")
        rules.append(Rule(allow=allow, type=TYPES[kind], major=major, minor=minor, access=bits))
    return tuple(rules)


def lines(rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """(file, line) for a v1 group, which begins with what its parent may: allowing all first says nothing."""
    found = []
    for index, rule in enumerate(rules):
        file = "devices.allow" if rule.allow else "devices.deny"
        if rule.sweeping:
            if index or not rule.allow:
                found.append((file, "a"))
            continue
        found += [(file, f"{device} {letters(rule.access)}") for device in devices_of(rule)]
    return found


def change(listed: str, rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """(file, line) that bring a v1 group from the text of its devices.list to these rules, without a moment in which more is denied.

    To or from "everything" the kernel goes only while there are no groups inside; denials that follow "everything" are not in the
    list, so that those of before are not known.
    """
    everything, wanted = evaluated(rules)
    last = max((index for index, rule in enumerate(rules) if rule.sweeping), default=-1)
    denied = lines(rules[last + 1 :]) if everything else []
    if denied:
        return [("devices.allow", "a"), *denied]
    return between(listed, everything, wanted)


def change_back(listed: str, before: str) -> list[tuple[str, str]]:
    """The same to what an earlier devices.list said."""
    return between(listed, *exceptions(before))


def between(listed: str, everything: bool, wanted: Mapping[str, int]) -> list[tuple[str, str]]:
    """What is new is allowed, then what is no more is denied."""
    all_before, before = exceptions(listed)
    if everything:
        return [] if all_before else [("devices.allow", "a")]
    found = [("devices.deny", "a")] if all_before else []
    for file, first, second in (("devices.allow", wanted, before), ("devices.deny", before, wanted)):
        for device, bits in first.items():
            left = bits & ~second.get(device, 0)
            if left:
                found.append((file, f"{device} {letters(left)}"))
    return found


def exceptions(listed: str) -> tuple[bool, dict[str, int]]:
    """Whether a group may use everything, and else "c 1:3" → access bits, from devices.list."""
    allowed: dict[str, int] = {}
    for line in listed.splitlines():
        kind, numbers, access = line.split()
        if kind == "a":
            return True, {}
        device = f"{kind} {numbers}"
        allowed[device] = allowed.get(device, 0) | sum(LETTERS[letter] for letter in access)
    return False, allowed


def evaluated(rules: Sequence[Rule]) -> tuple[bool, dict[str, int]]:
    """The same of rules in order, as the kernel takes them: a denial counts for the very device that was allowed."""
    everything, allowed = True, dict[str, int]()
    for rule in rules:
        if rule.sweeping:
            everything, allowed = rule.allow, {}
            continue
        if everything:
            continue
        for device in devices_of(rule):
            bits = allowed.get(device, 0)
            allowed[device] = bits | rule.access if rule.allow else bits & ~rule.access
    return everything, allowed


def devices_of(rule: Rule) -> list[str]:
    """ "c 1:3", as v1 writes it; both kinds where the rule is about both."""
    numbers = ":".join("*" if number is None else str(number) for number in (rule.major, rule.minor))
    kinds = {BLOCK: "b", CHARACTER: "c"}
    return [f"{kinds[kind]} {numbers}" for kind in (kinds if rule.type is None else (rule.type,))]


def letters(access: int) -> str:
    """Access bits as "rwm"."""
    return "".join(letter for letter, bit in LETTERS.items() if access & bit)


def merged(rules: Sequence[Rule]) -> list[Rule]:
    """Allowing rules for the same device, with no denying one between them, made one: so that "r" and "w" allow both together."""
    found: list[Rule] = []
    start = 0
    for rule in rules:
        if rule.sweeping:
            found.clear()
        if not rule.allow or rule.sweeping:
            found.append(rule)
            start = len(found)
            continue
        same = (rule.type, rule.major, rule.minor)
        for index in range(start, len(found)):
            other = found[index]
            if (other.type, other.major, other.minor) == same:
                found[index] = Rule(
                    allow=True, type=rule.type, major=rule.major, minor=rule.minor, access=other.access | rule.access
                )
                break
        else:
            found.append(rule)
    return found


def program(rules: Sequence[Rule]) -> bytes:
    """BPF of type CGROUP_DEVICE: 1 to allow, 0 to deny."""
    code = [
        instruction(LOAD_WORD, TYPE, CONTEXT, 0),
        instruction(MOVE_REGISTER, ACCESS, TYPE),
        instruction(AND, TYPE, value=0xFFFF),
        instruction(SHIFT_RIGHT, ACCESS, value=16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8),
    ]
    for rule in reversed(merged(rules)):
        code += block(rule)
        if rule.sweeping:
            return b"".join(code)
    code += [instruction(MOVE, ANSWER, value=0), instruction(EXIT)]
    return b"".join(code)


def block(rule: Rule) -> list[bytes]:
    """One rule: jumps over its answer where it does not match."""
    tests: list[tuple[int, int, int]] = []
    if rule.type is not None:
        tests.append((JUMP_UNEQUAL, TYPE, rule.type))
    if rule.major is not None:
        tests.append((JUMP_UNEQUAL, MAJOR, rule.major))
    if rule.minor is not None:
        tests.append((JUMP_UNEQUAL, MINOR, rule.minor))
    rights: list[bytes] = []
    if rule.access != EVERYTHING:
        # The context's register is free once its three words are loaded.
        mask = EVERYTHING & ~rule.access if rule.allow else rule.access
        jump = JUMP_UNEQUAL if rule.allow else JUMP_EQUAL
        rights = [
            instruction(MOVE_REGISTER, CONTEXT, ACCESS),
            instruction(AND, CONTEXT, value=mask),
            instruction(jump, CONTEXT, offset=2, value=0),
        ]
    answer = [instruction(MOVE, ANSWER, value=int(rule.allow)), instruction(EXIT)]
    length = len(tests) + len(rights) + len(answer)
    jumps = [
        instruction(code, register, offset=length - index - 1, value=value)
        for index, (code, register, value) in enumerate(tests)
    ]
    return jumps + rights + answer


def instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """struct bpf_insn."""
    return INSTRUCTION.pack(code, target | source << 4, offset, value)
