"""Names, labels, references and paths that the operator, the trainer's pod and the tests must agree on."""

from __future__ import annotations

from finetune_operator.api.base import API_VERSION, GROUP

MANAGER = "finetune-operator"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_JOB = f"{GROUP}/job"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_WORKLOAD_OWNER = "kueue.x-k8s.io/job-uid"  # on a Workload: UID of the object that it is for
LABEL_JOB_NAME = "batch.kubernetes.io/job-name"  # on the pods of a Kubernetes Job
KUBERAY_FINALIZER = "ray.io/rayjob-finalizer"
KUBERAY = "ray.io/kuberay-operator"  # spec.managedBy of RayJobs that KubeRay runs itself
HEAD_CONTAINER = "ray-head"
SUBMITTER_CONTAINER = "ray-job-submitter"  # SidecarMode's, in the head pod

RUN_FILE_FOLDER = "/etc/finetune"
RUN_FILE_KEY = "run.json"
AUTHORITY_KEY = "ca.crt"
TOKEN_FOLDER = "/var/run/secrets/finetune.dev"  # noqa: S105 - a path
VOLUMES_FOLDER = "/mnt/finetune"
REWARD_FUNCTIONS_FOLDER = "/mnt/finetune-rewards"  # below it a folder for each function, by its number


def labels(job: str, attempt: int) -> dict[str, str]:
    """What the objects of an attempt carry. KubeRay copies them from a RayJob to its RayCluster."""
    return {LABEL_MANAGED_BY: MANAGER, **selector(job, attempt)}


def selector(job: str, attempt: int | None = None) -> dict[str, str]:
    """By what the objects of one or of all attempts of a job are found: by no label that a policy of the cluster may
    set to a value of its own, as it does with those of app.kubernetes.io."""
    return {LABEL_JOB: job} | ({} if attempt is None else {LABEL_ATTEMPT: str(attempt)})


def owner_reference(kind: str, name: str, uid: str) -> dict[str, str | bool]:
    """What an object of ours goes away with."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": False,  # would need a right on the owner's finalizers for no gain
    }


def audience(job_uid: str) -> str:
    """The audience of the tokens with which a job's trainer reports: no other job's token passes for it."""
    return f"{GROUP}/jobs/{job_uid}"


def status_path(namespace: str, name: str, attempt: int | str) -> str:
    """Where an attempt reports to; with patterns for arguments, the route of the endpoint."""
    return f"/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/status"
