"""Tables from changes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from finetune_operator.api.routes import BaseModelRoute, Route, Signal, SignalEvent, Target
from finetune_router import choices
from finetune_router.counters import STABLE_BIT, Book
from finetune_router.errors import ApiError
from finetune_router.tables import Change, SchemaCache, TableBuilder, Watch
from finetune_router.upstreams import Upstreams, parse_address

ENGINE = "http://127.0.0.1:8000"


def document(alias: str, **more: Any) -> dict[str, Any]:
    stable = Target(revision="base", served_name="base-model", upstreams=(ENGINE,))
    route = Route(alias=alias, owner="a/b/c", **{"stable": stable, **more})
    dumped: dict[str, Any] = route.model_dump(mode="json", by_alias=True)
    return dumped


def change(version: int, *changed: dict[str, Any], removed: tuple[str, ...] = (), base: str = "") -> Change:
    bases = [BaseModelRoute(name=base, upstreams=(ENGINE,)).model_dump(by_alias=True)] if base else []
    return Change(version=version, changed=list(changed), removed=list(removed), base_models=bases)


@pytest.fixture
def builder() -> TableBuilder:
    return TableBuilder(upstreams=Upstreams(), book=Book(), schemas=SchemaCache())


async def test_what_did_not_change_stays_the_same_object(builder: TableBuilder) -> None:
    first = await builder.build(change(1, document("a"), document("b"), base="base-model"))
    second = await builder.build(change(2, document("b", weight=10.0), document("c"), removed=("x",)))
    assert second.find("a") is first.find("a")
    assert second.find("b") is not first.find("b")
    assert second.version == 2
    assert first.find("c") is None, "a table that requests work with must not change"
    assert first.find("base-model") is not None
    assert second.find("base-model") is None
    third = await builder.build(change(3, removed=("a", "b")))
    assert [model["id"] for model in json.loads(third.models)["data"]] == ["c"]


async def test_counters_go_on_over_tables(builder: TableBuilder) -> None:
    canary = {"revision": "ab12cd34", "servedName": "a--ab12cd34", "upstreams": (ENGINE,)}
    compared = {"candidate": Target.model_validate(canary), "comparison": "c1"}
    first = (await builder.build(change(1, document("a", **compared)))).find("a")
    second = (await builder.build(change(2, document("a", weight=5.0, **compared)))).find("a")
    assert first is not None
    assert second is not None
    assert first.stable is not None
    assert second.stable is not None
    assert first.stable.state is second.stable.state
    assert first.sample is second.sample
    third = (await builder.build(change(3, document("a", **{**compared, "comparison": "other"})))).find("a")
    assert third is not None
    assert third.sample is not second.sample


@pytest.mark.parametrize("more", [{}, {"comparison": "c1"}, {"candidate": "ab12cd34"}])
async def test_no_keys_are_sampled_where_nothing_is_compared(more: dict[str, Any]) -> None:
    """A thousand aliases at rest had cost the router, and the operator that asks it, 17 MB a worker."""
    book = Book()
    builder = TableBuilder(upstreams=Upstreams(), book=book, schemas=SchemaCache())
    candidate = Target(revision="ab12cd34", served_name="a--ab12cd34", upstreams=(ENGINE,))
    whole = {"candidate": candidate, "comparison": "c1"}
    first = (await builder.build(change(1, document("a", **whole)))).find("a")
    assert first is not None
    assert first.sample is not None
    if "candidate" in more:
        more = {"candidate": candidate}
    second = (await builder.build(change(2, document("a", **more)))).find("a")
    assert second is not None
    assert second.sample is None
    first.sample.add(1, STABLE_BIT)  # by a request that is still under way
    book.changed_samples.add(first.sample)
    assert [sample for part in book.take_reports() for sample in part.samples] == []


async def test_a_document_of_no_use_changes_nothing(builder: TableBuilder) -> None:
    await builder.build(change(1, document("a")))
    for broken in (
        {"alias": "b"},
        document("b") | {"weight": 101},
        document("b") | {"stable": {"upstreams": ["x"]}},
    ):
        with pytest.raises(ValueError, match=r"validation error|is no http"):
            await builder.build(change(2, broken, removed=("a",)))
    assert (await builder.build(change(2))).find("a") is not None


async def test_an_alias_wins_over_a_base_model_of_the_same_name(builder: TableBuilder) -> None:
    table = await builder.build(change(1, document("a"), base="a"))
    route = table.find("a")
    assert route is not None
    assert not route.is_base
    assert len(json.loads(table.models)["data"]) == 1


async def test_requests_have_their_turn_while_a_thousand_routes_are_built(builder: TableBuilder) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await builder.build(change(1, *(document(f"bot-{number}") for number in range(1000))))
    counting.cancel()
    assert turns >= 40


async def test_a_route_without_engines_is_not_ready_and_not_listed(builder: TableBuilder) -> None:
    empty = Target(revision="base", served_name="base-model", upstreams=())
    table = await builder.build(change(1, document("a", stable=None), document("b", stable=empty)))
    assert json.loads(table.models)["data"] == []
    for name in ("a", "b"):
        route = table.find(name)
        assert route is not None
        with pytest.raises(ApiError) as caught:
            choices.choose(route, {}, {}, "")
        assert caught.value.status == 503


def test_signals_by_what_makes_them_fire() -> None:
    watch = Watch.build(
        (
            Signal(name="e", event=SignalEvent.ERROR),
            Signal(name="t", event=SignalEvent.TTFT_OVER, threshold=2),
            Signal(name="no-threshold", event=SignalEvent.TTFT_OVER),
            Signal(name="s", event=SignalEvent.SCHEMA_INVALID),
        )
    )
    assert (watch.errors, watch.ttft, watch.latency) == (("e",), (("t", 2.0),), ())
    assert watch.outputs == (("s", SignalEvent.SCHEMA_INVALID),)


@pytest.mark.parametrize(
    ("url", "host_header", "prefix"),
    [
        ("http://10.0.0.7:8000", "10.0.0.7:8000", ""),
        ("http://engine", "engine", ""),
        ("https://engine/v2/", "engine", "/v2"),
        ("http://[::1]:80/", "[::1]", ""),
    ],
)
def test_addresses(url: str, host_header: str, prefix: str) -> None:
    address = parse_address(url)
    assert (address.host_header, address.prefix) == (host_header, prefix)


@pytest.mark.parametrize("url", ["", "engine:8000", "ftp://engine", "http://", "http://engine:port"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"is no http|Port could not"):
        parse_address(url)
