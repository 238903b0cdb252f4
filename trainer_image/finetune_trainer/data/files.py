"""Readers of data files. Every row keeps the file and the line that it came from, because errors must name them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.failures import BadData

# An escape that may be half of a character; two of them make one, such as an emoji.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    file: str  # as the user wrote it: the source's URI
    line: int  # 1-based line of the file; for Parquet the number of the row
    unit: str = "line"

    @property
    def where(self) -> str:
        return f"{self.file} {self.unit} {self.line}"


def kind_of(uri: str) -> str | None:
    """Returns the suffix that decides the reader (.jsonl, .json, .csv, .parquet), None when there is no reader."""
    name = uri.split("?", 1)[0].lower()
    name = name.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_rows(path: Path, *, uri: str) -> list[Row]:
    """Reads all rows of a file. Raises BadData, which names file and line, also when there is not a single row."""
    try:
        rows = list(_read(path, uri))
    except UnicodeDecodeError as error:
        raise BadData(
            f"{uri}: not UTF-8 text (byte {error.object[error.start]:#04x} after {error.start} bytes); "
            "save the file as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(f"{uri}: not a whole gzip file ({error}); compress it again or rename it") from error
    if not rows:
        raise BadData(f"{uri}: the file holds no rows; it needs at least one")
    return rows


def _read(path: Path, uri: str) -> Iterator[Row]:
    kind = kind_of(uri)
    if kind == ".parquet":
        yield from _read_parquet(path, uri)
        return
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    text = data.decode("utf-8-sig")
    if kind == ".csv":
        yield from _read_csv(text, uri)
        return
    # Lines: also .json files that hold one object a line, which many tools write.
    is_array = kind == ".json" and text.lstrip().startswith("[")
    rows = _read_json_array(text, uri) if is_array else _read_json_lines(text, uri)
    yield from map(_require_characters, rows) if _HALF.search(text) else rows


class _RepeatedNameError(ValueError):
    """A name that is there twice in one object: which value is meant?"""


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(repr(next(name for name in found if names.count(name) > 1)))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_to_object)


def _read_json_lines(text: str, uri: str) -> Iterator[Row]:
    # Not splitlines(): a JSON string may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(_parse_object(line, uri=uri, line=number), uri, number)


def _parse_object(text: str, *, uri: str, line: int) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        start = max(0, error.pos - 20)
        raise BadData(
            f"{uri} line {line}: broken JSON at column {error.pos + 1} ({error.msg}), "
            f"near {text[start : error.pos + 20]!r}; every line must be one whole JSON object"
        ) from error
    except (RecursionError, ValueError) as error:
        raise _beyond_limits(error, uri=uri, line=line) from error
    return _require_object(value, uri=uri, line=line)


def _require_object(value: Any, *, uri: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadData(
            f'{uri} line {line}: found {shorten(value)}, expected a JSON object such as {{"text": "..."}}'
        )
    return value


def _beyond_limits(error: Exception, *, uri: str, line: int) -> BadData:
    """For JSON that is right and that is not read."""
    if isinstance(error, _RepeatedNameError):
        return BadData(f"{uri} line {line}: {error} is there twice in one object; remove one")
    cause = (
        "is nested too deeply"
        if isinstance(error, RecursionError)
        else "has a number of more than 4300 digits"
    )
    return BadData(f"{uri} line {line}: the JSON {cause}; write that value as text, or remove it")


def _require_characters(row: Row) -> Row:
    try:
        json.dumps(row.values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadData(
            f"{row.where}: \\u{ord(error.object[error.start]):04x} is half of a character, as after a cut in the "
            "middle of an emoji; write the whole character, or remove the half"
        ) from error
    return row


def _read_json_array(text: str, uri: str) -> Iterator[Row]:
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
            separator = text[position : position + 1]
            if separator not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            if separator == ",":
                position = _skip_space(text, position + 1)
        except json.JSONDecodeError as error:
            raise BadData(
                f"{uri} line {error.lineno}: broken JSON at column {error.colno} ({error.msg}); "
                "the file must be one JSON array of objects, or one object a line"
            ) from error
        except (RecursionError, ValueError) as error:
            raise _beyond_limits(error, uri=uri, line=line) from error
        yield Row(_require_object(value, uri=uri, line=line), uri, line)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise BadData(
            f"{uri} line {1 + text.count(chr(10), 0, rest)}: text after the end of the JSON array; remove it"
        )


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_csv(text: str, uri: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 kB is less than one long document
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            if not cells:
                pass  # an empty line, also before the header
            elif header is None:
                header = [cell.strip() for cell in cells]
                _check_names(header, f"{uri} line {start}")
            else:
                if len(cells) != len(header):
                    raise BadData(
                        f"{uri} line {start}: {len(cells)} cells, but the header has {len(header)} columns "
                        f"({', '.join(header)}); put quotes around cells that hold a comma or a line break"
                    )
                yield Row(dict(zip(header, cells, strict=True)), uri, start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadData(f"{uri} line {start}: broken CSV ({error}); check the quotes of this row") from error


def _check_names(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadData(f"{where}: column {twice[0]!r} is there more than once; rename one of them")


def _read_parquet(path: Path, uri: str) -> Iterator[Row]:
    import pyarrow  # slow imports that only Parquet needs
    import pyarrow.parquet

    try:
        _check_names(pyarrow.parquet.read_schema(path).names, uri)
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; Arrow's own has no number
            raise
        raise BadData(f"{uri}: not a whole Parquet file ({str(error).splitlines()[0]})") from error
    columns = [_read_column(table, name, uri) for name in table.column_names]
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        yield Row(dict(zip(table.column_names, cells, strict=True)), uri, number, unit="row")


def _read_column(table: Any, name: str, uri: str) -> list[Any]:
    column = table.column(name)
    try:
        return list(column.to_pylist())
    # Dates and zones that Python does not know, text that is not UTF-8.
    except (ValueError, OverflowError) as error:
        raise BadData(
            f"{uri}: column {name!r} ({column.type}) has a value that cannot be read ({error}); "
            "write it as text, or remove the column"
        ) from error


def shorten(value: Any, *, limit: int = 80) -> str:
    """Returns a value as JSON, cut to `limit` characters, for error messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"
