"""Reference page of each resource, from its CRD.

`python -m finetune_operator.api.reference --write [DIR]` (or --check [DIR]).
DIR is docs/reference below the current folder unless given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_operator.api import crds

Schema = dict[str, Any]


def render_references() -> dict[str, str]:
    """File name -> Markdown text of each resource's page."""
    return {f"{crd['spec']['names']['singular']}.md": _render(crd) for crd in crds.build_crds()}


def _render(crd: Schema) -> str:
    names = crd["spec"]["names"]
    version = crd["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    lines = [
        "<!-- Generated from operator/finetune_operator/api by `make crds`; do not edit. -->",
        f"# {names['kind']}",
        "",
        f"`{crd['spec']['group']}/{version['name']}`, {crd['spec']['scope'].lower()}. "
        f"Names for kubectl: `{names['plural']}`, `{names['singular']}`, `{', '.join(names['shortNames'])}`; "
        f"category `{', '.join(names['categories'])}`. "
        f"The same text for one field: `kubectl explain {names['shortNames'][0]}.spec.{_first_object(root)}`.",
        "",
        *_describe_root(root["description"]),
        "",
        *_list_rules("", root),
        "",
    ]
    for part in ("spec", "status"):
        for path, schema in _objects(part, root["properties"][part]):
            lines += _describe_object(path, schema)
    lines += ["## Columns of `kubectl get`", ""]
    for column in version["additionalPrinterColumns"]:
        wide = " (with `-o wide`)" if column.get("priority") else ""
        lines.append(f"* {column['name']}: `{column['jsonPath']}`{wide}")
    return "\n".join(lines) + "\n"


def _first_object(root: Schema) -> str:
    fields: dict[str, Schema] = root["properties"]["spec"]["properties"]
    return next(name for name, field in fields.items() if "properties" in field)


def _describe_root(text: str) -> list[str]:
    """The indented lines are the example; Markdown wants a fence around it."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line.startswith(" ") != inside and (line or inside):
            lines.append("```" if inside else "```yaml")
            inside = not inside
        lines.append(line[2:] if inside else line)
    return lines


def _objects(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every object with fields, the outer one first."""
    if "properties" in schema:
        yield path, schema
        for name, child in schema["properties"].items():
            yield from _objects(f"{path}.{name}", child)
    elif "items" in schema:
        yield from _objects(path + "[]", schema["items"])


def _describe_object(path: str, schema: Schema) -> list[str]:
    needed = schema.get("required", ())
    lines = [
        f"## {path}",
        "",
        schema.get("description", ""),
        "",
        "| field | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, child in schema["properties"].items():
        default = "**required**" if name in needed else _default(child)
        meaning = _cell(child["description"])
        lines.append(f"| `{name}` | {_cell(_type(child))} | {default} | {meaning} |")
    lines += ["", *_list_rules(path, schema)]
    for name, child in schema["properties"].items():
        if "properties" not in child and "items" not in child:
            lines += _list_rules(f"{path}.{name}", child)
        elif "items" in child:
            lines += _list_rules(f"{path}.{name}", child)
            if "properties" not in child["items"]:
                lines += _list_rules(f"{path}.{name}[]", child["items"])
    return [*lines, ""] if lines[-1] else lines


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return ""
    if isinstance(schema["default"], dict):
        return "see there"
    return f"`{json.dumps(schema['default']).strip(chr(34))}`"


def _type(schema: Schema) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity" if "isQuantity" in json.dumps(schema) else "integer or text"
    match schema["type"]:
        case "array":
            return "list of " + _type(schema["items"])
        case "object" if "additionalProperties" in schema:
            return "map to " + _type(schema["additionalProperties"])
        case "string" if "enum" in schema:
            return " or ".join(f"`{value}`" for value in schema["enum"])
        case "string" if schema.get("format") == "date-time":
            return "time (RFC 3339)"
        case "string":
            return f"text, at most {schema['maxLength']} characters"
        case "integer" | "number" as kind:
            return f"{kind}{_range(schema)}"
    return str(schema["type"])


def _range(schema: Schema) -> str:
    parts = []
    if "minimum" in schema:
        parts.append(("above " if schema.get("exclusiveMinimum") else "from ") + f"{schema['minimum']:g}")
    if "maximum" in schema:
        word = "below " if schema.get("exclusiveMaximum") else "to "
        parts.append(word + f"{schema['maximum']:.10g}")
    return "".join(f" {part}" for part in parts)


def _list_rules(path: str, schema: Schema) -> list[str]:
    rules = schema.get("x-kubernetes-validations", ())
    return [
        f"* `{path}{rule.get('fieldPath', '')}`: {rule['message']}".replace("``", "`.`") for rule in rules
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(crds.run(render_references(), folder=Path("docs/reference"), description=__doc__ or ""))
