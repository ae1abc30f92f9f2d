"""The daemon's end of NRI: a socket to which plugins connect, and those that are started here; what they take part in is `front`'s and `hub`'s."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from functools import partial
from pathlib import Path

from tare.config import NriConfig
from tare.errors import FailedPrecondition, InternalError, TareError, describe
from tare.nri import launched, names
from tare.nri.front import Containers, Front
from tare.nri.launched import Commands, Launched, Processes

log = logging.getLogger(__name__)

DEFAULT_RUN = Path("/run/tare")
BACKLOG = 64
PAUSE = 1.0  # seconds until the next look at connections, where one could not be taken
MOST_STRANGERS = 64  # connections at one time that have not said who they are


class Server:
    """`run` is the daemon's run directory."""

    def __init__(self, settings: NriConfig, run: Path, front: Front, commands: Commands, processes: Processes) -> None:
        self._settings = settings
        self._front = front
        default = run == DEFAULT_RUN
        self.path = Path(settings.socket or (names.SOCKET if default else run / "nri.sock"))
        self._plugins = settings.plugin_path or (names.PLUGINS if default else "")
        self._launched = Launched(commands, processes, front)
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._joining: set[asyncio.Task[None]] = set()

    async def start(self, containers: Containers) -> None:
        """Start plugins, and take connections. A socket that cannot be had is logged: pods are served without it."""
        if not self._settings.enable:
            return
        self._front.begin(containers)
        if self._plugins:
            programs = await asyncio.to_thread(launched.find, self._plugins, self._settings.plugin_config_path)
            await self._launched.start(programs)
        if self._settings.connections:
            try:
                self._listen()
            except TareError as error:
                log.warning("NRI plugins cannot connect: %s", describe(error))

    def _listen(self) -> None:
        doing = f"listen on {self.path}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.path.lexists(self.path):
                take_away(self.path)
            listener.bind(str(self.path))
            self.path.chmod(0o600)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            status = self.path.stat()
        except OSError as error:
            listener.close()
            raise InternalError(doing, cause=error) from error
        except TareError:
            listener.close()
            raise
        self._listener, self._identity = listener, (status.st_dev, status.st_ino)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connected, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptor is left, for one. The connection stays in the queue, so that the next look would come at once, and for ever.
            log.warning("take an NRI plugin's connection: %s", describe(error))
            asyncio.get_running_loop().remove_reader(listener)
            asyncio.get_running_loop().call_later(PAUSE, self._look_again, listener)
            return
        if len(self._joining) >= MOST_STRANGERS:
            log.warning("an NRI connection is refused: %d others have not said yet who they are", len(self._joining))
            connected.close()
            return
        task = asyncio.ensure_future(self._join(connected))
        self._joining.add(task)
        task.add_done_callback(partial(self._joined, connected))

    def _joined(self, connected: socket.socket, task: asyncio.Task[None]) -> None:
        self._joining.discard(task)
        if task.cancelled():  # perhaps before its first step
            connected.close()

    def _look_again(self, listener: socket.socket) -> None:
        if self._listener is listener:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _join(self, connected: socket.socket) -> None:
        await self._front.load()
        peer = self._front.hub.peer()
        try:
            await peer.begin(connected)
            await self._front.hub.join(peer)
        except (TareError, OSError) as error:
            connected.close()
            log.warning("an NRI plugin does not take part: %s", describe(error))

    async def close(self) -> None:
        """No more connections; those that there are get told, and end."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in list(self._joining):
            task.cancel()
        await self._front.close()
        await self._launched.close()
        if self._identity is not None:
            remove(self.path, self._identity)


def take_away(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises FailedPrecondition where somebody does, or where it is none; OSError."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FailedPrecondition(f"listen on {path}", cause="there is something that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its queue is full: somebody is there
    hint = "give this one another: [nri] socket"
    raise FailedPrecondition(f"listen on {path}", cause="another runtime does", hint=hint)


def remove(path: Path, identity: tuple[int, int]) -> None:
    """Remove a socket, if it is still the one that was made."""
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) == identity:
            os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("remove %s: %s", path, describe(error))
