"""The border between the API's JSON and the operator's facts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.finetunejob import FineTuneJobStatus, Phase
from finetune_operator.core.facts import Event
from finetune_operator.reconcile import deployment_facts, events, facts, pod_facts
from finetune_operator.reconcile.patches import merge_diff
from tests.unit.operator.stories import SPEC, START, Story

LEAVES = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
DOCUMENTS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.one_of(LEAVES, inner), max_size=3),
    max_leaves=8,
)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


@given(old=DOCUMENTS, new=DOCUMENTS)
def test_the_diff_is_a_merge_patch_from_old_to_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert merge_patch(old, merge_diff(old, new)) == new
    assert merge_diff(new, new) == {}


def test_a_status_survives_the_way_to_the_api_and_back() -> None:
    status = Story().trained().job.status
    stored = facts.to_json(status)
    assert FineTuneJobStatus.model_validate(stored) == status
    assert stored["startTime"] == "2026-01-01T12:00:00Z"
    assert "completionTime" not in stored


def test_a_status_of_a_newer_operator_can_still_be_read() -> None:
    assert FineTuneJobStatus.model_validate({"phase": "Running", "novelty": 1}).phase is Phase.RUNNING


def body(**parts: Any) -> dict[str, Any]:
    metadata = {"namespace": "team", "name": "triage", "uid": "u", "generation": 3}
    return {"kind": "FineTuneJob", "metadata": metadata, "spec": SPEC, **parts}


def test_a_spec_that_cannot_be_read_is_a_problem_with_the_fields_name() -> None:
    job = facts.job_facts(body(spec=SPEC | {"method": {"type": "Telepathy"}}))
    assert job.spec is None
    assert "spec.method.type" in (job.problem or "")
    assert facts.job_facts(body()).problem is None


def test_fields_of_a_newer_crd_hide_nothing_else_of_a_spec() -> None:
    job = facts.job_facts(
        body(spec=SPEC | {"novelty": 1, "retry": {"maxInfraRetries": 2, "novelty": "Auto"}})
    )
    assert job.spec is not None
    assert job.spec.retry.max_infra_retries == 2
    assert "spec.retry.novelty: this field is of a newer CRD" in (job.problem or "")


def test_a_status_with_a_newer_operators_words_is_named_and_no_fault_of_ours() -> None:
    """Who goes back to an older operator finds such ones; it must not act on what it half understands."""
    attempt = {
        "number": 0,
        "rayJob": "triage-a0",
        "startTime": "2026-01-01T12:00:00Z",
        "class": "Foreseen",
    }
    newer = {"status": {"phase": "Running", "attempts": [attempt]}}
    with pytest.raises(facts.UnreadableStatusError, match=r"status\.attempts\.0\.class: .*upgrade this one"):
        facts.job_facts(body(**newer))
    with pytest.raises(facts.UnreadableStatusError, match=r"status\.phase: "):
        deployment_facts.deployment_facts(body(spec={}, status={"phase": "Foreseen"}))


SUBJECT = events.Subject("FineTuneJob", "team", "triage", "u")


def test_an_event_fits_into_the_api_and_stays_text() -> None:
    event = events.build(SUBJECT, Event(warning=True, reason="BadData", message="é" * 2000), now=START)
    assert len(event["message"].encode()) <= 1024
    assert set(event["message"]) == {"é"}


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no cpu"}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"phase": "Pending", "conditions": [UNSCHEDULABLE]}, "Unschedulable"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}, "ErrImagePull"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
        ({"phase": "Running"}, None),
        ({}, None),
    ],
)
def test_why_a_pod_waits(status: dict[str, Any], reason: str | None) -> None:
    pod = pod_facts.pod_facts({"metadata": {"name": "head"}, "status": status})
    assert pod.waiting_reason == reason
    assert pod.running == (status.get("phase") == "Running")


def test_a_rayjob_is_ours_by_the_uid_of_its_owner_and_not_by_its_name() -> None:
    rayjob = {"metadata": {"name": "triage-a1", "uid": "r", "ownerReferences": [{"uid": "u"}]}}
    assert facts.rayjob_facts(rayjob, owner="triage", owner_uid="u").ours
    assert not facts.rayjob_facts(rayjob, owner="triage", owner_uid="another").ours


RAYJOB: dict[str, Any] = {
    "metadata": {
        "name": "triage-a1",
        "uid": "r",
        "creationTimestamp": "2026-01-01T12:00:00Z",
        "ownerReferences": [{"kind": "FineTuneJob", "name": "triage", "uid": "former"}],
    }
}


def test_a_rayjob_of_a_former_job_of_the_same_name_is_told_from_a_strangers() -> None:
    former = facts.rayjob_facts(RAYJOB, owner="triage", owner_uid="now")
    assert (former.ours, former.of_a_namesake) == (False, True)
    stranger = facts.rayjob_facts(RAYJOB, owner="other", owner_uid="now")
    assert (stranger.ours, stranger.of_a_namesake) == (False, False)
    assert facts.rayjob_facts(RAYJOB, owner="triage", owner_uid="former").ours


def test_a_rayjob_that_kuberay_has_never_looked_at_has_no_finalizer() -> None:
    found = facts.rayjob_facts(RAYJOB, owner="triage", owner_uid="former")
    assert (found.known_to_kuberay, found.managed_elsewhere, found.suspended) == (False, False, False)
    assert found.created == datetime(2026, 1, 1, 12, tzinfo=UTC)
    kept = RAYJOB | {"metadata": RAYJOB["metadata"] | {"finalizers": ["ray.io/rayjob-finalizer"]}}
    assert facts.rayjob_facts(kept, owner="triage", owner_uid="former").known_to_kuberay


def test_how_a_pod_ended_is_read_from_its_containers() -> None:
    killed = {"name": "ray-head", "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Running", "containerStatuses": [killed]}}
    assert pod_facts.pod_facts(pod).out_of_memory
    proxy = {"metadata": {"name": "p"}, "status": {"containerStatuses": [killed | {"name": "istio-proxy"}]}}
    assert not pod_facts.pod_facts(proxy).out_of_memory, "twice the memory for the trainer is no help to it"
    submitter = {"name": "ray-job-submitter", "state": {"terminated": {"exitCode": 65}}}
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Running", "containerStatuses": [submitter]}}
    assert pod_facts.pod_facts(pod).submitter_exit_code == 65
    crashing = {"name": "ray-head", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "5m0s"}}}
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Running", "containerStatuses": [crashing]}}
    assert pod_facts.pod_facts(pod).waiting_reason == "CrashLoopBackOff"


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        (None, "back-off 20s restarting failed container"),
        ({"reason": "OOMKilled", "exitCode": 137}, "OOMKilled, exit code 137"),
        (
            {"reason": "StartError", "exitCode": 128, "message": 'exec: "/bin/bash": no such file'},
            'StartError, exit code 128: exec: "/bin/bash": no such file',
        ),
    ],
)
def test_a_container_that_is_started_again_tells_how_it_ended(ended: Any, told: str) -> None:
    waits = {"reason": "CrashLoopBackOff", "message": "back-off 20s restarting failed container"}
    last = {} if ended is None else {"terminated": ended}
    container = {"name": "ray-head", "state": {"waiting": waits}, "lastState": last}
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Running", "containerStatuses": [container]}}
    assert pod_facts.pod_facts(pod).waiting_message == told
    assert pod_facts.pod_facts(pod).restarted == ("" if ended is None else told)


def test_the_actions_annotation_is_read() -> None:
    body = {
        "metadata": {
            "namespace": "n",
            "name": "j",
            "uid": "u",
            "annotations": {"finetune.dev/action": "cancel"},
        }
    }
    assert facts.job_facts(body).action == "cancel"
