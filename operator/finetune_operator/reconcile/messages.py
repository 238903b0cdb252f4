"""What webhooks and chat rooms are told."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.adapterdeployment_strategy import AlertSpec, Severity, WebhookType
from finetune_operator.core.facts import Event
from finetune_operator.core.rollout_facts import Alert, DeploymentFacts

LEVELS = (Severity.INFO, Severity.WARN, Severity.ERROR)
COLORS = {Severity.INFO: "good", Severity.WARN: "warning", Severity.ERROR: "danger"}


def webhook_payload(
    deployment: DeploymentFacts,
    status: AdapterDeploymentStatus,
    kind: WebhookType,
    *,
    event: Event | None = None,
) -> dict[str, Any]:
    """The document for a webhook: who it is about, where the rollout is, and the event if there is one."""
    weights = status.weights
    payload: dict[str, Any] = {
        "type": str(kind),
        "name": deployment.name,
        "namespace": deployment.namespace,
        "uid": deployment.uid,
        "alias": deployment.alias,
        "phase": status.phase,
        "stage": status.stage,
        "reason": status.reason,
        "message": status.message,
        "stableRevision": status.stable_revision,
        "candidateRevision": status.candidate_revision,
        "step": status.step,
        "weight": weights.candidate if weights else 0,
        "completionStatus": status.completion_status,
    }
    if event is not None:
        payload["event"] = {
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "message": event.message,
        }
    return {name: str(v) if isinstance(v, str) else v for name, v in payload.items() if v is not None}


def is_for(alert: Alert, spec: AlertSpec) -> bool:
    return LEVELS.index(alert.severity) >= LEVELS.index(spec.severity)


def alert_payload(
    deployment: DeploymentFacts, status: AdapterDeploymentStatus, alert: Alert
) -> dict[str, Any]:
    """A message as Slack's incoming webhooks take it (https://api.slack.com/messaging/webhooks)."""
    name = f"{deployment.namespace}/{deployment.name}"
    fields = {
        "Alias": deployment.alias,
        "Phase": status.phase,
        "Stage": status.stage,
        "Stable": status.stable_revision,
        "Candidate": status.candidate_revision,
        "Weight": f"{status.weights.candidate:g}%" if status.weights else None,
    }
    return {
        "text": f"AdapterDeployment {name}: {alert.message}",
        "attachments": [
            {
                "color": COLORS[alert.severity],
                "fields": [
                    {"title": title, "value": str(value), "short": True}
                    for title, value in fields.items()
                    if value
                ],
            }
        ],
    }
