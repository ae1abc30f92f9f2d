"""Docker's config.json: which credentials it has for what, and the helpers that it names."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tare.cli import credentials as cli
from tare.errors import TareError
from tare.images.auth import RegistryAuth
from tare.images.docker_config import AuthFileError, DockerConfig, answered, choose, helper, parse, read
from tare.images.reference import parse as reference

BASIC = base64.b64encode(b"ann:secret").decode()


def config(**auths: dict[str, str]) -> DockerConfig:
    return parse(json.dumps({"auths": auths}).encode())


@pytest.mark.parametrize(
    ("key", "image", "fits"),
    [
        ("https://index.docker.io/v1/", "busybox", True),
        ("docker.io", "grafana/loki", True),
        ("quay.io", "quay.io/a/b:1", True),
        ("https://quay.io/v2/", "quay.io/a/b:1", True),
        ("quay.io/a", "quay.io/a/b:1", True),
        ("quay.io/a/b", "quay.io/a/b@sha256:" + "0" * 64, True),
        ("quay.io/ab", "quay.io/a/b", False),
        ("localhost:5000", "localhost:5000/x", True),
        ("localhost", "localhost:5000/x", False),
    ],
)
def test_keys_fit_repositories(key: str, image: str, fits: bool) -> None:
    found = choose(config(**{key: {"auth": BASIC}}), reference(image))
    assert (found is not None) is fits
    assert found is None or found.auth == BASIC


def test_the_longest_key_decides_and_empty_ones_do_not() -> None:
    both = config(**{"quay.io": {"auth": BASIC}, "quay.io/a": {"identitytoken": "t"}, "quay.io/a/b": {}})
    found = choose(both, reference("quay.io/a/b"))
    assert found is not None and found.identity_token == "t"


def test_helpers() -> None:
    listed = parse(json.dumps({"credsStore": "pass", "credHelpers": {"https://gcr.io": "gcloud"}}).encode())
    assert helper(listed, "gcr.io") == ("gcloud", "gcr.io")
    assert helper(listed, "docker.io") == ("pass", "https://index.docker.io/v1/")
    assert helper(DockerConfig(), "docker.io") is None
    assert answered(b'{"Username": "ann", "Secret": "s"}', "x").username == "ann"
    assert answered(b'{"Username": "<token>", "Secret": "s"}', "x") == RegistryAuth(
        server_address="x", identity_token="s"
    )


@pytest.mark.parametrize("data", [b"", b"[]", b'{"auths": {"x": {"auth": 5, "password": "secret"}}}'])
def test_broken_files_are_not_quoted(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(AuthFileError, match=r"config.json") as caught:
        read(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(AuthFileError, match="credential helper") as caught:
        answered(data, "x")
    assert read(tmp_path / "none") == DockerConfig()


@pytest.mark.parametrize(
    ("script", "user"),
    [
        ('read server; test "$server" = reg.example && printf \'{"Username":"u","Secret":"p"}\'', "u"),
        ("echo credentials not found in native keychain; exit 1", "ann"),
    ],
)
def test_the_command_line_asks_helpers(script: str, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker-credential-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    listed = {"auths": {"reg.example": {"auth": BASIC}}, "credHelpers": {"reg.example": "test"}}
    (tmp_path / "config.json").write_text(json.dumps(listed))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    found = cli.credentials("reg.example/x", None)
    assert found is not None and found.username == user
    assert cli.credentials("other.example/x", None) is None
    program.write_text("#!/bin/sh\necho secret; exit 3\n")
    with pytest.raises(TareError, match="it ended with code 3") as caught:
        cli.credentials("reg.example/x", None)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TareError, match="is it installed"):
        cli.credentials("reg.example/x", None)
    assert cli.config_path({"REGISTRY_AUTH_FILE": "/a"}) == Path("/a")
    assert cli.config_path({"DOCKER_CONFIG": "/d"}) == Path("/d/config.json")
    given = cli.credentials("x", "bob:pw")
    assert given is not None and (given.username, given.password) == ("bob", "pw")
