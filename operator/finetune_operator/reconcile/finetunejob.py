"""One pass over a FineTuneJob: observe, decide, act, write the status once, record the events."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from finetune_operator.adapters.api_errors import (
    ConflictError,
    FencedError,
    ForbiddenError,
    InvalidError,
    UnavailableError,
)
from finetune_operator.adapters.kube import Json
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND, FineTuneJobSpec
from finetune_operator.core import jobs, refusals
from finetune_operator.core.facts import (
    Action,
    CreateRayJob,
    Defaults,
    DeleteJob,
    DeleteRayJob,
    JobFacts,
    Observed,
    Plan,
    WriteRunFile,
)
from finetune_operator.manifests import rayjobs, runfiles
from finetune_operator.reconcile import clocks, events, facts, patches
from finetune_operator.reconcile.followers import Followers
from finetune_operator.reconcile.job_observer import JobObserver
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

CONFLICT_SECONDS = 0.2


class NamesakeError(Exception):
    """An earlier job of this name has left an object that is about to go; `str()` names it."""


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

    @functools.cached_property
    def observer(self) -> JobObserver:
        return JobObserver(self.kube, self.mailbox, self.followers, self.clock)

    @functools.cached_property
    def recorder(self) -> events.Recorder:
        """To be run beside the passes."""
        return events.Recorder(self.kube)

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
            actions = found[2].actions
            creating = bool(actions) and all(isinstance(one, CreateRayJob) for one in actions)
            found = await self._look(key, fresh=True, creating=creating)
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

    async def _look(
        self, key: Key, *, fresh: bool, creating: bool = False
    ) -> tuple[Json, Observed, Plan] | None:
        """The job, what is known of it, and what to do; `fresh` and `creating` as the observer has them."""
        body = await self.kube.get(API_VERSION, KIND, *key, fresh=fresh)
        if body is None:
            return None
        job = facts.job_facts(body)
        try:
            seen = await self.observer.observe(key, job, fresh=fresh, creating=creating)
        except ForbiddenError as error:
            seen = Observed(job=job)
            await self._write(key, body, seen, refusals.unread(seen, str(error), now=self.observer.now(job)))
            raise  # the pass has failed all the same: the log and the metrics tell how often
        return body, seen, jobs.decide(seen, defaults=self.defaults, now=self.observer.now(seen.job))

    async def _act(self, seen: Observed, plan: Plan) -> tuple[Observed, Plan]:
        """Carry out the plan's actions. An object that the API server refuses for good ends the job. Once the RayJob of
        the attempt is created, the plan is what follows from that, so that one write tells it all."""
        for action in plan.actions:
            now = self.observer.now(seen.job)
            try:
                created = await self._do(seen.job, action)
            except NamesakeError as error:
                return seen, jobs.waits_for_namesake(seen, str(error), now=now)
            except InvalidError as error:
                return seen, refusals.refused(seen, plan, action, str(error), now=now)
            except ForbiddenError as error:
                return seen, refusals.forbidden(seen, plan, action, str(error), now=now)
            except FencedError:
                raise
            except UnavailableError as error:
                return seen, refusals.unavailable(seen, plan, action, str(error), now=now)
            if created is not None:
                rayjob = facts.rayjob_facts(created, owner=seen.job.name, owner_uid=seen.job.uid)
                seen = replace(seen, rayjob=rayjob, pods=())  # what was there before is of another attempt
                then = jobs.decide(seen, defaults=self.defaults, now=self.observer.now(seen.job))
                plan = replace(then, actions=(), requeue_after=0.0 if then.actions else then.requeue_after)
        return seen, plan

    async def _do(self, job: JobFacts, action: Action) -> Json | None:
        """Returns an attempt's RayJob that was created. Its UID is stored in the same pass, so that one which somebody
        deletes at once is not created again while its pods are still there."""
        match action:
            case CreateRayJob():
                created = await self._create(job, action)
                return None if action.inspect else created
            case WriteRunFile():
                await self._write_run_file(job, action)
            case DeleteRayJob(name, uid):
                await self.kube.delete("ray.io/v1", "RayJob", job.namespace, name, uid=uid)
            case DeleteJob():
                await self.kube.delete(API_VERSION, KIND, job.namespace, job.name, uid=job.uid)
        return None

    async def _create(self, job: JobFacts, action: CreateRayJob) -> Json | None:
        if job.spec is None or (places := _places(job, job.spec)) is None:
            return None  # the decision never asks for it: an attempt is recorded together with these
        effective, overrides = job.status.effective, job.status.attempts[-1].overrides
        rayjob = rayjobs.build_rayjob(
            _owner(job),
            name=action.name,
            attempt=action.attempt,
            spec=job.spec,
            image=(effective.image if effective else None) or self.defaults.image,
            places=places,
            platform=self.platform(),
            memory=overrides.memory if overrides else None,
            inspect=action.inspect,
        )
        # First: a pod that cannot mount it would wait for it.
        await self._write_run_file(job, WriteRunFile(action.name, action.attempt))
        # Created, not applied: a RayJob that is there already, whoever's it is, must never be changed.
        created = await self.kube.create(rayjob)
        metadata, fields = facts.lost_metadata(rayjob, created), facts.lost_fields(rayjob, created)
        if metadata or fields:
            uid = created["metadata"]["uid"]
            await self.kube.delete("ray.io/v1", "RayJob", job.namespace, action.name, uid=uid)
            text = refusals.stripped(action.name, metadata) if metadata else refusals.outdated(fields)
            raise InvalidError(text)
        return created

    async def _write_run_file(self, job: JobFacts, action: WriteRunFile) -> None:
        """Raises NamesakeError or InvalidError where another's ConfigMap has the name: it must not be changed."""
        if job.spec is None or (places := _places(job, job.spec)) is None:
            return
        run_file = runfiles.build_run_file(
            namespace=job.namespace,
            name=job.name,
            uid=job.uid,
            attempt=action.attempt,
            spec=job.spec,
            places=places,
            overrides=job.status.attempts[-1].overrides,
        )
        config_map = rayjobs.build_config_map(
            _owner(job), name=action.name, attempt=action.attempt, run_file=run_file, platform=self.platform()
        )
        metadata = config_map["metadata"]
        try:
            await self.kube.create(config_map)
            return
        except ConflictError:
            there = await self.kube.get("v1", "ConfigMap", job.namespace, metadata["name"])
        owners = there["metadata"].get("ownerReferences", []) if there else []
        if any(owner["uid"] == job.uid for owner in owners):
            await self.kube.apply(config_map)  # of a pass that was cut off
        elif there is None or any((one["kind"], one["name"]) == (KIND, job.name) for one in owners):
            raise NamesakeError(f"ConfigMap {metadata['name']}")
        else:
            raise InvalidError(
                f"ConfigMap {metadata['name']} exists and belongs to someone else: delete it or choose another name"
            )

    async def _write(self, key: Key, body: Json, seen: Observed, plan: Plan) -> bool:
        """The only place that writes a FineTuneJob's status; events follow, so that they tell what is stored. Whether
        anything was stored."""
        patch = patches.merge_diff(body.get("status", {}), facts.to_json(plan.status))
        stored = False
        if patch:
            version = body["metadata"]["resourceVersion"]
            try:
                answer = await self.kube.patch_status(KIND, *key, resource_version=version, patch=patch)
                # Else the CRD is of an older operator and has no such fields: writing them at once again cannot help.
                stored = answer["metadata"]["resourceVersion"] != version
            except InvalidError as error:
                if seen.report is None:
                    raise
                logger.warning("%s/%s: what its trainer reported cannot be stored: %s", *key, error)
                self.mailbox.drop(key, seen.report, uid=seen.job.uid)
                return True
        if seen.report is not None:
            self.mailbox.mark_written(key, seen.report, uid=seen.job.uid)
            if seen.report.result is not None and plan.status.attempts[-1].end_time is None:
                # The attempt goes on, and its trainer reports again.
                self.mailbox.drop(key, seen.report, uid=seen.job.uid)
        if jobs.is_finished(plan.status):
            self.mailbox.forget(key)
        self.telemetry.show_job(*key, plan.status)
        if jobs.is_finished(plan.status) and not jobs.is_finished(seen.job.status):
            self.telemetry.jobs_finished.labels(key[0], plan.status.reason).inc()
        for event in plan.events:
            logger.info("%s/%s: %s: %s", *key, event.reason, event.message)
            self.recorder.record(body, event, now=self.clock())
        return stored


def _owner(job: JobFacts) -> rayjobs.Owner:
    return rayjobs.Owner(job.namespace, job.name, job.uid)


def _places(job: JobFacts, spec: FineTuneJobSpec) -> runfiles.Places | None:
    """The folders that were settled with the first attempt."""
    effective = job.status.effective
    if effective is None or effective.output_uri is None:
        return None
    return runfiles.Places(
        output_uri=effective.output_uri,
        checkpoint_uri=effective.checkpoint_uri,
        model_uri=effective.model_uri or spec.model.uri or "",
        adapter=effective.adapter,
        reward=effective.reward,
    )


def _must_be_sure(seen: Observed, plan: Plan) -> bool:
    """Whether what is planned must not rest on what the watches told some time ago: it acts, or it gives an attempt or
    the job up and nobody told of its end."""
    if plan.actions:
        return True
    if jobs.is_finished(plan.status) and not seen.job.status.attempts:
        return not jobs.is_finished(seen.job.status)
    ended = bool(plan.status.attempts) and plan.status.attempts[-1].end_time is not None
    known = bool(seen.job.status.attempts) and seen.job.status.attempts[-1].end_time is not None
    told = seen.report is not None and seen.report.result is not None
    return ended and not known and not told
