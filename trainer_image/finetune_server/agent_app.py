"""The agent's HTTP API, and how it is run beside our own engine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_server.agent import Agent, Conflict, Settings
from finetune_server.engine_client import EngineClient
from finetune_server.evaluations import Evaluations, Scorer, Task
from finetune_server.ports import carries, listen, read_secret

LOG = logging.getLogger("finetune_server.agent")
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
CACHE = Path("~/.cache/finetune-operator/adapters")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Wanted(BaseModel):
    """Body of PUT /agent/v1/adapters/{name}."""

    model_config = ConfigDict(extra="ignore")

    uri: Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[a-z0-9]+://")]
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Asked(BaseModel):
    """Body of POST /agent/v1/evaluations."""

    model_config = ConfigDict(extra="ignore", alias_generator=to_camel, populate_by_name=True)

    id: Annotated[str, Field(min_length=1, max_length=256)]
    models: Annotated[list[str], Field(min_length=1, max_length=16)]
    dataset: Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[a-z0-9]+://")]
    scorer: Scorer = Scorer.EXACT_MATCH
    fields: list[str] | None = None
    max_rows: Annotated[int, Field(ge=1, le=10000)] = 200
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 256

    def task(self) -> Task:
        return Task(
            identity=self.id,
            models=tuple(self.models),
            dataset=self.dataset,
            scorer=self.scorer,
            fields=tuple(self.fields or ()),
            max_rows=self.max_rows,
            max_tokens=self.max_tokens,
        )


class AgentApi:
    """Handlers over one agent."""

    def __init__(self, agent: Agent, evaluations: Evaluations, *, token_file: Path | None) -> None:
        self.agent = agent
        self.evaluations = evaluations
        self._token_file = token_file

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._border])
        app.router.add_get("/healthz", self.health)
        app.router.add_get("/agent/v1/status", self.status)
        app.router.add_put("/agent/v1/adapters/{name}", self.put)
        app.router.add_delete("/agent/v1/adapters/{name}", self.delete)
        app.router.add_post("/agent/v1/evaluations", self.evaluate)
        app.router.add_get("/agent/v1/evaluations/{id}", self.evaluation)
        return app

    @web.middleware
    async def _border(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/agent/"):
            try:  # each time: a mounted Secret is exchanged under a running process
                secret = read_secret(self._token_file)
            except (OSError, ValueError) as error:
                LOG.error("the token file cannot be read (%s); nobody is let in", error)
                return _refuse(503, f"the agent cannot read its token file ({type(error).__name__})")
            if not carries(request, secret):
                return _refuse(401, "the token is missing or wrong")
        try:
            return await handler(request)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "body"
            return _refuse(400, f"{place}: {first['msg']}")
        except OSError as error:
            folder = self.agent.settings.state_file and self.agent.settings.state_file.parent
            LOG.error("%s %s failed: %s", request.method, request.path, error)
            return _refuse(
                503, f"--state-dir {folder} cannot be written ({error.strerror or error}); make room there"
            )

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(await self.agent.status())

    async def put(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if NAME.fullmatch(name) is None:
            return _refuse(400, f"name: {name!r} must be letters, digits, dots, dashes and underscores")
        wanted = Wanted.model_validate_json(await request.read())
        try:
            loaded = self.agent.put(name, wanted.uri, wanted.digest)
        except Conflict as error:
            return _refuse(409, str(error))
        return web.json_response({}, status=200 if loaded else 202)

    async def delete(self, request: web.Request) -> web.Response:
        there = self.agent.delete(request.match_info["name"])
        return web.json_response({}, status=202 if there else 200)

    async def evaluate(self, request: web.Request) -> web.Response:
        asked = Asked.model_validate_json(await request.read())
        return web.json_response(self.evaluations.start(asked.task()).document(), status=202)

    async def evaluation(self, request: web.Request) -> web.Response:
        found = self.evaluations.find(request.match_info["id"])
        if found is None:
            return _refuse(
                404, "there is no such evaluation; it may have been lost in a restart: post it again"
            )
        return web.json_response(found.document())


def _refuse(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


@contextlib.asynccontextmanager
async def serve(
    *, engine_url: str, api_key: str | None, settings: Settings, token_file: Path | None, host: str, port: int
) -> AsyncIterator[tuple[str, int]]:
    """Runs an agent until the context ends; gives the address of its API."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = EngineClient(engine_url, session, api_key=api_key)
        agent = Agent(client, settings)
        evaluations = Evaluations(client)
        api = AgentApi(agent, evaluations, token_file=token_file)
        loop = asyncio.create_task(agent.run(), name="agent")
        try:
            async with listen(api.application(), host, port) as address:
                LOG.info("agent on %s:%d for %s", *address, engine_url)
                yield address
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            await evaluations.close()


def build_settings(
    options: argparse.Namespace, *, max_loras: int, max_lora_rank: int, base_uri: str | None
) -> Settings:
    """Returns the agent's settings from the command line."""
    return Settings(
        cache=(options.cache_dir or CACHE).expanduser().absolute(),
        state_file=None if options.state_dir is None else options.state_dir / "adapters.json",
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        base_uri=base_uri,
        load_timeout=options.load_timeout,
        download_timeout=options.download_timeout,
    )
