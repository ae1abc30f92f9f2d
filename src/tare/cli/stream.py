"""The client's end of an exec or attach: this terminal and these streams, joined to the daemon's by a WebSocket.

    keys ─► (raw mode, detach keys) ─► channel 0 ─► daemon          window size ─► channel 4
    stdout, stderr ◄─ channels 1, 2 ◄─ daemon                        exit code   ◄─ channel 3

Nothing is read from standard input while the daemon takes nothing, and nothing from the daemon while the terminal takes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import ssl
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from tare.errors import InvalidArgument, TareError, Unavailable

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
PROTOCOL = "v5.channel.k8s.io"
CHUNK = 32 << 10
FULL = 256 << 10  # bytes that are not sent yet from which on nothing more is read
SECONDS = 30.0
DETACHED = "read escape sequence"


class SessionFailed(TareError):
    """The daemon could not do it: its own words."""


def connect(url: str, beside: str) -> socket.socket:
    """A connection to the streaming server: its socket beside CRI's where there is one, else the URL's address. Raises Unavailable."""
    parts = urllib.parse.urlsplit(url)
    local = Path(beside).parent / "streaming.sock"
    try:
        if local.is_socket():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(str(local))
            return connection
        assert parts.hostname is not None and parts.port is not None
        plain = socket.create_connection((parts.hostname, parts.port), SECONDS)
        if parts.scheme == "https":
            return ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
        return plain
    except OSError as error:
        raise Unavailable(f"reach the streaming server at {parts.netloc}", cause=error) from error


class Socket:
    """A WebSocket over a connected socket, from the handshake on. `receive` gives whole messages; what is sent waits in `unsent`."""

    def __init__(self, connection: socket.socket, url: str, protocol: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.connection = connection
        self.ws = WSConnection(ConnectionType.CLIENT)
        self.unsent = bytearray(self.ws.send(Request(host=parts.netloc, target=parts.path, subprotocols=[protocol])))
        self.parts: list[bytes] = []
        self.over = False
        self.refused = bytearray()
        self.accepted = False
        self.early: list[bytes] = []  # messages that came right behind the handshake
        connection.settimeout(SECONDS)
        connection.sendall(self.unsent)
        self.unsent.clear()
        while not self.accepted:
            self.early += self.receive()
            if self.over:
                raise SessionFailed("open a stream", cause=self.refused.decode(errors="replace").strip() or "refused")
        connection.setblocking(False)

    def until_ready(self) -> None:
        """Until the daemon says that all is ready for the session, which is its first message. Raises SessionFailed where it hangs up."""
        self.connection.settimeout(SECONDS)
        while not self.early:
            if self.over:
                raise SessionFailed("open a stream", cause="the daemon is not ready for it", hint="see its log")
            self.early += self.receive()
        self.connection.setblocking(False)

    def receive(self) -> Iterator[bytes]:
        """The messages that have come; `over` is set at the end."""
        try:
            data = self.connection.recv(1 << 16)
            while isinstance(self.connection, ssl.SSLSocket) and (more := self.connection.pending()):
                data += self.connection.recv(more)  # it has been read already, so that no selector tells of it
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            data = b""
        try:
            self.ws.receive_data(data or None)
            for event in self.ws.events():
                yield from self._event(event)
        except (RemoteProtocolError, LocalProtocolError):
            self.over = True
        self.over |= not data

    def _event(self, event: Any) -> Iterator[bytes]:
        if isinstance(event, AcceptConnection):
            self.accepted = True
        elif isinstance(event, RejectData):
            self.refused += event.data
            self.over |= event.body_finished
        elif isinstance(event, RejectConnection):
            self.over |= not event.has_body
        elif isinstance(event, Message):
            self.parts.append(bytes(event.data))
            if event.message_finished:
                whole, self.parts = b"".join(self.parts), []
                yield whole
        elif isinstance(event, Ping):
            self.unsent += self.ws.send(event.response())
        elif isinstance(event, CloseConnection):
            self.over = True

    def say(self, data: bytes) -> None:
        """A message, sent when there is room; nobody listens any more to one that comes after the daemon's goodbye."""
        if self.ws.state is ConnectionState.OPEN:
            self.unsent += self.ws.send(BytesMessage(data=data))

    def flush(self) -> None:
        """Send as much as there is room for."""
        try:
            sent = self.connection.send(self.unsent)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self.over = True
            return
        del self.unsent[:sent]


class DetachKeys:
    """Keys that leave the session, held back until it is clear that they are not those."""

    def __init__(self, keys: bytes) -> None:
        self.keys = keys
        self.matched = 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """(what goes on to the container, whether the keys were typed)."""
        if not self.keys:
            return data, False
        out = bytearray()
        for byte in data:
            if byte == self.keys[self.matched]:
                self.matched += 1
                if self.matched == len(self.keys):
                    return bytes(out), True
                continue
            out += self.keys[: self.matched]
            self.matched = 0
            if byte == self.keys[0]:
                self.matched = 1
            else:
                out.append(byte)
        return bytes(out), False


def parse_keys(text: str) -> bytes:
    """ "ctrl-p,ctrl-q", "ctrl-]", "x": what those keys send. Raises InvalidArgument."""
    keys = bytearray()
    for word in text.split(",") if text else ():
        name = word.removeprefix("ctrl-")
        if (
            len(name) != 1
            or not name.isascii()
            or (word != name and not ("a" <= name.lower() <= "z" or name in "@[\\]^_"))
        ):
            raise InvalidArgument("read the detach keys", cause=f"{word!r} is neither a letter nor ctrl- and one")
        keys.append(ord(name.upper()) & 0x1F if word != name else ord(name))
    return bytes(keys)


@contextlib.contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Every key goes to the container as it is; afterwards the terminal is as it was."""
    if not wanted or not os.isatty(sys.stdin.fileno()):
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # what was typed ahead is kept
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def window() -> bytes | None:
    """The size of this terminal's window, as the resize channel wants it."""
    for stream in (sys.stdout, sys.stdin, sys.stderr):
        try:
            size = os.get_terminal_size(stream.fileno())
        except OSError:
            continue
        return json.dumps({"Width": size.columns, "Height": size.lines}).encode()
    return None


class Session:
    """One exec or attach. `run` returns the exit code, None where the keys were typed that detach. `signalled` is called after each signal,
    and as it begins."""

    def __init__(
        self, channel: Socket, *, stdin: bool, tty: bool, keys: bytes, signalled: Callable[[], object] = lambda: None
    ) -> None:
        self.channel = channel
        self.signalled = signalled
        self.stdin = stdin
        self.tty = tty
        self.keys = DetachKeys(keys if tty else b"")
        self.status = b""
        self.detached = False
        self.always_ready = False  # standard input is a file, which no selector watches
        self.selector = selectors.DefaultSelector()
        self.wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int | None:
        """Until it is over."""
        before = signal.signal(signal.SIGWINCH, lambda *_: None)
        old_fd = signal.set_wakeup_fd(self.wake[1], warn_on_full_buffer=False)
        try:
            with raw_terminal(self.tty and self.stdin):
                self.resize()
                self.loop()
        finally:
            signal.set_wakeup_fd(old_fd)
            signal.signal(signal.SIGWINCH, before)
            for fd in self.wake:
                os.close(fd)
            self.selector.close()
            self.channel.connection.close()
        return None if self.detached else exit_code(self.status)

    def resize(self) -> None:
        """Tell the size of the window."""
        size = window() if self.tty else None
        if size is not None:
            self.channel.say(bytes([RESIZE]) + size)

    def loop(self) -> None:
        """Move bytes both ways."""
        connection = self.channel.connection
        self.selector.register(connection, selectors.EVENT_READ)
        self.selector.register(self.wake[0], selectors.EVENT_READ)
        listening = False
        for message in self.channel.early:
            self.take(message)
        self.signalled()  # what came before anybody was woken by it
        while not self.channel.over and not self.detached:
            wanted = self.stdin and len(self.channel.unsent) < FULL
            if wanted != listening:
                listening = self.listen(wanted)
            writing = selectors.EVENT_WRITE if self.channel.unsent else 0
            self.selector.modify(connection, selectors.EVENT_READ | writing)
            if wanted and self.always_ready:
                self.type()
            for key, events in self.selector.select(0 if wanted and self.always_ready else None):
                if key.fd == self.wake[0]:
                    os.read(self.wake[0], 512)
                    self.signalled()
                    self.resize()
                elif key.fd == connection.fileno():
                    self.exchange(events)
                else:
                    self.type()

    def listen(self, wanted: bool) -> bool:
        """Watch standard input, or not."""
        if self.always_ready:
            return wanted
        if not wanted:
            self.selector.unregister(sys.stdin)
            return False
        try:
            self.selector.register(sys.stdin, selectors.EVENT_READ)
        except PermissionError:
            self.always_ready = True
        return True

    def exchange(self, events: int) -> None:
        """Send and receive."""
        if events & selectors.EVENT_WRITE:
            self.channel.flush()
        if events & selectors.EVENT_READ:
            for message in self.channel.receive():
                self.take(message)

    def take(self, message: bytes) -> None:
        """Output, or the end."""
        channel, data = message[0], message[1:]
        if channel == ERROR:
            self.status += data
        elif data and channel in (STDOUT, STDERR):
            stream = sys.stdout if channel == STDOUT else sys.stderr
            stream.buffer.write(data)
            stream.buffer.flush()

    def type(self) -> None:
        """What was typed, or the end of it."""
        data = os.read(sys.stdin.fileno(), CHUNK)
        if not data:
            self.stdin = False
            self.channel.say(bytes([CLOSE, STDIN]))
            return
        text, self.detached = self.keys.feed(data)
        if text:
            self.channel.say(bytes([STDIN]) + text)


def exit_code(status: bytes) -> int:
    """From the Status object at the end of a session. Raises SessionFailed for any other failure, or where there is none."""
    try:
        told = json.loads(status)
    except ValueError:
        raise SessionFailed("stream", cause="the daemon hung up", hint="was it stopped? see its log") from None
    if told.get("status") == "Success":
        return 0
    causes = (told.get("details") or {}).get("causes") or []
    for cause in causes:
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    raise SessionFailed(str(told.get("message") or "the session failed"))


def join(
    url: str,
    beside: str,
    *,
    stdin: bool,
    tty: bool,
    keys: str,
    ready: Callable[[], object] | None = None,
    signalled: Callable[[], object] = lambda: None,
) -> int | None:
    """Run a session at a URL. `ready` is called once the daemon is ready for it, before anything is passed on; if that fails, there is no session."""
    wanted = parse_keys(keys)
    channel = Socket(connect(url, beside), url, PROTOCOL)
    if ready is not None:
        try:
            channel.until_ready()
            ready()
        except BaseException:
            channel.connection.close()
            raise
    return Session(channel, stdin=stdin, tty=tty, keys=wanted, signalled=signalled).run()
