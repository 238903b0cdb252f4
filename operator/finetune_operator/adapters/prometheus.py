"""Instant queries to Prometheus (https://prometheus.io/docs/prometheus/latest/querying/api/)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp

from finetune_operator.adapters.fetching import (
    MayQuote,
    Reply,
    UnreachableError,
    fetch,
    may_always_quote,
)

QUERY_SECONDS = 10.0


class QueryError(Exception):
    """The query has no answer that could be judged; `str()` says why."""


@dataclass(frozen=True)
class Prometheus:
    session: aiohttp.ClientSession
    may_quote: MayQuote = may_always_quote

    async def query(self, address: str, query: str) -> float | None:
        """The one number that the query gives; None where it gives nothing, NaN or an infinity. Raises QueryError."""
        url = f"{address.rstrip('/')}/api/v1/query?{urlencode({'query': query})}"
        try:
            reply = await fetch(self.session, "GET", url, seconds=QUERY_SECONDS)
        except UnreachableError as error:
            raise QueryError(str(error)) from error
        return _number(_result(reply, quote=self.may_quote(address)))


def _result(reply: Reply, *, quote: bool) -> list[Any]:
    """The values, as the strings that Prometheus sends."""
    try:
        answer = reply.json()
        if answer["status"] != "success":
            why = f": {answer.get('errorType')}: {answer.get('error')}" if quote else " and an error"
            raise QueryError(f"HTTP {reply.status}{why}")
        kind, result = answer["data"]["resultType"], answer["data"]["result"]
        match kind:
            case "scalar":
                return [result[1]]
            case "vector":
                return [series["value"][1] for series in result]
    except (ValueError, KeyError, TypeError, IndexError):
        raise QueryError(f"not an answer of Prometheus: {reply.summary(quote=quote)}") from None
    raise QueryError(f"the query gives a {str(kind)[:20]}; it must give one number")


def _number(values: list[Any]) -> float | None:
    if not values:
        return None
    if len(values) > 1:
        raise QueryError(f"the query gives {len(values)} series; it must give one, for example with sum(...)")
    try:
        value = float(values[0])
    except (TypeError, ValueError, OverflowError):
        raise QueryError(f"not a number: {str(values[0])[:20]!r}") from None
    return value if math.isfinite(value) else None
