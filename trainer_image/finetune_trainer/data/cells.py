"""What a cell of a row may hold: text, or a list of messages. Every refusal names file, line, column and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from finetune_trainer.data.files import Row, shorten
from finetune_trainer.failures import BadData

ROLES = ("system", "user", "assistant", "tool")

Turn = dict[str, Any]


def read_text(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise BadData(f"{row.where}: column {column!r} must be text, found {shorten(value)}")
    if not value.strip():
        raise BadData(f"{row.where}: column {column!r} is empty; fill it or remove the row")
    return value


def maybe_json_list(value: Any) -> Any:
    """A CSV cell cannot hold a list; there messages are written as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def maybe_messages(value: Any) -> Any:
    """The same where a column may be text as well: a JSON list that holds no message is text, such as an answer."""
    found = maybe_json_list(value)
    is_text = isinstance(value, str) and isinstance(found, list) and not any(map(_is_message, found))
    return value if is_text else found


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "content" in item and item.get("role") in ROLES


def read_turns(row: Row, column: str, value: Any) -> tuple[Turn, ...]:
    value = maybe_json_list(value)
    if not isinstance(value, list) or not value:
        raise BadData(f"{row.where}: column {column!r} must be a list of messages, found {shorten(value)}")
    return tuple(_turn(row, f"{column}[{index}]", item) for index, item in enumerate(value))


def _turn(row: Row, name: str, item: Any) -> Turn:
    if not isinstance(item, dict):
        raise BadData(
            f'{row.where}: {name} must be an object such as {{"role": "user", "content": "..."}}, found {shorten(item)}'
        )
    turn = {key: value for key, value in item.items() if value is not None}
    for key in ("role", "content"):
        if key not in turn:
            hint = " (ShareGPT: rename from/value to role/content)" if "from" in turn else ""
            if "tool_calls" in turn:
                hint = " (calls of tools are not learnt: write them as text, or leave out the row)"
            raise BadData(
                f"{row.where}: {name} has no {key!r}, found keys {list_names(turn)}{hint}; "
                "every message needs role and content"
            )
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise BadData(f"{row.where}: {name}.role is {shorten(role)}; allowed roles are {list_names(ROLES)}")
    if not isinstance(content, str):
        raise BadData(f"{row.where}: {name}.content must be text, found {shorten(content)}")
    if not content.strip() and role != "system":
        raise BadData(f"{row.where}: {name}.content is empty ({role}); write it or remove the message")
    return turn


def list_names(names: Iterable[Any]) -> str:
    return "[" + ", ".join(str(name) for name in names) + "]"
