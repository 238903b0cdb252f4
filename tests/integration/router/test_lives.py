"""Routers and workers that start, stop, die, and come back; what the operator sees of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from finetune_operator.api.routes import (
    COUNTERS_PATH,
    ROUTES_PATH,
    Arm,
    BaseModelRoute,
    Moments,
    RoutesApplied,
    Signal,
    SignalEvent,
    Snapshot,
)
from finetune_router import assignment
from finetune_router.config import RouterConfig
from finetune_router.exposition import MetricsBoard
from finetune_router.feedback import FILE_NAME
from finetune_router.fleet import Fleet
from finetune_router.ledger import Ledger
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import START_SECONDS, Router, route, target

CANDIDATE = "ab12cd34"
CHAT = "/v1/chat/completions"


def chat(alias: str, user: str = "u", **more: object) -> dict[str, Any]:
    return {
        "model": alias,
        "user": user,
        "messages": [{"role": "user", "content": "a secret prompt"}],
        **more,
    }


async def start(router: Router) -> Router:
    await asyncio.to_thread(router.start)
    return router


async def status(session: aiohttp.ClientSession, router: Router, alias: str) -> int:
    async with session.post(router.url + CHAT, json=chat(alias)) as response:
        await response.read()
        return response.status


async def worker_pids(router: Router) -> list[int]:
    return [worker["pid"] for worker in json.loads((await router.readiness())[1])["workers"]]


async def test_running_streams_end_in_peace_when_the_router_is_stopped(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = await start(own_router("--drain-delay", "0.5", "--grace", "20", workers=2))
    await router.push(route(alias, target("base", engine.url)))
    engine.behaviours["base-model"] = Behaviour(text="word " * 30, chunk_delay=0.05)

    async def stream() -> bytes:
        async with session.post(router.url + CHAT, json=chat(alias, stream=True)) as response:
            return await response.read()

    streams = [asyncio.create_task(stream()) for _ in range(10)]
    await asyncio.sleep(0.3)
    stopping = asyncio.create_task(asyncio.to_thread(router.stop))
    await asyncio.sleep(0.2)
    code, text = await router.readiness()
    assert (code, json.loads(text)["reasons"]) == (503, ["the router is being stopped"])
    async with session.post(router.url + CHAT, json=chat(alias)) as response:  # until nobody sends any more
        assert response.status == 200
        assert response.headers["connection"] == "close"
    await asyncio.sleep(0.6)
    with pytest.raises(aiohttp.ClientConnectorError):
        await status(session, router, alias)
    assert (await router.arm(alias, Arm.STABLE)).requests >= 1  # the operator may still ask
    assert all(body.endswith(b"data: [DONE]\n\n") for body in await asyncio.gather(*streams))
    assert await stopping == 0


async def test_a_stream_too_ends_its_connection_while_the_router_is_stopped(
    own_router: Callable[..., Router], engine: Engine, alias: str
) -> None:
    router = await start(own_router("--drain-delay", "10"))
    await router.push(route(alias, target("base", engine.url)))
    engine.behaviours["base-model"] = Behaviour(text="word " * 20, chunk_delay=0.05)
    body = json.dumps(chat(alias, stream=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert b" 200 " in await reader.readline()
    assert router.process is not None
    router.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(8):
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()


async def test_a_stream_without_end_is_cut_after_the_grace_time(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = await start(own_router("--grace", "0.5"))
    await router.push(route(alias, target("base", engine.url)))
    engine.behaviours["base-model"] = Behaviour(text="word " * 1000, chunk_delay=0.05)
    async with session.post(router.url + CHAT, json=chat(alias, stream=True)) as response:
        started = asyncio.get_running_loop().time()
        assert await asyncio.to_thread(router.stop) == 0
        assert asyncio.get_running_loop().time() - started < 5
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_a_router_that_starts_again_has_routes_feedback_counts_and_identity(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = await start(own_router())
    version = await router.push(
        route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=50)
    )
    async with session.post(router.url + CHAT, json=chat(alias)) as response:
        reply = await response.json()
        arm = response.headers["x-adapter-arm"]
    feedback = {"response_id": reply["id"], "metric": "helpful", "value": True}
    async with session.post(router.url + "/v1/feedback", json=feedback) as response:
        assert (response.status, (await response.json())["arm"]) == (201, arm)
    before = await router.counters()
    for stop in (router.stop, router.kill):
        await asyncio.to_thread(stop)
        await start(router)
        assert await status(session, router, alias) == 200
        async with session.post(router.url + "/v1/feedback", json=feedback) as response:
            assert response.status == 200
        after = await router.counters()
        assert (after.instance, after.version) == (before.instance, version)
        scores = {one.arm: one.scores for epoch in after.epochs for one in epoch.arms if one.scores}
        assert {name: moments["helpful"].n for name, moments in scores.items()} == {arm: 1}
    ended = {epoch.epoch for epoch in before.epochs}
    assert ended <= {epoch.epoch for epoch in after.epochs}, (
        "the first life's counts were written when it ended"
    )


async def test_a_worker_that_is_killed_is_replaced_and_its_counts_stay(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = await start(own_router(workers=2))
    version = await router.push(route(alias, target("base", engine.url)))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as fresh:
        statuses = await asyncio.gather(*(status(fresh, router, alias) for _ in range(40)))
        assert set(statuses) == {200}
        await router.counters()
        first, second = await worker_pids(router)
        os.kill(first, signal.SIGKILL)
        # Connections that hit the dead worker's socket wait for its successor.
        statuses = await asyncio.gather(*(status(fresh, router, alias) for _ in range(20)))
        assert set(statuses) == {200}
    pids = await worker_pids(router)
    assert first not in pids
    assert second in pids
    counters = await router.counters()
    assert counters.version == version
    assert (await router.arm(alias, Arm.STABLE)).requests == 60
    assert "adapter_router_worker_restarts_total 1.0" in await router.metrics()
    assert (
        f'adapter_router_requests_total{{alias="{alias}",arm="Stable",code="200",revision="base"}} 60.0'
        in (await router.metrics())
    )


async def test_a_worker_that_hangs_is_replaced(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = await start(own_router())
    await router.push(route(alias, target("base", engine.url)))
    (pid,) = await worker_pids(router)
    os.kill(pid, signal.SIGSTOP)
    assert await status(session, router, alias) == 200  # by the successor, after about ten seconds
    assert await worker_pids(router) != [pid]


async def test_a_worker_has_threads_for_many_names_whose_server_is_silent(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """Each such name keeps one, and each connection needs one, also to an IP address."""
    router = await start(own_router())
    await router.push(route(alias, target("base", engine.url)))
    assert await status(session, router, alias) == 200
    (pid,) = await worker_pids(router)
    assert psutil.Process(pid).num_threads() > 32


async def test_a_worker_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its socket takes connections all the while, and nobody else answers them."""
    execute, tries = asyncio.create_subprocess_exec, 0

    async def start_process(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await execute(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_process)
    config = RouterConfig(state_dir=str(tmp_path), port=0, grace=0.5)
    workers = Fleet(config, Ledger(tmp_path), MetricsBoard())
    workers.listen()
    workers.start()
    async with asyncio.timeout(START_SECONDS):
        while not workers.all_serving():
            await asyncio.sleep(0.05)
    assert tries == 2
    assert "cannot be started" in caplog.text
    await workers.drain()


async def test_a_worker_that_is_just_being_started_ends_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not there yet when they are told, and would be waited for in vain."""
    execute, begun = asyncio.create_subprocess_exec, asyncio.Event()

    async def start_process(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await execute(*arguments, **options)
        begun.set()
        await asyncio.sleep(0.2)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_process)
    workers = Fleet(RouterConfig(state_dir=str(tmp_path), port=0), Ledger(tmp_path), MetricsBoard())
    workers.listen()
    workers.start()
    await begun.wait()
    async with asyncio.timeout(25):  # the grace time is 30 s
        await workers.drain()


async def test_counts_that_cannot_be_stored_are_said_and_end_nothing(
    own_router: Callable[..., Router],
) -> None:
    router = own_router()
    (router.folder / "state" / "epochs.json").mkdir(parents=True)
    await start(router)
    assert await asyncio.to_thread(router.stop) == 0
    assert "what was counted is not on disk" in router.log.read_text()


async def test_two_routers_do_not_share_a_state_folder(own_router: Callable[..., Router]) -> None:
    """They would be one replica to the operator, which took the counts of one of them for all."""
    first, second = await start(own_router()), own_router()
    with pytest.raises(AssertionError, match="belongs to another router that runs: give each its own"):
        await asyncio.to_thread(second.start)
    await asyncio.to_thread(first.kill)
    await start(second)


async def test_workers_do_not_outlive_a_parent_that_is_killed(own_router: Callable[..., Router]) -> None:
    router = await start(own_router("--grace", "1", workers=2))
    pids = await worker_pids(router)
    router.kill()
    for _ in range(100):
        if not any(_is_alive(pid) for pid in pids):
            return
        await asyncio.sleep(0.05)
    pytest.fail("a worker still runs")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_the_admin_port(router: Router, engine: Engine, alias: str) -> None:
    version = await router.push(route(alias, target("base", engine.url)))
    for token in ("", "wrong"):
        for method, path in (("GET", ROUTES_PATH), ("PUT", ROUTES_PATH), ("GET", COUNTERS_PATH)):
            assert (await router.admin(method, path, token=token))[0] == 401
        assert (await router.admin("GET", "/healthz", token=token))[0] == 200
    head = b"GET /admin/v1/counters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", router.admin_port)
    writer.write(head)
    assert b" 401 " in await reader.readline(), "a token that is no UTF-8"
    writer.close()
    code, text = await router.admin("GET", ROUTES_PATH)
    assert RoutesApplied.model_validate_json(text).version == version

    async def put(snapshot: Snapshot) -> tuple[int, str]:
        return await router.admin("PUT", ROUTES_PATH, data=snapshot.model_dump_json(by_alias=True))

    assert (await put(Snapshot(version=version)))[0] == 200  # the same version once more: nothing changes
    code, text = await put(Snapshot(version=version - 1))
    assert code == 409
    assert json.loads(text)["version"] == version
    assert f"is older than {version}" in text
    code, text = await router.admin("PUT", ROUTES_PATH, data='{"version": "x"}')
    assert (code, "version: " in text) == (400, True)
    broken = Snapshot(version=version + 100_000, routes=(route(alias, target("base", "ftp://engine")),))
    code, text = await put(broken)
    assert (code, f"route {alias}" in text) == (400, True)
    newer = json.loads(Snapshot(version=version).model_dump_json(by_alias=True)) | {"fromTheFuture": 1}
    assert (await router.admin("PUT", ROUTES_PATH, data=json.dumps(newer)))[0] == 200


async def test_a_feedback_file_of_no_use_stops_neither_requests_nor_counters(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = own_router()
    state = router.folder / "state"
    state.mkdir()
    (state / FILE_NAME).write_bytes(b"no database" * 1000)
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))
    assert await status(session, router, alias) == 200
    assert "is put aside" in router.log.read_text()
    with contextlib.closing(sqlite3.connect(state / FILE_NAME)) as database:
        database.execute("DROP TABLE sums")
    assert (await router.arm(alias, Arm.STABLE)).requests == 1


async def test_the_newest_of_mirror_and_routes_file_counts(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    file = tmp_path / "routes.json"

    def write(version: int, alias: str) -> None:
        snapshot = Snapshot(version=version, routes=(route(alias, target("base", engine.url)),))
        file.write_text(snapshot.model_dump_json(by_alias=True))

    router = own_router("--routes-file", str(file))
    await asyncio.to_thread(router.start, wait_ready=False)
    await asyncio.sleep(1)
    code, text = await router.readiness()
    assert code == 503
    assert "no routes yet" in text
    assert await status(session, router, "first") == 503
    write(1_000_000, "first")
    for _ in range(100):
        if (await router.readiness())[0] == 200:
            break
        await asyncio.sleep(0.05)
    assert await status(session, router, "first") == 200
    await asyncio.sleep(0.5)  # until it is on disk; a push is answered after that, a file is read at leisure
    router.kill()
    write(999_999, "older")
    await start(router)
    assert [await status(session, router, name) for name in ("first", "older")] == [200, 404]
    router.kill()
    write(1_000_001, "newer")
    await start(router)
    assert [await status(session, router, name) for name in ("first", "newer")] == [404, 200]
    router.kill()
    file.write_text("{ broken")
    await start(router)
    assert await status(session, router, "newer") == 200
    assert "passed over" in router.log.read_text()


async def test_a_port_that_is_taken_and_files_of_no_use_are_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    for flags, said in (
        (["--admin-host", "0.0.0.0"], "--admin-token-file is needed"),
        (["--admin-token-file", str(empty)], "is empty"),
        (["--api-keys-file", str(tmp_path / "nowhere")], "nowhere"),
        (["--workers", "0"], "--workers: 0 is less than 1"),
    ):
        process = await asyncio.create_subprocess_exec(
            "finetune-router", "--state-dir", str(tmp_path / "s"), "--port", "0", "--admin-port", "0", *flags,
            stderr=asyncio.subprocess.PIPE, env=dict(os.environ) | {"PATH": _path_of_scripts()},
        )  # fmt: skip
        _, errors = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode != 0
        assert said in errors.decode()
        assert "Traceback" not in errors.decode()


def _path_of_scripts() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


async def test_signals_are_counted_per_arm(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    schema = {"type": "object", "required": ["intent"]}
    name = f"bot--{CANDIDATE}"
    await router.push(
        route(
            alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100, output_schema=schema
        )
    )
    stories = [
        (Behaviour(text='{"intent": "reset"}'), set()),
        (Behaviour(text='{"other": 1}'), {"invalid"}),
        (Behaviour(text="I'm sorry, but I can't help."), {"invalid", "refused"}),
        (Behaviour(text="", finish_reason="length"), {"invalid", "empty", "cut"}),
        (Behaviour(text='{"intent": 1}', delay=0.3), {"slow"}),
        (Behaviour(text='{"intent": "' + "ab " * 60 + '"}', delay=0.45), {"slow", "long"}),
    ]
    expected: dict[str, int] = {}
    for number, (how, events) in enumerate(stories):
        engine.behaviours[name] = how
        for stream in (False, True):
            async with session.post(
                router.url + CHAT, json=chat(alias, f"u{number}", stream=stream)
            ) as response:
                assert response.status == 200
                await response.read()
            for event in events:
                expected[event] = expected.get(event, 0) + 1
    counted = await router.arm(alias, Arm.CANDIDATE)
    assert counted.events == expected
    assert counted.requests == 2 * len(stories)


async def test_tokens_latency_lengths_and_keys_are_counted(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    candidate = target(CANDIDATE, engine.url)
    await router.push(
        route(alias, target("base", engine.url), candidate, comparison="mine", counts_words=True)
    )
    engine.behaviours["base-model"] = Behaviour(text="five words are in here", delay=0.05, chunk_delay=0.02)
    for user in ("a", "b", "a"):
        for stream in (False, True):
            async with session.post(router.url + CHAT, json=chat(alias, user, stream=stream)) as response:
                await response.read()
    engine.behaviours["base-model"].usage = False
    async with session.post(router.url + CHAT, json=chat(alias, "c", stream=True)) as response:
        await response.read()
    counters = await router.counters()
    arms = [arm for epoch in counters.epochs for arm in epoch.arms if arm.alias == alias]
    assert sum(arm.completion_tokens.n for arm in arms) == 7
    assert sum(sum(arm.word_histogram) for arm in arms) == 7 * 5, "streams and whole answers alike"
    assert sum(arm.completion_tokens.sum for arm in arms) == 6 * 5 + 7  # without usage: events
    assert sum(arm.length_histogram[3] for arm in arms) == 7
    assert all(arm.ttft_seconds.sum >= 0.05 * arm.ttft_seconds.n for arm in arms)
    assert all(arm.seconds.sum > arm.ttft_seconds.sum for arm in arms)
    samples = [sample for epoch in counters.epochs for sample in epoch.samples if sample.alias == alias]
    assert {sample.comparison for sample in samples} == {"mine"}
    assert len({value for sample in samples for value in sample.stable}) == 3


async def test_what_objectives_compare_is_summed_by_group_of_users_also_feedback_and_after_a_restart(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """A user's values are in one group, whichever worker answers and whoever tells them later."""
    router = await start(own_router(workers=2))
    asked = ("seconds", "completion_tokens", "scores/helpful")
    candidate = target(CANDIDATE, engine.url)
    await router.push(route(alias, target("base", engine.url), candidate, weight=50, grouped=asked))
    engine.behaviours["base-model"] = engine.behaviours[candidate.served_name] = Behaviour(text="two words")
    expected: dict[tuple[str, int], int] = {}
    users = [f"user-{number}" for number in range(20)]
    for user in users * 3:
        async with session.post(
            router.url + CHAT, json=chat(alias, user), headers={"Connection": "close"}
        ) as response:
            reply, arm = await response.json(), response.headers["x-adapter-arm"]
        group = assignment.group_of(assignment.draw(b"salt\0", user).sample_hash)
        expected[arm, group] = expected.get((arm, group), 0) + 1
        vote = {"response_id": reply["id"], "metric": "helpful", "value": group}
        async with session.post(router.url + "/v1/feedback", json=vote) as response:
            assert response.status == 201

    async def told(quantity: str) -> dict[tuple[str, int], tuple[int, float]]:
        sums: dict[tuple[str, int], tuple[int, float]] = {}
        for epoch in (await router.counters()).epochs:
            for arm in epoch.arms:
                groups = arm.scores.get(quantity, getattr(arm, quantity, Moments())).groups
                for number, (n, total) in enumerate(groups):
                    before = sums.get((arm.arm, number), (0, 0.0))
                    sums[arm.arm, number] = (before[0] + n, before[1] + total)
        return {key: value for key, value in sums.items() if value[0]}

    for quantity in ("seconds", "completion_tokens", "helpful"):
        assert {key: n for key, (n, _) in (await told(quantity)).items()} == expected
    votes = await told("helpful")
    assert all(total == group * n for (_, group), (n, total) in votes.items())
    assert await told("ttft_seconds") == {}, "no objective asks for it"
    assert await asyncio.to_thread(router.stop) == 0
    await asyncio.to_thread(router.start)
    assert await told("helpful") == votes
    assert {key: n for key, (n, _) in (await told("seconds")).items()} == expected


async def test_no_text_of_users_or_models_in_logs_metrics_or_state(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = await start(own_router("--log-level", "DEBUG"))
    signals = (Signal(name="invalid", event=SignalEvent.SCHEMA_INVALID),)
    await router.push(route(alias, target("base", engine.url), signals=signals))
    engine.behaviours["base-model"] = Behaviour(text="a secret answer")
    headers = {"Authorization": "Bearer a-secret-key", "x-adapter-key": "a-secret-user"}
    for how in (Behaviour(text="a secret answer"), Behaviour(status=500), Behaviour(break_after=0)):
        engine.behaviours["base-model"] = how
        async with session.post(router.url + CHAT, json=chat(alias), headers=headers) as response:
            await response.read()
    async with session.post(router.url + CHAT, data=b'{"a secret": broken', headers=headers) as response:
        assert "secret" not in await response.text()
    seen = await router.metrics() + (await router.counters()).model_dump_json()
    assert await asyncio.to_thread(router.stop) == 0
    seen += router.log.read_text()
    seen += "".join(
        file.read_bytes().decode("latin-1") for file in (router.folder / "state").iterdir() if file.is_file()
    )
    assert "secret" not in seen


async def test_metrics_are_told_in_the_plain_format_to_who_asks_for_a_version_that_is_none(
    router: Router, session: aiohttp.ClientSession
) -> None:
    headers = {"Accept": 'application/openmetrics-text; version="1.0.0"'}
    async with session.get(router.admin_url + "/metrics", headers=headers) as response:
        assert (response.status, response.content_type) == (200, "text/plain")


async def test_metrics_have_their_names(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    await router.push(
        route(alias, target("base", engine.url), target(CANDIDATE, engine.url), mirror=100),
        base_models=(BaseModelRoute(name="base-model", upstreams=(engine.url,)),),
    )
    for model in (alias, "base-model", "nobody"):
        async with session.post(router.url + CHAT, json=chat(model, stream=True)) as response:
            reply = await response.read()
    async with session.post(router.url + CHAT, json=chat(alias)) as response:
        reply_id = (await response.json())["id"]
    feedback = {"response_id": reply_id, "metric": "helpful", "value": 0.5}
    async with session.post(router.url + "/v1/feedback", json=feedback) as response:
        assert response.status == 201
    assert reply
    await asyncio.sleep(0.6)
    await router.counters()
    text = await router.metrics()
    for line in (
        f'adapter_router_requests_total{{alias="{alias}",arm="Stable",code="200",revision="base"}} 2.0',
        'adapter_router_requests_total{alias="base-model",arm="Base",code="200",revision="base"} ',
        'adapter_router_requests_total{alias="",arm="",code="404",revision=""} ',
        f'adapter_router_request_duration_seconds_count{{alias="{alias}",arm="Stable"}} 2.0',
        f'adapter_router_ttft_seconds_count{{alias="{alias}",arm="Stable"}} 2.0',
        f'adapter_router_tpot_seconds_count{{alias="{alias}",arm="Stable"}} 1.0',
        f'adapter_router_overhead_seconds_count{{alias="{alias}",arm="Stable"}} 2.0',
        f'adapter_router_output_invalid_total{{alias="{alias}",arm="Stable",kind="schema_invalid"}} 2.0',
        f'adapter_router_feedback_total{{alias="{alias}",arm="Stable",metric="helpful"}} 1.0',
        f'adapter_router_mirror_total{{alias="{alias}",outcome="answered"}} 2.0',
    ):
        assert line in text
