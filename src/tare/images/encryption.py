"""Encrypted layers (ocicrypt): whether this machine has a key for one, and the layer's bytes in the clear while they stream.

    media type …+encrypted      annotations  org.opencontainers.image.enc.keys.jwe   JWEs, base64, with commas between: to whom it is
                                             org.opencontainers.image.enc.pubopts    cipher and HMAC, base64 of JSON

The inside of a JWE says the layer's key, nonce and plain digest. AES-256-CTR; HMAC-SHA256 with the same key over the encrypted
bytes. Source: ocicrypt, "OCI container image encryption specification". Other ways to wrap keys (PGP, PKCS#7, PKCS#11) are
refused by name. The blob stays encrypted in the content store; the unpacked layer is in the clear.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from tare.images.errors import PullError

if TYPE_CHECKING:
    from joserfc.jwk import ECKey, RSAKey

log = logging.getLogger(__name__)
T = TypeVar("T")

ENCRYPTED = "+encrypted"
WRAPPED = "org.opencontainers.image.enc.keys."
JWE = WRAPPED + "jwe"
PUBLIC_OPTIONS = "org.opencontainers.image.enc.pubopts"
CIPHER = "AES_256_CTR_HMAC_SHA256"
KEY_FILE_LIMIT = 64 << 10
KEY_BYTES, NONCE_BYTES = 32, 16


class Undecipherable(PullError):
    """A layer is encrypted, and it cannot be read on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """What it takes to read one layer: its key and nonce, the HMAC of its encrypted bytes, the digest of the plain ones."""

    key: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    hmac: bytes
    digest: str


class _CipherOptions(msgspec.Struct):
    nonce: bytes = b""


class _Private(msgspec.Struct):
    """What is inside a JWE; msgspec reads base64 where bytes are wanted."""

    symkey: bytes
    digest: str
    cipheroptions: _CipherOptions


class _Public(msgspec.Struct):
    cipher: str
    hmac: bytes
    cipheroptions: _CipherOptions = msgspec.field(default_factory=_CipherOptions)


class _Recipient(msgspec.Struct):
    encrypted_key: str
    header: dict[str, Any] = {}


class _Message(msgspec.Struct):
    """A JWE in JSON (RFC 7516, 7.2), of one recipient or several."""

    protected: str
    iv: str
    ciphertext: str
    tag: str
    encrypted_key: str = ""
    header: dict[str, Any] = {}
    recipients: list[_Recipient] = []


def unwrap(digest: str, annotations: Mapping[str, str], keys_dir: Path) -> Secret:
    """What it takes to read the layer `digest`, by one of the private keys (PEM files) in `keys_dir`. Blocks. Raises Undecipherable."""
    doing = f"decrypt layer {digest}"
    ways = sorted(name.removeprefix(WRAPPED) for name in annotations if name.startswith(WRAPPED))
    if JWE not in annotations:
        raise Undecipherable(
            doing, cause=f"its key is wrapped by {', '.join(ways) or 'nothing'}; jwe alone is supported"
        )
    try:
        public = _decode(annotations.get(PUBLIC_OPTIONS, ""), _Public)
        messages = [_decode(text, _Message) for text in annotations[JWE].split(",")]
    except ValueError as error:
        raise Undecipherable(doing, cause=f"its annotations are not what they should be: {error}") from error
    if public.cipher != CIPHER:
        raise Undecipherable(doing, cause=f"its cipher {public.cipher[:100]!r} is not supported")
    keys = read_keys(keys_dir)
    for message in messages:
        for key in keys:
            private = _opened(message, key)
            if private is not None:
                return _secret(doing, private, public)
    hint = f"put the private key as a PEM file into {keys_dir}"
    raise Undecipherable(
        doing, cause=f"it is encrypted, and none of this machine's {len(keys)} keys is for it", hint=hint
    )


def _secret(doing: str, private: _Private, public: _Public) -> Secret:
    nonce = private.cipheroptions.nonce or public.cipheroptions.nonce
    if len(private.symkey) != KEY_BYTES or len(nonce) != NONCE_BYTES:
        raise Undecipherable(doing, cause="its key or its nonce is of the wrong length")
    return Secret(key=private.symkey, nonce=nonce, hmac=public.hmac, digest=private.digest)


def _decode(text: str, kind: type[T]) -> T:
    """An annotation: base64 of JSON. Raises ValueError."""
    try:
        return msgspec.json.decode(base64.b64decode(text, validate=True), type=kind)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)[:200]) from error


def read_keys(keys_dir: Path) -> list[RSAKey | ECKey]:
    """The private keys in a directory, of which there may be none; files that hold no key without a passphrase are passed over."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from joserfc.jwk import ECKey, RSAKey

    keys: list[RSAKey | ECKey] = []
    try:
        files = sorted(keys_dir.iterdir())
    except FileNotFoundError:
        return []
    for file in files:
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > KEY_FILE_LIMIT:
                continue
            data = file.read_bytes()
            key = load_pem_private_key(data, password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            log.warning("%s holds no key that can be used: %s", file, type(error).__name__)
            continue
        if isinstance(key, rsa.RSAPrivateKey):
            keys.append(RSAKey.import_key(data))
        elif isinstance(key, ec.EllipticCurvePrivateKey):
            keys.append(ECKey.import_key(data))
    return keys


def _opened(message: _Message, key: RSAKey | ECKey) -> _Private | None:
    """What is inside a JWE, None where it is not for this key."""
    from joserfc import jwe
    from joserfc.errors import JoseError

    # Libraries disagree on what a message of several recipients looks like; each recipient's part is a message of its own.
    single = _Recipient(encrypted_key=message.encrypted_key, header=message.header)
    for recipient in message.recipients or [single]:
        parts: Any = {
            "protected": message.protected,
            "iv": message.iv,
            "ciphertext": message.ciphertext,
            "tag": message.tag,
            "encrypted_key": recipient.encrypted_key,
        }
        if recipient.header:
            parts["header"] = recipient.header
        try:
            plain = jwe.decrypt_json(parts, key).plaintext
            return msgspec.json.decode(plain or b"", type=_Private)
        except (JoseError, ValueError):
            continue
    return None


def encrypted(media_types: Iterable[str]) -> bool:
    """Is one of these layers encrypted?"""
    return any(media_type.endswith(ENCRYPTED) for media_type in media_types)


def decrypting(read: Callable[[], bytes], secret: Secret) -> Callable[[], bytes]:
    """A reader (b"" at the end) of the plain bytes of what `read` reads. Its end raises Undecipherable where HMAC or digest do not fit."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(secret.key), modes.CTR(secret.nonce)).decryptor()
    seal = hmac.new(secret.key, digestmod=hashlib.sha256)
    plain = hashlib.sha256()

    def next_chunk() -> bytes:
        data = read()
        if data:
            seal.update(data)
            decrypted = cipher.update(data)
            plain.update(decrypted)
            return decrypted
        if not hmac.compare_digest(seal.digest(), secret.hmac):
            raise Undecipherable(
                "decrypt layer", cause="its seal (HMAC) does not fit: it was changed after it was encrypted"
            )
        if secret.digest and secret.digest != f"sha256:{plain.hexdigest()}":
            raise Undecipherable("decrypt layer", cause="the decrypted bytes are not those that were encrypted")
        return b""

    return next_chunk
