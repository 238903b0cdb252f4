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
from finetune_operator.core.eprocesses import BLOCK_REQUESTS, HarmProcess, log_share_evidence
from finetune_operator.core.tallies import REQUESTS, Tally

MAX_STRATA = 12  # spans of one weight that are told apart; of more, the oldest two become one
MAX_KEYS = 1024  # as the routers' own samples
EXPOSED = (Arm.CANDIDATE, Arm.SHADOW)  # both are answers of the candidate revision


@dataclass(frozen=True)
class Stratum:
    """What was counted while the weight stayed the same."""

    weight: float
    """Percent of the keys that should be the candidate's."""
    arms: Mapping[Arm, Tally] = field(default_factory=dict)
    stable_keys: int = 0
    """Distinct keys (of the sample) that came first in this stratum, and on the stable side."""
    candidate_keys: int = 0

    def arm(self, arm: Arm) -> Tally:
        return self.arms.get(arm, {})

    def log_share_evidence(self, *, sticky: bool) -> float:
        """Log e-value of the keys (not sticky: the requests) being split other than the weight says."""
        stable, candidate = self.stable_keys, self.candidate_keys
        if not sticky:
            stable, candidate = (
                tallies.count(self.arm(arm), REQUESTS) for arm in (Arm.STABLE, Arm.CANDIDATE)
            )
        return log_share_evidence(stable, candidate, share=self.weight / 100.0)


@dataclass(frozen=True)
class Block:
    """Requests that wait until there are enough of them to be judged together."""

    stable: Mapping[str, int] = field(default_factory=dict)
    """`requests`, and `events/<signal>`."""
    exposed: Mapping[str, int] = field(default_factory=dict)
    """The same for the candidate's answers, shadow included."""

    @property
    def requests(self) -> int:
        return self.stable.get(REQUESTS, 0) + self.exposed.get(REQUESTS, 0)


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
    epochs: Epochs = field(default_factory=Epochs)
    """What was told last."""
    strata: tuple[Stratum, ...] = ()
    """Oldest first."""
    merged_log_share_evidence: float = 0.0
    """Sample ratio evidence of strata that were merged away."""
    keys: tuple[int, ...] = ()
    """Hashes of the sampled keys that were seen, smallest first."""
    block: Block = Block()
    harm: Mapping[str, HarmProcess] = field(default_factory=dict)
    """By guardrail."""

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
) -> Evidence:
    """The evidence after one poll; routers that did not answer are left out of `counters`.

    `weight` (percent) and `comparison` are those of the route that was in force since the poll before; `comparison`
    should change whenever the weight does, so that the routers start their key samples anew. With None, or with the
    evidence of other revisions or of another `rollout`, the evidence begins anew: what each router has counted by
    then is its starting line and no evidence, so fold once before the candidate gets its first request. Folding the
    same answers again changes nothing.
    """
    new = Evidence(alias, stable_revision, candidate_revision, rollout, comparison, weight)
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
            gains.append(gain)
            samples += [s for s in epoch.samples if s.alias == alias and s.comparison == comparison]
        epochs = epochs.with_instance(router.instance)
    keys, fresh = _with_keys(evidence.keys, samples)
    if evidence.comparison == comparison and evidence.weight != weight:
        fresh = (0, 0)  # one sample over two weights: nobody knows which of the keys came at which
    gained = {arm: tallies.add_all(gain.get(arm, {}) for gain in gains) for arm in Arm}
    evidence = replace(evidence, epochs=epochs.pruned(), keys=keys, comparison=comparison, weight=weight)
    evidence = _with_strata(evidence, gained, fresh=fresh)
    return _with_block(evidence, gained, plan)


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


def _with_keys(
    keys: tuple[int, ...], samples: Iterable[KeySample]
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The sample with the new keys in it, and how many of them came on the stable and on the candidate's side.

    A key that is new and on both sides already came while the weight changed; nobody knows where it came first.
    Only keys that stay in the sample are counted: those that are known to be new.
    """
    stable: set[int] = set()
    candidate: set[int] = set()
    for sample in samples:
        stable.update(sample.stable)
        candidate.update(sample.candidate)
    known = set(keys)
    if not (stable | candidate) - known:
        return keys, (0, 0)
    merged = sorted(known | stable | candidate)[:MAX_KEYS]
    new = set(merged) - known
    return tuple(merged), (len(new & stable - candidate), len(new & candidate - stable))


def _with_strata(evidence: Evidence, gained: Mapping[Arm, Tally], *, fresh: tuple[int, int]) -> Evidence:
    """What was gained goes to the stratum of the present weight, a new one where the weight is new."""
    strata = evidence.strata
    merged = evidence.merged_log_share_evidence
    if not any(gained.values()) and fresh == (0, 0):
        return evidence
    if not strata or strata[-1].weight != evidence.weight:
        strata = (*strata, Stratum(weight=evidence.weight))
    last = strata[-1]
    last = replace(
        last,
        arms={arm: tally for arm in Arm if (tally := tallies.add(last.arm(arm), gained.get(arm, {})))},
        stable_keys=last.stable_keys + fresh[0],
        candidate_keys=last.candidate_keys + fresh[1],
    )
    strata = (*strata[:-1], last)
    if len(strata) > MAX_STRATA:
        first, second = strata[:2]
        merged += first.log_share_evidence(sticky=True)
        arms = {arm: tally for arm in Arm if (tally := tallies.add(first.arm(arm), second.arm(arm)))}
        strata = (replace(second, arms=arms), *strata[2:])
    return replace(evidence, strata=strata, merged_log_share_evidence=merged)


def _with_block(evidence: Evidence, gained: Mapping[Arm, Tally], plan: AnalysisPlan) -> Evidence:
    """The guardrails' processes after the gains, which are judged as soon as enough requests are together."""
    names = [guardrail.name for guardrail in plan.guardrails]
    counted = [REQUESTS, *(f"events/{name}" for name in names)]
    exposed = tallies.add_all(gained.get(arm, {}) for arm in EXPOSED)
    block = Block(
        stable=_sums(evidence.block.stable, gained.get(Arm.STABLE, {}), names=counted),
        exposed=_sums(evidence.block.exposed, exposed, names=counted),
    )
    harm = {name: evidence.harm.get(name, HarmProcess()) for name in names}
    if block.requests < BLOCK_REQUESTS:
        return replace(evidence, block=block, harm=harm)
    share = block.exposed.get(REQUESTS, 0) / block.requests
    for name in names:
        failures = block.exposed.get(f"events/{name}", 0)
        harm[name] = harm[name].after(
            failures=failures + block.stable.get(f"events/{name}", 0), exposed_failures=failures, share=share
        )
    return replace(evidence, block=Block(), harm=harm)


def _sums(old: Mapping[str, int], gained: Tally, *, names: Iterable[str]) -> dict[str, int]:
    sums = {name: old.get(name, 0) + tallies.count(gained, name) for name in names}
    return {name: number for name, number in sums.items() if number}
