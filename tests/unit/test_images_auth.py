"""Authorisation as a table of challenges and answers, without a network."""

from __future__ import annotations

import base64
import json

import pytest

from tare.images.auth import Authorizer, Credentials, RegistryAuth, Unauthorized, credentials_for, parse_challenges
from tare.images.errors import PullError

SCOPE = "repository:a/b:pull"
BEARER = 'Bearer realm="https://auth.example/token",service="reg.example",scope="repository:a/b:pull"'
USER = Credentials("user", "s3cret")


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("values", "parsed"),
    [
        (
            [BEARER],
            [
                (
                    "bearer",
                    {"realm": "https://auth.example/token", "service": "reg.example", "scope": "repository:a/b:pull"},
                )
            ],
        ),
        (['Basic realm="a \\"b\\", c"'], [("basic", {"realm": 'a "b", c'})]),
        (["basic"], [("basic", {})]),
        (["Negotiate abc==, Basic Realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (
            ['Basic realm="x"', 'Bearer realm = "y" , error="e"'],
            [("basic", {"realm": "x"}), ("bearer", {"realm": "y", "error": "e"})],
        ),
        (['Bearer realm="x",Basic realm="y"'], [("bearer", {"realm": "x"}), ("basic", {"realm": "y"})]),
        (["", ",,,", '"'], []),
    ],
)
def test_challenges(values: list[str], parsed: list[tuple[str, dict[str, str]]]) -> None:
    found = [(challenge.scheme, challenge.parameters) for challenge in parse_challenges(values)]
    assert [scheme for scheme, _ in found] == [scheme for scheme, _ in parsed]
    for (_, parameters), (_, expected) in zip(found, parsed, strict=True):
        assert expected.items() <= parameters.items()


def test_nothing_is_sent_before_it_is_asked_for() -> None:
    assert Authorizer(USER, "reg", secure=True).authorization(SCOPE, 0) is None


def test_basic() -> None:
    authorizer = Authorizer(USER, "reg", secure=True)
    assert authorizer.challenged(['Basic realm="r"'], SCOPE) is None
    assert authorizer.authorization(SCOPE, 0) == basic("user:s3cret")


def test_basic_without_credentials() -> None:
    with pytest.raises(Unauthorized, match="none were given"):
        Authorizer(None, "reg", secure=True).challenged(["Basic"], SCOPE)


@pytest.mark.parametrize("values", [[], ["Digest realm=x"]])
def test_a_challenge_that_cannot_be_met(values: list[str]) -> None:
    with pytest.raises(Unauthorized, match="401"):
        Authorizer(USER, "reg", secure=True).challenged(values, SCOPE)


def test_bearer_is_preferred_and_gets_a_token_by_get() -> None:
    authorizer = Authorizer(USER, "reg", secure=True)
    request = authorizer.challenged(["Basic realm=x", BEARER], SCOPE)
    assert request is not None
    assert (request.method, request.url) == ("GET", "https://auth.example/token")
    assert request.fields == {"service": "reg.example", "scope": SCOPE, "account": "user"}
    assert request.authorization == basic("user:s3cret")
    authorizer.granted(request, json.dumps({"token": "t1", "expires_in": 300}).encode(), now=1000)
    assert authorizer.authorization(SCOPE, 1299) == "Bearer t1"
    assert authorizer.authorization(SCOPE, 1301) is None
    assert authorizer.authorization("repository:other:pull", 1000) is None


def test_anonymous_token() -> None:
    authorizer = Authorizer(None, "reg", secure=True)
    request = authorizer.challenged([BEARER], SCOPE)
    assert request is not None
    assert (request.authorization, "account" in request.fields) == (None, False)
    authorizer.granted(request, b'{"access_token": "t2"}', now=0)
    assert authorizer.authorization(SCOPE, 59) == "Bearer t2"
    assert authorizer.authorization(SCOPE, 61) is None


def test_identity_token_goes_by_post() -> None:
    request = Authorizer(Credentials(identity_token="idt"), "reg", secure=True).challenged([BEARER], SCOPE)
    assert request is not None
    assert (request.method, request.authorization) == ("POST", None)
    assert request.fields["grant_type"] == "refresh_token"
    assert request.fields["refresh_token"] == "idt"


def test_registry_token_is_sent_as_it_is() -> None:
    authorizer = Authorizer(Credentials(registry_token="rt"), "reg", secure=True)
    assert authorizer.challenged([BEARER], SCOPE) is None
    assert authorizer.authorization(SCOPE, 1e9) == "Bearer rt"


@pytest.mark.parametrize("realm", ["", "ftp://x", "/token", "https://", "https://u:p@x/", "http://[::bad"])
def test_a_realm_that_is_no_address(realm: str) -> None:
    with pytest.raises(Unauthorized, match="no address"):
        Authorizer(USER, "reg", secure=True).challenged([f'Bearer realm="{realm}"'], SCOPE)


def test_credentials_are_not_sent_to_a_token_server_without_tls() -> None:
    plain = ['Bearer realm="http://auth.example/t"']
    with pytest.raises(Unauthorized, match="not on TLS"):
        Authorizer(USER, "reg", secure=True).challenged(plain, SCOPE)
    assert Authorizer(USER, "reg", secure=False).challenged(plain, SCOPE) is not None
    assert Authorizer(None, "reg", secure=True).challenged(plain, SCOPE) is not None
    assert (
        Authorizer(USER, "reg", secure=True).challenged(['Bearer realm="http://127.0.0.1:5001/t"'], SCOPE) is not None
    )


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"token": ""}', b'{"token": "a\\nb"}', b'{"token": 3}', b"[" * 99999]
)
def test_an_answer_without_a_token(body: bytes) -> None:
    authorizer = Authorizer(None, "reg", secure=True)
    request = authorizer.challenged([BEARER], SCOPE)
    assert request is not None
    with pytest.raises(PullError, match="token server"):
        authorizer.granted(request, body, now=0)


def test_credentials_from_cri() -> None:
    assert credentials_for(None, "reg") is None
    assert credentials_for(RegistryAuth(), "reg") is None
    assert credentials_for(RegistryAuth(username="u", password="p"), "reg") == Credentials("u", "p")
    encoded = base64.b64encode(b"u:p:q\0").decode()
    assert credentials_for(RegistryAuth(auth=encoded), "reg") == Credentials("u", "p:q")
    assert credentials_for(RegistryAuth(identity_token="i"), "reg") == Credentials(identity_token="i")
    for bad in ("***", base64.b64encode(b"nocolon").decode(), base64.b64encode(b"\xff:").decode()):
        with pytest.raises(PullError, match="base64"):
            credentials_for(RegistryAuth(auth=bad), "reg")


@pytest.mark.parametrize(
    ("address", "domain", "ours"),
    [
        ("", "quay.io", True),
        ("quay.io", "quay.io", True),
        ("https://quay.io/v1/", "quay.io", True),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("registry-1.docker.io", "docker.io", True),
        ("quay.io:5000", "quay.io", False),
        ("other.io", "quay.io", False),
        ("http://[bad", "quay.io", False),
    ],
)
def test_credentials_are_for_the_server_that_they_name(address: str, domain: str, ours: bool) -> None:
    auth = RegistryAuth(username="u", password="p", server_address=address)
    assert (credentials_for(auth, domain) is not None) is ours


def test_secrets_are_never_shown() -> None:
    auth = RegistryAuth(
        username="u", password="s3cret", auth="c2VjcmV0", identity_token="idt-secret", registry_token="rt-secret"
    )
    authorizer = Authorizer(USER, "reg", secure=True)
    request = authorizer.challenged([BEARER], SCOPE)
    assert request is not None
    for shown in (repr(auth), repr(USER), repr(request)):
        assert not any(secret in shown for secret in ("s3cret", "c2VjcmV0", "idt-secret", "rt-secret", USER.basic[6:]))
    authorizer.granted(request, b'{"token": "tok-en"}', 0)
    assert authorizer.redact(f"a s3cret b tok-en c {USER.basic}") == "a *** b *** c Basic ***"
