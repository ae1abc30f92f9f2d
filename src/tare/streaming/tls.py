"""The streaming server's certificate, looked at with each handshake and taken anew when its files have changed."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from tare.errors import FailedPrecondition, describe

log = logging.getLogger(__name__)
Stamp = tuple[tuple[int, ...], ...]


class Certificate:
    """A certificate chain and its key, PEM files. Raises FailedPrecondition where they cannot be used from the start."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        try:
            self._stamp = self._look()
            self.context = self._load()
        except (OSError, ssl.SSLError) as error:
            raise FailedPrecondition(f"use the certificate {chain} and the key {key}", cause=error) from error
        self._current = self.context
        self.context.sni_callback = self._handshake

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._chain, self._key, password=no_password)
        return context

    def _look(self) -> Stamp:
        found = [os.stat(path) for path in (self._chain, self._key)]
        return tuple((status.st_mtime_ns, status.st_size, status.st_dev, status.st_ino) for status in found)

    def _handshake(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        """Take what is there now; where that is no use (half written, for one), what was taken last stays.

        OpenSSL takes a certificate into a connection as that begins: only a context that is another one changes it.
        """
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._current, self._stamp = self._load(), stamp
                log.info("the streaming certificate has been taken anew")
        except (OSError, ssl.SSLError) as error:
            log.warning("the streaming certificate has changed and cannot be used: %s", describe(error))
        if self._current is not self.context:
            connection.context = self._current


def no_password() -> str:
    """For a key that is locked: without this, OpenSSL asks at the terminal."""
    raise OSError(0, "the key wants a password, and there is none")
