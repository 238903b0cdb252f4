"""The conditions of an AdapterDeployment: what programs wait for, and what is wrong when something is."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    CheckKind,
    CheckPhase,
    PauseReason,
    Stage,
)
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core import rollout_checks as checks
from finetune_operator.core.conditions import Claim
from finetune_operator.core.rollout_turns import OVER, Turn, clock, engines, first_three

NOT_PUBLISHED = "NotPublished"
UNREADABLE = "InvalidSpec"
NOT_REPLACED = "EnginesNotReplaced"
REPLACE_SECONDS = 60.0  # until engines that were replaced, and nobody knows of, are an alarm
LATE_SECONDS = 15.0  # routers answer within milliseconds, and a restart takes a few seconds


class RolloutCondition(StrEnum):
    AVAILABLE = "Available"  # requests for the alias are answered
    PROGRESSING = "Progressing"  # a rollout is under way and nothing holds it
    PAUSED = "Paused"  # a rollout waits for somebody or something
    PROMOTED = "Promoted"  # the revision that spec names serves everybody
    ADAPTERS_LOADED = "AdaptersLoaded"  # every engine has what it should have
    TRAFFIC_ROUTED = "TrafficRouted"  # the routers do what status.weights says
    METRICS_AVAILABLE = "MetricsAvailable"  # evidence comes in
    ANALYSIS_PASSING = "AnalysisPassing"  # no guardrail, objective or metric is against the candidate
    SAMPLE_RATIO_OK = "SampleRatioOK"  # the sides have the shares of the users that they should have
    BASE_MODEL_COMPATIBLE = "BaseModelCompatible"  # engines serve the base model, and take the rank
    CAPACITY_OK = "CapacityOK"  # the engines have room for what they should load
    ROUTES_STORED = "RoutesStored"  # a router that starts finds the newest routes
    INVALID_SPEC = "InvalidSpec"  # the operator cannot act on the spec


def claims(turn: Turn) -> Iterator[Claim]:
    """All conditions as of the turn's status."""
    yield available(turn)
    yield _progressing(turn)
    yield _paused(turn)
    yield _promoted(turn)
    yield _adapters_loaded(turn)
    yield traffic_routed(turn)
    yield from _evidence(turn)
    yield _compatible(turn)
    yield _capacity(turn)
    yield _routes_stored(turn)
    yield invalid_spec(turn)


def available(turn: Turn) -> Claim:
    kind = RolloutCondition.AVAILABLE
    stable = turn.stable
    if stable is None:
        return Claim(kind, False, "NothingServes", f"no revision serves {turn.alias} yet; requests get 503")
    found = adapters.coverage(turn.seen, stable)
    why = found.why() or turn.seen.engines_problem or "no engine is ready"
    if found.kept and found.upstreams:
        known = next((c for c in turn.before.conditions if (c.type, c.status) == (kind, "Unknown")), None)
        if known is None or turn.elapsed(known.last_transition_time) < REPLACE_SECONDS:
            return Claim(kind, None, "EnginesReplaced", f"{found.numbers()}: {why}")
        text = f"{found.numbers()}, and get 502 if nothing runs there any more: {why}"
        return Claim(kind, None, NOT_REPLACED, text)
    if not found.upstreams:
        return Claim(
            kind,
            False,
            "StableLost",
            f"no engine has {stable.served_name}, so its users get 503 with Retry-After; it is loaded again as soon as "
            f"an engine takes it: {why}",
        )
    return Claim(kind, True, "Serving", f"{stable.served_name} answers on {engines(len(found.upstreams))}")


def _progressing(turn: Turn) -> Claim:
    kind, status = RolloutCondition.PROGRESSING, turn.status
    if status.stage in OVER and status.abort is not None:
        return Claim(kind, False, "Aborted", status.abort.message)
    if not turn.underway:
        return Claim(kind, False, "Idle", "no rollout is under way")
    if turn.seen.deployment.problem is not None:
        return Claim(kind, False, UNREADABLE, invalid_spec(turn).message)
    if status.pause_conditions:
        return Claim(kind, False, "Paused", status.pause_conditions[0].message)
    if turn.note is not None:
        return Claim(kind, True, turn.note[0], turn.note[1])
    return Claim(kind, True, str(status.stage), f"{status.candidate_revision} is in stage {status.stage}")


def _paused(turn: Turn) -> Claim:
    pauses = turn.status.pause_conditions
    if turn.underway and turn.seen.deployment.problem is not None:
        return Claim(RolloutCondition.PAUSED, True, UNREADABLE, invalid_spec(turn).message)
    if not pauses:
        return Claim(RolloutCondition.PAUSED, False, "NotPaused", "nothing waits")
    message = "; ".join(f"{pause.reason}: {pause.message}" for pause in pauses)
    return Claim(RolloutCondition.PAUSED, True, str(pauses[0].reason), message)


def _promoted(turn: Turn) -> Claim:
    """True only when clients of every router get the revision that spec names."""
    kind, status = RolloutCondition.PROMOTED, turn.status
    stable = status.stable_revision
    if status.abort is not None and status.stage in OVER | {Stage.FINALISING, Stage.SUCCEEDED}:
        return Claim(kind, False, str(status.abort.reason), status.abort.message)
    if turn.seen.deployment.problem is not None:
        return Claim(kind, False, UNREADABLE, invalid_spec(turn).message)
    if turn.underway:
        return Claim(
            kind, False, "RolloutUnderway", f"{status.candidate_revision} is in stage {status.stage}"
        )
    if stable is None or status.stage not in (Stage.FINALISING, Stage.SUCCEEDED):
        return Claim(kind, False, "NothingToPromote", "the revision that spec.adapter names is not there yet")
    if not turn.weights.verified:
        return Claim(kind, False, "RoutersBehind", f"not every router sends requests to {stable} yet")
    return Claim(kind, True, str(status.completion_status or "Promoted"), f"{stable} serves everybody")


def _adapters_loaded(turn: Turn) -> Claim:
    kind = RolloutCondition.ADAPTERS_LOADED
    wanted = adapters.needed(turn)
    if not wanted:
        return Claim(kind, False, "NothingToLoad", "no revision is to be loaded")
    for adapter in wanted:
        found = adapters.coverage(turn.seen, adapter)
        if not found.complete:
            why = found.why() or turn.seen.engines_problem or "no engine is ready"
            text = f"{found.numbers()}: {why}"
            return Claim(kind, False, "LoadFailed" if found.failing else "Loading", text)
    names = ", ".join(adapter.served_name for adapter in wanted)
    return Claim(kind, True, "Loaded", f"every engine has {names}")


def traffic_routed(turn: Turn) -> Claim:
    """A step's time stands still while this is False (`rollout_pauses.stopped_since`)."""
    kind, weights = RolloutCondition.TRAFFIC_ROUTED, turn.weights
    stable, candidate = turn.stable, turn.candidate
    if stable is None:
        return Claim(kind, False, "NothingServes", "no revision serves yet")
    if not adapters.upstreams(turn.seen, stable):
        return Claim(kind, False, "StableLost", f"no engine has {stable.served_name}")
    if turn.exposed and candidate is not None and not adapters.upstreams(turn.seen, candidate):
        return Claim(
            kind,
            False,
            "CandidateLost",
            f"no engine has {candidate.served_name}; everybody gets {stable.served_name} meanwhile",
        )
    if not weights.verified:
        return Claim(kind, False, *behind(turn))
    return Claim(
        kind,
        True,
        "Routed",
        f"every router sends {weights.candidate:g}% of the users to the candidate (snapshot {weights.version})",
    )


def behind(turn: Turn) -> tuple[str, str]:
    """Why the weights are not verified: they were published just now, or routers do not take them."""
    since, routing = turn.weights.pending_since, turn.seen.routing
    told = f"{routing.applied} of {routing.replicas} routers apply them"
    if not routing.replicas:
        return "RoutersBehind", "no router is known: is FINETUNE_ROUTER_ADMIN_URLS of the operator right?"
    if since is None or turn.elapsed(since) < LATE_SECONDS:
        return "Publishing", f"the weights are being published: {told}"
    if turn.weights.version is None:
        return NOT_PUBLISHED, (
            f"the newest routes do not have the recorded weights since {clock(since)}: the operator's log says why it "
            "does not publish them; restart the operator if it says nothing"
        )
    others = first_three(routing.behind) or "a router"
    return "RoutersBehind", f"{told} since {clock(since)}; not so {others}: {checks.ROUTER_REMEDY}"


def _routes_stored(turn: Turn) -> Claim:
    kind, problem = RolloutCondition.ROUTES_STORED, turn.seen.routing.not_stored
    if problem is not None:
        return Claim(kind, False, "NotStored", problem)
    return Claim(kind, True, "Stored", "the ConfigMap finetune-routes has the newest routes")


def invalid_spec(turn: Turn) -> Claim:
    """A step's time stands still while it cannot be read, too."""
    if turn.seen.refusal is not None:
        return Claim(RolloutCondition.INVALID_SPEC, True, "EndpointNotAllowed", turn.seen.refusal)
    problem = turn.seen.deployment.problem
    if problem is not None:
        text = (
            f"{problem}; correct it. Until then nothing moves; the guardrails that could be read stay armed"
        )
        return Claim(RolloutCondition.INVALID_SPEC, True, UNREADABLE, text)
    return Claim(RolloutCondition.INVALID_SPEC, False, "Accepted", "the spec is understood")


def _evidence(turn: Turn) -> Iterator[Claim]:
    metrics, passing, ratio = (
        RolloutCondition.METRICS_AVAILABLE,
        RolloutCondition.ANALYSIS_PASSING,
        RolloutCondition.SAMPLE_RATIO_OK,
    )
    if turn.status.stage in OVER:
        yield Claim(metrics, None, "NothingCompared", "no candidate gets requests")
        yield Claim(passing, *_aborted_by_analysis(turn.status))
        yield Claim(ratio, None, "NothingCompared", "no candidate gets requests")
        return
    if not turn.exposed or turn.first:
        for kind in (metrics, passing, ratio):
            yield Claim(kind, None, "NothingCompared", "no candidate gets requests")
        return
    gap = checks.evidence_gap(turn)
    yield Claim(
        metrics, gap is None, "NoAnswer" if gap else "Answering", gap or "every router tells its counters"
    )
    yield _passing(turn)
    alarm = next((c for c in turn.status.analysis if c.kind is CheckKind.SAMPLE_RATIO), None)
    bad = alarm is not None and alarm.phase is CheckPhase.FAILED
    word = str(PauseReason.SAMPLE_RATIO_MISMATCH) if bad else "AsExpected"
    yield Claim(ratio, not bad, word, (alarm.message if alarm else None) or "no alarm")


def _aborted_by_analysis(status: AdapterDeploymentStatus) -> tuple[bool | None, str, str]:
    if status.abort is None or status.abort.reason not in checks.HARM.values():
        return None, "NothingCompared", "no candidate gets requests"
    return False, str(status.abort.reason), status.abort.message


def _passing(turn: Turn) -> Claim:
    kind = RolloutCondition.ANALYSIS_PASSING
    shown = [check for check in turn.status.analysis if not check.dry_run]
    failed = [check for check in shown if check.phase is CheckPhase.FAILED]
    if failed:
        return Claim(kind, False, "Failed", f"{failed[0].name}: {failed[0].message or 'failed'}")
    undecided = checks.undecided(turn)
    if undecided:
        names = ", ".join(check.name for check in undecided)
        return Claim(kind, None, "Undecided", f"no verdict yet on {names}")
    return Claim(kind, True, "Passing", "nothing is against the candidate")


def _compatible(turn: Turn) -> Claim:
    kind = RolloutCondition.BASE_MODEL_COMPATIBLE
    problem = adapters.base_problem(turn)
    if problem is not None:
        return Claim(kind, False, "IncompatibleBase", problem)
    for adapter in adapters.needed(turn):
        for engine in turn.seen.engines:
            rank = adapters.rank_problem(turn, engine, adapter)
            if rank is not None:
                return Claim(kind, False, "RankTooLarge", rank)
            told = engine.adapters.get(adapter.served_name)
            if told is not None and told.reason in ("IncompatibleBase", "RankTooLarge"):
                return Claim(kind, False, str(told.reason), f"{engine.url}: {told.message}")
    text = f"the engines serve {turn.spec.base_model_ref.name}"
    others = turn.seen.routing.base_answered_by
    if others is not None:
        text += f"; requests for that name itself go to {others}"
    return Claim(kind, True, "Compatible", text)


def _capacity(turn: Turn) -> Claim:
    problem = adapters.capacity_problem(turn)
    if problem is not None:
        return Claim(RolloutCondition.CAPACITY_OK, False, "CapacityFull", problem)
    numbers = [
        f"{engine.url}: {adapters.used_slots(engine)} of {engine.max_loras}"
        for engine in turn.seen.engines[:3]
        if engine.reachable and engine.max_loras is not None
    ]
    return Claim(
        RolloutCondition.CAPACITY_OK, True, "Room", "; ".join(numbers) or "the engines told no limit"
    )
