"""An engine that speaks vLLM's API without a model, and that can lie, refuse, hang and restart."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Engine:
    """What the engine does next; tests change it while it runs."""

    instance: int = 1
    up: bool = True
    adapters: dict[str, str] = field(default_factory=dict)
    max_lora: int = 2
    tells_places: bool = True  # vLLM exports it with its first requests
    lies: bool = False  # says 200 to a load and does not load
    mute: bool = False  # lists an adapter and fails each request for it
    refuses: str = ""  # message of a refused load
    load_seconds: float = 0.0
    loading: asyncio.Event | None = None  # loads wait for it
    listing: asyncio.Event | None = None  # lists without adapters are made at once and sent when it is set
    cards: Any = None  # what /v1/models lists instead of models
    choices: list[Any] | None = None  # what each answer to a chat consists of
    questions: int = 0  # chats so far
    held: int = 0  # such lists that wait
    calls: list[str] = field(default_factory=list)

    def restart(self) -> None:
        self.instance += 1
        self.adapters.clear()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.up else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        labels = f'max_lora="{self.max_lora}",running_lora_adapters="",waiting_lora_adapters=""'
        places = f"vllm:lora_requests_info{{{labels}}} 1.0\n" if self.tells_places else ""
        return web.Response(text=f"process_start_time_seconds {self.instance}\n{places}")

    async def _models(self, request: web.Request) -> web.Response:
        cards: list[dict[str, Any]] = [{"id": "base", "root": "org/base", "parent": None}]
        cards += [{"id": name, "root": path, "parent": "base"} for name, path in self.adapters.items()]
        if self.cards is not None:
            return web.json_response({"object": "list", "data": self.cards})
        if self.listing is not None and not self.adapters:
            self.held += 1
            await self.listing.wait()
        return web.json_response({"object": "list", "data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        document = await request.json()
        name = document["lora_name"]
        self.calls.append(f"load {name}")
        await asyncio.sleep(self.load_seconds)
        if self.loading is not None:
            await self.loading.wait()
        if self.refuses:
            return _error(400, self.refuses)
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not self.lies:
            self.adapters[name] = document["lora_path"]
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text="Success")

    async def _complete(self, request: web.Request) -> web.Response:
        name = (await request.json())["model"]
        if self.mute:
            return _error(500, "CUDA error: an illegal memory access was encountered")
        if name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        return web.json_response({"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}})

    async def _chat(self, request: web.Request) -> web.Response:
        """Answers with the question, and a wrong one for the base model."""
        document = await request.json()
        self.questions += 1
        if self.choices is not None:
            return web.json_response({"choices": self.choices})
        text = document["messages"][-1]["content"] if document["model"] != "base" else "?"
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


def _error(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return web.json_response({"error": error}, status=status)
