"""A run that goes on though the operator has given it up: it ends by itself and leaves its successor in peace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from finetune_trainer import artifacts, checkpoints, storage
from finetune_trainer.runfile import Job
from tests.integration.trainer.conftest import Ended, Run
from tests.integration.trainer.stopping import job, schedule, whole

pytestmark = pytest.mark.integration

HYPER = {"maxSteps": 12, "globalBatchSize": 8, "maxLength": 64}


class TakeOver(transformers.TrainerCallback):  # type: ignore[misc]
    """Begins another attempt, or the job created again, in the middle of this one: it claims both folders."""

    def __init__(self, output: Path, folder: Path, owner: dict[str, Any]) -> None:
        self.output, self.folder, self.owner = output, folder, Job.model_validate(owner)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            artifacts.claim_folder(storage.open_folder(f"file://{self.output}"), self.owner)
            checkpoints.Store(storage.open_folder(f"file://{self.folder}"), self.owner).claim()


@pytest.mark.parametrize(
    ("successor", "resumes", "text"),
    [
        (job(2), 5, "attempt 2 has taken over"),
        ({**job(1), "uid": "uid-2"}, 0, "job default/tiny was created again and has taken over"),
    ],
    ids=["attempt", "recreated"],
)
def test_a_lost_run_ends_at_its_next_checkpoint_and_the_successor_succeeds(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    run_stopped: Callable[..., Ended],
    tmp_path: Path,
    successor: dict[str, Any],
    resumes: int,
    text: str,
) -> None:
    parts = {"hyperparameters": HYPER, "checkpoint": schedule(tmp_path / "ck")}
    lost = run_stopped(TakeOver(tmp_path / "out", tmp_path / "ck", successor), tiny_model, chat_file, **parts)
    assert (lost.code, lost.result["class"]) == (75, "Preempted")
    assert text in lost.result["message"]
    assert json.loads((tmp_path / "out/.finetune-job.json").read_text()) == successor
    assert whole(tmp_path / "ck") == [5]

    ended = run(tiny_model, chat_file, job=successor, **parts)
    assert ended.code == 0, ended.log
    assert ended.manifest["job"] == successor
    assert ("resuming from" in ended.log) == bool(resumes)
    assert run(tiny_model, chat_file, job=successor, only_inspect=True, **parts).code == 0


def test_a_lost_run_without_checkpoints_takes_the_artifact_that_its_successor_committed(
    tiny_model: Path, chat_file: Path, run: Run, run_stopped: Callable[..., Ended], tmp_path: Path
) -> None:
    done = run(tiny_model, chat_file, job=job(2), hyperparameters={**HYPER, "seed": 7}, name="done")

    class Committed(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                (tmp_path / "out").rename(tmp_path / "claimed")
                done.output.rename(tmp_path / "out")

    lost = run_stopped(Committed(), tiny_model, chat_file, hyperparameters=HYPER)
    assert lost.code == 0, lost.log
    assert "holds the artifact of another attempt of this job: it is the result" in lost.log
    assert lost.result["artifact"]["digest"] == done.result["artifact"]["digest"]
    assert lost.manifest["job"]["attempt"] == 2
