"""The sides get the shares of the users that they should get, or the rollout pauses."""

from __future__ import annotations

import numpy as np
import pytest

from finetune_operator.api.adapterdeployment_status import Check, CheckPhase
from finetune_operator.api.routes import Arm
from finetune_operator.core.statistics import AnalysisPlan, Evidence, SampleRatioPlan, assess
from tests.unit.statistics.fleets import answer, arm_counters, folded, key_sample

LIMIT = 1_024


def rollout(
    seed: int, *, weights: tuple[float, ...], lost: float = 0.0, users: int = 6_000, per_step: int = 4
) -> tuple[Evidence, list[Check]]:
    """Users who come back with Zipf frequencies, two routers, samples that start anew with each weight; a part of the
    candidate's outcomes is `lost`. Also what was said at every poll."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**53, users)
    places = rng.random(users)
    frequencies = 1 / np.arange(1, users + 1) ** 1.1
    evidence, said = None, []
    for step, weight in enumerate(weights):
        seen: tuple[set[int], set[int]] = (set(), set())
        for _ in range(per_step):
            answers = []
            for index in range(2):
                who = rng.choice(users, 400, p=frequencies / frequencies.sum())
                seen[index].update(who[(places[who] < 1 - weight) | (rng.random(400) >= lost)].tolist())
                known = np.array(sorted(seen[index]), dtype=np.int64)
                smallest = known[np.argsort(hashes[known])[:LIMIT]]
                exposed = places[smallest] >= 1 - weight
                sample = key_sample(
                    hashes[smallest[~exposed]].tolist(),
                    hashes[smallest[exposed]].tolist(),
                    comparison=str(step),
                )
                answers.append(answer(instance=f"router-{index}", epoch=f"worker-{index}", samples=[sample]))
            evidence = folded(evidence, *answers, weight=weight * 100, comparison=str(step))
            said.append(assess(evidence, AnalysisPlan(), weight=weight * 100).sample_ratio)
    assert evidence is not None
    return evidence, said


def test_right_shares_raise_no_alarm_over_changing_weights() -> None:
    rollouts, alarms, shares = 100, 0, []
    for seed in range(rollouts):
        evidence, said = rollout(seed, weights=(0.05, 0.25, 0.5, 0.1))
        alarms += any(check.phase is CheckPhase.FAILED for check in said)
        shares.append([s.candidate_keys / (s.candidate_keys + s.stable_keys) for s in evidence.strata])
    print(f"seeds 0 to {rollouts - 1}: {alarms} alarms at alpha 0.001; mean shares {np.mean(shares, axis=0)}")
    assert alarms <= 1
    assert np.mean(shares, axis=0) == pytest.approx([0.05, 0.25, 0.5, 0.1], abs=0.02)


def test_users_that_get_lost_on_one_side_raise_an_alarm() -> None:
    """Seven in ten outcomes of the candidate never arrive."""
    found = sum(
        rollout(seed, weights=(0.25, 0.5), lost=0.7)[1][-1].phase is CheckPhase.FAILED for seed in range(40)
    )
    print(f"seeds 0 to 39: {found} of 40 found")
    assert found >= 38


def test_a_key_counts_once_and_on_the_side_where_it_came_first() -> None:
    evidence = folded(None, answer(samples=[key_sample([1, 2, 3], [4])]), weight=25.0)
    evidence = folded(evidence, answer(samples=[key_sample([1, 2], [3, 4, 5])]), weight=25.0)
    assert [(s.stable_keys, s.candidate_keys) for s in evidence.strata] == [(3, 2)]


def test_keys_of_a_sample_over_two_weights_are_known_but_not_counted() -> None:
    evidence = folded(None, answer(samples=[key_sample([1, 2, 3], [4])]), weight=25.0)
    evidence = folded(evidence, answer(samples=[key_sample([1, 2, 3], [4, 5, 6])]), weight=50.0)
    evidence = folded(evidence, answer(samples=[key_sample([1, 2, 3], [4, 5, 6, 7])]), weight=50.0)
    assert [(s.weight, s.stable_keys, s.candidate_keys) for s in evidence.strata] == [(25, 3, 1), (50, 0, 1)]


def test_samples_of_another_comparison_are_left_alone() -> None:
    evidence = folded(None, answer(samples=[key_sample([1, 2], [3], comparison="before")]))
    assert evidence.strata == ()


def test_without_stickiness_requests_are_the_units() -> None:
    plan = AnalysisPlan(sample_ratio=SampleRatioPlan(sticky=False))
    evidence = folded(None, answer())
    evidence = folded(
        evidence,
        answer(arm_counters(Arm.STABLE, requests=500), arm_counters(Arm.CANDIDATE, requests=500)),
        weight=10.0,
    )
    check = assess(evidence, plan, weight=10.0).sample_ratio
    assert check.phase is CheckPhase.FAILED
    assert (
        check.message == "50.0% of 1000 requests were the candidate's, 10.0% were expected (weight now 10%)"
    )
    assert check.n is not None
    assert (check.n.stable, check.n.candidate) == (500, 500)


def test_nobody_yet_is_inconclusive() -> None:
    check = assess(folded(None, answer()), AnalysisPlan(), weight=10.0).sample_ratio
    assert (check.phase, check.e_value, check.message) == (
        CheckPhase.INCONCLUSIVE,
        1.0,
        "no distinct users yet",
    )
