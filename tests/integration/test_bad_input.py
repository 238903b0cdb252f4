"""Bad input that only the trainer can see ends in Failed with the class, the exit code and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune_local.cluster import Cluster
from tests import tiny
from tests.clients import Kubectl, finetunejob

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Case:
    """A file to train on and changes of the spec; and what the status must say."""

    name: str
    reason: str
    exit_code: int
    words: tuple[str, ...]
    content: Callable[[], str | None] = lambda: lines(tiny.chat_rows())
    file: str = "rows.jsonl"
    spec: dict[str, Any] = field(default_factory=dict)
    overflowing_model: bool = False


def turns(question: str, answer: str, *, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def with_line(number: int, text: str) -> str:
    """Good rows with one line replaced; lines count from 1."""
    rows = lines(tiny.chat_rows()).splitlines()
    rows[number - 1] = text
    return "\n".join(rows) + "\n"


CASES = [
    Case("no-model", "ModelNotFound", 66, ("model.uri", "/nowhere/model"), spec={"model": {"uri": "file:///nowhere/model"}}),
    Case("no-data", "BadData", 65, ("rows.jsonl", "exist"), lambda: None),
    Case("empty-data", "BadData", 65, ("rows.jsonl", "empty"), lambda: ""),
    Case("wrong-columns", "BadData", 65, ("question", "messages"), lambda: lines([{"question": "a", "reply": "b"}])),
    Case("broken-json", "BadData", 65, ("line 17",), lambda: with_line(17, '{"messages": [')),
    Case(
        "unknown-role",
        "BadData",
        65,
        ("line 3", "martian", "assistant"),
        lambda: with_line(3, json.dumps(turns("x", "y", role="martian"))),
    ),
    Case(
        "nothing-supervised",
        "BadData",
        65,
        ("maxLength",),
        lambda: lines([turns(f"{i} is long " * 200, "ok") for i in range(20)]),
    ),
    Case("broken-csv", "BadData", 65, ("rows.csv", "completion"), lambda: "prompt,answer\na,b\n", "rows.csv"),
    Case(
        "unwritable-output",
        "BadConfig",
        64,
        ("output.uri", "/proc/nowhere"),
        spec={"output": {"uri": "file:///proc/nowhere/out"}},
    ),
    Case(
        "unknown-module",
        "BadConfig",
        64,
        ("targetModules", "q_projection", "q_proj"),
        spec={"method": {"type": "LoRA", "lora": {"targetModules": ["q_projection"]}}},
    ),
    Case(
        "not-finite",
        "NotFinite",
        82,
        ("learningRate",),
        overflowing_model=True,
    ),
]  # fmt: skip


def overflow(model: Path, folder: Path) -> Path:
    """A copy of the model whose logits exceed float32, so that the first loss is not a number."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outcomes(
    cluster: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Any]]:
    """All cases run side by side in one namespace, since each takes seconds of start-up and next to no work."""
    kubectl = Kubectl(cluster.kubeconfig, "test-bad-input")
    kubectl("create", "namespace", kubectl.namespace)
    overflowing = overflow(tiny_model, tmp_path_factory.mktemp("overflowing") / "model")
    for case in CASES:
        data = tmp_path_factory.mktemp(case.name) / case.file
        content = case.content()
        if content is not None:
            data.write_text(content)
        model = overflowing if case.overflowing_model else tiny_model
        kubectl.apply(finetunejob(case.name, model, data, **case.spec))
    yield lambda name: kubectl.finished(name, seconds=300)
    kubectl("delete", "namespace", kubectl.namespace, "--wait=false")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_explained(case: Case, outcomes: Callable[[str], Any]) -> None:
    status = outcomes(case.name)
    assert (status["phase"], status["reason"]) == ("Failed", case.reason), status["message"]
    (attempt,) = status["attempts"]
    assert (attempt["class"], attempt["exitCode"]) == (case.reason, case.exit_code)
    for word in case.words:
        assert word in status["message"]
    assert "artifact" not in status
    assert {c["type"]: c["status"] for c in status["conditions"]}["Failed"] == "True"
