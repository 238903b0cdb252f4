"""Each bad input through the real command, as the operator starts it: exit code, class and a message that helps.

The time of each refusal is printed (pytest -rP shows it): without a model to load it is a fraction of a second.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.__main__ import main
from finetune_trainer.failures import BadConfig
from finetune_trainer.methods import targets
from finetune_trainer.runfile import Lora
from tests import tiny
from tests.integration.trainer.conftest import Run
from tests.unit.trainer.test_model_files import SHAPES, write_weights

pytestmark = pytest.mark.integration

FINE = '{"text": "a fine row"}\n'
CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "ROLE", "content": "a"}]}\n'


@dataclass(frozen=True)
class Case:
    name: str
    code: int
    error_class: str
    expected: tuple[str, ...]
    data: str | None = FINE * 4
    parts: dict[str, Any] | None = None
    chat_template: bool = True
    model_files: dict[str, str] | None = None  # put into the model's folder


CASES = [
    Case(
        "model-missing",
        66,
        "ModelNotFound",
        ("model.uri: file:///no/model", "/no/model"),
        parts={"model": {"uri": "file:///no/model"}},
    ),
    Case("data-missing", 65, "BadData", ("does not exist", "rows.jsonl"), data=None),
    Case("data-empty", 65, "BadData", ("rows.jsonl is empty",), data=""),
    Case("data-only-blank-lines", 65, "BadData", ("holds no rows",), data="\n\n"),
    Case(
        "wrong-columns",
        65,
        "BadData",
        ("line 1", "[ask, reply]", "prompt and completion"),
        data='{"ask": 1, "reply": 2}\n',
    ),
    Case("broken-json", 65, "BadData", ("line 17: broken JSON",), data=FINE * 16 + '{"text": "x}\n' + FINE),
    Case(
        "unknown-role",
        65,
        "BadData",
        ("line 1", "martian", "system, user, assistant, tool"),
        data=CHAT.replace("ROLE", "martian"),
    ),
    Case("no-assistant", 65, "BadData", ("no assistant turn",), data=CHAT.replace("ROLE", "user")),
    Case("empty-text", 65, "BadData", ("line 2: column 'text' is empty",), data=FINE + '{"text": ""}\n'),
    Case("missing-content", 65, "BadData", ("has no 'content'",), data='{"messages": [{"role": "user"}]}\n'),
    Case(
        "mixed-formats",
        65,
        "BadData",
        ("line 2", "one file holds one format"),
        data=FINE + '{"prompt": "a", "completion": "b"}\n',
    ),
    Case("one-row-to-split", 65, "BadData", ("dataset.split.eval",), data=FINE),
    Case(
        "qlora-without-quantization",
        64,
        "BadConfig",
        ("method.quantization is required",),
        parts={"method": {"type": "QLoRA"}},
    ),
    Case("ppo", 64, "BadConfig", ("RLOO or GRPO",), parts={"objective": "PPO"}),
    Case(
        "micro-batch",
        64,
        "BadConfig",
        ("microBatchSize: 3",),
        parts={"hyperparameters": {"globalBatchSize": 8, "microBatchSize": 3}},
    ),
    Case(
        "output-below-a-file",
        64,
        "BadConfig",
        ("output.uri", "cannot be written"),
        parts={"output": {"uri": "file:///dev/null/out"}},
    ),
    Case(
        "messages-without-template",
        64,
        "BadConfig",
        ("model.chatTemplate", "ChatML"),
        data=CHAT.replace("ROLE", "assistant"),
        chat_template=False,
    ),
    Case(
        "unknown-ending",
        64,
        "BadConfig",
        ("dataset.sources[0].uri", ".parquet"),
        parts={"dataset": {"sources": [{"uri": "file:///a.txt"}]}},
    ),
    Case(
        "unknown-target-module",
        64,
        "BadConfig",
        ("method.lora.targetModules", "'q_porj'", "choose from q_proj, up_proj"),
        parts={"method": {"type": "LoRA", "lora": {"targetModules": ["q_porj"]}}},
        model_files={"config.json": '{"model_type": "llama"}'},
    ),
    Case(
        "hub-out-of-reach",  # tests may not ask it
        74,
        "Storage",
        ("hf://nobody/nothing", "check the network"),
        parts={"model": {"uri": "hf://nobody/nothing"}},
    ),
    Case(
        "broken-tokenizer",
        66,
        "ModelNotFound",
        ("tokenizer.json", "cannot be read", "copy the model's folder again"),
        model_files={"tokenizer.json": '{"version": "1.0", "model": {"vo'},
    ),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders that look like models: what the early checks see of one, with and without a chat template."""
    folders = {}
    for has_template in (True, False):
        folder = folders[has_template] = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text("{}")
        write_weights(folder / "model.safetensors", SHAPES)
        (folder / "tokenizer_config.json").write_text("{}")
        if has_template:
            (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    return folders


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_early(case: Case, folders: dict[bool, Path], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    if case.data is not None:
        data.write_text(case.data)
    model = shutil.copytree(folders[case.chat_template], tmp_path / "model")
    for name, content in (case.model_files or {}).items():
        (model / name).write_text(content)
    document = tiny.run_document(model, data, tmp_path / "out", **(case.parts or {}))
    (tmp_path / "run.json").write_text(json.dumps(document))
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune_trainer", "run"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FINETUNE_RUN_FILE": str(tmp_path / "run.json"),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(f"{case.name}: refused after {time.monotonic() - started:.2f} s")
    assert ended.returncode == case.code, ended.stderr
    assert "Traceback" not in ended.stderr
    result = json.loads(ended.stdout.strip().splitlines()[-1].removeprefix("TRAINER_RESULT "))
    assert (result["class"], result["exitCode"]) == (case.error_class, case.code)
    for part in case.expected:
        assert part in result["message"]
    imported = {
        line.rsplit("|", 1)[-1].strip()
        for line in ended.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert not imported & {"torch", "transformers", "trl", "pandas", "pyarrow", "datasets", "fsspec"}
    assert not (tmp_path / "out").exists()


def test_a_padding_token_without_an_embedding_is_refused(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path
) -> None:
    """As where a padding token was added to the tokenizer, and the model kept its size."""
    model = shutil.copytree(tiny_model, tmp_path / "padded")
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|more|>"})
    tokenizer.save_pretrained(model)
    ended = run(model, chat_file)
    assert (ended.code, ended.result["class"]) == (64, "BadConfig")
    assert "pad_token '<|more|>'" in ended.result["message"]


def test_rows_cut_before_the_answer_are_refused(tiny_model: Path, chat_file: Path, run: Run) -> None:
    ended = run(tiny_model, chat_file, hyperparameters={"maxSteps": 2, "maxLength": 10})
    assert (ended.code, ended.result["class"]) == (65, "BadData")
    assert "36 of 36 rows have no learnt token within hyperparameters.maxLength 10" in ended.result["message"]
    assert "raise maxLength" in ended.result["message"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("q_porj", "no module 'q_porj'; choose from"), ("lm_head", "lm_head cannot get an adapter")],
)
def test_unknown_target_modules_list_the_models_own(tiny_model: Path, name: str, text: str) -> None:
    """What the loaded model says, for model types whose files cannot tell."""
    import transformers

    from finetune_trainer.methods import adapters

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(BadConfig, match=text) as caught:
        adapters.build_lora(Lora(target_modules=["v_proj", name]), model)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_types_named_as_in_files_are_those_that_transformers_does_not_rename() -> None:
    from transformers import conversion_mapping

    for model_type in targets.NAMED_AS_IN_FILES:
        assert not conversion_mapping.get_checkpoint_conversion_mapping(model_type), model_type


def test_weights_that_cannot_be_loaded_are_the_models_fault(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    ended = run(broken, chat_file)
    assert (ended.code, ended.result["class"]) == (66, "ModelNotFound")
    assert str(broken) in ended.result["message"]


def test_weights_that_only_another_image_can_read_are_told(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path
) -> None:
    quantized = shutil.copytree(tiny_model, tmp_path / "quantized")
    known = json.loads((quantized / "config.json").read_text())
    config = {**known, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (quantized / "config.json").write_text(json.dumps(config))
    ended = run(quantized, chat_file)
    assert (ended.code, ended.result["class"]) == (64, "BadConfig")
    for part in (str(quantized), "optimum", "name the model that it was made from"):
        assert part in ended.result["message"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 3}, "no weights for 9 parts .* such as model.layers.2.input_layernorm.weight"),
        (
            {"intermediate_size": 256},
            r"layers.0.mlp.down_proj.weight of .* shape \[64, 128\], .* \[64, 256\]",
        ),
    ],
)
@pytest.mark.parametrize("objective", ["SFT", "RewardModel"])
def test_weights_that_would_be_random_are_refused(
    tiny_model: Path,
    chat_file: Path,
    run: Run,
    tmp_path: Path,
    config: dict[str, int],
    expected: str,
    objective: str,
) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    known = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**known, **config}))
    if objective == "RewardModel":
        chat_file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.preference_rows()[:8])
    ended = run(broken, chat_file, objective=objective)
    assert (ended.code, ended.result["class"]) == (66, "ModelNotFound")
    assert re.search(expected, ended.result["message"])


def test_an_error_of_ours_is_internal_and_reported(
    tiny_model: Path, chat_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("finetune_trainer.preflight.check", fail)
    ended = run(tiny_model, chat_file)
    assert (ended.code, ended.result["class"]) == (1, "Internal")
    assert "KeyError: 'ours'" in ended.result["message"]
    assert not ended.output.exists()


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"--base": "file:///no/model"}, 66, "model.uri: file:///no/model is not a folder"),
        ({"--adapter": "/no/artifact"}, 64, "--adapter file:///no/artifact is not a folder"),
        ({"--data": "/no/rows.jsonl"}, 65, "/no/rows.jsonl does not exist"),
        ({"--limit": "0"}, 64, "--limit is 0"),
    ],
)
def test_compare_refuses_in_one_sentence(
    changed: dict[str, str], code: int, words: str, folders: dict[bool, Path], tmp_path: Path, capfd: Any
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pair_rows())
    options = {
        "--base": f"file://{folders[True]}",
        "--adapter": str(tmp_path),
        "--data": str(rows),
        **changed,
    }
    assert main(["compare", *(text for option in options.items() for text in option)]) == code
    assert words in capfd.readouterr().err


def test_help_needs_none_of_the_slow_libraries() -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune_trainer", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0
    assert "82 NotFinite" in ended.stdout
    assert "pydantic" not in ended.stderr
