"""Serving aiohttp applications, and the secrets that guard them."""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from finetune_trainer.failures import BadConfig

_MALFORMED = (HttpProcessingError, RequestPayloadError)
DRAIN_SECONDS = 30.0  # for running answers after SIGTERM; Kubernetes' own default


@contextlib.asynccontextmanager
async def listen(app: web.Application, host: str, port: int) -> AsyncIterator[tuple[str, int]]:
    """Serves an application; gives its address. Handlers of clients that went away are cancelled.

    Raises BadConfig for an address that cannot be had.
    """
    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=DRAIN_SECONDS,
        # It would unpack without a pause also what was refused already.
        auto_decompress=False,
    )  # fmt: skip
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, backlog=1024).start()
        except OSError as error:
            raise BadConfig(
                f"port {port} of {host} cannot be listened on ({error.strerror or error}); choose another one"
            ) from error
        address = runner.addresses[0]
        yield str(address[0]), int(address[1])
    finally:
        await runner.cleanup()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a line tells of a mistake of this program. A malformed request got its 400, and its error quotes it."""
    return not (record.exc_info and isinstance(record.exc_info[1], _MALFORMED))


def read_secret(path: Path | None) -> str | None:
    """Returns the content of a secret's file without the white space around it; None without a file.

    Raises OSError for a file that cannot be read, ValueError for one that holds no secret.
    """
    if path is None:
        return None
    secret = path.read_text(encoding="utf-8").strip()
    if not secret:
        raise ValueError(f"{path} is empty")
    return secret


def read_key(path: Path | None) -> str | None:
    """Returns the engine's API key as --api-key-file gives it. Raises BadConfig."""
    try:
        return read_secret(path)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise BadConfig(
            f"--api-key-file: {path} cannot be read ({reason}); name a text file that holds the key"
        ) from error


def carries(request: web.Request, secret: str | None) -> bool:
    """Whether the request has the secret as its bearer token; without a secret, every request passes."""
    given = request.headers.get("Authorization", "")
    # Bytes that are no UTF-8 arrive as halves of surrogate pairs; they are a wrong secret like any other.
    sent = given.encode(errors="surrogateescape")
    return secret is None or hmac.compare_digest(sent, f"Bearer {secret}".encode())
