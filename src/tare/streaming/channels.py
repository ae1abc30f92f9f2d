"""Streams over a WebSocket: one byte that says which stream, then its data. Pure.

    (none), channel.k8s.io                binary messages
    base64.channel.k8s.io                 text messages; the channel as a digit, the data in base64
    v4.channel.k8s.io, v4.base64…         the same, with the end as a JSON Status on channel 3
    v5.channel.k8s.io                     as v4; a message (255, channel) closes a stream: a client's stdin can end

Channels: 0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize. Source: Kubernetes, WebSocket sub-protocols of remote command.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from tare.streaming import remote

NAMES = (remote.STDIN, remote.STDOUT, remote.STDERR, remote.ERROR, remote.RESIZE)
CLOSE = 255
PLAIN, BASE64 = "channel.k8s.io", "base64.channel.k8s.io"
V4, V4_BASE64, V5 = "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "v5.channel.k8s.io"
PROTOCOLS = (V5, V4, V4_BASE64, PLAIN, BASE64, "")


class ChannelError(Exception):
    """A message that belongs to no channel."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Data of one channel; `closed`: there is no more of it."""

    channel: int
    data: bytes
    closed: bool = False


def read(protocol: str, message: bytes | str) -> Piece:
    """What a client's message says. Raises ChannelError."""
    if protocol in (BASE64, V4_BASE64):
        return read_text(message if isinstance(message, str) else message.decode("ascii", "replace"))
    data = message.encode() if isinstance(message, str) else message
    if not data:
        raise ChannelError("an empty message names no channel")
    if protocol == V5 and data[0] == CLOSE:
        if len(data) != 2:
            raise ChannelError("a message that closes a channel must name one")
        return Piece(data[1], b"", closed=True)
    return Piece(data[0], data[1:])


def read_text(message: str) -> Piece:
    """The same, in base64."""
    if not message or message[0] not in "0123456789":
        raise ChannelError("a message must begin with its channel's digit")
    try:
        return Piece(int(message[0]), base64.b64decode(message[1:], validate=True))
    except (binascii.Error, ValueError) as error:
        raise ChannelError(f"a message that is not base64: {error}") from error


def write(protocol: str, channel: int, data: bytes) -> bytes | str:
    """A message to the client."""
    if protocol in (BASE64, V4_BASE64):
        return f"{channel}{base64.b64encode(data).decode()}"
    return bytes([channel]) + data


def told(protocol: str, outcome: remote.Outcome) -> bytes:
    """What goes on the error channel at the end."""
    if protocol in (V4, V4_BASE64, V5):
        return remote.status(outcome)
    return remote.words(outcome)
