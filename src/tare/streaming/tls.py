"""The streaming server's certificate, looked at with each handshake and taken anew when its files have changed."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from tare.errors import FailedPrecondition, describe

log = logging.getLogger(__name__)
Stamp = tuple[tuple[int, int], tuple[int, int]]


class Certificate:
    """A certificate chain and its key, PEM files. Raises FailedPrecondition where they cannot be used from the start."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        try:
            self._stamp = self._look()
            self.context.load_cert_chain(chain, key)
        except (OSError, ssl.SSLError) as error:
            raise FailedPrecondition(f"use the certificate {chain} and the key {key}", cause=error) from error
        self.context.sni_callback = self._handshake

    def _look(self) -> Stamp:
        found = [os.stat(path) for path in (self._chain, self._key)]
        return (found[0].st_mtime_ns, found[0].st_ino), (found[1].st_mtime_ns, found[1].st_ino)

    def _handshake(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        """Take what is there now; where that is no use (half written, for one), what was taken last stays."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return
            fresh = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            fresh.load_cert_chain(self._chain, self._key)
            context.load_cert_chain(self._chain, self._key)
        except (OSError, ssl.SSLError) as error:
            log.warning("the streaming certificate has changed and cannot be used: %s", describe(error))
            return
        self._stamp = stamp
        connection.context = context
        log.info("the streaming certificate has been taken anew")
