"""The daemon's side of a packet socket: requests that are awaited, events that are handed on, one reconnect for a lost peer."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from tare.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, TareError, Unavailable
from tare.launch import packets, wire

Reply = tuple[list[bytes | int], list[int]]


class Refused(TareError):
    """The peer answered FAILED: at which step, with which errno, in whose words."""

    def __init__(self, doing: str, step: str, errno: int, words: str) -> None:
        super().__init__(doing, step=step or None, cause=words or os.strerror(errno))
        self.errno = errno


class Channel:
    """A connection to the process listening at `path`, opened when it is first needed and again when it was lost.

    `name` is what errors call the process. Events (request ID 0) go to `on_event` as (kind, fields); `on_lost` is told when
    the peer has hung up.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        on_event: Callable[[int, list[wire.Field]], None],
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self._on_event = on_event
        self._on_lost = on_lost
        self._socket: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}

    @property
    def waiting(self) -> int:
        """How many requests have no answer yet."""
        return len(self._waiting)

    def connect(self) -> None:
        """Connect now. Raises OSError."""
        if self._socket is None:
            connection = packets.connect(str(self.path))
            connection.setblocking(False)
            self._socket = connection
            asyncio.get_running_loop().add_reader(connection, self._readable)

    def close(self, lack: OSError | None = None) -> None:
        """Hang up; whoever waits for an answer gets Unavailable, or what says that there was a `lack` of descriptors to take it with."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(lost(self.name, lack))

    def _lose(self) -> None:
        """The peer has hung up, or was not there, or its answer could not be taken."""
        had = self._socket is not None
        self.close(no_descriptor(self._socket) if self._socket is not None else None)
        if had and self._on_lost is not None:
            self._on_lost()

    async def request(
        self, kind: int, fields: Sequence[wire.Field] = (), fds: Sequence[int] = (), *, doing: str, timeout: float
    ) -> Reply:
        """Send, and await the answer's fields and descriptors (the caller's to close).

        Raises Refused for FAILED, Unavailable where the peer is not there or goes, DeadlineExceeded after `timeout` seconds.
        """
        number = next(self._numbers) & 0xFFFFFFFF or next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        await self._send(kind, number, fields, fds, doing)
        self._waiting[number] = future
        answer: Reply | None = None
        try:
            async with asyncio.timeout(timeout):
                answer = await future
            return answer
        except TimeoutError as error:
            cause = f"{self.name} has not answered for {timeout:g} s"
            raise DeadlineExceeded(doing, cause=cause) from error
        except Refused as error:
            error.doing = doing
            raise
        finally:
            self._waiting.pop(number, None)
            if answer is None and future.done() and not future.cancelled() and future.exception() is None:
                packets.close_all(future.result()[1])  # it came in the moment in which nobody waited any more

    async def _send(self, kind: int, number: int, fields: Sequence[wire.Field], fds: Sequence[int], doing: str) -> None:
        for attempt in range(200):
            try:
                self.connect()
                assert self._socket is not None
                packets.send(self._socket, kind, number, fields, fds)
                return
            except BlockingIOError:
                await asyncio.sleep(0.005)
            except wire.WireError as error:
                raise InvalidArgument(doing, cause=error) from error
            except (OSError, packets.Closed) as error:
                self._lose()
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                    raise ResourceExhausted(doing, cause=error) from error
                if attempt:
                    raise Unavailable(doing, cause=f"{self.name} is not there: {error}") from error
        raise Unavailable(doing, cause=f"{self.name} does not read its messages")

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            kind, number, fields, fds = packets.receive(self._socket)
        except BlockingIOError:
            return
        except (packets.Closed, wire.WireError):
            self._lose()
            return
        future = self._waiting.pop(number, None)
        if future is None or future.done():
            packets.close_all(fds)
            if number == 0:
                self._on_event(kind, fields)
        elif kind == wire.FAILED and wire.shape(fields) == "bib":
            packets.close_all(fds)
            step, errno, words = fields
            future.set_exception(Refused("", text(step), int(errno), text(words)))
        else:
            future.set_result((fields, fds))


def no_descriptor(there: socket.socket) -> OSError | None:
    """Why no descriptor can be had at this moment; None where one can. Without one the kernel cuts off those that come with a packet."""
    try:
        os.close(os.dup(there.fileno()))
    except OSError as error:
        return error
    return None


def lost(name: str, lack: OSError | None) -> Unavailable | ResourceExhausted:
    """What a call gets whose answer did not come."""
    if lack is None:
        return Unavailable(f"wait for {name}", cause="it ended before it answered")
    error = ResourceExhausted(f"wait for {name}", cause="its answer could not be taken")
    error.__cause__ = lack
    return error


def text(field: wire.Field) -> str:
    """A field as words."""
    return field.decode(errors="replace") if isinstance(field, bytes) else str(field)
