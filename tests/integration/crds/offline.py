"""What the command line says of an object without a cluster, held against a refusal of the real API server."""

from __future__ import annotations

import json
from typing import Any

from kubernetes.client import ApiException
from pydantic import ValidationError

from finetune_cli import files, specs
from finetune_cli.kinds import Kind


def same_refusal(refusal: ApiException, kind: Kind, body: dict[str, Any]) -> None:
    """Refused as well, for the same fields; and in the same words where names, types and bounds are right."""
    lines = files.explain_refusal(json.loads(refusal.body), kind)
    there = [line for line in lines if line.startswith(("spec", "metadata"))]  # others are notes
    here = specs.find_problems(kind, body)
    try:
        kind.spec.model_validate_json(json.dumps(body.get("spec")), strict=True, by_alias=True, by_name=False)
    except ValidationError:  # pydantic has words of its own, and the rules are not looked at
        assert here
        assert {_field(line) for line in here} <= {_field(line) for line in there}
    else:
        assert here == there


def _field(line: str) -> str:
    return line.partition(": ")[0]
