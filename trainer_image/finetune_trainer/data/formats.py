"""The four formats: which one a file has, and what its rows say, in two shapes that no longer depend on the format.

Chat: turns, of which the assistant's are learnt. Pair: a prompt and the text that follows it; Text is a pair
without prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_trainer.data.files import Row, shorten
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.runfile import ApplyChatTemplate, DataFormat, Source

ROLES = ("system", "user", "assistant", "tool")

REQUIRED = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.TEXT: ("text",),
}
OPTIONAL = {DataFormat.ALPACA: ("input",)}

# In this order: a file with messages and text columns is a chat file with a copy for reading.
DETECTION_ORDER = (DataFormat.MESSAGES, DataFormat.PROMPT_COMPLETION, DataFormat.ALPACA, DataFormat.TEXT)

NO_TEMPLATE = (
    "model.chatTemplate: {cause}, but the model's tokenizer has no chat template; "
    'set model.chatTemplate to "ChatML" or to a Jinja template, or use data without messages'
)

ALPACA_OPENING = "Here is an instruction for a task. Write the response that solves it."
ALPACA_OPENING_WITH_INPUT = (
    "Here is an instruction for a task, and an input that goes with it. "
    "Write the response that solves the task."
)

Turn = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    turns: tuple[Turn, ...]
    context: int  # number of leading turns that are never learnt (the prompt of PromptCompletion)
    where: str


@dataclass(frozen=True)
class Pair:
    prompt: str  # raw text that is not learnt; empty for Text
    completion: str
    chat_prompt: str | None  # the user's turn when a chat template is applied; None: never as chat (Text)
    where: str


Example = Chat | Pair


def as_chat(pair: Pair, *, choice: ApplyChatTemplate, has_template: bool) -> bool:
    """Says whether a pair is written as chat turns. Raises BadConfig for Always without a template."""
    if pair.chat_prompt is None or choice is ApplyChatTemplate.NEVER:
        return False
    if choice is ApplyChatTemplate.ALWAYS and not has_template:
        raise BadConfig(NO_TEMPLATE.format(cause="dataset.applyChatTemplate is Always"))
    return has_template


def parse_rows(rows: list[Row], source: Source) -> list[Example]:
    """Turns the rows of one file into examples. Raises BadData for the first row that does not fit its format."""
    data_format, columns = detect_format(rows[0], source)
    return [_parse_row(row, data_format, columns, first=rows[0]) for row in rows]


def detect_format(row: Row, source: Source) -> tuple[DataFormat, dict[str, str]]:
    """Returns the format and, for each column that it expects, the file's name for it. Raises BadData."""
    mapping = source.columns or {}
    if source.format is not DataFormat.AUTO:
        _check_mapping(mapping, (source.format,), row)
        return source.format, _columns_of(source.format, mapping)
    _check_mapping(mapping, DETECTION_ORDER, row)
    for candidate in DETECTION_ORDER:
        if all(mapping.get(name, name) in row.values for name in REQUIRED[candidate]):
            return candidate, _columns_of(candidate, mapping)
    raise BadData(
        f"{row.where}: columns {_list(row.values)} fit no format. Expected: {_describe_formats()}. "
        "Rename the columns, or map them in dataset.sources[].columns, such as {prompt: question, completion: answer}"
    )


def _check_mapping(mapping: dict[str, str], formats: Iterable[DataFormat], row: Row) -> None:
    known = {name for one in formats for name in (*REQUIRED[one], *OPTIONAL.get(one, ()))}
    for expected, actual in mapping.items():
        if expected not in known:
            raise BadConfig(
                f"dataset.sources[].columns: {expected!r} is no column of the format; "
                f"use {_list(sorted(known))} on the left"
            )
        if actual not in row.values:
            raise BadData(
                f"{row.where}: dataset.sources[].columns maps {expected!r} to {actual!r}, "
                f"but the columns are {_list(row.values)}"
            )


def _columns_of(data_format: DataFormat, mapping: dict[str, str]) -> dict[str, str]:
    return {
        name: mapping.get(name, name) for name in (*REQUIRED[data_format], *OPTIONAL.get(data_format, ()))
    }


def _parse_row(row: Row, data_format: DataFormat, columns: dict[str, str], *, first: Row) -> Example:
    missing = [columns[name] for name in REQUIRED[data_format] if columns[name] not in row.values]
    if missing:
        mixed = "" if row is first else f", as on {first.unit} {first.line}; one file holds one format"
        raise BadData(
            f"{row.where}: column {missing[0]!r} is missing, found {_list(row.values)}. "
            f"Format {data_format} expects {_list(columns[name] for name in REQUIRED[data_format])}{mixed}"
        )
    match data_format:
        case DataFormat.MESSAGES:
            return _parse_messages(row, columns["messages"])
        case DataFormat.PROMPT_COMPLETION:
            return _parse_prompt_completion(row, columns)
        case DataFormat.ALPACA:
            return _parse_alpaca(row, columns)
        case _:
            return Pair(prompt="", completion=_text(row, columns["text"]), chat_prompt=None, where=row.where)


def _parse_messages(row: Row, column: str) -> Chat:
    turns = _turns(row, column, row.values[column])
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadData(
            f"{row.where}: column {column!r} has no assistant turn "
            f"(roles: {_list(turn['role'] for turn in turns)}); there is nothing to learn"
        )
    if turns[0]["role"] == "assistant":
        raise BadData(
            f"{row.where}: column {column!r} begins with an assistant turn; put the user's turn before it"
        )
    return Chat(turns=turns, context=0, where=row.where)


def _parse_prompt_completion(row: Row, columns: dict[str, str]) -> Example:
    prompt, completion = (_maybe_json_list(row.values[columns[name]]) for name in ("prompt", "completion"))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadData(
            f"{row.where}: {columns['prompt']!r} and {columns['completion']!r} "
            "must both be text or both be lists of messages"
        )
    if not isinstance(prompt, list):
        text = _text(row, columns["prompt"])
        return Pair(
            prompt=text, completion=_text(row, columns["completion"]), chat_prompt=text, where=row.where
        )
    before = _turns(row, columns["prompt"], prompt)
    after = _turns(row, columns["completion"], completion)
    if not any(turn["role"] == "assistant" for turn in after):
        raise BadData(
            f"{row.where}: column {columns['completion']!r} has no assistant turn; there is nothing to learn"
        )
    return Chat(turns=(*before, *after), context=len(before), where=row.where)


def _parse_alpaca(row: Row, columns: dict[str, str]) -> Pair:
    instruction = _text(row, columns["instruction"])
    given = row.values.get(columns["input"])
    if given is not None and not isinstance(given, str):
        raise BadData(f"{row.where}: column {columns['input']!r} must be text, found {shorten(given)}")
    given = given or ""
    return Pair(
        prompt=build_alpaca_prompt(instruction, given),
        completion=_text(row, columns["output"]),
        chat_prompt=f"{instruction}\n\n{given}" if given.strip() else instruction,
        where=row.where,
    )


def build_alpaca_prompt(instruction: str, given: str) -> str:
    """Returns the raw text before the answer, with the headings that Alpaca-style models know."""
    if given.strip():
        opening, task = ALPACA_OPENING_WITH_INPUT, f"{instruction}\n\n### Input:\n{given}"
    else:
        opening, task = ALPACA_OPENING, instruction
    return f"{opening}\n\n### Instruction:\n{task}\n\n### Response:\n"


def _text(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise BadData(f"{row.where}: column {column!r} must be text, found {shorten(value)}")
    if not value.strip():
        raise BadData(f"{row.where}: column {column!r} is empty; fill it or remove the row")
    return value


def _maybe_json_list(value: Any) -> Any:
    """A CSV cell cannot hold a list; there messages are written as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _turns(row: Row, column: str, value: Any) -> tuple[Turn, ...]:
    value = _maybe_json_list(value)
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
            raise BadData(
                f"{row.where}: {name} has no {key!r}, found keys {_list(item)}{hint}; "
                "every message needs role and content"
            )
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise BadData(f"{row.where}: {name}.role is {shorten(role)}; allowed roles are {_list(ROLES)}")
    if not isinstance(content, str):
        raise BadData(f"{row.where}: {name}.content must be text, found {shorten(content)}")
    if not content.strip() and role != "system":
        raise BadData(f"{row.where}: {name}.content is empty ({role}); write it or remove the message")
    return turn


def _describe_formats() -> str:
    return "; ".join(f"{one} has {' and '.join(REQUIRED[one])}" for one in DETECTION_ORDER)


def _list(names: Iterable[Any]) -> str:
    return "[" + ", ".join(str(name) for name in names) + "]"
