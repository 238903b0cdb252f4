"""The route of a deployment: a pure function of spec, status and what the engines have."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune_operator.api.adapterdeployment_status import LoadedAdapter
from finetune_operator.api.adapterdeployment_traffic import (
    MatchSpec,
    OnCandidateError,
    PinnedArm,
    StickinessType,
)
from finetune_operator.api.routes import HeaderMatch, Pin, Route, Signal, SignalEvent, Target
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core.analysis_plans import AnalysisPlan, plan_analysis
from finetune_operator.core.rollout_facts import Observed
from finetune_operator.core.rollout_turns import OVER, Turn


def build(turn: Turn) -> Route | None:
    """The route that the snapshot should have; None before there is anything to say.

    The candidate is named only in stages that may give it requests, and only while some engine has it. Where the stable
    revision is on no engine, its share gets 503 with Retry-After: neither the base model nor an unproven candidate
    answers in its place, because nobody asked for their answers.
    """
    spec, status = turn.spec, turn.status
    if status.stable_revision is None and status.candidate_revision is None:
        return None
    candidate = None
    if not turn.first and turn.routed:
        candidate = _target(turn.seen, turn.candidate)
    if candidate is not None and not candidate.upstreams:
        candidate = None
    plan = plan_analysis(spec.analysis)
    weights = turn.weights
    weight = weights.candidate if candidate else 0.0
    return Route(
        alias=turn.alias,
        owner=owner(turn.seen),
        stable=_target(turn.seen, turn.stable),
        candidate=candidate,
        weight=weight,
        mirror=weights.mirror if candidate else 0.0,
        sticky=spec.traffic.stickiness.type is StickinessType.HASH,
        keys=tuple(spec.traffic.stickiness.keys),
        salt=_salt(turn),
        pins=tuple(_pin(match) for match in spec.traffic.match),
        retry_stable=spec.traffic.fallback.on_candidate_error is OnCandidateError.RETRY_STABLE,
        signals=_signals(plan),
        output_schema=spec.traffic.output_schema,
        counts_words=plan.drift is not None,
        grouped=plan.grouped,
        comparison=_comparison(turn, weight),
    )


def owner(seen: Observed) -> str:
    job = seen.deployment
    return f"{job.namespace}/{job.name}/{job.uid}"


def _target(seen: Observed, adapter: LoadedAdapter | None) -> Target | None:
    if adapter is None:
        return None
    return Target(
        revision=adapter.revision,
        served_name=adapter.served_name,
        upstreams=adapters.upstreams(seen, adapter),
    )


def _pin(match: MatchSpec) -> Pin:
    return Pin(
        headers=tuple(HeaderMatch(name=header.name, exact=header.exact) for header in match.headers),
        arm="Candidate" if match.arm is PinnedArm.CANDIDATE else "Stable",
    )


def _salt(turn: Turn) -> str:
    fixed = turn.spec.traffic.stickiness.salt
    if fixed is not None:
        return fixed
    revision = turn.status.candidate_revision or turn.status.stable_revision
    return f"{turn.seen.deployment.uid}:{revision}"


def _signals(plan: AnalysisPlan) -> tuple[Signal, ...]:
    """What the routers count: for the guardrails, and what drift compares beside them."""
    signals = [
        Signal(name=guardrail.signal, event=guardrail.event, threshold=guardrail.threshold)
        for guardrail in plan.guardrails
    ]
    names = {signal.name for signal in signals}
    signals += [
        Signal(name=name, event=SignalEvent(name))
        for name in (plan.drift.signals if plan.drift else ())
        if name not in names
    ]
    return tuple(signals)


def _comparison(turn: Turn, weight: float) -> str:
    """Identity of the routers' samples of users: with another weight the sides get other shares."""
    status = turn.status
    if not turn.underway or turn.first or status.rollout_start_time is None:
        return ""
    return f"{status.candidate_revision}:{_stamp(status.rollout_start_time)}:{weight:g}"


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def frozen(turn: Turn) -> Route | None:
    """The published route as it is, without engines that have lost what it sends them, and without a candidate that
    was taken back: for a spec that cannot be read."""
    seen, route = turn.seen, turn.seen.routing.published
    if route is None:
        return None
    known = {adapter.served_name: adapter for adapter in turn.status.adapters}

    def shrunk(target: Target | None) -> Target | None:
        adapter = known.get(target.served_name) if target else None
        if target is None or adapter is None:
            return target
        left = [url for url in target.upstreams if url in adapters.upstreams(seen, adapter)]
        return target.model_copy(update={"upstreams": tuple(left)})

    stable, candidate = shrunk(route.stable), shrunk(route.candidate)
    if candidate is not None and (turn.status.stage in OVER or not candidate.upstreams):
        return route.model_copy(update={"stable": stable, "candidate": None, "weight": 0.0, "mirror": 0.0})
    return route.model_copy(update={"stable": stable, "candidate": candidate})


def carries(turn: Turn) -> bool:
    """Whether the published route says what the recorded weights and revisions say."""
    route, weights, status = turn.seen.routing.published, turn.weights, turn.status
    if route is None or route.owner != owner(turn.seen):
        return False
    revision = route.stable.revision if route.stable else None
    if revision != status.stable_revision:
        return False
    if not turn.exposed:
        return route.weight == 0 and route.mirror == 0
    named = route.candidate.revision if route.candidate else None
    return (named, route.weight, route.mirror) == (
        status.candidate_revision,
        weights.candidate,
        weights.mirror,
    )
