"""Objects that the real API server refuses, and what the command line says of them without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from kubernetes.client import ApiException
from pydantic import ValidationError

from finetune_cli import files, specs
from finetune_cli.kinds import Kind


def assert_refused(
    create: Callable[..., Any], kind: Kind, body: dict[str, Any], words: Sequence[str]
) -> None:
    """The API server refuses the object with these words, and the command line does as well."""
    with pytest.raises(ApiException) as caught:
        create(body)
    assert caught.value.status in (400, 422)
    message = json.loads(caught.value.body)["message"]
    assert "no such key" not in message, "a rule reads a field that may be absent"
    for word in words:
        assert word in message, message
    _assert_same(caught.value, kind, body)


def _assert_same(refusal: ApiException, kind: Kind, body: dict[str, Any]) -> None:
    """For the same fields, and in the same words where names, types and bounds are right."""
    lines = files.explain_refusal(json.loads(refusal.body), kind)
    there = [line for line in lines if line.startswith(("spec", "metadata"))]  # others are notes
    here = specs.find_problems(kind, body)
    try:
        specs.parse(kind, body.get("spec"))
    except ValidationError:  # pydantic has words of its own, and the rules are not looked at
        assert here
        assert {_field(line) for line in here} <= {_field(line) for line in there}
    else:
        assert here == there


def _field(line: str) -> str:
    return line.partition(": ")[0]
