"""Netlink itself: messages and attributes as bytes, and one exchange with the kernel on a socket that is given.

What the messages mean is not known here: `rtnetlink` has links, addresses and routes, `nft` has nf_tables.

    request:  [ header | body ] [ header | body ] …     one send; the kernel runs them in order before send returns
    replies:  [ header | body ] …  [ NLMSG_ERROR: 0 or −errno, and the kernel's own text ]   one for each request
              a dump ends with NLMSG_DONE instead

    header, 16 bytes:  length u32 │ type u16 │ flags u16 │ sequence u32 │ port u32          (native byte order)
    attribute:         length u16 │ type u16 │ value, padded to 4 bytes                     (length without the padding)

Because the kernel answers within the send, nothing here ever waits: an exchange is a system call to send and one or more to
receive what is already there. A socket stays in the network namespace in which it was made, whoever uses it.
Source: netlink(7), Documentation/userspace-api/netlink/intro.rst.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tare.errors import InternalError

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
U32 = struct.Struct("=I")
ERRNO = struct.Struct("=i")

NLMSG_ERROR = 2
NLMSG_DONE = 3

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_CAPPED = 0x100  # on an NLMSG_ERROR: only the header of the request is echoed
NLM_F_ACK_TLVS = 0x200  # on an NLMSG_ERROR: attributes follow

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
NLMSGERR_ATTR_MSG = 1

SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12

RECEIVE = 65536
DUMP_ATTEMPTS = 5


class NetlinkError(InternalError):
    """The kernel refused a message. `errno` is its number, `text` what more it said (often "")."""

    def __init__(self, doing: str, errno: int, text: str = "", hint: str | None = None) -> None:
        cause = os.strerror(errno)
        super().__init__(doing, cause=f"{cause}: {text}" if text else cause, hint=hint)
        self.errno = errno
        self.text = text


@dataclass(frozen=True, slots=True)
class Message:
    """A request, and in plain words what it does (for the error if it fails)."""

    doing: str
    type: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """A message from the kernel. `body` is what follows the header."""

    type: int
    flags: int
    sequence: int
    body: bytes


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded. Raises ValueError where the value is too long for the format."""
    length = ATTRIBUTE.size + len(value)
    if length > 0xFFFF:
        raise ValueError(f"netlink attribute {kind} has {len(value)} bytes")
    return ATTRIBUTE.pack(length, kind) + value + bytes(-length & 3)


def nested(kind: int, *members: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(members))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a C string."""
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """An attribute that is a number of 32 bits in the machine's order."""
    return attribute(kind, U32.pack(value))


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attributes by type, without their flags; of several of one type the last. Raises ValueError where the bytes are not whole."""
    return dict(each(data, offset))


def members(data: bytes) -> list[bytes]:
    """The values of a list, whose attributes are all of one type. Raises ValueError where the bytes are not whole."""
    return [value for _, value in each(data, 0)]


def each(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Every attribute's type, without its flags, and value."""
    while offset + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < ATTRIBUTE.size or offset + length > len(data):
            raise ValueError(f"netlink attribute of {length} bytes at {offset} of {len(data)}")
        yield kind & NLA_TYPE_MASK, data[offset + ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def number(value: bytes) -> int:
    """A u32 attribute's value. Raises ValueError where it has another size."""
    if len(value) != U32.size:
        raise ValueError(f"netlink number of {len(value)} bytes")
    return int(U32.unpack(value)[0])


def string(value: bytes) -> str:
    """A C string attribute's value."""
    return value.partition(b"\0")[0].decode(errors="replace")


def encode(messages: Sequence[Message], sequence: int) -> bytes:
    """The bytes of one send; the messages are numbered from `sequence` on."""
    parts = []
    for place, message in enumerate(messages):
        length = HEADER.size + len(message.body)
        parts.append(HEADER.pack(length, message.type, message.flags | NLM_F_REQUEST, sequence + place, 0))
        parts.append(message.body)
        parts.append(bytes(-length & 3))
    return b"".join(parts)


def decode(data: bytes) -> Iterator[Reply]:
    """The messages of one receive. Raises ValueError where the bytes are not whole messages."""
    offset = 0
    while offset < len(data):
        if offset + HEADER.size > len(data):
            raise ValueError(f"netlink message cut off at {offset} of {len(data)}")
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            raise ValueError(f"netlink message of {length} bytes at {offset} of {len(data)}")
        yield Reply(kind, flags, sequence, data[offset + HEADER.size : offset + length])
        offset += (length + 3) & ~3


def verdict(reply: Reply) -> tuple[int, str]:
    """What an NLMSG_ERROR or NLMSG_DONE says: an errno, 0 for success, and the kernel's own text where it gave one.

    NLMSG_ERROR is the errno (negative), the header of the request, the rest of the request unless the flag says it is capped, and
    attributes if the flag says so. NLMSG_DONE is the errno and attributes.
    """
    if len(reply.body) < ERRNO.size:
        raise ValueError(f"netlink verdict of {len(reply.body)} bytes")
    (errno,) = ERRNO.unpack_from(reply.body)
    offset = ERRNO.size
    if reply.type == NLMSG_ERROR:
        if len(reply.body) < offset + HEADER.size:
            raise ValueError(f"netlink verdict of {len(reply.body)} bytes")
        (echoed,) = U32.unpack_from(reply.body, offset)
        offset += HEADER.size if reply.flags & NLM_F_CAPPED or not errno else (echoed + 3) & ~3
    words = attributes(reply.body, offset) if reply.flags & NLM_F_ACK_TLVS else {}
    return -errno, string(words.get(NLMSGERR_ATTR_MSG, b""))


class Netlink:
    """Exchanges on one socket, which stays the giver's to close. For one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sequence = 0
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            sock.setsockopt(SOL_NETLINK, option, 1)

    def run(self, messages: Sequence[Message]) -> None:
        """Do all of them in one send. Raises NetlinkError for the first that failed; those after it were tried nevertheless."""
        self._exchange(messages)

    def ask(self, *questions: Message) -> list[bytes]:
        """The bodies of the answers in order, a dump's several included. Raises NetlinkError."""
        for _ in range(DUMP_ATTEMPTS):
            replies = self._exchange(questions)
            if not any(reply.flags & NLM_F_DUMP_INTR for reply in replies):
                return [reply.body for reply in replies if reply.type != NLMSG_DONE]
        raise InternalError(
            questions[0].doing, cause=f"what was listed changed {DUMP_ATTEMPTS} times while it was read"
        )

    def _exchange(self, messages: Sequence[Message]) -> list[Reply]:
        first = self._sequence + 1
        self._sequence += len(messages)
        try:
            self._socket.send(encode(messages, first))
            replies = list(self._receive(messages, first))
            verdicts = [(reply, *verdict(reply)) for reply in replies if reply.type in (NLMSG_ERROR, NLMSG_DONE)]
        except OSError as error:
            raise InternalError(messages[0].doing, cause=error) from error
        except ValueError as error:
            raise InternalError(messages[0].doing, cause=str(error)) from error
        for reply, errno, words in verdicts:
            if errno:
                raise NetlinkError(messages[reply.sequence - first].doing, errno, words)
        unanswered = {first + place for place, message in enumerate(messages) if message.flags & NLM_F_ACK}
        unanswered -= {reply.sequence for reply, _, _ in verdicts}
        if unanswered:
            raise InternalError(messages[min(unanswered) - first].doing, cause="the kernel did not answer")
        return [reply for reply in replies if reply.type != NLMSG_ERROR]

    def _receive(self, messages: Sequence[Message], first: int) -> Iterator[Reply]:
        """Everything that the kernel has to say to these messages, until each is acknowledged or there is no more."""
        pending = {first + place for place, message in enumerate(messages) if message.flags & NLM_F_ACK}
        while pending:
            try:
                data = self._socket.recv(RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # nf_tables leaves the rest unanswered where it cannot even begin
            for reply in decode(data):
                if not first <= reply.sequence < first + len(messages):
                    continue  # an answer to an exchange that broke off
                if reply.type in (NLMSG_ERROR, NLMSG_DONE):
                    pending.discard(reply.sequence)
                yield reply
