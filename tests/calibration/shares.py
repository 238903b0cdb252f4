"""The guardrails' mixture with shares of the candidate that are told from outside, as others do it."""

from __future__ import annotations

import numpy as np

from finetune_operator.core import eprocesses
from tests.unit.statistics.traffic import Floats, Requests


def evidence_with_share(rollout: Requests, share: Floats) -> float:
    """Largest log e-value of the same mixture over risks, but failure by failure and with shares told beforehand."""
    risks = np.array(eprocesses.RELATIVE_RISKS)
    at_failure, exposed = share[rollout.failed][:, None], rollout.candidate[rollout.failed][:, None]
    logs = np.cumsum(exposed * np.log(risks) - np.log1p(at_failure * (risks - 1)), axis=0)
    high = logs.max(axis=1)
    return float(np.max(high + np.log(np.exp(logs - high[:, None]).mean(axis=1)), initial=0.0))


def observed_share(rollout: Requests) -> Floats:
    """Share of the candidate among all requests before each one, drawn to the nominal one by 20 requests."""
    before: Floats = (np.cumsum(rollout.candidate) - rollout.candidate).astype(float)
    return np.asarray((before + 20 * rollout.weights) / (np.arange(len(before)) + 20), float)
