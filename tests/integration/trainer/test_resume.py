"""A run that was stopped, killed or robbed of a checkpoint ends exactly as one that was left alone."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import storage
from tests import tiny
from tests.buckets import serve_bucket
from tests.integration.trainer.conftest import Ended, Run
from tests.integration.trainer.stopping import (
    StopAt,
    assert_same,
    job,
    losses,
    schedule,
    whole,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

# Dropout, so that the state of the random numbers counts; an odd number of rows, so that epochs end in a short step.
LORA = {"type": "LoRA", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targetModules": ["all-linear"]}}
STEPS = 24  # after a stop in step 12 there are two evaluations and two ends of epochs
HYPER = {"maxSteps": STEPS, "globalBatchSize": 8, "microBatchSize": 4, "maxLength": 64, "evalSteps": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.mark.parametrize(
    "parts",
    [
        {"method": LORA},
        {"method": {"type": "Full"}},
        {"method": {**LORA, "type": "QLoRA", "quantization": {}}},
        {
            "method": LORA,
            "hyperparameters": {
                **HYPER,
                "packing": True,
                "neftuneAlpha": 5.0,
                "scheduler": "Linear",
                "optimizer": "SGD",
                "learningRate": 0.1,
            },
        },
        {
            "method": LORA,
            "hyperparameters": {**HYPER, "optimizer": "AdamW8bit", "gradientCheckpointing": True},
        },
    ],
    ids=["lora", "full", "qlora", "packing-neftune-sgd", "adamw8bit"],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    alone: Run,
    run_stopped: Callable[..., Ended],
    folder: Path,
    parts: dict[str, Any],
) -> None:
    parts = {"hyperparameters": HYPER, **parts}
    undisturbed = alone(tiny_model, chat_file, **parts)
    step = 12
    stopped = run_stopped(
        StopAt(step), tiny_model, chat_file, checkpoint=schedule(folder), job=job(1), **parts
    )
    assert (stopped.code, stopped.result["class"]) == (75, "Preempted"), stopped.log
    assert stopped.result["step"] == step
    assert f"stopped by SIGTERM after step {step}" in stopped.result["message"]
    assert whole(folder) == [5, 10, step]  # the oldest is left where time is short
    assert not stopped.output.exists()
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert f"resuming from file://{folder}/checkpoint-{step}" in resumed.log
    assert f"trained to step {STEPS} (from {step})" in resumed.log
    assert_same(resumed, undisturbed)
    assert resumed.manifest["metrics"]["trainSeconds"] > 0
    assert not folder.exists()  # the artifact is committed: nothing is left to go back to


@pytest.mark.parametrize("back", [0, 2, 3])
def test_early_stopping_remembers_its_patience_and_the_best_weights(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    alone: Run,
    run_stopped: Callable[..., Ended],
    folder: Path,
    back: int,
) -> None:
    # So large a rate that the best weights are early ones and patience runs out.
    parts: dict[str, Any] = {
        "method": LORA,
        "hyperparameters": {
            **HYPER,
            "maxSteps": 60,
            "evalSteps": 2,
            "learningRate": 0.3,
            "scheduler": "Constant",
            "warmupRatio": 0,
        },
        "earlyStopping": {"patience": 3},
    }
    undisturbed = alone(tiny_model, chat_file, **parts)
    last = undisturbed.manifest["metrics"]["step"]
    assert 8 < last < 60
    stop = StopAt(last - back)
    stopped = run_stopped(stop, tiny_model, chat_file, checkpoint=schedule(folder), job=job(1), **parts)
    assert stopped.code == 75, stopped.log
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert_same(resumed, undisturbed)
    assert resumed.manifest["metrics"] | {"trainSeconds": 0, "tokensPerSecond": 0} == undisturbed.manifest[
        "metrics"
    ] | {"trainSeconds": 0, "tokensPerSecond": 0}


@pytest.fixture(scope="session")
def kept_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders for what `interrupted` leaves, by what was run."""
    root, numbers = tmp_path_factory.mktemp("kept"), itertools.count()
    return functools.cache(lambda key: root / str(next(numbers)))


@pytest.fixture
def interrupted(
    tiny_model: Path,
    chat_file: Path,
    run_stopped: Callable[..., Ended],
    folder: Path,
    kept_checkpoints: Callable[[str], Path],
) -> Callable[..., int]:
    """Leaves the checkpoints 5, 10 and 12 of a run that was stopped; returns the newest one's step.

    The run is made once for all tests that begin with the same one; each gets a copy of what it left.
    """

    def interrupted(**parts: Any) -> int:
        kept = kept_checkpoints(json.dumps(parts, sort_keys=True))
        if not kept.exists():
            stopped = run_stopped(
                StopAt(12), tiny_model, chat_file, checkpoint=schedule(folder), job=job(1), **parts
            )
            assert stopped.code == 75, stopped.log
            assert stopped.result["step"] == 12
            folder.rename(kept)
        shutil.copytree(kept, folder)
        return 12

    return interrupted


def test_nothing_is_left_to_train_after_a_stop_at_the_last_step(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, folder: Path, run_stopped: Callable[..., Ended]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": {**HYPER, "evalSteps": STEPS}}
    undisturbed = alone(tiny_model, chat_file, **parts)
    stop = StopAt(STEPS)
    stopped = run_stopped(stop, tiny_model, chat_file, checkpoint=schedule(folder), job=job(1), **parts)
    assert stopped.code == 75, stopped.log
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert f"trained to step {STEPS} (from {STEPS})" in resumed.log
    assert_same(resumed, undisturbed)


def test_a_corrupt_checkpoint_gives_way_to_the_one_before(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, folder: Path, interrupted: Callable[..., int]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    undisturbed = alone(tiny_model, chat_file, **parts)
    newest = interrupted(**parts)
    before = whole(folder)[-2]
    file = folder / f"checkpoint-{newest}/optimizer.pt"
    content = file.read_bytes()
    file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert (
        f"checkpoint-{newest} is corrupt (optimizer.pt differs from manifest.json (SHA-256))" in resumed.log
    )
    assert f"resuming from file://{folder}/checkpoint-{before}" in resumed.log
    assert_same(resumed, undisturbed)


def test_where_nothing_can_be_trusted_training_begins_anew(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, folder: Path, interrupted: Callable[..., int]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    undisturbed = alone(tiny_model, chat_file, **parts)
    interrupted(**parts)
    for file in folder.glob("*/adapter_model.safetensors"):
        file.write_bytes(b"garbage")
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert resumed.log.count("is corrupt") == 2 or resumed.log.count("is corrupt") == 3
    assert "resuming" not in resumed.log
    assert_same(resumed, undisturbed)


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """As another version of the trainer could have left it: every digest is right, the content is not."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["path"] == name:
            file["sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(manifest).encode()
    (checkpoint / "manifest.json").write_bytes(text)
    (checkpoint / "complete").write_text(f"sha256:{hashlib.sha256(text).hexdigest()}")


def test_a_state_of_another_version_gives_way_to_the_checkpoint_before(
    tiny_model: Path, chat_file: Path, run: Run, folder: Path, interrupted: Callable[..., int]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    newest = interrupted(**parts)
    before = whole(folder)[-2]
    replace_file(folder / f"checkpoint-{newest}", "trainer_state.json", b'{"global_step": 12}')
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert f"checkpoint-{newest} is corrupt (trainer_state.json cannot be read" in resumed.log
    assert f"trained to step {STEPS} (from {before})" in resumed.log


def test_a_state_of_a_later_version_that_knows_more_is_used(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, folder: Path, interrupted: Callable[..., int]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    undisturbed = alone(tiny_model, chat_file, **parts)
    newest = interrupted(**parts)
    state = json.loads((folder / f"checkpoint-{newest}/trainer_state.json").read_text())
    content = json.dumps({**state, "is_something_new": True}).encode()
    replace_file(folder / f"checkpoint-{newest}", "trainer_state.json", content)
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert f"trained to step {STEPS} (from {newest})" in resumed.log
    assert_same(resumed, undisturbed)


def test_a_checkpoint_that_is_whole_but_cannot_be_loaded_ends_the_attempt_and_is_not_used_again(
    tiny_model: Path, chat_file: Path, run: Run, folder: Path, interrupted: Callable[..., int]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    newest = interrupted(**parts)
    replace_file(folder / f"checkpoint-{newest}", "optimizer.pt", b"of another world")
    failed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert (failed.code, failed.result["class"]) == (84, "CheckpointCorrupt"), failed.log
    assert f"checkpoint-{newest} cannot be loaded" in failed.result["message"]
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(3), **parts)
    assert resumed.code == 0
    assert "resuming from" in resumed.log
    assert f"(from {newest})" not in resumed.log


@pytest.mark.parametrize(
    "change",
    [
        {"job": {**job(2), "uid": "uid-2"}},
        {"hyperparameters": {**HYPER, "learningRate": 1e-3}},
        {"checkpoint": {"resume": "Never"}},
        {"data": 1},
    ],
    ids=["uid", "settings", "never", "data"],
)
def test_no_other_runs_checkpoint_is_taken(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    interrupted: Callable[..., int],
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    interrupted(**parts)
    data = chat_file
    if "data" in change:
        data = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.chat_rows(shift=1))
    parts = {"job": job(2), **parts, **{key: value for key, value in change.items() if key != "data"}}
    parts["checkpoint"] = schedule(folder, **change.get("checkpoint", {}))
    again = run(tiny_model, data, **parts)
    assert again.code == 0, again.log
    assert "resuming" not in again.log
    assert len(losses(again)) == STEPS


def test_checkpoints_live_in_s3(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, bucket: str, run_stopped: Callable[..., Ended]
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    undisturbed = alone(tiny_model, chat_file, **parts)
    filesystem, _ = storage.open_filesystem(bucket)
    uri = f"{bucket}/ck"
    stopped = run_stopped(StopAt(12), tiny_model, chat_file, checkpoint=schedule(uri), job=job(1), **parts)
    assert stopped.code == 75, stopped.log
    newest = stopped.result["step"]
    filesystem.pipe_file(f"training/ck/checkpoint-{newest}/rng_state.pth", b"broken")
    resumed = run(tiny_model, chat_file, checkpoint=schedule(uri), job=job(2), **parts)
    assert f"{uri}/checkpoint-{newest} is corrupt" in resumed.log
    assert f"resuming from {uri}/checkpoint-" in resumed.log
    assert_same(resumed, undisturbed)
    assert filesystem.find("training/ck") == []


def test_a_store_that_goes_away_is_storage_trouble(
    tiny_model: Path, chat_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with serve_bucket("training") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
        ended = run(tiny_model, chat_file, checkpoint=schedule("s3://training/ck"), hyperparameters=HYPER)
    assert (ended.code, ended.result["class"]) == (74, "Storage"), ended.log
    assert not ended.output.exists()


@pytest.mark.parametrize("steps", [20, 900], ids=["every step is logged", "every second step is logged"])
def test_a_run_that_is_not_finite_keeps_its_last_finite_checkpoint(
    tiny_model: Path, chat_file: Path, run: Run, folder: Path, steps: int
) -> None:
    import torch
    from safetensors.torch import load_file

    broken = {**HYPER, "maxSteps": steps, "learningRate": 1e25, "warmupRatio": 0.9, "evalSteps": steps}
    ended = run(
        tiny_model,
        chat_file,
        method=LORA,
        hyperparameters=broken,
        checkpoint=schedule(folder, everySteps=1, keep=1),
    )
    assert (ended.code, ended.result["class"]) == (82, "NotFinite"), ended.log
    [step] = whole(folder)
    assert f"The last finite checkpoint is file://{folder}/checkpoint-{step}" in ended.result["message"]
    assert step < ended.result["step"]
    state = load_file(folder / f"checkpoint-{step}/adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_a_smaller_micro_batch_keeps_the_global_batch_and_the_course(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, folder: Path, interrupted: Callable[..., int]
) -> None:
    method = {**LORA, "lora": {**LORA["lora"], "dropout": 0.0}}  # type: ignore[dict-item]
    parts: dict[str, Any] = {"method": method, "hyperparameters": {**HYPER, "microBatchSize": 8}}
    undisturbed = alone(tiny_model, chat_file, **parts)
    assert undisturbed.manifest["hyperparameters"]["microBatchSize"] == 8
    interrupted(**parts)
    resumed = run(
        tiny_model,
        chat_file,
        checkpoint=schedule(folder),
        overrides={"microBatchSize": 3},  # 2 is the largest divisor of 8 up to it
        job=job(2),
        **parts,
    )
    assert resumed.code == 0, resumed.log
    assert "resuming from" in resumed.log
    assert "microBatchSize: 2 (override, at most 3)" in resumed.log
    used = resumed.manifest["hyperparameters"]
    assert (used["microBatchSize"], used["globalBatchSize"]) == (2, 8)
    mine, theirs = losses(resumed), losses(undisturbed)
    assert [entry["step"] for entry in mine] == [entry["step"] for entry in theirs]
    assert all(
        math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
        and math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-2)
        for a, b in zip(mine, theirs, strict=True)
    )


def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(
    tiny_model: Path, run: Run, alone: Run, folder: Path, tmp_path: Path, run_stopped: Callable[..., Ended]
) -> None:
    data = tiny.write_jsonl(tmp_path / "many.jsonl", tiny.chat_rows())
    parts: dict[str, Any] = {
        "method": LORA,
        "dataset": {"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0.5, "seed": 1}},
        "hyperparameters": {**HYPER, "maxSteps": 8, "evalSteps": 4, "microBatchSize": 1},
    }
    undisturbed = alone(tiny_model, data, **parts)
    stop = StopAt(4, during="evaluation")
    stopped = run_stopped(
        stop, tiny_model, data, checkpoint=schedule(folder, everySteps=3), job=job(1), **parts
    )
    assert (stopped.code, stopped.result["step"]) == (75, 4), stopped.log
    assert "eval loss" not in stopped.log
    resumed = run(tiny_model, data, checkpoint=schedule(folder, everySteps=3), job=job(2), **parts)
    assert_same(resumed, undisturbed)


def test_a_stop_in_a_long_step_gives_that_step_up(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    alone: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_stopped: Callable[..., Ended],
) -> None:
    parts: dict[str, Any] = {
        "method": LORA,
        "hyperparameters": {**HYPER, "maxSteps": 20, "microBatchSize": 1},
    }
    undisturbed = alone(tiny_model, chat_file, **parts)
    monkeypatch.setattr("finetune_trainer.saving.LONG_REST", 0.0)  # every step is long
    stop = StopAt(13, during="substep")
    stopped = run_stopped(stop, tiny_model, chat_file, checkpoint=schedule(folder), job=job(1), **parts)
    assert (stopped.code, stopped.result["step"]) == (75, 12), stopped.log
    assert "step 13 is given up" in stopped.log
    assert max(whole(folder)) == 12
    resumed = run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts)
    assert "(from 12)" in resumed.log
    assert_same(resumed, undisturbed)


def test_what_is_newest_and_whole_is_reported(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_stopped: Callable[..., Ended],
) -> None:
    from tests.unit.trainer.test_progress import serve

    parts: dict[str, Any] = {"method": LORA, "hyperparameters": HYPER}
    with serve() as server:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", server.url)
        monkeypatch.setattr("finetune_trainer.progress.POST_INTERVAL", 0.02)
        stopped = run_stopped(
            StopAt(12), tiny_model, chat_file, checkpoint=schedule(folder), job=job(1), **parts
        )
        assert stopped.code == 75, stopped.log
        newest = stopped.result["step"]
        told = {"step": newest, "uri": f"file://{folder}/checkpoint-{newest}"}
        last = server.bodies[-1]["finetune"]
        assert (last["checkpoint"], last["resumedFromStep"]) == (told, 0)
        assert last["result"]["class"] == "Preempted"

        inspected = run(tiny_model, chat_file, checkpoint=schedule(folder), only_inspect=True, **parts)
        assert inspected.code == 1  # no artifact
        assert server.bodies[-1]["finetune"]["checkpoint"] == told

        assert run(tiny_model, chat_file, checkpoint=schedule(folder), job=job(2), **parts).code == 0
        last = server.bodies[-1]["finetune"]
        assert last["resumedFromStep"] == newest
        assert "checkpoint" not in last  # gone with the commit


def test_minutes_make_checkpoints_too(tiny_model: Path, chat_file: Path, run: Run, folder: Path) -> None:
    by_minutes = {"uri": f"file://{folder}", "everyMinutes": 0.2 / 60, "keep": 1}
    hyperparameters = {**HYPER, "maxSteps": 60}  # more than a second, and less than 0.2 s each
    ended = run(tiny_model, chat_file, method=LORA, hyperparameters=hyperparameters, checkpoint=by_minutes)
    assert ended.code == 0
    assert 1 <= ended.log.count(" saved in ") < 60


# ---------------------------------------------------------------- processes of their own


def start(document: dict[str, Any], folder: Path, **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(document))
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer", "run", "--run-file", str(folder / "run.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_in_mid_save(process: subprocess.Popen[str], folder: Path, *, after: int) -> list[str]:
    """Kills the process while a checkpoint later than `after` is half written; returns the names of that half."""
    wait_until(lambda: whole(folder), seconds=240, what="the first checkpoint")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for entry in folder.glob("checkpoint-*"):
            if int(entry.name.removeprefix("checkpoint-")) <= after or (entry / "complete").exists():
                continue
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            names = sorted(path.name for path in entry.iterdir())
            if names and "complete" not in names and len(whole(folder)) > 0:
                process.kill()
                process.wait()
                return names
            process.send_signal(signal.SIGCONT)
    process.kill()
    raise AssertionError("no save was caught half way")


def test_a_process_killed_in_mid_save_leaves_nothing_that_could_be_taken_for_a_checkpoint(
    tiny_model: Path, chat_file: Path, run: Run, alone: Run, folder: Path, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {"method": LORA, "hyperparameters": {**HYPER, "maxSteps": 30}}
    often = schedule(folder, everySteps=1)
    undisturbed = alone(tiny_model, chat_file, **parts)
    document = tiny.run_document(
        tiny_model, chat_file, tmp_path / "out", checkpoint=often, job=job(1), **parts
    )
    half = kill_in_mid_save(start(document, tmp_path / "p"), folder, after=8)
    assert "complete" not in half
    newest = max(whole(folder))
    resumed = run(tiny_model, chat_file, checkpoint=often, job=job(2), **parts)
    assert f"resuming from file://{folder}/checkpoint-{newest}" in resumed.log
    assert_same(resumed, undisturbed)
    assert not folder.exists()


def test_the_stop_command_of_a_pod_waits_for_the_checkpoint(
    tiny_model: Path, chat_file: Path, folder: Path, tmp_path: Path
) -> None:
    document = tiny.run_document(
        tiny_model,
        chat_file,
        tmp_path / "out",
        method=LORA,
        hyperparameters={**HYPER, "maxSteps": 100_000, "evalSteps": 100_000},
        checkpoint={"uri": f"file://{folder}"},  # no interval: only a stop makes one
        job=job(1),
    )
    process = start(document, tmp_path / "p")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    command = [sys.executable, "-m", "finetune_trainer", "stop", "--wait", "30"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path / "p")}
    # The pipe is read while the process ends: nobody waits for a reader.
    asked = subprocess.Popen(command, env={**os.environ, **environment})
    output, _ = process.communicate(timeout=60)
    assert asked.wait(timeout=30) == 0
    assert process.returncode == 75, output
    [step] = whole(folder)
    result = json.loads(output.strip().splitlines()[-1].removeprefix("TRAINER_RESULT "))
    assert result["class"] == "Preempted"
    assert result["step"] == step
    assert subprocess.run(command, env={**os.environ, **environment}, check=False).returncode == 0
