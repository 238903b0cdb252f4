"""How right answers are. Pure: texts in, numbers out; percentages are 0 to 100."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    exact_match: float  # share of answers that equal the expected text, outer white space apart
    valid_json: (
        float | None
    )  # share that is one JSON object with exactly the keys; None: no keys were asked for
    match: dict[str, float]  # field -> share whose value equals the expected one


def score_answers(
    answers: Sequence[str], expected: Sequence[str], *, keys: Sequence[str], fields: Sequence[str]
) -> Scores:
    """Compares answers with what the rows say. An answer that is no valid JSON matches no field."""
    pairs = list(zip(answers, expected, strict=True))
    parsed = [(parse_object(answer, keys=keys), parse_object(right, keys=())) for answer, right in pairs]
    return Scores(
        exact_match=_percent(answer.strip() == right.strip() for answer, right in pairs),
        valid_json=_percent(found is not None for found, _ in parsed) if keys else None,
        match={
            field: _percent(
                found is not None
                and right is not None
                and field in found
                and found[field] == right.get(field)
                for found, right in parsed
            )
            for field in fields
        },
    )


def parse_object(text: str, *, keys: Sequence[str]) -> dict[str, Any] | None:
    """Returns the object if the whole text is strict JSON for one, with exactly `keys` (any keys when empty)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError:
        return None
    if not isinstance(value, dict) or (keys and set(value) != set(keys)):
        return None
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _percent(hits: Any) -> float:
    values = [bool(hit) for hit in hits]
    return round(100 * sum(values) / len(values), 2) if values else 0.0
