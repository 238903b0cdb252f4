"""What the agent asks of an engine: vLLM's API, and nothing that only ours has."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_QUICK = aiohttp.ClientTimeout(total=5)  # seconds, for calls that answer at once
_PROBE = aiohttp.ClientTimeout(total=60)  # one token, behind what runs already
_START = re.compile(rb"^process_start_time_seconds\s+([0-9.e+]+)", re.MULTILINE)
_MAX_LORA = re.compile(rb'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', re.MULTILINE)


class EngineError(Exception):
    """The engine refused, or could not be reached. The message is what it said."""

    def __init__(self, message: str, *, status: int | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.status = status  # None: no answer
        self.kind = kind  # error type of the answer


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself."""

    instance: str  # changes when its process restarts
    base_models: tuple[str, ...]
    root: str | None  # where the base model was loaded from
    adapters: dict[str, str] = field(default_factory=dict)  # served name -> path that it was loaded from
    max_loras: int | None = None  # None: it does not say


class EngineClient:
    """Calls to one engine. Raises EngineError for everything that is not a success."""

    def __init__(self, url: str, session: aiohttp.ClientSession, *, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._session = session
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    async def observe(self) -> Facts:
        """Returns the engine's models and identity as they are now. Raises EngineError for one that is not well."""
        await self._bytes("GET", "/health", limit=_QUICK)
        document = await self._json("GET", "/v1/models", limit=_QUICK)
        metrics = await self._bytes("GET", "/metrics", limit=_QUICK)
        with _reading("/v1/models"):
            return _read_facts(document["data"], metrics)

    async def load(self, name: str, path: str, *, seconds: float) -> None:
        await self._bytes(
            "POST",
            "/v1/load_lora_adapter",
            # vLLM ignores `pinned`; ours never lets a pinned adapter make room for another.
            body={"lora_name": name, "lora_path": path, "pinned": True},
            limit=aiohttp.ClientTimeout(total=seconds),
        )

    async def unload(self, name: str) -> None:
        """Unloads an adapter; one that is not there is no error."""
        try:
            await self._bytes(
                "POST",
                "/v1/unload_lora_adapter",
                body={"lora_name": name},
                limit=aiohttp.ClientTimeout(total=30),
            )
        except EngineError as error:
            if error.status != 404:
                raise

    async def probe(self, name: str) -> None:
        """Asks for one token. Raises EngineError when none comes."""
        body = {"model": name, "prompt": "Hello", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        answer = await self._json("POST", "/v1/completions", body=body, limit=_PROBE)
        with _reading("/v1/completions"):
            tokens = (answer.get("usage") or {}).get("completion_tokens")
        if not answer.get("choices") or tokens != 1:
            raise EngineError(f"asked for one token, it gave {tokens}")

    async def ask(
        self, model: str, messages: list[dict[str, Any]] | str, *, max_tokens: int, seconds: float
    ) -> str:
        """Returns the greedy answer to messages, or the greedy continuation of a text."""
        body = {"model": model, "max_tokens": max_tokens, "temperature": 0}
        limit = aiohttp.ClientTimeout(total=seconds)
        if isinstance(messages, str):
            body |= {"prompt": messages}
            answer = await self._json("POST", "/v1/completions", body=body, limit=limit)
            with _reading("/v1/completions"):
                return str(answer["choices"][0]["text"])
        body |= {"messages": messages}
        answer = await self._json("POST", "/v1/chat/completions", body=body, limit=limit)
        with _reading("/v1/chat/completions"):
            return str(answer["choices"][0]["message"]["content"] or "")

    async def _json(
        self, method: str, path: str, *, limit: aiohttp.ClientTimeout, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        content = await self._bytes(method, path, limit=limit, body=body)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            raise EngineError(f"{method} {path} did not answer JSON") from None
        if not isinstance(document, dict):
            raise EngineError(f"{method} {path} did not answer a JSON object")
        return document

    async def _bytes(
        self, method: str, path: str, *, limit: aiohttp.ClientTimeout, body: dict[str, Any] | None = None
    ) -> bytes:
        try:
            async with self._session.request(
                method, self._url + path, json=body, headers=self._headers, timeout=limit
            ) as answer:
                content = await answer.read()
                if answer.status != 200:
                    raise _refused(answer.status, content)
                return content
        except TimeoutError:
            raise EngineError(f"{method} {path} gave no answer within {limit.total:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"the engine cannot be reached ({error or type(error).__name__})") from None


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What answers at the engine's address may send any JSON: that is an engine that is not well, no defect of ours."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise EngineError(f"the answer to {path} has not the shape of OpenAI's ({error!r:.200})") from None


def _read_facts(cards: list[dict[str, Any]], metrics: bytes) -> Facts:
    started, limit = _START.search(metrics), _MAX_LORA.search(metrics)
    bases = [card for card in cards if not card.get("parent")]
    return Facts(
        instance="" if started is None else started[1].decode(),
        base_models=tuple(card["id"] for card in bases),
        root=bases[0].get("root") if bases else None,
        adapters={card["id"]: card.get("root") or "" for card in cards if card.get("parent")},
        max_loras=None if limit is None else int(limit[1]),
    )


def _refused(status: int, content: bytes) -> EngineError:
    """Returns what an answer that is no success says; vLLM's older form has no `error` around it."""
    try:
        document = json.loads(content)
        found = document.get("error", document)
        return EngineError(str(found["message"]), status=status, kind=str(found.get("type", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = content[:200].decode(errors="replace")
        return EngineError(f"HTTP {status}: {text}", status=status)
