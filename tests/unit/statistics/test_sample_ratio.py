"""The sides get the shares of the users that they should get, or the rollout pauses. Rollouts: tests/calibration."""

from __future__ import annotations

from finetune_operator.api.adapterdeployment_status import CheckPhase
from finetune_operator.api.routes import Arm
from finetune_operator.core.statistics import AnalysisPlan, SampleRatioPlan, assess
from tests.unit.statistics.fleets import answer, arm_counters, folded, key_sample


def test_a_key_counts_once_per_weight_and_with_the_chance_that_it_still_has() -> None:
    evidence = folded(None, answer(samples=[key_sample([1, 2, 3], [4])]), weight=25.0)
    evidence = folded(evidence, answer(samples=[key_sample([1, 2, 3, 5], [4])]), weight=25.0)
    assert evidence.keys.coins == {0.25: (4, 1)}
    # 4 stays the candidate's for sure; 1, 2 and 3 lie below 75 and are the candidate's from 50 on.
    told = answer(samples=[key_sample([1], [2, 3, 4], comparison="b")])
    evidence = folded(evidence, told, weight=50.0, comparison="b")
    assert evidence.keys.coins == {0.25: (4, 1), 0.333333: (1, 2)}
    assert {key: evidence.keys.places[key] for key in (1, 2, 4)} == {1: (0, 50), 2: (50, 75), 4: (75, 100)}
    assert evidence.keys.candidate == 3


def test_keys_that_came_first_at_weight_0_are_coins_later() -> None:
    told = answer(samples=[key_sample([1, 2, 3, 4], [], comparison="0")])
    evidence = folded(None, told, weight=0.0, comparison="0")
    assert evidence.keys.coins == {}
    told = answer(samples=[key_sample([1, 2, 3], [4], comparison="5")])
    evidence = folded(evidence, told, weight=5.0, comparison="5")
    assert evidence.keys.coins == {0.05: (3, 1)}


def test_keys_of_one_sample_over_two_weights_are_known_but_no_coins() -> None:
    evidence = folded(None, answer(samples=[key_sample([1, 2, 3], [4])]), weight=25.0)
    evidence = folded(evidence, answer(samples=[key_sample([1, 2, 3], [1, 4, 5, 6])]), weight=50.0)
    evidence = folded(evidence, answer(samples=[key_sample([1, 2, 3], [1, 2, 4, 5, 6, 7])]), weight=50.0)
    assert evidence.keys.coins == {0.25: (3, 1), 0.5: (0, 1)}


def test_samples_of_another_comparison_are_left_alone() -> None:
    evidence = folded(None, answer(samples=[key_sample([1, 2], [3], comparison="before")]))
    assert evidence.keys.places == {}


def test_without_stickiness_requests_are_the_units() -> None:
    plan = AnalysisPlan(sample_ratio=SampleRatioPlan(sticky=False))
    evidence = folded(None, answer(), plan=plan)
    told = answer(arm_counters(Arm.STABLE, requests=500), arm_counters(Arm.CANDIDATE, requests=500))
    evidence = folded(evidence, told, plan=plan)
    check = assess(evidence, plan, weight=10.0).sample_ratio
    assert check.phase is CheckPhase.FAILED
    assert check.message == (
        "50.0% of 1000 assigned requests came to the candidate, 10.0% should have (weight now 10%)"
    )
    assert check.n is not None
    assert (check.n.stable, check.n.candidate) == (500, 500)
    assert (check.estimate, check.expected) == (0.5, 0.1)


def test_nobody_yet_is_inconclusive() -> None:
    check = assess(folded(None, answer()), AnalysisPlan(), weight=10.0).sample_ratio
    assert (check.phase, check.e_value, check.message) == (
        CheckPhase.INCONCLUSIVE,
        1.0,
        "no users compared yet; that begins a minute after a change of the weight",
    )


def test_of_requests_just_after_a_change_of_the_weight_nobody_knows_when_they_were_assigned() -> None:
    plan = AnalysisPlan(sample_ratio=SampleRatioPlan(sticky=False))
    evidence = folded(None, answer(), plan=plan, weight=5.0)
    for requests in (500, 1_000):
        told = answer(
            arm_counters(Arm.STABLE, requests=requests), arm_counters(Arm.CANDIDATE, requests=requests)
        )
        evidence = folded(evidence, told, plan=plan, weight=50.0)
    assert evidence.keys.coins == {0.5: (500, 500)}


def test_the_side_that_answers_sooner_has_no_more_users() -> None:
    """Of a candidate that takes half as long, the first users come in alone; they are counted with the others."""
    fast = answer(
        arm_counters(Arm.CANDIDATE, requests=90), samples=[key_sample([], range(90), comparison="50")]
    )
    evidence = folded(folded(None, answer()), fast, weight=50, comparison="50", is_settling=True)
    check = assess(evidence, AnalysisPlan(), weight=50).sample_ratio
    assert check.phase is CheckPhase.INCONCLUSIVE
    assert check.n is not None
    # Answers: they tell that the candidate has users at all.
    assert (check.n.stable, check.n.candidate) == (0, 90)
    told = answer(samples=[key_sample(range(100, 200), range(110), comparison="50")])
    evidence = folded(evidence, told, weight=50, comparison="50")
    assert evidence.keys.coins == {0.5: (90, 100)}


def test_answers_to_requests_of_the_former_weight_are_no_coins_of_the_new_one() -> None:
    plan = AnalysisPlan(sample_ratio=SampleRatioPlan(sticky=False))
    evidence = folded(None, answer(), plan=plan, weight=5)
    for polls in (1, 2, 3):  # answers take 15 s, so three polls tell of requests that were begun at 5 percent
        told = answer(
            arm_counters(Arm.STABLE, requests=95 * polls), arm_counters(Arm.CANDIDATE, requests=5 * polls)
        )
        evidence = folded(evidence, told, plan=plan, weight=50, is_settling=True)
    assert evidence.keys.coins == {}
