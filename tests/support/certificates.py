"""Self-signed certificates for servers on this machine's loopback, made by openssl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.registry import run


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a certificate, which is its own authority, and of its key."""

    certificate: Path
    key: Path


def self_signed(directory: Path, name: str = "tests") -> Certificate:
    """A certificate for 127.0.0.1 and localhost, good for two days."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Certificate(directory / f"{name}.crt", directory / f"{name}.key")
    subject = f"/CN={name}"
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject, "-addext", names),
        *("-keyout", str(made.key), "-out", str(made.certificate)),
    )
    return made
