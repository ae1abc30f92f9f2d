"""The command line without a daemon: tables, words, exit codes, and what is said when nobody answers."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tare.cli.lookup import Candidate, pick
from tare.cli.main import COMMANDS, invoke, subcommand
from tare.cli.output import age, plain_table, short_id, size
from tare.cli.signals import Signals
from tare.errors import InvalidArgument, NotFound

A, B = Candidate("container", "abc1", "web"), Candidate("pod", "abd2", "web-pod")
SECOND = 1_000_000_000


def test_sizes_and_ages_are_for_readers() -> None:
    assert [size(n) for n in (0, 999, 1000, 4_260_000, 999_999)] == ["0B", "999B", "1kB", "4.26MB", "1MB"]
    ages = [age(0, seconds * SECOND) for seconds in (0, 1, 59, 60, 7200, 86400 * 3)]
    assert ages == ["0 seconds ago", "1 second ago", "59 seconds ago", "1 minute ago", "2 hours ago", "3 days ago"]
    assert age(5 * SECOND, 0) == "0 seconds ago"
    assert short_id("sha256:0123456789abcdef") == "0123456789abc"


def test_a_plain_table_is_columns_and_nothing_else() -> None:
    assert plain_table(["A", "LONG"], [["xyz", "1"], ["", "2"]]) == "A    LONG\nxyz  1\n     2\n"


def test_a_word_means_an_id_a_name_or_the_beginning_of_an_id() -> None:
    assert pick([A, B], "abc1", "container") is A
    assert pick([A, B], "web", "container") is A
    assert pick([A, B], "abd", "container or pod") is B
    with pytest.raises(InvalidArgument, match="fits several: container abc1"):
        pick([A, B], "ab", "container or pod")
    with pytest.raises(NotFound, match="there is no container nope"):
        pick([A, B], "nope", "container")


def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert invoke([command, "--help"]) == 0
        assert "Usage: tare" in capsys.readouterr().out
    assert invoke(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ps"], 1),
        (["version"], 1),
        (["run", "busybox"], 125),
        (["exec", "x", "true"], 125),
        (["run"], 125),
        (["ps", "--what"], 2),
        (["nonsense"], 2),
        (["version", "--client"], 0),
        (["run", "--memory", "much", "busybox"], 125),
        (["run", "--rm", "--detach", "busybox"], 125),
    ],
)
def test_exit_codes_without_a_daemon(
    arguments: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["--socket", str(tmp_path / "no.sock"), *arguments]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_absent_daemon_is_told_of_in_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tare.sock"
    assert invoke(["--socket", str(path), "ps"]) == 1
    assert capsys.readouterr().err == (
        f"tare: cannot reach Tare: there is no socket at {path} (is the daemon running? start it with  tare serve)\n"
    )
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert invoke(["--socket", str(path), "ps"]) == 1
    assert "nobody answers there" in capsys.readouterr().err


def test_the_subcommand_is_found_behind_the_socket() -> None:
    assert subcommand(["--socket", "run", "ps"]) == "ps"
    assert subcommand(["--socket=x", "run", "ps"]) == "run"
    assert subcommand(["--help"]) == ""


def test_signals_are_noted_and_the_third_gives_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert (signals.received, signals.exit_code) == ([signal.SIGTERM, signal.SIGINT], 143)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is before
