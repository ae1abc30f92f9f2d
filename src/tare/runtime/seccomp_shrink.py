"""A seccomp program made smaller without a change to what it answers (pure): it is loaded at every start, and that takes as long as it is long.

libseccomp tests one call's number after the other. Most neighbours have the same answer, so here the program is asked once for every range
of numbers that it cannot tell apart, and written anew as a search among the ranges that differ:

    architecture ─► number ─► half of the ranges ─► … ─► an answer, or where the arguments count,
                                                         the instructions that libseccomp has for these

A program that is not of this kind, or would not become shorter, stays what it is.

Source: Linux's networking/filter.rst for the instructions; seccomp(2) for what is looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Instruction = tuple[int, int, int, int]

INSTRUCTION = struct.Struct("<HBBI")
LOAD, AND, JUMP, EQUAL, GREATER, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
CONDITIONS = (EQUAL, GREATER, AT_LEAST, ANY_BIT)
NUMBER_AT, ARCHITECTURE_AT, ADDRESS_AT = 0, 4, 8
END = 1 << 32
FARTHEST = 255  # instructions that a condition can lead past


class NotOfThisKind(Exception):
    """The program does something with a call's number or architecture but compare it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a range of numbers ends: with this value, or (`at` not −1) with the instructions from there on, which look at arguments."""

    value: int = 0
    at: int = -1


def shrunk(program: bytes) -> bytes:
    """The same filter in fewer instructions, or as it was."""
    lines = list(INSTRUCTION.iter_unpack(program))
    try:
        smaller = rewritten(lines)
    except NotOfThisKind:
        return program
    return b"".join(INSTRUCTION.pack(*line) for line in smaller) if len(smaller) < len(lines) else program


def rewritten(lines: Sequence[Instruction]) -> list[Instruction]:
    """The search, and behind it what looks at arguments. Raises NotOfThisKind."""
    architectures, edges = compared(lines)
    other = next(number for number in range(len(architectures) + 1) if number not in architectures)
    searches = [(value, ranges(lines, value, edges)) for value in architectures]
    rest = search(ranges(lines, other, edges))
    code: list[Instruction | Answer] = [(LOAD, 0, 0, ARCHITECTURE_AT)]
    for value, found in searches:
        body = search(found)
        if len(body) <= FARTHEST:
            code.append((EQUAL, 0, len(body), value))
        else:
            code += [(EQUAL, 1, 0, value), (JUMP, 0, 0, len(body))]
        code += body
    return linked([*code, *rest], lines)


def compared(lines: Sequence[Instruction]) -> tuple[list[int], list[int]]:
    """What the architecture is compared with, the first one first, and where ranges of numbers begin, on any path. Raises NotOfThisKind."""
    architectures: dict[int, None] = {}
    edges = {0}
    seen: set[tuple[int, int]] = set()
    left = [(0, -1)]
    while left:
        index, loaded = left.pop()
        if (index, loaded) in seen:
            continue
        seen.add((index, loaded))
        code, true, false, operand = lines[index]
        if code == LOAD:
            left += [(index + 1, operand)] if operand in (NUMBER_AT, ARCHITECTURE_AT) else []
        elif code == JUMP:
            left.append((index + 1 + operand, loaded))
        elif code == EQUAL and loaded == ARCHITECTURE_AT:
            architectures[operand] = None
            left += [(index + 1 + true, loaded), (index + 1 + false, loaded)]
        elif code in (EQUAL, GREATER, AT_LEAST) and loaded == NUMBER_AT:
            edges |= {operand} if code != GREATER else set()
            edges |= {operand + 1} if code != AT_LEAST else set()
            left += [(index + 1 + true, loaded), (index + 1 + false, loaded)]
        elif code != RETURN:
            raise NotOfThisKind
    return list(architectures), sorted(edge for edge in edges if edge < END)


def ranges(lines: Sequence[Instruction], architecture: int, edges: Iterable[int]) -> list[tuple[int, Answer]]:
    """(first number, its answer) of each range, neighbours with the same answer as one."""
    found: list[tuple[int, Answer]] = []
    for first in edges:
        answer = followed(lines, architecture, first)
        if not found or found[-1][1] != answer:
            found.append((first, answer))
    return found


def followed(lines: Sequence[Instruction], architecture: int, number: int) -> Answer:
    """Where the program leads, until an argument counts."""
    value = at = 0
    while True:
        code, true, false, operand = lines[at]
        at += 1
        if code == LOAD:
            if operand not in (NUMBER_AT, ARCHITECTURE_AT):
                return Answer(at=at - 1)
            value = number if operand == NUMBER_AT else architecture
        elif code == RETURN:
            return Answer(value=operand)
        elif code == JUMP:
            at += operand
        else:
            holds = value == operand if code == EQUAL else value > operand if code == GREATER else value >= operand
            at += true if holds else false


def search(found: Sequence[tuple[int, Answer]]) -> list[Instruction | Answer]:
    """Loads the number and finds its range: each half in turn."""
    if len(found) == 1:
        return [found[0][1]]
    return [(LOAD, 0, 0, NUMBER_AT), *halves(found)]


def halves(found: Sequence[tuple[int, Answer]]) -> list[Instruction | Answer]:
    if len(found) == 1:
        return [found[0][1]]
    middle = len(found) // 2
    low, high = halves(found[:middle]), halves(found[middle:])
    if len(low) <= FARTHEST:
        return [(AT_LEAST, len(low), 0, found[middle][0]), *low, *high]
    return [(AT_LEAST, 0, 1, found[middle][0]), (JUMP, 0, 0, len(low)), *low, *high]


def linked(code: Sequence[Instruction | Answer], lines: Sequence[Instruction]) -> list[Instruction]:
    """With answers as instructions: a return, or a jump to a copy of what looks at arguments, which stands at the end."""
    kept = reachable(lines, [item.at for item in code if isinstance(item, Answer) and item.at >= 0])
    places = {index: len(code) + place for place, index in enumerate(kept)}
    done: list[Instruction] = []
    for here, item in enumerate(code):
        if not isinstance(item, Answer):
            done.append(item)
        elif item.at < 0:
            done.append((RETURN, 0, 0, item.value))
        else:
            done.append((JUMP, 0, 0, places[item.at] - here - 1))
    for index in kept:
        operation, true, false, operand = lines[index]
        after = places[index] + 1
        # Never farther than it was, since what is between them can only have become less.
        if operation == JUMP:
            operand = places[index + 1 + operand] - after
        elif operation in CONDITIONS:
            true, false = (places[index + 1 + way] - after for way in (true, false))
        done.append((operation, true, false, operand))
    return done


def reachable(lines: Sequence[Instruction], starts: Iterable[int]) -> list[int]:
    """The instructions that these lead to, in order. Raises NotOfThisKind for one that looks at anything but addresses and arguments."""
    seen: set[int] = set()
    left = list(starts)
    while left:
        index = left.pop()
        if index in seen:
            continue
        seen.add(index)
        code, true, false, operand = lines[index]
        if code == RETURN:
            continue
        if code == JUMP:
            left.append(index + 1 + operand)
        elif code in CONDITIONS:
            left += [index + 1 + true, index + 1 + false]
        elif code == AND or (code == LOAD and operand >= ADDRESS_AT):
            left.append(index + 1)
        else:
            raise NotOfThisKind
    return sorted(seen)
