"""The log of the process, with what Kopf says in it."""

from __future__ import annotations

import logging
import re

import kopf

_FAILED_ATTEMPT = re.compile(r"Request attempt #(\d+)/\d+ failed; will retry")


def configure(*, as_json: bool) -> None:
    """Of this process, once."""
    kopf.configure(log_format=kopf.LogFormat.JSON if as_json else kopf.LogFormat.FULL)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # one line per watch event otherwise
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_worth_a_line)


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """Of the attempts that each of Kopf's watches makes while the API server is away, the 1st, 2nd, 4th, ...: an hour
    has 360 of them."""
    attempt = _FAILED_ATTEMPT.match(record.getMessage())
    return attempt is None or int(attempt[1]).bit_count() == 1
