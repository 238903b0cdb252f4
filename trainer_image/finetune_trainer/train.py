"""One training run, from checked rows to a folder that holds the artifact's files. Reads top to bottom.

Importing this module takes seconds (torch, transformers, trl); everything that can fail early fails in preflight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from finetune_trainer import export
from finetune_trainer.callbacks import ProgressCallback
from finetune_trainer.data import tokens
from finetune_trainer.failures import NotFinite
from finetune_trainer.methods import adapters, choices, models, packing
from finetune_trainer.preflight import Checked
from finetune_trainer.progress import Phase, Reporter, format_duration
from finetune_trainer.runfile import MethodType, Optimizer, Precision, RunFile, Scheduler

SCHEDULERS = {
    Scheduler.LINEAR: "linear",
    Scheduler.COSINE: "cosine",
    Scheduler.CONSTANT: "constant_with_warmup",
}
OPTIMIZERS = {Optimizer.ADAMW: "adamw_torch", Optimizer.ADAMW_8BIT: "adamw_8bit", Optimizer.SGD: "sgd"}


@dataclass(frozen=True)
class Settings:
    """What is really used, after every automatic choice."""

    learning_rate: float
    micro_batch: int
    precision: Precision
    max_length: int
    total_steps: int
    eval_steps: int | None  # None: no held-out rows
    device: models.Device


def train(run: RunFile, checked: Checked, *, work: Path, reporter: Reporter) -> dict[str, Any]:
    """Trains and writes the artifact's files to work/artifact. Returns the manifest without its list of files.

    Raises TrainerError's subclasses; after NotFinite nothing was written.
    """
    # ---------------------------------------------------------------- quiet libraries, all cores
    threads = choices.choose_threads()
    torch.set_num_threads(threads.value)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    _explain("threads", threads)

    # ---------------------------------------------------------------- text to tokens
    tokenizer = models.load_tokenizer(checked.model, uri=run.model.uri)
    tokens.set_chat_template(tokenizer, run.model.chat_template)
    max_length = choices.choose_max_length(
        run.hyperparameters.max_length, model_limit=checked.config.get("max_position_embeddings")
    )
    _explain("maxLength", max_length)
    train_rows, eval_rows = (
        tokens.encode_examples(
            examples, tokenizer, max_length=max_length.value, choice=run.dataset.apply_chat_template
        )
        for examples in (checked.train, checked.held_out)
    )
    _describe_rows(train_rows, max_length.value)

    # ---------------------------------------------------------------- model
    device = models.find_device(threads=threads.value)
    precision = choices.choose_precision(
        run.hyperparameters.precision, device=device.name, gpu_has_bfloat16=device.has_bfloat16
    )
    _explain("precision", precision)
    model = models.load_base(run, checked.model, device=device, precision=precision.value)
    models.check_vocabulary(
        model, max(max(row.input_ids) for row in train_rows + eval_rows), uri=run.model.uri
    )
    if run.hyperparameters.packing:
        packing.check_separation(model, [row.input_ids for row in train_rows])
    lora = None if run.method.type is MethodType.FULL else adapters.build_lora(run.lora, model)

    # ---------------------------------------------------------------- settings
    train_set = _to_dataset(train_rows)
    if run.hyperparameters.packing:
        train_set = trl.pack_dataset(train_set, max_length.value, "bfd")
        print(f"packing: {len(train_rows)} rows in {len(train_set)} sequences", flush=True)
    settings = _choose_settings(
        run, precision.value, max_length.value, device, rows=len(train_set), evaluate=bool(eval_rows)
    )
    reporter.update(
        effective={
            "learningRate": settings.learning_rate,
            "microBatchSize": settings.micro_batch,
            "precision": settings.precision,
            "device": device.description,
        }
    )

    # ---------------------------------------------------------------- training
    callback = ProgressCallback(
        reporter, eval_steps=settings.eval_steps, learning_rate=settings.learning_rate
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=_build_arguments(run, settings, work),
        train_dataset=train_set,
        eval_dataset=_to_dataset(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[callback, *_early_stopping(run)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    _use_float32_adapter(trainer.model)
    started = time.monotonic()
    trainer.train()
    print(
        f"trained {trainer.state.global_step} steps in {format_duration(time.monotonic() - started)}",
        flush=True,
    )

    # ---------------------------------------------------------------- evaluation
    reporter.update(phase=Phase.EVALUATING, remaining_seconds=0)
    eval_loss = _evaluate(run, trainer) if eval_rows else None
    _check_weights(trainer.model)

    # ---------------------------------------------------------------- export
    reporter.update(phase=Phase.EXPORTING)
    metrics = _summarize(trainer, callback, eval_loss=eval_loss)
    manifest = export.build_manifest(run, checked, hyperparameters=_effective(run, settings), metrics=metrics)
    export.write_files(trainer, tokenizer, run=run, manifest=manifest, folder=work / "artifact")
    return manifest


def _explain(name: str, choice: choices.Choice[Any]) -> None:
    print(f"{name}: {choice.value} ({choice.reason})", flush=True)


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


def _choose_settings(
    run: RunFile, precision: Precision, max_length: int, device: models.Device, *, rows: int, evaluate: bool
) -> Settings:
    hyper = run.hyperparameters
    learning_rate = choices.choose_learning_rate(hyper, run.method.type)
    micro_batch = choices.choose_micro_batch(hyper)
    total_steps = choices.choose_total_steps(hyper, rows=rows)
    eval_steps = choices.choose_eval_steps(hyper, total_steps=total_steps.value)
    _explain("learningRate", learning_rate)
    _explain("microBatchSize", micro_batch)
    _explain("steps", total_steps)
    if evaluate:
        _explain("evalSteps", eval_steps)
    return Settings(
        learning_rate=learning_rate.value,
        micro_batch=micro_batch.value,
        precision=precision,
        max_length=max_length,
        total_steps=total_steps.value,
        eval_steps=eval_steps.value if evaluate else None,
        device=device,
    )


def _build_arguments(run: RunFile, settings: Settings, work: Path) -> trl.SFTConfig:
    hyper = run.hyperparameters
    on_cpu = settings.device.name == "cpu"
    keep_best = run.early_stopping is not None
    return trl.SFTConfig(
        output_dir=str(work / "checkpoints"),
        max_steps=settings.total_steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=hyper.global_batch_size // settings.micro_batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULERS[hyper.scheduler],
        warmup_steps=hyper.warmup_ratio,  # transformers 5: a float below 1 is a share of the steps
        weight_decay=hyper.weight_decay,
        max_grad_norm=hyper.max_grad_norm,
        neftune_noise_alpha=hyper.neftune_alpha,
        optim=OPTIMIZERS[hyper.optimizer],
        bf16=settings.precision is Precision.BFLOAT16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        gradient_checkpointing=hyper.gradient_checkpointing,
        eval_strategy="no" if settings.eval_steps is None else "steps",
        eval_steps=settings.eval_steps,
        save_strategy="steps" if keep_best else "no",
        save_steps=settings.eval_steps or settings.total_steps,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        logging_steps=choices.choose_logging_steps(settings.total_steps),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # with the filter a NaN is logged as 0 and the run counts as a success
        report_to="none",
        disable_tqdm=True,
        seed=hyper.seed,
        data_seed=hyper.seed,
        packing=hyper.packing,
        eval_packing=False,
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokens and cut already
    )


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


def _evaluate(run: RunFile, trainer: trl.SFTTrainer) -> float:
    """Returns the loss on the held-out rows for the weights that are exported."""
    latest = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if run.early_stopping is None and latest is not None and latest["step"] == trainer.state.global_step:
        return float(latest["eval_loss"])  # these very weights were just evaluated
    return float(trainer.evaluate()["eval_loss"])


def _check_weights(model: Any) -> None:
    """The last step's update is in no logged loss. Raises NotFinite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NotFinite(
                f"weight {name} is not finite after the last step; "
                "halve hyperparameters.learningRate. Nothing was exported"
            )


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


def _effective(run: RunFile, settings: Settings) -> dict[str, Any]:
    given = run.hyperparameters.model_dump(by_alias=True, exclude_none=True, mode="json")
    chosen = {
        "learningRate": settings.learning_rate,
        "microBatchSize": settings.micro_batch,
        "precision": settings.precision,
        "maxLength": settings.max_length,
        "maxSteps": settings.total_steps,
    }
    return (
        {**given, **chosen}
        if settings.eval_steps is None
        else {**given, **chosen, "evalSteps": settings.eval_steps}
    )
