"""CRI's Signal enum and Linux's signal numbers, each from the other. CRI numbers signals by the alphabet, so none can be passed on as it is."""

from __future__ import annotations

import signal
from typing import Final

from tare.cri.v1 import api_pb2 as pb

PREFIX: Final = "SIGNAL_"
ALIASES: Final = {"SIGCLD": "SIGCHLD", "SIGIOT": "SIGABRT", "SIGPOLL": "SIGIO"}
# As in glibc, which keeps the kernel's first two real-time signals (32 and 33) to itself.
RTMIN: Final = 34
RTMAX: Final = 64


def linux_number(name: str) -> int:
    """The number of a signal by CRI's name for it without the prefix: "SIGUSR1", "SIGRTMINPLUS3", "SIGRTMAXMINUS2"."""
    if name.startswith("SIGRTMIN"):
        return RTMIN + int(name.removeprefix("SIGRTMIN").removeprefix("PLUS") or 0)
    if name.startswith("SIGRTMAX"):
        return RTMAX - int(name.removeprefix("SIGRTMAX").removeprefix("MINUS") or 0)
    return int(signal.Signals[ALIASES.get(name, name)])


def _numbers() -> dict[int, int]:
    names = {value: name.removeprefix(PREFIX) for name, value in pb.Signal.items()}
    return {value: linux_number(name) for value, name in names.items() if value != pb.SIGNAL_RUNTIME_DEFAULT}


def _values() -> dict[int, pb.Signal]:
    aliases = {PREFIX + alias for alias in ALIASES}
    return {
        NUMBERS[value]: getattr(pb, name)
        for name, value in pb.Signal.items()
        if value in NUMBERS and name not in aliases
    }


NUMBERS: Final = _numbers()
"""CRI value → Linux number. SIGNAL_RUNTIME_DEFAULT has none."""

VALUES: Final = _values()
"""Linux number → CRI value; the plain name where CRI has an alias as well."""
