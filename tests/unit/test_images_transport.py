"""How failures of requests are put into words, and the small rules of talking to hosts."""

from __future__ import annotations

import errno
import os

import pytest

from tare.errors import InvalidArgument, NotFound, TareError
from tare.images.errors import PullError, RegistryUnavailable, explain
from tare.images.reference import MalformedReference
from tare.images.tls import proxy_for
from tare.images.transport import origin, registry_words, transport_words


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (PullError("ask r", cause="no", hint="try"), PullError, "pull image x: ask r: no (try)"),
        (PullError("ask r", step="resolve"), PullError, "pull image x: at step resolve: ask r"),
        (
            RegistryUnavailable("ask r", step="fetch", cause="gone"),
            RegistryUnavailable,
            "RegistryUnavailable: pull image x: at step fetch: ask r: gone",
        ),
        (NotFound("blob"), PullError, "pull image x: blob"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            PullError,
            "pull image x: No space left on device (free some space on the image disk)",
        ),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/d"), PullError, "pull image x: Input/output error: /d"),
        (MalformedReference("X", "why"), InvalidArgument, "malformed image reference 'X': why"),
    ],
)
def test_every_end_of_a_pull_is_told_in_one_form(error: Exception, kind: type[TareError], text: str) -> None:
    told = explain("x", error)
    assert (str(told), isinstance(told, kind)) == (text, True)
    assert told.code == ("INVALID_ARGUMENT" if kind is InvalidArgument else "UNKNOWN")


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b'{"errors": [{"code": "A", "message": "b"}, {"message": "c\\n\\u0007d"}]}', "application/json", "A: b; c d"),
        (b'{"errors": []}', "application/json", ""),
        (b"plain\r\nwords", "text/plain", "plain words"),
        (b"<html>", "text/html", ""),
        (b"\xff\xfe", "text/plain", "\ufffd\ufffd"),
        (b"x" * 1000, "text/plain", "x" * 300),
        (b"[" * 5000, "application/json", ""),
    ],
)
def test_a_registrys_words(body: bytes, content_type: str, words: str) -> None:
    assert registry_words(body, content_type) == words


def test_words_for_what_breaks() -> None:
    assert transport_words(TimeoutError()) == "it did not answer in time"
    assert (
        transport_words(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
        == "Connection reset by peer"
    )
    assert transport_words(ValueError("http://user:secret@x")) == "its answer is not HTTP (ValueError)"


def test_origins() -> None:
    assert origin("https://A.example/x") == origin("https://a.example:443/y?z")
    assert origin("http://a.example") != origin("https://a.example")
    assert origin("http://a.example:81") != origin("http://a.example:82")


def test_proxies_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    assert proxy_for("https://quay.io/v2") is None
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "internal.example,10.0.0.1")
    assert proxy_for("https://quay.io/v2") == "http://proxy.example:3128"
    assert proxy_for("https://x.internal.example/v2") is None
    assert proxy_for("http://quay.io/v2") is None
