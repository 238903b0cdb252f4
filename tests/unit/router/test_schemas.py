"""Schemas of clients: which are applied."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_router.schemas import MOST_SUBSCHEMAS, is_bounded
from finetune_router.tables import SchemaCache


def doubling(levels: int) -> dict[str, Any]:
    """Each definition names the next one twice."""
    definitions = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": {**definitions, f"d{levels}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": "object", "properties": {"a": {"type": "string"}, "$ref": {"type": "string"}}},
        {"$defs": {"a/b": {"type": "integer"}}, "items": {"$ref": "#/$defs/a~1b"}},
        {"$defs": {"a b": {"type": "integer"}}, "items": {"$ref": "#/$defs/a%20b"}},
        {"allOf": [{"type": "integer"}], "items": {"$ref": "#/allOf/0"}},
        {"properties": {"id": {"type": "string"}}},
        {"$id": "http://example.com/a", "$defs": {"b": {}}, "items": {"$ref": "#/$defs/b"}},
        {"enum": list(range(10_000))},
        doubling(5),
    ],
)
def test_ordinary_schemas_are_applied(schema: object) -> None:
    assert is_bounded(schema)


@pytest.mark.parametrize(
    "schema",
    [
        doubling(30),
        {"$ref": "#"},
        {"items": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}},
        {"$ref": "#/allOf/7", "allOf": [{}]},
        {"$ref": "#/nothing"},
        {"$ref": "#anchor"},
        {"$ref": "http://example.com/schema"},
        {"$dynamicAnchor": "a", "items": {"$dynamicRef": "#a"}},
        {"items": {"$recursiveRef": "#"}},
        {"$id": "http://a/", "$defs": {"b": {"$id": "http://b/", "$ref": "#/$defs/c"}}},
        {"allOf": [{}] * MOST_SUBSCHEMAS},
    ],
)
def test_what_may_be_endless_is_not(schema: object) -> None:
    assert not is_bounded(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": r"^\p{L}[\p{L}\p{N} ]*$"},
        {"pattern": r"^(?=.*[A-Z])(?=.*\d).{8,64}$"},
        {
            "properties": {
                f"id{n}": {"pattern": f"^{n}-[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}$"} for n in range(50)
            }
        },
        {"properties": {"pattern": {"type": "string"}, "patternProperties": {"type": "object"}}},
    ],
)
def test_ordinary_patterns_are_applied(schema: object) -> None:
    assert SchemaCache().get(schema, is_clients=True) is not None


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"pattern": rf"^\p{{L}}{{100}}{n}"} for n in range(20)]},
        {"patternProperties": {rf"^\p{{L}}{{100}}{n}": True for n in range(20)}},
        {"$defs": {"a": {"pattern": r"^\p{L}{100}"}}, "$ref": "#/$defs/a"},
        {"pattern": "|".join(rf"\p{{L}}{{40}}{n}(?=b)" for n in range(20))},
    ],
)
def test_patterns_that_take_much_are_not(schema: object) -> None:
    """A thousand of them, which is 32 KB, took 40 seconds and five gigabytes of a worker."""
    cache = SchemaCache()
    assert cache.get(schema) is not None  # of a route
    assert cache.get(schema, is_clients=True) is None


def test_few_schemas_of_clients_are_kept_and_those_of_routes_stay() -> None:
    """256 of the largest were half a gigabyte of a worker."""
    cache = SchemaCache()
    of_route = cache.get({"maxLength": 1})
    first = cache.get({"maxLength": 1}, is_clients=True)
    for length in range(2, 33):
        cache.get({"maxLength": length}, is_clients=True)
    assert cache.get({"maxLength": 1}, is_clients=True) is first
    cache.get({"maxLength": 33}, is_clients=True)
    assert cache.get({"maxLength": 1}, is_clients=True) is not first
    assert cache.get({"maxLength": 1}) is of_route
