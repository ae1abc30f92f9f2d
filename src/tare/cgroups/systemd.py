"""systemd as the maker of control groups: transient units started, changed and stopped over D-Bus.

    child waits at its barrier ─ StartTransientUnit(scope, PIDs) ─ JobRemoved "done" ─ limits that systemd has no property for ─ gate opens

Calls go over the system bus or, where there is none, over systemd's own socket for root. One connection serves all; when it
breaks, the call in flight fails with Unavailable and the next one connects again. Every wait has a deadline.

Names and properties are `units`'; files of groups are `manager`'s: after a start, `CgroupManager.create` with the unit's
path finds what systemd made and adds the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from signal import SIGKILL
from typing import Any

from jeepney import (
    DBusAddress,
    DBusErrorResponse,
    HeaderFields,
    MatchRule,
    Message,
    Parser,
    Properties,
    message_bus,
    new_method_call,
)
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import get_bus
from jeepney.wrappers import unwrap_msg

from tare.cgroups.units import Property
from tare.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, InvalidArgument, TareError, Unavailable

NAME, PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
MANAGER = DBusAddress(PATH, bus_name=NAME, interface=f"{NAME}.Manager")
JOB_REMOVED = MatchRule(type="signal", interface=MANAGER.interface, member="JobRemoved", path=PATH)
BROKEN = "the connection broke"
BUS = "unix:path=/run/dbus/system_bus_socket"
PRIVATE = "unix:path=/run/systemd/private"
PEER = DBusAddress(PATH, bus_name=NAME, interface="org.freedesktop.DBus.Peer")
REMEMBERED, NUDGE = 256, 0.02

NO_UNIT, UNIT_EXISTS = f"{NAME}.NoSuchUnit", f"{NAME}.UnitExists"
WRONG = ("org.freedesktop.DBus.Error.InvalidArgs", "org.freedesktop.DBus.Error.PropertyReadOnly")
ABSENT = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")


class Link:
    """One connection: replies are matched to calls, and ends of jobs to those who wait for them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._serials = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._task = asyncio.create_task(self._read())

    @property
    def broken(self) -> bool:
        """Whether nothing comes over it any more."""
        return self._task.done()

    async def subscribe(self, *, bus: bool) -> None:
        """Have systemd, and the bus, send what becomes of jobs."""
        if bus:
            await self.call(message_bus.Hello())
            await self.call(message_bus.AddMatch(JOB_REMOVED))
        first = asyncio.create_task(self.call(new_method_call(MANAGER, "Subscribe")))
        try:
            # On its own socket systemd leaves a call that came together with the end of the handshake until there is more to read.
            while not bus and not (await asyncio.wait((first,), timeout=NUDGE))[0]:
                await self._send(new_method_call(PEER, "Ping"))
            await first
        finally:
            first.cancel()

    async def call(self, message: Message) -> tuple[Any, ...]:
        """The reply's values. Raises DBusErrorResponse, and ConnectionError when the connection breaks."""
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        serial = next(self._serials)
        self._replies[serial] = future
        try:
            await self._send(message, serial)
            body: tuple[Any, ...] = unwrap_msg(await future)
            return body
        finally:
            del self._replies[serial]

    async def _send(self, message: Message, serial: int | None = None) -> None:
        if self.broken:
            raise ConnectionResetError(BROKEN)
        self._writer.write(message.serialise(next(self._serials) if serial is None else serial))
        await self._writer.drain()

    async def end_of(self, job: str) -> str:
        """What became of a job, which may have ended before it was asked for. Raises ConnectionError."""
        if job in self._ended:
            return self._ended[job]
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[job] = future
        try:
            if self.broken:
                raise ConnectionResetError(BROKEN)
            return await future
        finally:
            del self._waiting[job]

    async def _read(self) -> None:
        parser = Parser()
        try:
            while data := await self._reader.read(1 << 16):
                parser.add_data(data)
                while (message := parser.get_next_message()) is not None:
                    self._take(message)
        finally:
            for future in (*self._replies.values(), *self._waiting.values()):
                if not future.done():
                    future.set_exception(ConnectionResetError(BROKEN))

    def _take(self, message: Message) -> None:
        """A reply, or the end of a job; anything else is not for us."""
        reply = self._replies.get(message.header.fields.get(HeaderFields.reply_serial))
        if reply is not None:
            if not reply.done():
                reply.set_result(message)
        elif JOB_REMOVED.matches(message):
            _, job, _, result = message.body
            self._ended[job] = result
            while len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
            waiting = self._waiting.get(job)
            if waiting is not None and not waiting.done():
                waiting.set_result(result)

    async def close(self) -> None:
        """Let the connection go."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            # What it ended with has been told to those who waited.
            self._task.exception()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class Systemd:
    """systemd's manager. `addresses` are tried in order; those of a test are its own instance's."""

    def __init__(self, addresses: Sequence[str] = (BUS, PRIVATE), timeout: float = 30.0) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._link: Link | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        """Let the connection go."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    # Units

    async def version(self) -> int:
        """systemd's version, such as 252."""
        doing = "ask systemd for its version"
        async with self._call(doing) as link:
            message = Properties(MANAGER).get("Version")
            ((_, text),) = await link.call(message)
        digits = "".join(character if character.isdigit() else " " for character in text).split()
        return int(digits[0]) if digits else 0

    async def start(self, unit: str, properties: Sequence[Property]) -> None:
        """Start a transient unit and wait until it stands.

        Raises InvalidArgument for properties that systemd does not take, AlreadyExists where a unit of the name is alive, FailedPrecondition
        where it does not come to stand, Unavailable, DeadlineExceeded. What had failed under the name is cleared away first.
        """
        doing = f"start unit {unit}"
        try:
            await self._start(doing, unit, properties)
        except AlreadyExists:
            if not await self._reset(unit):
                raise
            await self._start(doing, unit, properties)

    async def _start(self, doing: str, unit: str, properties: Sequence[Property]) -> None:
        body: tuple[Any, ...] = (unit, "replace", list(properties), [])
        async with self._call(doing) as link:
            message = new_method_call(MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)
            (job,) = await link.call(message)
            result = await link.end_of(job)
        if result != "done":
            raise FailedPrecondition(doing, cause=f"systemd says that the job is {result}", hint="see its journal")

    async def set_properties(self, unit: str, properties: Sequence[Property]) -> None:
        """Change a unit until it is stopped. Raises InvalidArgument, FailedPrecondition where there is no such unit, and as `start`."""
        if not properties:
            return
        body = (unit, True, list(properties))
        async with self._call(f"change unit {unit}") as link:
            message = new_method_call(MANAGER, "SetUnitProperties", "sba(sv)", body)
            await link.call(message)

    async def stop(self, unit: str) -> None:
        """Stop a unit, ending what is in it, and wait until it has stopped. Idempotent. Raises as `start`."""
        doing = f"stop unit {unit}"
        try:
            async with self._call(doing) as link:
                message = new_method_call(MANAGER, "StopUnit", "ss", (unit, "replace"))
                (job,) = await link.call(message)
                result = await link.end_of(job)
        except NoSuchUnit:
            return
        if result not in ("done", "skipped"):
            raise FailedPrecondition(doing, cause=f"systemd says that the job is {result}")
        await self._reset(unit)

    async def end(self, unit: str) -> None:
        """As `stop`, but what is in it gets SIGKILL at once: a process at its barrier heeds no SIGTERM, for which systemd would wait."""
        try:
            async with self._call(f"kill unit {unit}") as link:
                await link.call(new_method_call(MANAGER, "KillUnit", "ssi", (unit, "all", int(SIGKILL))))
        except NoSuchUnit:
            return
        await self.stop(unit)

    async def _reset(self, unit: str) -> bool:
        """Clear a failed unit away; False where there is none."""
        try:
            async with self._call(f"reset unit {unit}") as link:
                message = new_method_call(MANAGER, "ResetFailedUnit", "s", (unit,))
                await link.call(message)
        except NoSuchUnit:
            return False
        return True

    async def control_group(self, unit: str) -> str:
        """The path of a unit's control group below the root; "" where it has none. Raises FailedPrecondition where there is no such unit."""
        kind = unit.rpartition(".")[2].capitalize()
        return str(await self.property(unit, kind, "ControlGroup"))

    async def property(self, unit: str, kind: str, name: str) -> Any:
        """A property of a loaded unit, of its interface `kind` ("Scope", "Slice", "Unit")."""
        async with self._call(f"look at unit {unit}") as link:
            message = new_method_call(MANAGER, "GetUnit", "s", (unit,))
            (path,) = await link.call(message)
            address = DBusAddress(path, bus_name=NAME, interface=f"{NAME}.{kind}")
            ((_, value),) = await link.call(Properties(address).get(name))
        return value

    # Calls

    @contextlib.asynccontextmanager
    async def _call(self, doing: str) -> AsyncIterator[Link]:
        """A connection for calls that are over by the deadline; what goes wrong is put into the family's errors."""
        try:
            async with asyncio.timeout(self._timeout):
                yield await self._connected(doing)
        except DBusErrorResponse as error:
            raise explained(doing, error) from error
        except TimeoutError as error:
            await self.close()
            raise DeadlineExceeded(doing, cause=f"systemd has not answered in {self._timeout:g} s") from error
        except (OSError, EOFError) as error:
            await self.close()
            raise Unavailable(doing, cause="the connection to systemd broke", hint="try again") from error

    async def _connected(self, doing: str) -> Link:
        async with self._connecting:
            if self._link is None or self._link.broken:
                await self.close()
                self._link = await self._connect(doing)
            return self._link

    async def _connect(self, doing: str) -> Link:
        failures = []
        for address in self._addresses:
            try:
                return await connect(address)
            except (OSError, EOFError, AuthenticationError, DBusErrorResponse) as error:
                failures.append(f"{address}: {words(error)}")
        raise FailedPrecondition(
            doing,
            cause=f"no systemd is to be reached ({'; '.join(failures)})",
            hint="set the cgroup driver to cgroupfs where the node is not run by systemd",
        )


class NoSuchUnit(FailedPrecondition):
    """systemd has no unit of that name."""


async def connect(address: str) -> Link:
    """A connection that has said who it is, with systemd's answer. Raises OSError, EOFError, AuthenticationError, DBusErrorResponse."""
    reader, writer = await asyncio.open_unix_connection(get_bus(address))
    try:
        handshake = Authenticator()
        for words_out in handshake:
            writer.write(words_out)
            await writer.drain()
            answer = await reader.read(1024)
            if not answer:
                raise EOFError("the socket was closed before it knew who we are")
            handshake.feed(answer)
        writer.write(BEGIN)
        await writer.drain()
    except BaseException:
        writer.close()
        raise
    link = Link(reader, writer)
    try:
        await link.subscribe(bus=not address.endswith("/private"))
    except BaseException:
        await link.close()
        raise
    return link


def words(error: BaseException) -> str:
    """An exception's own words."""
    if isinstance(error, DBusErrorResponse):
        return said(error)
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if error.errno else error.strerror
    return str(error) or type(error).__name__


def said(error: DBusErrorResponse) -> str:
    """What systemd or the bus said: the message, or the error's name."""
    text = error.data[0] if error.data and isinstance(error.data[0], str) else ""
    return text or str(error.name)


def explained(doing: str, error: DBusErrorResponse) -> TareError:
    """An error reply as one of the family."""
    cause = said(error)
    if error.name == UNIT_EXISTS:
        return AlreadyExists(doing, cause=cause)
    if error.name == NO_UNIT:
        return NoSuchUnit(doing, cause=cause)
    if error.name in WRONG:
        return InvalidArgument(doing, cause=cause)
    if error.name in ABSENT:
        hint = "set the cgroup driver to cgroupfs where the node is not run by systemd"
        return FailedPrecondition(doing, cause=f"there is no systemd on the bus: {cause}", hint=hint)
    return FailedPrecondition(doing, cause=f"{error.name}: {cause}")
