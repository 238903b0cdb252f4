"""The next token: greedy, nucleus, seeds, penalties, and the probabilities that are told."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from finetune_server.sampling import Sampling, choose, describe, make_generator

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]))


def draw(count: int, **settings: float) -> Counter[int]:
    source = make_generator(1)
    options = Sampling(max_tokens=1, **settings)  # type: ignore[arg-type]  # floats and ints by name
    return Counter(choose(LOGITS, options, Counter(), source) for _ in range(count))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(20, temperature=0) == {0: 20}
    assert draw(20, temperature=1e-300) == {0: 20}


def test_shares_are_the_probabilities() -> None:
    found = draw(4000)
    for token, share in enumerate([0.5, 0.25, 0.15, 0.06, 0.04]):
        # Four standard deviations.
        assert abs(found[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_a_high_temperature_flattens() -> None:
    found = draw(4000, temperature=100)
    assert max(found.values()) - min(found.values()) < 200


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3, "top_p": 0.55}, {0}),  # 0.5 is 0.556 of what top_k left
        ({"min_p": 0.4}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
    ],
)
def test_only_the_likely_ones_remain(settings: dict[str, float], expected: set[int]) -> None:
    assert set(draw(600, **settings)) == expected


def test_a_flat_distribution_over_many_tokens_keeps_all_of_top_p() -> None:
    logits = torch.zeros(5000)
    source = make_generator(3)
    options = Sampling(max_tokens=1, top_p=0.9)
    found = {choose(logits, options, Counter(), source) for _ in range(3000)}
    assert len(found) > 1800  # more than the 1,024 that are looked at first


def test_penalties_push_down_what_was_said() -> None:
    options = Sampling(max_tokens=1, temperature=0, presence_penalty=0.5)
    assert choose(LOGITS, options, Counter({0: 1}), make_generator(0)) == 0  # 0.5 e^-0.5 = 0.30 > 0.25
    often = Sampling(max_tokens=1, temperature=0, frequency_penalty=0.5)
    assert choose(LOGITS, often, Counter({0: 2}), make_generator(0)) == 1  # 0.5 e^-1 = 0.18 < 0.25


def test_seeds_repeat_and_their_lack_does_not() -> None:
    def row(seed: int | None) -> list[int]:
        source = make_generator(seed)
        return [choose(LOGITS, Sampling(max_tokens=1), Counter(), source) for _ in range(40)]

    assert row(5) == row(5) != row(6)
    assert row(None) != row(None)
    assert len(row(-3)) == 40


def test_logprobs_are_before_temperature_and_best_first() -> None:
    told = describe(LOGITS, 2, 2)
    assert told.token == 2
    assert math.isclose(told.logprob, math.log(0.15), abs_tol=1e-5)
    assert [token for token, _ in told.top] == [0, 1]
    assert math.isclose(told.top[0][1], math.log(0.5), abs_tol=1e-5)
