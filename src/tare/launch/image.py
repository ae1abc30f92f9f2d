"""The process image that keeper, launcher and their children share: made ready to be forked for years, and how a fork's life ends."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import gc
import os
import resource
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)
HANDLED = (signal.SIGTERM, signal.SIGCHLD)  # by the launcher


def prepare() -> None:
    """Nothing is imported from now on, and nothing is collected; there is room for the descriptors of a full node."""
    sys.path.clear()
    sys.meta_path.clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES[1], OPEN_FILES[1]))
    gc.collect()
    gc.freeze()
    gc.disable()


def usual_limits() -> None:
    """The limit of open files that this process was started with: what a container has unless its settings say otherwise."""
    resource.setrlimit(resource.RLIMIT_NOFILE, OPEN_FILES)


def handle_signals(fd: int) -> None:
    """Their numbers are written to this descriptor."""
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    for number in HANDLED:
        signal.signal(number, lambda *_: None)


def usual_signals() -> None:
    """What the launcher handles is as it was, for a child of its: SIGCHLD is not even ignored in what that becomes."""
    _signal.set_wakeup_fd(-1)
    for number in HANDLED:
        _signal.signal(
            number, _signal.SIG_DFL
        )  # not `signal.signal`, which makes an enum of every answer: 0.3 ms in a fresh fork


def end_after(function: Callable[..., None], *arguments: object) -> None:
    """Run the life of a forked process, and end it: never back into its parent's code. A crash is told on standard error."""
    status = 0
    try:
        function(*arguments)
    except BaseException:  # noqa: BLE001 - printed, and the process ends with 1
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        os._exit(status)


def complain(who: str, text: str) -> None:
    """A line on standard error, which is the run directory's launch.log."""
    os.write(2, os.fsencode(f"{who}: {text}\n"))
