"""Signatures: who made them is checked first, then what they say of which manifest in which repository."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.images.signatures import SIMPLE, Doubtful, Evidence, bundled, claim, doubts, simple
from tests.support import signing
from tests.support.signing import Key

DIGEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
REPOSITORY = "registry.example/team/app"
KEYS = {kind: Key.make(kind) for kind in ("ecdsa", "ed25519", "rsa")}


def signed(key: Key, document: bytes) -> Evidence:
    """A document as the registry gives it."""
    return simple(document, base64.b64encode(key.sign(document)).decode())


def asked(found: list[Evidence], *keys: Key) -> list[str] | None:
    """The doubts about an image of the repository."""
    return doubts(found, [key.public for key in keys], (DIGEST,), REPOSITORY)


@pytest.mark.parametrize("kind", KEYS)
def test_what_each_kind_of_key_signs(kind: str) -> None:
    key, others = KEYS[kind], [KEYS[other] for other in KEYS if other != kind]
    good = [signed(key, signing.simple(DIGEST, REPOSITORY)), *bundled(signing.bundle(key, DIGEST))]
    for evidence in good:
        assert asked([evidence], key) is None
        assert asked([evidence], *others, key) is None
        assert asked([evidence], *others) == ["a signature is by none of the keys"]
        broken = Evidence(kind=evidence.kind, payload=evidence.payload + b" ", signature=evidence.signature)
        assert asked([broken], key) == ["a signature is by none of the keys"]
        assert asked([broken, evidence], key) is None


KEY = KEYS["ecdsa"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (signing.simple(OTHER, REPOSITORY), "another manifest"),
        (signing.simple(DIGEST, "registry.example/team/other"), "repository registry.example/team/other"),
        (signing.simple(DIGEST, "docker.io/team/app"), "repository docker.io/team/app"),
        (signing.simple(DIGEST, ""), "which is no repository"),
        (signing.simple(DIGEST, REPOSITORY, type="atomic container signature"), "type"),
        (b"{}", "not what it should be"),
        (b"\xff", "not what it should be"),
        (b"[" * 100_000, "not what it should be"),
    ],
)
def test_what_is_signed_must_be_about_this_image(document: bytes, words: str) -> None:
    found = asked([signed(KEY, document)], KEY)
    assert found is not None and words in found[0]


def test_a_name_with_a_tag_is_its_repository() -> None:
    assert asked([signed(KEY, signing.simple(DIGEST, f"{REPOSITORY}:v1"))], KEY) is None
    document = signing.simple(DIGEST, "index.docker.io/library/busybox")
    assert doubts([signed(KEY, document)], [KEY.public], (DIGEST,), "docker.io/library/busybox") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predicate": "https://cosign.sigstore.dev/attestation/vuln/v1"}, "something else"),
        ({"name": "registry.example/team/other"}, "repository registry.example/team/other"),
        ({"digest": OTHER}, "another manifest"),
    ],
)
def test_what_a_bundle_must_say(changes: dict[str, Any], words: str) -> None:
    data = signing.bundle(KEY, changes.pop("digest", DIGEST), **changes)
    found = asked(bundled(data), KEY)
    assert found is not None and words in found[0]
    assert asked(bundled(signing.bundle(KEY, DIGEST, name=REPOSITORY)), KEY) is None


def test_a_document_of_one_form_is_not_one_of_the_other() -> None:
    (evidence,) = bundled(signing.bundle(KEY, DIGEST))
    as_simple = Evidence(kind=SIMPLE, payload=evidence.payload, signature=evidence.signature)
    assert asked([as_simple], KEY) == ["a signature is by none of the keys"]


@pytest.mark.parametrize(
    "data", [b"{}", b'{"dsseEnvelope": {}}', signing.bundle(KEY, DIGEST, kind="text/plain"), b"not JSON", b"[" * 99_999]
)
def test_what_is_no_bundle(data: bytes) -> None:
    with pytest.raises(Doubtful):
        bundled(data)


def test_keys_that_are_none() -> None:
    evidence = [signed(KEY, signing.simple(DIGEST, REPOSITORY))]
    short = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    for text in (b"", b"not a key", short, b"-----BEGIN EC PRIVATE KEY-----"):
        with pytest.raises(Doubtful):
            doubts(evidence, [text], (DIGEST,), REPOSITORY)
    both = KEYS["rsa"].public + KEY.public
    assert doubts(evidence, [both], (DIGEST,), REPOSITORY) is None


def test_no_signature() -> None:
    assert asked([], KEY) == ["there is no signature"]


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_read_or_doubted(data: bytes) -> None:
    for evidence in (
        Evidence(kind=SIMPLE, payload=data, signature=b""),
        Evidence(kind="dsse", payload=data, signature=b""),
    ):
        with pytest.raises(Doubtful):
            claim(evidence)
    with pytest.raises(Doubtful):
        bundled(data)
