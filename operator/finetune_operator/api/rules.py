"""CEL rules (x-kubernetes-validations) and the field types that carry them.

A rule stands beside the field that it is about, so the model is the one place that says what is valid. The API server
puts the path of the field and its value in front of the message; a message therefore says what is wrong and what
to do, and repeats neither.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

NAMESPACE = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # its name, a DNS label (RFC 1123)
FORBIDDEN = "FieldValueForbidden"  # the field must not be there; its value is not printed
REQUIRED = "FieldValueRequired"


def rule(expression: str, message: str, **more: str) -> dict[str, str]:
    """One CEL rule. `message` is what the user reads when `expression` is false. `more` are the API's own keys:
    messageExpression (CEL, replaces the message), fieldPath, reason. The API server refuses a
    messageExpression that joins numbers: it cannot bound the size of string(number)."""
    return {"rule": expression, "message": message, **more}


def rules(*items: dict[str, str]) -> dict[str, Any]:
    """`json_schema_extra` of a field or model that must keep the rules."""
    return {"x-kubernetes-validations": list(items)}


def read_as(pattern: str, message: str) -> AfterValidator:
    """The operator's own look at a text that it computes with: the API server lets through what was stored before there
    was a rule. No part of the schema."""

    def checked(text: str) -> str:
        if text and re.fullmatch(pattern, text, re.ASCII):
            return text
        raise PydanticCustomError("rule", "{message}", {"message": message})

    return AfterValidator(checked)


def keyed_list(key: str) -> dict[str, Any]:
    """`json_schema_extra` of a list whose items are told apart by `key`."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def quote(text: str) -> str:
    """`text` as a CEL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def one_of(names: list[str]) -> str:
    """`names` as a CEL list."""
    return "[" + ", ".join(quote(name) for name in names) + "]"


QUANTITY_MESSAGE = "must be a Kubernetes quantity such as 2, 500m or 8Gi"
QUANTITY_TEXT = read_as(
    r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)([KMGTPE]i|[mkMGTPE]|[eE]\+?[0-9]{1,2})?", QUANTITY_MESSAGE
)
"""Without what no amount within the bounds needs: a minus, nano and micro."""


def _quantity_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def quantity_schema(*, smallest: str, largest: str, message: str) -> WithJsonSchema:
    """Schema of a Kubernetes quantity within bounds. Like Kubernetes itself it takes `cpu: 2` as well as `cpu:
    "2"`."""
    value = "quantity(string(self))"
    return WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 32,
            **rules(
                rule("isQuantity(string(self))", QUANTITY_MESSAGE),
                rule(
                    f"!isQuantity(string(self)) || ({value}.compareTo(quantity({quote(smallest)})) >= 0 "
                    f"&& {value}.compareTo(quantity({quote(largest)})) <= 0)",
                    message,
                ),
            ),
        }
    )


CpuQuantity = Annotated[
    str,
    BeforeValidator(_quantity_text),
    Field(max_length=32),
    QUANTITY_TEXT,
    quantity_schema(
        smallest="10m",
        largest="1024",
        message="must be an amount of CPU from 10m to 1024, for example 2 (cores) or 500m (half a core)",
    ),
]
MemoryQuantity = Annotated[
    str,
    BeforeValidator(_quantity_text),
    Field(max_length=32),
    QUANTITY_TEXT,
    quantity_schema(
        smallest="64Mi",
        largest="64Ti",
        message="must be an amount of memory from 64Mi to 64Ti with its unit, for example 8Gi (8 alone is 8 bytes)",
    ),
]

DnsName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        json_schema_extra=rules(
            rule(
                "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
                "must be the name of an object: lower-case letters, digits, '-' and '.', for example hf-token",
            )
        ),
    ),
]

PART_NAME = rule(
    "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
    "must have lower-case letters, digits and '-' only, for example invalid-output",
)
PartName = Annotated[str, Field(min_length=1, max_length=63, json_schema_extra=rules(PART_NAME))]
