"""Conditions on numbers from outside, and the tallies that decide on them."""

from __future__ import annotations

import math

import pytest

from finetune_operator.api.adapterdeployment_status import CheckPhase
from finetune_operator.core import thresholds
from finetune_operator.core.thresholds import Limits

GOOD, BAD, OPEN, ERROR = (
    CheckPhase.SUCCESSFUL, CheckPhase.FAILED, CheckPhase.INCONCLUSIVE, CheckPhase.ERROR,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "holds", "fails"),
    [
        ("result <= 1.2", 1.2, 1.3),
        ("result>0.95&&result<2", 1.0, 2.0),
        ("result < -1 || result > 1 && result != 5", 6.0, 5.0),
        ("result < -1 || result > 1 && result != 5", -2.0, 0.0),
        ("result == 1e-3", 0.001, 0.002),
        ("  result >= 10  ", 10.0, 9.999),
    ],
)
def test_conditions_mean_what_they_say(text: str, holds: float, fails: float) -> None:
    condition = thresholds.parse_condition(text)
    assert condition.holds(holds)
    assert not condition.holds(fails)


@pytest.mark.parametrize(
    "text",
    ["", "result", "result <= ", "result =< 3", "latency < 3", "result < 3 &&", "result < 3 and result > 1",
     "result < __import__('os')", "3 > result", "result < nan"],
)  # fmt: skip
def test_conditions_that_cannot_be_read_name_the_part_and_show_how(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"condition .* is no comparison of `result` with a number; write for example"
    ):
        thresholds.parse_condition(text)


@pytest.mark.parametrize(
    ("result", "alone", "with_failure"),
    [
        (1.0, GOOD, GOOD),
        (1.5, BAD, OPEN),
        (3.0, BAD, BAD),
        (math.inf, BAD, BAD),
        (math.nan, OPEN, OPEN),
        (None, OPEN, OPEN),
    ],
)
def test_a_measurement_is_judged_and_no_data_is_no_failure(
    result: float | None, alone: CheckPhase, with_failure: CheckPhase
) -> None:
    success, failure = thresholds.parse_condition("result <= 1.2"), thresholds.parse_condition("result > 2")
    assert thresholds.measure(result, success=success)[0] is alone
    phase, why = thresholds.measure(result, success=success, failure=failure)
    assert phase is with_failure
    assert why.startswith("NoData") is (result is None or math.isnan(result))


@pytest.mark.parametrize(
    ("phases", "verdict"),
    [
        ([], None),
        ([GOOD] * 2, None),
        ([GOOD] * 3, GOOD),
        ([BAD] * 2, None),
        ([GOOD, BAD, GOOD, BAD, GOOD, BAD], BAD),
        ([OPEN] * 3, OPEN),
        ([ERROR] * 2, None),
        ([ERROR] * 3, ERROR),
        (
            [ERROR, ERROR, OPEN, ERROR, ERROR],
            None,
        ),  # an answer, even without a verdict, ends the row of errors
        ([BAD] * 3 + [ERROR] * 9, BAD),
    ],
)
def test_one_more_than_is_borne_decides(phases: list[CheckPhase], verdict: CheckPhase | None) -> None:
    limits = Limits(failure_limit=2, inconclusive_limit=2, consecutive_error_limit=2, count=3)
    assert thresholds.judge(thresholds.count_all(phases), limits) is verdict
