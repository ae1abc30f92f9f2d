"""Encrypted layers: whose key opens one, and what is noticed when its bytes are not those that were encrypted."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from joserfc import jwe
from joserfc.jwk import ECKey, RSAKey

from tare.images.encryption import CIPHER, JWE, PUBLIC_OPTIONS, WRAPPED, Secret, Undecipherable, decrypting, unwrap

PLAIN = os.urandom(100_000)
SYMMETRIC, NONCE = os.urandom(32), os.urandom(16)
DIGEST = "sha256:" + "d" * 64
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
_encryptor = Cipher(algorithms.AES(SYMMETRIC), modes.CTR(NONCE)).encryptor()
SECRET_BYTES = _encryptor.update(PLAIN)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def wrapping(key: RSAKey | ECKey, algorithm: str = "RSA-OAEP", **public: object) -> dict[str, str]:
    """What an encrypted layer's descriptor has."""
    inside = {
        "symkey": encoded(SYMMETRIC),
        "digest": "sha256:" + hashlib.sha256(PLAIN).hexdigest(),
        "cipheroptions": {"nonce": encoded(NONCE)},
    }
    message = jwe.FlattenedJSONEncryption({"enc": "A256GCM"}, json.dumps(inside).encode())
    message.add_recipient({"alg": algorithm}, key)
    seal = hmac.new(SYMMETRIC, SECRET_BYTES, hashlib.sha256).digest()
    options = {"cipher": CIPHER, "hmac": encoded(seal), "cipheroptions": {}} | public
    wrapped = json.dumps(jwe.encrypt_json(message, None)).encode()
    return {JWE: encoded(wrapped), PUBLIC_OPTIONS: encoded(json.dumps(options).encode())}


FOR_RSA = wrapping(RSAKey.import_key(pem(RSA)))
FOR_EC = wrapping(ECKey.import_key(pem(EC)), "ECDH-ES+A256KW")


def read_all(read: Callable[[], bytes]) -> bytes:
    return b"".join(iter(read, b""))


def reader(data: bytes, size: int = 7_777) -> Callable[[], bytes]:
    """Chunk by chunk, b"" at the end."""
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return lambda: parts.pop(0) if parts else b""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with one RSA key, one EC key, and files that are none."""
    (tmp_path / "rsa.pem").write_bytes(pem(RSA))
    (tmp_path / "ec.key").write_bytes(pem(EC))
    (tmp_path / "README").write_text("keys lie here")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("wrapped", [FOR_RSA, FOR_EC], ids=["rsa", "ec"])
def test_a_layer_is_read_with_its_key(keys: Path, wrapped: dict[str, str]) -> None:
    secret = unwrap(DIGEST, wrapped, keys)
    assert read_all(decrypting(reader(SECRET_BYTES), secret)) == PLAIN
    assert encoded(SYMMETRIC)[:8] not in repr(secret) and repr(SYMMETRIC) not in repr(secret)


def test_one_of_several_wrappings_is_enough(keys: Path) -> None:
    other = wrapping(RSAKey.import_key(pem(rsa.generate_private_key(65537, 2048))))
    both = {**FOR_RSA, JWE: f"{other[JWE]},{FOR_RSA[JWE]}"}
    assert unwrap(DIGEST, both, keys).key == SYMMETRIC


def test_without_the_key(tmp_path: Path) -> None:
    for directory in (tmp_path / "absent", tmp_path):
        with pytest.raises(Undecipherable, match="it is encrypted, and none of this machine's 0 keys is for it"):
            unwrap(DIGEST, FOR_RSA, directory)
    (tmp_path / "other.pem").write_bytes(pem(rsa.generate_private_key(65537, 2048)))
    with pytest.raises(Undecipherable, match="none of this machine's 1 keys"):
        unwrap(DIGEST, FOR_RSA, tmp_path)


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        ({}, "nothing"),
        ({WRAPPED + "pgp": "x", WRAPPED + "pkcs7": "y"}, "pgp, pkcs7"),
        ({**FOR_RSA, JWE: "not base64!"}, "annotations"),
        ({**FOR_RSA, JWE: encoded(b"{}")}, "annotations"),
        ({**FOR_RSA, PUBLIC_OPTIONS: ""}, "annotations"),
        ({**FOR_RSA, PUBLIC_OPTIONS: encoded(b'{"cipher":"ROT13","hmac":""}')}, "ROT13"),
    ],
)
def test_annotations_that_are_wrong(keys: Path, wrapped: dict[str, str], words: str) -> None:
    with pytest.raises(Undecipherable, match=words):
        unwrap(DIGEST, wrapped, keys)


def test_changed_bytes_are_noticed(keys: Path) -> None:
    secret = unwrap(DIGEST, FOR_RSA, keys)
    changed = bytearray(SECRET_BYTES)
    changed[5] ^= 1
    for data in (bytes(changed), SECRET_BYTES[:-1], SECRET_BYTES + b"x", b""):
        with pytest.raises(Undecipherable, match="seal"):
            read_all(decrypting(reader(data), secret))
    wrong = Secret(key=secret.key, nonce=secret.nonce, hmac=secret.hmac, digest="sha256:" + "0" * 64)
    with pytest.raises(Undecipherable, match="decrypted bytes"):
        read_all(decrypting(reader(SECRET_BYTES), wrong))
