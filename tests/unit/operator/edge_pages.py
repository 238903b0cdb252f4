"""Plays every edge case against the operator's decisions, and writes down what comes out.

`python -m tests.unit.operator.edge_pages --write [DIR]` (or --check [DIR]); DIR is docs below the current folder.
"""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from finetune_operator.api import crds
from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import policies
from finetune_operator.core.facts import CreateRayJob, DeleteJob, DeleteRayJob, Plan, RayJobFacts
from finetune_operator.core.reports import Report
from finetune_operator.reconcile import facts, pod_facts
from tests.patches import merged
from tests.unit.operator.edge_cases import EDGE_CASES, NEEDS, PROVOKED, SEEN, EdgeCase
from tests.unit.operator.stories import ARTIFACT, Story, rayjob, result, training

FILE = "failure-modes.md"
PASSES = 12
RAYJOB: dict[str, Any] = {
    "metadata": {
        "name": "triage-a1",
        "uid": "ray-uid",
        "creationTimestamp": "2026-01-01T12:00:02Z",
        "finalizers": ["ray.io/rayjob-finalizer"],
        "labels": {},
        "ownerReferences": [{"kind": "FineTuneJob", "name": "triage", "uid": "0123abcd-1111"}],
    },
    "spec": {"suspend": False},
}


class Play:
    """One case: what was known before, the recorded status, and the passes that follow."""

    def __init__(self, case: EdgeCase) -> None:
        self.case = case
        self.story = _before(case)
        self.words: list[str] = []
        self.first = self._pass()
        self._follow()

    @property
    def outcome(self) -> str:
        shown = f"{self.first.status.phase}/{self.first.status.reason}"
        return f"{shown} -> {', '.join(self.words)}"

    @property
    def message(self) -> str:
        return (self.first.status.message or "").splitlines()[0]

    def _seen(self) -> dict[str, Any]:
        case = self.case
        body = copy.deepcopy(merged({**RAYJOB, "status": case.status or {}}, case.rayjob))
        found = facts.rayjob_facts(body, owner="triage", owner_uid="0123abcd-1111")
        pods = [pod_facts.pod_facts(pod) for pod in case.pods]
        if self.story.attempt.number > 1:
            return {}
        if found.is_over and self.story.attempt.end_time is not None:
            pods = [pod for pod in pods if pod.terminating]
        return {
            "rayjob": None if case.status is None or "deleted" in self.words else found,
            "pods": [] if "deleted" in self.words else pods,
            "clusters": [] if "deleted" in self.words else case.clusters,
        }

    def _pass(self) -> Plan:
        case, seen = self.case, self._seen()
        report = _report(case)
        if report is not None:
            seen["report"] = report
        elif case.heard and case.before == "training" and not case.later:
            seen |= {"report": training(step=5), "reported_at": self.story.now - timedelta(seconds=2)}
        return self.story.step(**seen)

    def _follow(self) -> None:
        """Go on with the same facts until the case has shown what becomes of it."""
        plan = self.first
        for _ in range(PASSES):
            self._note(plan)
            if self._is_settled(plan):
                return
            wait = min(plan.requeue_after or 0, 30.0)
            self.story.now += timedelta(seconds=wait)
            plan = self._next()

    def _next(self) -> Plan:
        seen = self._seen()
        if "inspected" in self.words and self.story.attempt.number == 1:
            found = result("Succeeded", 0, "verified", artifact=ARTIFACT)
            missing = result("Internal", 1, "no manifest.json")
            seen["inspection"] = rayjob("Complete", "SUCCEEDED")
            seen["report"] = found if self.case.artifact else missing
        return self.story.step(**seen)

    def _note(self, plan: Plan) -> None:
        for action in plan.actions:
            match action:
                case DeleteRayJob():
                    self.words.append("deleted")
                case CreateRayJob(inspect=True):
                    self.words.append("inspected")
                case DeleteJob():
                    self.words.append("FineTuneJob deleted")
                case CreateRayJob(attempt=2):
                    self.words.append(f"attempt 2{self._given()}")

    def _given(self) -> str:
        given = self.story.attempt.overrides
        if given is None:
            return ""
        return f" with {given.memory or f'{given.micro_batch_size} rows per forward pass'}"

    def _is_settled(self, plan: Plan) -> bool:
        status = plan.status
        if status.phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED):
            if self.case.before == "finished":
                self.words = self.words or ["nothing"]
            elif plan is self.first:
                self.words.append("the end")
            else:
                self.words.append(f"{status.phase}/{status.reason}")
            return True
        if self.words and self.words[-1].startswith("attempt 2"):
            return True
        attempt = status.attempts[-1]
        if attempt.end_time is None and attempt.number == 1:
            self.words.append("waits" if status.phase in (Phase.PROVISIONING, Phase.QUEUED) else "goes on")
            if attempt.lost_steps:
                self.words.append(f"{attempt.lost_steps} steps lost")
            if status.retries and status.retries.preemption:
                self.words.append(f"preemption {status.retries.preemption}")
            return True
        waits = "waits until" in (status.message or "") and not self.case.goodbye
        if waits and "deleted" not in self.words:
            self.words.append("fenced")
            if "finalizer" in (status.message or ""):
                self.words.append("names the finalizer")
            return True
        return False


def _before(case: EdgeCase) -> Story:
    """The job as the operator knew it when the case begins."""
    story = Story({"retry": {"backoffSeconds": {"min": 1, "max": 1}}, **case.spec})
    story.started()
    running: RayJobFacts = rayjob("Running", "RUNNING")
    match case.before:
        case "running":
            story.step(rayjob=rayjob("Running"))
        case "training":
            story.step(rayjob=running, report=training(step=5))
        case "exporting":
            exporting = Report.model_validate(
                {"finetune": {"phase": "Exporting", "step": 10, "totalSteps": 10}}
            )
            story.step(rayjob=running, report=exporting)
        case "finished":
            story.step(rayjob=running, report=result("Succeeded", 0, "done", artifact=ARTIFACT))
    story.now += timedelta(seconds=case.later)
    return story


def _report(case: EdgeCase) -> Report | None:
    if case.artifact and case.before != "exporting":
        return result("Succeeded", 0, "done", artifact=ARTIFACT)
    if case.goodbye:
        return goodbye()
    return None if case.step is None else training(step=case.step, resumed=2 if case.step < 5 else None)


def goodbye() -> Report:
    body = result("Preempted", 75, "stopped by SIGTERM at step 6", step=6).model_dump(by_alias=True)
    body["finetune"] |= {"step": 6, "checkpoint": {"step": 6, "uri": "file:///saved/checkpoint-6"}}
    return Report.model_validate(body)


def render_page() -> str:
    """Markdown: the classes with their budgets, then every case as it was played."""
    lines = [
        "<!-- Generated from tests/unit/operator/edge_cases.py by `make crds`; do not edit. -->",
        "# What can go wrong, and what becomes of the job",
        "",
        "Every row below was played against the operator's decisions when this page was made; the last column is what",
        "`.status.message` said. Numbers are those of the tests.",
        "",
        "## Classes of failure",
        "",
        "| class | budget in `spec.retry` | what the next attempt gets |",
        "|---|---|---|",
        *(f"| {name} | {_budget(budget)} |" for name, budget in policies.BUDGETS.items()),
        "",
        "Each budget counts for itself, in `.status.retries`. An attempt starts when `nextAttemptTime` has come",
        "**and** no pod and no RayCluster of the job is left. It goes on from the newest complete checkpoint. Whatever",
        "is told of an attempt, an artifact with a committed manifest makes the job Succeeded.",
        "",
        "## What KubeRay shows",
        "",
        "*seen*: recorded from KubeRay 1.6.2 with real pods; *read*: from the source of KubeRay 1.7.",
        "",
        f"{len(PROVOKED)} of the {len(EDGE_CASES)} are also brought about with a real KubeRay, Ray and trainer, on the",
        "laptop cluster or (cluster/) with real pods, by the test in the last column; of the others it says what that",
        "would need.",
        "",
        "| # | what happens | KubeRay shows | what becomes of the job | why | `.status.message` | provoked by |",
        "|---|---|---|---|---|---|---|",
        *(_row(case, Play(case)) for case in EDGE_CASES),
        "",
        "## All of it at once",
        "",
        "`make chaos` lets faults loose on many jobs at once, drawn from a seed: [operator.md](operator.md#chaos).",
    ]
    return "\n".join(lines) + "\n"


def _budget(budget: policies.Budget) -> str:
    match budget:
        case policies.Budget.NONE:
            return "none: the job ends |"
        case policies.Budget.FREE:
            return "costs nothing | when `spec.suspend` is false"
        case policies.Budget.NEXT:
            return "costs nothing | at once: the first attempt, with its GPU"
        case policies.Budget.USER:
            return "`maxUserRetries` (0) | the same again, after the backoff"
        case policies.Budget.INFRASTRUCTURE:
            return "`maxInfraRetries` (5) | the same again, after the backoff"
        case policies.Budget.PREEMPTION:
            return "`preemptions` (Unlimited) | the same again, after the backoff"
        case policies.Budget.GPU_MEMORY:
            return "`onOutOfMemory` | at once, half the rows per forward pass, the same `globalBatchSize`; at least 1"
        case policies.Budget.HOST_MEMORY:
            return "`onOutOfMemory` | at once and once, twice the memory"


def _row(case: EdgeCase, play: Play) -> str:
    status = case.status
    shown = "no RayJob"
    if status is not None:
        words = (status.get("jobDeploymentStatus") or '""', status.get("jobStatus") or '""')
        shown = " / ".join(words) + (f", {status['reason']}" if status.get("reason") else "")
    known = "seen" if case.known == SEEN else "read"
    cells = (
        case.id,
        case.title,
        f"{shown} ({known})",
        play.outcome.replace(" -> ", "; then "),
        case.meaning,
        play.message,
        PROVOKED[case.id].removeprefix("test_").replace("_", " ")
        if case.id in PROVOKED
        else f"needs {NEEDS[case.id]}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(crds.run({FILE: render_page()}, folder=Path("docs"), description=__doc__ or ""))
