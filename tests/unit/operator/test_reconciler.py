"""One pass after another over an API server that refuses, loses answers, and tells late or never."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.adapters.api_errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    UnavailableError,
)
from finetune_operator.core.reports import Report
from tests.unit.operator.memory_api import KEY, Fault, Stage, waiting
from tests.unit.operator.stories import ARTIFACT, result, training


def failing(method: str, plural: str, error: Callable[[str], Exception]) -> Fault:
    def fault(asked: str, path: str) -> Exception | None:
        return error(f"{asked} {path}") if asked == method and f"/{plural}" in path else None

    return fault


def stores_rayjobs(stage: Stage, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """The API server stores RayJobs otherwise than they were sent."""
    put = stage.api.put

    def changing(body: Mapping[str, Any], *, told: bool = True) -> dict[str, Any]:
        return put(change(body) if body["kind"] == "RayJob" else body, told=told)

    stage.api.put = changing  # type: ignore[method-assign]


async def running(**spec: Any) -> Stage:
    """A job whose trainer is at step 5."""
    stage = Stage(**spec)
    await stage.passes(3)
    stage.kuberay("Running", "RUNNING")
    stage.report(training(step=5))
    await stage.passes()
    assert stage.status["phase"] == "Running"
    return stage


async def succeeded(**spec: Any) -> Stage:
    stage = await running(**spec)
    stage.report(result("Succeeded", 0, "done", step=10, artifact=ARTIFACT))
    await stage.passes()
    assert stage.status["phase"] == "Succeeded"
    return stage


@pytest.mark.parametrize("error", [ForbiddenError, InvalidError, UnavailableError])
@pytest.mark.parametrize(
    ("spec", "plural"), [({"ttlSecondsAfterFinished": 5}, "finetunejobs"), ({}, "rayjobs")]
)
async def test_what_is_final_stays_so_when_a_deletion_is_refused(
    error: Callable[[str], Exception], spec: dict[str, Any], plural: str
) -> None:
    """An API server that has just started answers 403 until it knows its roles; a policy may refuse with 422."""
    stage = await succeeded(**spec)
    before = stage.status
    stage.api.time = stage.api.time.replace(minute=30)
    stage.api.before = failing("DELETE", plural, error)
    await stage.passes(5)
    assert any(line.startswith("DELETE") for line in stage.api.requests), "it was never tried"
    assert stage.status == before
    stage.api.before = lambda method, path: None
    await stage.passes(2)
    assert stage.api.named(plural) == [], "it is tried again"


async def test_a_refused_deletion_of_an_attempt_is_told_and_repeated() -> None:
    stage = await running()
    stage.kuberay("Running", "FAILED")
    stage.report(result("Internal", 1, "fault", step=5))
    stage.api.before = failing("DELETE", "rayjobs", ForbiddenError)
    stage.api.put(stage.job | {"spec": stage.job["spec"] | {"suspend": True}})
    await stage.passes(20, after=5)
    attempt = stage.status["attempts"][-1]
    assert (attempt["class"], stage.status["phase"]) == ("Internal", "Retrying")
    assert stage.status["message"].count("the API server refuses: DELETE") == 1
    stage.api.before = lambda method, path: None
    await stage.passes(3)
    assert stage.status["phase"] == "Suspended"
    assert stage.api.named("rayjobs") == []


@pytest.mark.parametrize(
    ("field", "left", "told"),
    [
        ("ownerReferences", [], "metadata.ownerReferences"),
        (
            "labels",
            {"app.kubernetes.io/managed-by": "finetune-operator"},
            "metadata.labels[finetune.dev/job]",
        ),
    ],
)
async def test_what_a_policy_takes_from_a_rayjob_is_named_and_nothing_is_left_to_run(
    field: str, left: object, told: str
) -> None:
    stage = Stage()
    stores_rayjobs(stage, lambda body: {**body, "metadata": body["metadata"] | {field: left}})
    await stage.passes(4)
    assert (stage.status["phase"], stage.status["reason"]) == ("Failed", "BadConfig")
    assert f"RayJob triage-a1 was stored without {told}, " in stage.status["message"]
    assert stage.status["message"].endswith("mutatingadmissionpolicies), and create the job again")
    assert stage.api.named("rayjobs") == []


async def test_a_crd_without_what_makes_a_rayjob_run_once_is_named() -> None:
    """As KubeRay's of before 1.2 are, which Helm leaves in place when KubeRay itself is upgraded."""
    known = ("entrypoint", "submissionMode", "rayClusterSpec")
    stage = Stage()
    stores_rayjobs(stage, lambda body: {**body, "spec": {name: body["spec"][name] for name in known}})
    await stage.passes(4)
    assert (stage.status["phase"], stage.status["reason"]) == ("Failed", "BadConfig")
    assert "does not have spec.backoffLimit, spec.submitterConfig: apply the CRDs" in stage.status["message"]
    assert stage.api.named("rayjobs") == []


UNSUBMITTED = {
    "QuotaExceeded": {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "triage-a1.1"},
        "type": "Warning",
        "message": 'Error creating: pods "triage-a1-x" is forbidden: exceeded quota: tight',
    },
    "Unschedulable": {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "triage-a1-x", "labels": {"batch.kubernetes.io/job-name": "triage-a1"}},
        "status": {
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no cpu"}
            ]
        },
    },
}


@pytest.mark.parametrize("reason", UNSUBMITTED)
async def test_what_keeps_a_job_from_being_submitted_is_told_while_its_cluster_idles(reason: str) -> None:
    stage = Stage()
    await stage.passes(3)
    stage.kuberay("Running")
    stage.api.put(UNSUBMITTED[reason])
    await stage.passes()
    assert stage.status["reason"] == "Submitting", "it takes KubeRay some seconds"
    stage.api.time += timedelta(seconds=31)
    await stage.passes()
    assert (stage.status["phase"], stage.status["reason"]) == ("Provisioning", reason)
    assert {"QuotaExceeded": "exceeded quota: tight", "Unschedulable": "triage-a1-x"}[reason] in stage.status[
        "message"
    ]


async def test_a_right_to_read_pods_that_is_missing_is_told() -> None:
    """The watch is forbidden as well, and so tells of none."""
    stage = Stage()
    await stage.passes(3)
    stage.kuberay("Initializing")
    stage.api.time = stage.api.time.replace(minute=stage.api.time.minute + 1)
    stage.api.before = failing("GET", "pods", ForbiddenError)
    for _ in range(3):
        with pytest.raises(ForbiddenError):
            await stage.reconcile(KEY)
    assert stage.status["phase"] == "Provisioning"
    assert stage.status["message"].count("the API server refuses: GET /api/v1/namespaces/team/pods") == 1
    stage.api.before = lambda method, path: None
    await stage.passes()
    assert "refuses" not in stage.status["message"]


async def test_a_right_that_is_missing_from_the_beginning_is_told() -> None:
    stage = Stage(model={"fineTuneJobRef": {"name": "base"}})
    stage.api.before = lambda method, path: ForbiddenError(path) if path.endswith("/base") else None
    with pytest.raises(ForbiddenError):
        await stage.reconcile(KEY)
    assert (stage.status["phase"], stage.status["reason"]) == ("Pending", "Forbidden")
    assert stage.status["message"].endswith("/finetunejobs/base")
    stage.api.before = lambda method, path: None
    await stage.passes()
    assert stage.status["reason"] == "FineTuneJobNotFound"


async def test_a_report_that_cannot_be_stored_is_dropped_and_the_job_goes_on() -> None:
    stage = await running()
    stage.report(training(step=6))
    stage.api.before = failing("PATCH", "finetunejobs", InvalidError)
    await stage.passes()
    stage.api.before = lambda method, path: None
    stage.api.put(
        stage.job | {"metadata": stage.job["metadata"] | {"annotations": {"finetune.dev/action": "cancel"}}}
    )
    await stage.passes(4)
    assert stage.status["phase"] == "Cancelled"


@pytest.mark.parametrize(
    "told",
    [
        {"finetune": {"effective": {"trainRows": 10**25}}},
        {"finetune": {"effective": {"microBatchSize": -1}}},
        {"finetune": {"effective": {"learningRate": "NaN"}}},
        {"finetune": {"step": 2**60}},
        {
            "finetune": {
                "result": {"class": "Succeeded", "exitCode": 0, "artifact": ARTIFACT | {"sizeBytes": 10**20}}
            }
        },
    ],
)
def test_numbers_that_no_status_can_hold_are_refused(told: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="finetune"):
        Report.model_validate(told)


def test_a_foreign_trainers_step_is_bounded() -> None:
    metrics = [{"name": "current_step", "value": "1e300"}, {"name": "total_steps", "value": "-5"}]
    report = Report.model_validate({"trainerStatus": {"metrics": metrics}})
    assert (report.count("current_step"), report.count("total_steps")) == (2**53, 0)


async def test_a_job_of_the_same_name_waits_for_the_pods_of_the_former_one() -> None:
    """Deleted and applied again with the image corrected: the old pod is still there, and still says that it is bad."""
    stage = await running()
    stage.pod("triage-a1-old", **waiting("InvalidImageName"))
    for plural, name in (("rayjobs", "triage-a1"), ("configmaps", "triage-a1"), ("finetunejobs", "triage")):
        stage.api.remove(plural, name)
    await stage.passes()
    stage.apply(uid="another")
    await stage.passes(4)
    assert stage.api.named("rayjobs") == []
    assert (stage.status["phase"], stage.status["reason"]) == ("Provisioning", "NameTaken")
    assert "pod triage-a1-old" in stage.status["message"]
    stage.api.remove("pods", "triage-a1-old")
    await stage.passes(2)
    assert stage.api.named("rayjobs") == ["triage-a1"]
    stage.pod("triage-a1-old", **waiting("InvalidImageName"))
    stage.api.objects["pods", "triage-a1-old"]["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    stage.api.put(stage.api.objects["pods", "triage-a1-old"])
    await stage.passes(2)
    assert len(stage.status["attempts"]) == 1, "a pod from before the RayJob is not its own"
    assert stage.status["phase"] == "Provisioning"


async def test_what_has_ended_of_an_attempt_says_nothing_about_the_next_one() -> None:
    """SidecarMode: the submitter's exit code is in the pod, and the pod is there until its RayCluster is gone."""
    stage = Stage(retry={"maxInfraRetries": 5, "backoffSeconds": {"min": 0, "max": 0}})
    await stage.passes(2)
    submitter = {"name": "ray-job-submitter", "state": {"terminated": {"exitCode": 127}}}
    stage.kuberay("Initializing")
    stage.pod("triage-a1-head", phase="Failed", containerStatuses=[submitter])
    await stage.passes(8)
    first, second = stage.status["attempts"]
    assert first["exitCode"] == 127
    assert "endTime" not in second, second["message"]
    assert stage.status["phase"] == "Provisioning"


async def test_a_pod_whose_end_no_watch_told_holds_nobody_up_and_fails_nobody() -> None:
    stage = Stage()
    await stage.passes(3)
    stage.kuberay("Initializing")
    stage.pod("triage-a1-head", **waiting("InvalidImageName"))
    stage.api.remove("pods", "triage-a1-head", told=False)
    await stage.passes(2)
    assert stage.status["phase"] == "Provisioning"
    assert stage.api.sightings.pods(KEY[0], {"finetune.dev/job": KEY[1]}) == []


async def test_a_creation_whose_answer_was_lost_is_found_whatever_the_user_does_next() -> None:
    """The RayJob exists, no watch has told, and the user suspends the job."""
    stage = Stage()
    await stage.passes()
    stage.api.after = failing("POST", "rayjobs", UnavailableError)
    await stage.passes()
    assert stage.status["reason"] == "RayJobNotCreated"
    stage.api.after = lambda method, path: None
    stage.api.put(stage.job | {"spec": stage.job["spec"] | {"suspend": True}})
    await stage.passes(4)
    assert stage.api.named("rayjobs") == []
    assert stage.status["phase"] == "Suspended"
    stage.api.put(stage.job | {"spec": stage.job["spec"] | {"suspend": False}})
    await stage.passes(4)
    assert stage.api.named("rayjobs") == ["triage-a2"]


async def test_a_new_operator_that_has_heard_of_no_rayjob_yet_does_not_end_an_attempt_over_it() -> None:
    stage = Stage()
    await stage.passes()
    stage.api.put({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {
        "name": "triage-a1", "ownerReferences": [{"kind": "FineTuneJob", "name": "triage", "uid": "0123abcd-1111"}],
    }}, told=False)  # fmt: skip
    stage.api.put(
        stage.job | {"metadata": stage.job["metadata"] | {"annotations": {"finetune.dev/action": "cancel"}}}
    )
    await stage.passes(4)
    assert stage.status["phase"] == "Cancelled"
    assert stage.api.named("rayjobs") == []


async def test_a_configmap_of_somebody_else_is_not_taken_over() -> None:
    stage = Stage()
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "triage-a1"},
        "data": {"mine": "1"},
    }
    stage.api.put(theirs)
    await stage.passes(4)
    assert (stage.status["phase"], stage.status["reason"]) == ("Failed", "BadConfig")
    assert "ConfigMap triage-a1 exists and belongs to someone else" in stage.status["message"]
    kept = stage.api.objects["configmaps", "triage-a1"]
    assert kept["data"] == {"mine": "1"}
    assert "ownerReferences" not in kept["metadata"]


async def test_an_inspection_begins_once_somebody_elses_rayjob_of_its_name_is_gone() -> None:
    stage = await running()
    stage.api.put(
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "triage-i1"}}, told=False
    )
    stage.kuberay("Complete", "SUCCEEDED")
    await stage.passes(3, after=10)
    assert (stage.status["phase"], stage.status["reason"]) == ("Evaluating", "NameTaken")
    stage.api.remove("rayjobs", "triage-i1", told=False)
    await stage.passes(after=10)
    assert stage.status["reason"] == "Inspecting"
    owner = stage.api.objects["rayjobs", "triage-i1"]["metadata"]["ownerReferences"][0]
    assert owner["name"] == "triage"


async def test_a_rayjob_whose_owner_somebody_took_away_is_still_the_attempts_own() -> None:
    stage = await running()
    del stage.api.objects["rayjobs", "triage-a1"]["metadata"]["ownerReferences"]
    stage.kuberay("Running", "RUNNING")
    stage.report(training(step=6))
    await stage.passes()
    assert (stage.status["phase"], stage.status["progress"]["step"]) == ("Running", 6)
    stage.api.put(stage.job | {"spec": stage.job["spec"] | {"suspend": True}})
    await stage.passes(4)
    assert stage.status["phase"] == "Suspended"
    assert stage.api.named("rayjobs") == [], "it does not train on unheeded"


async def test_pods_that_a_policy_gives_another_manager_are_waited_for() -> None:
    stage = await running()
    stage.pod("triage-a1-head", told=False, manager="platform-team")
    stage.kuberay("Failed", "RUNNING", reason="AppFailed", message="head pod is gone")
    await stage.passes(4)
    assert "waits until pod triage-a1-head is gone" in stage.status["message"]
    assert stage.api.named("rayjobs") == ["triage-a1"]


async def test_a_rayjob_that_a_policy_gives_another_manager_trains() -> None:
    stage = Stage()
    label = {"app.kubernetes.io/managed-by": "platform-team"}

    def relabelled(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**body, "metadata": body["metadata"] | {"labels": body["metadata"]["labels"] | label}}

    stores_rayjobs(stage, relabelled)
    await stage.passes(4)
    assert (stage.status["phase"], stage.api.named("rayjobs")) == ("Provisioning", ["triage-a1"])


@pytest.mark.parametrize(("finalizer", "left"), [("acme.io/backup", []), ("orphan", ["triage-a1"])])
async def test_a_deleted_job_that_a_finalizer_holds_trains_no_further(
    finalizer: str, left: list[str]
) -> None:
    stage = await running()
    before = stage.status
    deleted = {"deletionTimestamp": "2026-01-01T12:00:10Z", "finalizers": [finalizer]}
    stage.api.put(stage.job | {"metadata": stage.job["metadata"] | deleted})
    await stage.passes(3)
    assert stage.api.named("rayjobs") == left
    assert stage.status == before


async def test_a_copy_in_the_place_of_a_rayjob_counts_as_its_deletion() -> None:
    """kubectl replace --force: the pods of the one that ran may still write while the copy starts its own."""
    stage = await running()
    copy = stage.api.objects["rayjobs", "triage-a1"]
    stage.api.put({**copy, "metadata": copy["metadata"] | {"uid": "copy"}, "status": {}})
    stage.pod("triage-a1-head")
    await stage.passes(4)
    attempt = stage.status["attempts"][-1]
    assert (attempt["class"], attempt["message"]) == (
        "Lost",
        "RayJob triage-a1 was deleted before it finished",
    )
    assert stage.api.named("rayjobs") == []
    assert "waits until pod triage-a1-head is gone" in stage.status["message"]
    stage.api.remove("pods", "triage-a1-head")
    await stage.passes(4, after=10)
    assert stage.api.named("rayjobs") == ["triage-a2"]


async def test_a_status_field_that_the_crd_lacks_makes_no_pass_follow_at_once() -> None:
    """An older CRD (crds.install=false): the API server leaves the field out and says 200."""
    stage = Stage(suspend=True)
    stage.api.pruned = frozenset({"observedGeneration"})
    await stage.passes(2)
    assert stage.status["phase"] == "Suspended"
    assert await stage.reconcile(KEY) is None


async def test_a_message_of_any_length_ends_a_job() -> None:
    stage = Stage()
    await stage.passes(3)
    stage.kuberay("ValidationFailed", message="no " * 20_000)
    await stage.passes(4)
    assert (stage.status["phase"], stage.status["reason"]) == ("Failed", "BadConfig")
    assert all(len(one["message"]) <= 4000 for one in stage.status["conditions"])


@pytest.mark.parametrize("error", [ForbiddenError, InvalidError, UnavailableError])
async def test_a_webhook_that_refuses_at_length_is_told(error: Callable[[str], Exception]) -> None:
    stage = Stage()
    await stage.passes()
    stage.api.before = failing("POST", "rayjobs", lambda path: error("denied " * 20_000))
    await stage.passes(4)
    assert stage.status["message"].startswith("denied"), stage.status
    assert len(stage.status["message"]) <= 4096


async def test_a_policy_that_refuses_rayjobs_is_not_told_as_a_fault_of_the_spec_alone() -> None:
    stage = Stage()
    await stage.passes()
    told = (
        'POST /apis/ray.io/v1/namespaces/team/rayjobs: rayjobs.ray.io "triage-a1" is forbidden: '
        "ValidatingAdmissionPolicy 'costs' with binding 'costs' denied request: every RayJob needs a label"
    )
    stage.api.before = failing("POST", "rayjobs", lambda path: InvalidError(told))
    await stage.passes(4)
    assert (stage.status["phase"], stage.status["reason"]) == ("Failed", "BadConfig")
    assert stage.status["message"] == (
        "RayJob triage-a1 cannot be created: ValidatingAdmissionPolicy 'costs' with binding 'costs' denied request: "
        "every RayJob needs a label; do what the policy asks for, in the spec or in the platform's pod defaults, or "
        "have such objects exempted, and create the job again"
    )


async def test_an_upstream_of_which_old_news_are_kept_is_looked_up_before_the_job_fails() -> None:
    stage = Stage(model={"fineTuneJobRef": {"name": "base"}})
    upstream = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "base"}}
    stage.api.put({**upstream, "spec": {}, "status": {"phase": "Failed", "reason": "Lost"}})
    stage.api.put({**upstream, "spec": {}, "status": {"phase": "Running"}}, told=False)  # made anew
    await stage.passes(2)
    assert stage.status["phase"] == "Pending"


async def test_a_webhook_that_is_away_is_told() -> None:
    stage = Stage()
    await stage.passes()
    webhook = 'failed calling webhook "pods.acme.io"'
    stage.api.before = failing("POST", "rayjobs", lambda path: UnavailableError(f"{path}: {webhook}"))
    await stage.passes(2)
    assert (stage.status["phase"], stage.status["reason"]) == ("Provisioning", "RayJobNotCreated")
    assert webhook in stage.status["message"]
    stage.api.before = lambda method, path: None
    await stage.passes()
    assert stage.api.named("rayjobs") == ["triage-a1"]


async def test_a_pod_that_the_cluster_took_away_is_remembered_when_it_is_gone() -> None:
    """KubeRay tells of the end when the pod has been deleted: an abrupt loss of a node is a preemption all the same."""
    stage = await running()
    disrupted = [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]
    stage.pod("triage-a1-head", conditions=disrupted)
    stage.api.remove("pods", "triage-a1-head")
    stage.api.time = stage.api.time.replace(minute=10)
    stage.kuberay("Failed", "RUNNING", reason="AppFailed", message="head pod is gone")
    await stage.passes()
    attempt = stage.status["attempts"][-1]
    assert attempt["class"] == "Preempted"
    assert "DeletionByTaintManager" in attempt["message"]


async def test_the_latest_report_of_a_job_is_forgotten_with_its_end() -> None:
    stage = await succeeded()
    assert stage.mailbox.latest(KEY, uid="0123abcd-1111", attempt=1) == (None, None)


async def test_a_rayjob_that_became_invalid_while_it_ran_is_taken_down_after_the_end() -> None:
    stage = await running()
    stage.kuberay("ValidationFailed", "RUNNING")
    stage.report(result("Succeeded", 0, "done", step=10, artifact=ARTIFACT))
    await stage.passes()
    assert stage.status["phase"] == "Succeeded"
    stage.api.time = stage.api.time.replace(minute=59)
    await stage.passes(2)
    assert stage.api.named("rayjobs") == []


async def test_a_run_file_that_somebody_deleted_is_written_again() -> None:
    stage = Stage()
    await stage.passes(2)
    stage.api.remove("configmaps", "triage-a1")
    stage.kuberay("Initializing")
    missing = {"reason": "CreateContainerConfigError", "message": 'configmap "triage-a1" not found'}
    stage.pod(
        "triage-a1-head",
        phase="Pending",
        containerStatuses=[{"name": "ray-head", "state": {"waiting": missing}}],
    )
    await stage.passes()
    assert stage.status["reason"] == "ConfigMapMissing"
    assert stage.api.named("configmaps") == ["triage-a1"]


async def test_names_that_are_never_looked_up_again_are_not_kept() -> None:
    """A refused Event or ConfigMap would stay in memory for ever: only what the watches tell of is ever asked after."""
    stage = Stage()
    stage.api.before = failing("POST", "", ConflictError)
    kinds = (("v1", "Event"), ("v1", "ConfigMap"), ("ray.io/v1", "RayJob"))
    for version, kind in kinds:
        body = {"apiVersion": version, "kind": kind, "metadata": {"namespace": KEY[0], "name": "a1"}}
        with pytest.raises(ConflictError):
            await stage.api.create(body)
    assert stage.api._unsure == {("ray.io/v1", "RayJob", KEY[0], "a1")}
