"""Attempt 0 on the laptop cluster, which has no GPU: a real trainer checks, and only then a GPU is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.clients import Json, Kubectl, finetunejob

pytestmark = pytest.mark.integration

GPU = {"cpu": "200m", "memory": "1Gi", "gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4"}


def gpus_asked_for(kubectl: Kubectl) -> list[Json]:
    containers = [one for pod in kubectl.items("pod") for one in pod["spec"]["containers"]]
    return [one for one in containers if "nvidia.com/gpu" in one.get("resources", {}).get("limits", {})]


def test_a_job_that_fits_is_told_so_and_then_waits_for_its_gpu(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    kubectl.apply(finetunejob("fits", tiny_model, tiny_rows, resources=GPU))
    status = kubectl.wait_job("fits", lambda s: s.get("reason") == "NoMatchingNode")["status"]
    check, first = status["attempts"]
    assert (check["number"], check["rayJob"], check["class"]) == (0, "fits-check", "Checked")
    assert "NVIDIA-L4 has 22.5 GiB" in check["message"]
    assert (first["number"], first["rayJob"]) == (1, "fits-a1")
    assert "gpuSeconds" not in check
    told = [event for event in kubectl.events("fits") if event["reason"] == "Checked"]
    assert [event["type"] for event in told] == ["Normal"]
    assert len(gpus_asked_for(kubectl)) == 1


def test_a_job_that_may_run_out_of_memory_is_warned_of_and_tried(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    many = {"maxSteps": 4, "globalBatchSize": 4096, "microBatchSize": 4096, "maxLength": 2048}
    kubectl.apply(finetunejob("tight", tiny_model, tiny_rows, resources=GPU, hyperparameters=many))
    status = kubectl.wait_job("tight", lambda s: s.get("reason") == "NoMatchingNode")["status"]
    check = status["attempts"][0]
    assert check["class"] == "Checked"
    assert check["message"].startswith("may run out of memory: needs about ")
    told = [event for event in kubectl.events("tight") if event["reason"] == "MayRunOutOfMemory"]
    assert [event["type"] for event in told] == ["Warning"]
    assert "NVIDIA-L4 has 22.5 GiB" in told[0]["message"]


def test_bad_data_is_found_without_a_gpu(kubectl: Kubectl, tiny_model: Path, tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"messages": "none"}])
    kubectl.apply(finetunejob("bad", tiny_model, rows, resources=GPU, retry={"maxUserRetries": 2}))
    status = kubectl.finished("bad")
    assert (status["phase"], status["reason"]) == ("Failed", "BadData")
    assert "line 1" in status["message"]
    assert [attempt["number"] for attempt in status["attempts"]] == [0]
    assert gpus_asked_for(kubectl) == []
