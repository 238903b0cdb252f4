"""What watches over the chaos sees what must not be: an invariant that nothing can break protects nobody."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.manifests import naming
from tests.chaos import checks
from tests.clients import Json
from tests.observers import Observer

RETRY = {"maxUserRetries": 0, "maxInfraRetries": 2, "preemptions": 2}


def status(phase: str = "Running", **more: Any) -> Json:
    return {"phase": phase, "reason": "Training", "message": "steps are being taken", **more}


def attempt(number: int = 1, **more: Any) -> Json:
    return {"number": number, "rayJob": f"j1-a{number}", "startTime": f"2026-01-01T00:0{number}:00Z", **more}


def ended(number: int, error_class: str) -> Json:
    return attempt(number, endTime=f"2026-01-01T00:0{number}:30Z") | {"class": error_class}


def seen(*statuses: Json, events: str = "MODIFIED") -> list[str]:
    """What an observer finds wrong in this course of a job."""
    observer = Observer("here", interval=10)
    for one in statuses:
        body = {"metadata": {"name": "j1", "uid": "u1"}, "spec": {"retry": RETRY}, "status": one}
        observer.note_job(events, body)
    return observer.wrong


def step(number: int, **of_attempt: Any) -> Json:
    return status(progress={"step": number}, attempts=[attempt(lastStep=number, **of_attempt)])


def over(**more: Any) -> Json:
    conditions = [{"type": "Failed", "status": "True"}]
    return status("Failed", attempts=[ended(1, "Lost")], conditions=conditions, **more)


@pytest.mark.parametrize(
    ("course", "wrong"),
    [
        ([step(8), step(12)], []),
        ([step(18), step(12)], ["progress.step went back: 18 -> 12"]),
        ([step(18), step(12, lostSteps=8)], []),
        ([step(18), step(12, resumedFromStep=10)], []),
        ([step(28), step(12, lostSteps=18)], []),  # two processes
        ([step(58), step(12, lostSteps=48)], ["lost 48 steps with 2 processes"]),
        (
            [status(checkpoint={"step": 20}), status(checkpoint={"step": 10})],
            ["checkpoint.step went back: 20 -> 10"],
        ),
        ([status(attempts=[attempt(1)]), status(attempts=[attempt(1), attempt(2)])], ["had ended"]),
        ([over(), over(retries={"user": 1, "infrastructure": 0})], ["retries changed after the end"]),
        ([over(), status("Pending", attempts=[ended(1, "Lost")])], ["phase changed after the end"]),
        (
            [status("Succeeded", artifact={}, conditions=[{"type": "Failed", "status": "True"}])],
            ["phase Succeeded with conditions ['Failed']"],
        ),
        ([status(), status(retries={"infrastructure": 2})], ["from 0 to 2"]),
        (
            [status(retries={"infrastructure": 2}), status(retries={"infrastructure": 3})],
            ["infrastructure retries: 3 of 2"],
        ),
    ],
)
def test_steps_of_a_status_that_must_not_be(course: list[Json], wrong: list[str]) -> None:
    found = "\n".join(seen(*course))
    assert all(text in found for text in wrong), found
    assert bool(found) == bool(wrong), found


def test_what_may_have_happened_between_two_looks_is_not_held_against_anybody() -> None:
    skipped = [
        status(attempts=[attempt(1)]),
        status(attempts=[ended(1, "Lost"), ended(2, "Lost"), attempt(3)]),
    ]
    assert seen(*skipped)
    assert not seen(*skipped, events="LISTED")


def pod(name: str, number: int, uid: str) -> Json:
    token = {"serviceAccountToken": {"audience": naming.audience(uid)}}
    return {
        "metadata": {"name": name, "uid": name, "labels": naming.labels("j1", number)},
        "spec": {"volumes": [{"projected": {"sources": [token]}}]},
    }


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        (pod("one", 1, "u1"), pod("two", 1, "u1"), False),
        (pod("one", 1, "u1"), pod("two", 2, "u1"), True),
        (pod("one", 1, "u1"), pod("two", 1, "u2"), True),
    ],
)
def test_pods_of_two_attempts_or_of_two_jobs_of_one_name(first: Json, second: Json, wrong: bool) -> None:
    observer = Observer("here")
    observer.note_pod("ADDED", first)
    observer.note_pod("ADDED", second)
    assert bool(observer.wrong) == wrong
    observer.wrong.clear()
    observer.note_pod("DELETED", first)
    observer.note_pod("MODIFIED", second)
    assert not observer.wrong


@pytest.mark.parametrize(
    ("classes", "retries", "phase", "well", "charged"),
    [
        (["Lost", "Lost", "Lost"], {"infrastructure": 2}, "Failed", True, True),
        (["Lost", "Lost"], {"infrastructure": 1}, "Failed", False, True),
        (["Lost", "Lost", "Lost", "Lost"], {"infrastructure": 2}, "Failed", True, False),
        (["BadData"], {}, "Failed", True, True),
        (["Lost", "Succeeded"], {"infrastructure": 1}, "Succeeded", True, True),
        (["Lost", "Lost", "Succeeded"], {"infrastructure": 1}, "Succeeded", True, False),
        (["Succeeded"], {"infrastructure": 1}, "Succeeded", True, True),  # it was thought lost
        (["Succeeded"], {"infrastructure": 2}, "Succeeded", True, False),
        (["Preempted", "Succeeded"], {"preemption": 2}, "Succeeded", True, True),  # once it was held back
        (["DeadlineExceeded"], {}, "Failed", False, True),
    ],
)
def test_a_job_fails_exactly_when_a_budget_is_used_up(
    classes: list[str], retries: Json, phase: str, well: bool, charged: bool
) -> None:
    attempts = [ended(number, name) for number, name in enumerate(classes, 1)]
    told = {"phase": phase, "reason": classes[-1], "message": "", "attempts": attempts, "retries": retries}
    job = {"spec": {"retry": RETRY}, "status": told}
    assert checks.ended_well(job, excused=False) == well
    assert (checks.wrong_budgets(job) == []) == charged


def test_files_of_an_artifact_beside_its_manifest(tmp_path: Path) -> None:
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    manifest = json.dumps({"files": [{"path": weights.name, "sha256": digest}]})
    (tmp_path / "manifest.json").write_text(manifest)
    told = {"uri": f"file://{tmp_path}", "digest": "sha256:" + hashlib.sha256(manifest.encode()).hexdigest()}
    assert not checks.wrong_artifact({"artifact": told})
    weights.write_bytes(b"others")
    assert checks.wrong_artifact({"artifact": told}) == [f"{weights.name} is not what manifest.json says"]
