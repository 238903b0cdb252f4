"""Write one small data file per format from a table of plants; all text is our own.

python examples/formats/make_files.py            writes beside this file
python examples/formats/make_files.py --out DIR  writes somewhere else
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet


@dataclass(frozen=True)
class Plant:
    name: str
    sow: str
    days: int  # between waterings in summer
    light: str
    trouble: str


PLANTS = [
    Plant("basil", "April", 2, "full sun", "slugs"),
    Plant("mint", "March", 2, "half shade", "rust"),
    Plant("parsley", "March", 3, "half shade", "root flies"),
    Plant("chives", "April", 4, "full sun", "thrips"),
    Plant("rosemary", "May", 8, "full sun", "wet roots"),
    Plant("thyme", "April", 9, "full sun", "wet roots"),
    Plant("sage", "May", 7, "full sun", "leafhoppers"),
    Plant("dill", "April", 4, "full sun", "aphids"),
    Plant("tomato", "March", 1, "full sun", "late blight"),
    Plant("cucumber", "May", 1, "full sun", "mildew"),
    Plant("pumpkin", "May", 2, "full sun", "mildew"),
    Plant("lettuce", "March", 2, "half shade", "slugs"),
    Plant("spinach", "March", 3, "half shade", "leaf miners"),
    Plant("carrot", "April", 4, "full sun", "root flies"),
    Plant("radish", "March", 2, "half shade", "flea beetles"),
    Plant("bean", "May", 3, "full sun", "aphids"),
    Plant("pea", "March", 3, "full sun", "moths"),
    Plant("fern", "June", 2, "deep shade", "scale insects"),
    Plant("hosta", "June", 3, "deep shade", "slugs"),
    Plant("lavender", "May", 10, "full sun", "wet roots"),
]


def make_messages() -> list[dict[str, list[dict[str, str]]]]:
    """Conversations of two questions; both answers are learnt."""
    return [
        {
            "messages": [
                {"role": "system", "content": "You are a gardener. Answer in one short sentence."},
                {"role": "user", "content": f"When do I sow {plant.name}?"},
                {"role": "assistant", "content": f"Sow {plant.name} in {plant.sow}."},
                {"role": "user", "content": "And how much light does it need?"},
                {"role": "assistant", "content": f"Give {plant.name} {plant.light}."},
            ]
        }
        for plant in PLANTS
    ]


def make_questions() -> list[dict[str, str]]:
    """Questions and answers under the column names of some other tool."""
    rows = []
    for plant in PLANTS:
        every = "every day" if plant.days == 1 else f"every {plant.days} days"
        rows.append(
            {"question": f"How often is {plant.name} watered in summer?", "answer": f"Water it {every}."}
        )
        rows.append(
            {"question": f"What is the enemy of {plant.name}?", "answer": f"Watch out for {plant.trouble}."}
        )
    return rows


def make_instructions() -> list[dict[str, str]]:
    """Instruction, input, output; every second row has no input, which the format allows."""
    rows = []
    for plant in PLANTS:
        rows.append(
            {
                "instruction": "Turn the note into a sentence.",
                "input": f"{plant.name} / {plant.sow} / {plant.light}",
                "output": f"Sow the {plant.name} in {plant.sow} where it gets {plant.light}.",
            }
        )
        rows.append(
            {
                "instruction": f"Name one danger for {plant.name}.",
                "input": "",
                "output": plant.trouble.capitalize() + ".",
            }
        )
    return rows


def make_texts() -> list[str]:
    """Labels as they stick in a flower pot; every word is learnt."""
    return [
        f"{plant.name.upper()} | sow: {plant.sow} | light: {plant.light} | water: {plant.days} d | "
        f"beware: {plant.trouble}"
        for plant in PLANTS
    ]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    folder = parser.parse_args().out
    lines = [json.dumps(row) + "\n" for row in make_messages()]
    (folder / "messages.jsonl").write_text("".join(lines), encoding="utf-8")
    write_csv(folder / "prompt-completion.csv", make_questions())
    (folder / "alpaca.json").write_text(json.dumps(make_instructions(), indent=1) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": make_texts()}), folder / "text.parquet")


if __name__ == "__main__":
    main()
