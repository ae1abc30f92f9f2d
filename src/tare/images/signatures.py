"""Signatures of images: which bytes are signed, what they claim, and whether a key made the signature. Pure.

Two forms, both by public keys (ECDSA, Ed25519, RSA):

    simple   cosign's "simple signing" document: `critical` names the manifest's digest and the repository it was signed for
    dsse     a sigstore bundle: a DSSE envelope around an in-toto statement whose subject has the manifest's digest, and of
             cosign's own predicate type: a scanner's report about an image is signed too, and is no consent to run it

A claim is believed only when its signature has been checked. Sources: cosign, "Signature spec"; DSSE protocol v1, "PAE";
in-toto attestation framework v1, "Statement"; sigstore's bundle format v0.3.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from tare.errors import InvalidArgument
from tare.images.reference import is_digest, parse

SIMPLE_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIMPLE_ARTIFACT = "application/vnd.dev.cosign.artifact.sig.v1+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle"
SIGNATURE = "dev.cosignproject.cosign/signature"
STATEMENT_TYPE = "application/vnd.in-toto+json"
SIGN_PREDICATE = "https://sigstore.dev/cosign/sign/v1"
SIMPLE, DSSE = "simple", "dsse"
SMALLEST_RSA = 2048
_BLOCK = b"-----BEGIN PUBLIC KEY-----"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A signature as it was found, not yet believed: `payload` is the document of `kind` that was signed."""

    kind: str
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """What a signed document says: these manifests, and for which repository ("" where the document does not say)."""

    digests: frozenset[str]
    repository: str


class _Image(msgspec.Struct):
    digest: str = msgspec.field(name="docker-manifest-digest")


class _Identity(msgspec.Struct):
    reference: str = msgspec.field(name="docker-reference")


class _Critical(msgspec.Struct):
    image: _Image
    identity: _Identity
    type: str


class _Simple(msgspec.Struct):
    critical: _Critical


class _EnvelopeSignature(msgspec.Struct):
    sig: str


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: str
    signatures: list[_EnvelopeSignature]


class _Bundle(msgspec.Struct, rename="camel"):
    dsse_envelope: _Envelope | None = None


class _Subject(msgspec.Struct):
    digest: dict[str, str]
    name: str = ""


class _Statement(msgspec.Struct, rename="camel"):
    type: str = msgspec.field(name="_type")
    subject: list[_Subject]
    predicate_type: str


class Doubtful(ValueError):
    """A document or a key is not what it should be, in plain words."""


def simple(payload: bytes, signature: str) -> Evidence:
    """A layer of cosign's signature manifest: its bytes, and the annotation beside it. Raises Doubtful."""
    return Evidence(kind=SIMPLE, payload=payload, signature=_base64(signature))


def bundled(data: bytes) -> list[Evidence]:
    """The signatures of a sigstore bundle. Raises Doubtful."""
    envelope = _decode(data, _Bundle, "sigstore bundle").dsse_envelope
    if envelope is None or envelope.payload_type != STATEMENT_TYPE:
        raise Doubtful("the sigstore bundle has no DSSE envelope with an in-toto statement")
    payload = _base64(envelope.payload)
    return [Evidence(kind=DSSE, payload=payload, signature=_base64(item.sig)) for item in envelope.signatures]


def signed_bytes(evidence: Evidence) -> bytes:
    """What the signature is over: the document, or its DSSE pre-authentication encoding."""
    if evidence.kind == SIMPLE:
        return evidence.payload
    kind = STATEMENT_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(evidence.payload), evidence.payload)


def claim(evidence: Evidence) -> Claim:
    """What the document says. Raises Doubtful."""
    if evidence.kind == SIMPLE:
        critical = _decode(evidence.payload, _Simple, "signed document").critical
        if critical.type != "cosign container image signature":
            raise Doubtful(f"the signed document is of type {critical.type[:100]!r}")
        return Claim(frozenset({critical.image.digest}), _repository(critical.identity.reference))
    statement = _decode(evidence.payload, _Statement, "signed statement")
    if statement.predicate_type != SIGN_PREDICATE:
        raise Doubtful(f"the signed statement is about something else ({statement.predicate_type[:100]!r})")
    digests, names = set(), set()
    for subject in statement.subject:
        digests |= {f"{algorithm}:{value}" for algorithm, value in subject.digest.items()}
        names |= {subject.name} - {""}
    if len(names) > 1:
        raise Doubtful("the signed statement has subjects of several names")
    return Claim(frozenset(filter(is_digest, digests)), _repository(names.pop()) if names else "")


def _repository(reference: str) -> str:
    """The repository of a reference that a document gives."""
    try:
        return parse(reference).name
    except InvalidArgument as error:
        raise Doubtful(f"the signed document is for {reference[:200]!r}, which is no repository") from error


def doubts(
    found: Iterable[Evidence], keys: Iterable[bytes], digests: Collection[str], repository: str
) -> list[str] | None:
    """None where one signature by one of `keys` (PEM texts) is for one of `digests` in `repository`; else why each is not.

    Takes a millisecond for each; for a thread. Raises Doubtful for a key that is none.
    """
    publics = [public for text in keys for public in _public_keys(text)]
    reasons: list[str] = []
    for evidence in found:
        message = signed_bytes(evidence)
        if not any(_made(public, evidence.signature, message) for public in publics):
            reasons.append("a signature is by none of the keys")
            continue
        try:
            said = claim(evidence)
        except Doubtful as error:
            reasons.append(str(error))
            continue
        if not said.digests & set(digests):
            reasons.append(f"a signature is for another manifest, {', '.join(sorted(said.digests))[:300]}")
        elif said.repository not in ("", repository):
            reasons.append(f"a signature is for the repository {said.repository}")
        else:
            return None
    return list(dict.fromkeys(reasons)) or ["there is no signature"]


def _public_keys(text: bytes) -> list[object]:
    """The public keys of a PEM text."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found: list[object] = []
    for part in text.split(_BLOCK)[1:]:
        try:
            key = load_pem_public_key(_BLOCK + part)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise Doubtful("a key of the policy cannot be read") from error
        if isinstance(key, RSAPublicKey) and key.key_size < SMALLEST_RSA:
            raise Doubtful(f"an RSA key of the policy has {key.key_size} bits; at least {SMALLEST_RSA} are asked for")
        found.append(key)
    if not found:
        raise Doubtful("a key of the policy is no PEM public key")
    return found


def _made(key: object, signature: bytes, message: bytes) -> bool:
    """Whether the key's owner signed the message."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            hashing = {384: hashes.SHA384(), 521: hashes.SHA512()}.get(key.key_size, hashes.SHA256())
            key.verify(signature, message, ec.ECDSA(hashing))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
        else:
            return False
    except InvalidSignature:
        return False
    return True


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Doubtful("a signature is not in base64") from error


def _decode(data: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Doubtful(f"the {what} is not what it should be: {str(error)[:200]}") from error
