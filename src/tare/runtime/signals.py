"""Signal names as images and users write them, and which signal stops a container (pure).

Source: OCI image-spec, config.md, "StopSignal" ("SIGKILL", "SIGRTMIN+3"); Docker takes them without SIG and as numbers too.
"""

from __future__ import annotations

import signal

from tare.errors import InvalidArgument

RTMIN = 34
"""The first real-time signal that programs may use: C libraries keep the kernel's 32 and 33 to themselves."""

RTMAX = 64
ALIASES = {"IOT": "ABRT", "CLD": "CHLD", "POLL": "IO"}


def signal_number(name: str) -> int:
    """The number for "SIGTERM", "term", "15", "SIGRTMIN+3" or "RTMAX-1". Raises InvalidArgument."""
    text = name.strip().upper().removeprefix("SIG")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else named(ALIASES.get(text, text))
    if number is None or not 1 <= number <= RTMAX:
        raise InvalidArgument(f"use signal {name!r}", cause="there is no such signal")
    return number


def named(text: str) -> int | None:
    """The number of a name without SIG, or None."""
    for base, start, sign in (("RTMIN", RTMIN, 1), ("RTMAX", RTMAX, -1)):
        if text.startswith(base):
            return real_time(text.removeprefix(base), start, sign)
    if f"SIG{text}" in signal.Signals.__members__:
        return int(signal.Signals[f"SIG{text}"])
    return None


def real_time(offset: str, start: int, sign: int) -> int | None:
    """`offset` is "", or "+3" from RTMIN on, or "-3" down from RTMAX."""
    mark, digits = offset[:1], offset[1:]
    if not offset:
        return start
    if mark != ("+" if sign > 0 else "-") or not (digits.isascii() and digits.isdigit()) or len(digits) > 2:
        return None
    number = start + sign * int(digits)
    return number if RTMIN <= number <= RTMAX else None


def stop_signal(requested: int, image: str) -> int:
    """What StopContainer sends: the request's (a Linux number, 0 for none), else the image's StopSignal, else SIGTERM. Raises InvalidArgument."""
    if requested:
        return signal_number(str(requested))
    return signal_number(image) if image.strip() else int(signal.SIGTERM)
