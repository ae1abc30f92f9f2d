"""Images on the command line: a daemon, a registry that asks for a password, and every command that images have."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.images import make_image
from tests.support.registry import Registry

pytestmark = pytest.mark.root
PROGRESS = re.compile(rb"(pulling|pushing) \S+: [0-9a-f]{13} (done|there|mounted) \([0-9.]+[kM]?B\)\n")


@dataclass(frozen=True)
class Cli:
    """The command for one daemon; `home` has docker's config.json."""

    daemon: Daemon
    registry: Registry
    base: Path

    def __call__(self, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "TARE_SOCKET": str(self.daemon.socket), "DOCKER_CONFIG": str(self.base / "docker")}
        command = [sys.executable, "-m", "tare.cli.main", *arguments]
        return subprocess.run(command, env=environment, input=data, capture_output=True, timeout=60, check=False)

    def ok(self, *arguments: str, data: bytes | None = None) -> str:
        result = self(*arguments, data=data)
        told = b"".join(line for line in result.stderr.splitlines(True) if not PROGRESS.fullmatch(line))
        assert (result.returncode, told) == (0, b"")
        return result.stdout.decode()

    def name(self, path: str) -> str:
        return f"{self.registry.url}/{path}"


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with tempfile.TemporaryDirectory(prefix="tare-img-", dir="/var/lib") as name:
        base = Path(name)
        settings = f'[images]\nauth_file = "{base}/docker/config.json"\npinned = ["*/pinned:*"]\n'
        with (
            Registry(base / "registry", users={"ann": "secret"}) as registry,
            Daemon(
                base / "tare", settings=settings, environment={"PATH": f"{base}/bin:{os.environ['PATH']}"}
            ) as daemon,
        ):
            (base / "docker").mkdir()
            auth = base64.b64encode(b"ann:secret").decode()
            (base / "docker/config.json").write_text(json.dumps({"auths": {registry.url: {"auth": auth}}}))
            for number in (1, 2):
                layout = make_image(base / f"l{number}", [{"etc/motd": f"hello {number}"}], config={"Cmd": ["/x"]})
                registry.push(layout, f"cli/i{number}:1", credentials="ann:secret")
            yield Cli(daemon, registry, base)


def test_pull_tag_push_history(cli: Cli) -> None:
    pulled = cli("pull", cli.name("cli/i1:1"))
    image_id = pulled.stdout.decode().strip()
    assert image_id.startswith("sha256:") and PROGRESS.fullmatch(pulled.stderr) and b" done (" in pulled.stderr
    assert cli.ok("tag", image_id[7:20], cli.name("cli/pinned:2")).strip() == cli.name("cli/pinned:2")
    assert cli.ok("push", cli.name("cli/pinned:2")).startswith("sha256:")
    assert cli.ok("pull", cli.name("cli/pinned:2")).strip() == image_id
    shown = json.loads(cli.ok("images", "-o", "json"))["images"]
    assert [(image["id"], image["pinned"]) for image in shown] == [(image_id, True)]
    assert "tests" in cli.ok("history", cli.name("cli/i1:1"))
    assert json.loads(cli.ok("history", "-o", "json", image_id))["entries"][0]["createdBy"] == "tests"
    denied = cli("push", cli.name("cli/i1:1"), "--creds", "ann:wrong")
    assert denied.returncode == 1 and b"status 401" in denied.stderr and b"wrong" not in denied.stderr


def test_save_and_load(cli: Cli, tmp_path: Path) -> None:
    name = cli.name("cli/i1:1")
    image_id = cli.ok("pull", name).strip()
    cli.ok("save", name, "-o", str(tmp_path / "a.tar"))
    cli.ok("save", name, "-o", str(tmp_path / "d.tar"), "--format", "docker")
    cli.ok("save", name, "-o", str(tmp_path / "layout"), "--format", "layout")
    piped = cli("save", name).stdout
    assert piped == (tmp_path / "a.tar").read_bytes()
    tags = json.loads(cli.ok("inspect", name))[0]["image"]["repoTags"]
    for source in ("a.tar", "d.tar", "layout"):
        cli.ok("rmi", name)
        assert cli.ok("load", str(tmp_path / source)).split() == [name]
        assert cli.ok("images", "-q").split() == [image_id]
    cli.ok("rmi", name)
    assert cli.ok("load", data=piped).split() == [name]
    assert set(json.loads(cli.ok("inspect", name))[0]["image"]["repoTags"]) <= set(tags)
    told = subprocess.run(
        ["skopeo", "inspect", f"oci:{tmp_path}/layout"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(told.stdout)["Layers"]
    refused = cli("save", name, "-o", str(tmp_path / "layout"), "--format", "layout")
    assert refused.returncode == 1 and b"there is something already" in refused.stderr
    bad = cli("load", data=b"nothing like it" * 1000)
    assert bad.returncode == 1 and b"load image from an archive" in bad.stderr
    absent = cli("save", "absent", "-o", str(tmp_path / "x.tar"))
    assert absent.returncode == 1 and not (tmp_path / "x.tar").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_verify_and_repair(cli: Cli) -> None:
    name = cli.name("cli/i1:1")
    cli.ok("pull", name)
    assert "as they should be" in cli.ok("image", "verify")
    (motd,) = cli.daemon.root.glob("layers/*/etc/motd")
    motd.write_text("changed")
    found = cli("image", "verify", name)
    assert found.returncode == 1 and b"/etc/motd" in found.stdout
    assert "layer" in cli.ok("image", "repair", name)
    assert "nothing was to be repaired" in cli.ok("image", "repair", name)
    assert motd.read_text() == "hello 1"


def test_outdated_update_explain(cli: Cli) -> None:
    name = cli.name("cli/i2:1")
    before = cli.ok("pull", name).strip()
    assert cli.ok("images", "--outdated", "-q") == ""
    cli.registry.push(cli.base / "l1", "cli/i2:1", credentials="ann:secret")
    assert cli.ok("images", "--outdated", "-q").split() == [name]
    assert cli.ok("update").split() == [name]
    assert cli.ok("update") == ""
    assert json.loads(cli.ok("inspect", name))[0]["image"]["id"] != before
    trace = cli.ok("explain-pull", name)
    assert "authorised by Basic" in trace and "secret" not in trace and "nothing would be fetched" in trace
    assert cli("explain-pull", cli.name("cli/none:1")).returncode == 1


def test_the_daemons_own_auth_file_serves_pulls_without_credentials(cli: Cli) -> None:
    (cli.base / "docker/config.json").rename(cli.base / "docker/daemon.json")
    try:
        assert b"none were given" in cli("pull", cli.name("cli/i2:1")).stderr
    finally:
        (cli.base / "docker/daemon.json").rename(cli.base / "docker/config.json")
    environment = {**os.environ, "TARE_SOCKET": str(cli.daemon.socket), "DOCKER_CONFIG": "/nowhere"}
    command = [sys.executable, "-m", "tare.cli.main", "pull", cli.name("cli/i2:1")]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout


def test_the_daemons_auth_file_may_name_a_helper(cli: Cli) -> None:
    (cli.base / "bin").mkdir()
    program = cli.base / "bin/docker-credential-site"
    kept = (cli.base / "docker/config.json").read_text()
    (cli.base / "docker/config.json").write_text(json.dumps({"credHelpers": {cli.registry.url: "site"}}))
    environment = {**os.environ, "TARE_SOCKET": str(cli.daemon.socket), "DOCKER_CONFIG": "/nowhere"}

    def pull() -> tuple[int, str]:
        command = [sys.executable, "-m", "tare.cli.main", "pull", cli.name("cli/i1:1")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return result.returncode, result.stderr

    def helper(script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    try:
        code, said = pull()
        assert code == 1 and "ask docker-credential-site for credentials: it is not in the daemon's PATH" in said
        helper(f'read server; [ "$server" = {cli.registry.url} ] && echo \'{{"Username":"ann","Secret":"secret"}}\'')
        assert pull()[0] == 0
        helper("echo secret; echo secret >&2; exit 3")
        code, said = pull()
        assert code == 1 and "docker-credential-site" in said and "code 3" in said and "secret" not in said
        helper("echo credentials not found in native keychain; exit 1")
        assert "none were given" in pull()[1]
    finally:
        (cli.base / "docker/config.json").write_text(kept)


def test_bars_on_a_terminal(cli: Cli) -> None:
    cli("rmi", cli.name("cli/i1:1"))

    def on_terminal(*arguments: str) -> str:
        environment = {**os.environ, "TARE_SOCKET": str(cli.daemon.socket), "DOCKER_CONFIG": str(cli.base / "docker")}
        command = shlex.join([sys.executable, "-m", "tare.cli.main", *arguments])
        typed = ["script", "-qec", f"stty cols 100 rows 30; exec {command}", "/dev/null"]
        shown = subprocess.run(
            typed,
            env={**environment, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=True,
        )
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.stdout.decode())

    name = cli.name("cli/i1:1")
    pulled = on_terminal("pull", name)
    assert pulled.startswith(f"pulling {name}") and re.search(r"[0-9a-f]{13} done +━+ +\d+/\d+ bytes", pulled)
    pushed = on_terminal("push", name)
    assert pushed.startswith(f"pushing {name}") and re.search(r"[0-9a-f]{13} there +━+ +\d+/\d+ bytes +\r?\n", pushed)
