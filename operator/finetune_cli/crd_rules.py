"""The rules of the CRDs (x-kubernetes-validations in CEL, keys of lists), judged without an API server. Pure."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from finetune_cli.kinds import Kind
from finetune_operator.api import crds, rules
from finetune_operator.api.structural import Schema


def broken_rules(kind: Kind, body: dict[str, Any]) -> list[str]:
    """One line for each rule that an object of valid names, types and bounds breaks, in the API server's words.

    Rules about a change of what is stored (`oldSelf`) are left out, as when an object is created.
    """
    schema = crds.schema_of(kind.name)
    lines = _broken(schema, _as_stored(schema, body), "")
    return sorted({line.removeprefix(".") for line in lines})


def _as_stored(schema: Schema, value: Any) -> Any:
    """What the API server would judge: with defaults, without nulls, and with numbers of the schema's type."""
    match value:
        case dict():
            known = schema.get("properties", {})
            others = schema.get("additionalProperties", {})
            defaults = {name: part["default"] for name, part in known.items() if "default" in part}
            given = {name: part for name, part in value.items() if part is not None}
            return {
                name: _as_stored(known.get(name, others), part) for name, part in (defaults | given).items()
            }
        case list():
            return [_as_stored(schema["items"], part) for part in value] if "items" in schema else value
        case int() | float() if schema.get("type") == "number":
            return float(value)
    return value


def _broken(schema: Schema, value: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _evaluate(rule["rule"], value):
            yield f"{path}{rule.get('fieldPath', '')}: {_explain(rule, value)}"
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, part in value.items():
            yield from _broken(known.get(name, others), part, f"{path}.{name}")
    elif isinstance(value, list):
        seen = []
        for number, part in enumerate(value):
            keys = {key: part.get(key) for key in schema.get("x-kubernetes-list-map-keys", ())}
            if keys and keys in seen:
                yield f"{path}[{number}]: Duplicate value: {json.dumps(keys, separators=(',', ':'))}"
            seen.append(keys)
            yield from _broken(schema.get("items", {}), part, f"{path}[{number}]")


def _explain(rule: dict[str, str], value: Any) -> str:
    expression = rule.get("messageExpression")
    message = _evaluate(expression, value) if expression else rule["message"]
    match rule.get("reason"):
        case rules.FORBIDDEN:
            return f"Forbidden: {message}"
        case rules.REQUIRED:
            return f"Required value: {message}"
    if isinstance(value, dict | list):
        return str(message)
    return f"{json.dumps(value, ensure_ascii=False)}: {message}"


def _evaluate(expression: str, value: Any) -> Any:
    import cel

    context = cel.Context()
    context.add_variable("self", value)
    # Kubernetes' own functions: https://kubernetes.io/docs/reference/using-api/cel/
    context.add_function("lowerAscii", str.lower)
    context.add_function("isQuantity", lambda text: _quantity(text) is not None)
    context.add_function("quantity", _quantity)
    context.add_function("compareTo", lambda one, other: (one > other) - (one < other))
    return _compiled(expression).execute(context)


@functools.cache
def _compiled(expression: str) -> Any:
    import cel

    return cel.compile(expression)


def _quantity(text: str) -> Decimal | None:
    from kubernetes.utils.quantity import parse_quantity

    try:
        amount: Decimal = parse_quantity(text)
    except ValueError:
        return None
    return amount
