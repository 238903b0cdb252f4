"""Facts for the tests of decisions: one job, and the steps that it goes through."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.api.finetunejob import Attempt, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core import jobs
from finetune_operator.core.facts import Defaults, JobFacts, Observed, Plan, PodFacts, RayJobFacts
from finetune_operator.core.reports import Report

START = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
DEFAULTS = Defaults(output_uri="file:///artifacts", image="trainer:1")
SPEC: dict[str, Any] = {
    "model": {"uri": "hf://acme/tiny"},
    "dataset": {"sources": [{"uri": "file:///data/train.jsonl"}]},
}
ARTIFACT = {
    "uri": "file:///artifacts/team/triage-0123abcd",
    "digest": "sha256:" + "a" * 64,
    "sizeBytes": 1234,
    "baseModel": "hf://acme/tiny",
    "rank": 16,
}


class Story:
    """A job over time: `step` decides, keeps the status and lets a second pass."""

    def __init__(self, spec: dict[str, Any] | None = None, defaults: Defaults = DEFAULTS) -> None:
        self.now = START
        self.defaults = defaults
        self.job = JobFacts(
            namespace="team",
            name="triage",
            uid="0123abcd-1111",
            generation=1,
            spec=FineTuneJobSpec.model_validate(SPEC | (spec or {})),
            problem=None,
            status=FineTuneJobStatus(),
        )

    def step(self, *, after: float = 1, **seen: Any) -> Plan:
        """One pass over what is seen now; `after` seconds go by afterwards."""
        if seen.get("report") is not None:
            seen.setdefault("reported_at", self.now)
        plan = jobs.decide(Observed(job=self.job, **seen), defaults=self.defaults, now=self.now)
        self.job = replace(self.job, status=plan.status)
        self.now += timedelta(seconds=after)
        return plan

    def change(self, **spec: Any) -> None:
        """The user changes the spec, as far as that is allowed."""
        assert self.job.spec is not None
        document = self.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True) | spec
        changed = FineTuneJobSpec.model_validate(document)
        self.job = replace(self.job, spec=changed, generation=self.job.generation + 1)

    def act(self, verb: str | None) -> None:
        """The user sets the annotation finetune.dev/action."""
        self.job = replace(self.job, action=verb)

    @property
    def attempt(self) -> Attempt:
        return self.job.status.attempts[-1]

    def started(self) -> Story:
        """The attempt is recorded and its RayJob was created."""
        self.step()
        self.step()
        return self

    def trained(self) -> Story:
        self.started()
        self.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=5))
        return self


def condition(story: Story, kind: str) -> tuple[str, str] | None:
    return next(((c.status, c.reason) for c in story.job.status.conditions if c.type == kind), None)


def rayjob(deployment: str = "", job: str = "", **more: Any) -> RayJobFacts:
    known = {"name": "triage-a1", "uid": "ray-uid", "ours": True}
    return RayJobFacts(**{**known, "deployment_status": deployment, "job_status": job, **more})


def training(
    *, step: int, total: int = 10, saved: int | None = None, resumed: int | None = None, **metrics: str
) -> Report:
    ours: dict[str, Any] = {"phase": "Training", "step": step, "totalSteps": total, "tokensPerSecond": 120.54}
    if saved is not None:
        ours["checkpoint"] = {"step": saved, "uri": f"file:///artifacts/c/checkpoint-{saved}"}
    if resumed is not None:
        ours["resumedFromStep"] = resumed
    return Report.model_validate(
        {
            "trainerStatus": {
                "progressPercentage": 100 * step // total,
                "estimatedRemainingSeconds": 200,
                "metrics": [{"name": k, "value": v} for k, v in ({"loss": "1.5"} | metrics).items()],
            },
            "finetune": ours,
        }
    )


def result(error_class: str, exit_code: int, message: str = "", **more: Any) -> Report:
    body = {"class": error_class, "exitCode": exit_code, "message": message, **more}
    return Report.model_validate({"finetune": {"result": body}})


def inspected(error_class: str, exit_code: int, message: str = "", **more: Any) -> Report:
    """What an inspection reports."""
    told = result(error_class, exit_code, message, **more)
    return told.model_copy(update={"finetune": told.finetune.model_copy(update={"inspection": True})})


RUNNING = rayjob("Running", "RUNNING")
QUICK: dict[str, Any] = {"retry": {"backoffSeconds": {"min": 0, "max": 0}}}
OLD_POD = PodFacts("triage-a1-head", True, node="node-7")


def second(deployment: str = "Running", job: str = "RUNNING", **more: Any) -> RayJobFacts:
    """The RayJob of attempt 2."""
    facts: dict[str, Any] = {"name": "triage-a2", "uid": "ray-uid-2", "ours": True} | more
    return RayJobFacts(deployment_status=deployment, job_status=job, **facts)


def current(story: Story) -> RayJobFacts:
    """The RayJob of the last attempt, whose trainer runs."""
    number = story.attempt.number
    uid = story.attempt.uid or f"ray-uid-{number}"
    return RayJobFacts(f"triage-a{number}", uid, True, "Running", "RUNNING")


def fail(story: Story, error_class: str, code: int, **more: Any) -> Plan:
    """The trainer reports how it ended; then the RayJob is over and its pods are gone."""
    plan = story.step(rayjob=RUNNING, report=result(error_class, code, "broken", **more))
    story.step(rayjob=rayjob("Failed", "FAILED"))
    return plan
