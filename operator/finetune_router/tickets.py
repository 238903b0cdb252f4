"""Signed request ids: whoever brings one back as feedback names the arm that answered, and nobody can make one up.

The id goes to the engine as X-Request-Id, so that the answer's `id` is `chatcmpl-<ticket>`. It is url-safe base64 of a
fixed head, the alias, and a truncated HMAC-SHA256 (RFC 2104, section 5, allows half of the output).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.api.routes import GROUPS, Arm
from finetune_router import storage

_VERSION = 1
_HEAD = struct.Struct(">BBI6s8s")  # version, arm and flags, time in seconds, nonce with group, revision
_NONCES = 1 << 48
_SIGNATURE_BYTES = 16
_KEY_BYTES = 32
_SHORTEST_KEY = 16  # bytes
_ARMS = (Arm.STABLE, Arm.CANDIDATE, Arm.SHADOW)
_UNCOUNTED = 0x80
_PREFIXES = ("chatcmpl-", "cmpl-", "embd-", "rerank-", "score-", "classify-", "pool-", "resp_", "req_")
_LONGEST = 1024


class BadTicketError(ValueError):
    """The id was not minted by a router with this key."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request id says."""

    alias: str
    arm: Arm
    revision: str
    minted_at: int
    """Unix time in seconds."""
    group: int
    """Of keys. It is a part of the nonce, so routers that know none can read the id."""
    counted: bool
    """False for pinned requests and for answers of a fallback: they are no part of the comparison."""


class TicketOffice:
    """Mints and reads ids with one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        # One read of the kernel's generator per process, then a counter: ids must differ, not be secret.
        self._number = int.from_bytes(os.urandom(6), "big")

    def mint(self, alias: bytes, arm: Arm, revision: bytes, *, counted: bool, group: int = 0) -> str:
        self._number += 1
        nonce = (self._number * GROUPS + group) % _NONCES
        flags = _ARMS.index(arm) | (0 if counted else _UNCOUNTED)
        head = _HEAD.pack(_VERSION, flags, int(time.time()) & 0xFFFFFFFF, nonce.to_bytes(6, "big"), revision)
        payload = head + alias
        signature = hmac.digest(self._key, payload, "sha256")[:_SIGNATURE_BYTES]
        return _encoded(payload + signature)

    def normalise(self, text: str) -> str:
        """The id without the prefix that engines put before it."""
        for prefix in _PREFIXES:
            if text.startswith(prefix):
                return text[len(prefix) :]
        return text

    def read(self, text: str) -> Ticket:
        """The ticket in an id, with or without the prefix that engines put before it. Raises BadTicketError."""
        text = self.normalise(text)
        try:
            if len(text) > _LONGEST:
                raise ValueError("too long")
            raw = base64.b64decode(
                text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
            )
            if _encoded(raw) != text:  # other spellings of the same bytes would each count as a response
                raise ValueError("not as it was minted")
        except (ValueError, binascii.Error):
            raise BadTicketError("not an id of this router") from None
        payload, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
        expected = hmac.digest(self._key, payload, "sha256")[:_SIGNATURE_BYTES]
        if len(payload) <= _HEAD.size or not hmac.compare_digest(signature, expected):
            raise BadTicketError("not an id of this router, or signed with another key")
        version, flags, minted_at, nonce, revision = _HEAD.unpack(payload[: _HEAD.size])
        arm = flags & ~_UNCOUNTED
        if version != _VERSION or arm >= len(_ARMS):
            raise BadTicketError("an id of another version of the router")
        return Ticket(
            alias=payload[_HEAD.size :].decode(),
            arm=_ARMS[arm],
            revision=revision.rstrip(b"\0").decode(),
            minted_at=minted_at,
            group=int.from_bytes(nonce, "big") % GROUPS,
            counted=not flags & _UNCOUNTED,
        )


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def load_key(file: Path | None, state_folder: Path) -> bytes:
    """The signing key: the content of the file, else one of this replica's own, made at the first start.

    Raises ValueError for a file that is too short to be a secret, OSError for one that cannot be read or written.
    """
    if file is not None:
        key = file.read_bytes().strip()
        if len(key) < _SHORTEST_KEY:
            raise ValueError(
                f"{file}: a signing key needs at least {_SHORTEST_KEY} bytes, this one has {len(key)}"
            )
        return key
    own = state_folder / "signing.key"
    key = own.read_bytes() if own.exists() else b""
    # An older router's start on a full disk left it empty; with an empty key anybody can sign.
    if len(key) < _SHORTEST_KEY:
        key = secrets.token_hex(_KEY_BYTES).encode()
        storage.write_atomically(own, key)
    return key
