"""Sample ratios under simulation: no alarm where the shares are right, and an alarm where users get lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from finetune_operator.api.adapterdeployment_status import Check, CheckPhase
from finetune_operator.core.statistics import AnalysisPlan, Evidence, assess
from tests.unit.statistics.fleets import COMPARISON, answer, folded, key_sample

LIMIT = 1_024
RAMP = (0.0, 5.0, 25.0, 50.0, 10.0, 50.0)


def rollout(
    seed: int, *, weights: Sequence[float] = RAMP, lost: Sequence[float] = (), renames: bool = True
) -> tuple[Evidence, list[Check]]:
    """3,000 users who come back with Zipf frequencies, two routers, five polls per weight; the key samples start anew
    with each weight where the comparison is renamed. `lost` is the part of the candidate's outcomes, per weight, that
    is never recorded. Also what was said at every poll."""
    rng = np.random.default_rng(seed)
    users = 3_000
    hashes, places = rng.integers(0, 2**53, users), 100 * rng.random(users)
    frequencies = 1 / np.arange(1, users + 1) ** 1.1
    frequencies /= frequencies.sum()
    evidence, said = None, []
    seen: list[dict[int, int]] = [{}, {}]
    for step, weight in enumerate(weights):
        seen = [{}, {}] if renames else seen
        name = str(step) if renames else COMPARISON
        for _ in range(5):
            answers = []
            for index in range(2):
                who = rng.choice(users, 300, p=frequencies)
                exposed = places[who] >= 100 - weight
                kept = ~exposed | (rng.random(300) >= (lost[step] if lost else 0.0))
                bits = np.where(exposed, 2, 1)
                for key, bit in zip(hashes[who[kept]].tolist(), bits[kept].tolist(), strict=True):
                    seen[index][key] = seen[index].get(key, 0) | bit
                sample = sorted(seen[index].items())[:LIMIT]
                sides = [[key for key, bits_of_key in sample if bits_of_key & side] for side in (1, 2)]
                samples = [key_sample(sides[0], sides[1], comparison=name)]
                answers.append(answer(instance=f"router-{index}", epoch=f"worker-{index}", samples=samples))
            evidence = folded(evidence, *answers, weight=weight, comparison=name)
            said.append(assess(evidence, AnalysisPlan(), weight=weight).sample_ratio)
    assert evidence is not None
    return evidence, said


@pytest.mark.parametrize("renames", [True, False], ids=["samples per weight", "one sample"])
def test_right_shares_raise_no_alarm_over_changing_weights(renames: bool) -> None:
    rollouts, coins = 30, np.zeros(3)
    peaks = []
    for seed in range(rollouts):
        evidence, said = rollout(seed, renames=renames)
        peaks.append(max(check.e_value or 0.0 for check in said))
        coins += (evidence.keys.stable, evidence.keys.candidate, evidence.keys.expected_candidate)
    alarms = {alpha: sum(peak >= 1 / alpha for peak in peaks) for alpha in (0.001, 0.05)}
    print(f"seeds 0 to {rollouts - 1}: alarms {alarms}; coins per rollout {coins / rollouts}")
    assert alarms[0.001] == 0
    assert alarms[0.05] <= 5  # 1.5 expected at most
    assert coins[1] == pytest.approx(coins[2], rel=0.08)


@pytest.mark.parametrize(
    "lost", [(0, 0, 0.8, 0.8, 0.8, 0.8), (0, 0, 0, 0.8, 0.8, 0.8)], ids=["from 25% on", "from 50% on"]
)
def test_users_that_get_lost_on_one_side_raise_an_alarm_also_when_they_were_seen_before(
    lost: tuple[float, ...],
) -> None:
    found = sum(rollout(seed, lost=lost)[1][-1].phase is CheckPhase.FAILED for seed in range(10))
    print(f"seeds 0 to 9, eight in ten outcomes lost: {found} of 10 found")
    assert found >= 9
