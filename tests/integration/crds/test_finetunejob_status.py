"""A stored FineTuneJob: what may still change, its status, and what kubectl shows and explains."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_operator.api import finetunejob
from finetune_operator.api.base import GROUP, VERSION
from tests.clients import Kubectl, KubectlError
from tests.integration.bad_jobs import GOOD, QLORA, good

pytestmark = pytest.mark.integration

NOW = "2026-01-01T00:00:00Z"


def started(number: int = 1) -> dict[str, Any]:
    return {
        "observedGeneration": 1,
        "phase": "Running",
        "reason": "Training",
        "progress": {"percent": 45, "summary": "45%", "step": 45, "totalSteps": 100, "eta": "3m20s"},
        "metrics": {"loss": 1.25},
        "attempts": [{"number": number, "rayJob": f"good-a{number}", "startTime": NOW}],
        "artifact": {
            "uri": "s3://bucket/good",
            "digest": "sha256:ab",
            "sizeBytes": 1,
            "baseModel": "hf://a/b",
        },
        "conditions": [
            {
                "type": "Complete",
                "status": "True",
                "reason": "Succeeded",
                "message": "done",
                "lastTransitionTime": NOW,
            }
        ],
    }


def patch(
    api: client.CustomObjectsApi, namespace: str, body: dict[str, Any], *, status: bool = False
) -> dict[str, Any]:
    call = api.patch_namespaced_custom_object_status if status else api.patch_namespaced_custom_object
    result: dict[str, Any] = call(GROUP, VERSION, namespace, finetunejob.PLURAL, "good", body)
    return result


def test_spec_may_change_before_the_first_attempt_and_not_after(
    api: client.CustomObjectsApi, namespace: str, create: Any
) -> None:
    create(GOOD, dry_run=False)
    patch(api, namespace, {"spec": {"hyperparameters": {"epochs": 5}}})
    patch(api, namespace, {"status": {"phase": "Pending", "attempts": []}}, status=True)
    changed = patch(api, namespace, {"spec": {"hyperparameters": {"epochs": 4}}})
    assert changed["spec"]["hyperparameters"]["epochs"] == 4
    patch(api, namespace, {"status": started()}, status=True)
    change: dict[str, Any]
    for change in (
        {"hyperparameters": {"epochs": 6}},
        {"method": {"lora": {}}},
        {"dataset": {"sources": []}},
        {"checkpoint": {"keep": 5}},
        {"model": {"uri": "hf://organization/other"}},
        {"earlyStopping": {}},
    ):
        with pytest.raises(client.ApiException) as caught:
            patch(api, namespace, {"spec": change})
        assert caught.value.status == 422
        if change != {"dataset": {"sources": []}}:  # for that the schema itself speaks first
            assert (
                "spec: Forbidden: the spec cannot be changed once the first attempt was started"
                in caught.value.body
            )
    status: dict[str, Any] | None
    for status in ({"phase": "Failed"}, {"attempts": []}, None):  # the rule looks at status first
        with pytest.raises(client.ApiException, match="the spec cannot be changed once"):
            patch(api, namespace, {"spec": {"hyperparameters": {"epochs": 6}}, "status": status})
    for change in (
        {"suspend": True},
        {"retry": {"maxInfraRetries": 9, "preemptions": 4}},
        {"deadlines": {"totalSeconds": 3600}},
        {"ttlSecondsAfterFinished": 60},
        {"suspend": False, "ttlSecondsAfterFinished": None, "deadlines": {"totalSeconds": None}},
    ):
        patch(api, namespace, {"spec": change})
    patch(api, namespace, {"metadata": {"labels": {"team": "a"}}})
    patch(api, namespace, {"spec": {"hyperparameters": {"epochs": 4}}})
    patch(api, namespace, {"status": started(2)}, status=True)


def test_status_is_a_subresource_of_its_own(
    api: client.CustomObjectsApi, namespace: str, create: Any
) -> None:
    created = create({**GOOD, "status": started()}, dry_run=False)
    assert created["status"] == {"observedGeneration": -1}
    answer = patch(api, namespace, {"status": started(), "spec": {"objective": "PPO"}}, status=True)
    assert answer["spec"]["objective"] == "SFT"
    assert answer["status"] == started()  # nothing pruned, no defaults that nobody wrote
    assert answer["metadata"]["generation"] == 1


def test_status_that_breaks_the_schema_is_refused(
    api: client.CustomObjectsApi, namespace: str, create: Any
) -> None:
    create(GOOD, dry_run=False)
    twice = [started()["conditions"][0]] * 2
    for status in ({"phase": "Sleeping"}, {"conditions": twice}, {"attempts": started()["attempts"] * 11}):
        with pytest.raises(client.ApiException) as caught:
            patch(api, namespace, {"status": status}, status=True)
        assert caught.value.status == 422


def test_kubectl_shows_columns_category_and_conditions(
    api: client.CustomObjectsApi, namespace: str, create: Any, kubectl: Kubectl
) -> None:
    create(GOOD, dry_run=False)
    patch(api, namespace, {"status": started()}, status=True)
    narrow = kubectl("get", "ftj").splitlines()
    assert narrow[0].split() == ["NAME", "PHASE", "METHOD", "MODEL", "PROGRESS", "LOSS", "AGE", "REASON"]
    assert narrow[1].split()[:6] == ["good", "Running", "LoRA", "hf://organization/model", "45%", "1.25"]
    wide = kubectl("get", "finetunejob", "-o", "wide").splitlines()
    assert wide[0].split()[7:] == ["STEP", "ETA", "REASON", "MESSAGE", "ARTIFACT"]
    assert wide[1].split()[7:] == ["45", "3m20s", "Training", "s3://bucket/good"]
    assert "good" in kubectl("get", "finetune")
    assert kubectl("get", "ftj", "--field-selector", "status.phase=Running", "-o", "name").split()
    assert not kubectl("get", "ftj", "--field-selector", "status.phase=Failed", "-o", "name").split()
    assert "condition met" in kubectl("wait", "--for=condition=Complete", "ftj/good", "--timeout=10s")


def test_explain_is_enough_to_write_a_job(kubectl: Kubectl, create: Any) -> None:
    top = kubectl("explain", "ftj")
    start = top.index("apiVersion: finetune.dev")
    example = top[top.rindex("\n", 0, start) + 1 : top.index("Follow it")]
    create(yaml.safe_load(example))
    hyper = kubectl("explain", "ftj.spec.hyperparameters")
    assert "2e-4 for LoRA and QLoRA" in " ".join(hyper.split())
    sources = " ".join(kubectl("explain", "ftj.spec.dataset.sources").split())
    assert '{"instruction": "...", "input": "...", "output": "..."}' in sources
    assert "-required-" in sources
    everything = kubectl("explain", "ftj", "--recursive")
    assert "targetModules" in everything
    assert "enum: LoRA, QLoRA, Full" in everything


def test_kubectl_apply_says_all_problems_at_once(kubectl: Kubectl) -> None:
    job = good(objective="PPO", method={"type": "QLoRA"}, resources={"cpu": 0})
    with pytest.raises(KubectlError) as caught:
        kubectl("apply", "-f", "-", body=job)
    for part in ("spec.objective", "spec.method.quantization", "spec.resources.cpu"):
        assert part in str(caught.value)


def test_applying_the_same_file_again_changes_nothing(kubectl: Kubectl) -> None:
    job = good(method=QLORA)
    assert "created" in kubectl("apply", "-f", "-", body=job)
    assert "unchanged" in kubectl("apply", "-f", "-", body=job)
    assert "serverside-applied" in kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", body=job)
    assert json.loads(kubectl("get", "ftj", "good", "-o", "json"))["metadata"]["generation"] == 1
