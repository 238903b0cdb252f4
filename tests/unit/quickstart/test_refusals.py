"""The benchmark of refusals: its cases differ from a good run in one thing, and its page names what is too slow."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import refusals


def test_a_case_has_its_own_fault_and_no_other(tmp_path: Path) -> None:
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("12345678")
    (case,) = (case for case in refusals.CASES if case.broken == "tokenizer.json")
    run_file = json.loads(refusals.prepare(case, model, tmp_path).read_text())
    copy = Path(run_file["model"]["uri"].removeprefix("file://"))
    assert (copy / "tokenizer.json").read_text() == "1234"
    assert (copy / "config.json").read_text() == "{}"
    assert (model / "tokenizer.json").read_text() == "12345678"


def test_the_page_names_a_case_over_the_limit() -> None:
    seconds = {case.title: [0.1, 0.2] for case in refusals.CASES}
    assert "all others are within it" in refusals.build_section(seconds, rounds=2, load=0.0)
    slow = refusals.CASES[3].title
    section = refusals.build_section({**seconds, slow: [0.5, 1.5]}, rounds=2, load=0.0)
    assert f"over the limit: {slow}" in section
    assert f"| {slow} | 64 | 1.00 s (0.50 to 1.50) |" in section
