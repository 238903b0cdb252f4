"""Specs of files as the planning commands read them: without a cluster, and as strictly as the API server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from finetune_cli import files, shared
from finetune_cli.kinds import Kind

Spec = TypeVar("Spec", bound=BaseModel)


def read_spec(file: str, kind: Kind, model: type[Spec], one: dict[str, Any]) -> Spec:
    """The spec with its defaults; ends the command when types, names or bounds are wrong."""
    # Strict JSON: "3" is no number for the API server either. By the names of the wire only: it knows no others.
    text = json.dumps(_whole(one.get("spec")), default=str)
    try:
        return model.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        refuse(file, kind, one, [_explain(problem, kind) for problem in error.errors(include_url=False)])


def refuse(file: str, kind: Kind, one: dict[str, Any], problems: Sequence[str]) -> NoReturn:
    """Print what is wrong with an object, and end the command."""
    typer.echo(f"{file}: {kind.name} {name_of(one)}: not valid")
    for problem in problems:
        typer.echo(f"  {problem}")
    raise typer.Exit(shared.INVALID)


def name_of(one: dict[str, Any]) -> str:
    """The object's name, or nothing."""
    return (one.get("metadata") or {}).get("name") or ""


def _whole(value: Any) -> Any:
    """2e3 and 3.0 are whole numbers for kubectl."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _explain(problem: Any, kind: Kind) -> str:
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return files.explain_unknown(path, kind)
    given = problem["input"]
    value = f"{json.dumps(given)}: " if isinstance(given, str | int | float) else ""
    return f"{path}: {value}{problem['msg']}"
