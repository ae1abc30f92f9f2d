"""CNI plugins as programs: found in the settings' directories, told what to do by environment and standard input, ended at a deadline.

Each is a child of the launcher (`handlers/commands`). Whatever one does wrong becomes an error that says which plugin of which
network, doing what, for whom, and what can be done about it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tare.errors import DeadlineExceeded, FailedPrecondition, InternalError, TareError, Unavailable, describe
from tare.handlers.commands import PATH, Ended
from tare.network.cni import result
from tare.network.cni.config import NetworkList, Plugin

SAID = 1000  # characters of a plugin's standard error in a message
SIGNALLED = 128  # what is above it is this and the number of the signal that ended a program
REFUSED = "what it refuses is its own to say: see its settings in that file"
KILLED = "it was killed: by whom, or for want of memory, is in the kernel's log"
MISFIT = "bring a build of the plugin that works here, or take it out of the list"
PRIVATE = ("TARE_", "NOTIFY_SOCKET", "LISTEN_", "CNI_")  # of the daemon's environment, no business of plugins


class Runner(Protocol):
    """Runs commands."""

    async def capture(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout: float
    ) -> tuple[Ended, str]:
        """How one ended, and its standard output."""


class Plugins:
    """The programs in `directories`. `timeout` is in seconds, for each that is run."""

    def __init__(self, commands: Runner, directories: Sequence[str], timeout: float) -> None:
        self._commands = commands
        self._directories = tuple(map(Path, directories))
        self._timeout = timeout
        self._versions: dict[tuple[str, int, int], frozenset[str]] = {}

    def find(self, kind: str, doing: str) -> Path:
        """A program by its type; the first directory that has it counts. Raises FailedPrecondition."""
        found = next((path for path in (directory / kind for directory in self._directories) if path.is_file()), None)
        if found is not None and os.access(found, os.X_OK):
            return found
        places = ", ".join(map(str, self._directories)) or "no directory: [network] bin_dirs is empty"
        cause = f"{found} is not executable" if found is not None else f"there is no such program in {places}"
        hint = (
            "install the plugin (Debian has the usual ones in containernetworking-plugins), or set [network] bin_dirs"
        )
        raise FailedPrecondition(doing, step=f"plugin {kind}", cause=cause, hint=hint)

    async def versions(self, kind: str, doing: str) -> frozenset[str]:
        """What a plugin says that it speaks; asked once for each program that is new or has changed. Raises TareError."""
        path = self.find(kind, doing)
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in self._versions:
            # Old plugins want the other variables to be there, whatever they are.
            environment = dict.fromkeys(("CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"), "dummy")
            output = await self._run("VERSION", path, b'{"cniVersion": "1.1.0"}', environment, doing)
            try:
                self._versions[key] = frozenset(map(str, json.loads(output)["supportedVersions"]))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                cause = f"asked for its versions, it printed {result.quoted(output)}"
                raise broken(doing, kind, "VERSION", cause) from error
        return self._versions[key]

    async def call(
        self, verb: str, network: NetworkList, item: Plugin, told: bytes, environment: Mapping[str, str], doing: str
    ) -> str:
        """Run a plugin of a network; what it printed. Raises TareError, with the plugin and its words."""
        path = self.find(item.type, f"{doing}: network {network.name} of {network.source}")
        return await self._run(verb, path, told, environment, f"{doing}: network {network.name} of {network.source}")

    async def _run(self, verb: str, path: Path, told: bytes, environment: Mapping[str, str], doing: str) -> str:
        env = {"PATH": PATH} | {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)}
        env |= {"CNI_COMMAND": verb, "CNI_PATH": ":".join(map(str, self._directories)), **environment}
        step = f"plugin {path.name}, {verb}"
        try:
            ended, output = await self._commands.capture([str(path)], env=env, stdin=told, timeout=self._timeout)
        except DeadlineExceeded as error:
            hint = "see what it waits for; [network] plugin_timeout is how long it may take"
            raise DeadlineExceeded(doing, step=step, cause=error.cause, hint=hint) from error
        except Unavailable as error:
            raise Unavailable(doing, step=step, cause=error) from error
        except TareError as error:
            raise InternalError(doing, step=step, cause=error, hint=f"is {path} a program of this machine?") from error
        if ended.code == 0:
            return output
        refused = result.refusal(output)
        words = [refused.words] if refused is not None else [f"it ended with {ended.code}"]
        if refused is None and output.strip():
            words.append(f"it printed {result.quoted(output)}")
        if ended.words:
            words.append(f"it said: {ended.words[-SAID:]}")
        hint = REFUSED if refused is not None else KILLED if ended.code > SIGNALLED else MISFIT
        raise broken(doing, path.name, verb, "; ".join(words), hint)


def broken(doing: str, kind: str, verb: str, cause: BaseException | str, hint: str = MISFIT) -> InternalError:
    """The error for a plugin that does not do what it should."""
    words = describe(cause) if isinstance(cause, BaseException) else cause
    return InternalError(doing, step=f"plugin {kind}, {verb}", cause=words, hint=hint)
