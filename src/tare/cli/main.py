"""The `tare` command: finds the subcommand, runs it, and says in plain words what went wrong.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. `run`, `exec` and `attach` end with the container's own code, and with 125
where it is Tare that failed. Subcommands are imported when they are called, so that each starts quickly.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from tare import __version__
from tare.cli.client import DEFAULT_SOCKET
from tare.errors import TareError, describe

OWN_FAILURE = 125
INTERRUPTED = 130
COMMANDS = {
    "serve": "tare.cli.serve:serve",
    "install-service": "tare.cli.service:install_service",
    "run": "tare.cli.run:run",
    "ps": "tare.cli.containers:ps",
    "pods": "tare.cli.containers:pods",
    "stats": "tare.cli.stats:stats",
    "logs": "tare.cli.logs:logs",
    "exec": "tare.cli.interactive:execute",
    "attach": "tare.cli.interactive:attach",
    "port-forward": "tare.cli.forward:port_forward",
    "cp": "tare.cli.copying:copy",
    "stop": "tare.cli.containers:stop",
    "rm": "tare.cli.containers:remove",
    "checkpoint": "tare.cli.checkpoint:checkpoint",
    "restore": "tare.cli.checkpoint:restore",
    "inspect": "tare.cli.inspect:inspect",
    "pull": "tare.cli.images:pull",
    "images": "tare.cli.images:images",
    "rmi": "tare.cli.images:remove",
    "tag": "tare.cli.transfers:tag",
    "push": "tare.cli.transfers:push",
    "save": "tare.cli.archives:save",
    "load": "tare.cli.archives:load",
    "history": "tare.cli.transfers:history",
    "image": "tare.cli.image:image",
    "update": "tare.cli.freshness:update",
    "explain-pull": "tare.cli.freshness:explain_pull",
    "network": "tare.cli.network:network",
    "doctor": "tare.cli.doctor:doctor",
    "log-level": "tare.cli.log_level:log_level",
    "version": "tare.cli.version:version",
}


class Commands(click.Group):
    """The table above, as click wants it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        return command if isinstance(command, click.Command) else None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--socket",
    envvar="TARE_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    metavar="PATH",
    help="The daemon's CRI socket.",
)
@click.version_option(__version__, prog_name="tare")
@click.pass_context
def tare(ctx: click.Context, socket: str) -> None:
    """Tare runs pods and containers.

    Start the daemon with `tare serve`; the other commands talk to it over its socket, as crictl and the kubelet do.
    """
    ctx.obj = socket


def main() -> NoReturn:
    """The console script."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run a command line and return its exit code; what fails is told on standard error."""
    own_failure = OWN_FAILURE if subcommand(arguments) in ("run", "exec", "attach") else 1
    try:
        result = tare.main(arguments, prog_name="tare", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return OWN_FAILURE if own_failure == OWN_FAILURE else error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except TareError as error:
        sys.stderr.write(f"tare: {error}\n")
        return own_failure
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"tare: {describe(error)}\n")
        return own_failure
    return result if isinstance(result, int) else 0


def subcommand(arguments: list[str]) -> str:
    """The first word that is neither an option nor the value of `--socket`."""
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--socket":
            skip = True
        elif not argument.startswith("-"):
            return argument
    return ""


if __name__ == "__main__":
    main()
