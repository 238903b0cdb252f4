"""Helm for tests: renders the chart and says what it refuses."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml

from finetune_local import binaries
from tests.clients import Json
from tools.chart_pages import CHART, NAME, NAMESPACE, ROOT


class HelmError(Exception):
    """Helm refused; the text is its standard error."""


@functools.cache
def program() -> Path:
    """Helm, built or downloaded once."""
    sources = binaries.Sources.from_environment()
    return binaries.obtain(["helm"], sources=sources, announce=print).programs["helm"]


def helm(*arguments: str, values: Json | None = None, environment: dict[str, str] | None = None) -> str:
    """Standard output. Raises HelmError."""
    more = ["--values", "-"] if values is not None else []
    done = subprocess.run(
        [str(program()), *arguments, *more],
        input=yaml.safe_dump(values) if values is not None else None,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        raise HelmError(done.stderr.strip())
    return done.stdout


def render(values: Json | None = None, *, namespace: str = NAMESPACE, release: str = NAME) -> list[Json]:
    """The chart's objects. Raises HelmError."""
    text = helm("template", release, str(ROOT / CHART), f"--namespace={namespace}", values=values or {})
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(documents: list[Json], kind: str) -> list[Json]:
    return [document for document in documents if document["kind"] == kind]


def one(documents: list[Json], kind: str, name: str) -> Any:
    (found,) = [d for d in of_kind(documents, kind) if d["metadata"]["name"] == name]
    return found
