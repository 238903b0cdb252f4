"""Conditions on numbers from outside, and the tallies that decide on them."""

from __future__ import annotations

import functools
import math

import pytest

from finetune_operator.api.adapterdeployment_status import CheckPhase
from finetune_operator.core import thresholds
from finetune_operator.core.thresholds import Limits, Tally

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


NO_DATA = (OPEN, "NoData: the query gave nothing, or no finite number")


@pytest.mark.parametrize(
    ("result", "alone", "with_failure"),
    [
        (1.0, (GOOD, "1 meets the success condition"), (GOOD, "1 meets the success condition")),
        (1.5, (BAD, "1.5 does not meet the success condition"), (OPEN, "1.5 meets neither condition")),
        (3.0, (BAD, "3 does not meet the success condition"), (BAD, "3 meets the failure condition")),
        (
            math.inf,
            (BAD, "inf does not meet the success condition"),
            (BAD, "inf meets the failure condition"),
        ),
        (math.nan, NO_DATA, NO_DATA),
        (None, NO_DATA, NO_DATA),
    ],
)
def test_a_measurement_is_judged_and_no_data_is_no_failure(
    result: float | None, alone: tuple[CheckPhase, str], with_failure: tuple[CheckPhase, str]
) -> None:
    success, failure = thresholds.parse_condition("result <= 1.2"), thresholds.parse_condition("result > 2")
    assert thresholds.measure(result, success=success) == alone
    assert thresholds.measure(result, success=success, failure=failure) == with_failure


@pytest.mark.parametrize(
    ("phases", "verdict"),
    [
        ([], None),
        ([GOOD] * 2, None),
        ([GOOD] * 3, GOOD),
        ([BAD] * 2, None),
        ([GOOD, BAD, GOOD, BAD, GOOD, BAD], BAD),
        ([OPEN] * 2, None),
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
    assert thresholds.judge(functools.reduce(thresholds.count, phases, Tally()), limits) is verdict
