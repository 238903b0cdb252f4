"""Before anything runs: what a job waits for, and how its first attempt is recorded."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.finetunejob import Attempt, Effective, FineTuneJobSpec, FitCheck, Phase
from finetune_operator.core import attempts, chains, endings, policies, running, statuses, suspensions
from finetune_operator.core.conditions import SPEC_IS_COMPLETE, Claim, ConditionType
from finetune_operator.core.facts import Defaults, Observed, Plan


def decide(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    """The next step of a job without an attempt."""
    spec = seen.job.spec
    if spec is not None and spec.suspend:
        return suspensions.suspended(seen, now=now)
    if spec is None or seen.job.problem is not None:
        return attempts.wait_for_spec(seen, now=now)
    if spec.output.uri is None and defaults.output_uri is None:
        message = "spec.output.uri is not set and the operator has no default (FINETUNE_OUTPUT_URI): set one of them"
        return _wait(seen, "OutputRequired", message, now=now)
    settled = chains.settle(
        seen.job.name, spec, model=seen.upstream, reward=seen.reward, scripts=seen.scripts
    )
    match settled:
        case chains.Waiting(reason, message, is_polled):
            seconds = running.WAITING_SECONDS if is_polled else running.RESYNC_SECONDS
            return _wait(seen, reason, message, now=now, accepted=True, seconds=seconds)
        case chains.Broken(reason, message):
            return endings.failed(seen, reason, message, now=now)
        case chains.Ready():
            pass
    if not seen.kuberay_installed:
        return attempts.wait_for_kuberay(seen, now=now)
    return _record_first_attempt(seen, spec, settled, defaults=defaults, now=now)


def _wait(
    seen: Observed,
    reason: str,
    message: str,
    *,
    now: datetime,
    accepted: bool = False,
    seconds: float | None = None,
) -> Plan:
    claim = Claim(ConditionType.ACCEPTED, False, reason, message)
    if accepted:
        claim = Claim(ConditionType.RESOURCES_READY, False, reason, message)
    status = statuses.build(seen, Phase.PENDING, reason, message, claims=[claim], now=now)
    return Plan(status=status, requeue_after=seconds)


def _record_first_attempt(
    seen: Observed, spec: FineTuneJobSpec, settled: chains.Ready, *, defaults: Defaults, now: datetime
) -> Plan:
    job = seen.job
    checks = spec.resources.fit_check is FitCheck.AUTO and spec.resources.accelerator_type is not None
    first = Attempt(number=1, ray_job=f"{job.name}-a1", start_time=now)
    message = f"attempt 1 starts as RayJob {first.ray_job}"
    if checks:
        first = Attempt(number=policies.CHECK, ray_job=f"{job.name}-check", start_time=now)
        message = f"RayJob {first.ray_job} checks the job before it asks for a GPU"
    output = spec.output.uri or f"{defaults.output_uri}/{job.namespace}/{job.name}-{job.uid[:8]}"
    status = statuses.build(
        seen,
        Phase.PENDING,
        "Accepted",
        message,
        claims=[SPEC_IS_COMPLETE],
        now=now,
        attempts=[first],
        start_time=now,
        effective=Effective(
            model_uri=settled.model_uri,
            adapter=settled.adapter,
            reward=settled.reward,
            output_uri=output,
            checkpoint_uri=spec.checkpoint.uri or f"{output.rstrip('/')}-checkpoints",
            image=spec.resources.image or defaults.image,
        ),
    )
    return Plan(status=status, requeue_after=0)
