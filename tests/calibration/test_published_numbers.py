"""The calculations on which the choice of methods rests, made again: other methods fail where ours hold.

Each expected number is the one of the design notes; the tolerances are three standard errors or more of the runs here.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from finetune_operator.api.adapterdeployment_status import CheckPhase
from finetune_operator.core import eprocesses, sequences, thresholds
from tests.calibration.shares import evidence_with_share, observed_share
from tests.unit.statistics import traffic
from tests.unit.statistics.traffic import Floats


@pytest.mark.parametrize(("window", "expected"), [(20, 0.44), (50, 0.76), (200, 0.04), (1_000, 0.0)])
def test_a_threshold_gate_aborts_a_healthy_candidate(window: int, expected: float) -> None:
    """97 percent succeed, the rule is 95 percent of a window, failureLimit 2, 20 measurements."""
    rng = np.random.default_rng(31)
    success = thresholds.parse_condition("result >= 0.95")
    limits = thresholds.Limits(failure_limit=2, count=20)
    rollouts = 1_000
    aborted = 0
    for results in (rng.binomial(window, 0.97, (rollouts, 20)) / window).tolist():
        phases = (thresholds.measure(result, success=success)[0] for result in results)
        tally = functools.reduce(thresholds.count, phases, thresholds.Tally())
        aborted += thresholds.judge(tally, limits) is CheckPhase.FAILED
    print(f"seed 31, windows of {window}: {aborted / rollouts:.3f} falsely aborted, expected {expected}")
    assert aborted / rollouts == pytest.approx(expected, abs=0.05)


def looks(seed: int, rollouts: int, share: float) -> list[tuple[Floats, Floats, Floats, Floats]]:
    """Per null rollout at each 100 of 20,000 requests with 95 percent success: n and successes of both arms."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rollouts):
        candidate = rng.binomial(100, share, 200).astype(float)
        m, n = np.cumsum(candidate), np.cumsum(100 - candidate)
        good = np.cumsum(rng.binomial(candidate.astype(int), 0.95)).astype(float)
        stable_good = np.cumsum(rng.binomial((100 - candidate).astype(int), 0.95)).astype(float)
        found.append((n, stable_good, m, good))
    return found


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_z_test_that_is_peeked_at_finds_differences_where_none_are(share: float) -> None:
    wrong = 0
    rollouts = looks(32, 800, share)
    for n, stable_good, m, good in rollouts:
        pooled = (stable_good + good) / (n + m)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (good / m - stable_good / n) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        wrong += bool(np.any(np.abs(z) > 1.96))
    print(f"seed 32, share {share:.0%}: {wrong / len(rollouts):.3f} false findings, expected 0.39 to 0.41")
    assert 0.34 <= wrong / len(rollouts) <= 0.47


@pytest.mark.parametrize(("least", "expected"), [(50, 0.13), (200, 0.045), (500, 0.019)])
def test_the_plain_asymptotic_sequence_holds_from_200_samples_on(least: int, expected: float) -> None:
    """Tuning 2,000, a tenth of the traffic, variances of each arm alone."""
    rollouts = looks(33, 800, 0.1)
    wrong = 0
    for arrays in rollouts:
        for n, stable_good, m, good in np.stack(arrays, 1).tolist():
            if min(n, m) < least:
                continue
            p, q = stable_good / n, good / m
            half = sequences.radius(
                math.sqrt(p * (1 - p) / n + q * (1 - q) / m), n=n + m, alpha=0.05, tuning=2_000
            )
            if abs(p - q) > half:
                wrong += 1
                break
    print(
        f"seed 33, from {least} samples on: {wrong / len(rollouts):.3f} left uncovered, expected {expected}"
    )
    assert wrong / len(rollouts) == pytest.approx(expected, abs=3 * math.sqrt(expected / 800) + 0.015)


def beta_evidence(exposed: Floats, share: float) -> Floats:
    """Log e-values failure by failure of the Beta(10 w, 10 (1 - w)) mixture over shares above w, on a fine grid."""
    shares = np.linspace(share, 1, 122)[1:-1]
    prior = (10 * share - 1) * np.log(shares) + (10 * (1 - share) - 1) * np.log1p(-shares)
    prior -= np.log(np.exp(prior - prior.max()).sum()) + prior.max()
    n, x = np.arange(1, len(exposed) + 1)[:, None], np.cumsum(exposed)[:, None]
    logs = prior + x * np.log(shares / share) + (n - x) * np.log((1 - shares) / (1 - share))
    high = logs.max(axis=1)
    return np.asarray(high + np.log(np.exp(logs - high[:, None]).sum(axis=1)), float)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_count_e_process_with_a_beta_mixture_keeps_alpha(share: float) -> None:
    rng = np.random.default_rng(34)
    rollouts = 250
    wrong = sum(
        bool(np.any(beta_evidence((rng.random(1_000) < share).astype(float), share) >= math.log(20)))
        for _ in range(rollouts)
    )
    print(f"seed 34, share {share:.0%}: {wrong / rollouts:.3f} false, expected 0.018 to 0.041")
    assert 0.0 <= wrong / rollouts <= 0.075


@pytest.mark.parametrize(
    ("share", "stable", "candidate", "expected"),
    [
        (0.05, 0.01, 0.5, 5),
        (0.05, 0.001, 0.1, 28),
        (0.1, 0.05, 0.2, 35),
        (0.1, 0.05, 0.1, 180),
        (0.1, 0.01, 0.03, 304),
    ],
)
def test_the_count_e_process_with_a_beta_mixture_finds_harm_as_fast_as_published(
    share: float, stable: float, candidate: float, expected: float
) -> None:
    """Median number of the candidate's requests until detection at alpha 0.05."""
    rng = np.random.default_rng(35)
    of_candidate = share * candidate / (share * candidate + (1 - share) * stable)
    needed = []
    for _ in range(200):
        exposed = rng.random(max(400, int(expected * candidate * 20))) < of_candidate
        crossed = np.flatnonzero(beta_evidence(exposed.astype(float), share) >= math.log(20))
        failures = int(np.sum(exposed[: crossed[0] + 1])) if len(crossed) else len(exposed)
        needed.append(failures + rng.negative_binomial(failures, candidate))
    print(
        f"seed 35: {stable} against {candidate} at {share:.0%}: median {np.median(needed):.0f}, expected {expected}"
    )
    assert np.median(needed) == pytest.approx(expected, rel=0.3, abs=2)


TRAPS = [
    (100_000, 0.0, 0.04, 0.043),
    (200, 0.0, 0.09, 0.023),
    (2_000, 1.2, 0.22, 0.020),
    (200, 1.2, 0.23, 0.025),
]


@pytest.mark.parametrize(("users", "exponent", "nominal", "observed"), TRAPS)
def test_the_trap_of_sticky_users_and_nominal_weights(
    users: int, exponent: float, nominal: float, observed: float
) -> None:
    """10,000 requests, 5 percent failures, a tenth of the users: the share so far instead of the nominal one."""
    rng = np.random.default_rng(36)
    rollouts = 250
    false = {"nominal": 0, "observed": 0}
    for _ in range(rollouts):
        rollout = traffic.zipf_requests(rng, requests=10_000, users=users, exponent=exponent, weights=(0.1,))
        false["nominal"] += evidence_with_share(rollout, rollout.weights) >= math.log(20)
        false["observed"] += evidence_with_share(rollout, observed_share(rollout)) >= math.log(20)
    shares = {name: count / rollouts for name, count in false.items()}
    print(f"seed 36, {users} users, exponent {exponent}: {shares}, expected {nominal} and {observed}")
    assert shares["nominal"] == pytest.approx(nominal, abs=3 * math.sqrt(nominal / rollouts) + 0.01)
    assert shares["observed"] == pytest.approx(observed, abs=3 * math.sqrt(observed / rollouts) + 0.01)


@pytest.mark.parametrize(("risk", "expected"), [(2.0, 2_155), (4.0, 423), (10.0, 86)])
def test_harm_among_sticky_users_is_found_as_fast_as_published_and_not_much_slower_by_ours(
    risk: float, expected: float
) -> None:
    """Median total requests at alpha 0.05, 2,000 Zipf users, 5 percent base rate. Ours pays for the change point and
    for polls of 30."""
    rng = np.random.default_rng(37)
    risks = np.array(eprocesses.RELATIVE_RISKS)
    published, ours = [], []
    for _ in range(150):
        rollout = traffic.zipf_requests(rng, requests=10_000, users=2_000, weights=(0.1,), relative_risk=risk)
        share = observed_share(rollout)[rollout.failed][:, None]
        exposed = rollout.candidate[rollout.failed][:, None]
        logs = np.cumsum(exposed * np.log(risks) - np.log1p(share * (risks - 1)), axis=0)
        crossed = np.flatnonzero(np.exp(np.minimum(logs, 700)).mean(axis=1) >= 20)
        published.append(float(np.flatnonzero(rollout.failed)[crossed[0]] + 1) if len(crossed) else math.inf)
        process, requests, _ = traffic.watch(traffic.polls(rollout, every=30), log_needed=math.log(20))
        ours.append(requests if process.log_peak >= math.log(20) else math.inf)
    print(
        f"seed 37, risk {risk}: median {np.median(published):.0f}, expected {expected}; ours {np.median(ours):.0f}"
    )
    assert np.median(published) == pytest.approx(expected, rel=0.3)
    assert np.median(ours) <= 1.6 * np.median(published) + 60
