"""Data files: every reader keeps the line, and every broken file is named with line and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from finetune_trainer.data import files
from finetune_trainer.failures import BadData

ROWS = [{"text": "one"}, {"text": "two, with a comma"}, {"text": 'three\nand "a quote"'}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> list[files.Row]:
    return files.read_rows(path, uri=f"file://{path}")


def message(path: Path) -> str:
    with pytest.raises(BadData) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json"])
def test_json_lines_keep_their_line_numbers_over_blank_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    assert [(row.values, row.line) for row in read(path)] == list(zip(ROWS, [2, 4, 6], strict=True))


def test_json_array_keeps_line_numbers(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "rows.json", json.dumps(ROWS, indent=2)))
    assert [row.values for row in rows] == ROWS
    assert [row.line for row in rows] == [2, 5, 8]


def test_unusual_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    assert read(path)[0].values == {"text": "a\u2028b\u0085c"}


def test_csv_with_quotes_line_breaks_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv",
        '\ufefftext,id\none,1\n"two, with a comma",2\n"three\nand ""a quote""",3\nfour,4\n',
    )
    rows = read(path)
    assert [row.values["text"] for row in rows] == [*(row["text"] for row in ROWS), "four"]
    assert [row.line for row in rows] == [2, 3, 4, 6]


def test_csv_takes_cells_longer_than_the_default_limit(tmp_path: Path) -> None:
    assert (
        len(read(write(tmp_path / "rows.csv", "text\n" + "x" * 200_000 + "\n"))[0].values["text"]) == 200_000
    )


def test_parquet_counts_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert [row.values for row in rows] == ROWS
    assert rows[1].where.endswith("rows.parquet row 2")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.json.gz"])
def test_gzip_is_read_as_what_it_holds(tmp_path: Path, name: str) -> None:
    text = {"jsonl": '{"text": "a"}\n', "csv": "text\na\n", "json": '[{"text": "a"}]'}[name.split(".")[1]]
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [row.values for row in read(tmp_path / name)] == [{"text": "a"}]


def test_broken_json_names_line_17_and_the_column(tmp_path: Path) -> None:
    lines = ['{"text": "fine"}'] * 16 + ['{"text": "broken}'] + ['{"text": "fine"}']
    text = message(write(tmp_path / "rows.jsonl", "\n".join(lines)))
    assert "rows.jsonl line 17: broken JSON at column 10" in text
    assert "one whole JSON object" in text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: found [1, 2], expected a JSON object"),
        ("rows.json", '[\n{"a": 1},\n{"a": 2\n]', "line 4: broken JSON"),
        ("rows.json", '[\n{"a": 1}\n{"a": 2}]', "line 3: broken JSON"),
        ("rows.json", '[{"a": 1}]\ntail', "line 2: text after the end"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.csv", "text,id\na\n", "line 2: 1 cells, but the header has 2 columns (text, id)"),
        ("rows.csv", "text,id\na,1,more\n", "line 2: 3 cells"),
        ("rows.csv", 'text,id\na,1\n"open,2\n', "line 3: broken CSV"),
        ("rows.csv", "text,text\na,b\n", "column 'text' is there more than once"),
        ("rows.csv", "text\n", "holds no rows"),
        ("rows.jsonl", "\n \n", "holds no rows"),
        ("rows.parquet", "PAR0", "not a whole Parquet file"),
    ],
)
def test_broken_files_say_where_and_what(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert expected in message(write(tmp_path / name, content))


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    assert "not UTF-8" in message(tmp_path / "rows.csv")


def test_cut_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-20])
    assert "not a whole gzip file" in message(tmp_path / "rows.jsonl.gz")


def test_gzip_with_a_wrong_byte_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"".join(b'{"text": "row %d"}\n' % number for number in range(100))))
    for place in range(12, len(content)):
        content[place] ^= 0xFF
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        assert "not a whole gzip file" in message(tmp_path / "rows.jsonl.gz")
        content[place] ^= 0xFF


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("9" * 5000, "a number of more than 4300 digits"),
        (r'"cut \ud83d off"', r"\ud83d is half of a character"),
        ('"one", "text": "two"', "'text' is there twice in one object; remove one"),
        ('{"role": "user", "role": "tool"}', "'role' is there twice"),
    ],
    ids=["deep", "digits", "half", "twice", "twice-inside"],
)
def test_json_that_python_or_a_tokenizer_cannot_take_is_named(
    tmp_path: Path, name: str, value: str, expected: str
) -> None:
    lines = [r'{"text": "whole \ud83d\ude00"}', f'{{"text": {value}}}']
    content = "[\n" + ",\n".join(lines) + "]" if name == "rows.json" else "\n".join(lines)
    where = f"{name} line {3 if name == 'rows.json' else 2}: "
    text = message(write(tmp_path / name, content))
    assert where in text
    assert expected in text


def test_csv_may_begin_with_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\n\ntext\na fine row\n")
    rows = read(tmp_path / "rows.csv")
    assert [(row.values, row.line) for row in rows] == [({"text": "a fine row"}, 4)]


def test_parquet_with_a_column_twice_is_told_so(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "rows.parquet")
    assert "column 'text' is there more than once; rename one" in message(tmp_path / "rows.parquet")


def test_parquet_with_wrong_bytes_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    for place in (4, 30, len(whole) - 60):  # a page's header, its content, the footer
        path.write_bytes(whole[:place] + b"\xff" * 20 + whole[place + 20 :])
        assert "not a whole Parquet file" in message(path)


def test_a_date_that_python_has_not_names_its_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    made = pyarrow.array([2**60], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "made": made}), tmp_path / "rows.parquet")
    assert "column 'made' (timestamp[ms])" in message(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("file:///a/b.JSONL", ".jsonl"),
        ("https://host/b.csv.gz?version=3", ".csv"),
        ("s3://bucket/b.parquet", ".parquet"),
        ("file:///a/b.txt", None),
    ],
)
def test_the_ending_decides_the_reader(uri: str, kind: str | None) -> None:
    assert files.kind_of(uri) == kind
