"""The formats: which one a file has, and from its rows to the shapes of `data.shapes`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune_trainer.data.cells import list_names, maybe_messages, read_text, read_turns
from finetune_trainer.data.files import Row, shorten
from finetune_trainer.data.preferences import parse_preference, parse_prompt
from finetune_trainer.data.shapes import AnyExample, Chat, Example, Pair
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.runfile import DataFormat, Objective, Source
from finetune_trainer.runparts import FORMATS_OF

REQUIRED = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.TEXT: ("text",),
    DataFormat.PREFERENCE: ("chosen", "rejected"),
    DataFormat.PROMPT_ONLY: ("prompt",),
}
OPTIONAL = {DataFormat.ALPACA: ("input",), DataFormat.PREFERENCE: ("prompt",)}
DEMONSTRATIONS = FORMATS_OF[Objective.SFT]
EXAMPLES = {
    DataFormat.TEXT: "{prompt: question, completion: answer}",
    DataFormat.PREFERENCE: "{chosen: better, rejected: worse}",
    DataFormat.PROMPT_ONLY: "{prompt: question}",
}

ALPACA_OPENING = "Here is an instruction for a task. Write the response that solves it."
ALPACA_OPENING_WITH_INPUT = (
    "Here is an instruction for a task, and an input that goes with it. "
    "Write the response that solves the task."
)


def parse_rows(rows: list[Row], source: Source) -> list[Example]:
    """Turns the rows of one file into demonstrations. Raises BadData for the first row that does not fit its format."""
    data_format, columns = detect_format(rows[0], source)
    return [_parse_demonstration(row, data_format, columns, first=rows[0]) for row in rows]


def parse_for(objective: Objective, rows: list[Row], source: Source) -> Sequence[AnyExample]:
    """The same for any objective: demonstrations, preferences or prompts."""
    if not (objective.prefers or objective.samples):
        return parse_rows(rows, source)
    data_format, columns = detect_format(rows[0], source, formats=FORMATS_OF[objective])
    for row in rows:
        _check_columns(row, data_format, columns, first=rows[0])
    if objective.prefers:
        return [parse_preference(row, columns) for row in rows]
    return [parse_prompt(row, columns["prompt"]) for row in rows]


def detect_format(
    row: Row, source: Source, *, formats: Sequence[DataFormat] = DEMONSTRATIONS
) -> tuple[DataFormat, dict[str, str]]:
    """Returns the format and, for each column that it expects, the file's name for it. Raises BadData."""
    mapping = source.columns or {}
    if source.format is not DataFormat.AUTO:
        _check_mapping(mapping, (source.format,), row)
        return source.format, _columns_of(source.format, mapping)
    _check_mapping(mapping, formats, row)
    for candidate in formats:
        if all(mapping.get(name, name) in row.values for name in REQUIRED[candidate]):
            return candidate, _columns_of(candidate, mapping)
    raise BadData(
        f"{row.where}: columns {list_names(row.values)} fit no format. Expected: {_describe_formats(formats)}. "
        "Rename the columns, or map them in dataset.sources[].columns, such as "
        f"{EXAMPLES[formats[-1]]}"
    )


def _check_mapping(mapping: dict[str, str], formats: Iterable[DataFormat], row: Row) -> None:
    known = {name for one in formats for name in (*REQUIRED[one], *OPTIONAL.get(one, ()))}
    for expected, actual in mapping.items():
        if expected not in known:
            raise BadConfig(
                f"dataset.sources[].columns: {expected!r} is no column of the format; "
                f"use {list_names(sorted(known))} on the left"
            )
        if actual not in row.values:
            raise BadData(
                f"{row.where}: dataset.sources[].columns maps {expected!r} to {actual!r}, "
                f"but the columns are {list_names(row.values)}"
            )


def _columns_of(data_format: DataFormat, mapping: dict[str, str]) -> dict[str, str]:
    return {
        name: mapping.get(name, name) for name in (*REQUIRED[data_format], *OPTIONAL.get(data_format, ()))
    }


def _check_columns(row: Row, data_format: DataFormat, columns: dict[str, str], *, first: Row) -> None:
    missing = [columns[name] for name in REQUIRED[data_format] if columns[name] not in row.values]
    if missing:
        mixed = "" if row is first else f", as on {first.unit} {first.line}; one file holds one format"
        raise BadData(
            f"{row.where}: column {missing[0]!r} is missing, found {list_names(row.values)}. "
            f"Format {data_format} expects {list_names(columns[name] for name in REQUIRED[data_format])}{mixed}"
        )


def _parse_demonstration(
    row: Row, data_format: DataFormat, columns: dict[str, str], *, first: Row
) -> Example:
    _check_columns(row, data_format, columns, first=first)
    match data_format:
        case DataFormat.MESSAGES:
            return _parse_messages(row, columns["messages"])
        case DataFormat.PROMPT_COMPLETION:
            return _parse_prompt_completion(row, columns)
        case DataFormat.ALPACA:
            return _parse_alpaca(row, columns)
        case _:
            return Pair(
                prompt="", completion=read_text(row, columns["text"]), chat_prompt=None, where=row.where
            )


def _parse_messages(row: Row, column: str) -> Chat:
    turns = read_turns(row, column, row.values[column])
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadData(
            f"{row.where}: column {column!r} has no assistant turn "
            f"(roles: {list_names(turn['role'] for turn in turns)}); there is nothing to learn"
        )
    if turns[0]["role"] == "assistant":
        raise BadData(
            f"{row.where}: column {column!r} begins with an assistant turn; put the user's turn before it"
        )
    return Chat(turns=turns, context=0, where=row.where)


def _parse_prompt_completion(row: Row, columns: dict[str, str]) -> Example:
    prompt, completion = (maybe_messages(row.values[columns[name]]) for name in ("prompt", "completion"))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadData(
            f"{row.where}: {columns['prompt']!r} and {columns['completion']!r} "
            "must both be text or both be lists of messages"
        )
    if not isinstance(prompt, list):
        text = read_text(row, columns["prompt"])
        return Pair(
            prompt=text, completion=read_text(row, columns["completion"]), chat_prompt=text, where=row.where
        )
    before = read_turns(row, columns["prompt"], prompt)
    after = read_turns(row, columns["completion"], completion)
    if not any(turn["role"] == "assistant" for turn in after):
        raise BadData(
            f"{row.where}: column {columns['completion']!r} has no assistant turn; there is nothing to learn"
        )
    return Chat(turns=(*before, *after), context=len(before), where=row.where)


def _parse_alpaca(row: Row, columns: dict[str, str]) -> Pair:
    instruction = read_text(row, columns["instruction"])
    given = row.values.get(columns["input"])
    if given is not None and not isinstance(given, str):
        raise BadData(f"{row.where}: column {columns['input']!r} must be text, found {shorten(given)}")
    given = given or ""
    return Pair(
        prompt=build_alpaca_prompt(instruction, given),
        completion=read_text(row, columns["output"]),
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


def _describe_formats(formats: Iterable[DataFormat]) -> str:
    return "; ".join(f"{one} has {' and '.join(REQUIRED[one])}" for one in formats)
