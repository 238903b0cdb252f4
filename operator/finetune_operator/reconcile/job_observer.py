"""What there is of a FineTuneJob in the cluster, as the facts that its decision needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from finetune_operator.adapters.kube import KUEUE_VERSION, Json
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND, Attempt, ErrorClass
from finetune_operator.core import jobs, statuses, waits
from finetune_operator.core.conditions import ConditionType
from finetune_operator.core.facts import JobFacts, Observed, PodFacts, RayJobFacts, UpstreamFacts
from finetune_operator.core.reports import Report
from finetune_operator.manifests import naming
from finetune_operator.reconcile import clocks, facts, pod_facts, waiting
from finetune_operator.reconcile.followers import Followers
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key

MOST_LINKS = 16  # jobs of a chain that are followed to find a circle
SUBMISSION_SECONDS = 30.0  # it takes KubeRay some seconds
PODLESS_SECONDS = 30.0  # of a RayJob that starts: whoever hears of no pod may not be told of any


@dataclass(frozen=True)
class JobObserver:
    kube: WatchedKube
    mailbox: Mailbox
    followers: Followers
    clock: clocks.SteadyClock

    def now(self, job: JobFacts) -> datetime:
        """The time, but never one before what the job has recorded: an earlier operator's clock may have been ahead."""
        recorded, time = statuses.latest_time(job.status), self.clock()
        return max(time, recorded) if recorded else time

    async def observe(self, key: Key, job: JobFacts, *, fresh: bool, creating: bool = False) -> Observed:
        """Everything that the decision needs. `fresh`: by the API server, and not by the watches; what a fence looks
        for is always asked of it. `creating`: all that follows is the creation of the attempt's RayJob, which is
        refused where there is one, so that it need not be looked for."""
        if job.deleting:
            return await self._observe_finished(job, fresh=fresh)
        if not jobs.is_finished(job.status) and not job.status.attempts:
            return await self._observe_new(key, job, fresh=fresh)
        self.followers.follow(key, ())
        if jobs.is_finished(job.status):
            return await self._observe_finished(job, fresh=fresh)
        attempt = job.status.attempts[-1]
        unborn = (creating or not fresh) and self._is_unborn(job, attempt)
        rayjob = None if unborn else await self._rayjob(job, attempt.ray_job, fresh=fresh)
        if attempt.end_time is not None:
            return await self._observe_ended(key, job, attempt, rayjob, fresh=fresh)
        base = self._base(key, job)
        quiet = rayjob is not None and _is_quiet(rayjob, base.report)
        queued = rayjob is not None and rayjob.is_held_back and rayjob.queue is not None
        submitter, problem = await self._submitter(job, attempt, rayjob, fresh=fresh or quiet)
        pods = [] if quiet else await self._pods(job, attempt, rayjob, fresh=fresh and not unborn)
        if rayjob is not None and waits.is_podless(rayjob, pods, now=self.now(job)):
            told = await waiting.cluster_problem(self.kube, rayjob, namespace=job.namespace)
            rayjob = replace(rayjob, cluster_problem=told)
        return replace(
            base,
            rayjob=rayjob,
            pods=pods,
            submitter=submitter,
            submitter_problem=problem,
            workload=await waiting.observe_workload(self.kube, job, rayjob) if queued and rayjob else None,
            kueue_installed=not queued or await self.kube.has_group_version(KUEUE_VERSION),
            kuberay_installed=rayjob is not None or await self.kube.has_group_version("ray.io/v1"),
        )

    def _base(self, key: Key, job: JobFacts) -> Observed:
        """What is known without asking anybody."""
        attempt, recorded = job.status.attempts[-1], statuses.latest_time(job.status)
        report, reported_at = self.mailbox.latest(key, uid=job.uid, attempt=attempt.number)
        return Observed(
            job=job,
            report=report,
            reported_at=reported_at,
            listening_since=self.clock.listening_since(),
            clock_is_behind=recorded is not None and self.clock() < recorded,
        )

    async def _observe_ended(
        self, key: Key, job: JobFacts, attempt: Attempt, rayjob: RayJobFacts | None, *, fresh: bool
    ) -> Observed:
        """What is left of all attempts, which the next one waits for."""
        labels = naming.selector(job.name)
        pods = await self.kube.find("v1", "Pod", job.namespace, labels=labels, fresh=True)
        clusters = await self.kube.find("ray.io/v1", "RayCluster", job.namespace, labels=labels, fresh=True)
        inspection = attempt.inspection
        return replace(
            self._base(key, job),
            rayjob=rayjob,
            # The watches do not tell when one of its name goes that is not ours: it has not our label.
            inspection=await self._rayjob(job, inspection, fresh=True) if inspection else None,
            pods=[await self._pod(job, attempt, body) for body in pods],
            clusters=[body["metadata"]["name"] for body in clusters],
            kuberay_installed=rayjob is not None or await self.kube.has_group_version("ray.io/v1"),
        )

    def _is_unborn(self, job: JobFacts, attempt: Attempt) -> bool:
        """Whether the attempt's RayJob was never created, as far as anybody told. Pods that may be its own are a sign
        that it was."""
        if attempt.uid is not None or attempt.end_time is not None:
            return False
        if not self.kube.is_unheard_of("ray.io/v1", "RayJob", job.namespace, attempt.ray_job):
            return False
        return not self.kube.sightings.pods(job.namespace, naming.selector(job.name, attempt.number))

    async def _pods(
        self, job: JobFacts, attempt: Attempt, rayjob: RayJobFacts | None, *, fresh: bool
    ) -> list[PodFacts]:
        """Pods of the attempt, with those that the cluster took away a moment ago. A pod that is older than the RayJob
        is of an earlier job of this name; where there is no RayJob yet, pods of this name are all told."""
        if rayjob is None and attempt.uid is None:
            labels = naming.selector(job.name)
            fresh = fresh or bool(self.kube.sightings.pods(job.namespace, labels))
        else:
            labels = naming.selector(job.name, attempt.number)
            fresh = fresh or (
                _ought_to_have_pods(rayjob, now=self.now(job))
                and not self.kube.sightings.pods(job.namespace, labels)
            )
        bodies = await self.kube.find("v1", "Pod", job.namespace, labels=labels, fresh=fresh)
        pods = [await self._pod(job, attempt, body) for body in bodies if _is_of(rayjob, body)]
        departed = self.kube.sightings.departed(job.namespace, labels)
        there = {pod.name for pod in pods}
        gone = [pod_facts.pod_facts(body) for body in departed if _is_of(rayjob, body)]
        return pods + [
            replace(pod, running=False, waiting_reason=None, submitter_exit_code=None, gone=True)
            for pod in gone
            if pod.name not in there
        ]

    async def _submitter(
        self, job: JobFacts, attempt: Attempt, rayjob: RayJobFacts | None, *, fresh: bool
    ) -> tuple[PodFacts | None, str]:
        """What hinders the submission, where that takes long. What is `fresh` is about to be acted upon."""
        ready = statuses.holds_since(job.status, ConditionType.RESOURCES_READY)
        idle = rayjob is not None and rayjob.deployment_status == "Running" and not rayjob.job_status
        now = self.now(job)
        if rayjob is None or not idle or fresh or ready is None:
            return None, ""
        if (now - ready).total_seconds() < SUBMISSION_SECONDS:
            return None, ""
        return await waiting.observe_submitter(
            self.kube, rayjob, namespace=job.namespace, attempt_start=attempt.start_time, now=now
        )

    async def _pod(self, job: JobFacts, attempt: Attempt, body: Json) -> PodFacts:
        start, now = attempt.start_time, self.now(job)
        return await waiting.observe_pod(self.kube, body, attempt_start=start, now=now)

    async def _observe_new(self, key: Key, job: JobFacts, *, fresh: bool) -> Observed:
        spec = job.spec
        model = spec.model.fine_tune_job_ref if spec else None
        reward = spec.reward.fine_tune_job_ref if spec and spec.reward else None
        self.followers.follow(key, [(job.namespace, one.name) for one in (model, reward) if one])
        return Observed(
            job=job,
            upstream=await self._upstream(job, model.name, fresh=fresh) if model else None,
            reward=await self._upstream(job, reward.name, fresh=fresh) if reward else None,
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
        """Long after the end, only a RayJob that is there all the same is worth a look."""
        attempt = job.status.attempts[-1] if job.status.attempts else None
        if attempt is None:
            return Observed(job=job)
        names = [name for name in (attempt.ray_job, attempt.inspection) if name]
        heard = any(not self.kube.is_unheard_of("ray.io/v1", "RayJob", job.namespace, name) for name in names)
        if not heard and not jobs.has_cleanup_left(job.status, now=self.now(job)):
            return Observed(job=job)
        return Observed(
            job=job,
            rayjob=await self._rayjob(job, attempt.ray_job, fresh=fresh),
            inspection=await self._rayjob(job, attempt.inspection, fresh=fresh)
            if attempt.inspection
            else None,
        )

    async def _upstream(self, job: JobFacts, name: str, *, fresh: bool) -> UpstreamFacts:
        """The job that is waited for, and those that it waits for itself: the way back to `job` where there is one."""
        body = await self.kube.get(API_VERSION, KIND, job.namespace, name, fresh=fresh)
        seen: list[str] = []
        ways = [[following] for following in (facts.upstream_names(body) if body else [])]
        while ways and len(seen) < MOST_LINKS:
            way = ways.pop(0)
            if way[-1] == job.name:
                return facts.upstream_facts(body, name=name, waits_for=way)
            if way[-1] in seen:
                continue
            seen.append(way[-1])
            link = await self.kube.get(API_VERSION, KIND, job.namespace, way[-1], fresh=fresh)
            ways += [[*way, following] for following in (facts.upstream_names(link) if link else [])]
        return facts.upstream_facts(body, name=name, waits_for=seen)

    async def _rayjob(self, job: JobFacts, name: str, *, fresh: bool) -> RayJobFacts | None:
        body = await self.kube.get("ray.io/v1", "RayJob", job.namespace, name, fresh=fresh)
        if body is None:
            return None
        attempt = job.status.attempts[-1]
        recorded = attempt.uid if name == attempt.ray_job else None
        return facts.rayjob_facts(body, owner=job.name, owner_uid=job.uid, recorded_uid=recorded)


def _is_quiet(rayjob: RayJobFacts, report: Report | None) -> bool:
    """Whether the trainer is heard of, so that its pods need not be asked for."""
    if rayjob.is_over:
        return False
    if report is None:
        return rayjob.job_status == "RUNNING"
    # Who stopped it, its pod may tell.
    return report.result is None or report.result.error_class is not ErrorClass.PREEMPTED


def _ought_to_have_pods(rayjob: RayJobFacts | None, *, now: datetime) -> bool:
    """Whether KubeRay has begun with a RayJob some time ago."""
    if rayjob is None or rayjob.created is None or rayjob.deployment_status != "Initializing":
        return False
    return (now - rayjob.created).total_seconds() >= PODLESS_SECONDS


def _is_of(rayjob: RayJobFacts | None, pod: Mapping[str, Json]) -> bool:
    """Whether a pod may be of this RayJob: the API server made the one before the other, by its own clock."""
    if rayjob is None or rayjob.created is None:
        return True
    created = pod["metadata"].get("creationTimestamp")
    return created is None or datetime.fromisoformat(created) >= rayjob.created
