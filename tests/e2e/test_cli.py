"""The command line against a real daemon and a real registry: what it prints, and what it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.images import busybox_image
from tests.support.registry import Registry

pytestmark = pytest.mark.root
WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Cli:
    """The `tare` command for one daemon. `image` can be pulled, and is here."""

    socket: Path
    logs: Path
    image: str

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TARE_SOCKET": str(self.socket), "TARE_LOG_DIR": str(self.logs)}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tare.cli.main", *arguments]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    def ok(self, *arguments: str) -> str:
        """What it prints, where it must not fail."""
        result = self(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    def containers(self) -> list[str]:
        return self.ok("ps", "-aq").split()

    def wait_for_log(self, container: str, text: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while text not in self(*("logs", container)).stdout:
            assert time.monotonic() < deadline, f"{text!r} did not come"


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with tempfile.TemporaryDirectory(prefix="tare-cli-", dir="/var/lib") as name:
        base = Path(name)
        with Registry(base / "registry") as registry, Daemon(base / "tare") as daemon:
            registry.push(busybox_image(base / "busybox"), "cli/busybox:1")
            cli = Cli(daemon.socket, base / "logs", f"{registry.url}/cli/busybox:1")
            assert cli("pull", cli.image).returncode == 0
            yield cli


def test_run_ends_with_the_containers_code_and_leaves_nothing(cli: Cli) -> None:
    result = cli("run", cli.image, "sh", "-c", "printf 'out\\nunended'; echo err >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (
        7,
        "out\nunended\n",
        "err\n",
    )  # the log format ends each line
    assert cli.ok("pods", "-q") == ""
    assert not any(cli.logs.glob("*"))


def test_a_long_line_comes_whole(cli: Cli) -> None:
    script = "head -c 100000 /dev/zero | tr '\\0' x; echo; echo end"
    assert cli.ok("run", cli.image, "sh", "-c", script) == "x" * 100_000 + "\nend\n"


def test_options_reach_the_container(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from outside")
    tmp_path.chmod(0o755)
    script = 'id -u; pwd; hostname; echo "$A $B"; cat /v/given; touch /v/x 2>/dev/null || echo ro; touch /y || echo RO'
    out = cli.ok(
        *("run", "--user", "1:1", "--workdir", "/tmp", "--hostname", "box", "-e", "A=1", "-e", "B=2 3"),
        *("-v", f"{tmp_path}:/v:ro", "--read-only", cli.image, "sh", "-c", f"exec 2>/dev/null; {script}"),
    )
    assert out.split("\n") == ["1", "/tmp", "box", "1 2 3", "from outsidero", "RO", ""]


def test_a_container_over_its_memory_ends_with_137(cli: Cli) -> None:
    assert cli("run", "--memory", "16m", cli.image, "dd", "if=/dev/zero", "of=/dev/null", "bs=64M").returncode == 137


def test_own_failures_are_125_in_plain_words(cli: Cli) -> None:
    host = cli.image.partition("/")[0]
    for arguments in (
        ("run", f"{host}/no/such:1"),
        ("run", "--pull", "never", f"{host}/no/such:1"),
        ("run", cli.image, "/no/such/program"),
        ("run", "--user", "nosuchuser", cli.image, "true"),
        ("run", "UPPER/case", "true"),
        ("exec", "nothing", "true"),
    ):
        result = cli(*arguments)
        assert result.returncode == 125, arguments
        assert result.stderr.startswith("tare: ")
        assert "Traceback" not in result.stderr
    assert cli.containers() == []


def test_a_detached_container_is_listed_entered_inspected_stopped_and_removed(cli: Cli) -> None:
    script = "trap 'exit 3' TERM; echo up; sleep 1000 & wait"
    identifier = cli.ok("run", "-d", "--name", "web", "-l", "a=b", cli.image, "sh", "-c", script).strip()
    try:
        cli.wait_for_log("web", "up")
        assert cli.ok("ps", "-q").split() == [identifier]
        assert "web" in cli.ok("ps")
        listed = json.loads(cli.ok("ps", "-o", "json"))["containers"]
        assert [(c["id"], c["labels"], c["state"]) for c in listed] == [(identifier, {"a": "b"}, "CONTAINER_RUNNING")]
        assert "Ready" in cli.ok("pods")
        result = cli("exec", "web", "sh", "-c", "echo in; echo err >&2; exit 4")
        assert (result.returncode, result.stdout, result.stderr) == (4, "in\n", "err\n")
        inspected = json.loads(cli.ok("inspect", identifier[:8]))
        assert (inspected[0]["kind"], inspected[0]["status"]["id"]) == ("container", identifier)
        assert "running" in cli("rm", "web").stderr
        again = cli("run", "-d", "--name", "web", cli.image, "true")
        assert again.returncode == 125
        cli.ok("stop", "web")
        assert "Exited (3)" in cli.ok("ps", "-a")
        assert cli.ok("ps", "-q") == ""
        assert cli.ok("logs", "web") == "up\n"
    finally:
        cli("rm", "-f", "web")
    assert cli.containers() == []
    assert cli.ok("pods", "-q") == ""
    assert not any(cli.logs.glob("*"))


def test_logs_follow_a_container_to_its_end(cli: Cli) -> None:
    script = "for i in 1 2 3 4 5; do echo line $i; sleep 0.2; done"
    cli.ok("run", "-d", "--name", "count", cli.image, "sh", "-c", script)
    try:
        assert cli.ok("logs", "-f", "count") == "".join(f"line {i}\n" for i in range(1, 6))
        assert cli.ok("logs", "--tail", "2", "count") == "line 4\nline 5\n"
        stamped = cli.ok("logs", "-t", "-n", "1", "count")
        assert stamped.endswith(" line 5\n")
        assert stamped[4] == "-"
    finally:
        cli("rm", "-f", "count")


@pytest.mark.parametrize(
    ("number", "script", "code"),
    [
        (signal.SIGINT, "trap 'echo bye; exit 5' TERM; echo up; sleep 1000 & wait", 5),
        (signal.SIGTERM, "trap 'echo bye; exit 6' TERM; echo up; sleep 1000 & wait", 6),
    ],
)
def test_a_signal_stops_the_container_and_its_code_is_ours(
    cli: Cli, number: signal.Signals, script: str, code: int
) -> None:
    process = subprocess.Popen(
        cli.command("run", cli.image, "sh", "-c", script), env=cli.environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == "bye\n"
    assert process.wait(WAIT_SECONDS) == code
    assert cli.containers() == []


def test_a_reader_that_goes_away_ends_the_container(cli: Cli) -> None:
    process = subprocess.Popen(
        cli.command("run", cli.image, "yes"), env=cli.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"y\n"
    assert process.wait(WAIT_SECONDS) == 1
    assert cli.containers() == []


def test_images_are_listed_and_removed(cli: Cli) -> None:
    assert cli.image in cli.ok("images")
    identifier = cli.ok("images", "-q").strip()
    assert cli("pull", cli.image).stdout.strip() == identifier
    assert json.loads(cli.ok("inspect", cli.image))[0]["image"]["id"] == identifier
    assert json.loads(cli.ok("images", "-o", "json"))["images"][0]["repoTags"] == [cli.image]
    try:
        assert cli.ok("rmi", cli.image) == f"{cli.image}\n"
        assert cli("rmi", cli.image).returncode == 1
        assert cli.ok("rmi", "-f", cli.image) == ""
        assert cli.ok("images", "-q") == ""
    finally:
        assert cli("pull", cli.image).returncode == 0


def test_version_and_what_is_not_there(cli: Cli) -> None:
    assert [line.split()[0] for line in cli.ok("version").splitlines()] == ["PART", "client", "tare"]
    assert json.loads(cli.ok("version", "-o", "json"))["daemon"]["runtimeApiVersion"] == "v1"
    for arguments in (("logs", "nothing"), ("stop", "nothing"), ("rm", "nothing"), ("inspect", "nothing")):
        result = cli(*arguments)
        assert (result.returncode, result.stderr.startswith("tare: there is no ")) == (1, True)
    assert cli("rm", "-f", "nothing").returncode == 0
