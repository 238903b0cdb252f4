"""E-values against exact sums and published software."""

from __future__ import annotations

import math

import pytest

from finetune_operator.core import eprocesses
from finetune_operator.core.eprocesses import RELATIVE_RISKS, HarmProcess


def hypergeometric(draws: int, *, marked: int, total: int) -> list[float]:
    """P(x marked among the draws) for x = 0, 1, ..."""
    ways = math.comb(total, draws)
    return [math.comb(marked, x) * math.comb(total - marked, draws - x) / ways for x in range(draws + 1)]


def e_after(failures: int, exposed: int, share: float) -> float:
    process = HarmProcess().after(failures=failures, exposed_failures=exposed, share=share)
    return math.exp(process.log_e)


@pytest.mark.parametrize(
    ("requests", "exposed", "failures"),
    [(10, 1, 1), (10, 5, 3), (20, 2, 20), (50, 25, 10), (100, 5, 60), (400, 100, 12)],
)
def test_the_batchs_own_share_keeps_the_expectation_at_one_or_below(
    requests: int, exposed: int, failures: int
) -> None:
    """Given a batch's requests and its failures in all, the arm of each failure is a draw without replacement."""
    chances = hypergeometric(failures, marked=exposed, total=requests)
    expectation = math.fsum(
        chance * e_after(failures, x, exposed / requests) for x, chance in enumerate(chances) if chance
    )
    print(
        f"{requests} requests, {exposed} of the candidate, {failures} failures: expectation {expectation:.4f}"
    )
    assert 0.5 < expectation <= 1 + 1e-12


@pytest.mark.parametrize(("share", "failures"), [(0.05, 4), (0.5, 30), (0.9, 12)])
def test_independent_draws_have_expectation_one_exactly(share: float, failures: int) -> None:
    expectation = math.fsum(
        math.comb(failures, x) * share**x * (1 - share) ** (failures - x) * e_after(failures, x, share)
        for x in range(failures + 1)
    )
    assert expectation == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("requests", "mirrored", "failing"), [(10, 10, 4), (20, 4, 6), (100, 50, 30)])
def test_mirrored_requests_that_fail_on_both_sides_are_no_evidence(
    requests: int, mirrored: int, failing: int
) -> None:
    """A prompt that no model can answer fails at the stable revision and in the shadow: the two are not independent."""
    share = mirrored / (requests + mirrored)
    chances = hypergeometric(failing, marked=mirrored, total=requests)
    expectation = math.fsum(
        chance * e_after(failing + x, x, share) for x, chance in enumerate(chances) if chance
    )
    assert expectation <= 1 + 1e-12


def test_a_candidate_that_fails_less_is_even_safer() -> None:
    """The null hypothesis is "no more often", not only "as often"."""
    for share in (0.05, 0.3, 0.5):
        better = share * 0.5 / (1 - share + share * 0.5)
        expectation = math.fsum(
            math.comb(20, x) * better**x * (1 - better) ** (20 - x) * e_after(20, x, share) for x in range(21)
        )
        assert expectation < 1


def test_two_blocks_by_hand() -> None:
    """Mixture over risks (a seventh each) and over the block in which the harm begins (1/2, 1/6, later 1/3)."""
    process = HarmProcess().after(failures=3, exposed_failures=2, share=0.25)
    process = process.after(failures=2, exposed_failures=2, share=0.5)

    def ratio(risk: float, failures: int, exposed: int, share: float) -> float:
        theta = share * risk / (1 - share + share * risk)
        return float((theta / share) ** exposed * ((1 - theta) / (1 - share)) ** (failures - exposed))

    by_hand = 1 / 3 + sum(
        (0.5 * ratio(risk, 3, 2, 0.25) + 1 / 6) * ratio(risk, 2, 2, 0.5) / 7 for risk in RELATIVE_RISKS
    )
    assert math.exp(process.log_e) == pytest.approx(by_hand, rel=1e-12)


def test_blocks_that_can_tell_nothing_leave_the_process_as_it_is() -> None:
    process = HarmProcess().after(failures=3, exposed_failures=2, share=0.25)
    assert process.after(failures=0, exposed_failures=0, share=0.25) == process
    assert process.after(failures=5, exposed_failures=0, share=0.0) == process
    assert process.after(failures=5, exposed_failures=5, share=1.0) == process


def test_what_was_proof_once_stays_proof() -> None:
    process = HarmProcess().after(failures=12, exposed_failures=12, share=0.1)
    peak = process.log_peak
    for _ in range(50):
        process = process.after(failures=20, exposed_failures=0, share=0.1)
    assert process.log_peak == peak > eprocesses.log_threshold(0.01)
    assert process.log_e < 0


def test_harm_that_begins_late_does_not_have_to_work_off_the_good_time() -> None:
    process = HarmProcess()
    for _ in range(1_000):
        process = process.after(failures=10, exposed_failures=5, share=0.5)
    blocks = 0
    while process.log_peak < eprocesses.log_threshold(0.01):
        process = process.after(failures=10, exposed_failures=9, share=0.5)
        blocks += 1
    print(f"after 10,000 even failures: {blocks} blocks of 9 : 1")
    assert blocks <= 6


@pytest.mark.parametrize(("failures", "exposed", "share"), [(1, 2, 0.5), (2, -1, 0.5), (1, 1, 1.5)])
def test_impossible_blocks_are_refused(failures: int, exposed: int, share: float) -> None:
    with pytest.raises(ValueError, match="cannot have"):
        HarmProcess().after(failures=failures, exposed_failures=exposed, share=share)


def test_alpha_is_shared_and_must_be_a_probability() -> None:
    assert eprocesses.log_threshold(0.01, tests=4) == pytest.approx(math.log(400))
    with pytest.raises(ValueError, match="between 0 and 1"):
        eprocesses.log_threshold(0.0)


# savvi 0.3.1: m = Multinomial(alpha=0.001, theta_0=np.array([1 - share, share]), k=100); m.update(np.array([stable,
# candidate])); math.log(m.odds). `k` is SHARE_PRIOR_KEYS.
@pytest.mark.parametrize(
    ("share", "stable", "candidate", "log_odds"),
    [
        (0.1, 430, 70, 2.3613845119763255),
        (0.1, 90, 10, -0.35078412941406617),
        (0.5, 360, 240, 9.376525643122292),
        (0.05, 1000, 24, 7.45120134220474),
        (0.25, 30, 9, -0.14744870160466303),
    ],
)
def test_the_sample_ratio_evidence_is_savvis(
    share: float, stable: int, candidate: int, log_odds: float
) -> None:
    assert eprocesses.log_share_evidence(stable, candidate, share=share) == pytest.approx(log_odds, rel=1e-9)


def test_the_sample_ratio_evidence_has_expectation_one() -> None:
    expectation = math.fsum(
        math.comb(60, x) * 0.2**x * 0.8 ** (60 - x)
        * math.exp(eprocesses.log_share_evidence(60 - x, x, share=0.2))
        for x in range(61)
    )  # fmt: skip
    assert expectation == pytest.approx(1, abs=1e-9)


def test_a_share_of_nothing_or_everything_is_no_coin() -> None:
    assert eprocesses.log_share_evidence(10, 10, share=0.0) == 0
    assert eprocesses.log_share_evidence(10, 10, share=1.0) == 0


def test_e_values_stay_finite() -> None:
    assert eprocesses.e_value(5_000.0) == pytest.approx(1e300)
    assert eprocesses.e_value(-5_000.0) == 0
