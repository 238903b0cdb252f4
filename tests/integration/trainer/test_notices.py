"""A real Ray says that the node will go away: a checkpoint is saved, and training ends as Preempted."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from finetune_trainer import notices
from tests.clusters import started
from tests.integration.trainer.conftest import Run

pytestmark = pytest.mark.integration

HYPER: dict[str, Any] = {"maxSteps": 5000, "globalBatchSize": 8, "maxLength": 64, "evalSteps": 5000}
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
    ray: Cluster,
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    handlers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, folder = f"127.0.0.1:{ray.ports['ray']}", tmp_path / "checkpoints"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(notices, "INTERVAL", 0.5)
    drained: list[str] = []

    def drain() -> None:
        time.sleep(4)
        done = subprocess.run(
            [sys.executable, "-c", DRAIN, address], capture_output=True, text=True, timeout=60, check=False
        )
        drained.append(done.stdout + done.stderr)

    thread = threading.Thread(target=drain)
    thread.start()
    checkpoint = {"uri": f"file://{folder}", "everySteps": 100_000}
    ended = run(tiny_model, chat_file, checkpoint=checkpoint, hyperparameters=HYPER)
    thread.join()
    assert drained[0].startswith("(True"), drained
    assert (ended.code, ended.result["class"]) == (75, "Preempted"), ended.log
    assert "Ray drains this node" in ended.log
    assert 0 < ended.result["step"] < HYPER["maxSteps"]
    assert (folder / f"checkpoint-{ended.result['step']}" / "complete").exists()


def test_a_ray_that_does_not_answer_stops_nothing(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(notices, "INTERVAL", 0.1)
    monkeypatch.setattr(notices, "TIMEOUT", 0.5)
    checkpoint = {"uri": f"file://{tmp_path / 'checkpoints'}", "everySteps": 100}
    ended = run(tiny_model, chat_file, checkpoint=checkpoint, hyperparameters={**HYPER, "maxSteps": 20})
    assert ended.code == 0, ended.log
