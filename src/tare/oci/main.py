"""The command: flags, dispatch, and what went wrong. Exit codes: 0 done, 1 failed; `run` and `exec` end with the program's own."""

from __future__ import annotations

import os
import sys

from tare import __version__
from tare.errors import TareError, describe
from tare.oci import arguments, logs, stock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from tare.oci.arguments import Options

FAILED = 1
MAKES_PROCESSES = ("create", "run", "exec")
LOG_FORMATS = ("text", "json")
SPECIFICATION = "1.2.0"


def main(boot: list[str], code: str) -> NoReturn:
    """Run `sys.argv[1:]` and end this process.

    `boot` is what starts this interpreter like this again, before the arguments; `code` is the file of the modules' code (`stock`).
    """
    ending = FAILED
    try:
        ending = run(sys.argv[1:], boot)
        stock.keep(code)
    except TareError as error:
        logs.error(str(error))
    except OSError as error:
        logs.error(describe(error))
    except KeyboardInterrupt:
        logs.error("interrupted")
    except Exception as error:  # noqa: BLE001 - a defect: whatever it is, it is told, with where it was
        sys.excepthook(type(error), error, error.__traceback__)
        logs.error(f"internal error: {describe(error)}")
    finally:
        sys.stdout.flush()
        # Nothing is left to be cleaned up, and an interpreter's orderly end takes as long as a container's network namespace.
        os._exit(ending)


def run(words: list[str], boot: list[str]) -> int:
    """The exit code. Raises TareError, OSError."""
    overall, command, options = arguments.parse(words)
    if overall.given("version"):
        print(f"tare-oci version {__version__}\nspec: {SPECIFICATION}")
        return 0
    if not command or options.given("help"):
        print(arguments.usage(command))
        return 0
    form = overall.text("log-format", "text")
    if form not in LOG_FORMATS:
        raise arguments.Usage("read the command line", cause=f"--log-format is text or json, not {form!r}")
    logs.configure(overall.text("log"), form, debug=overall.given("debug"))
    if overall.text("rootless", "auto") not in ("auto", *arguments.FALSE):
        raise arguments.Usage("read the command line", cause="--rootless can be auto or false: Tare runs as root")
    if command in MAKES_PROCESSES:
        from tare.oci import seals

        seals.ensure([*boot, *words])
    from tare.oci import state

    root = os.path.abspath(overall.text("root") or state.DEFAULT_ROOT)
    return dispatch(command, root, overall, options)


def make(command: str, root: str, overall: Options, options: Options) -> int:
    """A command that makes a process."""
    from tare.oci.birth import Birth

    birth = Birth()
    if command == "exec":
        from tare.oci import execution

        return execution.run(root, options, birth)
    from tare.oci import creating

    request = creating.Request(root, overall, options)
    if command == "create":
        creating.create(request, birth, held=True).birth.end(held=True)
        return 0
    from tare.oci import lifecycle

    return lifecycle.run(request, options, birth)


def dispatch(command: str, root: str, overall: Options, options: Options) -> int:
    """One command, whose modules are imported only now."""
    if command in MAKES_PROCESSES:
        return make(command, root, overall, options)
    if command in ("start", "kill", "delete"):
        from tare.oci import lifecycle, state

        if command == "delete":
            lifecycle.delete(root, options.words[0], force=options.given("force"))
        elif command == "start":
            lifecycle.start(state.load(root, options.words[0]))
        else:
            container = state.load(root, options.words[0])
            word = options.words[1] if len(options.words) > 1 else "SIGTERM"
            lifecycle.kill(container, word, everything=options.given("all"))
        return 0
    from tare.oci import inspection

    return inspection.run(command, root, options)
