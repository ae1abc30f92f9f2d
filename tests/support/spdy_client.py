"""A SPDY/3.1 client over a blocking socket, written apart from the server, as a kubectl would be: one call for each thing it does.

client = SpdyClient.connect(url, ["v4.channel.k8s.io"])
out = client.open({"streamType": "stdout"})
client.send(stdin, b"hello", fin=True)
client.run()                              # until the server hangs up
client.data[out]                          # all that came on a stream
"""

from __future__ import annotations

import socket
import struct
import urllib.parse
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection
from wsproto.events import Request as WsRequest

SECONDS = 20.0
SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 6, 7, 8, 9


class NotUpgraded(Exception):
    """The server answered something else than 101."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body.decode(errors='replace')}")
        self.status = status
        self.body = body


def dictionary() -> bytes:
    """The words that both sides know before anything is said: asked of the server's own table, whose hash a test knows."""
    from tare.streaming.spdy_headers import DICTIONARY

    return DICTIONARY


class SpdyClient:
    """One connection. `data`, `ended` and `resets` are by stream; `gone_away` is the status of GOAWAY, None before it."""

    def __init__(self, connection: socket.socket | Tunnelled, rest: bytes, protocol: str) -> None:
        self.socket = connection
        self.protocol = protocol
        self.buffer = rest
        self.deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 8, zlib.Z_DEFAULT_STRATEGY, dictionary())
        self.inflate = zlib.decompressobj(zdict=dictionary())
        self.next_stream = 1
        self.data: dict[int, bytearray] = defaultdict(bytearray)
        self.accepted: set[int] = set()
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.pongs: list[int] = []
        self.consumed: dict[int, int] = defaultdict(int)
        self.gone_away: int | None = None

    @classmethod
    def connect(cls, url: str, protocols: Sequence[str] = (), method: str = "POST", **headers: str) -> SpdyClient:
        """Upgrade. Raises NotUpgraded."""
        parts = urllib.parse.urlsplit(url)
        connection = socket.create_connection((parts.hostname, parts.port), SECONDS)
        try:
            lines = [
                f"{method} {parts.path}{'?' + parts.query if parts.query else ''} HTTP/1.1",
                f"Host: {parts.netloc}",
            ]
            lines += ["Connection: Upgrade", "Upgrade: SPDY/3.1"]
            lines += [f"X-Stream-Protocol-Version: {name}" for name in protocols]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            head, rest = read_head(connection)
        except BaseException:
            connection.close()
            raise
        status = int(head.split(b" ", 2)[1])
        if status != 101:
            connection.close()
            raise NotUpgraded(status, rest)
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        assert fields[b"upgrade"] == b"spdy/3.1"
        return cls(connection, rest, fields.get(b"x-stream-protocol-version", b"").decode())

    @classmethod
    def tunnel(cls, url: str, protocol: str) -> SpdyClient:
        """The same within a WebSocket."""
        carrier = Tunnelled(url, protocol)
        return cls(carrier, b"", carrier.protocol or "")

    def close(self) -> None:
        """Hang up without a word."""
        self.socket.close()

    # What goes

    def control(self, kind: int, flags: int, payload: bytes) -> None:
        """Any control frame."""
        self.socket.sendall(struct.pack(">HHI", 0x8003, kind, flags << 24 | len(payload)) + payload)

    def open(self, headers: Mapping[str, str], *, fin: bool = False) -> int:
        """A new stream's number."""
        number, self.next_stream = self.next_stream, self.next_stream + 2
        plain = struct.pack(">I", len(headers))
        for name, value in headers.items():
            for word in (name.lower().encode(), value.encode()):
                plain += struct.pack(">I", len(word)) + word
        block = self.deflate.compress(plain) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
        self.control(SYN_STREAM, int(fin), struct.pack(">IIBB", number, 0, 0, 0) + block)
        return number

    def send(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Bytes on a stream, in one frame."""
        self.socket.sendall(struct.pack(">II", stream, int(fin) << 24 | len(data)) + data)

    def reset(self, stream: int) -> None:
        """No more of it."""
        self.control(RST_STREAM, 0, struct.pack(">II", stream, 5))

    def ping(self, number: int = 1) -> None:
        """Ask for an answer."""
        self.control(PING, 0, struct.pack(">I", number))

    # What comes

    def step(self, seconds: float = SECONDS) -> bool:
        """Take one frame; False when the server has hung up. Raises TimeoutError."""
        self.socket.settimeout(seconds)
        head = self.take(8)
        if head is None:
            self.close()
            return False
        first, second = struct.unpack(">II", head)
        payload = self.take(second & 0xFFFFFF)
        assert payload is not None, "the connection ended within a frame"
        flags = second >> 24
        if first >> 31:
            assert first >> 16 == 0x8003
            self.control_frame(first & 0xFFFF, payload)
        else:
            self.data[first] += payload
        if flags & 1:
            self.ended.add(first if not first >> 31 else struct.unpack(">I", payload[:4])[0])
        return True

    def control_frame(self, kind: int, payload: bytes) -> None:
        """Note what it says."""
        if kind in (SYN_REPLY, HEADERS):
            self.inflate.decompress(payload[4:])
        (number,) = struct.unpack(">I", payload[:4])
        if kind == SYN_REPLY:
            self.accepted.add(number)
        elif kind == RST_STREAM:
            self.resets[number] = struct.unpack(">I", payload[4:8])[0]
        elif kind == PING:
            self.pongs.append(number)
        elif kind == WINDOW_UPDATE:
            self.consumed[number] += struct.unpack(">I", payload[4:8])[0]
        elif kind == GOAWAY:
            self.gone_away = struct.unpack(">I", payload[4:8])[0]

    def take(self, size: int) -> bytes | None:
        """So many bytes; None at the end."""
        while len(self.buffer) < size:
            try:
                more = self.socket.recv(1 << 16)
            except ConnectionResetError:
                more = b""
            if not more:
                assert not self.buffer, "the connection ended within a frame"
                return None
            self.buffer += more
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def run(self) -> None:
        """Until the server hangs up."""
        while self.step():
            continue

    def until(self, stream: int, text: bytes) -> None:
        """Until a stream has said this."""
        while text not in self.data[stream]:
            assert self.step(), f"the server hung up before {text!r}: {bytes(self.data[stream])!r}"


class Tunnelled:
    """A WebSocket whose messages are the pieces of a stream, in the place of a socket."""

    def __init__(self, url: str, protocol: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), SECONDS)
        self.ws = WSConnection(ConnectionType.CLIENT)
        request = WsRequest(host=parts.netloc, target=parts.path, subprotocols=[protocol])
        self.socket.sendall(self.ws.send(request))
        self.protocol: str | None = None
        self.over = False
        while self.protocol is None:
            self.recv(0)

    def sendall(self, data: bytes) -> None:
        """One message."""
        self.socket.sendall(self.ws.send(BytesMessage(data=data)))

    def recv(self, size: int) -> bytes:
        """Bytes of the next message; b"" at the end, or where there was something else."""
        found = b""
        while not found and not self.over:
            self.ws.receive_data(self.socket.recv(1 << 16) or None)
            for event in self.ws.events():
                if isinstance(event, AcceptConnection):
                    self.protocol = event.subprotocol
                elif isinstance(event, BytesMessage):
                    found += event.data
                elif isinstance(event, CloseConnection):
                    self.over = True
            if size == 0:
                break
        return found

    def settimeout(self, seconds: float) -> None:
        """As a socket's."""
        self.socket.settimeout(seconds)

    def close(self) -> None:
        """As a socket's."""
        self.socket.close()


def read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """A response's head, and what came behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(4096)
        if not more:
            raise ConnectionError(f"no whole answer: {data!r}")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest
