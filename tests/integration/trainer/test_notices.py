"""A real Ray says that the node will go away: a checkpoint is saved, and training ends as Preempted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from finetune_trainer import notices
from tests import tiny
from tests.clusters import started
from tests.integration.trainer.conftest import Run
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

HYPER: dict[str, Any] = {"maxSteps": 20_000, "globalBatchSize": 8, "maxLength": 64, "evalSteps": 20_000}
DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

client = GcsClient(address=sys.argv[1])
(node,) = client.get_all_node_info()
deadline = int(1000 * (time.time() + 60))
print(client.drain_node(node.hex(), autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "the spot market", deadline))
"""


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("ray"), ("ray",)) as running:
        yield running


def test_a_drained_node_saves_a_checkpoint_first(
    ray: Cluster, tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    folder, run_file = tmp_path / "checkpoints", tmp_path / "run.json"
    checkpoint = {"uri": f"file://{folder}", "everySteps": 100_000}
    document = tiny.run_document(
        tiny_model, chat_file, tmp_path / "out", checkpoint=checkpoint, hyperparameters=HYPER
    )
    run_file.write_text(json.dumps(document))
    client = JobSubmissionClient(f"http://127.0.0.1:{ray.ports['ray-dashboard']}")
    job = client.submit_job(
        entrypoint=f"{sys.executable} -m finetune_trainer run --run-file {run_file}",
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}},
    )
    wait_until(
        lambda: "\nstep 1/" in client.get_job_logs(job), seconds=120, what=lambda: client.get_job_logs(job)
    )
    address = f"127.0.0.1:{ray.ports['ray']}"
    done = subprocess.run(
        [sys.executable, "-c", DRAIN, address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("(True"), done.stdout + done.stderr
    wait_until(
        lambda: "TRAINER_RESULT" in client.get_job_logs(job),
        seconds=45,
        what=lambda: client.get_job_logs(job)[-2000:],
    )
    log = client.get_job_logs(job)
    assert "Ray drains this node" in log
    result = json.loads(log.partition("TRAINER_RESULT ")[2].splitlines()[0])
    assert (result["exitCode"], result["class"]) == (75, "Preempted"), log
    assert 0 < result["step"] < HYPER["maxSteps"]
    assert (folder / f"checkpoint-{result['step']}" / "complete").exists()


def test_a_ray_that_does_not_answer_stops_nothing(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(notices, "INTERVAL", 0.1)
    monkeypatch.setattr(notices, "TIMEOUT", 0.5)
    checkpoint = {"uri": f"file://{tmp_path / 'checkpoints'}", "everySteps": 100}
    ended = run(
        tiny_model,
        chat_file,
        checkpoint=checkpoint,
        hyperparameters={**HYPER, "maxSteps": 20, "evalSteps": 20},
    )
    assert ended.code == 0, ended.log
