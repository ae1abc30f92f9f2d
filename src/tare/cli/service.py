"""`tare install-service`: a unit for systemd that runs `tare serve`, and its removal.

directives   what the unit says, pure
install      writes it, and has systemd read it
uninstall    stops the daemon (pods run on) and takes the unit away
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tare.errors import FailedPrecondition, InternalError, InvalidArgument

UNITS = Path("/etc/systemd/system")
MARK = "# Made by `tare install-service`, and taken away by `tare install-service --uninstall`."
KEPT = 512
"""Descriptors that systemd keeps for us: one for each terminal and each input held open, two for each group of logs. Their names must fit into one
variable of the daemon's environment."""
SYSTEMCTL_SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A unit: its name (without .service), and what `tare serve` is called with."""

    name: str
    command: tuple[str, ...]
    watchdog: int = 30

    @property
    def path(self) -> Path:
        return UNITS / f"{self.name}.service"

    @property
    def text(self) -> str:
        """The unit's file. KillMode=process leaves pods alone when the daemon ends; NotifyAccess=all lets the keeper have descriptors kept."""
        return f"""{MARK}
# Settings of your own go into a drop-in: systemctl edit {self.name}
[Unit]
Description=Tare container runtime
Wants=network-online.target
After=network-online.target local-fs.target dbus.socket
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=all
ExecStart={" ".join(quoted(word) for word in self.command)}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=100ms
KillMode=process
Delegate=yes
WatchdogSec={self.watchdog}
TimeoutStartSec=300
TimeoutStopSec=30
FileDescriptorStoreMax={KEPT}
Environment=FDSTORE={KEPT}
TasksMax=infinity
LimitNPROC=infinity
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"""


def quoted(word: str) -> str:
    """A word of ExecStart=, systemd.service(5): no quotes, specifiers and variables but those meant."""
    if not word.isprintable():
        raise InvalidArgument("write the unit", cause=f"{word!r} cannot be said in a unit")
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"' if plain != word or any(character in " '" for character in word) or not word else word


def serve_command(**options: str | None) -> tuple[str, ...]:
    """`tare serve` as this very program would run it, with those options that are given. Paths are absolute."""
    script = Path(sys.argv[0]).absolute()
    own = [str(script)] if script.name == "tare" else [sys.executable, "-m", "tare.cli.entry"]
    return (*own, "serve", *(f"--{name}={Path(value).absolute()}" for name, value in options.items() if value))


@click.command("install-service")
@click.option(
    "--name", default="tare", show_default=True, metavar="NAME", help="The unit's name; each instance has its own."
)
@click.option("--config", metavar="FILE", help="For `tare serve`, as the next three.")
@click.option("--root", metavar="DIR")
@click.option("--run", metavar="DIR")
@click.option("--socket", metavar="PATH")
@click.option("--watchdog", type=click.IntRange(min=5), default=30, show_default=True, metavar="SECONDS",
              help="A daemon that says nothing for so long is killed and started again.")  # fmt: skip
@click.option("--enable/--no-enable", default=True, show_default=True, help="Start it with the node.")
@click.option("--now", is_flag=True, help="Start it at once as well.")
@click.option("--uninstall", is_flag=True, help="Stop the daemon and take the unit away. Pods run on.")
@click.option("--print", "only_print", is_flag=True, help="Show the unit, and do nothing.")
def install_service(name: str, config: str | None, root: str | None, run: str | None, socket: str | None, watchdog: int,
                    enable: bool, now: bool, uninstall: bool, only_print: bool) -> None:  # fmt: skip
    """Have systemd run the daemon.

    Containers outlive the daemon and its service: `systemctl restart` does not touch them, and it is what upgrades Tare after the package
    has been replaced.
    """
    if not name or any(not (character.isalnum() or character in "-_.@") for character in name):
        raise click.UsageError(f"{name!r} cannot be a unit's name")
    command = serve_command(config=config, root=root, run=run, socket=socket)
    service = Service(name=name, command=command, watchdog=watchdog)
    if only_print:
        click.echo(service.text, nl=False)
    elif uninstall:
        remove(service)
    else:
        install(service, enable=enable, now=now)


def install(service: Service, *, enable: bool, now: bool) -> None:
    """Write the unit over one of ours, and have it read, enabled and started. Raises FailedPrecondition, InternalError."""
    doing = f"install the service {service.name}"
    check(service, doing)
    temporary = service.path.with_name(f".{service.path.name}.{os.getpid()}")
    try:
        temporary.write_text(service.text)
        temporary.chmod(0o644)
        temporary.rename(service.path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InternalError(doing, cause=error, hint="are you root?") from error
    click.echo(f"wrote {service.path}")
    systemctl(doing, "daemon-reload")
    if enable:
        systemctl(doing, "enable", service.path.name)
    if now:
        systemctl(doing, "restart", service.path.name)
        click.echo(f"{service.name} serves; systemctl status {service.name}")
    else:
        click.echo(f"start it: systemctl start {service.name}")


def remove(service: Service) -> None:
    """The other way round. Raises FailedPrecondition, InternalError."""
    doing = f"uninstall the service {service.name}"
    if not service.path.exists():
        raise FailedPrecondition(doing, cause=f"there is no {service.path}")
    check(service, doing)
    systemctl(doing, "disable", "--now", service.path.name)
    try:
        service.path.unlink()
    except OSError as error:
        raise InternalError(doing, cause=error) from error
    systemctl(doing, "daemon-reload")
    click.echo(f"removed {service.path}; pods that run go on without a daemon")


def check(service: Service, doing: str) -> None:
    """Raises FailedPrecondition where systemd does not run the node, or the unit is somebody else's."""
    if not Path("/run/systemd/system").is_dir():
        raise FailedPrecondition(doing, cause="systemd does not run this node", hint="run `tare serve` under what does")
    if service.path.exists() and not service.path.read_text().startswith(MARK):
        raise FailedPrecondition(doing, cause=f"{service.path} was not made by Tare", hint="give another --name")


def systemctl(doing: str, *words: str) -> None:
    """Raises InternalError with what it said."""
    command: Sequence[str] = ("systemctl", *words)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InternalError(doing, step=shlex.join(command), cause=error) from error
    if result.returncode:
        raise InternalError(
            doing, step=shlex.join(command), cause=result.stderr.strip() or f"exit code {result.returncode}"
        )
