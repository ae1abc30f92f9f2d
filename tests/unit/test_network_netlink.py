"""Netlink's bytes, and an exchange with a scripted kernel at the other end of a socket pair."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

import pytest

from tare.errors import InternalError
from tare.network import netlink
from tare.network.netlink import Message, Netlink, NetlinkError, Reply

PING = Message("ping", 20, netlink.NLM_F_ACK, b"abcdef")


def ack(sequence: int, error: int = 0, words: str = "", echo: bytes | None = None) -> bytes:
    """An NLMSG_ERROR, as netlink(7) draws it; `echo` is the request's body where it is not capped."""
    flags = (netlink.NLM_F_CAPPED if echo is None else 0) | (netlink.NLM_F_ACK_TLVS if words else 0)
    body = struct.pack("=i", -error) + struct.pack("=IHHII", 16 + len(echo or b""), 20, 5, sequence, 0) + (echo or b"")
    body += bytes(-len(body) & 3) + (netlink.text(netlink.NLMSGERR_ATTR_MSG, words) if words else b"")
    return frame(netlink.NLMSG_ERROR, flags, sequence, body)


def frame(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """A message, padded."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) & 3)


class Kernel(socket.socket):
    """A socket whose every send is answered by what a script says."""

    answers: Callable[[bytes], list[bytes]]
    other: socket.socket

    def setsockopt(self, *_: object) -> None:
        """Netlink's options mean nothing to a socket pair."""

    def send(self, data: bytes, _flags: int = 0) -> int:  # type: ignore[override]
        for answer in self.answers(data):
            self.other.send(answer)
        return len(data)


def talk(answers: Callable[[bytes], list[bytes]], talker: Callable[[Netlink], object]) -> object:
    """Run the talker against a kernel that answers so."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right, Kernel(fileno=left.detach()) as kernel:
        kernel.answers, kernel.other = answers, right
        return talker(Netlink(kernel))


def test_attributes_are_padded_and_their_length_is_not() -> None:
    assert netlink.attribute(3, b"abcde") == b"\x09\x00\x03\x00abcde\0\0\0"
    assert netlink.nested(2, netlink.u32(1, 7)) == b"\x0c\x00\x02\x80\x08\x00\x01\x00\x07\0\0\0"
    assert netlink.attributes(netlink.text(3, "lo") + netlink.u32(4, 9)) == {3: b"lo\0", 4: b"\x09\0\0\0"}


def test_an_attribute_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="65532 bytes"):
        netlink.attribute(1, bytes(65532))


def test_messages_are_numbered_and_padded() -> None:
    first, second = netlink.decode(netlink.encode([PING, PING], 7))
    assert (first.sequence, second.sequence, first.body, first.flags) == (7, 8, b"abcdef", 5)


@pytest.mark.parametrize("data", [b"x", bytes(15), struct.pack("=IHHII", 15, 2, 0, 1, 0), frame(2, 0, 1, b"abcd")[:-1]])
def test_bytes_that_are_no_messages_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink message"):
        list(netlink.decode(data))


@pytest.mark.parametrize("data", [b"\x03\0\1\0", b"\xff\0\1\0abcd", b"\0\0\0\0"])
def test_bytes_that_are_no_attributes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink attribute"):
        netlink.attributes(data)


@pytest.mark.parametrize("echo", [None, b"", b"abcde"])
def test_a_verdict_has_the_kernels_words_whether_the_request_is_echoed_or_not(echo: bytes | None) -> None:
    (reply,) = netlink.decode(ack(1, errno.EINVAL, "Unknown device type", echo))
    assert netlink.verdict(reply) == (errno.EINVAL, "Unknown device type")
    (reply,) = netlink.decode(ack(1))
    assert netlink.verdict(reply) == (0, "")


def test_a_verdict_that_is_cut_off_is_refused() -> None:
    for body in (b"", bytes(8)):
        with pytest.raises(ValueError, match="verdict"):
            netlink.verdict(Reply(netlink.NLMSG_ERROR, 0, 1, body))


def test_an_exchange_ends_when_all_are_acknowledged() -> None:
    talk(lambda _: [ack(1) + ack(2)], lambda kernel: kernel.run([PING, PING]))


def test_the_first_failure_is_told_by_what_was_done() -> None:
    other = Message("pong", 20, netlink.NLM_F_ACK, b"")
    script = [ack(1), ack(2, errno.EEXIST), ack(3, errno.EPERM, "more")]
    with pytest.raises(NetlinkError, match=r"^pong: File exists$") as caught:
        talk(lambda _: script, lambda kernel: kernel.run([PING, other, PING]))
    assert caught.value.errno == errno.EEXIST


def test_a_failure_counts_more_than_what_stays_unanswered() -> None:
    with pytest.raises(NetlinkError, match="ping: Operation not permitted"):
        talk(lambda _: [ack(1, errno.EPERM)], lambda kernel: kernel.run([PING, PING]))


def test_silence_is_an_error() -> None:
    with pytest.raises(InternalError, match="ping: the kernel did not answer"):
        talk(lambda _: [ack(1)], lambda kernel: kernel.run([PING, PING]))


def test_an_answer_to_an_earlier_exchange_is_passed_over() -> None:
    def twice(kernel: Netlink) -> list[bytes]:
        kernel.run([PING])
        return kernel.ask(PING)

    def answers(data: bytes) -> list[bytes]:
        (request,) = netlink.decode(data)
        late = [ack(1, errno.EIO)] if request.sequence == 2 else []
        return [*late, frame(16, 0, request.sequence, b"body"), ack(request.sequence)]

    assert talk(answers, twice) == [b"body"]


def test_a_dump_of_several_parts_is_read_to_its_end() -> None:
    done = frame(netlink.NLMSG_DONE, 2, 1, bytes(4))
    answers = [frame(16, 2, 1, b"one1") + frame(16, 2, 1, b"two2"), frame(16, 2, 1, b"tre3"), done]
    assert talk(lambda _: answers, lambda kernel: kernel.ask(PING)) == [b"one1", b"two2", b"tre3"]


def test_a_dump_that_was_interrupted_is_asked_for_again_but_not_for_ever() -> None:
    asked = []

    def answers(data: bytes) -> list[bytes]:
        (request,) = netlink.decode(data)
        asked.append(request.sequence)
        flags = netlink.NLM_F_DUMP_INTR if len(asked) != 3 else 0
        done = frame(netlink.NLMSG_DONE, 2 | flags, request.sequence, bytes(4))
        return [frame(16, 2, request.sequence, b"body"), done]

    assert talk(answers, lambda kernel: kernel.ask(PING)) == [b"body"]
    assert asked == [1, 2, 3]
    with pytest.raises(InternalError, match="changed 5 times"):
        talk(answers, lambda kernel: kernel.ask(PING))


def test_a_dump_that_fails_at_its_end_is_an_error() -> None:
    with pytest.raises(NetlinkError, match="ping: Cannot allocate memory"):
        done = frame(netlink.NLMSG_DONE, 2, 1, struct.pack("=i", -errno.ENOMEM))
        talk(lambda _: [frame(16, 2, 1, b"body"), done], lambda kernel: kernel.ask(PING))


def test_garbage_from_the_kernel_is_an_error_of_ours() -> None:
    with pytest.raises(InternalError, match="ping: netlink message cut off"):
        talk(lambda _: [b"garbage"], lambda kernel: kernel.run([PING]))
