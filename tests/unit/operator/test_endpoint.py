"""The endpoint's limits: bodies, connections, rates, tokens, certificates; and what a stand-by does with a report."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from finetune_local import certificates
from finetune_local.ports import choose
from finetune_operator import endpoint
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.tls import AuthorityFile, TlsFiles
from finetune_operator.core.rates import Limiter, Rate
from finetune_operator.endpoint import Answer, ReportEndpoint
from finetune_operator.forwarding import Forwarder
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.status_server import StatusServer, _claimed_audiences
from tests.unit.operator.memory_api import MemoryApi

PATH = "/v1/namespaces/ns/finetunejobs/job/attempts/1/status"


async def echo(request: web.Request) -> web.Response:
    body = await endpoint.read_body(request)
    return web.json_response({"bytes": len(body), "who": request.headers.get("Authorization")})


@contextlib.asynccontextmanager
async def listening(
    answer: Answer, *, tls: ssl.SSLContext | None = None, registry: CollectorRegistry | None = None
) -> AsyncIterator[str]:
    port = choose(("endpoint",), known={}, in_use_by_us=[])["endpoint"]
    report_endpoint = ReportEndpoint(answer=answer, telemetry=Telemetry(registry or CollectorRegistry()))
    async with endpoint.listening(report_endpoint.application(), host="127.0.0.1", port=port, tls=tls):
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"


async def post(url: str, **arguments: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(url + PATH, **arguments) as answer:
        return answer.status, await answer.json()


async def test_what_is_too_large_or_packed_is_refused_before_it_is_read() -> None:
    async with listening(echo) as url:
        assert (await post(url, data=b"x" * 65536))[0] == 200
        assert (await post(url, data=b"x" * 65537))[0] == 413

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 4096

        with contextlib.suppress(
            aiohttp.ClientError
        ):  # the answer, or the end of the connection: never all of it
            assert (await post(url, data=endless()))[0] == 413
        packed = {"Content-Encoding": "gzip"}
        assert (await post(url, data=b"x", headers=packed))[0] == 415


async def test_a_sender_that_dawdles_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BODY_SECONDS", 0.2)
    async with listening(echo) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc".encode())
        async with asyncio.timeout(5):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_sender_that_dies_in_the_middle_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        try:
            return await echo(request)
        finally:
            ended.set()

    async with listening(answer) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc".encode())
        await asyncio.sleep(0.05)
        writer.transport.abort()
        async with asyncio.timeout(5):
            await ended.wait()
        assert (await post(url, data=b"x"))[0] == 200
    assert not [record for record in caplog.records if record.exc_info], caplog.text


async def test_a_connection_that_asks_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "CONNECTION_SECONDS", 0.2)
    monkeypatch.setattr(endpoint, "SWEEP_SECONDS", 0.05)
    async with listening(echo) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST ")
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()


async def test_above_the_limit_of_connections_new_ones_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "CONNECTIONS", 3)
    async with listening(echo) as url:
        port = int(url.rsplit(":", 1)[1])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(aiohttp.ClientError):
            await post(url, data=b"x")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.05)
        assert (await post(url, data=b"x"))[0] == 200


def test_a_job_may_send_a_burst_and_then_so_many_per_second() -> None:
    limiter = Limiter(Rate(burst=3, per_second=2.0))
    assert [limiter.take("job", now=0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert limiter.take("other", now=0.0) == 0
    assert limiter.take("job", now=0.25) == pytest.approx(0.25)
    assert limiter.take("job", now=0.5) == 0
    assert limiter.take("job", now=100.0) == 0


def test_the_limiter_forgets_whom_it_has_not_seen_for_long() -> None:
    limiter = Limiter(Rate(burst=20, per_second=2.0))
    for number in range(10_000):
        limiter.take(number, now=float(number))
    assert len(limiter._buckets) <= 12, "after ten seconds a bucket is full again"


def test_the_limiter_keeps_no_more_than_so_many_at_once() -> None:
    limiter = Limiter(Rate(burst=1, per_second=1.0), keys=100)
    for number in range(10_000):
        limiter.take(number, now=0.0)
    assert len(limiter._buckets) == 100


def token(claims: object) -> str:
    middle = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"head.{middle}.signature"


@pytest.mark.parametrize(
    ("text", "audiences"),
    [
        (token({"aud": ["finetune.dev/jobs/u"]}), ["finetune.dev/jobs/u"]),
        (token({"aud": "finetune.dev/jobs/u"}), ["finetune.dev/jobs/u"]),
        (token({"aud": [1, None]}), []),
        (token({"aud": {"a": 1}}), []),
        (token({}), []),
        (token([]), []),
        (token("x"), []),
        ("nonsense", []),
        ("a.b.c", []),
        ("a." + "[" * 4000 + ".c", []),
        ("ü.ü.ü", []),
        ("a." + "a" * 20_000 + ".c", []),
    ],
)
def test_what_a_token_claims_is_read_without_trust(text: str, audiences: list[str]) -> None:
    assert _claimed_audiences(text) == audiences


@pytest.mark.parametrize(
    "header", [b"Bearer \xff\xfe", b"Bearer a.\xff.c", "Bearer a.\u00e9.c".encode(), b"\xff"]
)
async def test_a_token_that_is_no_text_is_refused_and_counted(
    header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    server = StatusServer(
        kube=MemoryApi(), mailbox=Mailbox(), enqueue=lambda key, seconds, urgent: None, progress_seconds=10.0
    )
    async with listening(server.answer, registry=registry) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        request = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nAuthorization: "
        writer.write(request.encode() + header + b"\r\n\r\n{}")
        async with asyncio.timeout(5):
            assert b" 401 " in await reader.readline()
        writer.close()
    assert registry.get_sample_value("finetune_reports_total", {"code": "401"}) == 1
    assert not [record for record in caplog.records if record.exc_info], caplog.text


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    certificates.ensure(tmp_path)
    return tmp_path


def files(folder: Path, certificate: Path, name: str) -> Path:
    """A certificate and key of the test's own, to be replaced while in use."""
    target = folder / name
    target.mkdir(exist_ok=True)
    pair = certificates.pair(certificate, "kube-apiserver")
    (target / "tls.crt").write_bytes(pair.certificate.read_bytes())
    (target / "tls.key").write_bytes(pair.key.read_bytes())
    return target


def renew(target: Path, other: Path, *, names: tuple[str, ...] = ("tls.crt", "tls.key")) -> None:
    """Replace files as a Secret's volume does: at once, by another inode."""
    pair = certificates.pair(other, "kube-apiserver")
    for name in names:
        source = pair.certificate if name == "tls.crt" else pair.key
        fresh = target / f".{name}"
        fresh.write_bytes(source.read_bytes())
        fresh.replace(target / name)


async def test_a_renewed_certificate_is_used_without_a_restart(authority: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    certificates.ensure(second)
    used = files(tmp_path, authority, "used")
    tls = TlsFiles(certificate=used / "tls.crt", key=used / "tls.key")
    old = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    new = ssl.create_default_context(cafile=str(second / "ca.crt"))
    async with listening(echo, tls=tls.context) as url:
        assert (await post(url, data=b"x", ssl=old))[0] == 200
        renew(used, second, names=("tls.crt",))
        assert not tls.reload(), "a certificate without its key"
        assert (await post(url, data=b"x", ssl=old))[0] == 200
        renew(used, second, names=("tls.key",))
        assert tls.reload()
        assert (await post(url, data=b"x", ssl=new))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await post(url, data=b"x", ssl=old)
        assert not tls.reload()


def test_the_authority_is_read_anew_and_survives_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    path.write_text("one")
    authority = AuthorityFile(path)
    assert authority.read() == "one"
    path.unlink()
    assert authority.read() == "one"
    path.write_text("two")
    assert authority.read() == "two"
    assert AuthorityFile(None).read() is None


async def test_a_stand_by_hands_a_report_to_the_leader_and_its_answer_back() -> None:
    async def refusing(request: web.Request) -> web.Response:
        await endpoint.read_body(request)
        raise web.HTTPTooManyRequests(text="slowly", headers=endpoint.retry_after(3))

    async with (
        listening(echo) as leader,
        listening(refusing) as busy,
        Forwarder(leader=lambda: leader, status_url=leader, authority=None) as to_leader,
        Forwarder(leader=lambda: busy, status_url=busy, authority=None) as to_busy,
        listening(to_leader.answer) as stand_by,
        listening(to_busy.answer) as other,
    ):
        headers = {"Authorization": "Bearer abc"}
        assert await post(stand_by, data=b"12345", headers=headers) == (
            200,
            {"bytes": 5, "who": "Bearer abc"},
        )
        assert await post(other, data=b"1") == (429, {"error": "slowly"})


async def test_without_a_leader_a_report_is_to_be_sent_again_and_never_goes_round() -> None:
    async with contextlib.AsyncExitStack() as stack:
        urls: list[str] = []
        lost = await stack.enter_async_context(
            Forwarder(leader=lambda: None, status_url="http://x", authority=None)
        )
        code, answer = await post(await stack.enter_async_context(listening(lost.answer)), data=b"x")
        assert (code, "again" in answer["error"]) == (503, True)
        circle = await stack.enter_async_context(
            Forwarder(leader=lambda: urls[0], status_url="http://x", authority=None)
        )
        urls.append(await stack.enter_async_context(listening(circle.answer)))
        assert (await post(urls[0], data=b"x"))[0] == 503
        gone = await stack.enter_async_context(
            Forwarder(leader=lambda: "http://127.0.0.1:9", status_url="http://x", authority=None)
        )
        assert (await post(await stack.enter_async_context(listening(gone.answer)), data=b"x"))[0] == 503


async def test_a_stand_by_trusts_the_leader_by_the_services_name(authority: Path) -> None:
    """The leader is reached at an address that its certificate does not have; the name of the Service is in it."""
    pair = certificates.pair(authority, "kube-apiserver")
    tls = TlsFiles(certificate=pair.certificate, key=pair.key)
    ca = authority / "ca.crt"
    async with listening(echo, tls=tls.context) as leader:
        for name, code in (("kubernetes.default.svc", 200), ("elsewhere.example", 503)):
            async with (
                Forwarder(
                    leader=lambda: leader, status_url=f"https://{name}:8090", authority=ca
                ) as forwarder,
                listening(forwarder.answer) as stand_by,
            ):
                assert (await post(stand_by, data=b"x"))[0] == code
