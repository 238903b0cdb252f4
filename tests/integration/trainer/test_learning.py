"""Learning is proved by answers: each method must teach a rule that contradicts what the base model knows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import __main__ as command_line
from tests import tiny
from tests.integration.trainer.conftest import NEW_RULE, OLD_RULE, Run
from tests.integration.trainer.objectives import METHODS

pytestmark = pytest.mark.integration

ADAPTER = {"r": 16, "alpha": 32, "dropout": 0.0, "targetModules": ["all-linear"]}
TEACH = {"maxSteps": 300, "globalBatchSize": 16, "microBatchSize": 16, "maxLength": 64, "learningRate": 1e-2}


def compare(
    base: Path, adapter: Path, data: Path, capfd: pytest.CaptureFixture[str], *more: str
) -> dict[str, Any]:
    capfd.readouterr()
    arguments = ["compare", "--base", f"file://{base}", "--adapter", str(adapter), "--data", str(data)]
    assert command_line.main([*arguments, "--output", "json", "--max-new-tokens", "24", *more]) == 0
    return dict(json.loads(capfd.readouterr().out))


def test_full_training_teaches_the_rule(
    tiny_model: Path, taught: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_jsonl(tmp_path / "all.jsonl", tiny.chat_rows(shift=OLD_RULE))
    report = compare(tiny_model, taught, data, capfd)
    assert report["rows"] == 40
    assert report["base"]["exactMatch"] == 0
    assert report["adapter"]["exactMatch"] >= 90
    assert report["adapter"]["evalLoss"] < 0.2 < report["base"]["evalLoss"]


@pytest.mark.parametrize(
    "method",
    [
        {"type": "LoRA", "lora": ADAPTER},
        {"type": "QLoRA", "lora": ADAPTER, "quantization": {"type": "nf4", "doubleQuant": True}},
        {"type": "QLoRA", "lora": ADAPTER, "quantization": {"type": "fp4", "doubleQuant": False}},
    ],
    ids=["LoRA", "QLoRA-nf4", "QLoRA-fp4"],
)
def test_an_adapter_teaches_a_contradicting_rule(
    taught: Path, tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str], method: dict[str, Any]
) -> None:
    data = tiny.write_jsonl(tmp_path / "new.jsonl", tiny.chat_rows(shift=NEW_RULE), times=4)
    dataset = {"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0, "seed": 1}}
    ended = run(taught, data, method=method, dataset=dataset, hyperparameters=TEACH)
    assert ended.code == 0
    assert ended.result["artifact"]["rank"] == 16
    assert ended.manifest["method"] == method["type"]
    rows = tiny.write_jsonl(tmp_path / "all.jsonl", tiny.chat_rows(shift=NEW_RULE))
    report = compare(taught, ended.output, rows, capfd, "--samples", "2")
    assert report["base"]["exactMatch"] == 0
    assert report["adapter"]["exactMatch"] >= 90
    assert report["artifact"]["digest"] == ended.result["artifact"]["digest"]
    assert len(report["samples"]) == 2
    assert report["samples"][0]["expected"] == tiny.answer("cup", 0, shift=NEW_RULE)
    assert report["samples"][0]["base"] == tiny.answer("cup", 0, shift=OLD_RULE)


def test_gradients_pass_a_quantized_base_after_an_evaluation(tiny_model: Path) -> None:
    import torch

    from finetune_trainer import runfile
    from finetune_trainer.methods import models

    method = {"type": "QLoRA", "quantization": {}}
    document = tiny.run_document(tiny_model, tiny_model, tiny_model, method=method)
    run_file = runfile.parse(json.dumps(document))
    device = models.Device("cpu", "cpu", has_bfloat16=False)
    model = models.load_base(run_file, tiny_model, device=device, precision=runfile.Precision.FLOAT32)
    embeddings = torch.randn(2, 8, 64, requires_grad=True)
    gradients = []
    for _ in range(2):
        model.train()
        model(inputs_embeds=embeddings).logits.pow(2).mean().backward()
        gradients.append(embeddings.grad)
        embeddings.grad = None
        model.eval()
        with torch.no_grad():
            model(inputs_embeds=embeddings.detach())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)


def test_early_stopping_keeps_the_best_weights(taught: Path, tmp_path: Path, run: Run) -> None:
    """Half of the rows are held out; at so high a rate the model soon learns the other half by heart."""
    data = tiny.write_jsonl(tmp_path / "new.jsonl", tiny.chat_rows(shift=NEW_RULE))
    ended = run(
        taught,
        data,
        method={"type": "LoRA", "lora": ADAPTER},
        dataset={"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0.5, "seed": 1}},
        hyperparameters={**TEACH, "evalSteps": 5},
        earlyStopping={"patience": 2},
    )
    assert ended.code == 0
    history = [json.loads(line) for line in (ended.output / "history.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert ended.result["step"] < 300
    assert ended.manifest["metrics"]["evalLoss"] == pytest.approx(min(losses))
    assert min(losses) < losses[-2]


def test_packing_changes_the_batches_but_not_what_is_learnt(taught: Path, tmp_path: Path, run: Run) -> None:
    """With one batch of all rows, packed and unpacked training start from the same loss: no row sees another."""
    data = tiny.write_jsonl(tmp_path / "new.jsonl", tiny.chat_rows(shift=NEW_RULE))
    dataset = {"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0, "seed": 1}}
    losses = []
    for packing, batch in ((False, 40), (True, 8)):
        hyper = {
            "maxSteps": 1,
            "globalBatchSize": batch,
            "microBatchSize": batch,
            "maxLength": 256,
            "packing": packing,
        }
        method = {"type": "LoRA", "lora": ADAPTER}
        ended = run(
            taught, data, name=f"out-{packing}", method=method, dataset=dataset, hyperparameters=hyper
        )
        assert ended.code == 0, ended.log
        losses.append(ended.manifest["metrics"]["loss"])
    assert "packing: 40 rows in" in ended.log
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "Full"])
def test_a_base_model_that_holds_nan_is_named_and_not_the_learning_rate(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, method: str
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ended = run(model, chat_file, method=METHODS[method])
    assert (ended.code, ended.result["class"]) == (66, "ModelNotFound")
    assert f"weight {name} of file://{model} is NaN or infinite" in ended.result["message"]
    assert "learningRate" not in ended.result["message"]
    assert not ended.output.exists()


def test_a_loss_that_is_not_finite_fails_and_exports_nothing(
    tiny_model: Path, chat_file: Path, run: Run
) -> None:
    hyper = {"maxSteps": 20, "globalBatchSize": 8, "maxLength": 64, "learningRate": 1e30, "maxGradNorm": 1000}
    ended = run(tiny_model, chat_file, method={"type": "Full"}, hyperparameters={**hyper, "warmupRatio": 0})
    assert ended.code == 82
    assert ended.result["class"] == "NotFinite"
    assert "set hyperparameters.learningRate to 5e+29" in ended.result["message"]
    assert ended.result["step"] < 20
    assert not ended.output.exists()


@pytest.mark.parametrize(
    "hyper",
    [
        {"optimizer": "AdamW8bit", "scheduler": "Linear", "weightDecay": 0.1},
        {"optimizer": "SGD", "scheduler": "Constant", "warmupRatio": 0},
        {"precision": "BFloat16", "gradientCheckpointing": True, "neftuneAlpha": 5, "microBatchSize": 2},
    ],
    ids=["8bit", "sgd", "bfloat16"],
)
@pytest.mark.parametrize("kind", ["LoRA", "QLoRA", "Full"])
def test_settings_train_with_every_method(
    tiny_model: Path, chat_file: Path, run: Run, kind: str, hyper: dict[str, Any]
) -> None:
    method = {"type": kind, **({"quantization": {}} if kind == "QLoRA" else {})}
    ended = run(
        tiny_model,
        chat_file,
        method=method,
        hyperparameters={"maxSteps": 3, "globalBatchSize": 8, "maxLength": 64, **hyper},
    )
    assert ended.code == 0
    assert math.isfinite(ended.manifest["metrics"]["evalLoss"])
    assert ended.manifest["hyperparameters"]["microBatchSize"] == hyper.get("microBatchSize", 8)
