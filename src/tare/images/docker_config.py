"""Docker's config.json: which credentials it has for an image, and which helper is to be asked for them (docker docs, "docker login").

    {"auths": {"https://index.docker.io/v1/": {"auth": "base64 of user:password"}, "quay.io/team": {"identitytoken": "…"}},
     "credsStore": "pass", "credHelpers": {"registry.example": "ecr-login"}}

A key may be a registry or, as podman writes them, a path below one: the longest that fits decides. Running a helper is for
the caller (`helpers.py` in the daemon, `cli/credentials.py`). Pure, but for `read`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tare.images.auth import RegistryAuth
from tare.images.errors import PullError
from tare.images.reference import Reference

DOCKER_HUB = "docker.io"
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
TOKEN_USER = "<token>"
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")


class AuthFileError(PullError):
    """A file of credentials cannot be used."""


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _File(msgspec.Struct):
    auths: dict[str, _Auth] = {}
    creds_store: str = msgspec.field(default="", name="credsStore")
    cred_helpers: dict[str, str] = msgspec.field(default_factory=dict, name="credHelpers")


class _Answer(msgspec.Struct, rename="pascal"):
    """What a helper says (docker-credential-helpers, "get")."""

    username: str = ""
    secret: str = ""


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """`auths` by key as it is in the file; `store` the helper for all registries, `helpers` those for single ones."""

    auths: dict[str, RegistryAuth] = field(default_factory=dict)
    store: str = ""
    helpers: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> DockerConfig:
    """The file at `path`; an empty one where there is none. Raises AuthFileError."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return DockerConfig()
    except OSError as error:
        raise AuthFileError(f"read {path}", cause=error) from error
    except AuthFileError as error:
        raise AuthFileError(f"read {path}", cause=error.cause) from error


def parse(data: bytes) -> DockerConfig:
    """What the file says. Raises AuthFileError, without quoting from it."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise AuthFileError("read credentials", cause="it is not what `docker login` writes") from None
    auths = {
        key: RegistryAuth(
            username=auth.username,
            password=auth.password,
            auth=auth.auth,
            server_address=key,
            identity_token=auth.identitytoken,
            registry_token=auth.registrytoken,
        )
        for key, auth in file.auths.items()
    }
    return DockerConfig(auths, file.creds_store, file.cred_helpers)


def choose(config: DockerConfig, reference: Reference) -> RegistryAuth | None:
    """The credentials in the file itself for an image; None where there are none, or a helper has them."""
    known = {_key(key): auth for key, auth in config.auths.items()}
    path = reference.name
    while path:
        auth = known.get(path)
        if auth is not None and (auth.auth or auth.username or auth.identity_token or auth.registry_token):
            return auth
        path = path.rpartition("/")[0]
    return None


def helper(config: DockerConfig, domain: str) -> tuple[str, str] | None:
    """(name, server address) of the helper to ask for a registry's credentials: docker-credential-NAME."""
    address = DOCKER_HUB_KEY if domain == DOCKER_HUB else domain
    for key, name in config.helpers.items():
        if _key(key) == domain:
            return name, address
    return (config.store, address) if config.store else None


def answered(output: bytes, address: str) -> RegistryAuth:
    """What a helper wrote. Raises AuthFileError, without quoting from it."""
    try:
        answer = msgspec.json.decode(output, type=_Answer)
        known = bool(answer.secret)
    except (msgspec.DecodeError, ValueError, RecursionError):
        known = False
    if not known:
        raise AuthFileError("ask a credential helper", cause="its answer is not what it should be")
    if answer.username == TOKEN_USER:
        return RegistryAuth(server_address=address, identity_token=answer.secret)
    return RegistryAuth(server_address=address, username=answer.username, password=answer.secret)


def is_absent(output: bytes) -> bool:
    """Does what a helper wrote when it failed only mean that it has nothing for this server? (They tell on standard output what went wrong.)"""
    return b"credentials not found" in output


def _key(key: str) -> str:
    """A key as repositories are named: "https://index.docker.io/v1/" is docker.io."""
    name = key.partition("://")[2] or key
    for suffix in ("/v1/", "/v2/", "/v1", "/v2", "/"):
        name = name.removesuffix(suffix)
    host, slash, path = name.partition("/")
    return f"{DOCKER_HUB}{slash}{path}" if host in _HUB_NAMES else name
