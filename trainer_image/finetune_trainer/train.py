"""One training run, from checked rows to a folder that holds the artifact's files. Reads top to bottom.

Importing this module takes seconds (torch, transformers, trl); everything that can fail early fails in preflight.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from finetune_trainer import (
    checkpoints,
    disk_space,
    export,
    finite,
    fit,
    notices,
    prepared,
    pulse,
    resume,
    saving,
    signals,
    summary,
)
from finetune_trainer.callbacks import ProgressCallback
from finetune_trainer.data import encoding
from finetune_trainer.failures import NotFinite
from finetune_trainer.methods import adapters, choices, models, packing, sampling, settings, trainers
from finetune_trainer.methods.models import Head
from finetune_trainer.preflight import Checked
from finetune_trainer.progress import Phase, Reporter, format_duration, say
from finetune_trainer.rewards import functions
from finetune_trainer.rewards import models as reward_models
from finetune_trainer.runfile import Objective, RunFile


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
    encoded = prepared.encode(run, checked)
    precision = choices.choose_precision(
        run.hyperparameters.precision, device=device.name, gpu_has_bfloat16=device.has_bfloat16
    )
    choices.explain("precision", precision)
    needs = fit.check(run, checked, device, precision=precision.value, length=_longest(run, encoded))
    if needs is not None:
        disk_space.check(run, needs, rows=len(encoded.train), work=work)
    model = models.load_base(run, checked.model, device=device, precision=precision.value, head=_head(run))
    _check_model(model, run, encoded)
    train_set = prepared.build_train_set(run, encoded)
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
        counts_on=run.objective.samples,
    )
    trainer = _build_trainer(
        run, checked, encoded, model, train_set, chosen=chosen, callback=callback, work=work
    )
    if store is not None and run.checkpoint is not None:
        saving.Saver(
            store,
            run.checkpoint,
            config_digest=resume.digest_config(run, checked),
            reporter=reporter,
            facts=callback.to_facts,
            keep_best=run.early_stopping is not None,
        ).attach(trainer)
    try:
        _run(trainer, resumption, store)
        return _export(
            run, checked, encoded, trainer=trainer, callback=callback, chosen=chosen, folder=work / "artifact"
        )
    except NotFinite:
        finite.check_base(checked.model, uri=run.model.uri)
        raise


def _build_trainer(
    run: RunFile,
    checked: Checked,
    encoded: prepared.Encoded,
    model: Any,
    train_set: Any,
    *,
    chosen: settings.Settings,
    callback: ProgressCallback,
    work: Path,
) -> Any:
    model, peft_config = _adapt(model, run, checked, head=_head(run))
    plan = trainers.Plan(
        objective=run.objective,
        model=model,
        peft_config=peft_config,
        arguments=settings.build_arguments(run, chosen, work),
        tokenizer=encoded.tokenizer,
        train_set=train_set,
        eval_set=prepared.build_eval_set(encoded),
        callbacks=[callback, *_early_stopping(run)],
    )
    return trainers.build(
        plan, _load_judges(run, checked, encoded, chosen) if run.objective.samples else None
    )


def _export(
    run: RunFile,
    checked: Checked,
    encoded: prepared.Encoded,
    *,
    trainer: Any,
    callback: ProgressCallback,
    chosen: settings.Settings,
    folder: Path,
) -> dict[str, Any]:
    """Evaluates what was trained and writes the artifact's files; returns the manifest without their list."""
    reporter = callback.reporter

    reporter.update(phase=Phase.EVALUATING, remaining_seconds=0)
    evaluation = summary.evaluate(run, trainer) if encoded.held_out else {}
    finite.check_weights(trainer.model, step=trainer.state.global_step)

    reporter.update(phase=Phase.EXPORTING)
    metrics = summary.summarize(trainer, callback, evaluation)
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


def _head(run: RunFile) -> Head:
    return Head.REWARD if run.objective is Objective.REWARD_MODEL else Head.LANGUAGE


def _longest(run: RunFile, encoded: prepared.Encoded) -> int:
    """Tokens of the longest row; what is sampled may be as long as the model is let."""
    lengths = [len(row.input_ids) for row in prepared.answers(encoded.train)]
    return encoded.max_length if run.objective.samples or not lengths else max(lengths)


def _prepare_libraries() -> int:
    """Makes the libraries quiet and gives them all cores; returns how many."""
    threads = choices.choose_threads()
    choices.explain("threads", threads)
    torch.set_num_threads(threads.value)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_tqdm_hook(pulse.hook_bars)
    datasets.disable_progress_bars()
    return threads.value


# ---------------------------------------------------------------- training


def _check_model(model: Any, run: RunFile, encoded: prepared.Encoded) -> None:
    """Raises BadConfig when the model does not fit the tokens, or lets packed rows mix."""
    rows = [row.input_ids for row in prepared.answers(encoded.train) + prepared.answers(encoded.held_out)]
    models.check_vocabulary(model, encoded.tokenizer, max(max(row) for row in rows), uri=run.model.uri)
    if run.hyperparameters.packing:
        packing.check_separation(model, [row.input_ids for row in prepared.answers(encoded.train)])


def _adapt(model: Any, run: RunFile, checked: Checked, *, head: Head) -> tuple[Any, Any | None]:
    """The model with an earlier job's adapter; or with the configuration of a new one; or, for Full, as it is."""
    if checked.lora is None:
        return model, None
    if checked.adapter is None:
        return model, adapters.build_lora(checked.lora, model, head=head)
    say(f"training goes on with the adapter {checked.adapter.uri} ({checked.adapter.digest})")
    return adapters.continue_adapter(model, checked.adapter, checked.lora, head=head), None


def _load_judges(
    run: RunFile, checked: Checked, encoded: prepared.Encoded, chosen: settings.Settings
) -> trainers.Judges:
    book = sampling.Book(
        rows=[row for row in (*encoded.train, *encoded.held_out) if isinstance(row, encoding.PromptRow)],
        choice=run.dataset.apply_chat_template,
        has_template=encoded.tokenizer.chat_template is not None,
    )
    scorer = None
    if checked.reward_model is not None:
        scorer = reward_models.load(
            checked.reward_model,
            device=chosen.device,
            precision=chosen.precision,
            max_length=encoded.max_length,
            batch_size=chosen.micro_batch,
        )
    return trainers.Judges(scorer, [functions.load(source) for source in checked.reward_functions], book)


def _early_stopping(run: RunFile) -> list[transformers.TrainerCallback]:
    if run.early_stopping is None:
        return []
    return [
        transformers.EarlyStoppingCallback(
            early_stopping_patience=run.early_stopping.patience,
            early_stopping_threshold=run.early_stopping.min_delta,
        )
    ]


def _run(trainer: Any, resumption: resume.Resumption | None, store: checkpoints.Store | None) -> None:
    started = time.monotonic()
    signals.check()
    with contextlib.ExitStack() as stack:
        if store is not None:
            stack.enter_context(signals.deferred())
            stack.enter_context(notices.heeded())
        resume.train(trainer, resumption, store)
    seconds = format_duration(time.monotonic() - started)
    since = "" if resumption is None else f" (from {resumption.step})"
    say(f"trained to step {trainer.state.global_step}{since} in {seconds}")
