"""Golden rows: how they are read, and when an answer is right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_server.evaluations import BadRows, Scorer, is_right, read_rows


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file://{path}"


def test_both_shapes_of_rows_are_read_and_the_last_answer_is_the_reference(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "a"}
    uri = write(
        tmp_path / "rows.jsonl",
        {"messages": [*turns, answer]},
        {"prompt": "q", "completion": "a"},
        {"prompt": turns, "completion": [answer]},
        {"messages": "beyond the limit"},
    )
    rows = read_rows(uri, limit=3)
    assert [row.reference for row in rows] == ["a", "a", "a"]
    assert [row.question for row in rows] == [turns, [{"role": "user", "content": "q"}], turns]


def test_packed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "completion": "a"}\n'))
    assert len(read_rows(f"file://{tmp_path}/rows.jsonl.gz", limit=5)) == 1


def test_packed_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * 50)
    for damaged in (whole[:-12], whole[:12] + b"\xff\xff\xff\xff" + whole[16:], b"no gzip"):
        (tmp_path / "rows.jsonl.gz").write_bytes(damaged)
        with pytest.raises(BadRows, match="cannot be read"):
            read_rows(f"file://{tmp_path}/rows.jsonl.gz", limit=5)


def test_rows_are_cut_where_training_cuts_them(tmp_path: Path) -> None:
    row = {"prompt": "one\u2028two\x85three", "completion": "a"}
    text = f"{json.dumps(row, ensure_ascii=False)}\r\n"
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{text}{text}".encode())
    assert [found.prompt for found in read_rows(f"file://{tmp_path}/rows.jsonl", limit=5)] == [
        row["prompt"],
        row["prompt"],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 2 has neither"),
        ([], "line 2 is not a JSON object"),
        ({"messages": [{"role": "user", "content": "q"}]}, "line 2: the last of the messages"),
        ({"messages": []}, "line 2: the last of the messages"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, row: Any, message: str) -> None:
    uri = write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "a"}, row)
    with pytest.raises(BadRows, match=message):
        read_rows(uri, limit=5)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="No such file"):
        read_rows(f"file://{tmp_path}/nothing.jsonl", limit=5)
    with pytest.raises(BadRows, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl"), limit=5)


RIGHT = '{"category": "bug", "priority": 2}'


@pytest.mark.parametrize(
    ("scorer", "fields", "answer", "expected"),
    [
        (Scorer.EXACT_MATCH, (), f" {RIGHT}\n", True),
        (Scorer.EXACT_MATCH, (), "no", False),
        (Scorer.CONTAINS, (), f"Here: {RIGHT}.", True),
        (Scorer.CONTAINS, (), "Here:", False),
        (Scorer.JSON_VALID, (), "[1]", True),
        (Scorer.JSON_VALID, (), "{'a': 1}", False),
        (Scorer.JSON_VALID, (), '{"a": NaN}', False),
        (Scorer.JSON_VALID, (), "[" * 100_000, False),
        (Scorer.JSON_VALID, ("category",), '{"category": 1}', True),
        (Scorer.JSON_VALID, ("category",), '{"other": 1}', False),
        (Scorer.JSON_FIELDS, ("category",), '{"category": "bug", "priority": 9}', True),
        (Scorer.JSON_FIELDS, ("category", "priority"), '{"category": "bug", "priority": 9}', False),
        (Scorer.JSON_FIELDS, ("missing",), RIGHT, False),
        (Scorer.JSON_FIELDS, ("category",), "not JSON", False),
    ],
)
def test_when_an_answer_is_right(
    scorer: Scorer, fields: tuple[str, ...], answer: str, expected: bool
) -> None:
    assert is_right(answer, RIGHT, scorer, fields) is expected
