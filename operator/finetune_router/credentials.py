"""API keys of clients, from a file that may change while the router runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_HASHED = "sha256:"


def hash_key(key: str) -> str:
    """What stands for a key everywhere but in the client's own header: SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class ApiKeys:
    """Which keys are let in. One key a line, plain or as `sha256:<hex>`; a comment starts with #."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}

    def reload(self) -> None:
        """Read the file when it changed. Raises ValueError for a line that is no key, and keeps the former keys."""
        status = self._file.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        hashes: dict[str, str] = {}
        for number, line in enumerate(self._file.read_text(encoding="utf-8-sig").splitlines(), start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            value = text.removeprefix(_HASHED).lower() if text.startswith(_HASHED) else hash_key(text)
            if len(value) != 64 or set(value) - set("0123456789abcdef"):
                raise ValueError(
                    f"{self._file}, line {number}: `sha256:` must be followed by 64 hexadecimal digits"
                )
            hashes[value] = value
        self._hashes = hashes

    def admits(self, hashed: str) -> bool:
        """Whether the key with this hash is let in.

        The table is found by the hash of what the client sent, of which nobody can choose the first digits, and the
        digests are compared in constant time.
        """
        known = self._hashes.get(hashed)
        return known is not None and hmac.compare_digest(known, hashed)


def bearer_token(authorization: str | None) -> str:
    """The token of an Authorization header; "" for none or for another scheme."""
    if not authorization:
        return ""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
