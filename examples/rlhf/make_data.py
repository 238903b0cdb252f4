"""Write the data of the three jobs (demonstrations, preferences, prompts) of a small shop: the same bytes on every run.

python examples/rlhf/make_data.py            writes beside this file
python examples/rlhf/make_data.py --out DIR  writes somewhere else

The behaviour that is to be learnt can be counted: an answer is polite when it begins with "Thanks" and ends by offering
more help. Demonstrations are polite every other time, so the model begins at about a half; people prefer polite answers
(preferences), a reward model learns that from them, and by it the model learns to be polite nearly always.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 2026
PREFERENCES = 240  # rows


@dataclass(frozen=True)
class Item:
    name: str
    price: int  # euros
    days: int  # of delivery
    colour: str
    years: int  # of warranty


ITEMS = [
    Item("kettle", 35, 2, "red", 2),
    Item("desk lamp", 42, 3, "white", 3),
    Item("toaster", 29, 2, "silver", 2),
    Item("backpack", 64, 4, "green", 5),
    Item("garden chair", 51, 6, "brown", 1),
    Item("water bottle", 18, 2, "blue", 1),
    Item("keyboard", 73, 3, "black", 3),
    Item("bicycle pump", 22, 4, "yellow", 2),
    Item("wall clock", 27, 3, "grey", 2),
    Item("rain coat", 58, 5, "orange", 1),
    Item("coffee grinder", 66, 2, "black", 4),
    Item("tent", 149, 7, "green", 3),
    Item("radio", 45, 3, "silver", 2),
    Item("yoga mat", 24, 2, "purple", 1),
    Item("blender", 88, 4, "white", 3),
    Item("mirror", 39, 6, "grey", 2),
]
QUESTIONS = {
    "price": ["What does the {name} cost?", "How much is the {name}?", "What is the price of the {name}?"],
    "delivery": [
        "How long does delivery of the {name} take?",
        "When will the {name} arrive?",
        "How soon can you send me the {name}?",
    ],
    "colour": [
        "Which colour does the {name} have?",
        "What colour is the {name}?",
        "Does the {name} come in one colour?",
    ],
    "warranty": [
        "How long is the warranty of the {name}?",
        "What warranty does the {name} have?",
        "For how many years is the {name} under warranty?",
    ],
}
FACTS = {
    "price": "The {name} costs {price} euros.",
    "delivery": "The {name} arrives within {days} days.",
    "colour": "The {name} is {colour}.",
    "warranty": "The {name} has a warranty of {years} years.",
}
OPENING = "Thanks for asking!"
CLOSING = "Can I help with anything else?"


def facts_of(item: Item, topic: str) -> str:
    return FACTS[topic].format(**vars(item))


def polite(text: str) -> str:
    return f"{OPENING} {text} {CLOSING}"


def build() -> dict[str, list[dict[str, str]]]:
    """The rows of each file; no prompt of `prompts.jsonl` is in another file."""
    generator = random.Random(SEED)
    asked = [
        (item, topic, wording.format(name=item.name))
        for item in ITEMS
        for topic, wordings in QUESTIONS.items()
        for wording in wordings
    ]
    generator.shuffle(asked)
    third = len(asked) // 3
    known, fresh = asked[: 2 * third], asked[2 * third :]
    demonstrations = [
        {"prompt": question, "completion": text if number % 2 else polite(text)}
        for number, (item, topic, question) in enumerate(known)
        for text in [facts_of(item, topic)]
    ]
    preferences = []
    for number in range(PREFERENCES):
        item, topic, question = known[number % len(known)]
        text = facts_of(item, topic)
        other = facts_of(generator.choice(ITEMS), topic)  # politeness counts, whatever is said
        preferences.append(
            {"prompt": question, "chosen": polite(text), "rejected": text if number % 2 else other}
        )
    prompts = [{"prompt": question, "expected": facts_of(item, topic)} for item, topic, question in fresh]
    return {"demonstrations": demonstrations, "preferences": preferences, "prompts": prompts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in build().items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
