"""Attempts on the laptop cluster: what ends one, what follows, what is lost. Real KubeRay, real Ray, real signals.

Every test runs under an observer that fails it when two attempts of a job ever had pods or processes at once, when a
budget was overdrawn, or when a status went back.
"""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local import parts
from finetune_local.cluster import Cluster
from tests import observers, trainers
from tests.clients import FINAL, Json, Kubectl, finetunejob
from tests.clusters import pid_of
from tests.observers import Observer

pytestmark = [pytest.mark.integration, pytest.mark.faults]

INTERVAL = 40  # steps between checkpoints
INVALID = (
    '{"spec": {"suspend": true, "shutdownAfterJobFinishes": false}}'  # for KubeRay, not for the API server
)
QUICK = {"backoffSeconds": {"min": 0, "max": 1}}


@pytest.fixture
def seen(cluster: Cluster, namespace: str) -> Iterator[Observer]:
    with observers.observe(cluster, namespace) as observer:
        yield observer


def job(name: str, model: Path, data: Path | str, *, steps: int = 100_000, **spec: Any) -> Json:
    """Trains for ever unless told otherwise, and saves every second or so."""
    hyperparameters = {"maxSteps": steps, "globalBatchSize": 8, "maxLength": 64, "learningRate": 0.001}
    defaults = {"checkpoint": {"everySteps": INTERVAL}, "retry": QUICK, "hyperparameters": hyperparameters}
    return finetunejob(name, model, data, **{**defaults, **spec})


def change(kubectl: Kubectl, name: str, **spec: Any) -> None:
    kubectl("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))


def training(attempt: int) -> Callable[[Json], bool]:
    """Whether this attempt trains, and has saved a checkpoint of its own."""

    def holds(status: Json) -> bool:
        last = status.get("attempts", [{}])[-1]
        saved = status.get("checkpoint", {}).get("step", 0)
        begun = last.get("resumedFromStep", 0)
        at_work = last.get("number") == attempt and status.get("phase") == "Running"
        assert status.get("phase") not in FINAL or at_work, json.dumps(status, indent=1)
        return at_work and saved > begun and last.get("lastStep", 0) > saved

    return holds


def ended(kubectl: Kubectl, name: str, number: int) -> Json:
    """The entry of an attempt in the history, as soon as the next one has said where it went on."""

    def told(status: Json) -> bool:
        last = status.get("attempts", [{}])[-1]
        return last.get("number", 0) > number and "resumedFromStep" in last

    status = kubectl.wait_job(name, told)["status"]
    entry: Json = next(attempt for attempt in status["attempts"] if attempt["number"] == number)
    following = next(attempt for attempt in status["attempts"] if attempt["number"] == number + 1)
    assert entry["lastStep"] - entry["lostSteps"] <= following["resumedFromStep"], (entry, following)
    assert 0 <= entry["lostSteps"] <= INTERVAL, entry
    assert following["resumedFromStep"] > 0, following
    return entry


def test_what_ends_a_process_and_how_the_job_goes_on(
    cluster: Cluster, kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path
) -> None:
    """kill -9; SIGTERM; SIGTERM while the operator is dead; a process that hangs; at last the user cancels."""
    kubectl.apply(job("tough", tiny_model, tiny_rows))
    kubectl.wait_job("tough", training(1))
    trainers.kill(seen.namespace, "tough")
    killed = ended(kubectl, "tough", 1)
    assert (killed["class"], killed["exitCode"]) == ("Lost", 137)
    assert killed["message"] == "the trainer was killed by SIGKILL"

    kubectl.wait_job("tough", training(2))
    trainers.send(seen.namespace, "tough", signal.SIGTERM)
    preempted = ended(kubectl, "tough", 2)
    assert (preempted["class"], preempted["exitCode"], preempted["lostSteps"]) == ("Preempted", 75, 0)

    kubectl.wait_job("tough", training(3))
    os.kill(pid_of(cluster, "operator"), signal.SIGKILL)
    trainers.send(seen.namespace, "tough", signal.SIGTERM)
    cluster.up(parts.TRAINING)
    unheard = ended(kubectl, "tough", 3)
    assert (unheard["class"], unheard["exitCode"]) == ("Preempted", 75)
    assert "stopped by SIGTERM after step" in unheard["message"]

    kubectl.wait_job("tough", training(4))
    trainers.send(seen.namespace, "tough", signal.SIGSTOP)
    change(kubectl, "tough", deadlines={"stallSeconds": 10})
    kubectl.wait_job("tough", lambda s: s["attempts"][-1].get("class") == "Stalled", seconds=180)
    change(kubectl, "tough", deadlines={"stallSeconds": 1800})
    assert ended(kubectl, "tough", 4)["class"] == "Stalled"

    status = kubectl.wait_job("tough", training(5))["status"]
    assert status["retries"] == {"user": 0, "infrastructure": 2, "preemption": 2}
    kubectl("annotate", "ftj", "tough", "finetune.dev/action=cancel")
    status = kubectl.finished("tough")
    assert (status["phase"], status["reason"]) == ("Cancelled", "Cancelled")
    assert [attempt["class"] for attempt in status["attempts"]] == [
        "Lost",
        "Preempted",
        "Preempted",
        "Stalled",
        "Cancelled",
    ]
    assert not trainers.find(seen.namespace, "tough")
    steps = [attempt["lastStep"] for attempt in status["attempts"]]
    assert steps == sorted(steps), "work was done again and again"


def test_what_happens_to_its_objects_and_how_the_job_goes_on(
    kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path
) -> None:
    """spec.suspend; RayJob suspended by a person; RayJob, RayCluster, head pod deleted; at last its time is up."""
    kubectl.apply(job("tossed", tiny_model, tiny_rows))
    kubectl.wait_job("tossed", training(1))
    label = "finetune.dev/job=tossed"
    assert len(kubectl.items("raycluster", "-l", label)) == 1, "KubeRay does not copy labels any more"
    change(kubectl, "tossed", suspend=True)
    status = kubectl.wait_job("tossed", lambda s: s["phase"] == "Suspended", seconds=180)["status"]
    assert not kubectl.items("pod", "-l", label)
    assert not kubectl.items("rayjob", "-l", label)
    saved = status["checkpoint"]["step"]
    assert (status["attempts"][0]["lastStep"], status["attempts"][0]["lostSteps"]) == (saved, 0)
    assert f"from the checkpoint of step {saved}" in status["message"]
    change(kubectl, "tossed", suspend=False)
    status = kubectl.wait_job("tossed", training(2))["status"]
    assert status["attempts"][1]["resumedFromStep"] == saved
    assert not any(status.get("retries", {}).values()), "a suspension costs no retry"
    assert "suspendedSeconds" in status

    kubectl("patch", "rayjob", "tossed-a2", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    status = kubectl.wait_job("tossed", lambda s: s["reason"] == "RayJobSuspended")["status"]
    kubectl("wait", "--for=delete", "pod", "-l", label, "--timeout=120s")
    assert kubectl.job("tossed")["status"]["phase"] == "Queued"
    kubectl("patch", "rayjob", "tossed-a2", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    status = kubectl.wait_job("tossed", training(2))["status"]
    held = status["attempts"][1]
    assert held["resumedFromStep"] > saved
    assert held.get("lostSteps", 0) <= INTERVAL
    assert status["retries"]["preemption"] == 1

    kubectl("delete", "rayjob", "tossed-a2", "--timeout=120s")
    deleted = ended(kubectl, "tossed", 2)
    assert deleted["class"] == "Lost"
    assert "RayJob tossed-a2 was deleted before it finished" in deleted["message"]

    kubectl.wait_job("tossed", training(3))
    kubectl("delete", "raycluster", "-l", label, "--timeout=120s")
    assert ended(kubectl, "tossed", 3)["class"] == "Preempted"

    kubectl.wait_job("tossed", training(4))
    evict(kubectl, label)
    assert ended(kubectl, "tossed", 4)["class"] == "Preempted"

    kubectl.wait_job("tossed", training(5))
    kubectl("patch", "rayjob", "tossed-a5", "--type=merge", "-p", INVALID)
    edited = ended(kubectl, "tossed", 5)
    assert edited["class"] == "Lost"
    assert "RayJob tossed-a5 was changed while it ran, and KubeRay refuses it now" in edited["message"]

    kubectl.wait_job("tossed", training(6))
    change(kubectl, "tossed", deadlines={"totalSeconds": 1})
    status = kubectl.finished("tossed")
    assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
    assert "spec.deadlines.totalSeconds (1) are over" in status["message"]


def test_a_killed_job_comes_to_its_end_and_time_to_live_removes_all_but_the_artifact(
    kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "artifact"
    kubectl.apply(
        job("hardy", tiny_model, tiny_rows, steps=120, output={"uri": f"file://{output}"},
            checkpoint={"everySteps": INTERVAL, "uri": f"file://{tmp_path}/saved"})
    )  # fmt: skip
    kubectl.wait_job("hardy", lambda s: s.get("checkpoint", {}).get("step", 0) >= INTERVAL)
    trainers.kill(seen.namespace, "hardy")
    status = kubectl.finished("hardy", seconds=400)
    assert status["phase"] == "Succeeded", status["message"]
    first, second = status["attempts"]
    assert (first["class"], second["class"]) == ("Lost", "Succeeded")
    assert first["lostSteps"] <= INTERVAL
    assert second["resumedFromStep"] >= INTERVAL
    assert status["progress"]["step"] == 120
    kubectl("delete", "rayjob", "hardy-a2", "--timeout=120s")
    change(kubectl, "hardy", ttlSecondsAfterFinished=2)
    kubectl("wait", "--for=delete", "ftj", "hardy", "--timeout=120s")
    for kind in ("rayjob", "raycluster", "pod"):
        kubectl("wait", "--for=delete", kind, "--all", "--timeout=120s")
    assert (output / "manifest.json").exists()
    assert not list((tmp_path / "saved").glob("checkpoint-*"))


def test_a_ray_job_that_is_stopped_in_the_dashboard_is_cancelled(
    cluster: Cluster, kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path
) -> None:
    kubectl.apply(job("halted", tiny_model, tiny_rows))
    kubectl.wait_job("halted", training(1))
    stop_in_dashboard(cluster, kubectl, "halted-a1")
    status = kubectl.finished("halted", seconds=180)
    assert (status["phase"], status["reason"]) == ("Cancelled", "Cancelled"), status["message"]
    assert "Ray job of halted-a1 was stopped" in status["message"]
    assert len(status["attempts"]) == 1


def test_jobs_that_cannot_start_say_why_and_end_as_they_must(
    kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Bad data, a model that is not there, no room, a suspended beginning: all at once, none trains."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 7}\n' * 20)
    huge = {"cpu": "1000", "memory": "1Gi"}
    kubectl.apply(job("bad-data", tiny_model, bad, retry={**QUICK, "maxInfraRetries": 5}))
    kubectl.apply(job("no-model", tmp_path / "none", tiny_rows, retry={**QUICK, "maxUserRetries": 1}))
    kubectl.apply(job("no-room", tiny_model, tiny_rows, resources=huge, deadlines={"startSeconds": 5}))
    kubectl.apply(job("too-late", tiny_model, tiny_rows, resources=huge, deadlines={"totalSeconds": 5}))
    kubectl.apply(job("refused", tiny_model, tiny_rows, resources=huge))
    kubectl.apply(job("held", tiny_model, tiny_rows, suspend=True, resources=huge))

    assert kubectl.wait_job("held", lambda s: s.get("phase") == "Suspended", seconds=60)
    assert not kubectl.job("held")["status"].get("attempts")
    change(kubectl, "held", suspend=False)
    kubectl.wait_job("held", lambda s: s["reason"] == "Unschedulable", seconds=120)
    change(kubectl, "held", suspend=True)
    kubectl.wait_job("held", lambda s: s["phase"] == "Suspended", seconds=120)
    kubectl("annotate", "ftj", "held", "finetune.dev/action=cancel")
    assert kubectl.finished("held", seconds=120)["phase"] == "Cancelled"

    kubectl("patch", "rayjob", "refused-a1", "--type=merge", "-p", INVALID)
    status = kubectl.finished("refused", seconds=180)
    assert (status["phase"], status["reason"], len(status["attempts"])) == ("Failed", "BadConfig", 1)
    assert "KubeRay refuses RayJob refused-a1" in status["message"]

    for name, field in (("no-room", "startSeconds"), ("too-late", "totalSeconds")):
        status = kubectl.finished(name, seconds=180)
        assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
        assert f"spec.deadlines.{field} (5) are over" in status["message"]

    status = kubectl.finished("bad-data")
    assert (status["phase"], status["reason"], len(status["attempts"])) == ("Failed", "BadData", 1)
    assert "bad.jsonl" in status["message"]
    assert status["attempts"][0]["exitCode"] == 65

    status = kubectl.finished("no-model")
    assert (status["phase"], status["reason"], len(status["attempts"])) == ("Failed", "ModelNotFound", 2)
    assert "all retries are used (spec.retry.maxUserRetries is 1)" in status["message"]
    assert status["retries"]["user"] == 1
    assert "\n" not in status["message"]
    for name in ("no-room", "too-late", "held", "refused"):
        kubectl("wait", "--for=delete", "pod", "-l", f"finetune.dev/job={name}", "--timeout=120s")


def test_a_chain_waits_for_its_model_and_fails_with_it(
    kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    def follower(name: str, upstream: str) -> Json:
        body = job(name, tiny_model, tiny_rows, steps=6)
        body["spec"]["model"] = {"fineTuneJobRef": {"name": upstream}}
        return body

    kubectl.apply(follower("second", "first"))
    assert "there is no FineTuneJob first" in waits(kubectl, "second", "FineTuneJobNotFound")["message"]
    kubectl.apply(job("first", tiny_model, tiny_rows, steps=20, method={"type": "Full"}))
    waits(kubectl, "second", "WaitingForModel")
    kubectl.apply(follower("third", "broken"))
    kubectl.apply(follower("fourth", "third"))
    kubectl.apply(job("broken", tmp_path / "none", tiny_rows))

    status = kubectl.finished("broken")
    assert status["reason"] == "ModelNotFound"
    third, fourth = kubectl.finished("third", seconds=20), kubectl.finished("fourth", seconds=20)
    assert (third["reason"], fourth["reason"]) == ("UpstreamFailed", "UpstreamFailed")
    assert "FineTuneJob broken ended Failed (ModelNotFound)" in third["message"]
    assert "FineTuneJob third ended Failed (UpstreamFailed)" in fourth["message"]
    assert not third.get("attempts")

    first = kubectl.finished("first")
    assert first["phase"] == "Succeeded", first["message"]
    started = kubectl.wait_job("second", lambda s: bool(s.get("attempts")), seconds=20)["status"]
    assert started["effective"]["modelUri"] == first["artifact"]["uri"]
    second = kubectl.finished("second")
    assert second["phase"] == "Succeeded", second["message"]
    assert second["artifact"]["baseModel"] == first["artifact"]["uri"]


def test_a_quota_is_named_and_waited_for(
    kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path
) -> None:
    kubectl("create", "quota", "small", "--hard=pods=0")
    kubectl.apply(job("poor", tiny_model, tiny_rows))
    status = kubectl.wait_job("poor", lambda s: s.get("reason") == "QuotaExceeded", seconds=120)["status"]
    assert "exceeded quota: small" in status["message"]
    assert status["phase"] == "Provisioning"
    kubectl("delete", "quota", "small")
    kubectl.wait_job("poor", lambda s: s.get("phase") in ("Validating", "Running"), seconds=180)
    kubectl("annotate", "ftj", "poor", "finetune.dev/action=cancel")
    assert kubectl.finished("poor", seconds=180)["phase"] == "Cancelled"


def test_kuberay_is_away_when_it_is_needed(
    cluster: Cluster, kubectl: Kubectl, seen: Observer, tiny_model: Path, tiny_rows: Path
) -> None:
    """A RayJob is deleted and cannot go; a job is applied and nobody looks at it; both go on when KubeRay is back."""
    kubectl.apply(job("stuck", tiny_model, tiny_rows))
    kubectl.wait_job("stuck", training(1))
    os.kill(pid_of(cluster, "kuberay"), signal.SIGKILL)
    kubectl("delete", "rayjob", "stuck-a1", "--wait=false")
    kubectl.apply(job("unseen", tiny_model, tiny_rows, resources={"cpu": "1000", "memory": "1Gi"}))
    status = kubectl.wait_job("unseen", lambda s: s.get("reason") == "KubeRayUnavailable", seconds=120)[
        "status"
    ]
    assert "KubeRay does not look at RayJob unseen-a1" in status["message"]
    assert kubectl.job("stuck")["status"]["attempts"][-1]["number"] == 1, "its trainer still runs"
    cluster.up(parts.TRAINING)
    assert ended(kubectl, "stuck", 1)["class"] == "Lost"
    kubectl.wait_job("unseen", lambda s: s.get("reason") == "Unschedulable", seconds=120)
    for name in ("stuck", "unseen"):
        kubectl("annotate", "ftj", name, "finetune.dev/action=cancel")
    for name in ("stuck", "unseen"):
        assert kubectl.finished(name, seconds=180)["phase"] == "Cancelled"


def evict(kubectl: Kubectl, label: str) -> None:
    """As a drained node does: the pod gets the condition DisruptionTarget and is deleted with its grace."""
    (pod,) = kubectl.items("pod", "-l", label)
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": namespace},
    }
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
    kubectl("create", f"--raw={path}", "-f", "-", body=body)


def waits(kubectl: Kubectl, name: str, reason: str) -> Json:
    status: Json = kubectl.wait_job(name, lambda s: s.get("reason") == reason, seconds=20)["status"]
    assert (status["phase"], status.get("attempts", [])) == ("Pending", [])
    return status


def stop_in_dashboard(cluster: Cluster, kubectl: Kubectl, rayjob: str) -> None:
    """What the button Stop does: the local Ray has the job under a name that ends with KubeRay's."""
    body = kubectl.get("rayjob", rayjob)
    assert body is not None
    dashboard = f"http://127.0.0.1:{cluster.ports['ray-dashboard']}/api/jobs/"
    with urllib.request.urlopen(dashboard, timeout=30) as answer:
        known = [item["submission_id"] for item in json.loads(answer.read()) if item["submission_id"]]
    (name,) = [name for name in known if body["status"]["jobId"] in name]
    request = urllib.request.Request(f"{dashboard}{name}/stop", method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
