"""finetune-trainer check: numbers before a GPU is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import early_fit, runfile
from finetune_trainer.failures import BadConfig, BadData, ModelNotFound
from tests import tiny
from tests.buckets import open_bucket, serve_bucket

LARGE = {  # Llama 3.1 70B
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}


def run_file(folder: Path, model: str, **parts: Any) -> runfile.RunFile:
    data = tiny.write_jsonl(folder / "chat.jsonl", tiny.chat_rows())
    document = tiny.run_document(
        Path("/nowhere"), data, folder / "out", **{"accelerator": "NVIDIA-L4", **parts}
    )
    return runfile.parse(json.dumps(document | {"model": {"uri": model}}))


def test_a_small_model_fits_and_the_numbers_are_told(tiny_model: Path, tmp_path: Path) -> None:
    found = early_fit.check(run_file(tmp_path, f"file://{tiny_model}"), tmp_path)
    assert "NVIDIA-L4 has 22.5 GiB" in found
    assert not (tmp_path / "out").exists(), "nothing is claimed"


def test_a_gpu_that_is_not_in_the_table_is_said_to_be_so(tiny_model: Path, tmp_path: Path) -> None:
    found = early_fit.check(run_file(tmp_path, f"file://{tiny_model}", accelerator="Acme-9000"), tmp_path)
    assert "the memory of GPU Acme-9000 is not known" in found


def test_where_no_gpu_is_named_that_is_said(tiny_model: Path, tmp_path: Path) -> None:
    found = early_fit.check(run_file(tmp_path, f"file://{tiny_model}", accelerator=None), tmp_path)
    assert "no GPU is named, so that was compared with nothing" in found


def test_a_job_that_may_run_out_of_memory_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight_billion = LARGE | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    numbers = {"maxSteps": 4, "globalBatchSize": 8, "maxLength": 1024}
    with serve_bucket("models") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        open_bucket(environment).pipe("models/llama/config.json", json.dumps(eight_billion).encode())
        found = early_fit.check(
            run_file(tmp_path, "s3://models/llama", hyperparameters=numbers), tmp_path / "work"
        )
    assert found.startswith("may run out of memory: needs about ")


def test_data_and_model_are_checked_too(tiny_model: Path, tmp_path: Path) -> None:
    run = run_file(tmp_path, f"file://{tiny_model}")
    (tmp_path / "chat.jsonl").write_text('{"messages": 1}\n')
    with pytest.raises(BadData, match="line 1"):
        early_fit.check(run, tmp_path)
    with pytest.raises(ModelNotFound, match="nowhere"):
        early_fit.check(run_file(tmp_path, "file:///nowhere"), tmp_path)


def test_a_model_in_a_bucket_is_known_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_bucket("models") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        open_bucket(environment).pipe("models/llama/config.json", json.dumps(LARGE).encode())
        full = {"method": {"type": "Full"}}
        with pytest.raises(
            BadConfig, match=r"Full of this model does not fit: .*NVIDIA-L4 has 22.5 GiB"
        ) as refusal:
            early_fit.check(run_file(tmp_path, "s3://models/llama", **full), tmp_path / "work")
        assert "resources.fitCheck: Skip" in str(refusal.value)
        with pytest.raises(ModelNotFound, match=r"has no config.json"):
            early_fit.check(run_file(tmp_path, "s3://models/other"), tmp_path / "work")


def test_a_family_that_is_not_known_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_bucket("models") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        open_bucket(environment).pipe("models/new/config.json", b'{"model_type": "brand_new"}')
        found = early_fit.check(run_file(tmp_path, "s3://models/new"), tmp_path / "work")
    assert "not estimated" in found


def test_the_command_says_what_it_found_and_imports_no_torch(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(
        run_file(tmp_path, f"file://{tiny_model}").model_dump_json(by_alias=True, exclude_none=True)
    )
    program = (
        "import sys; from finetune_trainer import __main__ as m; code = m.main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    arguments = [sys.executable, "-c", program, "check", "--run-file", str(file)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert '"class": "Checked"' in done.stdout
    assert done.stdout.rstrip().endswith("False")
