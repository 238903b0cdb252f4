"""The routers' admin ports: push the route snapshot, fetch the counters. A router that is away is an ordinary event."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from finetune_operator.adapters.addresses import Resolver, UnknownHostError
from finetune_operator.adapters.fetching import Reply, TokenFile, UnreachableError, fetch, parse
from finetune_operator.api.routes import (
    COUNTERS_PATH,
    ROUTES_PATH,
    ArmCounters,
    Moments,
    RouterCounters,
    RoutesApplied,
)

PUSH_SECONDS = 2.0
COUNTERS_SECONDS = 2.0
COUNTERS_BYTES = 64 << 20  # a thousand aliases, sixteen workers, full samples


@dataclass(frozen=True)
class Refused:
    """No answer, or none that makes sense. `newer`: the router applies a newer snapshot than ours."""

    reason: str
    newer: bool = False


@dataclass(frozen=True)
class Routers:
    session: aiohttp.ClientSession
    resolver: Resolver
    urls: Sequence[str]
    token: TokenFile = field(default_factory=lambda: TokenFile(None))

    async def replicas(self) -> tuple[str, ...]:
        """Admin URLs of all replicas. A name without an address stands for one replica that cannot be reached."""
        found = await asyncio.gather(*(self._spread(url) for url in self.urls))
        return tuple(dict.fromkeys(url for urls in found for url in urls))

    async def push(self, replica: str, snapshot: bytes) -> RoutesApplied | Refused:
        """Hand over a snapshot. The answer names the version that every worker of the replica now applies."""
        reply = await self._ask("PUT", f"{replica}{ROUTES_PATH}", body=snapshot, seconds=PUSH_SECONDS)
        if isinstance(reply, Refused):
            return reply
        if reply.status == 409:
            return Refused(reply.summary(), newer=True)
        return parse(RoutesApplied, reply, Refused)

    async def applied(self, replica: str) -> RoutesApplied | Refused:
        reply = await self._ask("GET", f"{replica}{ROUTES_PATH}", seconds=PUSH_SECONDS)
        return reply if isinstance(reply, Refused) else parse(RoutesApplied, reply, Refused)

    async def counters(self, replica: str) -> RouterCounters | Refused:
        """All that the replica has counted. Numbers that cannot be counts make the whole answer void."""
        reply = await self._ask("GET", f"{replica}{COUNTERS_PATH}", seconds=COUNTERS_SECONDS)
        counters = reply if isinstance(reply, Refused) else parse(RouterCounters, reply, Refused)
        if isinstance(counters, RouterCounters):
            for epoch in counters.epochs:
                for arm in epoch.arms:
                    if not _is_plausible(arm):
                        return Refused(f"impossible counters for {arm.alias} in epoch {epoch.epoch}")
        return counters

    async def _spread(self, url: str) -> tuple[str, ...]:
        try:
            return await self.resolver.spread(url)
        except UnknownHostError:
            return (url,)

    async def _ask(
        self, method: str, url: str, *, seconds: float, body: bytes | None = None
    ) -> Reply | Refused:
        try:
            return await fetch(
                self.session,
                method,
                url,
                body=body,
                token=self.token.read(),
                seconds=seconds,
                limit=COUNTERS_BYTES,
            )
        except UnreachableError as error:
            return Refused(str(error))


def _is_plausible(arm: ArmCounters) -> bool:
    moments = (arm.seconds, arm.ttft_seconds, arm.completion_tokens, *arm.scores.values())
    counts = (
        arm.requests,
        arm.fallbacks,
        *arm.events.values(),
        *arm.watched.values(),
        *arm.length_histogram,
        *arm.word_histogram,
    )
    return all(count >= 0 for count in counts) and all(_is_finite(item) for item in moments)


def _is_finite(moments: Moments) -> bool:
    sums = (moments.sum, moments.sum_squares, *(total for _, total in moments.groups))
    counts = (moments.n, *(n for n, _ in moments.groups))
    return all(n >= 0 for n in counts) and all(math.isfinite(number) for number in sums)
