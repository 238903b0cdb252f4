"""What happens in each stage around the steps: loading, confirming, promoting, going back, cleaning up."""

from __future__ import annotations

from finetune_operator.api.adapterdeployment_status import AbortReason, Stage
from finetune_operator.api.adapterdeployment_strategy import WebhookType
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core import rollout_checks as checks
from finetune_operator.core import rollout_endings as endings
from finetune_operator.core import rollout_pauses as pauses
from finetune_operator.core.durations import format_duration
from finetune_operator.core.rollout_facts import AskWebhooks
from finetune_operator.core.rollout_turns import Turn

SOON_SECONDS = 2.0  # engines load and routers answer within seconds


def loading(turn: Turn) -> tuple[Turn, bool]:
    """Whether every engine has the candidate and the rollout is confirmed, so that the steps may begin."""
    candidate = turn.candidate
    if candidate is None:
        return turn, False
    found = adapters.coverage(turn.seen, candidate)
    before = next((a for a in turn.before.adapters if a.revision == candidate.revision), None)
    if before is not None and candidate.loaded_replicas > before.loaded_replicas:
        turn = turn.update(last_progress_time=turn.now)
    hopeless = found.hopeless
    if hopeless is not None:
        return endings.abort(
            turn, AbortReason.ADAPTER_LOAD_FAILED, f"no engine can load it: {hopeless}"
        ), False
    problem = _load_problem(turn, found)
    if problem is not None:
        reason = AbortReason.ADAPTER_LOAD_FAILED if found.failing else AbortReason.PROGRESS_DEADLINE_EXCEEDED
        return within_deadline(turn.say(*problem).again_in(SOON_SECONDS), reason), False
    if pauses.holding(turn):
        return turn, False
    if turn.stepless:
        return turn, True
    turn, confirmed = confirm(turn, WebhookType.CONFIRM_ROLLOUT)
    return turn, confirmed and turn.underway


def _load_problem(turn: Turn, found: adapters.Coverage) -> tuple[str, str] | None:
    if not turn.seen.engines:
        text = (
            turn.seen.engines_problem or "no engine is known: set spec.serving, or start the default engine"
        )
        return ("EndpointNotAllowed" if turn.seen.refusal else "NoEngines"), text
    if found.complete:
        return None
    engines = [e for e in turn.seen.engines if e.reachable and e.ready]
    if not engines:
        engine = turn.seen.engines[0]
        text = engine.message or ("not ready" if engine.reachable else "its agent does not answer")
        return "EnginesNotReady", f"no engine is ready; {engine.url}: {text}"
    base = adapters.base_problem(turn)
    if base is not None:
        return "IncompatibleBase", base
    candidate = turn.candidate
    ranks = [adapters.rank_problem(turn, engine, candidate) for engine in engines] if candidate else []
    rank = next((text for text in ranks if text), None)
    if rank is not None:
        return "RankTooLarge", rank
    full = adapters.capacity_problem(turn)
    if full is not None:
        return "CapacityFull", full
    return "Loading", f"{len(found.upstreams)} of {found.desired} engines have it; {found.why()}"


def within_deadline(turn: Turn, reason: AbortReason) -> Turn:
    """The turn as it is while there is time; the candidate rolled back when progressDeadlineSeconds are over."""
    if pauses.holding(turn):
        return turn
    deadline = float(turn.spec.progress_deadline_seconds)
    waited = turn.elapsed(turn.status.last_progress_time)
    if waited < deadline:
        return turn.again_in(deadline - waited)
    why = turn.note[1] if turn.note else "nothing moved"
    return endings.abort(turn, reason, f"no progress for {format_duration(waited)}: {why}")


def confirm(turn: Turn, kind: WebhookType) -> tuple[Turn, bool]:
    """Whether all webhooks of a kind said yes just now. Asked anew until they do, within the deadline."""
    hooks = [hook for hook in turn.spec.webhooks if hook.type is kind]
    answers = {hook.key: turn.seen.webhooks.get(hook.key) for hook in hooks}
    if all(answer is not None and answer.accepted for answer in answers.values()):
        return turn, True
    if any(answer is None for answer in answers.values()):
        turn = turn.act(AskWebhooks(kind)).again_in(SOON_SECONDS)
        turn = turn.say(
            "AwaitingConfirmation", _last_answer(turn, kind) or f"{kind}: {', '.join(answers)} is asked"
        )
    refused = [
        f"{name}: {answer.message}" for name, answer in answers.items() if answer and not answer.accepted
    ]
    if refused:
        turn = turn.say("AwaitingConfirmation", f"{kind} is not given yet: {'; '.join(refused)}"[:2000])
        turn = turn.again_in(checks.interval(turn))
    return within_deadline(turn, AbortReason.PROGRESS_DEADLINE_EXCEEDED), False


def _last_answer(turn: Turn, kind: WebhookType) -> str | None:
    """What was said of the question before. Kept while it is asked again, so that asking changes nothing stored."""
    said = next((c.message for c in turn.before.conditions if c.type == "Progressing"), "")
    return said if said.startswith(f"{kind} ") else None


# ---------------------------------------------------------------- after the steps


def await_promotion(turn: Turn) -> Turn:
    """The steps are over: ask for confirmation where somebody is to be asked, else promote."""
    asked = not turn.stepless and any(h.type is WebhookType.CONFIRM_PROMOTION for h in turn.spec.webhooks)
    turn = pauses.remove(turn, *pauses.OWN).update(step_start_time=None)
    return turn.stage(Stage.WAITING_PROMOTION).again_in(0) if asked else promoting_begins(turn)


def waiting_promotion(turn: Turn) -> Turn:
    if pauses.holding(turn):
        return turn
    turn, confirmed = confirm(turn, WebhookType.CONFIRM_PROMOTION)
    return promoting_begins(turn) if confirmed else turn


def promoting_begins(turn: Turn) -> Turn:
    return turn.stage(Stage.PROMOTING).again_in(0)


def aborting(turn: Turn) -> Turn:
    """The weight is 0; over when every router said so, or where nothing was ever routed."""
    if turn.weights.verified or turn.first:
        return turn.stage(Stage.FAILED)
    return turn.again_in(SOON_SECONDS)


def finalising(turn: Turn) -> Turn:
    """The previous revision stays loaded for a while, so that a way back is a pointer flip."""
    leaving = [adapter for adapter in turn.status.adapters if adapter.unload_at is not None]
    if turn.weights.verified and not leaving:
        return turn.stage(Stage.SUCCEEDED)
    return turn if turn.weights.verified else turn.again_in(SOON_SECONDS)
