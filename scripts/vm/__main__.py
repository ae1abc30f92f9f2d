"""`./dev test-vm`: the kernel tests in a guest with pure cgroup v2, which this machine need not have.

    ./dev test-vm [--systemd] [--selinux | --apparmor] [--timeout SECONDS] [--append "KERNEL OPTIONS"] [PYTEST ARGS]
    ./dev test-vm [...] --command "SHELL COMMAND"

Without pytest arguments that name tests, those of `selection` run. The exit code is the command's own in the guest; 124 if its time
was over, 125 if the guest ended by itself or could not be booted. Variables that begin with TARE_ are the guest's too.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from scripts.vm import policy, selection
from scripts.vm.kernel import KernelUnavailable, cache, prepare
from scripts.vm.machine import REPOSITORY, Guest, GuestFailed, GuestTimedOut, check_place, run
from scripts.vm.policy import PolicyUnavailable

TIMED_OUT, FAILED = 124, 125
# Of the guest's time, for booting and for telling what was found when the rest is over.
LAST_SECONDS = 60
# Emulated, a test takes five to ten times as long.
PYTEST_OPTIONS = ("-o", "timeout=600", "-p", "no:cacheprovider")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONUNBUFFERED": "1",
}


def main() -> int:
    """Boot, run, tell. Returns the exit code."""
    options, rest = parser().parse_known_args()
    signal.signal(signal.SIGTERM, interrupted)
    begin = time.monotonic()
    try:
        code = boot(options, rest)
    except GuestTimedOut as error:
        code = TIMED_OUT
        tell(str(error))
    except (KernelUnavailable, PolicyUnavailable, GuestFailed) as error:
        code = FAILED
        tell(str(error))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    tell(f"exit code {code} after {time.monotonic() - begin:.0f} s")
    return code


def boot(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """A guest from beginning to end: the exit code of what ran in it. Raises GuestImpossible, KernelUnavailable, GuestFailed."""
    check_place("the project's directory", REPOSITORY)
    check_place("the cache (XDG_CACHE_HOME, or .cache in HOME)", cache())
    kernel = prepare(cache())
    command = ["/bin/sh", "-c", options.command]
    if not options.command:
        command = pytest_command(rest, options.confinement, systemd=options.systemd, colour=sys.stdout.isatty())
    ours = {name: value for name, value in os.environ.items() if name.startswith("TARE_")}
    text = script(command, seconds=options.timeout - LAST_SECONDS, environment={**ENVIRONMENT, **ours})
    guest = Guest(
        kernel=kernel,
        script=text,
        systemd=options.systemd,
        confinement=options.confinement,
        policy=policy.prepare(cache()) if options.confinement == "selinux" else None,
        append=options.append,
    )
    tell(f"booting Linux {kernel.release} with {'systemd' if options.systemd else 'a plain init'}, emulated")
    return run(guest, cache(), options.timeout, show)


def parser() -> argparse.ArgumentParser:
    """Our own options; what is not among them is for pytest."""
    made = argparse.ArgumentParser(prog="./dev test-vm", allow_abbrev=False, epilog="All else is handed to pytest.")
    made.add_argument("--systemd", action="store_true", help="systemd as the guest's PID 1")
    labels = made.add_mutually_exclusive_group()
    for name, words in (("selinux", "SELinux, enforcing"), ("apparmor", "AppArmor")):
        labels.add_argument(
            f"--{name}", dest="confinement", action="store_const", const=name, default="", help=f"{words}: its tests"
        )
    made.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="for the whole (default: 900)")
    made.add_argument("--append", default="", metavar="OPTIONS", help="further kernel options, such as apparmor=0")
    made.add_argument("--command", metavar="COMMAND", help="run this by sh in the repository instead of pytest")
    return made


def pytest_command(arguments: Sequence[str], confinement: str, *, systemd: bool, colour: bool) -> list[str]:
    """pytest's command line: the default selection unless the arguments name tests themselves."""
    named = any(
        not argument.startswith("-") and argument.partition("::")[0].startswith("tests") for argument in arguments
    )
    chosen = () if named else selection.arguments(REPOSITORY, confinement, systemd=systemd)
    colours = f"--color={'yes' if colour else 'no'}"
    return [".venv/bin/python", "-m", "pytest", *PYTEST_OPTIONS, colours, *arguments, *chosen]


def script(command: Sequence[str], *, seconds: float, environment: Mapping[str, str]) -> str:
    """What the guest's sh runs. The command is interrupted after so many seconds, so that it can still tell what it knows."""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    limit = f"timeout --signal=INT --kill-after={LAST_SECONDS // 2} {max(seconds, 1):.0f}"
    return f"{exports}cd {shlex.quote(str(REPOSITORY))} || exit {FAILED}\nexec {limit} {shlex.join(command)}\n"


def show(data: bytes) -> None:
    """To our standard output, at once."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def tell(text: str) -> None:
    """What we have to say ourselves."""
    print(f"test-vm: {text}", file=sys.stderr, flush=True)


def interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    """A polite end, by the same way out as Ctrl-C."""
    sys.exit(128 + number)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
