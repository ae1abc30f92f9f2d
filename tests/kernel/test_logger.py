"""What a logger does for its containers, in a process of its own, with real FIFOs, terminals and a full file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import signal
import socket
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.launch import journal, linux, logger, packets, wire
from tests.support.loggers import PATIENCE, Box, Group


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """A group with a logger."""
    with Group(tmp_path) as made:
        made.start()
        yield made


def asked(group: Group, kind: int, *fields: wire.Field) -> socket.socket:
    """A connection over which something was asked."""
    connection = packets.connect(str(group.directory / "sock"))
    packets.send(connection, kind, 1, fields)
    return connection


def answered(connection: socket.socket, seconds: float = 10) -> bool:
    return bool(select.select([connection], [], [], seconds)[0])


def refusal(group: Group, box: Box, log: Path) -> list[wire.Field]:
    """How adding a container with this log is refused."""
    kind, reply = group.request(wire.ADD, box.id, bytes(log), 100, 0)
    assert kind == wire.FAILED
    return reply


# Streams


def test_both_streams_are_logged_as_they_come(group: Group) -> None:
    box = group.container("c1")
    group.add(box)
    os.write(box.writers["stdout"], b"out\npart")
    group.settle(box)
    os.write(box.writers["stderr"], b"err\n")
    group.settle(box)
    assert box.said() == {"stdout": b"out\npart", "stderr": b"err\n"}
    os.write(box.writers["stdout"], b"ly\n")
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    assert box.said() == {"stdout": b"out\npartly\n", "stderr": b"err\n"}
    assert box.log is not None
    assert box.log.stat().st_mode & 0o777 == 0o640


def test_a_line_longer_than_any_buffer_is_whole_again(group: Group) -> None:
    box = group.container("c1")
    group.add(box, max_line=1000)
    line = os.urandom(38000).hex().encode() + b"\n"
    writer = os.fork()
    if writer == 0:
        os.write(box.writers["stdout"], line * 3)
        os._exit(0)
    os.waitpid(writer, 0)
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    assert box.said() == {"stdout": line * 3}


def test_each_container_has_its_own_log(group: Group) -> None:
    boxes = [group.container(f"c{number}") for number in range(20)]
    for box in boxes:
        group.add(box)
        os.write(box.writers["stdout"], box.id + b"\n")
    group.kill()
    group.start()
    for box in boxes:
        os.write(box.writers["stderr"], box.id)
        box.hang_up()
        group.ask(wire.DRAIN, box.id)
        assert box.said() == {"stdout": box.id + b"\n", "stderr": box.id + b"\n"}


@pytest.mark.parametrize("successor", [False, True])
def test_a_stream_is_not_over_before_it_is_drained(group: Group, successor: bool) -> None:
    box = group.container("c1", begun=False)
    group.add(box)
    for attempt in (b"first", b"second"):
        box.open()
        os.write(box.writers["stdout"], attempt)
        box.hang_up()
        group.settle(box)
        if successor:
            group.kill()
            group.start()
    box.open(["stdout"])
    os.write(box.writers["stdout"], b"third\n")
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    said = box.said()["stdout"]
    # A successor cannot know that the writer has gone and come again: then it is one line.
    assert said.replace(b"\n", b"") == b"firstsecondthird"
    if not successor:
        assert said == b"first\nsecond\nthird\n"


def test_a_logger_that_waits_costs_nothing(group: Group) -> None:
    quiet, gone = group.container("c1"), group.container("c2")
    for box in (quiet, gone):
        group.add(box)
        os.write(box.writers["stdout"], b"x\n")
        group.settle(box)
    gone.hang_up()
    group.settle(gone)
    wakeups = switches(group.pid)
    assert not select.select(quiet.spares, [], [], 0.3)[0]
    assert switches(group.pid) - wakeups <= 1


def links(pid: int) -> list[str]:
    """What a process's descriptors lead to, without the standard streams."""
    directory = f"/proc/{pid}/fd"
    found = []
    for fd in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found += [os.readlink(f"{directory}/{fd}")] if int(fd) > 2 else []
    return found


def switches(pid: int) -> int:
    """How often a process went to wait."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_without_a_log_path_output_is_read_and_forgotten(group: Group) -> None:
    box = group.container("c1", log=False)
    group.add(box)
    for _ in range(10):
        os.write(box.writers["stdout"], b"x" * 65536)
    group.kill()
    group.start()
    group.ask(wire.REOPEN, box.id)
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    assert not (group.run / "logs").exists()


def test_a_terminal_is_logged_until_its_last_slave_is_closed(group: Group) -> None:
    master, slave = os.openpty()
    box = group.container("c1", begun=False)
    group.add(box, flags=wire.ADD_TERMINAL, fds=[master])
    os.write(slave, b"one\ntwo")
    os.close(slave)
    os.close(master)
    group.ask(wire.DRAIN, box.id)
    assert box.said() == {"stdout": b"one\r\ntwo\n"}


def test_a_terminal_can_be_handed_over_again(group: Group) -> None:
    box = group.container("c1", begun=False)
    for attempt in (b"first\n", b"second\n"):
        master, slave = os.openpty()
        group.add(box, flags=wire.ADD_TERMINAL, fds=[master])
        os.write(slave, attempt)
        while fcntl.ioctl(slave, termios.TIOCOUTQ, b"\0" * 4) != b"\0" * 4:
            group.ask(wire.DRAIN, b"nobody")
        group.ask(wire.DRAIN, b"nobody")
        packets.close_all([master, slave])
    group.ask(wire.DRAIN, box.id)
    assert box.said()["stdout"].endswith(b"second\r\n")


def test_a_terminal_that_nobody_kept_is_over(group: Group) -> None:
    master, slave = os.openpty()
    box = group.container("c1", begun=False)
    group.add(box, flags=wire.ADD_TERMINAL, fds=[master])
    packets.close_all([master, slave])
    group.kill()
    group.start()
    group.ask(wire.DRAIN, box.id)


def test_stdin_waits_while_it_is_served_and_ends_with_it(group: Group) -> None:
    box = group.container("c1")
    os.mkfifo(box.directory / "stdin")
    group.add(box, flags=wire.ADD_STDIN)
    stdin = os.open(box.directory / "stdin", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):
            os.read(stdin, 1)
        group.kill()
        group.start()
        group.ask(wire.DRAIN, b"nobody")
        with pytest.raises(BlockingIOError):
            os.read(stdin, 1)
        group.ask(wire.REMOVE, box.id)
        assert os.read(stdin, 1) == b""
    finally:
        os.close(stdin)


# Draining and removing


def test_what_has_never_begun_is_drained_at_once(group: Group) -> None:
    box = group.container("c1", begun=False)
    group.add(box)
    group.ask(wire.DRAIN, box.id)
    group.ask(wire.DRAIN, box.id)
    assert box.said() == {}


@pytest.mark.parametrize("successor", [False, True])
def test_a_drain_waits_for_whoever_still_writes(group: Group, successor: bool) -> None:
    box = group.container("c1")
    group.add(box)
    if successor:
        group.kill()
        group.start()
    os.write(box.writers["stdout"], b"early\n")
    with asked(group, wire.DRAIN, box.id) as first, asked(group, wire.DRAIN, box.id) as second:
        group.ask(wire.DRAIN, b"nobody")
        assert not answered(first, 0)
        os.write(box.writers["stdout"], b"late")
        first.close()
        box.hang_up()
        assert answered(second)
        assert packets.receive(second)[:2] == (wire.OK, 1)
    assert box.said() == {"stdout": b"early\nlate\n"}


def test_more_than_a_pipe_holds_by_default_is_drained(group: Group) -> None:
    box = group.container("c1")
    fcntl.fcntl(box.spares[0], 1031, 1 << 20)
    group.add(box)
    group.kill()
    text = b"0123456789\n" * 80000
    os.write(box.writers["stdout"], text)
    box.hang_up()
    group.start()
    group.ask(wire.DRAIN, box.id)
    assert box.said() == {"stdout": text}


def test_removing_ends_those_who_wait_and_can_be_done_twice(group: Group) -> None:
    box = group.container("c1")
    group.add(box)
    with asked(group, wire.DRAIN, box.id) as waiting:
        group.ask(wire.DRAIN, b"nobody")
        group.ask(wire.REMOVE, box.id)
        assert answered(waiting)
    group.ask(wire.REMOVE, box.id)
    assert os.listdir(group.directory / "slots") == []
    group.add(box)
    os.write(box.writers["stdout"], b"anew\n")
    group.settle(box)
    assert box.said() == {"stdout": b"anew\n"}


def test_nothing_of_a_removed_container_stays(group: Group) -> None:
    def life(number: int) -> None:
        box = group.container(f"c{number}")
        group.add(box)
        os.write(box.writers["stdout"], b"x\n")
        box.hang_up()
        group.ask(wire.DRAIN, box.id)
        group.ask(wire.REMOVE, box.id)
        box.close()

    def held() -> tuple[int, int]:
        rss = Path(f"/proc/{group.pid}/statm").read_text().split()[1]
        # The last connection may or may not be closed already.
        return sum(not link.startswith("socket:") for link in links(group.pid)), int(rss)

    for number in range(100):
        life(number)
    fds, pages = held()
    for number in range(100, 500):
        life(number)
    assert held()[0] == fds
    assert held()[1] - pages <= 8


# Rotation


def test_after_reopen_the_next_byte_is_in_a_new_file(group: Group) -> None:
    box = group.container("c1")
    assert box.log is not None
    group.add(box)
    os.write(box.writers["stdout"], b"old\npart")
    group.settle(box)
    rotated = box.log.rename(box.log.with_suffix(".1"))
    os.write(box.writers["stdout"], b"ly old\nst")
    group.settle(box)
    group.ask(wire.REOPEN, box.id)
    group.ask(wire.REOPEN, box.id)
    os.write(box.writers["stdout"], b"ill new\n")
    group.settle(box)
    assert box.said(rotated) == {"stdout": b"old\npartly old\nstill new\n"}
    assert [line[-7:] for line in box.log.read_bytes().splitlines()] == [b"ill new"]


def test_a_log_that_was_renamed_while_no_logger_lived_is_found(group: Group) -> None:
    box = group.container("c1")
    assert box.log is not None
    group.add(box)
    os.write(box.writers["stdout"], b"one\n")
    group.settle(box)
    group.kill()
    rotated = box.log.rename(box.log.with_suffix(".1"))
    os.write(box.writers["stdout"], b"two\n")
    group.start()
    group.settle(box)
    assert not box.log.exists()
    group.ask(wire.REOPEN, box.id)
    assert rotated.read_bytes().count(b"\n") == 2
    assert box.log.read_bytes() == b""


def test_a_log_that_was_deleted_while_no_logger_lived_is_made_again(group: Group) -> None:
    box = group.container("c1")
    assert box.log is not None
    group.add(box)
    os.write(box.writers["stdout"], b"one\n")
    group.settle(box)
    group.kill()
    box.log.unlink()
    box.log.parent.rmdir()
    os.write(box.writers["stdout"], b"two\n")
    group.start()
    group.settle(box)
    assert box.said() == {"stdout": b"two\n"}


def test_a_log_that_was_cut_off_goes_on_at_its_end(group: Group) -> None:
    box = group.container("c1")
    assert box.log is not None
    group.add(box)
    os.write(box.writers["stdout"], b"one\n")
    group.settle(box)
    os.truncate(box.log, 0)
    os.write(box.writers["stdout"], b"two\n")
    group.settle(box)
    assert box.said() == {"stdout": b"two\n"}


def test_a_log_that_is_there_is_gone_on_with(group: Group) -> None:
    box = group.container("c1")
    assert box.log is not None
    box.log.parent.mkdir()
    box.log.write_bytes(b"2026-01-01T00:00:00.000000000Z stdout F before\n")
    group.add(box)
    os.write(box.writers["stdout"], b"after\n")
    group.settle(box)
    assert box.said() == {"stdout": b"before\nafter\n"}


# What goes wrong


def test_a_log_that_cannot_be_opened_refuses_the_container(group: Group, tmp_path: Path) -> None:
    box = group.container("c1")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    for path, number in [
        (tmp_path / "file" / "log", errno.ENOTDIR),
        (tmp_path / "link", errno.ELOOP),
        (tmp_path / "fifo", errno.ENXIO),
        (tmp_path, errno.EISDIR),
        (Path("/dev/null"), errno.EINVAL),
    ]:
        step, error, words = refusal(group, box, path)
        assert (step, error) == (b"open log", number)
        assert isinstance(words, bytes) and os.fsencode(path.parent if number == errno.ENOTDIR else path) in words
    assert not any(str(group.run / "containers") in link for link in links(group.pid))
    assert not (group.directory / "slots").exists()
    group.add(box)


def test_a_container_without_streams_is_refused(group: Group, tmp_path: Path) -> None:
    box = group.container("c1")
    (box.directory / "stderr").unlink()
    step, error, words = refusal(group, box, tmp_path / "log")
    assert (step, error) == (b"open streams", errno.ENOENT)
    assert isinstance(words, bytes) and b"c1/stderr" in words
    assert not (tmp_path / "log").exists()


def test_what_is_asked_wrongly_is_answered_and_harms_nobody(group: Group, tmp_path: Path) -> None:
    box = group.container("c1")
    group.add(box)
    wrong: list[tuple[int, tuple[wire.Field, ...]]] = [
        (wire.REOPEN, (b"c2",)),
        (wire.REOPEN, ()),
        (wire.DRAIN, (1,)),
        (wire.ADD, (b"../c", b"/log", 100, 0)),
        (wire.ADD, (b"c2", b"/log", 0, 0)),
        (wire.ADD, (b"c2", b"/log")),
        (wire.ADD, (b"c1", b"/elsewhere", 100, 0)),
        (wire.ADD, (b"c2", bytes(tmp_path / "log"), 100, wire.ADD_TERMINAL)),
        (wire.HELLO, (b"c1",)),
    ]
    for kind, fields in wrong:
        assert group.request(kind, *fields)[0] == wire.FAILED, (kind, fields)
    with packets.connect(str(group.directory / "sock")) as connection:
        connection.send(b"no message")
        assert answered(connection)
        with pytest.raises(packets.Closed):
            packets.receive(connection)
    os.write(box.writers["stdout"], b"still here\n")
    group.settle(box)
    assert box.said() == {"stdout": b"still here\n"}


def test_a_logger_has_room_for_so_many_containers(group: Group) -> None:
    group.kill()
    group.start(before=lambda: setattr(journal, "SLOTS", 2))
    boxes = [group.container(f"c{number}") for number in range(3)]
    group.add(boxes[0])
    group.add(boxes[1])
    step, error, words = refusal(group, boxes[2], group.run / "log")
    assert (step, error, words) == (b"slot", errno.ENOSPC, b"this logger serves 2 containers already")
    group.ask(wire.REMOVE, boxes[0].id)
    group.add(boxes[2])


def test_a_reopen_that_fails_leaves_the_old_file(group: Group) -> None:
    box = group.container("c1")
    assert box.log is not None
    group.add(box)
    rotated = box.log.rename(box.log.with_suffix(".1"))
    box.log.mkdir()
    kind, reply = group.request(wire.REOPEN, box.id)
    assert (kind, reply[:2]) == (wire.FAILED, [b"open log", errno.EISDIR])
    os.write(box.writers["stdout"], b"kept\n")
    group.settle(box)
    assert rotated.read_bytes().endswith(b"kept\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    linux.mount(b"tare-test", bytes(path), b"tmpfs", 0, b"size=256k")
    try:
        yield path
    finally:
        linux.umount(bytes(path), linux.MNT_DETACH)


NOTE = re.compile(rb"\[tare: (\d+) lines? of output dropped here: No space left on device\]")


def accounted(box: Box) -> int:
    """Long lines that are in the log or noted as dropped: in several notes where the last page had room for one meanwhile."""
    log = box.log.read_bytes() if box.log is not None else b""
    return sum(map(int, NOTE.findall(log))) + log.count(b"x" * 9999)


@pytest.mark.root
@pytest.mark.parametrize("successor", [False, True])
def test_a_full_disk_drops_lines_and_says_how_many(tmp_path: Path, small_disk: Path, successor: bool) -> None:
    with Group(tmp_path / "run") as group:
        quick = lambda: setattr(logger, "RETRY", 0.05)  # noqa: E731
        group.start(before=quick)
        box = group.container("c1")
        box.log = small_disk / "log"
        group.add(box)
        os.write(box.writers["stdout"], b"kept\npart")
        group.settle(box)
        filler = small_disk / "filler"
        with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                os.write(file.fileno(), b"x" * 4096)
        for _ in range(5):
            os.write(box.writers["stdout"], b"x" * 9999 + b"\n")
            group.settle(box)
        if successor:
            group.kill()
            group.start(before=quick)
        filler.unlink()
        deadline = time.monotonic() + PATIENCE
        while accounted(box) < 5:
            assert time.monotonic() < deadline, box.said()
            group.ask(wire.DRAIN, b"nobody")
        os.write(box.writers["stdout"], b"again\n")
        box.hang_up()
        group.ask(wire.DRAIN, box.id)
        said = box.said()["stdout"].split(b"\n")
        assert said[0] == b"kept" and said[1].startswith(b"part")
        assert said[-2:] == [b"again", b""]
        assert accounted(box) == 5 and len(NOTE.findall(box.log.read_bytes())) >= 1
        assert all(line.endswith(b"x" * 9999) or NOTE.fullmatch(line) for line in said[2:-2])


def test_what_was_in_a_lost_pipe_is_said_to_be_missing(group: Group) -> None:
    box = group.container("c1")
    group.add(box)
    os.write(box.writers["stdout"], b"one\n")
    group.settle(box)
    group.kill()
    child = os.fork()
    if child == 0:
        book = journal.Journal(bytes(group.directory / "journal"))
        book.begin(0, 0, journal.DATA)
        book.moved(5, 0)
        os._exit(0)
    os.waitpid(child, 0)
    packets.close_all(group.pipe)
    group.pipe = os.pipe2(os.O_CLOEXEC)
    os.write(box.writers["stdout"], b"three\n")
    group.start()
    group.settle(box)
    one, notice, three, rest = box.said()["stdout"].split(b"\n")
    assert (one, three, rest) == (b"one", b"three", b"")
    assert b"may be missing" in notice


# Life and death


def test_a_logger_with_nothing_to_do_ends(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        group.start(before=lambda: setattr(logger, "IDLE_LIFE", 0.1))
        box = group.container("c1")
        group.add(box)
        assert (group.directory / "journal").exists()
        with packets.connect(str(group.directory / "sock")):
            group.ask(wire.REMOVE, box.id)
        assert group.reap() == 0
        assert not (group.directory / "journal").exists()
        group.start()
        group.add(box)


def test_a_logger_that_lost_its_socket_is_replaced(group: Group) -> None:
    box = group.container("c1")
    group.add(box)
    first = group.pid
    os.kill(first, signal.SIGSTOP)
    os.write(box.writers["stdout"], b"one\n")
    group.start()
    second = group.pid
    group.settle(box)
    assert box.said() == {"stdout": b"one\n"}
    group.pid = first
    assert group.reap() == -signal.SIGKILL
    group.pid = second


def test_a_container_whose_fifos_are_gone_does_not_stop_the_others(group: Group) -> None:
    box, other = group.container("c1"), group.container("c2")
    group.add(box)
    group.add(other)
    group.kill()
    for name in ("stdout", "stderr"):
        (box.directory / name).unlink()
    group.start()
    group.ask(wire.DRAIN, box.id)
    os.write(other.writers["stdout"], b"here\n")
    group.settle(other)
    assert other.said() == {"stdout": b"here\n"}


def test_it_holds_nothing_that_is_not_its_own(group: Group) -> None:
    box = group.container("c1")
    group.add(box)
    known = ("socket:", "pipe:", "anon_inode:[eventpoll]", str(group.run))
    assert [link for link in links(group.pid) if not link.startswith(known)] == []
    assert Path(f"/proc/{group.pid}/comm").read_text() == "tare-logger\n"
