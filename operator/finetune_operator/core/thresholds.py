"""Numbers from outside (Prometheus) against fixed conditions, with the rules of Argo Rollouts' analysis.

One departure: a missing or NaN result is Inconclusive, never a failure. See Argo Rollouts' documentation, "Analysis &
Progressive Delivery", for failureLimit, inconclusiveLimit and consecutiveErrorLimit.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.api.adapterdeployment_status import CheckPhase

Comparison = Callable[[float, float], bool]

COMPARISONS: dict[str, Comparison] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
CLAUSE = re.compile(r"\s*result\s*(<=|>=|==|!=|<|>)\s*([+-]?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*")
NO_DATA = "NoData"


@dataclass(frozen=True)
class Condition:
    """Clauses such as `result <= 1.2`, joined by && within and by || between the alternatives."""

    alternatives: tuple[tuple[tuple[Comparison, float], ...], ...]

    def holds(self, result: float) -> bool:
        return any(
            all(compare(result, number) for compare, number in clauses) for clauses in self.alternatives
        )


@dataclass(frozen=True)
class Limits:
    """Measurements of each kind that are borne; one more decides. `count` successful ones are asked for."""

    failure_limit: int = 3
    inconclusive_limit: int = 10
    consecutive_error_limit: int = 4
    count: int = 3


@dataclass(frozen=True)
class Tally:
    """Measurements so far."""

    successful: int = 0
    failed: int = 0
    inconclusive: int = 0
    error: int = 0
    consecutive_errors: int = 0


def parse_condition(text: str) -> Condition:
    """The condition that a text states; && binds closer than ||. ValueError names the part that cannot be read."""
    return Condition(
        tuple(
            tuple(_parse_clause(clause, text=text) for clause in alternative.split("&&"))
            for alternative in text.split("||")
        )
    )


def measure(
    result: float | None, *, success: Condition, failure: Condition | None = None
) -> tuple[CheckPhase, str]:
    """Phase and reason of one measurement. Failure is looked at first; without it, whatever is no success fails."""
    if result is None or math.isnan(result):
        return CheckPhase.INCONCLUSIVE, f"{NO_DATA}: the query gave nothing, or no finite number"
    if failure is not None and failure.holds(result):
        return CheckPhase.FAILED, f"{result:g} meets the failure condition"
    if success.holds(result):
        return CheckPhase.SUCCESSFUL, f"{result:g} meets the success condition"
    if failure is not None:
        return CheckPhase.INCONCLUSIVE, f"{result:g} meets neither condition"
    return CheckPhase.FAILED, f"{result:g} does not meet the success condition"


def count(tally: Tally, phase: CheckPhase) -> Tally:
    """The tally with one measurement more."""
    errs = phase is CheckPhase.ERROR
    return Tally(
        successful=tally.successful + (phase is CheckPhase.SUCCESSFUL),
        failed=tally.failed + (phase is CheckPhase.FAILED),
        inconclusive=tally.inconclusive + (phase is CheckPhase.INCONCLUSIVE),
        error=tally.error + errs,
        consecutive_errors=tally.consecutive_errors + 1 if errs else 0,
    )


def judge(tally: Tally, limits: Limits) -> CheckPhase | None:
    """The metric's verdict, or None while it needs more measurements.

    Failed: too many failures. Error: too many unanswered queries in a row. Inconclusive: too many measurements
    without a verdict. Successful: as many good ones as were asked for.
    """
    if tally.failed > limits.failure_limit:
        return CheckPhase.FAILED
    if tally.consecutive_errors > limits.consecutive_error_limit:
        return CheckPhase.ERROR
    if tally.inconclusive > limits.inconclusive_limit:
        return CheckPhase.INCONCLUSIVE
    return CheckPhase.SUCCESSFUL if tally.successful >= limits.count else None


def _parse_clause(clause: str, *, text: str) -> tuple[Comparison, float]:
    match = CLAUSE.fullmatch(clause)
    if match is None:
        raise ValueError(
            f"condition {text!r}: {clause.strip()!r} is no comparison of `result` with a number; "
            "write for example: result <= 1.2, or result > 0.9 && result < 1.1"
        )
    return COMPARISONS[match[1]], float(match[2])
