"""`finetune plan`: files of models and prices as users have them, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from finetune_cli import job_plans, model_files
from finetune_cli.__main__ import app
from finetune_cli.model_files import ModelNotReachableError
from tests.unit.fit import models

GPU = {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4", "memory": "32Gi"}


def document(uri: str = "hf://acme/llama", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "triage"},
        "spec": {
            "model": {"uri": uri},
            "dataset": {"sources": [{"uri": "pvc://files/train.jsonl"}]},
            "resources": GPU,
            "hyperparameters": {"maxLength": 256, "microBatchSize": 1},
            **spec,
        },
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(models.LLAMA_3_8B), encoding="utf-8")
    return folder


def run(tmp_path: Path, body: dict[str, Any], *arguments: str, code: int = 0, **environ: str) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "COLUMNS": "200", **environ}
    done = CliRunner().invoke(app, ["plan", "-f", str(file), *arguments], env=offline)
    assert done.exit_code == code, done.output
    return done.output


def test_a_job_that_does_not_fit_says_what_would(tmp_path: Path, model: Path) -> None:
    text = run(tmp_path, document(f"file://{model}", method={"type": "Full"}, hyperparameters={}), code=3)
    assert "triage: does not fit: weights, gradients and optimizer states alone need 119.7 GiB" in text
    assert "NVIDIA-L4 has 22.5 GiB" in text
    assert "method QLoRA" in text
    assert "smallest GPU: none of the table is large enough" in text


def test_a_job_that_fits_is_planned_with_its_cost(tmp_path: Path, model: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\ngpuHour: {NVIDIA-L4: 0.8}\n", encoding="utf-8")
    spec = {
        "method": {"type": "QLoRA", "quantization": {}},
        "hyperparameters": {"maxSteps": 100, "maxLength": 512, "gradientCheckpointing": True},
    }
    body = document(f"file://{model}", **spec)
    text = run(tmp_path, body, "--prices", str(prices))
    assert "triage: fits: needs about" in text
    assert "steps: 100, at most about" in text
    assert "cost: at most about 0." in text
    assert "EUR" in text
    (data,) = json.loads(run(tmp_path, body, "--prices", str(prices), "-o", "json"))
    assert data["fit"] == "Fits"
    assert data["memory"]["total"] == sum(size for part, size in data["memory"].items() if part != "total")
    assert data["cost"]["estimated"] == pytest.approx(data["seconds"] / 3600 * 0.8, abs=0.01)
    assert data["trainedParameters"] == 41_943_040
    assert yaml.safe_load(run(tmp_path, body, "-o", "yaml"))[0]["memory"] == data["memory"]


def test_rows_of_local_files_become_steps(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a"}\n' * 100 + "\n", encoding="utf-8")
    dataset = {"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0.2}}
    (found,) = json.loads(run(tmp_path, document(f"file://{model}", dataset=dataset), "-o", "json"))
    assert found["steps"] == 15  # 3 epochs of 80 rows, 16 a step
    (told,) = json.loads(run(tmp_path, document(f"file://{model}"), "-o", "json", "--rows", "100"))
    assert told["steps"] == 18
    assert "steps" not in json.loads(run(tmp_path, document(f"file://{model}"), "-o", "json"))[0]


def test_a_gpu_that_is_named_on_the_command_line(tmp_path: Path, model: Path) -> None:
    body = document(f"file://{model}", resources={"gpusPerWorker": 1})
    assert "name one with --accelerator" in run(tmp_path, body)
    assert "NVIDIA-H100-80GB-HBM3 has 79.6 GiB" in run(tmp_path, body, "--accelerator", "h100")
    text = run(tmp_path, body, "--accelerator", "abacus", code=4)
    assert "abacus is not in the table" in text


def test_a_job_that_may_run_out_of_memory_does_not_pass_for_one_that_fits(
    tmp_path: Path, model: Path
) -> None:
    body = document(f"file://{model}", hyperparameters={"maxLength": 1024})
    assert "triage: may run out of memory: needs about 87.2 GiB" in run(tmp_path, body, code=5)
    narrow = document(f"file://{model}", hyperparameters={"maxLength": 512, "microBatchSize": 1})
    assert "triage: may run out of memory: " in run(tmp_path, narrow)


def test_a_job_on_the_cpu_is_compared_with_the_pods_memory(tmp_path: Path, model: Path) -> None:
    body = document(f"file://{model}", resources={"memory": "4Gi"})
    text = run(tmp_path, body, code=3)
    assert "the training pod has 4.0 GiB" in text
    assert "smallest GPU" not in text


def test_a_model_that_cannot_be_read_from_here_says_so(tmp_path: Path, model: Path) -> None:
    text = run(tmp_path, document(), code=4)
    assert "triage: not estimated: hf://acme/llama is not in the cache and HF_HUB_OFFLINE is set" in text
    assert "--model" in text
    assert "s3:// is read in the cluster only" in run(tmp_path, document("s3://b/m"), code=4)
    assert "triage: " in run(tmp_path, document(), "--model", str(model))
    data = json.loads(run(tmp_path, document(), "-o", "json", code=4))
    assert data[0]["fit"] == "Unknown"
    assert "not estimated" in data[0]["message"]


def test_a_model_in_the_hubs_cache_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--acme--llama"
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(models.LLAMA_3_8B), encoding="utf-8")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc", encoding="utf-8")
    assert "triage: " in run(tmp_path, document())
    pinned = document()
    pinned["spec"]["model"]["revision"] = "0123abc"
    assert "triage: " in run(tmp_path, pinned)
    pinned["spec"]["model"]["revision"] = "another"
    assert "not in the cache" in run(tmp_path, pinned, code=4)


def test_a_hub_that_does_not_answer_is_told(tmp_path: Path) -> None:
    environ = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the hub does not answer" in run(tmp_path, document(), code=4, **environ)


def test_a_chain_needs_a_model_of_the_same_shape(tmp_path: Path, model: Path) -> None:
    body = document()
    body["spec"]["model"] = {"fineTuneJobRef": {"name": "first"}}
    assert "another job's artifact" in run(tmp_path, body, code=4)
    assert "triage: " in run(tmp_path, body, "--model", str(model / "config.json"))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{"])
def test_a_broken_config_is_no_crash(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelNotReachableError, match=r"config\.json"):
        model_files.find(None, None, folder=tmp_path, environ={})


def test_broken_weights_leave_the_configuration(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert model_files.find(f"file://{model}", None, folder=None, environ={}).tensors is None


def test_a_spec_that_is_not_valid_names_the_field(tmp_path: Path) -> None:
    text = run(tmp_path, document(hyperparameters={"maxLength": -5}), code=1)
    assert "spec.hyperparameters.maxLength: -5: " in text


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"hyperparameters": {"maxSteps": "3"}}, 'maxSteps: "3": Input should be a valid integer'),
        ({"hyperparameters": {"packing": "true"}}, 'packing: "true": Input should be a valid boolean'),
        (
            {"resources": {"memory": "4GB"}},
            'memory: "4GB": must be a Kubernetes quantity such as 2, 500m or 8Gi',
        ),
        ({"resources": {"gpu": 1}}, "gpu: unknown field; did you mean gpusPerWorker?"),
    ],
)
def test_what_the_api_server_would_refuse_is_not_planned(
    tmp_path: Path, model: Path, part: dict[str, Any], complaint: str
) -> None:
    ((field, _),) = part.items()
    assert f"spec.{field}.{complaint}" in run(tmp_path, document(f"file://{model}", **part), code=1)


def test_whole_numbers_may_be_written_as_kubectl_reads_them(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "job.yaml"
    numbers = {"maxSteps": "STEPS", "epochs": 3, "learningRate": 1, "microBatchSize": 1}
    body = document(f"file://{model}", hyperparameters=numbers, resources={"cpu": 2, "memory": "1e11"})
    file.write_text(yaml.safe_dump(body).replace("STEPS", "2e1"), encoding="utf-8")
    done = CliRunner().invoke(app, ["plan", "-f", str(file)])
    assert done.exit_code == 0, done.output
    assert "steps: 20\n" in done.output


def test_files_that_cannot_be_read(tmp_path: Path, model: Path) -> None:
    bad = tmp_path / "prices.yaml"
    bad.write_text("gpuHour: {L4: cheap}", encoding="utf-8")
    assert "gpuHour.L4: 'cheap'" in run(tmp_path, document(f"file://{model}"), "--prices", str(bad), code=2)
    done = CliRunner().invoke(app, ["plan", "-f", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("4Gi", 2**32), ("500M", 500_000_000), ("64", 64), ("1500m", 1), ("2k", 2000), ("1.5Ti", 3 * 2**39)],
)
def test_quantities(text: str, size: int) -> None:
    assert job_plans.bytes_of(text) == size
