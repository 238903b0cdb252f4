"""Write the quickstart's train.jsonl, heldout.jsonl and spoilt.jsonl from tickets.yaml: the same bytes on every run.

python examples/quickstart/make_data.py            writes beside this file
python examples/quickstart/make_data.py --out DIR  writes somewhere else
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SEED = 20260
SYSTEM = "Triage the support ticket. Answer with JSON: category, priority, summary."
PRIORITIES = ["low", "normal", "high", "urgent"]  # in this order: phrases move a ticket up or down
ROWS = {"train": 100, "heldout": 12}  # per category
SPOILT_ROWS = 200  # the first ones of train.jsonl
MAX_CHARACTERS = 330  # of a ticket: with prompt and answer about 130 tokens
MAX_SHOUTED_CHARACTERS = 140  # capitals take twice as many tokens


@dataclass(frozen=True)
class Issue:
    """One thing that a customer may write about, with the wordings of one split."""

    category: str
    level: int  # index into PRIORITIES
    summary: str
    wordings: list[str]


class Writer:
    """Writes tickets of one split. Everything random comes from one seeded generator."""

    def __init__(self, source: dict[str, Any], split: str) -> None:
        self.random = random.Random(f"{SEED} {split}")
        self.slots: dict[str, list[str]] = source["slots"][split]
        self.phrases: dict[str, list[str]] = source["phrases"][split]
        self.issues = [
            Issue(item["category"], PRIORITIES.index(item["priority"]), item["summary"], item[split])
            for item in source["issues"]
        ]

    def write(self, category: str, turn: int) -> dict[str, Any]:
        """The `turn`-th row of a category; issues and wordings take turns, so that all of them are used."""
        candidates = [issue for issue in self.issues if issue.category == category]
        issue = candidates[turn % len(candidates)]
        wording = issue.wordings[turn // len(candidates) % len(issue.wordings)]
        slots = self.fill()
        ticket, level = self.compose(issue, wording.format(**slots), slots)
        answer = {
            "category": issue.category,
            "priority": PRIORITIES[level],
            "summary": issue.summary.format(**slots),
        }
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": ticket},
                {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
            ]
        }

    def fill(self) -> dict[str, str]:
        """One value for each slot; the order number and the amounts are numbers that the answer must copy."""
        values = {slot: self.random.choice(choices) for slot, choices in self.slots.items()}
        return values | {
            "order": f"{self.random.choice('ABCDEFGH')}-{self.random.randint(100, 999)}",
            "amount": f"{self.random.randint(4, 95)} euros",
            "days": str(self.random.randint(3, 19)),
            "number": str(self.random.randint(100, 599)),
        }

    def compose(self, issue: Issue, text: str, slots: dict[str, str]) -> tuple[str, int]:
        """The ticket around the issue, and its priority as an index into PRIORITIES."""
        level = issue.level
        parts = [text]
        kind = self.random.random()
        if kind < 0.14 and level > 0:
            parts = self.add_topic(issue, text)
        elif kind < 0.30:
            parts.append(self.pick("raise"))
            level = min(level + 1, len(PRIORITIES) - 1)
        elif kind < 0.42:
            parts.append(self.pick("lower"))
            level = max(level - 1, 0)
        if self.random.random() < 0.14:
            parts.insert(0, self.pick("sarcasm"))
        if self.random.random() < 0.14:
            parts.insert(self.random.randint(0, len(parts)), self.pick("ramble"))
        if self.random.random() < 0.5:
            parts.insert(0, self.pick("foreign" if self.random.random() < 0.25 else "greeting"))
        if self.random.random() < 0.5:
            parts.append(self.pick("closing").format(**slots))
        while len(" ".join(parts)) > MAX_CHARACTERS:
            parts.remove(max((part for part in parts if part != text), key=len))
        return self.disfigure(" ".join(parts), slots), level

    def add_topic(self, issue: Issue, text: str) -> list[str]:
        """Two topics in one ticket: the more pressing one decides, wherever it stands."""
        minor = self.random.choice(
            [other for other in self.issues if other.level < issue.level and other.category != issue.category]
        )
        second = self.random.choice(minor.wordings).format(**self.fill())
        first, last = (text, second) if self.random.random() < 0.5 else (second, text)
        return [first, self.pick("also"), last]

    def disfigure(self, ticket: str, slots: dict[str, str]) -> str:
        """Some people shout, some type badly; what the answer must copy stays readable."""
        style = self.random.random()
        if style < 0.05 and len(ticket) <= MAX_SHOUTED_CHARACTERS:
            return ticket.upper()
        if style < 0.13:
            return ticket.lower().replace(".", "").replace(slots["order"].lower(), slots["order"])
        if style < 0.28:
            return self.mistype(ticket, " ".join(slots.values()))
        return ticket

    def mistype(self, ticket: str, protected: str) -> str:
        """Swap two letters inside up to three longer words."""
        words = ticket.split(" ")
        eligible = [
            i for i, word in enumerate(words) if len(word) > 4 and word.strip(",.!?") not in protected
        ]
        for i in self.random.sample(eligible, min(3, len(eligible))):
            word = words[i]
            at = self.random.randint(1, len(word) - 4)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return " ".join(words)

    def pick(self, kind: str) -> str:
        return self.random.choice(self.phrases[kind])


def make_rows(source: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """All rows of a split, the same number for each category, shuffled, no ticket twice."""
    writer = Writer(source, split)
    categories = sorted({issue.category for issue in writer.issues})
    rows: dict[str, dict[str, Any]] = {}
    for category in categories:
        wanted = len(rows) + ROWS[split]
        turn = 0
        while len(rows) < wanted:
            row = writer.write(category, turn)
            rows.setdefault(row["messages"][1]["content"], row)
            turn += 1
    shuffled = list(rows.values())
    writer.random.shuffle(shuffled)
    return shuffled


def spoil(row: dict[str, Any]) -> dict[str, Any]:
    """The row after a careless export: str() instead of json.dumps(), so the answer looks like JSON and is none."""
    *question, answer = row["messages"]
    return {"messages": [*question, {**answer, "content": str(json.loads(answer["content"]))}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write to (default: beside this file)"
    )
    folder = parser.parse_args().out
    source = yaml.safe_load((HERE / "tickets.yaml").read_text(encoding="utf-8"))
    files = {split: make_rows(source, split) for split in ROWS}
    files["spoilt"] = [spoil(row) for row in files["train"][:SPOILT_ROWS]]
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
