"""The evidence of one comparison: what all routers counted since it began, gathered poll by poll.

Routers tell cumulative counters per epoch (one life of one process). The evidence remembers what each epoch told last
and takes differences, so an answer that is missing, late, out of order or told twice changes nothing in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from finetune_operator.api.routes import Arm, EpochCounters, KeySample, RouterCounters
from finetune_operator.core import tallies
from finetune_operator.core.analysis_plans import AnalysisPlan
from finetune_operator.core.epochs import Epochs
from finetune_operator.core.eprocesses import BLOCK_REQUESTS, HarmProcess
from finetune_operator.core.key_places import KeyPlaces
from finetune_operator.core.tallies import REQUESTS, Tally

MAX_STRATA = 12  # spans of one weight that are told apart; of more, the two most alike become one
EXPOSED = (Arm.CANDIDATE, Arm.SHADOW)  # both are answers of the candidate revision


@dataclass(frozen=True)
class Stratum:
    """What was counted while the weight stayed the same."""

    weight: float
    """Percent of the keys that should be the candidate's."""
    arms: Mapping[Arm, Tally] = field(default_factory=dict)

    def arm(self, arm: Arm) -> Tally:
        return self.arms.get(arm, {})


@dataclass(frozen=True)
class Block:
    """Requests that were watched for a guardrail, until there are enough of them to be judged together."""

    requests: int = 0
    exposed: int = 0
    """Of them the candidate's, shadow included."""
    failures: int = 0
    exposed_failures: int = 0

    def plus(self, stable: Tally, exposed: Tally, *, signal: str) -> Block:
        watched, event = tallies.watched(signal), tallies.event(signal)
        return Block(
            self.requests + tallies.count(stable, watched) + tallies.count(exposed, watched),
            self.exposed + tallies.count(exposed, watched),
            self.failures + tallies.count(stable, event) + tallies.count(exposed, event),
            self.exposed_failures + tallies.count(exposed, event),
        )


@dataclass(frozen=True)
class Evidence:
    """All that is known of a comparison. `evidence_json` stores it."""

    alias: str
    stable_revision: str
    candidate_revision: str
    rollout: str = ""
    """Identity of the rollout."""
    comparison: str = ""
    """`Route.comparison` of the latest poll."""
    weight: float = 0.0
    """Weight of the latest poll."""
    highest_share: float = 0.0
    """Highest intended share of the candidate's answers, copies included, of which requests may be under way."""
    is_sample_pure: bool = True
    """Whether the weight has been the same since the comparison's name changed, and with it the routers' samples."""
    epochs: Epochs = field(default_factory=Epochs)
    """What was told last."""
    strata: tuple[Stratum, ...] = ()
    """Oldest first."""
    keys: KeyPlaces = field(default_factory=KeyPlaces)
    """For the sample ratio."""
    blocks: Mapping[str, Block] = field(default_factory=dict)
    """By signal of a guardrail: what waits."""
    harm: Mapping[str, HarmProcess] = field(default_factory=dict)
    """By signal of a guardrail."""

    def total(self, arm: Arm) -> Tally:
        """All that was counted of an arm."""
        return tallies.add_all(stratum.arm(arm) for stratum in self.strata)


def fold(
    evidence: Evidence | None,
    counters: Sequence[RouterCounters],
    *,
    alias: str,
    stable_revision: str,
    candidate_revision: str,
    plan: AnalysisPlan,
    weight: float,
    comparison: str = "",
    rollout: str = "",
    share: float | None = None,
    is_settling: bool = False,
) -> Evidence:
    """The evidence after one poll; routers that did not answer are left out of `counters`.

    `weight` (percent) and `comparison` are those of the route that was in force since the poll before; `comparison`
    should change whenever the weight does, so that the routers start their key samples anew. With None, or with the
    evidence of other revisions or of another `rollout`, the evidence begins anew: what each router has counted by
    then is its starting line and no evidence, so fold once before the candidate gets its first request. Folding the
    same answers again changes nothing.

    `share` is the candidate's intended share of the answers (percent), copies of a mirror included; the weight where
    there are none. `is_settling` for as long as requests of a former share may be under way.
    """
    share = weight if share is None else share
    new = Evidence(alias, stable_revision, candidate_revision, rollout, comparison, weight, share)
    if evidence is None or _identity(evidence) != _identity(new):
        evidence = new
    epochs = evidence.epochs
    gains: list[Mapping[Arm, Tally]] = []
    samples: list[KeySample] = []
    for router in counters:
        known_router = epochs.knows_instance(router.instance)
        for epoch in router.epochs:
            arms = _arms_of(epoch, evidence)
            epochs, gain = epochs.after(epoch.epoch, arms, counts_from_zero=known_router)
            gains.append({arm: _watched_in(tally, plan) for arm, tally in gain.items()})
            samples += [s for s in epoch.samples if s.alias == alias and s.comparison == comparison]
        epochs = epochs.with_instance(router.instance)
    gained = {arm: tallies.add_all(gain.get(arm, {}) for gain in gains) for arm in Arm}
    evidence = _without_strangers(evidence, plan)
    evidence = _with_keys(evidence, gained, samples, plan=plan, latest=new, is_settling=is_settling)
    evidence = replace(
        evidence,
        epochs=epochs.pruned(),
        highest_share=max(evidence.highest_share, share) if is_settling else share,
    )
    evidence = _with_strata(evidence, _asked_for(gained, plan, is_settling=is_settling))
    return _with_harm(
        evidence, gained, plan, least_share=evidence.highest_share / 100.0 if is_settling else 0.0
    )


def _identity(evidence: Evidence) -> tuple[str, ...]:
    return (evidence.alias, evidence.stable_revision, evidence.candidate_revision, evidence.rollout)


def _arms_of(epoch: EpochCounters, evidence: Evidence) -> dict[Arm, Tally]:
    """The epoch's tallies of the rollout's arms; other aliases and revisions are no part of it."""
    revisions = {
        Arm.STABLE: evidence.stable_revision,
        Arm.CANDIDATE: evidence.candidate_revision,
        Arm.SHADOW: evidence.candidate_revision,
    }
    found = (arm for arm in epoch.arms if arm.alias == evidence.alias and arm.revision == revisions[arm.arm])
    return {arm.arm: tally for arm in found if (tally := tallies.tally_of(arm))}


def _watched_in(gain: Tally, plan: AnalysisPlan) -> Tally:
    """The gain with what was watched for each signal; older routers do not tell, and watch all requests from the first
    event or the end on."""
    requests = gain.get(REQUESTS, 0)
    if not requests or any(name.startswith(tallies.WATCHED) for name in gain):
        return gain
    return {**gain, **{tallies.watched(signal): requests for signal in plan.signals}}


def _with_keys(
    evidence: Evidence,
    gained: Mapping[Arm, Tally],
    samples: Iterable[KeySample],
    *,
    plan: AnalysisPlan,
    latest: Evidence,
    is_settling: bool,
) -> Evidence:
    """The evidence with what this poll tells of the shares, and with the weight and the comparison of `latest`.

    While the weight settles, answers of the faster side come in first, and those of requests that were given out by
    the former weight. Keys are counted afterwards, requests not at all.
    """
    renamed, reweighted = latest.comparison != evidence.comparison, latest.weight != evidence.weight
    is_pure = renamed or (evidence.is_sample_pure and not reweighted)
    keys = evidence.keys
    if plan.sample_ratio.sticky:
        stable: set[int] = set()
        candidate: set[int] = set()
        for sample in samples:
            stable.update(sample.stable)
            candidate.update(sample.candidate)
        keys = keys.after(
            stable,
            candidate,
            weight=latest.weight,
            only_new=not is_pure,
            counted=(renamed or not reweighted) and not is_settling,
        )
    elif not reweighted and not is_settling:
        stable_n, candidate_n = (
            tallies.count(gained.get(arm, {}), REQUESTS) for arm in (Arm.STABLE, Arm.CANDIDATE)
        )
        keys = keys.with_requests(stable_n, candidate_n, weight=latest.weight)
    return replace(
        evidence, keys=keys, comparison=latest.comparison, weight=latest.weight, is_sample_pure=is_pure
    )


def _asked_for(gained: Mapping[Arm, Tally], plan: AnalysisPlan, *, is_settling: bool) -> dict[Arm, Tally]:
    """The gains without what the plan does not ask for: clients choose the names of feedback, and room is scarce.

    After a change of the weight, short answers of the side that grew come in first, and long ones of the other side
    still do. What depends on the length is not compared until they have ended.
    """
    signals = tuple(guardrail.signal for guardrail in plan.guardrails) if is_settling else plan.signals
    quantities = tuple(f"{objective.quantity}/" for objective in plan.objectives)
    wanted = {name for signal in signals for name in (tallies.event(signal), tallies.watched(signal))}
    return {
        arm: {
            name: number
            for name, number in tally.items()
            if (not name.startswith("scores/") or name.startswith(quantities))
            and (not name.startswith(tallies.BY_SIGNAL) or name in wanted)
            and not (is_settling and name.startswith(tallies.BY_LENGTH))
        }
        for arm, tally in gained.items()
    }


def _without_strangers(evidence: Evidence, plan: AnalysisPlan) -> Evidence:
    """Without what was counted for guardrails that the plan has no longer, or has with another event or threshold."""
    signals = {guardrail.signal for guardrail in plan.guardrails}
    if not evidence.harm or evidence.harm.keys() == signals:
        return evidence
    wanted = {name for signal in plan.signals for name in (tallies.event(signal), tallies.watched(signal))}

    def cleaned(tally: Tally) -> dict[str, float]:
        return {
            name: number
            for name, number in tally.items()
            if name in wanted or not name.startswith(tallies.BY_SIGNAL)
        }

    strata = tuple(
        Stratum(stratum.weight, {arm: cleaned(tally) for arm, tally in stratum.arms.items()})
        for stratum in evidence.strata
    )
    harm = {signal: process for signal, process in evidence.harm.items() if signal in signals}
    blocks = {signal: block for signal, block in evidence.blocks.items() if signal in signals}
    return replace(evidence, strata=strata, harm=harm, blocks=blocks)


def _with_strata(evidence: Evidence, gained: Mapping[Arm, Tally]) -> Evidence:
    """What was gained goes to the stratum of the present weight, a new one where the weight is new."""
    if not any(gained.values()):
        return evidence
    strata = evidence.strata
    if not strata or strata[-1].weight != evidence.weight:
        strata = (*strata, Stratum(weight=evidence.weight))
    strata = (*strata[:-1], Stratum(evidence.weight, _joined(strata[-1].arms, gained)))
    return replace(evidence, strata=strata if len(strata) <= MAX_STRATA else _with_two_joined(strata))


def _with_two_joined(strata: tuple[Stratum, ...]) -> tuple[Stratum, ...]:
    """Neighbours of nearly the same weight are nearly one span; the last one is still being counted."""
    index = min(range(len(strata) - 2), key=lambda i: abs(strata[i].weight - strata[i + 1].weight))
    first, second = strata[index : index + 2]
    both = Stratum((first.weight + second.weight) / 2.0, _joined(first.arms, second.arms))
    return (*strata[:index], both, *strata[index + 2 :])


def _joined(first: Mapping[Arm, Tally], second: Mapping[Arm, Tally]) -> dict[Arm, Tally]:
    sums = {arm: tallies.add(first.get(arm, {}), second.get(arm, {})) for arm in Arm}
    return {arm: tally for arm, tally in sums.items() if tally}


def _with_harm(
    evidence: Evidence, gained: Mapping[Arm, Tally], plan: AnalysisPlan, *, least_share: float
) -> Evidence:
    """The guardrails' processes after the gains, each judged as soon as enough requests are together.

    Answers are counted when they end, and failures may end sooner or later than others. So after a change of the weight
    the failures have the share of one weight while the block still has that of the other; the higher one counts.
    """
    exposed = tallies.add_all(gained.get(arm, {}) for arm in EXPOSED)
    blocks: dict[str, Block] = {}
    harm: dict[str, HarmProcess] = {}
    for guardrail in plan.guardrails:
        name = guardrail.signal
        harm[name] = evidence.harm.get(name, HarmProcess())
        block = evidence.blocks.get(name, Block()).plus(gained.get(Arm.STABLE, {}), exposed, signal=name)
        if block.requests < BLOCK_REQUESTS:
            blocks[name] = block
            continue
        harm[name] = harm[name].after(
            failures=block.failures,
            exposed_failures=block.exposed_failures,
            share=max(block.exposed / block.requests, least_share),
        )
    return replace(
        evidence, blocks={name: block for name, block in blocks.items() if block != Block()}, harm=harm
    )
