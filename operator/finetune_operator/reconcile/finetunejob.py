"""One pass over a FineTuneJob: observe, decide, act, write the status once, post the events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_operator.adapters.kube import ApiError, ConflictError, ForbiddenError, InvalidError, Json, Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND
from finetune_operator.core import jobs
from finetune_operator.core.facts import (
    CreateRayJob,
    Defaults,
    Event,
    JobFacts,
    Observed,
    Plan,
    PodFacts,
    RayJobFacts,
)
from finetune_operator.manifests import naming, rayjobs, runfiles
from finetune_operator.reconcile import facts
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

CONFLICT_SECONDS = 0.2


@dataclass(frozen=True)
class FineTuneJobReconciler:
    kube: Kube
    mailbox: Mailbox
    telemetry: Telemetry
    defaults: Defaults
    platform: rayjobs.Platform
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    async def __call__(self, key: Key) -> float | None:
        """One pass. Returns the seconds after which to look again, or None."""
        with self.telemetry.reconcile_seconds.labels(KIND).time():
            try:
                return await self._pass(key)
            except ConflictError:  # the object moved on while we looked; what we saw is stale
                return CONFLICT_SECONDS
            except Exception:
                self.telemetry.reconcile_errors.labels(KIND).inc()
                raise

    async def _pass(self, key: Key) -> float | None:
        body = await self.kube.get(API_VERSION, KIND, *key)
        if body is None:
            self.mailbox.forget(key)
            self.telemetry.forget_job(*key)
            return None
        seen = await self._observe(key, facts.job_facts(body))
        plan = jobs.decide(seen, defaults=self.defaults, now=self.clock())
        plan = await self._act(seen, plan)
        await self._write(key, body, seen, plan)
        return plan.requeue_after

    async def _observe(self, key: Key, job: JobFacts) -> Observed:
        """Everything that the decision needs, read from the API server: a cache could be behind our own writes."""
        if job.deleting or jobs.is_finished(job.status):
            return Observed(job=job)
        if not job.status.attempts:
            return Observed(job=job, kuberay_installed=await self.kube.has_group_version("ray.io/v1"))
        attempt = job.status.attempts[-1]
        rayjob = await self._rayjob(job, attempt.ray_job)
        inspection = await self._rayjob(job, attempt.inspection) if attempt.inspection else None
        report, reported_at = self.mailbox.latest(key, attempt=attempt.number)
        starting = rayjob is not None and report is None and rayjob.job_status != "RUNNING"
        return Observed(
            job=job,
            rayjob=rayjob,
            inspection=inspection,
            pods=await self._pods(job, attempt.number) if starting else (),
            report=report,
            reported_at=reported_at,
            kuberay_installed=rayjob is not None or await self.kube.has_group_version("ray.io/v1"),
        )

    async def _rayjob(self, job: JobFacts, name: str) -> RayJobFacts | None:
        body = await self.kube.get("ray.io/v1", "RayJob", job.namespace, name)
        return facts.rayjob_facts(body, owner_uid=job.uid) if body else None

    async def _pods(self, job: JobFacts, attempt: int) -> list[PodFacts]:
        bodies = await self.kube.find("v1", "Pod", job.namespace, labels=naming.labels(job.name, attempt))
        return [facts.pod_facts(body) for body in bodies]

    async def _act(self, seen: Observed, plan: Plan) -> Plan:
        """Carry out the plan's actions. An object that the API server refuses for good ends the job."""
        for action in plan.actions:
            try:
                await self._create(seen.job, action)
            except InvalidError as error:
                return jobs.refused(seen, str(error), now=self.clock())
            except ForbiddenError as error:
                return jobs.forbidden(seen, str(error), now=self.clock())
        return plan

    async def _create(self, job: JobFacts, action: CreateRayJob) -> None:
        if job.spec is None or job.status.effective is None or job.status.effective.output_uri is None:
            return  # the decision never asks for it: an attempt is recorded together with these
        owner = rayjobs.Owner(job.namespace, job.name, job.uid)
        output_uri = job.status.effective.output_uri
        run_file = runfiles.build_run_file(
            namespace=job.namespace,
            name=job.name,
            uid=job.uid,
            attempt=action.attempt,
            spec=job.spec,
            output_uri=output_uri,
        )
        config_map = rayjobs.build_config_map(
            owner, name=action.name, attempt=action.attempt, run_file=run_file, platform=self.platform
        )
        rayjob = rayjobs.build_rayjob(
            owner,
            name=action.name,
            attempt=action.attempt,
            spec=job.spec,
            image=job.status.effective.image or self.defaults.image,
            output_uri=output_uri,
            platform=self.platform,
            inspect=action.inspect,
        )
        await self.kube.apply(config_map)  # first: a pod that cannot mount it would wait for it
        await self.kube.apply(rayjob)

    async def _write(self, key: Key, body: Json, seen: Observed, plan: Plan) -> None:
        """The only place that writes a FineTuneJob's status; events follow, so that they tell what is stored."""
        patch = merge_diff(body.get("status", {}), facts.to_json(plan.status))
        if patch:
            version = body["metadata"]["resourceVersion"]
            await self.kube.patch_status(KIND, *key, resource_version=version, patch=patch)
        if seen.report is not None:
            self.mailbox.mark_written(key, seen.report)
        self.telemetry.show_job(*key, plan.status)
        if jobs.is_finished(plan.status) and not jobs.is_finished(seen.job.status):
            self.telemetry.jobs_finished.labels(key[0], plan.status.reason).inc()
        for event in plan.events:
            logger.info("%s/%s: %s: %s", *key, event.reason, event.message)
            await self._post(body, event)

    async def _post(self, body: Json, event: Event) -> None:
        """Post an event; one that cannot be posted is lost, as the status already says the same."""
        try:
            await self.kube.create(facts.event_body(body, event, now=self.clock()))
        except ApiError as error:
            logger.warning("event %s could not be posted: %s", event.reason, error)


def merge_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest JSON merge patch (RFC 7386) from old to new; empty when they are equal. None removes a key."""
    diff: dict[str, Any] = {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            diff[name] = merge_diff(before, after)
        else:
            diff[name] = after
    return diff
