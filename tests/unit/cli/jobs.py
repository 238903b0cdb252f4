"""FineTuneJobs as the API server returns them, in the states that the views must show."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

NOW = datetime(2026, 1, 1, 12, 10, 0, tzinfo=UTC)


def job(name: str = "tickets", *, namespace: str = "default", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": "u",
            "creationTimestamp": "2026-01-01T12:00:00Z",
        },
        "spec": {
            "objective": "SFT",
            "model": {"uri": "hf://organization/model"},
            "method": {"type": "LoRA"},
            "dataset": {"sources": [{"uri": "pvc://files/train.jsonl"}], "split": {"eval": 0.05, "seed": 42}},
            "hyperparameters": {"epochs": 3, "globalBatchSize": 16, "maxLength": 1024},
            "resources": {"cpu": "1", "memory": "4Gi", "gpusPerWorker": 0},
            "output": {},
        },
        **({"status": status} if status else {}),
    }


def running(**more: Any) -> dict[str, Any]:
    status: dict[str, Any] = {
        "phase": "Running",
        "reason": "Training",
        "message": "optimizer steps are being taken",
        "startTime": "2026-01-01T12:08:00Z",
        "progress": {
            "percent": 45,
            "summary": "45%",
            "step": 45,
            "totalSteps": 100,
            "epoch": 1.35,
            "tokensPerSecond": 812.3,
            "estimatedRemainingSeconds": 210,
            "lastReportTime": "2026-01-01T12:09:50Z",
        },
        "metrics": {"loss": 1.234567, "evalLoss": 1.3},
        "attempts": [{"number": 1, "rayJob": "tickets-a1", "startTime": "2026-01-01T12:08:00Z"}],
        "conditions": [
            {
                "type": "Training",
                "status": "True",
                "reason": "Training",
                "message": "optimizer steps are being taken",
                "lastTransitionTime": "2026-01-01T12:08:30Z",
            }
        ],
    }
    return job(**{**status, **more})


def succeeded() -> dict[str, Any]:
    artifact = {
        "uri": "s3://bucket/tickets",
        "digest": "sha256:abc",
        "sizeBytes": 9_812_345,
        "baseModel": "hf://organization/model",
        "rank": 16,
    }
    return running(
        phase="Succeeded",
        reason="ArtifactPublished",
        message="artifact sha256:abc is at s3://bucket/tickets",
        artifact=artifact,
        completionTime="2026-01-01T12:09:55Z",
        effective={"modelRevision": "c0ffee", "trainRows": 380, "device": "cpu"},
        attempts=[
            {
                "number": 1,
                "rayJob": "tickets-a1",
                "startTime": "2026-01-01T12:08:00Z",
                "endTime": "2026-01-01T12:09:55Z",
                "class": "Succeeded",
                "exitCode": 0,
                "lastStep": 100,
            }
        ],
    )


def failed(reason: str = "BadData", exit_code: int | None = 65) -> dict[str, Any]:
    attempt = {
        "number": 1,
        "rayJob": "tickets-a1",
        "startTime": "2026-01-01T12:08:00Z",
        "endTime": "2026-01-01T12:08:12Z",
        "class": reason,
    }
    return job(
        phase="Cancelled" if reason == "Cancelled" else "Failed",
        reason=reason,
        message="pvc://files/train.jsonl line 17: broken JSON. Correct the data and create the job again.",
        startTime="2026-01-01T12:08:00Z",
        completionTime="2026-01-01T12:08:12Z",
        attempts=[attempt if exit_code is None else {**attempt, "exitCode": exit_code}],
    )
