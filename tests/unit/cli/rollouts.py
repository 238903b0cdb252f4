"""AdapterDeployments as the API server returns them, in the states that the views must show."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec

NOW = datetime(2026, 1, 1, 12, 10, 0, tzinfo=UTC)
STEPS = [{"setWeight": 5}, {"pause": {"duration": "5m"}}, {"analysis": {}}, {"approval": {"timeout": "24h"}}]


def rollout(name: str = "bot", *, generation: int = 2, **status: Any) -> dict[str, Any]:
    spec = AdapterDeploymentSpec.model_validate(
        {
            "baseModelRef": {"name": "smollm2"},
            "adapter": {"fineTuneJobRef": {"name": "tickets-2"}},
            "strategy": {"canary": {"steps": STEPS}},
        }
    )
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": "u",
            "generation": generation,
            "creationTimestamp": "2026-01-01T12:00:00Z",
        },
        "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        **({"status": {"observedGeneration": generation, **status}} if status else {}),
    }


def adapter(revision: str, job: str, *, loaded: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "revision": revision,
        "servedName": f"bot--{revision}",
        "digest": f"sha256:{revision}",
        "uri": f"file:///artifacts/{job}",
        "fineTuneJob": job,
        "loadedReplicas": loaded,
        "desiredReplicas": 1,
        **more,
    }


GUARDRAIL = {
    "name": "errors",
    "kind": "Guardrail",
    "phase": "Successful",
    "n": {"stable": 1900, "candidate": 100},
    "failures": {"stable": 38, "candidate": 4},
    "estimate": 2.0,
    "eValue": 1.375,
    "threshold": 100,
}
OBJECTIVE = {
    "name": "thumbs-up",
    "kind": "Objective",
    "phase": "Inconclusive",
    "n": {"stable": 400, "candidate": 30},
    "estimate": -0.012,
    "interval": {"low": -0.11, "high": 0.086},
    "message": "170 more values of the candidate are needed",
}
METRIC = {
    "name": "p95",
    "kind": "Metric",
    "phase": "Error",
    "estimate": 1.1,
    "measurements": {"successful": 2, "failed": 0, "inconclusive": 0, "error": 1, "consecutiveErrors": 1},
    "message": "http://prometheus:9090 does not answer",
}
DRIFT = {"name": "drift", "kind": "Drift", "phase": "Successful", "estimate": 0.031, "threshold": 0.25}


def canary(**more: Any) -> dict[str, Any]:
    status: dict[str, Any] = {
        "phase": "Progressing",
        "stage": "Canary",
        "message": "5% of the users get 9f8e7d6c for 5m",
        "stableRevision": "1a2b3c4d",
        "candidateRevision": "9f8e7d6c",
        "currentStepIndex": 1,
        "step": "2/4 pause",
        "weights": {"stable": 95, "candidate": 5, "mirror": 0, "version": 12, "verified": True},
        "adapters": [adapter("1a2b3c4d", "tickets-1"), adapter("9f8e7d6c", "tickets-2")],
        "analysis": [GUARDRAIL, OBJECTIVE, METRIC, DRIFT],
        "rolloutStartTime": "2026-01-01T12:05:00Z",
        "stageStartTime": "2026-01-01T12:07:00Z",
        "stepStartTime": "2026-01-01T12:08:00Z",
    }
    return rollout(**{**status, **more})


def paused(reason: str, message: str = "it waits") -> dict[str, Any]:
    condition = {"reason": reason, "message": message, "startTime": "2026-01-01T12:09:00Z"}
    return canary(phase="Paused", message=message, pauseConditions=[condition])


HISTORY = {
    "revision": "9f8e7d6c",
    "digest": "sha256:9f",
    "uri": "file:///artifacts/tickets-2",
    "fineTuneJob": "tickets-2",
    "startTime": "2026-01-01T12:05:00Z",
    "endTime": "2026-01-01T12:09:30Z",
}


def promoted() -> dict[str, Any]:
    return rollout(
        phase="Healthy",
        stage="Succeeded",
        message="9f8e7d6c serves",
        completionStatus="Promoted",
        stableRevision="9f8e7d6c",
        weights={"stable": 100, "candidate": 0, "mirror": 0, "version": 15, "verified": True},
        adapters=[
            adapter("9f8e7d6c", "tickets-2"),
            adapter("1a2b3c4d", "tickets-1", unloadAt="2026-01-01T12:19:30Z"),
        ],
        history=[{**HISTORY, "completionStatus": "Promoted"}],
    )


def aborted(reason: str = "GuardrailBreached") -> dict[str, Any]:
    abort = {
        "reason": reason,
        "message": "errors: 9 of 100 answers failed, 2 of 100 of the stable revision",
        "at": "2026-01-01T12:09:30Z",
        "revision": "9f8e7d6c",
        "weight": 5,
    }
    return canary(
        phase="Degraded",
        stage="Failed",
        reason=reason,
        completionStatus="Aborted",
        message=abort["message"],
        abort=abort,
        weights={"stable": 100, "candidate": 0, "mirror": 0, "version": 13, "verified": True},
        history=[{**HISTORY, "completionStatus": "Aborted", "reason": reason, "message": abort["message"]}],
    )


EVENTS: list[dict[str, Any]] = [
    {
        "metadata": {"creationTimestamp": f"2026-01-01T12:0{minute}:00Z"},
        "type": "Normal",
        "reason": f"Reason{minute}",
        "message": "text",
    }
    for minute in range(1, 8)
]
