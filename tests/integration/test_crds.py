"""The CRD on a real API server: what is taken, what is refused and with which words, and what kubectl shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from finetune_local.cluster import Cluster
from finetune_operator.api import finetunejob
from finetune_operator.api.base import GROUP, VERSION
from tests.clients import Kubectl, KubectlError
from tests.integration.bad_jobs import BAD_JOBS, GOOD, QLORA, BadJob
from tests.patches import merged

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
NOW = "2026-01-01T00:00:00Z"
JOB = (GROUP, VERSION)


def good(**spec: Any) -> dict[str, Any]:
    result: dict[str, Any] = merged(GOOD, {"spec": spec})
    return copy.deepcopy(result)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server without the operator: here the tests are the ones who write statuses."""
    running = Cluster(tmp_path_factory.mktemp("api-server"), files=ROOT)
    try:
        running.up(("etcd", "kube-apiserver"))
        yield running
    finally:
        running.down()


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(config.new_client_from_config(str(cluster.kubeconfig)))


@pytest.fixture
def create(api: client.CustomObjectsApi, namespace: str) -> Any:
    def create_job(job: dict[str, Any], *, dry_run: bool = True) -> dict[str, Any]:
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        created: dict[str, Any] = api.create_namespaced_custom_object(
            *JOB, namespace, finetunejob.PLURAL, job, field_validation="Strict", **options
        )
        return created

    return create_job


@pytest.mark.parametrize("bad", BAD_JOBS, ids=[bad.name for bad in BAD_JOBS])
def test_bad_job_is_refused_with_words_that_help(create: Any, bad: BadJob) -> None:
    with pytest.raises(client.ApiException) as caught:
        create(merged(GOOD, bad.change))
    assert caught.value.status in (400, 422)
    message = json.loads(caught.value.body)["message"]
    for part in bad.expected:
        assert part in message, message


def test_least_job_gets_every_default(create: Any) -> None:
    spec = create(GOOD)["spec"]
    assert spec == {
        "objective": "SFT",
        "model": {"uri": "hf://organization/model"},
        "method": {"type": "LoRA"},
        "dataset": {
            "sources": [{"uri": "pvc://files/train.jsonl"}],
            "split": {"eval": 0.05, "seed": 42},
            "applyChatTemplate": "Auto",
        },
        "hyperparameters": {
            "epochs": 3,
            "globalBatchSize": 16,
            "maxLength": 1024,
            "packing": False,
            "warmupRatio": 0.03,
            "scheduler": "Cosine",
            "weightDecay": 0,
            "maxGradNorm": 1,
            "optimizer": "AdamW",
            "precision": "Auto",
            "gradientCheckpointing": False,
            "seed": 42,
        },
        "resources": {"cpu": "1", "memory": "4Gi", "gpusPerWorker": 0},
        "output": {},
    }


@pytest.mark.parametrize(
    ("spec", "path", "expected"),
    [
        ({"method": {}}, ["method"], {"type": "LoRA"}),
        (
            {"method": {"lora": {"r": 8}}},
            ["method", "lora"],
            {"r": 8, "alpha": 32, "dropout": 0.05, "targetModules": ["all-linear"]},
        ),
        ({"method": QLORA}, ["method", "quantization"], {"type": "nf4", "doubleQuant": True}),
        ({"earlyStopping": {}}, ["earlyStopping"], {"patience": 3, "minDelta": 0}),
        ({"resources": {"cpu": 2}}, ["resources"], {"cpu": 2, "memory": "4Gi", "gpusPerWorker": 0}),
        ({"dataset": {"split": {"eval": 0}}}, ["dataset", "split"], {"eval": 0, "seed": 42}),
    ],
)
def test_parts_get_their_defaults(create: Any, spec: dict[str, Any], path: list[str], expected: Any) -> None:
    found = create(good(**spec))["spec"]
    for key in path:
        found = found[key]
    assert found == expected


GOOD_SPECS: dict[str, dict[str, Any]] = {
    "qlora": {"method": QLORA},
    "qlora-same-types": {
        "method": {"type": "QLoRA", "quantization": {"computeDtype": "bfloat16"}},
        "hyperparameters": {"precision": "BFloat16"},
    },
    "full": {"method": {"type": "Full"}},
    "modules": {"method": {"lora": {"targetModules": ["q_proj", "model.layers.0.self_attn.v_proj"]}}},
    "hub-revision": {"model": {"revision": "refs/pr/1"}},
    "private-hub": {"model": {"secretRef": {"name": "hf-token"}}},
    "chatml": {"model": {"chatTemplate": "ChatML"}},
    "jinja": {"model": {"chatTemplate": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}},
    "model-s3": {"model": {"uri": "s3://Bucket.name/a/b c"}},
    "model-file": {"model": {"uri": "file:///models/..base"}},
    "data-everywhere": {
        "dataset": {
            "sources": [
                {"uri": "hf://datasets/organization/name/data/train.parquet"},
                {"uri": "https://host:8080/a/train.csv?version=2"},
                {"uri": "s3://bucket/a.json.gz"},
                {"uri": "gs://bucket/a.jsonl"},
                {"uri": "file:///a/Train.JSONL"},
            ]
        }
    },
    "columns": {
        "dataset": {
            "sources": [
                {
                    "uri": "pvc://files/a.csv",
                    "format": "PromptCompletion",
                    "columns": {"prompt": "question", "completion": "answer"},
                },
                {"uri": "pvc://files/b.csv", "columns": {"instruction": "task", "output": "text"}},
            ]
        }
    },
    "early-stopping": {"earlyStopping": {}, "hyperparameters": {"maxSteps": 10, "evalSteps": 10}},
    "no-evaluation": {"dataset": {"split": {"eval": 0}}},
    "micro-batch": {"hyperparameters": {"globalBatchSize": 12, "microBatchSize": 4}},
    "resources": {
        "resources": {
            "cpu": "500m",
            "memory": "1.5Gi",
            "gpusPerWorker": 1,
            "image": "host:5000/a/b@sha256:ab",
        }
    },
    "output": {"output": {"uri": "s3://bucket/jobs/1", "secretRef": {"name": "s3"}}},
}


@pytest.mark.parametrize("spec", GOOD_SPECS.values(), ids=GOOD_SPECS.keys())
def test_good_job_is_taken_and_read_back_by_the_models(create: Any, spec: dict[str, Any]) -> None:
    finetunejob.FineTuneJobSpec.model_validate(create(good(**spec))["spec"])


@pytest.mark.parametrize("name", ["a", "a" * 40, "a-1"])
def test_names_at_the_limits(create: Any, name: str) -> None:
    create(merged(GOOD, {"metadata": {"name": name}}))


def started(number: int = 1) -> dict[str, Any]:
    return {
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
    result: dict[str, Any] = call(*JOB, namespace, finetunejob.PLURAL, "good", body)
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
    ):
        with pytest.raises(client.ApiException) as caught:
            patch(api, namespace, {"spec": change})
        assert caught.value.status == 422
        if change != {"dataset": {"sources": []}}:  # for that the schema itself speaks first
            assert (
                "spec: Forbidden: the spec cannot be changed once the first attempt was started"
                in caught.value.body
            )
    patch(api, namespace, {"metadata": {"labels": {"team": "a"}}})
    patch(api, namespace, {"spec": {"hyperparameters": {"epochs": 4}}})
    patch(api, namespace, {"status": started(2)}, status=True)


def test_status_is_a_subresource_of_its_own(
    api: client.CustomObjectsApi, namespace: str, create: Any
) -> None:
    created = create({**GOOD, "status": started()}, dry_run=False)
    assert "status" not in created
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
    assert narrow[0].split() == ["NAME", "PHASE", "METHOD", "MODEL", "PROGRESS", "LOSS", "AGE"]
    assert narrow[1].split()[:6] == ["good", "Running", "LoRA", "hf://organization/model", "45%", "1.25"]
    wide = kubectl("get", "finetunejob", "-o", "wide").splitlines()
    assert wide[0].split()[7:] == ["STEP", "ETA", "REASON", "ARTIFACT"]
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
