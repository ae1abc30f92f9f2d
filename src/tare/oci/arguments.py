"""The command line as runc has it: global flags, a command, its flags, what is left. Pure; argparse would take longer than a container's start.

`--name value`, `--name=value` and, as Go programs take them, one dash instead of two; a switch may have `=false`. Flags end at the
first word that is none, so that a command's own (`exec ID ls -l`) stay its own.
"""

from __future__ import annotations

from tare.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SWITCH, VALUE, LIST, NUMBER = "switch", "value", "list", "number"
TRUE, FALSE = ("true", "1", "t", "T", "TRUE", "True"), ("false", "0", "f", "F", "FALSE", "False")

GLOBAL = {
    "root": VALUE,
    "log": VALUE,
    "log-format": VALUE,
    "debug": SWITCH,
    "systemd-cgroup": SWITCH,
    "rootless": VALUE,
    "criu": VALUE,
    "version": SWITCH,
    "help": SWITCH,
}
CREATE = {
    "bundle": VALUE,
    "console-socket": VALUE,
    "pid-file": VALUE,
    "pidfd-socket": VALUE,
    "no-pivot": SWITCH,
    "no-new-keyring": SWITCH,
    "preserve-fds": NUMBER,
}
COMMANDS: dict[str, tuple[str, int, int, dict[str, str]]] = {
    "create": ("ID", 1, 1, CREATE),
    # This command adopts no orphans, whether or not it is asked for that.
    "run": ("ID", 1, 1, {**CREATE, "detach": SWITCH, "keep": SWITCH, "no-subreaper": SWITCH}),
    "start": ("ID", 1, 1, {}),
    "state": ("ID", 1, 1, {}),
    "kill": ("ID [SIGNAL]", 1, 2, {"all": SWITCH}),
    "delete": ("ID", 1, 1, {"force": SWITCH}),
    "exec": (
        "ID [COMMAND …]",
        1,
        1 << 20,
        {
            "console-socket": VALUE,
            "pidfd-socket": VALUE,
            "cwd": VALUE,
            "env": LIST,
            "tty": SWITCH,
            "user": VALUE,
            "additional-gids": LIST,
            "process": VALUE,
            "detach": SWITCH,
            "pid-file": VALUE,
            "process-label": VALUE,
            "apparmor": VALUE,
            "no-new-privs": SWITCH,
            "cap": LIST,
            "preserve-fds": NUMBER,
            "cgroup": LIST,
            "ignore-paused": SWITCH,
        },
    ),
    "ps": ("ID [OPTION …]", 1, 1 << 20, {"format": VALUE}),
    "pause": ("ID", 1, 1, {}),
    "resume": ("ID", 1, 1, {}),
    "update": (
        "ID",
        1,
        1,
        {
            "resources": VALUE,
            "blkio-weight": NUMBER,
            "cpu-period": NUMBER,
            "cpu-quota": NUMBER,
            "cpu-burst": NUMBER,
            "cpu-share": NUMBER,
            "cpu-rt-period": NUMBER,
            "cpu-rt-runtime": NUMBER,
            "cpuset-cpus": VALUE,
            "cpuset-mems": VALUE,
            "cpu-idle": NUMBER,
            "kernel-memory": VALUE,
            "kernel-memory-tcp": VALUE,
            "memory": VALUE,
            "memory-reservation": VALUE,
            "memory-swap": VALUE,
            "pids-limit": NUMBER,
            "l3-cache-schema": VALUE,
            "mem-bw-schema": VALUE,
        },
    ),
    "list": ("", 0, 0, {"format": VALUE, "quiet": SWITCH}),
    "features": ("", 0, 0, {}),
    "spec": ("", 0, 0, {"bundle": VALUE, "rootless": SWITCH}),
    "events": ("ID", 1, 1, {"stats": SWITCH, "interval": VALUE}),
    "checkpoint": ("ID", 0, 1 << 20, {}),
    "restore": ("ID", 0, 1 << 20, {}),
}
"""Command → (what follows it, how many words at least and at most, flags)."""
SHORT = {
    "create": {"b": "bundle"},
    "run": {"b": "bundle", "d": "detach"},
    "kill": {"a": "all"},
    "delete": {"f": "force"},
    "exec": {
        "e": "env",
        "t": "tty",
        "u": "user",
        "g": "additional-gids",
        "p": "process",
        "d": "detach",
        "c": "cap",
    },
    "ps": {"f": "format"},
    "update": {"r": "resources"},
    "list": {"f": "format", "q": "quiet"},
    "spec": {"b": "bundle"},
    "": {"v": "version", "h": "help"},
}


class Usage(InvalidArgument):
    """A command line that is not understood."""


class Options:
    """Flags by name (absent: not given), and the words after them."""

    __slots__ = ("values", "words")

    def __init__(self, values: dict[str, list[str]], words: list[str]) -> None:
        self.values = values
        self.words = words

    def given(self, name: str) -> bool:
        """Whether a switch is on."""
        return bool(self.values.get(name)) and self.values[name][-1] == "true"

    def text(self, name: str, default: str = "") -> str:
        """A value, the last that was given."""
        values = self.values.get(name)
        return values[-1] if values else default

    def number(self, name: str, default: int = 0) -> int:
        """A whole number. Raises Usage."""
        value = self.text(name)
        if not value:
            return default
        try:
            return int(value, 0)
        except ValueError:
            raise Usage("read the command line", cause=f"--{name} takes a whole number, not {value!r}") from None

    def many(self, name: str) -> list[str]:
        """All values that were given."""
        return self.values.get(name, [])


def parse(words: list[str]) -> tuple[Options, str, Options]:
    """(global flags, the command or "", its flags and words). Raises Usage."""
    overall = flags(words, GLOBAL, SHORT[""])
    if overall.given("version") or overall.given("help") or not overall.words:
        return overall, "", Options({}, [])
    command, *rest = overall.words
    if command == "help":
        return overall, "", Options({}, [])
    if command not in COMMANDS:
        raise Usage("read the command line", cause=f"there is no command {command!r}", hint="see --help")
    what, least, most, table = COMMANDS[command]
    options = flags(rest, {**table, "help": SWITCH}, {**SHORT.get(command, {}), "h": "help"})
    if not options.given("help") and not least <= len(options.words) <= most:
        raise Usage("read the command line", cause=f"{command} is called as: {command} [flags] {what}".rstrip())
    return overall, command, options


def flags(words: list[str], table: Mapping[str, str], short: Mapping[str, str]) -> Options:
    """Read flags up to the first word that is none, or past `--`. Raises Usage."""
    values: dict[str, list[str]] = {}
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] != "-":
        word = words[index]
        index += 1
        if word == "--":
            break
        name, mark, value = word.lstrip("-").partition("=")
        name = short.get(name, name)
        kind = table.get(name)
        if kind is None:
            raise Usage("read the command line", cause=f"there is no flag {word.partition('=')[0]}", hint="see --help")
        if kind == SWITCH:
            value = switch(name, value) if mark else "true"
        elif not mark:
            if index == len(words):
                raise Usage("read the command line", cause=f"{word} needs a value")
            value = words[index]
            index += 1
        values.setdefault(name, []).append(value)
    return Options(values, words[index:])


def switch(name: str, value: str) -> str:
    """ "true" or "false". Raises Usage."""
    if value in TRUE:
        return "true"
    if value in FALSE:
        return "false"
    raise Usage("read the command line", cause=f"--{name} is true or false, not {value!r}")


def usage(command: str = "") -> str:
    """What --help says."""
    if command:
        what, _, _, table = COMMANDS[command]
        names = "\n".join(f"  --{name}{'' if kind == SWITCH else ' VALUE'}" for name, kind in table.items())
        return f"tare-oci [global flags] {command} [flags] {what}".rstrip() + (f"\n\n{names}" if names else "")
    names = "\n".join(f"  --{name}{'' if kind == SWITCH else ' VALUE'}" for name, kind in GLOBAL.items())
    commands = "\n".join(f"  {name} {what}" for name, (what, *_) in COMMANDS.items())
    return f"tare-oci [global flags] COMMAND [flags] …\n\nGlobal flags:\n{names}\n\nCommands:\n{commands}"
