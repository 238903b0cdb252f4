"""The pods of a FineTuneJob in a namespace that enforces the Pod Security Standard `restricted`."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.manifests import rayjobs, runfiles
from finetune_operator.manifests.pods import PodDefaults
from tests.clients import Json, Kubectl, KubectlError
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

SPEC: dict[str, Any] = {
    "model": {"uri": "pvc://models/tiny", "secretRef": {"name": "hub"}},
    "dataset": {"sources": [{"uri": "pvc://files/a.jsonl"}]},
    "output": {"uri": "pvc://models/out"},
    "resources": {"gpusPerWorker": 1},
}
REWARDED: dict[str, Any] = {
    "objective": "GRPO",
    "reward": {
        "functions": [{"configMapRef": {"name": "rewards", "key": "r.py"}, "entry": "polite"}],
        "secretRef": {"name": "judge"},
    },
}
# What a RayJob of ours may be: an attempt, one with the user's own code, and the search for its artifact.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "training": (SPEC, False),
    "rewarded": (SPEC | REWARDED, False),
    "inspection": (SPEC | REWARDED, True),
}
PLATFORM_TEAM = {
    "labels": {"team": "ml"},
    "annotations": {"sidecar.istio.io/inject": "false"},
    "nodeSelector": {"accelerator": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "imagePullSecrets": [{"name": "registry"}],
    "schedulerName": "volcano",
    "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
}


def pods(defaults: PodDefaults, kind: str) -> dict[str, Json]:
    """The pods of one RayJob in K8sJobMode, as KubeRay would make them of our templates."""
    spec, inspect = KINDS[kind]
    rayjob = rayjobs.build_rayjob(
        rayjobs.Owner("team", "triage", "uid-1"),
        name="triage-a1",
        attempt=1,
        spec=FineTuneJobSpec.model_validate(spec),
        inspect=inspect,
        image="trainer:1",
        places=runfiles.Places("pvc://models/tiny", "pvc://models/out", "pvc://checkpoints/out"),
        platform=rayjobs.Platform("K8sJobMode", "https://operator:8090", "PEM", 120, pod_defaults=defaults),
    )
    templates = {
        "head": rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"],
        "submitter": rayjob["spec"]["submitterPodTemplate"],
    }
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template["metadata"]},
            "spec": template["spec"],
        }
        for name, template in templates.items()
    }


@pytest.fixture
def restricted(kubectl: Kubectl, namespace: str) -> Kubectl:
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    wait_until(lambda: kubectl.get("serviceaccount", "default"), what="the service account that pods get")
    return kubectl


@pytest.mark.parametrize("defaults", [{}, PLATFORM_TEAM], ids=["ours", "platform-team"])
@pytest.mark.parametrize("pod", ["head", "submitter"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_is_accepted(restricted: Kubectl, kind: str, pod: str, defaults: Json) -> None:
    body = pods(PodDefaults.model_validate(defaults), kind)[pod]
    restricted("create", "--dry-run=server", "--validate=strict", "-f", "-", body=body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("defaults", "complaint"),
    [
        ({"securityContext": {}}, "runAsNonRoot"),
        ({"containerSecurityContext": {}}, "allowPrivilegeEscalation"),
    ],
)
def test_an_override_is_really_used(restricted: Kubectl, kind: str, defaults: Json, complaint: str) -> None:
    for body in pods(PodDefaults.model_validate(defaults), kind).values():
        with pytest.raises(KubectlError, match=complaint):
            restricted("create", "--dry-run=server", "-f", "-", body=body)
