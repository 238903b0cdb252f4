"""Webhooks of a deployment, and alerts to chat rooms in Slack's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from finetune_operator.adapters.fetching import MayQuote, UnreachableError, fetch, may_always_quote

ALERT_SECONDS = 10.0
ANSWER_BYTES = 64 << 10


class AlertError(Exception):
    """An alert could not be delivered; `str()` says why, and never holds the provider's URL, which is a secret."""


@dataclass(frozen=True)
class Answer:
    accepted: bool
    message: str


@dataclass(frozen=True)
class Webhooks:
    session: aiohttp.ClientSession
    may_quote: MayQuote = may_always_quote

    async def ask(self, url: str, payload: Mapping[str, Any], *, seconds: float) -> Answer:
        """Post the document; accepted means a 2xx answer (as Flagger has it)."""
        try:
            reply = await fetch(
                self.session, "POST", url, body=dict(payload), seconds=seconds, limit=ANSWER_BYTES
            )
        except UnreachableError as error:
            return Answer(accepted=False, message=str(error))
        return Answer(accepted=reply.ok, message=reply.summary(quote=self.may_quote(url)))


@dataclass(frozen=True)
class Alerts:
    """Providers stand in a JSON file {name: URL}, read at each alert, so that a new one needs no restart."""

    session: aiohttp.ClientSession
    providers: Path | None = None

    async def send(self, provider: str, payload: Mapping[str, Any]) -> None:
        """Raises AlertError."""
        url = self._url(provider)
        try:
            reply = await fetch(
                self.session, "POST", url, body=dict(payload), seconds=ALERT_SECONDS, limit=ANSWER_BYTES
            )
        except UnreachableError as error:
            raise AlertError(f"provider {provider}: {str(error).replace(url, '<url>')}") from None
        if not reply.ok:  # not quoted: many a server says which path it does not know
            raise AlertError(f"provider {provider}: {reply.summary(quote=False)}")

    def _url(self, provider: str) -> str:
        if self.providers is None:
            raise AlertError(
                f"provider {provider}: the operator has no alert providers; "
                "FINETUNE_ALERT_PROVIDERS_FILE names no JSON file {name: URL}"
            )
        try:
            found = json.loads(self.providers.read_text())
        except (OSError, ValueError) as error:
            raise AlertError(f"provider {provider}: {self.providers} cannot be read: {error}") from None
        url = found.get(provider) if isinstance(found, dict) else None
        if not isinstance(url, str):
            raise AlertError(f"provider {provider}: not in the operator's file of alert providers")
        return url
