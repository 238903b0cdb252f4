"""Certificate, key and authority as files that somebody else renews (cert-manager, a projected Secret)."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import logging
import ssl
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
RECORD_BYTES = 16 * 1024  # the most of a TLS record (RFC 8446, section 5.1)

Stamp = tuple[tuple[int, int, int], ...]


def buffer_single_records() -> None:
    """Of this process, from now on. asyncio fills a buffer of 256 KiB for each TLS connection: 2,000 of them, which
    anybody may open, would be more memory than the operator has."""
    asyncio.sslproto.SSLProtocol.max_size = RECORD_BYTES


class TlsFiles:
    """The server's side of TLS. Connections that are accepted after a renewal use the new certificate; nothing is
    restarted. Raises OSError (ssl.SSLError is one) where the first pair of files cannot be used."""

    def __init__(self, *, certificate: Path, key: Path) -> None:
        self._certificate, self._key = certificate, key
        self._stamp = self._look()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(certificate, key)

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.reload()

    def reload(self) -> bool:
        """Take over renewed files, whether it was so. A pair that does not fit, as it is seen while the two are being
        replaced, is left for the next look."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return False
            # Tried on another context first: a key that does not fit would leave the real one without any.
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self._certificate, self._key)
            self.context.load_cert_chain(self._certificate, self._key)
        except OSError as error:
            logger.warning("%s is not taken over yet: %s", self._certificate, error)
            return False
        self._stamp = stamp
        logger.info("%s was renewed", self._certificate)
        return True

    def _look(self) -> Stamp:
        stats = [path.stat() for path in (self._certificate, self._key)]
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


class AuthorityFile:
    """The authority's certificate for clients, read whenever it is handed on, so that a renewed one is."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._last: str | None = None

    def read(self) -> str | None:
        """The PEM; the last one that could be read where the file is being replaced; None where there is no file."""
        if self.path is None:
            return None
        try:
            self._last = self.path.read_text() or self._last
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("%s cannot be read: %s", self.path, error)
        return self._last
