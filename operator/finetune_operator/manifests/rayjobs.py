"""The objects of one attempt: a ConfigMap with the run file, and the RayJob that executes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.api.base import SecretReference
from finetune_operator.api.finetunejob import KIND, FineTuneJobSpec, RewardFunctionSpec
from finetune_operator.manifests import naming, pods
from finetune_operator.manifests.pods import PodDefaults
from finetune_operator.manifests.runfiles import Places

RAY_VERSION = "2.60.0"
ENTRYPOINT = "finetune-trainer run"
INSPECTION_ENTRYPOINT = "finetune-trainer inspect"
CHECK_ENTRYPOINT = "finetune-trainer check"
TOKEN_SECONDS = 3600  # the kubelet renews a projected token before it expires


@dataclass(frozen=True)
class Owner:
    """The FineTuneJob that the objects belong to."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Platform:
    """What the operator's configuration decides about every RayJob."""

    submission_mode: str
    status_url: str
    authority_pem: str | None
    termination_grace_seconds: int
    accelerator_label: str = "nvidia.com/gpu.product"
    """Label of nodes that spec.resources.acceleratorType selects."""
    pod_defaults: PodDefaults = field(default_factory=PodDefaults)


def build_config_map(
    owner: Owner, *, name: str, attempt: int, run_file: Mapping[str, Any], platform: Platform
) -> dict[str, Any]:
    data = {naming.RUN_FILE_KEY: json.dumps(run_file, indent=2)}
    if platform.authority_pem:
        data[naming.AUTHORITY_KEY] = platform.authority_pem
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(owner, name, attempt),
        "data": data,
    }


def build_rayjob(
    owner: Owner,
    *,
    name: str,
    attempt: int,
    spec: FineTuneJobSpec,
    image: str,
    places: Places,
    platform: Platform,
    memory: str | None = None,
    inspect: bool = False,
) -> dict[str, Any]:
    """One attempt as a RayJob, or the search for its artifact (`inspect`). `memory` replaces what the spec says.
    Attempt 0 is the check before the first one. Neither it nor an inspection has a GPU or waits in a queue.

    KubeRay's own retries are off: it knows no failure class and no checkpoint.
    """
    trains = not inspect and attempt > 0
    pod_spec = _pod_spec(
        owner,
        claims=volume_claims(spec, places),
        functions=[] if inspect else reward_functions(spec),
        container={
            **_container(owner, attempt, spec, image, platform),
            "resources": _resources(spec, memory=memory, gpus=trains),
        },
        config_map=name,
        platform=platform,
    )
    if spec.resources.accelerator_type and trains:
        pod_spec["nodeSelector"] = {platform.accelerator_label: spec.resources.accelerator_type}
    rayjob_spec: dict[str, Any] = {
        "entrypoint": INSPECTION_ENTRYPOINT if inspect else ENTRYPOINT if trains else CHECK_ENTRYPOINT,
        "submissionMode": platform.submission_mode,
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,
        "rayClusterSpec": _cluster_spec(
            pods.metadata(naming.labels(owner.name, attempt), platform.pod_defaults), pod_spec
        ),
    }
    if platform.submission_mode == "K8sJobMode":
        # With a second try the submitter would start the same job again from its beginning.
        rayjob_spec["submitterConfig"] = {"backoffLimit": 0}
        rayjob_spec["submitterPodTemplate"] = pods.submitter_template(image, platform.pod_defaults)
    metadata = _metadata(owner, name, attempt)
    queue = spec.scheduling.queue_name
    if queue is not None and trains:
        # From here on Kueue owns `suspend`. Created suspended: without it the job would run before Kueue has seen it.
        metadata["labels"] |= {naming.LABEL_QUEUE: queue}
        rayjob_spec["suspend"] = True
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": rayjob_spec}


def _cluster_spec(metadata: dict[str, Any], pod_spec: dict[str, Any]) -> dict[str, Any]:
    """One head pod, in which the trainer runs, and no workers."""
    return {
        "rayVersion": RAY_VERSION,
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0"},  # noqa: S104 - KubeRay connects from its own pod
            "template": {"metadata": metadata, "spec": pod_spec},
        },
    }


def _metadata(owner: Owner, name: str, attempt: int) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": naming.labels(owner.name, attempt),
        "ownerReferences": [naming.owner_reference(KIND, owner.name, owner.uid)],
    }


def _pod_spec(
    owner: Owner,
    *,
    claims: Sequence[str],
    functions: Sequence[RewardFunctionSpec],
    container: dict[str, Any],
    config_map: str,
    platform: Platform,
) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [
        {"name": f"claim-{i}", "mountPath": f"{naming.VOLUMES_FOLDER}/{c}"} for i, c in enumerate(claims)
    ]
    volumes: list[dict[str, Any]] = [
        {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": c}} for i, c in enumerate(claims)
    ]
    for i, function in enumerate(functions):
        key = function.config_map_ref.key
        path = f"{naming.REWARD_FUNCTIONS_FOLDER}/{i}"
        mounts.append({"name": f"reward-{i}", "mountPath": path, "readOnly": True})
        source = {"name": function.config_map_ref.name, "items": [{"key": key, "path": key}]}
        volumes.append({"name": f"reward-{i}", "configMap": source})
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": platform.termination_grace_seconds,
        "securityContext": platform.pod_defaults.pod_security(),
        **platform.pod_defaults.head_fields(),
        "containers": [
            {
                **container,
                "volumeMounts": [
                    {"name": "run-file", "mountPath": naming.RUN_FILE_FOLDER, "readOnly": True},
                    {"name": "status-token", "mountPath": naming.TOKEN_FOLDER, "readOnly": True},
                    *mounts,
                ],
            }
        ],
        "volumes": [
            {"name": "run-file", "configMap": {"name": config_map}},
            {"name": "status-token", "projected": {"sources": [_token_source(owner)]}},
            *volumes,
        ],
    }


def _container(
    owner: Owner, attempt: int, spec: FineTuneJobSpec, image: str, platform: Platform
) -> dict[str, Any]:
    return {
        "name": naming.HEAD_CONTAINER,
        "image": image,
        "env": [
            *_environment(owner, attempt, platform),
            *_reward_variables(spec),
            *platform.pod_defaults.env,
        ],
        "envFrom": [{"secretRef": {"name": secret}} for secret in secrets(spec)],
        "securityContext": platform.pod_defaults.container_security(),
        **pods.lifecycle(platform.termination_grace_seconds),
    }


def _environment(owner: Owner, attempt: int, platform: Platform) -> list[dict[str, str]]:
    path = naming.status_path(owner.namespace, owner.name, attempt)
    variables = {
        "FINETUNE_RUN_FILE": f"{naming.RUN_FILE_FOLDER}/{naming.RUN_FILE_KEY}",
        "FINETUNE_VOLUMES": naming.VOLUMES_FOLDER,
        "KUBEFLOW_TRAINER_SERVER_URL": f"{platform.status_url}{path}",
        "KUBEFLOW_TRAINER_SERVER_TOKEN": f"{naming.TOKEN_FOLDER}/token",
        # Ray kills a stopped job 3 s after SIGTERM unless told otherwise; the last checkpoint takes longer.
        "RAY_JOB_STOP_WAIT_TIME_S": str(platform.termination_grace_seconds),
    }
    if platform.authority_pem:
        variables["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = f"{naming.RUN_FILE_FOLDER}/{naming.AUTHORITY_KEY}"
    return [{"name": name, "value": value} for name, value in variables.items()]


def _reward_variables(spec: FineTuneJobSpec) -> list[dict[str, str]]:
    if not reward_functions(spec):
        return []
    return [{"name": "FINETUNE_REWARD_FUNCTIONS", "value": naming.REWARD_FUNCTIONS_FOLDER}]


def reward_functions(spec: FineTuneJobSpec) -> Sequence[RewardFunctionSpec]:
    return spec.reward.functions if spec.reward else ()


def _token_source(owner: Owner) -> dict[str, Any]:
    """A token that is good for one thing: reporting for this job. The API server itself does not accept it."""
    return {
        "serviceAccountToken": {
            "path": "token",
            "audience": naming.audience(owner.uid),
            "expirationSeconds": TOKEN_SECONDS,
        }
    }


def _resources(spec: FineTuneJobSpec, *, memory: str | None, gpus: bool) -> dict[str, Any]:
    """Requests equal limits, so that the pod is Guaranteed and evicted last."""
    amounts: dict[str, str] = {"cpu": spec.resources.cpu, "memory": memory or spec.resources.memory}
    if spec.resources.gpus_per_worker and gpus:
        amounts["nvidia.com/gpu"] = str(spec.resources.gpus_per_worker)
    return {"requests": dict(amounts), "limits": amounts}


def secrets(spec: FineTuneJobSpec) -> list[str]:
    """Names of the Secrets that the spec refers to, each once, in the order model, dataset, output, reward."""
    references: list[SecretReference | None] = [
        spec.model.secret_ref,
        spec.dataset.secret_ref,
        spec.output.secret_ref,
        spec.reward.secret_ref if spec.reward else None,
    ]
    return list(dict.fromkeys(reference.name for reference in references if reference))


def volume_claims(spec: FineTuneJobSpec, places: Places) -> list[str]:
    """Names of the PersistentVolumeClaims in the job's pvc:// URIs, each once, in the order of use."""
    uris = [places.model_uri, *(source.uri for source in spec.dataset.sources), *places.uris()]
    uris += [spec.reward.uri] if spec.reward and spec.reward.uri else []
    return list(
        dict.fromkeys(uri.removeprefix("pvc://").split("/", 1)[0] for uri in uris if uri.startswith("pvc://"))
    )
