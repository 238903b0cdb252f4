"""Files with objects of ours, and the API server's refusals in plain words. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from finetune_cli.kinds import Kind
from finetune_operator.api import crds
from finetune_operator.api.base import API_VERSION


class UnreadableFileError(ValueError):
    """A file that is no YAML, or holds none of the kind; the message says where and what."""


class _Loader(yaml.SafeLoader):
    """Reads numbers as kubectl does: 2e-4 is a number there, and a text for YAML 1.1 as PyYAML has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)

_UNKNOWN = re.compile(r'unknown field "([^"]+)"')
_TYPE = re.compile(r'^Invalid value: "\w+": \S+ in body must be of type (\w+): "(\w+)"$')
_DUPLICATE = re.compile(r'key "([^"]+)" already set')


def load_objects(text: str, kind: Kind) -> list[dict[str, Any]]:
    """The objects of the kind in a YAML or JSON text; other kinds are left out. Raises UnreadableFileError."""
    try:
        documents = [one for one in yaml.load_all(text, Loader=_Loader) if one is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UnreadableFileError(f"{where}not YAML: {getattr(error, 'problem', None) or error}") from error
    except (ValueError, RecursionError) as error:  # 2026-13-45 is written as a date and is none
        raise UnreadableFileError(f"not YAML: {error}") from error
    flat = [item for one in documents for item in _items(one)]
    for item in flat:
        if not isinstance(item, dict) or "kind" not in item:
            raise UnreadableFileError(
                "a document has no kind; begin it with apiVersion, kind, metadata and spec"
            )
        if not isinstance(item.get("metadata") or {}, dict):
            raise UnreadableFileError(f"metadata is {item['metadata']!r}; write metadata: {{name: ...}}")
    wanted = [item for item in flat if item["kind"] == kind.name]
    if not wanted:
        kinds = ", ".join(sorted({str(item["kind"]) for item in flat})) or "nothing"
        raise UnreadableFileError(f"holds no {kind.name} (found: {kinds})")
    return wanted


def _items(document: Any) -> list[Any]:
    """The objects of a List, or the one that the document is."""
    found = document.get("items", [document]) if isinstance(document, dict) else [document]
    return found if isinstance(found, list) else []


def explain_version(body: Mapping[str, Any]) -> str | None:
    """What is wrong with an object's apiVersion, or None."""
    version = body.get("apiVersion")
    return None if version == API_VERSION else f"apiVersion: {version!r} is not known; write {API_VERSION}"


def is_about_unknown_fields(refusal: Mapping[str, Any]) -> bool:
    """Whether the API server stopped at the spelling; then it has not looked at the values yet."""
    return "strict decoding error" in str(refusal.get("message", ""))


def explain_refusal(refusal: Mapping[str, Any], kind: Kind) -> list[str]:
    """One line for each problem in a Status object of the API server: the field, what is wrong, what to do."""
    message = str(refusal.get("message", "no message"))
    if is_about_unknown_fields(refusal):
        lines = [explain_unknown(path, kind) for path in _UNKNOWN.findall(message)]
        return lines + [f"{path}: is there twice; keep one" for path in _DUPLICATE.findall(message)] or [
            message
        ]
    causes = (refusal.get("details") or {}).get("causes") or []
    lines, notes = [], []
    for cause in causes:
        field, text = cause.get("field") or "", str(cause.get("message", ""))
        if field in ("", "<nil>"):
            notes.append(text.removeprefix("Invalid value: null: ").removeprefix('Invalid value: "null": '))
        else:
            lines.append(f"{field}: {_TYPE.sub(_say_type, text).removeprefix('Invalid value: ')}")
    return list(dict.fromkeys([*sorted(lines), *notes])) or [message]


def _say_type(found: re.Match[str]) -> str:
    wanted, given = found.groups()
    quotes = (
        "; write it without quotes"
        if given == "string" and wanted in ("integer", "number", "boolean")
        else ""
    )
    return f"must be of type {wanted}, not {given}{quotes}"


def explain_unknown(path: str, kind: Kind) -> str:
    """A field that the CRD does not have, with the one that was meant or all that there are."""
    parent, _, name = path.rpartition(".")
    known = _fields_of(parent, kind)
    plain = {re.sub("[^a-z0-9]", "", field.lower()): field for field in known}
    written = re.sub("[^a-z0-9]", "", name.lower())
    # `gpu` means gpusPerWorker, although cpu has more letters in common.
    close = [field for field in plain if field.startswith(written)]
    if len(close) != 1:
        close = difflib.get_close_matches(written, plain, n=1, cutoff=0.6)
    if close:
        return f"{path}: unknown field; did you mean {plain[close[0]]}?"
    if known:
        return f"{path}: unknown field; there are {', '.join(sorted(known))}"
    return f"{path}: unknown field"


def _fields_of(path: str, kind: Kind) -> list[str]:
    """Names of the fields of the object at `path` (such as spec.dataset.sources[0]) in the CRD."""
    schema = crds.schema_of(kind.name)
    for part in filter(None, path.split(".")):
        schema = schema.get("properties", {}).get(part.split("[")[0], {})
        if "[" in part:
            schema = schema.get("items", {})
    return list(schema.get("properties", {}))
