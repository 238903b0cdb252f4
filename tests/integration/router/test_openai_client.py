"""The official client, unchanged."""

from __future__ import annotations

import openai
import pytest

from finetune_operator.api.routes import BaseModelRoute
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import Router, route, target

CANDIDATE = "ab12cd34"


@pytest.fixture
async def client(router: Router, engine: Engine, alias: str) -> openai.AsyncOpenAI:
    await router.push(
        route(alias, target("base", engine.url), target(CANDIDATE, engine.url, alias=alias), weight=50),
        base_models=(BaseModelRoute(name="base-model", upstreams=(engine.url,)),),
    )
    return openai.AsyncOpenAI(base_url=router.url + "/v1", api_key="sk-of-a-client", max_retries=0)


async def test_a_chat(client: openai.AsyncOpenAI, alias: str) -> None:
    reply = await client.chat.completions.create(
        model=alias, messages=[{"role": "user", "content": "hi"}], user="user-1"
    )
    assert reply.choices[0].message.content in {"Hello from base-model.", f"Hello from {alias}--{CANDIDATE}."}
    assert reply.usage is not None


async def test_a_stream(client: openai.AsyncOpenAI, alias: str) -> None:
    stream = await client.chat.completions.create(
        model=alias, messages=[{"role": "user", "content": "hi"}], user="user-1", stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text.startswith("Hello from ")


async def test_completions_and_embeddings(client: openai.AsyncOpenAI, alias: str) -> None:
    reply = await client.completions.create(model=alias, prompt="hi")
    assert reply.choices[0].text.startswith("Hello from ")
    vectors = await client.embeddings.create(model="base-model", input="hi", encoding_format="float")
    assert vectors.data[0].embedding == [0.5, 0.25]


async def test_the_headers_name_arm_and_revision_and_a_pin_holds(
    client: openai.AsyncOpenAI, alias: str
) -> None:
    for revision, arm in (("base", "Stable"), (CANDIDATE, "Candidate")):
        raw = await client.chat.completions.with_raw_response.create(
            model=alias, messages=[], extra_headers={"x-adapter-revision": revision}
        )
        assert raw.headers["x-adapter-arm"] == arm
        assert raw.headers["x-adapter-revision"] == revision
        assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"


async def test_the_list_of_models(client: openai.AsyncOpenAI, alias: str) -> None:
    assert {model.id async for model in client.models.list()} == {alias, "base-model"}
    assert (await client.models.retrieve(alias)).id == alias


async def test_errors_are_the_clients_own_exceptions(
    client: openai.AsyncOpenAI, engine: Engine, alias: str
) -> None:
    with pytest.raises(openai.NotFoundError, match="GET /v1/models") as caught:
        await client.chat.completions.create(model="nobody", messages=[])
    assert caught.value.code == "model_not_found"
    engine.behaviours["base-model"] = Behaviour(status=400)
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="base-model", messages=[])
    engine.behaviours["base-model"] = Behaviour(status=500)
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="base-model", messages=[])


async def test_feedback_by_the_id_of_the_reply(client: openai.AsyncOpenAI, alias: str) -> None:
    reply = await client.chat.completions.create(model=alias, messages=[], user="user-1")
    answer = await client.post(
        "/feedback", cast_to=object, body={"response_id": reply.id, "metric": "helpful", "value": True}
    )
    assert isinstance(answer, dict)
    assert answer["model"] == alias
