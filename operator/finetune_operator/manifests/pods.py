"""What the pods of a job have in common: security contexts, the time for a last checkpoint, the platform's defaults.

They meet the Pod Security Standard `restricted`; a platform that needs other security contexts replaces ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from finetune_operator.api.base import ApiModel
from finetune_operator.manifests import naming

Json = dict[str, Any]

USER = 1000  # of the trainer's image (trainer_image/Dockerfile)
STOP_RESERVE = 5  # seconds of the grace period that are left for Ray once the trainer has ended
POD_SECURITY: Json = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "fsGroup": USER,
    # Without it the kubelet walks through a claim with a million files before each start.
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Json = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
SUBMITTER_RESOURCES: Json = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"cpu": "1", "memory": "1Gi"},
}


PREFIX = "([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?"
WORD = "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LABEL_NAME = PREFIX + WORD
LabelName = Annotated[str, Field(pattern=f"^{LABEL_NAME}$")]
LabelValue = Annotated[str, Field(pattern=f"^({WORD})?$")]
"""As the API server wants them, which sees them only in a job's pods."""


class PodDefaults(ApiModel):
    """What the platform team gives every training pod; the chart's value trainer.podDefaults."""

    labels: dict[LabelName, LabelValue] = Field(default_factory=dict)
    """Labels of the pods. The operator's own win."""
    annotations: dict[LabelName, str] = Field(default_factory=dict)
    """Annotations of the pods."""
    node_selector: dict[LabelName, LabelValue] = Field(default_factory=dict)
    """Where the head may run. The submitter runs anywhere."""
    tolerations: list[Json] = Field(default_factory=list)
    """Taints that the pods tolerate."""
    affinity: Json = Field(default_factory=dict)
    """Affinity of the head."""
    image_pull_secrets: list[Json] = Field(default_factory=list)
    """Secrets with credentials of registries, in the job's namespace."""
    priority_class_name: str | None = None
    """Priority class of the pods."""
    runtime_class_name: str | None = None
    """Runtime class of the head, for example nvidia."""
    scheduler_name: str | None = None
    """Scheduler of the pods."""
    service_account_name: str | None = None
    """Service account of the head, in the job's namespace, for example one with rights in a cloud's storage. Its token
    is not mounted."""
    security_context: Json | None = None
    """Security context of the pods, in place of the operator's."""
    container_security_context: Json | None = None
    """Security context of their containers, in place of the operator's."""
    env: list[Json] = Field(default_factory=list)
    """Further environment variables of the head."""

    @model_validator(mode="after")
    def _leave_ours_alone(self) -> Self:
        for entry in self.env:
            name = entry.get("name")
            if not isinstance(name, str) or not name:
                raise ValueError(f"env: {entry!r} has no name")
            if name.startswith(("FINETUNE_", "KUBEFLOW_TRAINER_")):
                raise ValueError(f"env: {name} is set by the operator; remove it")
        return self

    def pod_security(self) -> Json:
        return POD_SECURITY if self.security_context is None else self.security_context

    def container_security(self) -> Json:
        return (
            CONTAINER_SECURITY if self.container_security_context is None else self.container_security_context
        )

    def head_fields(self) -> Json:
        """Fields of the head's pod spec."""
        fields = {
            **self._common_fields(),
            "nodeSelector": self.node_selector,
            "affinity": self.affinity,
            "runtimeClassName": self.runtime_class_name,
            "serviceAccountName": self.service_account_name,
        }
        return {name: value for name, value in fields.items() if value}

    def submitter_fields(self) -> Json:
        """Fields of the submitter's pod spec; it runs anywhere, so that it takes no room on a node with GPUs."""
        return {name: value for name, value in self._common_fields().items() if value}

    def _common_fields(self) -> Json:
        return {
            "tolerations": self.tolerations,
            "imagePullSecrets": self.image_pull_secrets,
            "priorityClassName": self.priority_class_name,
            "schedulerName": self.scheduler_name,
        }


def metadata(labels: dict[str, str], defaults: PodDefaults) -> Json:
    """Metadata of a pod template."""
    found = {"labels": {**defaults.labels, **labels}, "annotations": defaults.annotations}
    return {name: value for name, value in found.items() if value}


def lifecycle(grace_seconds: int) -> Json:
    """The hook that lets the trainer save a checkpoint: Ray kills what runs in a deleted pod within a second.

    Nothing where the grace period is too short for it.
    """
    wait = grace_seconds - STOP_RESERVE
    if wait <= 0:
        return {}
    command = ["finetune-trainer", "stop", "--wait", str(wait)]
    return {"lifecycle": {"preStop": {"exec": {"command": command}}}}


def submitter_template(image: str, defaults: PodDefaults) -> Json:
    """The pod of K8sJobMode that submits and follows the job's log.

    KubeRay's own has no security context, so a namespace that enforces `restricted` refuses it, and the RayJob hangs.
    """
    return {
        # Not the job's labels: the fence between attempts asks whether the trainer's pods are gone.
        "metadata": metadata({}, defaults),
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "securityContext": defaults.pod_security(),
            **defaults.submitter_fields(),
            "containers": [
                {
                    "name": naming.SUBMITTER_CONTAINER,
                    "image": image,
                    "resources": SUBMITTER_RESOURCES,
                    "securityContext": defaults.container_security(),
                }
            ],
        },
    }
