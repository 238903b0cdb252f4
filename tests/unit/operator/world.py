"""A cluster in which a job lives: KubeRay, pods, a trainer with its storage, and all that can happen to them.

Only what the operator can see or cause is played: statuses as KubeRay writes them (docs/failure-modes.md), pods that
take their time to go, a trainer that saves, resumes, commits and reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core import jobs, statuses
from finetune_operator.core.facts import (
    Action,
    CreateRayJob,
    DeleteJob,
    DeleteRayJob,
    JobFacts,
    Observed,
    Plan,
    PodFacts,
    RayJobFacts,
)
from finetune_operator.core.reports import Report
from tests.unit.operator.stories import ARTIFACT, DEFAULTS, SPEC, START, inspected, result, training

TOTAL_STEPS = 60
GRACE_SECONDS = 8  # between the deletion of a RayJob and the end of its pods


class KilledError(Exception):
    """The operator dies here."""


@dataclass
class SimulatedPod:
    attempt: int
    inspect: bool = False
    node_away: bool = False
    """Its node is out of reach: it cannot be taken down, and it may still be writing."""
    end: datetime | None = None
    """When it will be gone; None: nobody has asked for that."""


@dataclass
class SimulatedRayJob:
    facts: RayJobFacts
    attempt: int
    inspect: bool
    fault: str | None = None
    step: int | None = None
    """Optimizer step of its trainer; None before it has started."""
    resumed: int = 0
    age: int = 0


@dataclass
class World:
    spec: dict[str, Any] = field(default_factory=dict)
    check: Callable[[World, Observed, Plan], None] = lambda world, seen, plan: None

    def __post_init__(self) -> None:
        self.now = START
        self.job: JobFacts | None = JobFacts(
            namespace="team",
            name="triage",
            uid="0123abcd-1111",
            generation=1,
            spec=FineTuneJobSpec.model_validate(SPEC | self.spec),
            problem=None,
            status=FineTuneJobStatus(),
        )
        self.rayjobs: dict[str, SimulatedRayJob] = {}
        self.pods: dict[str, SimulatedPod] = {}
        self.report: tuple[int, Report, datetime] | None = None
        self.checkpoint = 0
        self.committed = False
        self.kuberay_up = True
        self.listening = True
        self.quota = False
        self.held = False
        self.killed_at: str | None = None
        self.wall = self.skew = timedelta()
        self.listening_since = self.now
        self.due = self.now
        self.next_fault: str | None = None
        self.plans: list[Plan] = []

    # ------------------------------------------------------------ the operator

    def observe(self, job: JobFacts) -> Observed:
        """What the reconciler would read."""
        attempts = job.status.attempts
        if not attempts:
            return Observed(job=job, listening_since=self.listening_since)
        last = attempts[-1]
        ray = self.rayjobs.get(last.ray_job)
        inspection = self.rayjobs.get(last.inspection) if last.inspection else None
        ended = last.end_time is not None
        told = self.report if self.report and self.report[0] == last.number else None
        pods = {n: p for n, p in self.pods.items() if ended or p.attempt == last.number}
        return Observed(
            job=job,
            rayjob=ray.facts if ray else None,
            inspection=inspection.facts if inspection else None,
            pods=[
                PodFacts(n, p.end is None, terminating=p.end is not None, node="n1") for n, p in pods.items()
            ],
            clusters=sorted({f"{n}-cluster" for n, p in pods.items() if p.end is None}) if ended else [],
            report=told[1] if told else None,
            reported_at=told[2] if told else None,
            listening_since=self.listening_since,
            clock_is_behind=self.clock < self.operator_time(job),
        )

    @property
    def clock(self) -> datetime:
        """The operator's: as the wall clock was when it started, and steady from then on."""
        return self.now + self.skew

    def operator_time(self, job: JobFacts) -> datetime:
        recorded = statuses.latest_time(job.status)
        return max(self.clock, recorded) if recorded else self.clock

    def reconcile(self) -> None:
        if self.job is None:
            return
        seen = self.observe(self.job)
        plan = jobs.decide(seen, defaults=DEFAULTS, now=self.operator_time(self.job))
        self.check(self, seen, plan)
        self.plans.append(plan)
        try:
            self._die("before")
            for action in plan.actions:
                self._act(action)
            self._die("between")
            if self.job is not None:
                self.job = replace(self.job, status=plan.status)
            after = plan.requeue_after
            self.due = (
                self.now + timedelta(seconds=after)
                if after is not None
                else datetime.max.replace(tzinfo=START.tzinfo)
            )
        except KilledError:
            self.report = None  # what was in its memory
            self.skew = self.wall
            self.due = self.now
            self.listening_since = self.clock

    def _die(self, point: str) -> None:
        if self.killed_at == point:
            self.killed_at = None
            raise KilledError(point)

    def _act(self, action: Action) -> None:
        match action:
            case CreateRayJob(name, attempt, inspect):
                if name in self.rayjobs:
                    return
                uid = f"uid-{name}-{len(self.plans)}"
                created = RayJobFacts(
                    name,
                    uid,
                    ours=True,
                    created=self.now,
                    suspended=self.held,
                    queue="q" if self.held else None,
                )
                fault, self.next_fault = (None if inspect else self.next_fault), None
                self.rayjobs[name] = SimulatedRayJob(created, attempt, inspect, fault=fault)
            case DeleteRayJob(name, uid):
                ray = self.rayjobs.get(name)
                if ray is not None and ray.facts.uid == uid:
                    self.change(ray, deleting_since=self.now)
            case DeleteJob():
                self.job = None

    # ------------------------------------------------------------ time

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += timedelta(seconds=1)
            before = self._visible()
            self._kuberay()
            self._pods()
            if self.now >= self.due or before != self._visible():
                self.reconcile()

    def _visible(self) -> tuple[Any, ...]:
        """What wakes the operator when it changes."""
        told = self.report[2] if self.report else None
        return tuple(ray.facts for ray in self.rayjobs.values()), tuple(self.pods), told

    def change(self, ray: SimulatedRayJob, **facts: Any) -> None:
        ray.facts = replace(ray.facts, **facts)

    def _kuberay(self) -> None:
        for name, ray in list(self.rayjobs.items()):
            if not self.kuberay_up:
                self._trainer(ray)  # goes on without KubeRay
                continue
            if ray.facts.deleting_since is not None:
                del self.rayjobs[name]
                self._take_down(name)
                continue
            self._advance(name, ray)
            self._trainer(ray)

    def _advance(self, name: str, ray: SimulatedRayJob) -> None:
        ray.age += 1
        facts = ray.facts
        if facts.is_over:
            self._take_down(name)
        elif facts.suspended:
            self.change(ray, deployment_status="Suspended", job_status="")
            self._take_down(name)
            ray.step = None
        elif facts.deployment_status in ("", "Suspended"):
            self.change(ray, deployment_status="Initializing", job_status="")
            ray.age = 0
        elif facts.deployment_status == "Initializing" and not self.quota and ray.age >= 3:
            if f"{name}-head" not in self.pods:
                self.pods[f"{name}-head"] = SimulatedPod(ray.attempt, ray.inspect)
            self.change(ray, deployment_status="Running", job_status="")
        elif facts.deployment_status == "Running" and not facts.job_status and ray.age >= 5:
            self.change(ray, job_status="RUNNING")
            ray.step, ray.resumed = (None, 0) if ray.inspect else (self.checkpoint, self.checkpoint)

    def _take_down(self, name: str) -> None:
        for pod_name, pod in self.pods.items():
            if pod_name.startswith(f"{name}-") and pod.end is None:
                pod.end = self.now + timedelta(seconds=GRACE_SECONDS)

    def _pods(self) -> None:
        for name, pod in list(self.pods.items()):
            if pod.end is not None and self.now >= pod.end and not pod.node_away:
                del self.pods[name]

    # ------------------------------------------------------------ the trainer

    def _trainer(self, ray: SimulatedRayJob) -> None:
        if ray.facts.job_status != "RUNNING" or f"{ray.facts.name}-head" not in self.pods:
            return
        if ray.inspect:
            self._end(ray, self._inspected())
            return
        if ray.step is None or ray.fault == "silent":
            return
        if self.committed:
            self._end(ray, self._success())
        elif ray.fault is not None:
            classes = {"75": "Preempted", "80": "GpuOutOfMemory", "81": "HostOutOfMemory", "82": "NotFinite",
                       "74": "Storage", "83": "Collective", "84": "CheckpointCorrupt", "65": "BadData",
                       "1": "Internal"}  # fmt: skip
            if ray.fault == "75":
                self.checkpoint = ray.step
            self._end(ray, result(classes[ray.fault], int(ray.fault), "fault", step=ray.step))
        else:
            ray.step += 2
            if ray.step % 10 == 0:
                self.checkpoint = ray.step
            if ray.step >= TOTAL_STEPS:
                self.committed = True
                self._end(ray, self._success())
            else:
                self.tell(ray, self._progress(ray))

    def _progress(self, ray: SimulatedRayJob) -> Report:
        assert ray.step is not None
        return training(step=ray.step, total=TOTAL_STEPS, saved=self.checkpoint, resumed=ray.resumed)

    def _inspected(self) -> Report:
        if self.committed:
            return inspected("Succeeded", 0, "done", step=TOTAL_STEPS, artifact=ARTIFACT)
        return inspected("Internal", 1, "no manifest.json")

    def _success(self) -> Report:
        return result("Succeeded", 0, "done", step=TOTAL_STEPS, artifact=ARTIFACT)

    def tell(self, ray: SimulatedRayJob, report: Report) -> None:
        if self.listening:
            self.report = (ray.attempt, report, self.clock)

    def _end(self, ray: SimulatedRayJob, report: Report) -> None:
        """The process reports and ends; KubeRay sees its exit code."""
        self.tell(ray, report)
        assert report.result is not None
        code = report.result.exit_code
        if code == 0:
            self.change(ray, deployment_status="Complete", job_status="SUCCEEDED")
        else:
            message = f"Job entrypoint command failed with exit code {code}, last available logs: fault"
            self.change(
                ray, deployment_status="Failed", job_status="FAILED", reason="AppFailed", message=message
            )

    # ------------------------------------------------------------ what people and machines do

    @property
    def status(self) -> FineTuneJobStatus:
        assert self.job is not None
        return self.job.status

    @property
    def current(self) -> SimulatedRayJob | None:
        attempts = self.status.attempts if self.job else []
        return self.rayjobs.get(attempts[-1].ray_job) if attempts else None

    def edit(self, **spec: Any) -> None:
        assert self.job is not None
        assert self.job.spec is not None
        document = self.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        merged = document | {k: document[k] | v if isinstance(v, dict) else v for k, v in spec.items()}
        self.job = replace(self.job, spec=FineTuneJobSpec.model_validate(merged))
        self.due = self.now

    def act(self, verb: str) -> None:
        assert self.job is not None
        self.job = replace(self.job, action=verb)
        self.due = self.now
