"""The objects of an attempt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec, Upstream
from finetune_operator.manifests import naming, rayjobs, runfiles

OWNER = rayjobs.Owner("team", "triage", "uid-1")
PLATFORM = rayjobs.Platform("HTTPMode", "http://127.0.0.1:8090", None, 5)
PLACES = runfiles.Places("pvc://models/tiny", "pvc://models/out", "pvc://checkpoints/out")
BASE: dict[str, Any] = {
    "model": {"uri": "pvc://models/tiny", "secretRef": {"name": "hub"}},
    "dataset": {
        "sources": [{"uri": "pvc://files/a.jsonl"}, {"uri": "s3://bucket/b.jsonl"}],
        "secretRef": {"name": "store"},
    },
    "output": {"uri": "pvc://models/out", "secretRef": {"name": "store"}},
}


def build(
    spec: dict[str, Any] | None = None, platform: rayjobs.Platform = PLATFORM, **more: Any
) -> dict[str, Any]:
    parsed = FineTuneJobSpec.model_validate(BASE | (spec or {}))
    return rayjobs.build_rayjob(
        OWNER,
        name="triage-a1",
        attempt=1,
        spec=parsed,
        image="trainer:1",
        places=PLACES,
        platform=platform,
        **more,
    )


def pod(rayjob: dict[str, Any]) -> dict[str, Any]:
    template: dict[str, Any] = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return template


def test_the_job_owns_its_rayjob() -> None:
    (reference,) = build()["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["name"], reference["uid"], reference["controller"]) == (
        "FineTuneJob",
        "triage",
        "uid-1",
        True,
    )


def test_retries_are_never_left_to_kuberay() -> None:
    spec = build()["spec"]
    assert (spec["backoffLimit"], spec["submissionMode"]) == (0, "HTTPMode")
    assert "submitterConfig" not in spec
    cluster = build(platform=rayjobs.Platform("K8sJobMode", "https://operator", "PEM", 30))["spec"]
    assert cluster["submitterConfig"] == {"backoffLimit": 0}


def test_the_pod_gets_no_cluster_token_but_one_for_reporting() -> None:
    spec = pod(build())
    assert spec["automountServiceAccountToken"] is False
    (volume,) = [v for v in spec["volumes"] if "projected" in v]
    token = volume["projected"]["sources"][0]["serviceAccountToken"]
    assert token["audience"] == "finetune.dev/jobs/uid-1"


def test_the_pod_meets_the_restricted_pod_security_standard() -> None:
    spec = pod(build())
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = spec["containers"][0]["securityContext"]
    assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})


def test_every_claim_is_mounted_once_where_the_trainer_looks_for_it() -> None:
    spec = pod(build())
    mounts = {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"]
        for v in spec["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert {claims[name]: mounts[name] for name in claims} == {
        "models": "/mnt/finetune/models",
        "checkpoints": "/mnt/finetune/checkpoints",
        "files": "/mnt/finetune/files",
    }


def test_secrets_are_referred_to_and_never_written_out() -> None:
    rayjob = build()
    assert pod(rayjob)["containers"][0]["envFrom"] == [
        {"secretRef": {"name": "hub"}},
        {"secretRef": {"name": "store"}},
    ]
    run_file = runfiles.build_run_file(
        namespace="team",
        name="triage",
        uid="u",
        attempt=1,
        spec=FineTuneJobSpec.model_validate(BASE),
        places=runfiles.Places("hf://a/b", "s3://out/x", "s3://out/x-checkpoints"),
    )
    assert "secret" not in json.dumps(run_file).lower()


def test_an_inspection_asks_for_no_gpu() -> None:
    spec = {"resources": {"gpusPerWorker": 1, "cpu": "4", "memory": "16Gi"}}
    training, inspection = build(spec), build(spec, inspect=True)
    assert pod(training)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in pod(inspection)["containers"][0]["resources"]["limits"]
    assert (training["spec"]["entrypoint"], inspection["spec"]["entrypoint"]) == (
        "finetune-trainer run",
        "finetune-trainer inspect",
    )


def test_the_authority_is_mounted_only_where_there_is_one() -> None:
    def names(rayjob: dict[str, Any]) -> set[str]:
        return {variable["name"] for variable in pod(rayjob)["containers"][0]["env"]}

    assert "KUBEFLOW_TRAINER_SERVER_CA_CERT" not in names(build())
    tls = rayjobs.Platform("K8sJobMode", "https://operator", "PEM", 30)
    assert "KUBEFLOW_TRAINER_SERVER_CA_CERT" in names(build(platform=tls))
    data = rayjobs.build_config_map(OWNER, name="x", attempt=1, run_file={}, platform=tls)["data"]
    assert data == {"run.json": "{}", "ca.crt": "PEM"}


@pytest.mark.parametrize(
    ("method", "present"),
    [
        ({"type": "LoRA"}, {"lora"}),
        ({"type": "QLoRA", "quantization": {}}, {"lora", "quantization"}),
        ({"type": "Full"}, set()),
    ],
)
def test_the_run_file_spells_the_methods_settings_out(method: dict[str, Any], present: set[str]) -> None:
    run_file = runfiles.build_run_file(
        namespace="team",
        name="triage",
        uid="u",
        attempt=1,
        spec=FineTuneJobSpec.model_validate(BASE | {"method": method}),
        places=runfiles.Places("hf://a/b", "s3://out/x", "s3://out/x-checkpoints"),
    )
    assert set(run_file["method"]) - {"type"} == present
    assert run_file["hyperparameters"]["globalBatchSize"] == 16
    assert "learningRate" not in run_file["hyperparameters"]
    assert run_file["output"] == {"uri": "s3://out/x"}


def test_labels_lead_from_every_object_back_to_its_job() -> None:
    rayjob = build()
    template = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert rayjob["metadata"]["labels"] == template["metadata"]["labels"] == naming.labels("triage", 1)


def test_a_rayjob_carries_no_annotations_because_kuberay_copies_them() -> None:
    assert "annotations" not in build()["metadata"]


def test_a_stopped_trainer_has_as_long_as_its_pod_to_save() -> None:
    variables = {v["name"]: v["value"] for v in pod(build())["containers"][0]["env"]}
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == str(pod(build())["terminationGracePeriodSeconds"]) == "5"


def test_more_memory_replaces_what_the_spec_says() -> None:
    resources = pod(build(memory="8192Mi"))["containers"][0]["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"] == "8192Mi"
    assert resources["limits"]["cpu"] == "1"


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({}, {"everyMinutes": 10.0, "keep": 2, "resume": "Auto"}),
        ({"everySteps": 50}, {"everySteps": 50, "keep": 2, "resume": "Auto"}),
        ({"everyMinutes": 1, "keep": 5, "resume": "Never"}, {"everyMinutes": 1.0, "keep": 5, "resume": "Never"}),
    ],
)  # fmt: skip
def test_the_run_file_says_when_to_save(checkpoint: dict[str, Any], expected: dict[str, Any]) -> None:
    run_file = runfiles.build_run_file(
        namespace="team",
        name="triage",
        uid="u",
        attempt=3,
        spec=FineTuneJobSpec.model_validate(BASE | {"checkpoint": checkpoint, "suspend": False}),
        places=PLACES,
    )
    assert run_file["checkpoint"] == {"uri": "pvc://checkpoints/out", **expected}
    assert {"overrides", "retry", "deadlines", "suspend"}.isdisjoint(run_file)


def test_a_model_that_another_job_made_is_named_by_its_folder() -> None:
    run_file = runfiles.build_run_file(
        namespace="team",
        name="triage",
        uid="u",
        attempt=1,
        spec=FineTuneJobSpec.model_validate(BASE | {"model": {"fineTuneJobRef": {"name": "base"}}}),
        places=runfiles.Places("s3://models/base", "s3://out/x", None),
    )
    assert run_file["model"] == {"uri": "s3://models/base"}
    assert "checkpoint" not in run_file


REWARDED: dict[str, Any] = {
    "objective": "RLOO",
    "reward": {
        "fineTuneJobRef": {"name": "judge"},
        "functions": [
            {"configMapRef": {"name": "rewards", "key": "a.py"}, "entry": "f"},
            {"configMapRef": {"name": "rewards", "key": "b.py"}, "entry": "g"},
        ],
        "secretRef": {"name": "judges-store"},
    },
}
CHAIN = runfiles.Places(
    "pvc://bases/tiny",
    "pvc://models/out",
    "pvc://checkpoints/out",
    adapter=Upstream(uri="pvc://sft/a", digest="sha256:" + "a" * 64, base_model="pvc://bases/tiny"),
    reward=Upstream(uri="pvc://judges/r", digest="sha256:" + "b" * 64, base_model="pvc://judge-bases/tiny"),
)


def test_reward_functions_are_mounted_side_by_side_and_named_to_the_trainer() -> None:
    container = pod(build(REWARDED))["containers"][0]
    mounts = {m["name"]: m for m in container["volumeMounts"]}
    assert mounts["reward-0"] == {
        "name": "reward-0", "mountPath": "/mnt/finetune-rewards/0", "readOnly": True
    }  # fmt: skip
    assert mounts["reward-1"]["mountPath"] == "/mnt/finetune-rewards/1"
    volumes = {v["name"]: v for v in pod(build(REWARDED))["volumes"]}
    assert volumes["reward-1"]["configMap"] == {"name": "rewards", "items": [{"key": "b.py", "path": "b.py"}]}
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["FINETUNE_REWARD_FUNCTIONS"] == "/mnt/finetune-rewards"
    assert "reward-0" not in {v["name"] for v in pod(build(REWARDED, inspect=True))["volumes"]}
    assert "FINETUNE_REWARD_FUNCTIONS" not in {e["name"] for e in pod(build())["containers"][0]["env"]}


def test_the_claims_of_a_chain_are_mounted_and_its_secret_is_given() -> None:
    spec = FineTuneJobSpec.model_validate(BASE | REWARDED)
    assert rayjobs.volume_claims(spec, CHAIN) == [
        "bases", "files", "sft", "judges", "judge-bases", "models", "checkpoints"
    ]  # fmt: skip
    assert rayjobs.secrets(spec)[-1] == "judges-store"


def test_a_run_file_of_a_chain_names_adapter_and_reward_model_with_their_digests() -> None:
    spec = BASE | {"model": {"fineTuneJobRef": {"name": "sft"}}} | REWARDED
    run_file = runfiles.build_run_file(
        namespace="team",
        name="triage",
        uid="u",
        attempt=1,
        spec=FineTuneJobSpec.model_validate(spec),
        places=CHAIN,
    )
    adapter = {"uri": "pvc://sft/a", "digest": "sha256:" + "a" * 64}
    assert run_file["model"] == {"uri": "pvc://bases/tiny", "adapter": adapter}
    assert run_file["method"] == {"type": "LoRA"}, "the adapter's own settings"
    assert run_file["reward"]["uri"] == "pvc://judges/r"
    assert run_file["reward"]["digest"] == "sha256:" + "b" * 64
    assert [one["entry"] for one in run_file["reward"]["functions"]] == ["f", "g"]
    assert run_file["generation"]["numGenerations"] == 4
    assert "secret" not in json.dumps(run_file).lower()
