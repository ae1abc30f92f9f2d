"""Ctrl-C and its like (SIGINT, SIGTERM, SIGHUP) while something is being made.

A signal is an exception, so that what was done is undone; but only where this command waits (`heed`): elsewhere it is kept until
then, since between an effect and the note of how to undo it there must be none. After the first one nobody is asked any more: what
undoes is not interrupted. What the caller had ignored stays so.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NUMBERS = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)
_taken: list[int] = []  # the signals that this command takes
_pending: list[int] = []


def take() -> None:
    """They are this command's from now on, and kept."""
    _taken[:] = [number for number in NUMBERS if _signal.getsignal(number) != _signal.SIG_IGN]
    keep()


def keep() -> None:
    """From now on one is kept."""
    _answer_with(_note)


def heed() -> None:
    """From now on one is an exception at once, as is one that was kept. Raises KeyboardInterrupt."""
    _answer_with(_end)
    if _pending:
        _end()


def pending() -> list[int]:
    """Those that came meanwhile, which are the caller's from here on."""
    found = _pending[:]
    _pending.clear()
    return found


def ignore() -> None:
    """From now on none is an exception."""
    _answer_with(_nothing)


def leave() -> None:
    """In a process that is going to be the container's they end it, as they end every program."""
    _answer_with(_signal.SIG_DFL)


def _answer_with(answer: object) -> None:
    for number in _taken:
        _signal.signal(number, answer)


def _note(number: int, _: object) -> None:
    _pending.append(number)


def _nothing(*_: object) -> None:
    return


def _end(*_: object) -> NoReturn:
    ignore()
    raise KeyboardInterrupt
