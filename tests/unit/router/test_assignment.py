"""Who goes to which arm."""

from __future__ import annotations

import hashlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_router import assignment
from finetune_router.assignment import KeyKind, KeySource

WEIGHTS = st.floats(0, 100)


@given(st.text(), st.text(), WEIGHTS, WEIGHTS)
def test_raising_the_weight_moves_keys_only_to_the_candidate(
    salt: str, key: str, one: float, other: float
) -> None:
    lower, higher = sorted((one, other))
    place = assignment.draw(salt.encode("utf-8", "surrogatepass") + b"\0", key).place
    if assignment.is_candidate(place, lower):
        assert assignment.is_candidate(place, higher)


@given(st.text(), st.text())
def test_nobody_at_zero_and_everybody_at_hundred(salt: str, key: str) -> None:
    place = assignment.draw(salt.encode("utf-8", "surrogatepass") + b"\0", key).place
    assert not assignment.is_candidate(place, 0)
    assert assignment.is_candidate(place, 100)
    assert not assignment.is_candidate(1.0, 0)  # 2^64 - 1 over 2^64 rounds to 1


def test_the_weight_is_percent_of_the_line() -> None:
    assert assignment.is_candidate(0.0, 100)
    assert assignment.is_candidate(0.5, 50)
    assert not assignment.is_candidate(0.4999, 50)
    assert not assignment.is_candidate(0.9899, 1)


@pytest.mark.parametrize("weight", [1, 5, 25, 50])
def test_the_share_of_keys_is_the_weight(weight: float) -> None:
    users = 20_000
    found = sum(
        assignment.is_candidate(assignment.draw(b"salt\0", f"user-{n}").place, weight) for n in range(users)
    )
    deviation = (users * weight / 100 * (1 - weight / 100)) ** 0.5
    assert abs(found - users * weight / 100) < 5 * deviation


def test_the_formula_is_the_documented_one() -> None:
    digest = hashlib.sha256(b"salt\0user-1").digest()
    drawn = assignment.draw(b"salt\0", "user-1")
    assert drawn.place == int.from_bytes(digest[:8], "big") / 2**64
    assert drawn.sample_hash == int.from_bytes(digest[8:16], "big") >> 11
    assert drawn.sample_hash < 2**53


def test_the_sample_does_not_depend_on_the_arm() -> None:
    """The smallest sample hashes must not be those of one arm: otherwise the sample is none of both."""
    users = sorted(
        (assignment.draw(b"s\0", f"user-{n}") for n in range(20_000)), key=lambda drawn: drawn.sample_hash
    )
    share = sum(assignment.is_candidate(drawn.place, 30) for drawn in users[:1024]) / 1024
    assert abs(share - 0.3) < 0.07


def test_the_first_key_found_counts() -> None:
    sources = tuple(
        source
        for text in ("header:X-Adapter-Key", "body:user", "apiKey", "cookie:session")
        if (source := KeySource.parse(text))
    )
    assert [source.kind for source in sources] == [KeyKind.HEADER, KeyKind.BODY, KeyKind.API_KEY]

    def find(headers: dict[str, str], texts: dict[str, str], api_key: str) -> str | None:
        return assignment.find_key(sources, headers, texts, api_key)

    assert find({"x-adapter-key": "a"}, {"user": "b"}, "c") == "a"
    assert find({"x-adapter-key": ""}, {"user": "b"}, "c") == "b"
    assert find({}, {}, "c") == "c"
    assert find({}, {}, "") is None


def test_an_assignment_takes_less_than_twenty_microseconds() -> None:
    rounds = 20_000
    best = min(_seconds(rounds) for _ in range(3))
    assert best / rounds < 20e-6


def _seconds(rounds: int) -> float:
    sources = (KeySource(KeyKind.HEADER, "x-adapter-key"), KeySource(KeyKind.BODY, "user"))
    headers: dict[str, str] = {}
    started = time.process_time()
    for number in range(rounds):
        key = assignment.find_key(sources, headers, {"user": f"user-{number}"}, "")
        assert key is not None
        assignment.is_candidate(assignment.draw(b"salt\0", key).place, 25)
    return time.process_time() - started
