"""One training run, from checked rows to a folder that holds the artifact's files. Reads top to bottom.

Importing this module takes seconds (torch, transformers, trl); everything that can fail early fails in preflight.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from finetune_trainer import checkpoints, export, finite, fit, resume, saving, signals
from finetune_trainer.callbacks import ProgressCallback
from finetune_trainer.data import tokens
from finetune_trainer.methods import adapters, choices, models, packing, settings
from finetune_trainer.preflight import Checked
from finetune_trainer.progress import Phase, Reporter, format_duration
from finetune_trainer.runfile import MethodType, RunFile


def train(
    run: RunFile, checked: Checked, *, work: Path, reporter: Reporter, store: checkpoints.Store | None = None
) -> dict[str, Any]:
    """Trains and writes the artifact's files to work/artifact. Returns the manifest without its list of files.

    With a store it begins at the newest checkpoint and makes others. Raises TrainerError's subclasses; after NotFinite
    nothing was written.
    """
    device = models.find_device(threads=_prepare_libraries())
    resumption = (
        None if store is None else _find_checkpoint(run, checked, store, work=work, reporter=reporter)
    )
    encoded = _encode(run, checked)
    precision = choices.choose_precision(
        run.hyperparameters.precision, device=device.name, gpu_has_bfloat16=device.has_bfloat16
    )
    choices.explain("precision", precision)
    fit.check(
        run,
        checked.architecture,
        device,
        precision=precision.value,
        length=max(len(row.input_ids) for row in encoded.train),
    )
    model = models.load_base(run, checked.model, device=device, precision=precision.value)
    _check_model(model, run, encoded)
    train_set = _build_train_set(run, encoded)
    chosen = settings.choose(
        run,
        precision.value,
        encoded.max_length,
        device,
        rows=len(train_set),
        evaluate=bool(encoded.held_out),
    )
    reporter.update(effective=chosen.to_report())

    callback = ProgressCallback(
        reporter,
        eval_steps=chosen.eval_steps,
        learning_rate=chosen.learning_rate,
        before={} if resumption is None else resumption.checkpoint.manifest,
    )
    arguments = settings.build_arguments(run, chosen, work)
    trainer = _build_trainer(run, model, train_set, encoded, arguments, callback)
    if store is not None and run.checkpoint is not None:
        saving.Saver(
            store,
            run.checkpoint,
            config_digest=resume.digest_config(run, checked),
            reporter=reporter,
            facts=callback.to_facts,
            keep_best=run.early_stopping is not None,
        ).attach(trainer)
    _run(trainer, resumption, store)
    return _export(
        run, checked, encoded, trainer=trainer, callback=callback, chosen=chosen, folder=work / "artifact"
    )


def _export(
    run: RunFile,
    checked: Checked,
    encoded: Encoded,
    *,
    trainer: trl.SFTTrainer,
    callback: ProgressCallback,
    chosen: settings.Settings,
    folder: Path,
) -> dict[str, Any]:
    """Evaluates what was trained and writes the artifact's files; returns the manifest without their list."""
    reporter = callback.reporter

    reporter.update(phase=Phase.EVALUATING, remaining_seconds=0)
    eval_loss = _evaluate(run, trainer) if encoded.held_out else None
    finite.check_weights(trainer.model, step=trainer.state.global_step)

    reporter.update(phase=Phase.EXPORTING)
    metrics = _summarize(trainer, callback, eval_loss=eval_loss)
    manifest = export.build_manifest(
        run, checked, hyperparameters=settings.describe(run, chosen), metrics=metrics
    )
    export.write_files(trainer, encoded.tokenizer, run=run, manifest=manifest, folder=folder)
    return manifest


def _find_checkpoint(
    run: RunFile, checked: Checked, store: checkpoints.Store, *, work: Path, reporter: Reporter
) -> resume.Resumption | None:
    found = resume.find(
        run,
        store,
        config_digest=resume.digest_config(run, checked),
        output_dir=work / settings.CHECKPOINTS,
    )
    if found is None:
        reporter.update(resumed_from_step=0)
    else:
        reporter.update(
            resumed_from_step=found.step, step=found.step, checkpoint=found.checkpoint.to_report()
        )
    return found


def _prepare_libraries() -> int:
    """Makes the libraries quiet and gives them all cores; returns how many."""
    threads = choices.choose_threads()
    choices.explain("threads", threads)
    torch.set_num_threads(threads.value)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return threads.value


# ---------------------------------------------------------------- text to tokens


@dataclass(frozen=True)
class Encoded:
    """The rows as tokens, cut to `max_length`, and the tokenizer that made them."""

    tokenizer: Any
    max_length: int
    train: list[tokens.TokenRow]
    held_out: list[tokens.TokenRow]


def _encode(run: RunFile, checked: Checked) -> Encoded:
    tokenizer = models.load_tokenizer(checked.model, uri=run.model.uri)
    tokens.set_chat_template(tokenizer, run.model.chat_template)
    max_length = choices.choose_max_length(
        run.hyperparameters.max_length, model_limit=checked.config.get("max_position_embeddings")
    )
    choices.explain("maxLength", max_length)
    train_rows, held_out = (
        tokens.encode_examples(
            examples, tokenizer, max_length=max_length.value, choice=run.dataset.apply_chat_template
        )
        for examples in (checked.train, checked.held_out)
    )
    _describe_rows(train_rows, max_length.value)
    return Encoded(tokenizer, max_length.value, train_rows, held_out)


def _describe_rows(rows: list[tokens.TokenRow], max_length: int) -> None:
    longest = max(len(row.input_ids) for row in rows)
    full = sum(len(row.input_ids) == max_length for row in rows)
    learnt = sum(label != tokens.IGNORED for row in rows for label in row.labels)
    total = sum(len(row.input_ids) for row in rows)
    cut = f"; {full} rows reach maxLength and may be cut" if full else ""
    print(
        f"tokens: {total} in {len(rows)} rows, {learnt} of them learnt; longest row {longest}{cut}",
        flush=True,
    )


def _to_dataset(rows: list[tokens.TokenRow]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )


def _build_train_set(run: RunFile, encoded: Encoded) -> datasets.Dataset:
    train_set = _to_dataset(encoded.train)
    if run.hyperparameters.packing:
        train_set = trl.pack_dataset(train_set, encoded.max_length, "bfd")
        print(f"packing: {len(encoded.train)} rows in {len(train_set)} sequences", flush=True)
    return train_set


# ---------------------------------------------------------------- training


def _check_model(model: Any, run: RunFile, encoded: Encoded) -> None:
    """Raises BadConfig when the model does not fit the tokens, or lets packed rows mix."""
    largest = max(max(row.input_ids) for row in encoded.train + encoded.held_out)
    models.check_vocabulary(model, largest, uri=run.model.uri)
    if run.hyperparameters.packing:
        packing.check_separation(model, [row.input_ids for row in encoded.train])


def _build_trainer(
    run: RunFile,
    model: Any,
    train_set: datasets.Dataset,
    encoded: Encoded,
    arguments: trl.SFTConfig,
    callback: ProgressCallback,
) -> trl.SFTTrainer:
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=_to_dataset(encoded.held_out) if encoded.held_out else None,
        processing_class=encoded.tokenizer,
        peft_config=None if run.method.type is MethodType.FULL else adapters.build_lora(run.lora, model),
        callbacks=[callback, *_early_stopping(run)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    _use_float32_adapter(trainer.model)
    return trainer


def _early_stopping(run: RunFile) -> list[transformers.TrainerCallback]:
    if run.early_stopping is None:
        return []
    return [
        transformers.EarlyStoppingCallback(
            early_stopping_patience=run.early_stopping.patience,
            early_stopping_threshold=run.early_stopping.min_delta,
        )
    ]


def _use_float32_adapter(model: Any) -> None:
    """Undoes TRL's cast of a quantized base's adapter to bfloat16, in which small updates vanish."""
    if getattr(model, "is_loaded_in_4bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _run(
    trainer: trl.SFTTrainer, resumption: resume.Resumption | None, store: checkpoints.Store | None
) -> None:
    started = time.monotonic()
    with signals.deferred() if store is not None else contextlib.nullcontext():
        resume.train(trainer, resumption, store)
    seconds = format_duration(time.monotonic() - started)
    since = "" if resumption is None else f" (from {resumption.step})"
    print(f"trained to step {trainer.state.global_step}{since} in {seconds}", flush=True)


# ---------------------------------------------------------------- after training


def _evaluate(run: RunFile, trainer: trl.SFTTrainer) -> float:
    """Returns the loss on the held-out rows for the weights that are exported."""
    latest = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if run.early_stopping is None and latest is not None and latest["step"] == trainer.state.global_step:
        return float(latest["eval_loss"])  # these very weights were just evaluated
    return float(trainer.evaluate()["eval_loss"])


def _summarize(
    trainer: trl.SFTTrainer, callback: ProgressCallback, *, eval_loss: float | None
) -> dict[str, Any]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, Any] = {
        "step": trainer.state.global_step,
        "epoch": round(trainer.state.epoch or 0.0, 4),
        "loss": losses[-1],
        "trainSeconds": round(callback.train_seconds, 2),
        "tokensPerSecond": round(callback.tokens / callback.train_seconds, 1),
    }
    return metrics if eval_loss is None else {**metrics, "evalLoss": eval_loss}
