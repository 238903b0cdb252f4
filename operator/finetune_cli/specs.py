"""Objects of files as the API server would judge them, without a cluster."""

from __future__ import annotations

import json
import re
from typing import Any

import typer
from pydantic import BaseModel, ValidationError

from finetune_cli import crd_rules, files, shared
from finetune_cli.kinds import Kind


def read_spec(file: str, kind: Kind, one: dict[str, Any]) -> Any:
    """The spec, of the kind's model and with its defaults; ends the command where the object is not valid."""
    if problems := find_problems(kind, one):
        shared.print_verdict(file, kind, one, problems)
        raise typer.Exit(shared.INVALID)
    return parse(kind, one.get("spec"))


def parse(kind: Kind, spec: Any) -> BaseModel:
    """A spec as strictly as the API server reads it. Raises pydantic.ValidationError."""
    # Strict JSON: "3" is no number for the API server either. By the names of the wire only: it knows no others.
    return kind.spec.model_validate_json(_json(spec), strict=True, by_alias=True, by_name=False)


def find_problems(kind: Kind, one: dict[str, Any]) -> list[str]:
    """One line for each problem; empty: the API server would create the object, as far as the object alone can tell."""
    if wrong := files.explain_version(one):
        return [wrong]
    meta = one.get("metadata") or {}
    name = meta.get("name") or (f"{meta['generateName']}xxxxx" if meta.get("generateName") else "")
    if not name:
        return ["metadata.name: Required value: name or generateName is required"]
    spec, problems = one.get("spec"), []
    try:
        parse(kind, spec)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [_explain(problem, kind) for problem in found]
        # The rules take names, types and bounds for granted.
        if any(problem["type"] != "extra_forbidden" for problem in found):
            return problems
    body = {"metadata": {"name": str(name)}, "spec": json.loads(_json(spec))}
    return problems + _explain_name(str(name)) + crd_rules.broken_rules(kind, body)


def _explain_name(name: str) -> list[str]:
    if re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
        return []
    return [
        f"metadata.name: \"{name}\": must be lower-case letters, digits, '-' and '.', as in DNS (RFC 1123)"
    ]


def name_of(one: dict[str, Any]) -> str:
    """The object's name, or nothing."""
    return (one.get("metadata") or {}).get("name") or ""


def _json(spec: Any) -> str:
    return json.dumps(_whole(spec), default=str)


def _whole(value: Any) -> Any:
    """2e3 and 3.0 are whole numbers for kubectl."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _explain(problem: Any, kind: Kind) -> str:
    parts = [
        part for part in problem["loc"] if not str(part).startswith("constrained-")
    ]  # pydantic's, of a union
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    if problem["type"] == "extra_forbidden":
        return files.explain_unknown(path, kind)
    given = problem["input"]
    value = f"{json.dumps(given)}: " if isinstance(given, str | int | float) else ""
    return f"{path}: {value}{problem['msg']}"
