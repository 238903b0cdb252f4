"""The HTTP surface of the engine: OpenAI's API and vLLM's calls for adapters, health and metrics."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import prometheus_client
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from finetune_server import adapters, answers, delivery, errors, prompts, registry, threads, wire
from finetune_server.engine import Dead, Engine, QueueFull
from finetune_server.ports import carries
from finetune_server.sampling import Sampling
from finetune_server.sequences import Sequence

MAX_BODY = 32 << 20  # bytes
_ID = re.compile(r"[!-~]{1,512}")  # what X-Request-Id may be; another one is not used

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """Handlers over one engine."""

    def __init__(self, engine: Engine, *, names: list[str], api_key: str | None) -> None:
        self.engine = engine
        self.names = names  # served names of the base model; the first one is its main name
        self.api_key = api_key
        self.draining = False
        self._started = int(time.time())
        self._defaults = _generation_defaults(engine.base.model)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._border])
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/load_lora_adapter", self.load)
        app.router.add_post("/v1/unload_lora_adapter", self.unload)
        return app

    @web.middleware
    async def _border(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks the key and gives every error the one shape."""
        try:
            if request.path.startswith("/v1/") and not carries(request, self.api_key):
                raise errors.Unauthorized("the API key is missing or wrong")
            if request.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise errors.BadRequest(
                    "Content-Encoding: packed bodies are not read; send the body as it is"
                )
            return await handler(request)
        except errors.ApiError as error:
            return error.response()
        except web.HTTPRequestEntityTooLarge:
            return errors.TooLarge(f"the body is larger than {MAX_BODY} bytes").response()
        except RequestPayloadError:
            return errors.BadRequest("the body is broken in transfer").response()
        except web.HTTPException as error:  # aiohttp's own: an unknown path, a wrong method
            return errors.translate(error, f"{request.method} {request.path}")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.engine.alive and not self.draining else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=prometheus_client.generate_latest(self.engine.telemetry.registry),
            headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST},
        )

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": metadata.version("finetune-operator"), "engine": "finetune-server"}
        )

    async def models(self, request: web.Request) -> web.Response:
        base = self.engine.base
        cards = [
            _card(
                name, root=str(base.path), parent=None, max_model_len=base.max_length, created=self._started
            )
            for name in self.names
        ]
        cards += [
            _card(one.name, root=one.path, parent=self.names[0], max_model_len=None, created=one.created)
            for one in self.engine.registry.listed()
        ]
        return web.json_response({"object": "list", "data": cards})

    async def load(self, request: web.Request) -> web.Response:
        """vLLM's call, plus `pinned`: a pinned adapter never makes room for another."""
        document = await _read_object(request)
        name, path = document.get("lora_name"), document.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            raise errors.InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
        if not prompts.is_whole(name):  # neither an answer nor the metrics could name it
            raise errors.InvalidUserInput("'lora_name' holds half a character (a lone surrogate).")
        try:
            pinned = document.get("pinned") is True
            await threads.apart(lambda: self.engine.load(name, Path(path), pinned=pinned))
        except registry.AlreadyLoaded:
            raise errors.InvalidUserInput(
                f"The lora adapter '{name}' has already been loaded; unload it first, or use another name."
            ) from None
        except registry.CapacityFull as error:
            raise errors.CapacityError(str(error)) from None
        except FileNotFoundError as error:
            raise errors.NotFound(str(error)) from None
        except adapters.AdapterError as error:
            failed = errors.BadRequest(str(error), "lora_path")
            failed.kind = type(error).__name__
            raise failed from None
        except Dead as error:
            raise errors.Unavailable(str(error)) from None
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        document = await _read_object(request)
        name = document.get("lora_name")
        if not isinstance(name, str) or not name:
            raise errors.InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await asyncio.to_thread(self.engine.unload, name)
        except KeyError:
            raise errors.NotFound(f"The lora adapter '{name}' cannot be found.") from None
        except Dead as error:
            raise errors.Unavailable(str(error)) from None
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = wire.parse(await request.read(), wire.ChatRequest)
        self._check_model(asked.model)
        logprobs = asked.logprob_count()
        template = self.engine.registry.template(asked.model)
        base = self.engine.base
        prompt = await asyncio.to_thread(
            prompts.encode_chat,
            asked,
            base.tokenizer,
            template=template,
            max_characters=base.max_characters,
        )
        wanted = asked.max_completion_tokens or asked.max_tokens
        return await self._answer(
            request, asked, [prompt], wanted=wanted, default=None, logprobs=logprobs, is_chat=True
        )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = wire.parse(await request.read(), wire.CompletionRequest)
        self._check_model(asked.model)
        base = self.engine.base
        found = await asyncio.to_thread(
            prompts.encode_completion,
            asked,
            base.tokenizer,
            vocabulary=int(base.model.get_input_embeddings().num_embeddings),
            max_characters=base.max_characters,
        )
        return await self._answer(
            request,
            asked,
            found,
            wanted=asked.max_tokens,
            default=16,  # OpenAI's
            logprobs=asked.logprobs,
            is_chat=False,
        )

    def _check_model(self, name: str) -> None:
        if not self.engine.registry.knows(name):
            raise errors.model_not_found(name)

    async def _answer(
        self,
        request: web.Request,
        asked: wire.Request,
        found: list[list[int]],
        *,
        wanted: int | None,
        default: int | None,
        logprobs: int | None,
        is_chat: bool,
    ) -> web.StreamResponse:
        base = self.engine.base
        inbox = delivery.Inbox()

        def build(index: int, prompt: list[int]) -> Sequence:
            limit = prompts.check_length(len(prompt), asked=wanted, longest=base.max_length, default=default)
            settings: Sampling = asked.sampling(max_tokens=limit, defaults=self._defaults, logprobs=logprobs)
            return Sequence(
                prompt=prompt,
                settings=settings,
                model=asked.model,
                tokenizer=base.tokenizer.backend_tokenizer,
                ends=base.ends,
                sink=lambda piece: inbox.put(index, piece),
            )

        sequences = [build(index, prompt) for index, prompt in enumerate(found)]
        form = answers.Form(
            identity=f"{'chatcmpl' if is_chat else 'cmpl'}-{_request_id(request)}",
            model=asked.model,
            is_chat=is_chat,
            wants_logprobs=logprobs is not None,
            decode=lambda token: str(
                base.tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
            ),
        )
        self._submit(sequences, asked.model)
        try:
            if asked.stream:
                return await delivery.stream(request, form, sequences, inbox, wants_usage=asked.wants_usage())
            return await delivery.collect(form, sequences, inbox)
        finally:  # also when the client went away
            self.engine.cancel(sequences)

    def _submit(self, sequences: list[Sequence], model: str) -> None:
        try:
            self.engine.submit(sequences)
        except KeyError:
            raise errors.model_not_found(model) from None
        except QueueFull as error:
            raise errors.TooMany(str(error)) from None
        except Dead as error:
            raise errors.Unavailable(str(error)) from None


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


async def _read_object(request: web.Request) -> dict[str, Any]:
    try:
        document = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise errors.BadRequest("the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise errors.BadRequest("the body is not a JSON object")
    return document


def _card(
    name: str, *, root: str, parent: str | None, max_model_len: int | None, created: int
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "finetune-server",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }


def _generation_defaults(model: Any) -> dict[str, Any]:
    """Returns what the model's generation_config.json says about sampling; vLLM uses it in the same way."""
    config = getattr(model, "generation_config", None)
    names = ("temperature", "top_p", "top_k", "min_p")
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}
