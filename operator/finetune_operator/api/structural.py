"""pydantic model -> structural schema of a CustomResourceDefinition, strictly.

A JSON schema that merely looks right is refused by the API server, or worse, taken and pruned in silence. So every key
and every shape that this module does not know raises NotStructuralError with the path of the field.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NoReturn

from pydantic import BaseModel

Schema = dict[str, Any]

# Keys that mean the same in pydantic's schema and in Kubernetes' JSONSchemaProps.
KEPT = frozenset(
    {
        "description",
        "enum",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "pattern",
        "required",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-map-type",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-validations",
    }
)
# Keys that are read here, or that say nothing to the API server.
HANDLED = frozenset(
    {
        "$defs",
        "$ref",
        "additionalProperties",
        "anyOf",
        "const",
        "default",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "properties",
        "title",
        "type",
    }
)
TYPES = frozenset({"object", "array", "string", "integer", "number", "boolean"})
NULL: Schema = {"type": "null"}
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]


class NotStructuralError(ValueError):
    """A schema that cannot be written as a structural schema; the message begins with the path of the field."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path or '.'}: {problem}")
        self.path = path


def structural_schema(model: type[BaseModel], *, defaults: bool = True) -> Schema:
    """Structural schema of `model`, by alias, with descriptions, bounds, CEL rules and (if `defaults`) whole defaults.

    Items of lists get no defaults, so whoever reads them fills in the model's. A status passes defaults=False:
    a default there would be a claim that nobody made.
    Raises NotStructuralError, with the path of the field, for everything that the API server would refuse or prune.
    """
    schema = model.model_json_schema(by_alias=True)
    converted = _Converter(schema.get("$defs", {}), defaults=defaults).convert(schema, "")
    _require_bounds(converted, "", under_rule=False)
    return converted


class _Converter:
    """Holds what stays the same during one conversion: the definitions and whether defaults are kept."""

    def __init__(self, definitions: dict[str, Schema], *, defaults: bool) -> None:
        self.definitions = definitions
        self.defaults = defaults
        self.open: list[str] = []  # definitions that are being inlined, to find recursion

    def convert(self, schema: Schema, path: str) -> Schema:
        if "$ref" in schema:
            return self._inline(schema, path)
        if "anyOf" in schema:
            return self._convert_union(schema, path)
        if unknown := sorted(set(schema) - KEPT - HANDLED):
            _refuse(path, f"{', '.join(unknown)} cannot be expressed in a structural schema")
        result = {key: value for key, value in schema.items() if key in KEPT}
        if "description" in result:
            result["description"] = " ".join(result["description"].split())
        self._convert_type(schema, result, path)
        _convert_bounds(schema, result, path)
        self._convert_default(schema, result, path)
        return result

    def _inline(self, schema: Schema, path: str) -> Schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        if name in self.open:
            _refuse(path, f"{name} contains itself")
        if name not in self.definitions:
            _refuse(path, f"{schema['$ref']} is not defined")
        self.open.append(name)
        result = self.convert(_merged(self.definitions[name], _without(schema, "$ref")), path)
        self.open.pop()
        return result

    def _convert_union(self, schema: Schema, path: str) -> Schema:
        rest = _without(schema, "anyOf")
        branches = [branch for branch in schema["anyOf"] if branch != NULL]
        if [{"type": branch.get("type")} for branch in branches] == INT_OR_STRING:
            if any(set(branch) != {"type"} for branch in branches):
                _refuse(path, "bounds of an int-or-string belong to the field, not to one of its types")
            return self.convert({"x-kubernetes-int-or-string": True, **rest}, path)
        if len(branches) != 1:
            _refuse(
                path, "a union of types is not structural; use one object with optional members and a rule"
            )
        return self.convert(_merged(branches[0], rest), path)

    def _convert_type(self, schema: Schema, result: Schema, path: str) -> None:
        if result.get("x-kubernetes-int-or-string"):
            return
        if "const" in schema:
            result["enum"] = [schema["const"]]
        kind = schema.get("type")
        if kind not in TYPES:
            _refuse(path, f"type {kind!r} is not structural" if kind else "has no type")
        result["type"] = kind
        match kind:
            case "object":
                self._convert_object(schema, result, path)
            case "array":
                if not isinstance(schema.get("items"), dict) or not schema["items"]:
                    _refuse(path, "a list must say what its items are")
                result["items"] = self._convert_items(schema["items"], path + "[]")
            case "integer":
                result["format"] = "int64"
            case "number":
                result["format"] = "double"
            case "string" if "format" in schema:
                if schema["format"] != "date-time":
                    _refuse(path, f"format {schema['format']!r} is not checked by the API server")
                result["format"] = "date-time"
        if any(value is None for value in result.get("enum", ())):
            _refuse(path, "an enum must not hold null; an absent field says the same")

    def _convert_items(self, schema: Schema, path: str) -> Schema:
        """Without defaults: kubectl apply and Argo CD compare lists as a whole and would see a change for ever."""
        kept, self.defaults = self.defaults, False
        result = self.convert(schema, path)
        self.defaults = kept
        return result

    def _convert_object(self, schema: Schema, result: Schema, path: str) -> None:
        properties = schema.get("properties")
        values = schema.get("additionalProperties")
        # False beside properties is dropped: unknown fields are pruned or refused anyway.
        if properties and values:
            _refuse(path, "properties and additionalProperties exclude each other")
        if properties:
            result["properties"] = {
                name: self.convert(child, f"{path}.{name}") for name, child in properties.items()
            }
        elif isinstance(values, dict) and values:
            result["additionalProperties"] = self.convert(values, path + ".*")
        elif (values is None or values is True) and not result.get("x-kubernetes-preserve-unknown-fields"):
            _refuse(path, "an object must say what its fields or values are")

    def _convert_default(self, schema: Schema, result: Schema, path: str) -> None:
        if not self.defaults or schema.get("default") is None:
            return  # absent and null are the same for an optional field
        default = _plain(schema["default"], path)
        result["default"] = _complete(default, result)


def _complete(default: Any, schema: Schema) -> Any:
    """`default` with the defaults of its fields, so that what the API server writes can be read in one place."""
    if not isinstance(default, dict) or "properties" not in schema:
        return default
    known = schema["properties"]
    written = {
        name: child["default"] for name, child in known.items() if "default" in child and name not in default
    }
    whole = {**default, **written}
    return {name: _complete(whole[name], known[name]) for name in known if name in whole}


def _convert_bounds(schema: Schema, result: Schema, path: str) -> None:
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive not in schema:
            continue
        if inclusive in schema:
            _refuse(path, f"{exclusive} and {inclusive} together are not structural")
        result[inclusive] = schema[exclusive]
        result[exclusive] = True


def _merged(base: Schema, over: Schema) -> Schema:
    """`base` as it is used in one place: what is said there wins, except rules, which add up."""
    key = "x-kubernetes-validations"
    both = [*base.get(key, ()), *over.get(key, ())]
    return {**base, **over, **({key: both} if both else {})}


def _plain(value: Any, path: str) -> Any:
    """`value` as JSON has it; whole floats become integers, as the API server would write them."""
    match value:
        case BaseModel():
            return _plain(value.model_dump(mode="json", by_alias=True, exclude_none=True), path)
        case Enum():
            return _plain(value.value, path)
        case dict():
            return {name: _plain(item, f"{path}.{name}") for name, item in value.items() if item is not None}
        case list():
            return [_plain(item, path + "[]") for item in value]
        case float() if value.is_integer():
            return int(value)
        case str() | bool() | int() | float():
            return value
        case _:
            raise NotStructuralError(path.removeprefix("."), f"default {value!r} is not JSON")


def _require_bounds(schema: Schema, path: str, *, under_rule: bool) -> None:
    """The API server estimates what a rule may cost from the bounds below it, and refuses the CRD without them."""
    under_rule = under_rule or "x-kubernetes-validations" in schema
    kind = schema.get("type")
    if under_rule:
        bounded = {"string": ("maxLength", "enum", "format"), "array": ("maxItems",)}.get(kind or "", ())
        if bounded and not any(key in schema for key in bounded):
            _refuse(path, f"is under a rule and needs {bounded[0]}")
        if "additionalProperties" in schema and "maxProperties" not in schema:
            _refuse(path, "is under a rule and needs maxProperties")
    for name, child in schema.get("properties", {}).items():
        _require_bounds(child, f"{path}.{name}", under_rule=under_rule)
    for key, suffix in (("items", "[]"), ("additionalProperties", ".*")):
        if key in schema:
            _require_bounds(schema[key], path + suffix, under_rule=under_rule)


def _without(schema: Schema, key: str) -> Schema:
    return {name: value for name, value in schema.items() if name != key}


def _refuse(path: str, problem: str) -> NoReturn:
    raise NotStructuralError(path.removeprefix("."), problem)
