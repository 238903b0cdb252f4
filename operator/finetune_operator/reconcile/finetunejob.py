"""One pass over a FineTuneJob: observe, decide, act, write the status once, post the events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from finetune_operator.adapters.kube import (
    KUEUE_VERSION,
    ConflictError,
    ForbiddenError,
    InvalidError,
    Json,
)
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND
from finetune_operator.core import jobs, statuses
from finetune_operator.core.facts import (
    Action,
    CreateRayJob,
    Defaults,
    DeleteJob,
    DeleteRayJob,
    JobFacts,
    Observed,
    Plan,
    RayJobFacts,
    UpstreamFacts,
)
from finetune_operator.manifests import naming, rayjobs, runfiles
from finetune_operator.reconcile import clocks, events, facts, patches, waiting
from finetune_operator.reconcile.followers import Followers
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

CONFLICT_SECONDS = 0.2
MOST_LINKS = 16  # jobs of a chain that are followed to find a circle


@dataclass(frozen=True)
class FineTuneJobReconciler:
    kube: WatchedKube
    mailbox: Mailbox
    telemetry: Telemetry
    defaults: Defaults
    platform: Callable[[], rayjobs.Platform]
    """Asked for each attempt: certificates are renewed."""
    clock: clocks.SteadyClock = clocks.CLOCK
    followers: Followers = field(default_factory=Followers)

    async def __call__(self, key: Key) -> float | None:
        """One pass. Returns the seconds after which to look again, or None."""
        with self.telemetry.measured_pass(KIND):
            try:
                return await self._pass(key)
            except ConflictError:  # the object moved on while we looked; what we saw is stale
                return CONFLICT_SECONDS

    async def _pass(self, key: Key) -> float | None:
        found = await self._look(key, fresh=False)
        if found is not None and _must_be_sure(*found[1:]):
            found = await self._look(key, fresh=True)
        if found is None:
            self.mailbox.forget(key)
            self.telemetry.forget_job(*key)
            self.followers.follow(key, ())
            self.followers.changed(key)
            return None
        body, seen, plan = found
        seen, plan = await self._act(seen, plan)
        written = await self._write(key, body, seen, plan)
        if plan.status.phase != seen.job.status.phase:
            self.followers.changed(key)
        # Our own write is no news to the watches: what follows from it is looked at now.
        return 0.0 if written and plan.requeue_after is None else plan.requeue_after

    async def _look(self, key: Key, *, fresh: bool) -> tuple[Json, Observed, Plan] | None:
        """The job, what is known of it, and what to do; `fresh`: by the API server, and not by the watches."""
        body = await self.kube.get(API_VERSION, KIND, *key, fresh=fresh)
        if body is None:
            return None
        seen = await self._observe(key, facts.job_facts(body), fresh=fresh)
        return body, seen, jobs.decide(seen, defaults=self.defaults, now=self._now(seen.job))

    def _now(self, job: JobFacts) -> datetime:
        """The time, but never one before what the job has recorded: an earlier operator's clock may have been ahead."""
        recorded, time = statuses.latest_time(job.status), self.clock()
        return max(time, recorded) if recorded else time

    async def _observe(self, key: Key, job: JobFacts, *, fresh: bool) -> Observed:
        """Everything that the decision needs. What a fence looks for is always asked of the API server."""
        if job.deleting:
            return Observed(job=job)
        if not jobs.is_finished(job.status) and not job.status.attempts:
            return await self._observe_new(key, job)
        self.followers.follow(key, ())
        if jobs.is_finished(job.status):
            return await self._observe_finished(job, fresh=fresh)
        attempt = job.status.attempts[-1]
        ended = attempt.end_time is not None
        # A RayJob that was never created need not be looked for: creating it shows whether it is there.
        unborn = attempt.uid is None and self.kube.is_unheard_of(
            "ray.io/v1", "RayJob", job.namespace, attempt.ray_job
        )
        rayjob = None if unborn else await self._rayjob(job, attempt.ray_job, fresh=fresh)
        recorded = statuses.latest_time(job.status)
        report, reported_at = self.mailbox.latest(key, uid=job.uid, attempt=attempt.number)
        quiet = rayjob is None or (
            not rayjob.is_over and (report is not None or rayjob.job_status == "RUNNING")
        )
        queued = rayjob is not None and rayjob.is_held_back and rayjob.queue is not None
        labels = naming.job_labels(job.name) if ended else naming.labels(job.name, attempt.number)
        pods = [] if quiet and not ended else await self._find("v1", "Pod", job, labels, fresh=ended)
        clusters = await self._find("ray.io/v1", "RayCluster", job, labels, fresh=True) if ended else []
        return Observed(
            job=job,
            rayjob=rayjob,
            inspection=await self._rayjob(job, attempt.inspection, fresh=fresh)
            if attempt.inspection
            else None,
            pods=[
                await waiting.observe_pod(
                    self.kube, body, attempt_start=attempt.start_time, now=self._now(job)
                )
                for body in pods
            ],
            workload=await waiting.observe_workload(self.kube, job, rayjob) if queued and rayjob else None,
            kueue_installed=not queued or await self.kube.has_group_version(KUEUE_VERSION),
            clusters=[body["metadata"]["name"] for body in clusters],
            report=report,
            reported_at=reported_at,
            listening_since=self.clock.listening_since(),
            clock_is_behind=recorded is not None and self.clock() < recorded,
            kuberay_installed=rayjob is not None or await self.kube.has_group_version("ray.io/v1"),
        )

    async def _observe_new(self, key: Key, job: JobFacts) -> Observed:
        spec = job.spec
        model = spec.model.fine_tune_job_ref if spec else None
        reward = spec.reward.fine_tune_job_ref if spec and spec.reward else None
        self.followers.follow(key, [(job.namespace, one.name) for one in (model, reward) if one])
        return Observed(
            job=job,
            upstream=await self._upstream(job, model.name) if model else None,
            reward=await self._upstream(job, reward.name) if reward else None,
            scripts=await self._scripts(job),
            kuberay_installed=await self.kube.has_group_version("ray.io/v1"),
        )

    async def _scripts(self, job: JobFacts) -> dict[str, list[str]]:
        """The ConfigMaps of the job's reward functions that exist, with their keys."""
        functions = job.spec.reward.functions if job.spec and job.spec.reward else []
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(function.config_map_ref.name for function in functions):
            body = await self.kube.get("v1", "ConfigMap", job.namespace, name)
            if body is not None:
                found[name] = sorted((body.get("data") or {}).keys())
        return found

    async def _observe_finished(self, job: JobFacts, *, fresh: bool) -> Observed:
        if not jobs.has_cleanup_left(job.status, now=self._now(job)):
            return Observed(job=job)
        attempt = job.status.attempts[-1]
        return Observed(
            job=job,
            rayjob=await self._rayjob(job, attempt.ray_job, fresh=fresh),
            inspection=await self._rayjob(job, attempt.inspection, fresh=fresh)
            if attempt.inspection
            else None,
        )

    async def _upstream(self, job: JobFacts, name: str) -> UpstreamFacts:
        """The job that is waited for, and those that it waits for itself: the way back to `job` where there is one."""
        body = await self.kube.get(API_VERSION, KIND, job.namespace, name)
        seen: list[str] = []
        ways = [[following] for following in (facts.upstream_names(body) if body else [])]
        while ways and len(seen) < MOST_LINKS:
            way = ways.pop(0)
            if way[-1] == job.name:
                return facts.upstream_facts(body, name=name, waits_for=way)
            if way[-1] in seen:
                continue
            seen.append(way[-1])
            link = await self.kube.get(API_VERSION, KIND, job.namespace, way[-1])
            ways += [[*way, following] for following in (facts.upstream_names(link) if link else [])]
        return facts.upstream_facts(body, name=name, waits_for=seen)

    async def _rayjob(self, job: JobFacts, name: str, *, fresh: bool) -> RayJobFacts | None:
        body = await self.kube.get("ray.io/v1", "RayJob", job.namespace, name, fresh=fresh)
        return facts.rayjob_facts(body, owner=job.name, owner_uid=job.uid) if body else None

    async def _find(
        self, api_version: str, kind: str, job: JobFacts, labels: Mapping[str, str], *, fresh: bool
    ) -> list[Json]:
        return await self.kube.find(api_version, kind, job.namespace, labels=labels, fresh=fresh)

    async def _act(self, seen: Observed, plan: Plan) -> tuple[Observed, Plan]:
        """Carry out the plan's actions. An object that the API server refuses for good ends the job. Once the RayJob of
        the attempt is created, the plan is what follows from that, so that one write tells it all."""
        for action in plan.actions:
            try:
                created = await self._do(seen.job, action)
            except InvalidError as error:
                return seen, jobs.refused(seen, str(error), now=self._now(seen.job))
            except ForbiddenError as error:
                return seen, jobs.forbidden(seen, str(error), now=self._now(seen.job))
            if created is not None:
                rayjob = facts.rayjob_facts(created, owner=seen.job.name, owner_uid=seen.job.uid)
                seen = replace(seen, rayjob=rayjob)
                then = jobs.decide(seen, defaults=self.defaults, now=self._now(seen.job))
                plan = replace(then, actions=(), requeue_after=0.0 if then.actions else then.requeue_after)
        return seen, plan

    async def _do(self, job: JobFacts, action: Action) -> Json | None:
        """Returns an attempt's RayJob that was created. Its UID is stored in the same pass, so that one which somebody
        deletes at once is not created again while its pods are still there."""
        match action:
            case CreateRayJob():
                created = await self._create(job, action)
                return None if action.inspect else created
            case DeleteRayJob(name, uid):
                await self.kube.delete("ray.io/v1", "RayJob", job.namespace, name, uid=uid)
            case DeleteJob():
                await self.kube.delete(API_VERSION, KIND, job.namespace, job.name, uid=job.uid)
        return None

    async def _create(self, job: JobFacts, action: CreateRayJob) -> Json | None:
        if job.spec is None or job.status.effective is None or job.status.effective.output_uri is None:
            return None  # the decision never asks for it: an attempt is recorded together with these
        owner = rayjobs.Owner(job.namespace, job.name, job.uid)
        platform = self.platform()
        effective, overrides = job.status.effective, job.status.attempts[-1].overrides
        places = runfiles.Places(
            output_uri=job.status.effective.output_uri,
            checkpoint_uri=effective.checkpoint_uri,
            model_uri=effective.model_uri or job.spec.model.uri or "",
            adapter=effective.adapter,
            reward=effective.reward,
        )
        run_file = runfiles.build_run_file(
            namespace=job.namespace,
            name=job.name,
            uid=job.uid,
            attempt=action.attempt,
            spec=job.spec,
            places=places,
            overrides=overrides,
        )
        config_map = rayjobs.build_config_map(
            owner, name=action.name, attempt=action.attempt, run_file=run_file, platform=platform
        )
        rayjob = rayjobs.build_rayjob(
            owner,
            name=action.name,
            attempt=action.attempt,
            spec=job.spec,
            image=effective.image or self.defaults.image,
            places=places,
            platform=platform,
            memory=overrides.memory if overrides else None,
            inspect=action.inspect,
        )
        await self.kube.apply(config_map)  # first: a pod that cannot mount it would wait for it
        # Created, not applied: a RayJob that is there already, whoever's it is, must never be changed.
        return await self.kube.create(rayjob)

    async def _write(self, key: Key, body: Json, seen: Observed, plan: Plan) -> bool:
        """The only place that writes a FineTuneJob's status; events follow, so that they tell what is stored. Whether
        there was anything to write."""
        patch = patches.merge_diff(body.get("status", {}), facts.to_json(plan.status))
        if patch:
            version = body["metadata"]["resourceVersion"]
            await self.kube.patch_status(KIND, *key, resource_version=version, patch=patch)
        if seen.report is not None:
            self.mailbox.mark_written(key, seen.report, uid=seen.job.uid)
            if seen.report.result is not None and plan.status.attempts[-1].end_time is None:
                # The attempt goes on, and its trainer reports again.
                self.mailbox.drop(key, seen.report, uid=seen.job.uid)
        self.telemetry.show_job(*key, plan.status)
        if jobs.is_finished(plan.status) and not jobs.is_finished(seen.job.status):
            self.telemetry.jobs_finished.labels(key[0], plan.status.reason).inc()
        for event in plan.events:
            logger.info("%s/%s: %s: %s", *key, event.reason, event.message)
            await events.post(self.kube, body, event, now=self.clock())
        return bool(patch)


def _must_be_sure(seen: Observed, plan: Plan) -> bool:
    """Whether what is planned must not rest on what the watches told some time ago: it acts, or it gives an attempt up
    of whose end nobody told."""
    if plan.actions:
        return True
    ended = bool(plan.status.attempts) and plan.status.attempts[-1].end_time is not None
    known = bool(seen.job.status.attempts) and seen.job.status.attempts[-1].end_time is not None
    told = seen.report is not None and seen.report.result is not None
    return ended and not known and not told
