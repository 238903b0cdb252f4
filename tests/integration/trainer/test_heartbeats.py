"""What takes long beside steps is heard of: loading, each batch of an evaluation, each micro batch, uploads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from finetune_trainer.progress import Phase, Reporter
from tests.integration.trainer.conftest import Run
from tests.integration.trainer.stopping import schedule

pytestmark = pytest.mark.integration


def test_a_run_beats_in_every_phase(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: Counter[tuple[Phase, int]] = Counter()

    def count(reporter: Reporter) -> None:
        beats[reporter._state.phase, reporter.step] += 1

    monkeypatch.setattr(Reporter, "beat", count)
    ended = run(
        tiny_model,
        chat_file,
        hyperparameters={
            "maxSteps": 2,
            "globalBatchSize": 8,
            "microBatchSize": 2,
            "maxLength": 64,
            "evalSteps": 1,
        },
        dataset={"sources": [{"uri": f"file://{chat_file}"}], "split": {"eval": 0.5, "seed": 42}},
        checkpoint=schedule(tmp_path / "ck", everySteps=1),
    )
    assert ended.code == 0, ended.log
    assert beats[Phase.VALIDATING, 0] >= 20  # the data and each weight
    assert beats[Phase.TRAINING, 0] == 3  # of four micro batches; the last one ends the step
    assert beats[Phase.TRAINING, 1] >= 3 + 5  # the evaluation's batches too, and the checkpoint's files
    assert beats[Phase.EXPORTING, 2] >= 5  # the artifact's files
