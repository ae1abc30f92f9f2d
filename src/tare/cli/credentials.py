"""Credentials for registries as the command line finds them: --creds, or docker's config.json with its helpers.

$REGISTRY_AUTH_FILE, else $DOCKER_CONFIG/config.json, else ~/.docker/config.json
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tare.errors import TareError

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2
    from tare.images.auth import RegistryAuth

HELPER_SECONDS = 60.0
C = TypeVar("C", bound=Callable[..., Any])


def creds_option(command: C) -> C:
    """`--creds USER[:PASSWORD]`, as `creds`."""
    return click.option(
        "--creds", metavar="USER[:PASSWORD]", envvar="TARE_CREDS", help="Credentials for the registry."
    )(command)


def config_path(environment: dict[str, str]) -> Path:
    """Where docker's, or podman's, credentials are."""
    if file := environment.get("REGISTRY_AUTH_FILE"):
        return Path(file)
    return Path(environment.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def credentials(image: str, creds: str | None) -> tare_pb2.Credentials | None:
    """What is sent to the registry of an image; a password that is missing in `creds` is asked for. Raises AuthFileError."""
    from tare.api.v1 import tare_pb2

    if creds is not None:
        user, mark, password = creds.partition(":")
        if not mark:
            password = click.prompt("Password", hide_input=True, err=True)
        return tare_pb2.Credentials(username=user, password=password)
    path = config_path(dict(os.environ))
    if not path.exists():
        return None
    auth = stored(path, image)
    if auth is None:
        return None
    return tare_pb2.Credentials(
        username=auth.username,
        password=auth.password,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def stored(path: Path, image: str) -> RegistryAuth | None:
    """What the file at `path`, or the helper that it names, has for an image. Raises AuthFileError."""
    from dataclasses import replace

    from tare.images import docker_config
    from tare.images.auth import credentials_for
    from tare.images.reference import MalformedReference, parse

    try:
        reference = parse(image)
    except MalformedReference:
        return None  # an ID, or what the daemon will refuse
    config = docker_config.read(path)
    if helper := docker_config.helper(config, reference.domain):
        answer = ask(*helper)
        if answer is not None:
            return docker_config.answered(answer, helper[1])
    auth = docker_config.choose(config, reference)
    if auth is None or not auth.auth:
        return auth
    found = credentials_for(replace(auth, server_address=""), reference.domain)
    return replace(auth, username=found.username, password=found.password) if found else None


def ask(name: str, address: str) -> bytes | None:
    """What the program docker-credential-NAME says of a server; None where it has nothing. Raises TareError."""
    from tare.images.docker_config import is_absent

    program = f"docker-credential-{name}"
    try:
        result = subprocess.run(
            [program, "get"], input=address.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TareError(
            f"ask {program} for credentials", cause=type(error).__name__, hint="is it installed?"
        ) from error
    if result.returncode == 0:
        return result.stdout
    if is_absent(result.stdout):
        return None
    raise TareError(f"ask {program} for credentials", cause=f"it ended with code {result.returncode}")
