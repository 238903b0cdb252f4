"""Schemas of clients: which are applied."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_router.schemas import MOST_SUBSCHEMAS, is_bounded


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
