"""The quickstart's data is what its README says: reproducible, strict, balanced, and held-out rows are new."""

from __future__ import annotations

import ast
import json
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
CATEGORIES = {
    "billing",
    "bug",
    "cancellation",
    "feature_request",
    "how_to",
    "login",
    "security",
    "shipping",
}
PRIORITIES = ["low", "normal", "high", "urgent"]
SPLITS = ("train", "heldout")
# Fewest characters per token that the model's tokenizer makes of such text, and the tokens of the chat template.
CHARACTERS_PER_TOKEN = 3.0
SHOUTED_CHARACTERS_PER_TOKEN = 2.5
TEMPLATE_TOKENS = 20


def read_rows(split: str) -> list[dict[str, Any]]:
    lines = (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tickets(split: str) -> list[str]:
    return [row["messages"][1]["content"] for row in read_rows(split)]


def answers(split: str) -> list[dict[str, str]]:
    return [json.loads(row["messages"][2]["content"]) for row in read_rows(split)]


def five_grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((QUICKSTART / "tickets.yaml").read_text(encoding="utf-8"))
    return parsed


def test_generator_reproduces_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(QUICKSTART / "make_data.py"), "--out", str(tmp_path)], check=True)
    for name in (*SPLITS, "spoilt"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (QUICKSTART / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_asks_the_same_way_and_answers_in_strict_json(split: str) -> None:
    systems = {row["messages"][0]["content"] for row in read_rows("train") + read_rows("heldout")}
    assert len(systems) == 1
    for row in read_rows(split):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        text = row["messages"][2]["content"]
        answer = json.loads(text)
        assert list(answer) == ["category", "priority", "summary"]
        assert json.dumps(answer, separators=(",", ":")) == text
        assert answer["category"] in CATEGORIES
        assert answer["priority"] in PRIORITIES
        assert 1 <= len(answer["summary"].split()) <= 8


def test_spoilt_answers_are_no_json_and_otherwise_the_right_ones() -> None:
    for spoilt, good in zip(read_rows("spoilt"), read_rows("train"), strict=False):
        assert spoilt["messages"][:2] == good["messages"][:2]
        text = spoilt["messages"][2]["content"]
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)
        assert ast.literal_eval(text) == json.loads(good["messages"][2]["content"])


@pytest.mark.parametrize(("split", "size"), [("train", 800), ("heldout", 96)])
def test_categories_are_balanced_and_no_priority_is_rare(split: str, size: int) -> None:
    found = answers(split)
    assert len(found) == size
    assert Counter(answer["category"] for answer in found) == dict.fromkeys(CATEGORIES, size // 8)
    priorities = Counter(answer["priority"] for answer in found)
    assert all(priorities[priority] >= size * 0.08 for priority in PRIORITIES)


@pytest.mark.parametrize("split", SPLITS)
def test_no_ticket_occurs_twice(split: str) -> None:
    assert len(set(tickets(split))) == len(tickets(split))


def test_held_out_tickets_share_no_more_than_a_tenth_of_their_five_grams_with_training() -> None:
    seen = set().union(*(five_grams(ticket) for ticket in tickets("train")))
    for ticket in tickets("heldout"):
        grams = five_grams(ticket)
        assert len(grams & seen) <= 0.1 * len(grams), ticket


def test_splits_share_no_wording_phrase_product_or_name(source: dict[str, Any]) -> None:
    for group in ("slots", "phrases"):
        for kind, values in source[group]["heldout"].items():
            assert not set(values) & set(source[group]["train"][kind]), kind
    wordings = {split: {text for issue in source["issues"] for text in issue[split]} for split in SPLITS}
    assert not wordings["train"] & wordings["heldout"]
    assert len(wordings["train"]) == 240
    assert len(wordings["heldout"]) == 80


@pytest.mark.parametrize("split", SPLITS)
def test_every_issue_occurs(split: str, source: dict[str, Any]) -> None:
    given = [answer["summary"] for answer in answers(split)]
    for issue in source["issues"]:
        pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(issue["summary"]))
        assert sum(re.fullmatch(pattern, summary) is not None for summary in given) >= 2, issue["summary"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_ticket_holds_what_the_summary_copies(split: str, source: dict[str, Any]) -> None:
    """Otherwise the model would be taught to invent products and order numbers."""
    names = [value for kind in ("product", "plan", "phone", "city") for value in source["slots"][split][kind]]
    for ticket, answer in zip(tickets(split), answers(split), strict=True):
        words = answer["summary"].replace(",", "").split()
        copied = [word for word in words if any(letter.isdigit() for letter in word)]
        copied += [name for name in names if name in answer["summary"]]
        for text in copied:
            assert text.lower() in ticket.lower(), (text, ticket)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_fit_into_the_jobs_max_length(split: str) -> None:
    job = yaml.safe_load((QUICKSTART / "finetunejob.yaml").read_text(encoding="utf-8"))
    limit = job["spec"]["hyperparameters"]["maxLength"]
    for row in read_rows(split):
        characters = sum(len(message["content"]) for message in row["messages"])
        shouted = row["messages"][1]["content"].isupper()
        density = SHOUTED_CHARACTERS_PER_TOKEN if shouted else CHARACTERS_PER_TOKEN
        assert characters / density + TEMPLATE_TOKENS <= limit, row
