"""What `finetune rollout plan` tells before anything starts. Held against the real process in
tests/calibration/test_guardrails.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune_operator.api.adapterdeployment_analysis import ObjectiveSource
from finetune_operator.core import eprocesses, power, sequences
from finetune_operator.core.power import Harm, Mean, Step
from finetune_operator.core.statistics import AnalysisPlan, GuardrailPlan, ObjectivePlan
from tests.unit.statistics import traffic

STEPS = [Step(5, 600), Step(25, 600), Step(50, 1_200)]


def test_a_plan_with_enough_traffic_has_no_warning() -> None:
    found = power.plan_power(AnalysisPlan(), STEPS, requests_per_second=100)
    assert [step.requests for step in found.steps] == [60_000, 60_000, 120_000]
    assert all(step.caught["errors"] > 0.95 for step in found.steps)
    assert [step.warnings for step in found.steps] == [()] * 3
    assert found.warnings == ()


def test_steps_that_are_too_short_say_how_long_they_should_be() -> None:
    found = power.plan_power(AnalysisPlan(), STEPS, requests_per_second=5)
    need = found.steps[0].needs[0]
    assert need.seconds_certain == pytest.approx(need.requests_certain / 5)
    assert found.steps[0].warnings == (
        "errors: twice the events would be caught in less than 95 of 100 rollouts at 5% within 10m0s; hold it for "
        "2h25m",
    )


def test_more_traffic_weight_or_harm_needs_no_more_requests() -> None:
    def requests(weight: float, harm: Harm) -> float:
        found = power.plan_power(
            AnalysisPlan(), [Step(weight, 60)], requests_per_second=20, harms={"errors": harm}
        )
        return found.steps[0].needs[0].requests_certain

    assert requests(5, Harm()) > requests(20, Harm()) > requests(50, Harm())
    assert requests(10, Harm(0.02, 2)) > requests(10, Harm(0.02, 4)) > requests(10, Harm(0.02, 20))
    assert requests(10, Harm(0.001, 2)) > requests(10, Harm(0.01, 2)) > requests(10, Harm(0.1, 2))


def test_harm_that_the_guardrail_does_not_look_for_is_never_certain() -> None:
    found = power.plan_power(
        AnalysisPlan(), [Step(10, 600)], requests_per_second=20, harms={"errors": Harm(0.02, 1.0)}
    )
    assert math.isinf(found.steps[0].needs[0].requests_certain)
    assert found.steps[0].caught["errors"] < 0.01
    assert "it cannot tell such a small difference" in found.steps[0].warnings[0]


def test_steps_without_a_comparison_find_nothing_and_are_not_warned_about() -> None:
    found = power.plan_power(AnalysisPlan(), [Step(0, 600), Step(100, 600)], requests_per_second=50)
    assert [step.caught["errors"] for step in found.steps] == [0, 0]
    assert [step.warnings for step in found.steps] == [(), ()]
    assert found.warnings == (
        "errors: twice the events would be caught in 0 of 100 rollouts before the last step ends",
    )


def test_the_chance_over_several_steps_is_that_of_the_real_process() -> None:
    """A tripled rate, from the first step on."""
    seed, rollouts, log_needed = 61, 250, eprocesses.log_threshold(0.01)
    rng = np.random.default_rng(seed)
    steps = [Step(5, 300), Step(25, 300), Step(50, 150)]
    ends = np.cumsum([step.seconds * 10 for step in steps])
    harms = {"errors": Harm(0.02, 3.0)}
    found = power.plan_power(AnalysisPlan(), steps, requests_per_second=10, harms=harms)
    said = [step.caught["errors"] for step in found.steps]
    needed = []
    for _ in range(rollouts):
        batches = [
            batch
            for step in steps
            for batch in traffic.random_batches(
                rng, polls=int(step.seconds / 5), requests_per_poll=50, weight=step.weight / 100,
                stable_rate=0.02, candidate_rate=0.06,
            )
        ]  # fmt: skip
        process, requests, _ = traffic.watch(batches, log_needed=log_needed)
        needed.append(requests if process.log_peak >= log_needed else math.inf)
    caught = [float(np.mean(np.array(needed) <= end)) for end in ends]
    print(f"seed {seed}: caught {caught}, said {said}")
    assert said == pytest.approx(caught, abs=0.12)
    assert sum(said) <= sum(caught) + 0.05, "towards caution"


def test_an_objective_needs_about_what_its_sequence_needs() -> None:
    """Equal arms of yes-or-no values, margin 5 points, at 50 percent."""
    plan = AnalysisPlan(objectives=(ObjectivePlan(name="thumbs", metric="helpful", margin=0.05),))
    need = power.plan_power(
        plan, [Step(50, 600)], requests_per_second=50, means={"thumbs": Mean(0.4, answered=0.1)}
    ).objectives[0]
    rng = np.random.default_rng(62)
    values = int(need.requests_certain * 0.1 / 2)
    proved = 0
    for _ in range(300):
        stable, candidate = rng.binomial(values, 0.8, 2) / values
        error = math.sqrt(2 * 0.16 / values)
        half = sequences.radius(error, n=values / 2, alpha=0.05)
        proved += candidate - stable - half > -0.05
    print(f"seed 62: {proved / 300:.3f} proved after {need.requests_certain:.0f} requests")
    assert 0.9 <= proved / 300 <= 0.99
    assert need.requests_likely < need.requests_certain


def test_what_cannot_be_planned_is_said() -> None:
    plan = AnalysisPlan(
        objectives=(
            ObjectivePlan(name="thumbs", metric="helpful", margin=0.01),
            ObjectivePlan(name="seconds", metric="seconds", source=ObjectiveSource.ROUTER),
            ObjectivePlan(name="hopeless", metric="helpful", margin=0.01),
        )
    )
    found = power.plan_power(
        plan, STEPS, requests_per_second=100, means={"hopeless": Mean(gain=-0.05, answered=1.0)}
    )
    thumbs, hopeless, seconds = found.warnings
    assert thumbs.startswith("thumbs needs ")
    assert hopeless == "hopeless: the assumed difference lies beyond the margin, so it is never proved"
    assert seconds.startswith("seconds: not planned")


def test_an_objective_without_a_step_that_compares_is_never_decided() -> None:
    plan = AnalysisPlan(objectives=(ObjectivePlan(name="thumbs", metric="helpful"),))
    found = power.plan_power(plan, [Step(0, 60), Step(100, 60)], requests_per_second=100)
    assert "thumbs: no step has answers of both sides, so it is never decided" in found.warnings


def test_several_guardrails_need_more_because_they_share_alpha() -> None:
    def certain(*names: str) -> float:
        plan = AnalysisPlan(guardrails=tuple(GuardrailPlan(name=name) for name in names))
        return power.plan_power(plan, STEPS, requests_per_second=20).steps[1].needs[0].requests_certain

    assert certain("errors") < certain("errors", "slow", "empty", "flagged")


@pytest.mark.parametrize(
    ("steps", "per_second", "harm", "message"),
    [
        ([Step(120, 60)], 10.0, Harm(), "weights are 0 to 100"),
        ([Step(10, -1)], 10.0, Harm(), "times not below 0"),
        ([Step(10, 60)], 0.0, Harm(), "traffic must be above 0"),
        ([Step(10, 60)], math.nan, Harm(), "traffic must be above 0"),
        ([Step(10, 60)], math.inf, Harm(), "traffic must be above 0"),
        ([Step(10, 60)], 10.0, Harm(relative_risk=math.nan), "relative risk above 0"),
        ([Step(10, 60)], 10.0, Harm(base_rate=2.0), "errors: the base rate must lie between 0 and 1"),
        ([Step(10, 60)], 10.0, Harm(relative_risk=0.0), "relative risk above 0"),
    ],
)
def test_impossible_assumptions_are_refused(
    steps: list[Step], per_second: float, harm: Harm, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        power.plan_power(AnalysisPlan(), steps, requests_per_second=per_second, harms={"errors": harm})
