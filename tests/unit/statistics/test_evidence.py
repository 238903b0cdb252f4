"""Every answer counts once, whatever routers and polls do."""

from __future__ import annotations

import random

import pytest

from finetune_operator.api.routes import GROUPS, Arm, Moments, RouterCounters, SignalEvent
from finetune_operator.core.epochs import MAX_EPOCHS, RESET_SIGHTINGS
from finetune_operator.core.evidence import MAX_STRATA, Block
from finetune_operator.core.key_places import MAX_KEYS
from finetune_operator.core.statistics import (
    AnalysisPlan,
    GuardrailPlan,
    ObjectivePlan,
    assess,
    from_json,
    to_json,
)
from tests.unit.statistics.fleets import (
    ERRORS,
    Router,
    answer,
    arm_counters,
    both,
    counted,
    folded,
    key_sample,
)

NOTHING = both((0, 0), (0, 0))
FEEDBACK = AnalysisPlan(objectives=(ObjectivePlan(name="thumbs", metric="helpful"),))


def test_what_was_counted_before_the_rollout_is_no_evidence() -> None:
    evidence = folded(None, both((90_000, 900), (50, 1)))
    assert counted(evidence) == {}
    evidence = folded(evidence, both((90_090, 902), (60, 1)))
    assert counted(evidence) == {Arm.STABLE: (90, 2), Arm.CANDIDATE: (10, 0)}


def test_the_same_answers_again_change_nothing() -> None:
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    again = folded(evidence, both((500, 10), (50, 2)), both((500, 10), (50, 2)))
    assert again == evidence
    assert to_json(again) == to_json(evidence)


def test_a_failed_poll_changes_nothing_and_the_next_one_brings_what_it_missed() -> None:
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    assert folded(evidence) == evidence
    assert counted(folded(folded(evidence), both((700, 14), (90, 3)))) == {
        Arm.STABLE: (700, 14),
        Arm.CANDIDATE: (90, 3),
    }


def test_a_worker_that_restarts_counts_on_from_zero() -> None:
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    evidence = folded(
        evidence, both((100, 1), (10, 0), epoch="worker-b")
    )  # the old epoch is not told any more
    assert counted(evidence) == {Arm.STABLE: (600, 11), Arm.CANDIDATE: (60, 2)}
    evidence = folded(evidence, both((500, 10), (50, 2)), both((110, 1), (12, 0), epoch="worker-b"))
    assert counted(evidence) == {Arm.STABLE: (610, 11), Arm.CANDIDATE: (62, 2)}


def test_a_router_that_is_heard_for_the_first_time_brings_only_its_starting_line() -> None:
    """It may have been away when the rollout began, with weeks of stable requests in its counters."""
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    late = both((1_000_000, 9), (0, 0), epoch="worker-z", instance="router-z")
    assert counted(folded(evidence, late)) == counted(evidence)
    more = both((1_000_010, 9), (5, 0), epoch="worker-z", instance="router-z")
    assert counted(folded(folded(evidence, late), more)) == {Arm.STABLE: (510, 10), Arm.CANDIDATE: (55, 2)}


def test_a_late_answer_is_not_counted_twice() -> None:
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    evidence = folded(evidence, both((400, 8), (40, 2)))
    evidence = folded(evidence, both((450, 9), (45, 2)))
    assert counted(folded(evidence, both((510, 10), (51, 2)))) == {
        Arm.STABLE: (510, 10),
        Arm.CANDIDATE: (51, 2),
    }


def test_counters_that_begin_anew_within_an_epoch_are_believed_once_they_keep_growing() -> None:
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    for growth in range(1, RESET_SIGHTINGS):
        evidence = folded(evidence, both((10 * growth, 0), (growth, 0)))
        assert counted(evidence) == {Arm.STABLE: (500, 10), Arm.CANDIDATE: (50, 2)}
    evidence = folded(evidence, both((40, 1), (5, 0)))
    assert counted(evidence) == {Arm.STABLE: (540, 11), Arm.CANDIDATE: (55, 2)}
    assert counted(folded(evidence, both((41, 1), (5, 0)))) == {
        Arm.STABLE: (541, 11),
        Arm.CANDIDATE: (55, 2),
    }


def test_an_epoch_that_two_routers_tell_is_counted_once() -> None:
    evidence = folded(None, NOTHING, both((0, 0), (0, 0), instance="router-b"))
    for requests in (100, 200, 300, 400, 500):
        ahead = both((requests, 0), (10, 0))
        behind = both((requests - 50, 0), (9, 0), instance="router-b")
        evidence = folded(evidence, ahead, behind)
    assert counted(evidence) == {Arm.STABLE: (500, 0), Arm.CANDIDATE: (10, 0)}


def test_other_aliases_and_revisions_are_no_part_of_it() -> None:
    evidence = folded(None, NOTHING)
    evidence = folded(
        evidence,
        answer(
            arm_counters(Arm.STABLE, requests=70, revision="cccccccc"),
            arm_counters(Arm.STABLE, requests=80, alias="sales"),
            arm_counters(Arm.STABLE, requests=9),
        ),
    )
    assert counted(evidence) == {Arm.STABLE: (9, 0)}


def test_a_feedback_value_that_replaces_another_changes_the_sum_and_not_the_count() -> None:
    def told(n: int, total: float) -> RouterCounters:
        return answer(
            arm_counters(Arm.CANDIDATE, scores={"helpful": Moments(n=n, sum=total, sum_squares=total)})
        )

    evidence = folded(None, told(0, 0), plan=FEEDBACK)
    evidence = folded(folded(evidence, told(10, 9), plan=FEEDBACK), told(10, 8), plan=FEEDBACK)
    total = evidence.total(Arm.CANDIDATE)
    assert (total["scores/helpful/n"], total["scores/helpful/sum"]) == (10, 8)


def test_feedback_that_no_objective_asks_for_takes_no_room() -> None:
    scores = {name: Moments(n=5, sum=4, sum_squares=4) for name in ("helpful", "a/b/n", "x" * 60)}
    evidence = folded(
        folded(None, NOTHING, plan=FEEDBACK), answer(arm_counters(Arm.STABLE, scores=scores)), plan=FEEDBACK
    )
    assert evidence.total(Arm.STABLE) == {
        "scores/helpful/n": 5, "scores/helpful/sum": 4, "scores/helpful/squares": 4,
    }  # fmt: skip


def test_what_depends_on_the_length_of_answers_is_not_compared_while_the_weight_settles() -> None:
    def told(n: int) -> RouterCounters:
        seconds = Moments(n=n, sum=2.0 * n, sum_squares=5.0 * n)
        arms = (
            arm_counters(arm, requests=n, errors=n // 10, seconds=seconds, lengths=[0, 0, n])
            for arm in (Arm.STABLE, Arm.CANDIDATE)
        )
        return answer(*arms)

    evidence = folded(folded(None, told(0)), told(100), is_settling=True)
    assert counted(evidence) == {Arm.STABLE: (100, 10), Arm.CANDIDATE: (100, 10)}
    assert not [name for name in evidence.total(Arm.CANDIDATE) if name.startswith(("seconds/", "lengths/"))]
    evidence = folded(evidence, told(150))
    total = evidence.total(Arm.CANDIDATE)
    assert (total["requests"], total["seconds/n"], total["lengths/2"]) == (150, 50, 50)


def test_failures_of_a_higher_share_that_come_late_are_no_harm() -> None:
    """A mirror of all requests (half of the answers are the candidate's) ends, and 1 percent of the users follow; the
    mirror's timeouts come in as late as the stable revision's, beside answers of the new weight."""

    def told(stable: int, failed: int) -> RouterCounters:
        return answer(
            arm_counters(Arm.STABLE, requests=stable, errors=failed),
            arm_counters(Arm.SHADOW, requests=failed, errors=failed),
        )

    mirrored = folded(folded(None, NOTHING, weight=0, share=50), told(10, 0), weight=0, share=50)
    evidence = from_json(to_json(mirrored))
    for step in (1, 2, 3):  # the weight changes again before it has settled
        evidence = folded(
            evidence, told(step * 100, step * 4), weight=step, comparison=str(step), is_settling=True
        )
    assert evidence.highest_share == 50
    assert evidence.harm[ERRORS].log_peak < 1
    settled = folded(evidence, told(300, 12), weight=3, comparison="3")
    assert settled.highest_share == 3
    assert folded(settled, told(400, 16), weight=3, comparison="3").harm[ERRORS].log_peak > 3


def test_another_rollout_begins_anew_and_another_weight_does_not() -> None:
    evidence = folded(folded(None, NOTHING), both((500, 10), (50, 2)))
    evidence = folded(evidence, both((600, 10), (150, 2)), weight=50.0, comparison="bbbbbbbb:2")
    assert counted(evidence) == {Arm.STABLE: (600, 10), Arm.CANDIDATE: (150, 2)}
    assert [stratum.weight for stratum in evidence.strata] == [10.0, 50.0]
    assert counted(folded(evidence, both((700, 10), (200, 2)), rollout="a later one")) == {}


def test_many_weights_are_kept_as_a_bounded_number_of_strata() -> None:
    evidence = folded(None, NOTHING)
    for step in range(1, 40):
        evidence = folded(evidence, both((step * 90, step), (step * 10, step)), weight=float(step))
    assert len(evidence.strata) == MAX_STRATA
    assert counted(evidence) == {Arm.STABLE: (39 * 90, 39), Arm.CANDIDATE: (390, 39)}


def test_evidence_survives_storing_at_every_step() -> None:
    evidence = folded(None, NOTHING)
    for step in range(1, 30):
        told = answer(
            arm_counters(Arm.STABLE, requests=step * 9, errors=step, lengths=[step] * 16),
            arm_counters(
                Arm.SHADOW, requests=step, seconds=Moments(n=step, sum=step / 3, sum_squares=step / 7)
            ),
            samples=[key_sample(range(step * 10), range(10_000, 10_000 + step))],
        )
        evidence = folded(evidence, told)
        assert from_json(to_json(evidence)) == evidence
    assert (evidence.keys.stable, evidence.keys.candidate) == (290, 29)


def test_each_guardrail_waits_for_requests_of_its_own() -> None:
    """Nine hang: they are late, and nobody knows whether they will fail. Of a tenth, both is known."""
    late = GuardrailPlan("late", SignalEvent.TTFT_OVER, 2.0)
    plan = AnalysisPlan(guardrails=(GuardrailPlan("errors"), late))

    def told(hanging: int, ended: int, failed: int) -> RouterCounters:
        arms = (
            arm_counters(
                arm,
                requests=hanging + ended,
                events={late.signal: hanging, ERRORS: failed},
                watched={late.signal: hanging + ended, ERRORS: ended},
            )
            for arm in (Arm.STABLE, Arm.CANDIDATE)
        )
        return answer(*arms)

    evidence = folded(folded(None, told(0, 0, 0), plan=plan), told(9, 1, 0), plan=plan)
    assert evidence.blocks == {ERRORS: Block(requests=2, exposed=1)}
    assert evidence.harm[late.signal].blocks == 1
    assert from_json(to_json(evidence)) == evidence
    evidence = folded(evidence, told(9, 6, 3), plan=plan)
    assert evidence.blocks == {}
    assert evidence.harm[ERRORS].blocks == 1
    found = assess(evidence, plan, weight=50.0).guardrails
    assert [(check.n.candidate, check.failures.candidate) for check in found if check.n and check.failures] == [
        (6, 3), (15, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version":"evidence/v9"}', "null"])
def test_stored_evidence_that_cannot_be_read_says_what_to_do(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be read .*; remove it, and the comparison begins anew"):
        from_json(text)


@pytest.mark.parametrize(
    ("objectives", "lives", "kept", "most"),
    [(0, 1_000, MAX_EPOCHS, 100_000), (1, 1_000, MAX_EPOCHS, 400_000), (5, 300, 68, 600_000)],
)
def test_many_epochs_fit_into_a_config_map_and_leave_no_double_count(
    objectives: int, lives: int, kept: int, most: int
) -> None:
    rng = random.Random(11)
    signals = ("errors:error", "slow:ttft_over:2", "empty:empty_output", "refusal")
    metrics = [f"metric-{number}" for number in range(objectives)]
    plan = AnalysisPlan(objectives=tuple(ObjectivePlan(metric, metric) for metric in metrics))
    router = Router(workers=[])
    evidence = folded(None, router.answer(), plan=plan)
    requests = 0
    for life in range(lives):
        told = answer(
            *(
                arm_counters(
                    arm,
                    requests=rng.randrange(10_000, 100_000),
                    events={name: rng.randrange(1_000) for name in signals},
                    watched=dict.fromkeys(signals, rng.randrange(10_000, 100_000)),
                    seconds=Moments(
                        n=rng.randrange(10**5), sum=rng.random() * 1e5, sum_squares=rng.random() * 1e6
                    ),
                    lengths=[rng.randrange(10_000) for _ in range(16)],
                    scores={metric: grouped_at_random(rng) for metric in metrics},
                )
                for arm in (Arm.STABLE, Arm.CANDIDATE)
            ),
            epoch=f"worker-{life}",
            instance=router.instance,
            samples=[key_sample([rng.getrandbits(53) for _ in range(5)], [rng.getrandbits(53)])],
        )
        requests += sum(arm.requests for arm in told.epochs[0].arms)
        evidence = folded(evidence, told, plan=plan, weight=weight_at(life, lives))
        if life == lives // 2:
            old = told
    size = len(to_json(evidence).encode())
    print(f"{lives} epochs, {objectives} objectives: {size} bytes stored")
    assert size < most
    assert len(evidence.epochs.told) == kept
    assert len(evidence.keys.places) == min(MAX_KEYS, 6 * lives)
    assert sum(numbers[0] for numbers in counted(evidence).values()) == requests
    again = folded(evidence, old, plan=plan, weight=weight_at(lives - 1, lives))
    assert again == evidence, "an epoch that ended long ago is told again, and is known"
    assert from_json(to_json(evidence)) == evidence


def weight_at(life: int, lives: int) -> float:
    """Twelve steps."""
    return 8.0 * (life * 12 // lives + 1)


def grouped_at_random(rng: random.Random) -> Moments:
    groups = tuple((rng.randrange(10**4), rng.random() * 1e4) for _ in range(GROUPS))
    return Moments(n=sum(n for n, _ in groups), sum=rng.randrange(10**4), sum_squares=5.0, groups=groups)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_to_routers_and_polls_each_answer_counts_once(seed: int) -> None:
    """Restarts, kills, new replicas, lost, repeated and late answers, against a plain account of what was told."""
    rng = random.Random(seed)
    routers = [Router(), Router(), Router()]
    evidence = folded(None, *(router.answer() for router in routers))
    account = Account([router.answer() for router in routers])
    late: list[RouterCounters] = []
    for _ in range(80):
        for router in routers:
            for worker in router.workers:
                for arm in Arm:
                    requests = rng.randrange(1, 30)
                    worker.serve(arm, requests, rng.randrange(requests + 1))
        answers = [router.answer() for router in routers if rng.random() < 0.8]
        account.hear(answers)
        answers += rng.choices(answers, k=1) if answers else []
        if late and rng.random() < 0.3:
            answers.append(late.pop())
        rng.shuffle(answers)
        evidence = from_json(to_json(folded(evidence, *answers)))
        late = answers[:1]
        index = rng.randrange(3)
        match rng.randrange(6):
            case 0:
                routers[index].restart_worker(rng.randrange(2))
            case 1:
                routers[index] = routers[index].kill(keeps_instance=rng.random() < 0.5)
    evidence = folded(evidence, *(router.answer() for router in routers))
    account.hear([router.answer() for router in routers])
    assert counted(evidence) == account.totals()


class Account:
    """What an honest bookkeeper has heard: per epoch the last word less the starting line."""

    def __init__(self, answers: list[RouterCounters]) -> None:
        self.instances: set[str] = set()
        self.starts: dict[str, dict[Arm, tuple[int, int]]] = {}
        self.lasts: dict[str, dict[Arm, tuple[int, int]]] = {}
        self.hear(answers)

    def hear(self, answers: list[RouterCounters]) -> None:
        for told in answers:
            for epoch in told.epochs:
                numbers = {arm.arm: (arm.requests, arm.events[ERRORS]) for arm in epoch.arms}
                if epoch.epoch not in self.lasts:
                    self.starts[epoch.epoch] = {} if told.instance in self.instances else numbers
                self.lasts[epoch.epoch] = numbers
            self.instances.add(told.instance)

    def totals(self) -> dict[Arm, tuple[int, int]]:
        totals = {}
        for arm in Arm:
            requests = errors = 0
            for epoch, numbers in self.lasts.items():
                start = self.starts[epoch].get(arm, (0, 0))
                requests += numbers.get(arm, (0, 0))[0] - start[0]
                errors += numbers.get(arm, (0, 0))[1] - start[1]
            if requests:
                totals[arm] = (requests, errors)
        return totals
