"""The converter: what becomes of each shape of pydantic's schema, and which shapes are refused with their path."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, create_model

from finetune_operator.api.rules import rule, rules
from finetune_operator.api.structural import NotStructuralError, structural_schema


class Colour(StrEnum):
    RED = "Red"
    BLUE = "Blue"


class Inner(BaseModel):
    """An inner object."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=rules(rule("self.size > 0", "of the class")))

    size: Annotated[int, Field(ge=1, lt=10)] = 3
    note: Annotated[str, Field(max_length=5)] | None = None


def convert_field(annotation: Any, *, default: Any = ...) -> dict[str, Any]:
    model = create_model("Outer", field=(annotation, default))
    field: dict[str, Any] = structural_schema(model)["properties"]["field"]
    return field


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, {"type": "integer", "format": "int64"}),
        (float, {"type": "number", "format": "double"}),
        (bool, {"type": "boolean"}),
        (datetime, {"type": "string", "format": "date-time"}),
        (Literal["a"], {"type": "string", "enum": ["a"]}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Colour, {"type": "string", "enum": ["Red", "Blue"]}),
        (int | str, {"x-kubernetes-int-or-string": True}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer", "format": "int64"}}),
        (list[bool], {"type": "array", "items": {"type": "boolean"}}),
        (Annotated[str, Field(pattern="^a$")], {"type": "string", "pattern": "^a$"}),
        (
            Annotated[float, Field(gt=0, le=1)],
            {"type": "number", "format": "double", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
        ),
    ],
)
def test_types_become_structural(annotation: Any, expected: dict[str, Any]) -> None:
    assert convert_field(annotation) == expected


def test_optional_is_absent_not_null() -> None:
    schema = structural_schema(create_model("Outer", field=(int | None, None), needed=(int, ...)))
    assert schema["properties"]["field"] == {"type": "integer", "format": "int64"}
    assert schema["required"] == ["needed"]


def test_references_are_inlined_and_titles_and_closed_objects_are_dropped() -> None:
    inner = convert_field(Inner)
    assert inner["properties"]["size"] == {
        "type": "integer",
        "format": "int64",
        "minimum": 1,
        "maximum": 10,
        "exclusiveMaximum": True,
        "default": 3,
    }
    assert "additionalProperties" not in inner
    assert "title" not in inner


def test_field_documentation_wins_over_the_class() -> None:
    documented = Annotated[Inner, Field(description="Of the\n    field.")]
    assert convert_field(documented)["description"] == "Of the field."
    assert convert_field(Inner)["description"] == "An inner object."


def test_rules_of_class_and_field_add_up() -> None:
    field = Annotated[Inner, Field(json_schema_extra=rules(rule("true", "of the field")))]
    messages = [item["message"] for item in convert_field(field)["x-kubernetes-validations"]]
    assert messages == ["of the class", "of the field"]


@pytest.mark.parametrize(
    ("annotation", "default", "expected"),
    [
        (Colour, Colour.RED, "Red"),
        (float, 2.0, 2),
        (bool, False, False),
        (list[Colour], [Colour.BLUE], ["Blue"]),
        (Inner, Inner(note="x"), {"size": 3, "note": "x"}),
        (Inner, {}, {"size": 3}),
    ],
)
def test_defaults_are_whole_and_plain(annotation: Any, default: Any, expected: Any) -> None:
    field = Annotated[annotation, Field(max_length=3)] if annotation == list[Colour] else annotation
    result = convert_field(field, default=default)["default"]
    assert result == expected
    assert type(result) is type(expected)


def test_status_has_no_defaults() -> None:
    assert "default" not in structural_schema(Inner, defaults=False)["properties"]["size"]


def test_items_of_lists_have_no_defaults() -> None:
    items = convert_field(list[Inner], default=[])["items"]
    assert "default" not in items["properties"]["size"]
    assert convert_field(Inner, default={})["properties"]["size"]["default"] == 3


class Recursive(BaseModel):
    child: Recursive | None = None


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class OpenObject(BaseModel):
    model_config = ConfigDict(extra="allow")


class Both(BaseModel):
    __pydantic_extra__: dict[str, int]
    model_config = ConfigDict(extra="allow")
    known: int


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        (int | bool, "union"),
        (int | float, "union"),
        (Cat | Dog, "union"),
        (Annotated[Cat | Dog, Field(discriminator="kind")], "discriminator, oneOf"),
        (Annotated[int, Field(ge=1)] | str, "bounds of an int-or-string"),
        (tuple[int, str], "prefixItems"),
        (set[int], "uniqueItems"),
        (Any, "has no type"),
        (None, "'null' is not structural"),
        (Annotated[str, Field(json_schema_extra={"enum": ["a", None]})], "enum must not hold null"),
        (Literal["a", 1], "has no type"),
        (list[Any], "what its items are"),
        (dict[str, Any], "fields or values"),
        (dict[Annotated[str, Field(pattern="^a")], int], "patternProperties"),
        (dict[Colour, int], "propertyNames"),
        (OpenObject, "fields or values"),
        (Both, "exclude each other"),
        (Recursive, "contains itself"),
        (UUID, "format 'uuid'"),
        (timedelta, "format 'duration'"),
        (Annotated[str, Field(examples=["a"])], "examples"),
        (Annotated[str, Field(deprecated=True)], "deprecated"),
        (Annotated[int, Field(json_schema_extra={"allOf": [{"minimum": 1}]})], "allOf"),
        (Annotated[int, Field(json_schema_extra={"not": {"minimum": 1}})], "not"),
        (Annotated[int, Field(ge=1, gt=0)], "together"),
        (Annotated[str, Field(json_schema_extra=rules(rule("true", "m")))], "needs maxLength"),
        (Annotated[list[bool], Field(json_schema_extra=rules(rule("true", "m")))], "needs maxItems"),
        (
            Annotated[dict[str, bool], Field(json_schema_extra=rules(rule("true", "m")))],
            "needs maxProperties",
        ),
    ],
)
def test_everything_else_is_refused_with_its_path(annotation: Any, problem: str) -> None:
    with pytest.raises(NotStructuralError) as caught:
        convert_field(annotation)
    assert caught.value.path.startswith("field")
    assert problem in str(caught.value)


def test_path_leads_to_the_field() -> None:
    deep = create_model("Deep", values=(list[set[int]], ...))
    with pytest.raises(NotStructuralError, match=r"^outer\.\*\.values\[\]: uniqueItems"):
        structural_schema(create_model("Outer", outer=(dict[str, deep], ...)))


def test_bounds_are_required_below_a_rule_at_any_depth() -> None:
    class Free(BaseModel):
        text: str

    class Ruled(BaseModel):
        model_config = ConfigDict(json_schema_extra=rules(rule("true", "m")))
        items: Annotated[list[Free], Field(max_length=3)]

    with pytest.raises(NotStructuralError, match=r"^items\[\]\.text: is under a rule and needs maxLength"):
        structural_schema(Ruled)
