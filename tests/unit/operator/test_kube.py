"""How the client of the operator reaches the API server."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from finetune_operator.adapters import api_client
from finetune_operator.adapters.api_errors import FencedError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.kubeconfig import KubeconfigError
from tests.waiting import until


def point_at(monkeypatch: pytest.MonkeyPatch, folder: Path, port: int | None) -> None:
    """A kubeconfig for the server at this port."""
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setattr(
        "kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(folder / "kubeconfig")
    )


def with_authority(data: str) -> str:
    return json.dumps(
        {
            "clusters": [
                {"name": "c", "cluster": {"server": "https://x", "certificate-authority-data": data}}
            ],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{{{", "/kubeconfig cannot be used"),
        ("a: 1", "/kubeconfig cannot be used"),
        ("", "/kubeconfig cannot be used"),
        ("clusters: 1\ncurrent-context: x\ncontexts: 2", "/kubeconfig cannot be used"),
        (with_authority("a"), "/kubeconfig cannot be used: Invalid base64"),
        (with_authority("Z2FyYmFnZQ=="), "the certificates for https://x cannot be used"),
    ],
    ids=["no YAML", "no cluster", "empty", "no lists", "no base64", "no certificate"],
)
async def test_a_kubeconfig_that_cannot_be_used_is_told(
    content: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, tmp_path, 1)
    (tmp_path / "kubeconfig").write_text(content)
    with pytest.raises(KubeconfigError, match=complaint):
        await Kube.connect()


async def asked(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, not_for: str, credentials: str = ""
) -> list[str]:
    """Who answered: `server` or `proxy`, where the environment names a proxy, but none for the hosts `not_for`; with
    the credentials that it was sent for the proxy."""
    heard: list[str] = []

    def answers(name: str) -> TestServer:
        async def answer(request: web.Request) -> web.Response:
            sent = request.headers.get("Proxy-Authorization", "")
            heard.append(f"{name} {request.path} {sent}".strip())
            return web.json_response({"kind": "APIGroup"})

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", answer)
        return TestServer(application)

    async with answers("server") as server, answers("proxy") as proxy:
        point_at(monkeypatch, folder, server.port)
        url = f"http://{credentials}127.0.0.1:{proxy.port}"
        for name, value in (("http_proxy", url), ("no_proxy", not_for)):
            monkeypatch.setenv(name, value)
        kube = await Kube.connect()
        assert await kube.has_group_version("ray.io/v1")
        await kube.close()
    return heard


async def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert await asked(monkeypatch, tmp_path, not_for="") == ["proxy /apis/ray.io/v1"]


async def test_the_name_and_the_word_in_the_proxys_url_are_for_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = "Basic " + base64.b64encode(b"name:wo@rd").decode()
    heard = await asked(monkeypatch, tmp_path, not_for="", credentials="name:wo%40rd@")
    assert heard == [f"proxy /apis/ray.io/v1 {sent}"]
    assert await asked(monkeypatch, tmp_path, not_for="127.0.0.1", credentials="name:word@") == [
        "server /apis/ray.io/v1"
    ]


async def test_no_proxy_is_heeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert await asked(monkeypatch, tmp_path, not_for="127.0.0.1") == ["server /apis/ray.io/v1"]


async def test_a_write_that_waited_for_its_connection_is_not_sent_by_one_that_leads_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(api_client, "CONNECTIONS", 1)
    heard: list[str] = []
    said: list[bool] = []
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        heard.append(request.method)
        await go_on.wait()
        return web.json_response({"kind": "APIGroup"})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(application) as server:
        point_at(monkeypatch, tmp_path, server.port)
        leads = True

        def may_write() -> bool:
            said.append(leads)
            return leads

        kube = await Kube.connect(may_write=may_write)
        reading = asyncio.create_task(kube.has_group_version("ray.io/v1"))
        await until(lambda: bool(heard))
        body = {"apiVersion": "v1", "kind": "Event", "metadata": {"namespace": "team"}}
        writing = asyncio.create_task(kube.create(body))
        await until(lambda: bool(said))  # it may, and waits for the only connection
        leads = False
        go_on.set()
        assert await reading
        with pytest.raises(FencedError):
            await writing
        assert await kube.has_group_version("ray.io/v1"), (
            "the connection is free again, and reading is allowed"
        )
        await kube.close()
    assert heard == ["GET", "GET"]
    assert said == [True, False]
