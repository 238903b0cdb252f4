"""Runs from file to artifact: formats, storage, reports, repeated starts, inspection, signals."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import lifecycle, storage
from tests import tiny
from tests.integration.trainer.conftest import Run

pytestmark = pytest.mark.integration

FORMATS = {
    "Messages": tiny.chat_rows,
    "PromptCompletion": tiny.pair_rows,
    "Alpaca": tiny.alpaca_rows,
    "Text": tiny.text_rows,
}
FEW = {"maxSteps": 2, "globalBatchSize": 8, "maxLength": 128}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the file type that the name asks for; lists become JSON in CSV cells."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
                for row in rows
            )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_every_format_trains_from_every_file_type(
    tiny_model: Path, tmp_path: Path, run: Run, ending: str
) -> None:
    sources = []
    for name, build in FORMATS.items():
        path = write_rows(tmp_path / f"{name}.{ending}", build())
        sources.append({"uri": f"file://{path}", "format": name if ending == "csv" else "Auto"})
    dataset = {"sources": sources, "split": {"eval": 0.05, "seed": 7}}
    ended = run(tiny_model, path, dataset=dataset, hyperparameters=FEW)
    assert ended.code == 0, ended.log
    rows = ended.manifest["dataset"]
    assert rows["trainRows"] + rows["evalRows"] == 160
    assert rows["evalRows"] == 8
    assert rows["digest"].startswith("sha256:")


def test_the_artifact_is_whole_described_and_found_again(tiny_model: Path, chat_file: Path, run: Run) -> None:
    first = run(tiny_model, chat_file, hyperparameters=FEW)
    assert first.code == 0
    manifest = first.manifest
    assert [file["path"] for file in manifest["files"]] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "history.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (first.output / "README.md").read_text()
    assert "library_name: peft" in card
    assert manifest["dataset"]["digest"] in card
    assert json.loads((first.output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model
    )
    again = run(tiny_model, chat_file, hyperparameters=FEW)
    assert again.result["artifact"] == first.result["artifact"]
    assert "holds the whole artifact of this job already" in again.log
    inspected = run(tiny_model, chat_file, only_inspect=True)
    assert inspected.code == 0
    assert inspected.result["artifact"] == first.result["artifact"]


def test_a_base_model_on_a_claim_is_not_called_by_its_path_in_the_pod(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / "models").symlink_to(tiny_model.parent)
    monkeypatch.setenv("FINETUNE_VOLUMES", str(tmp_path / "mnt"))
    uri = f"pvc://models/{tiny_model.name}"
    ended = run(tiny_model, chat_file, model={"uri": uri}, hyperparameters=FEW)
    assert ended.code == 0, ended.log
    assert json.loads((ended.output / "adapter_config.json").read_text())["base_model_name_or_path"] == uri
    card = (ended.output / "README.md").read_text()
    assert f'from_pretrained("path/to/the/base/model")  # a copy of {uri}\n' in card
    assert str(tmp_path) not in card


def test_inspection_finds_a_damaged_file(tiny_model: Path, chat_file: Path, run: Run) -> None:
    output = run(tiny_model, chat_file, hyperparameters=FEW).output
    (output / "history.jsonl").write_text("changed")
    ended = run(tiny_model, chat_file, only_inspect=True)
    assert ended.code == 1
    assert "history.jsonl differs from manifest.json" in ended.result["message"]


def test_chatml_by_name_serves_a_model_without_template(tmp_path: Path, chat_file: Path, run: Run) -> None:
    model = tiny.build_model(tmp_path / "bare", chat_template=None)
    ended = run(
        model, chat_file, model={"uri": f"file://{model}", "chatTemplate": "ChatML"}, hyperparameters=FEW
    )
    assert ended.code == 0
    assert "im_start" in (ended.output / "chat_template.jinja").read_text()


def test_progress_and_result_reach_the_operator(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.trainer.test_progress import Operator, serve

    token = tmp_path / "token"
    token.write_text("secret")
    server: Operator
    with serve() as server:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", server.url)
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
        monkeypatch.setattr("finetune_trainer.progress.POST_INTERVAL", 0.05)
        ended = run(tiny_model, chat_file, hyperparameters={**FEW, "maxSteps": 60})
    assert ended.code == 0
    assert set(server.tokens) == {"Bearer secret"}
    phases = [body["finetune"]["phase"] for body in server.bodies]
    assert phases == sorted(phases, key=["Validating", "Training", "Evaluating", "Exporting"].index)
    assert phases[0] == "Validating"
    assert "Training" in phases
    steps = [body["finetune"]["step"] for body in server.bodies]
    assert steps == sorted(steps)
    assert any(0 < step < 60 for step in steps)
    middle = next(
        body
        for body in server.bodies
        if 0 < body["finetune"]["step"] < 60 and body["trainerStatus"]["metrics"]
    )
    assert {"loss", "learning_rate", "grad_norm"} <= {
        metric["name"] for metric in middle["trainerStatus"]["metrics"]
    }
    assert middle["finetune"]["tokensPerSecond"] > 0
    last = server.bodies[-1]["finetune"]
    assert last["result"] == ended.result
    assert last["effective"]["trainRows"] == 36
    assert last["effective"]["precision"] == "Float32"
    assert last["effective"]["device"].startswith("cpu")
    assert all("result" not in body["finetune"] for body in server.bodies[:-1])


def test_model_data_and_artifact_may_live_in_s3(
    tiny_model: Path, chat_file: Path, bucket: str, run: Run
) -> None:
    filesystem, _ = storage.open_filesystem(bucket)
    for file in tiny_model.iterdir():
        filesystem.put_file(str(file), f"training/models/tiny/{file.name}")
    filesystem.put_file(str(chat_file), "training/data/chat.jsonl")
    parts: dict[str, Any] = {
        "model": {"uri": f"{bucket}/models/tiny"},
        "dataset": {"sources": [{"uri": f"{bucket}/data/chat.jsonl"}], "split": {"eval": 0.1, "seed": 1}},
        "output": {"uri": f"{bucket}/out"},
        "hyperparameters": FEW,
    }
    ended = run(tiny_model, chat_file, **parts)
    assert ended.code == 0, ended.log
    assert filesystem.exists("training/out/manifest.json")
    assert (
        run(tiny_model, chat_file, only_inspect=True, **parts).result["artifact"] == ended.result["artifact"]
    )
    assert run(tiny_model, chat_file, **parts).result["artifact"] == ended.result["artifact"]
    missing = run(
        tiny_model,
        chat_file,
        **{**parts, "model": {"uri": f"{bucket}/none"}, "output": {"uri": f"{bucket}/o2"}},
    )
    assert (missing.code, missing.result["class"]) == (66, "ModelNotFound")
    parts["dataset"] = {"sources": [{"uri": f"{bucket}/data/none.jsonl"}]}
    assert run(tiny_model, chat_file, **{**parts, "output": {"uri": f"{bucket}/o3"}}).code == 65
    assert not filesystem.find("training/o2")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_and_commits_nothing(
    tiny_model: Path, chat_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    document = tiny.run_document(
        tiny_model, chat_file, tmp_path / "out", hyperparameters={**FEW, "maxSteps": 100_000}
    )
    (tmp_path / "run.json").write_text(json.dumps(document))
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer", "run", "--run-file", str(tmp_path / "run.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(number)
    started = time.monotonic()
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("TRAINER_RESULT "):  # a pod's own SIGTERM comes while the process ends
            while process.poll() is None:
                process.terminate()
                time.sleep(0.01)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - started < 10
    assert f"stopped by {number.name} at step" in errors
    assert ('TRAINER_RESULT {"class": "Preempted"' in output) == (code == 75)
    assert not (tmp_path / "out").exists()


def test_the_environment_keeps_the_hub_quiet_for_local_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    lifecycle.prepare_environment(["hf://a/b", "file:///c"])
    assert "HF_HUB_OFFLINE" not in os.environ
    lifecycle.prepare_environment(["file:///c", "s3://b/c"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "OMP_NUM_THREADS" not in os.environ
