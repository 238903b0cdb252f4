"""The automatic choices and their reasons; failures and their classes; URIs and their paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer import storage
from finetune_trainer.failures import BadConfig, BadData, ErrorClass, classify
from finetune_trainer.methods import choices
from finetune_trainer.runfile import Hyperparameters, MethodType, Precision


@pytest.mark.parametrize(("total", "expected"), [(16, 8), (12, 6), (7, 7), (22, 2), (13, 1), (1, 1), (8, 8)])
def test_micro_batch_is_the_largest_divisor_up_to_eight(total: int, expected: int) -> None:
    choice = choices.choose_micro_batch(Hyperparameters(global_batch_size=total))
    assert choice.value == expected
    assert f"globalBatchSize {total}" in choice.reason


@pytest.mark.parametrize(
    ("total", "given", "override", "expected"),
    [(16, 8, 4, 4), (24, 6, 5, 4), (6, None, 4, 3), (7, 7, 3, 1), (4, None, 9, 4)],
)
def test_an_overridden_micro_batch_still_divides_the_global_batch(
    total: int, given: int | None, override: int, expected: int
) -> None:
    hyper = Hyperparameters(global_batch_size=total, micro_batch_size=given)
    choice = choices.choose_micro_batch(hyper, override=override)
    assert choice.value == expected
    assert choice.reason == f"override, at most {override}"


def test_learning_rate_depends_on_the_method() -> None:
    assert choices.choose_learning_rate(Hyperparameters(), MethodType.QLORA).value == 2e-4
    assert choices.choose_learning_rate(Hyperparameters(), MethodType.FULL).value == 2e-5
    assert (
        choices.choose_learning_rate(Hyperparameters(learning_rate=1e-3), MethodType.FULL).reason
        == "as given"
    )


@pytest.mark.parametrize(
    ("asked", "device", "has", "expected"),
    [
        (Precision.AUTO, "cpu", False, Precision.FLOAT32),
        (Precision.AUTO, "cuda:0", True, Precision.BFLOAT16),
        (Precision.AUTO, "cuda:0", False, Precision.FLOAT32),
        (Precision.BFLOAT16, "cpu", False, Precision.BFLOAT16),
        (Precision.FLOAT32, "cuda:0", True, Precision.FLOAT32),
    ],
)
def test_precision(asked: Precision, device: str, has: bool, expected: Precision) -> None:
    assert choices.choose_precision(asked, device=device, gpu_has_bfloat16=has).value is expected


def test_bfloat16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(BadConfig, match="use Auto or Float32"):
        choices.choose_precision(Precision.BFLOAT16, device="cuda:0", gpu_has_bfloat16=False)


def test_steps_follow_epochs_unless_given() -> None:
    assert choices.choose_total_steps(Hyperparameters(epochs=3, global_batch_size=16), rows=100).value == 21
    assert choices.choose_total_steps(Hyperparameters(epochs=0.1, global_batch_size=16), rows=100).value == 1
    assert choices.choose_total_steps(Hyperparameters(max_steps=5), rows=100).value == 5


def test_ten_evaluations_and_a_readable_log() -> None:
    assert choices.choose_eval_steps(Hyperparameters(), total_steps=200).value == 20
    assert choices.choose_eval_steps(Hyperparameters(), total_steps=4).value == 1
    assert choices.choose_logging_steps(300) == 1
    assert choices.choose_logging_steps(10_000) == 25


def test_max_length_never_exceeds_the_models_positions() -> None:
    assert choices.choose_max_length(1024, model_limit=512).value == 512
    assert choices.choose_max_length(1024, model_limit=None).value == 1024


def test_granted_cores_win_over_rays_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FINETUNE_CPUS", "3.5")
    assert choices.choose_threads() == choices.Choice(3, "FINETUNE_CPUS")
    monkeypatch.setenv("FINETUNE_CPUS", "many")
    with pytest.raises(BadConfig, match="FINETUNE_CPUS: 'many'"):
        choices.choose_threads()


def test_a_cause_of_ours_decides_the_class_under_a_librarys_error() -> None:
    error = RuntimeError("map failed")
    error.__cause__ = BadData("row 3 is broken")
    assert classify(error) == (ErrorClass.BAD_DATA, "row 3 is broken")
    assert classify(ZeroDivisionError("x")) == (ErrorClass.INTERNAL, "ZeroDivisionError: x")


def test_uris_become_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("FINETUNE_VOLUMES", str(tmp_path))
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.local_path("pvc://models/smol") == tmp_path / "models/smol"
    assert storage.local_path("s3://bucket/key") is None


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("/a/b", "is not a URI; write file:///"),
        ("file://a/b", "three slashes"),
        ("ftp://host/file", "scheme ftp is not known"),
        ("s3://bucket/a::b/c", "'::' cannot be part of a path"),
        ("pvc://none/file", "claim 'none' is not mounted"),
        ("pvc://models/../../etc/passwd", "would leave the volume"),
    ],
)
def test_wrong_uris_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, text: str
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("FINETUNE_VOLUMES", str(tmp_path))
    with pytest.raises(BadConfig, match=text):
        storage.local_path(uri)
