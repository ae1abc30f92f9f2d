"""Messages between daemon, keeper, launcher and logger: bytes in, values out; sockets are elsewhere.

    ┌─────────┬─────────┬────────────┬────────┬───────────────────────────────┐
    │ magic   │ kind    │ request ID │ count  │ fields                        │
    │ u8 0x54 │ u8      │ u32        │ u16    │ count × (tag u8, length u32,  │
    │         │         │            │        │          bytes)               │
    └─────────┴─────────┴────────────┴────────┴───────────────────────────────┘
    little endian; tag 'b' bytes, 'i' a signed integer of 8 bytes

A message is one packet of a SOCK_SEQPACKET unix socket, with its descriptors beside it (SCM_RIGHTS). A reply repeats the
request's ID; an event has request ID 0. What is long (a plan) travels as a sealed memfd, never in a field.

    daemon                       keeper                 launcher                          logger
      │ HELLO ──────────────────►│ (and to the launcher)   │                                │
      │◄───────────── OK (pids)  │                         │                                │
      │ RENEW ──────────────────►│ (and to the launcher): another version of its code          │
      │ STORE/FETCH/DROP fds ───►│◄──── STORE/FETCH ───────┤◄───────── STORE/FETCH ─────────┤ (FETCH, STORE)
      │ NAMESPACES, LOGGER, CREATE, START, EXEC, … ───────►│ forks                          │
      │◄──────────────────── OK or FAILED (step, errno) ───│                                │
      │◄──────── EXITED (pid, start time, …) ──────────────│                                │
      │ ADD, REOPEN, DRAIN, REMOVE ────────────────────────┼───────────────────────────────►│
      │◄───────────────────────────────────────────────────┼───────────────────── OK ───────│
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Field = bytes | int

# Daemon and keeper, launcher, loggers can be of two versions that follow one another: for as long as it takes to renew them, or for good
# where that does not work. So a message keeps its number and its fields' meaning; new ones come with a higher VERSION, and OLDEST is raised
# one version later. HELLO and RENEW stay as they are for ever.
VERSION = 2
OLDEST = 2  # whom this one speaks with
MAGIC = 0x54
HEADER = struct.Struct("<BBIH")
FIELD = struct.Struct("<BI")
INTEGER = struct.Struct("<q")
MAX_PACKET = 65536
MAX_FDS = 16

# Replies and events
OK = 1  # fields as the request says
FAILED = 2  # step, errno, message
EXITED = 3  # pid, start time
BORN = 4  # pid; pidfd: the first half of CREATE's answer, of a child that waits for its plan, or to be placed (a step "barrier"), or of its maker

# To the keeper
HELLO = 10  # version, address of the service manager's socket (empty: none), 1: it has what it is to keep
# → OK version, keeper's pid, launcher's pid (0: none now), identity of its code, oldest version that it speaks with
STORE = 11  # key, + descriptors: kept under the key until dropped; no reply when the request ID is 0
FETCH = 12  # key → OK + the descriptors kept (none: no descriptors)
DROP = 13  # key prefix: every key that begins so is let go; no reply when the request ID is 0
QUIT = 14  # end keeper, launcher and loggers → OK, or FAILED while a container or exec lives
RENEW = 15  # identity, command line … ; interpreter → OK identity, once that code is in place (`succession`), or FAILED

# To the launcher, which knows HELLO (version → OK version, 0, its pid, identity, oldest) and RENEW too.
# "Pid" is always two fields: PID and start time.
NAMESPACES = 20  # pod ID, clone flags; plan memfd → OK pid of the pod's PID 1 (0 0: none); netlink socket of a new network namespace
LOGGER = 21  # group → OK once a logger for that group listens
# container ID, clone flags, 1: made by a process in between, 2: which itself is placed; plan memfd, v2 cgroup directory
CREATE = 22  # → OK pid, warnings; pidfd, terminal master
START = 23  # container ID → OK once exec has happened
# exec ID, 1: nobody in the target's PID namespace may trace; plan memfd, target's pidfd, stdin, stdout, stderr, cgroup directory on v2
EXEC = 24  # → OK pid, warnings; pidfd, terminal master
ABANDON = 25  # container ID (or the name of another request): end the child that was made for it → OK
CHECK = 26  # name; plan memfd: [(path, make it)] → OK one field for each path: b"d", b"f", or an errno as text
COMMAND = (
    27  # name, milliseconds until all of it is killed (0: never); plan memfd, descriptors 0, 1, 2, … → OK pid; pidfd
)
PROCEED = 28  # container ID, + plan memfd for whom BEGIN made: what was BORN goes on → the rest of CREATE's answer; after BEGIN, START's
BEGIN = 29  # container ID, clone flags; v2 cgroup directory → BORN: a process that waits for its plan, and with that goes on to its exec

# From a child to the launcher, over its own socket pair; the answer to READY and to BARRIER is GO
CHILD = 40  # pid; pidfd: whom an intermediate process has made in its place
TERMINAL = 41  # terminal master
READY = 42  # warnings; waits at the gate
GO = 43
BARRIER = 44  # waits to be placed
HOLD = 46  # instead of GO, where a command made the process and ends: it waits at its container's own gate from now on → OK

# From a child to its helper outside, over a socket pair of theirs
# CHILD, with the pid alone, also comes this way, where the helper has something to do for whom the asking process makes
ASK = 45  # number of a list of steps → OK pid of who asks, warnings; or FAILED, when the launcher knows why

# To a logger
ADD = 30  # container ID, log path (empty: discard), longest line in bytes, ADD_ flags, + terminal master → OK, also when added before
REOPEN = 31  # container ID → OK once the next byte goes to a new file at the log path
DRAIN = 32  # container ID (nothing writes any more) → OK once all streams are at their end and written, or when unknown
REMOVE = 33  # container ID → OK, also when unknown
ATTACH = 34  # container ID, + a SOCK_SEQPACKET socket that gets a copy of its output from now on (`taps`) → OK
CLOSE_INPUT = 35  # container ID: its stdin is over once nobody else writes to it → OK, also when unknown
ADD_TERMINAL = 1  # one stream, from the terminal's master; else two, from the FIFOs stdout and stderr
ADD_STDIN = 2  # a writing end of the FIFO stdin is held, so that a read in the container waits for an attach


class WireError(Exception):
    """Bytes that are no message."""


def encode(kind: int, request: int = 0, fields: Sequence[Field] = ()) -> bytes:
    """One packet. Raises WireError where it would not fit into one, or a number not into its field."""
    try:
        parts = [HEADER.pack(MAGIC, kind, request, len(fields))]
        for field in fields:
            tag, value = (0x69, INTEGER.pack(field)) if isinstance(field, int) else (0x62, field)
            parts.append(FIELD.pack(tag, len(value)))
            parts.append(value)
    except struct.error as error:
        raise WireError(f"message {kind}: {error}") from error
    packet = b"".join(parts)
    if len(packet) > MAX_PACKET:
        raise WireError(f"message {kind} of {len(packet)} bytes is over {MAX_PACKET}")
    return packet


def decode(packet: bytes) -> tuple[int, int, list[Field]]:
    """(kind, request ID, fields). Raises WireError for anything but exactly one whole message."""
    if len(packet) < HEADER.size:
        raise WireError(f"packet of {len(packet)} bytes is shorter than a header")
    magic, kind, request, count = HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise WireError(f"packet begins with {magic:#x}")
    fields: list[Field] = []
    offset = HEADER.size
    for _ in range(count):
        if offset + FIELD.size > len(packet):
            raise WireError("packet ends within a field")
        tag, length = FIELD.unpack_from(packet, offset)
        offset += FIELD.size
        value = packet[offset : offset + length]
        if len(value) != length:
            raise WireError("packet ends within a field")
        offset += length
        if tag == 0x62:
            fields.append(value)
        elif tag == 0x69 and length == INTEGER.size:
            fields.append(INTEGER.unpack(value)[0])
        else:
            raise WireError(f"field with tag {tag:#x} and length {length}")
    if offset != len(packet):
        raise WireError(f"{len(packet) - offset} bytes after the last field")
    return kind, request, fields


def shape(fields: Sequence[Field]) -> str:
    """The kinds of a message's fields: a letter for each, `b` bytes, `i` a number."""
    return "".join("i" if isinstance(field, int) else "b" for field in fields)


def bytes_of(field: Field) -> bytes:
    """A field that must be bytes. Raises WireError."""
    if not isinstance(field, bytes):
        raise WireError("a field that should be bytes is a number")
    return field


def int_of(field: Field) -> int:
    """A field that must be a number. Raises WireError."""
    if not isinstance(field, int):
        raise WireError("a field that should be a number is bytes")
    return field
