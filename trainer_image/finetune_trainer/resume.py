"""From the newest checkpoint that can be trusted to a trainer that goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import transformers

from finetune_trainer import checkpoints, saving
from finetune_trainer.failures import CheckpointCorrupt, ErrorClass, classify
from finetune_trainer.preflight import Checked
from finetune_trainer.progress import say
from finetune_trainer.runfile import Resume, RunFile

TRAINER_STATE = "trainer_state.json"
_OF_OBJECTIVES = ("preference", "reward", "generation")  # absent for SFT


@dataclasses.dataclass(frozen=True)
class Resumption:
    checkpoint: checkpoints.Checkpoint
    folder: Path  # its files, as the trainer saved them
    patience_used: int  # evaluations without progress that early stopping had counted

    @property
    def step(self) -> int:
        return self.checkpoint.step


def digest_config(run: RunFile, checked: Checked) -> str:
    """Returns the digest of all that a checkpoint depends on: settings, data, revision of the base model.

    The micro batch is not in it: the global batch and the order of rows stay the same when it changes.
    """
    settings = run.model_dump(
        mode="json",
        by_alias=True,
        include={"objective", "model", "method", "hyperparameters", "early_stopping", *_OF_OBJECTIVES},
    )
    del settings["hyperparameters"]["microBatchSize"]
    for name in [name for name in _OF_OBJECTIVES if settings[name] is None]:
        del settings[name]  # a checkpoint of before there were these parts is as good as ever
    if settings["model"]["adapter"] is None:
        del settings["model"]["adapter"]
    facts = {
        **settings,
        "split": run.dataset.split.model_dump(mode="json"),
        "applyChatTemplate": run.dataset.apply_chat_template,
        "sources": [
            source.model_dump(mode="json", exclude={"uri"}) for source in run.dataset.sources
        ],  # where data lies does not matter, what is in it does
        "datasetDigest": checked.dataset_digest,
        "modelRevision": checked.revision,
        **_upstream_digests(checked),
    }
    return f"sha256:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"


def _upstream_digests(checked: Checked) -> dict[str, Any]:
    digests: dict[str, Any] = {}
    if checked.adapter is not None:
        digests["adapterDigest"] = checked.adapter.digest
    if checked.reward_model is not None:
        digests["rewardDigest"] = checked.reward_model.artifact.digest
    if checked.reward_functions:
        digests["rewardFunctions"] = [source.digest for source in checked.reward_functions]
    return digests


def find(
    run: RunFile, store: checkpoints.Store, *, config_digest: str, output_dir: Path
) -> Resumption | None:
    """Brings the newest whole checkpoint into the trainer's folder; None when there is none, or resume is Never.

    One that differs from its manifest is marked and the one before it is taken. Raises StorageFailed.
    """
    if run.checkpoint is None or run.checkpoint.resume is Resume.NEVER:
        return None
    for checkpoint in store.find(config_digest):
        folder = output_dir / f"checkpoint-{checkpoint.step}"
        try:
            store.fetch(checkpoint, folder)
            patience_used = _prepare(folder, output_dir)
        except checkpoints.Corrupt as finding:
            store.mark_corrupt(checkpoint.step, str(finding))
            shutil.rmtree(folder, ignore_errors=True)
            continue
        say(f"resuming from {checkpoint.uri}")
        return Resumption(checkpoint, folder, patience_used)
    return None


def _prepare(folder: Path, output_dir: Path) -> int:
    """Puts state and best weights where and as the trainer reads them; returns early stopping's count.

    Raises Corrupt for a state that is not one, or that another version of the libraries has written.
    """
    file = folder / TRAINER_STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        best_step = state["best_global_step"]
        stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", {}).get("attributes", {})
        patience_used = int(stopping.get("early_stopping_patience_counter", 0))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise checkpoints.Corrupt(
            f"{TRAINER_STATE} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if best_step:
        best = output_dir / f"checkpoint-{best_step}"
        if (folder / saving.BEST).is_dir():
            (folder / saving.BEST).rename(best)
        state["best_model_checkpoint"] = str(best) if best.is_dir() else None
    known = {field.name for field in dataclasses.fields(transformers.TrainerState)}
    state = {name: value for name, value in state.items() if name in known}  # a later version may tell more
    file.write_text(json.dumps(state), encoding="utf-8")
    return patience_used


def train(trainer: Any, resumption: Resumption | None, store: checkpoints.Store | None) -> None:
    """Trains to the end, from the beginning or from a checkpoint; with nothing left to do it only loads the weights.

    Raises CheckpointCorrupt when the checkpoint is whole and yet cannot be loaded; it is marked then.
    """
    if resumption is None or store is None:
        trainer.train()
        return
    started = _Started()
    trainer.add_callback(started)
    try:
        if _is_over(trainer, resumption):
            _load_only(trainer, resumption)
        else:
            trainer.train(resume_from_checkpoint=str(resumption.folder))
    except (
        Exception
    ) as error:  # the libraries raise whatever they meet in a file; ours and storage's pass through
        if started.value or classify(error)[0] is not ErrorClass.INTERNAL:
            raise
        store.mark_corrupt(resumption.step, f"{type(error).__name__}: {error}")
        raise CheckpointCorrupt(
            f"{resumption.checkpoint.uri} cannot be loaded ({type(error).__name__}: {error}) and is not used again; "
            "the next attempt takes the one before it"
        ) from error


class _Started(transformers.TrainerCallback):  # type: ignore[misc]
    """Whether loading is over and training has begun."""

    value = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.value = True


def _is_over(trainer: Any, resumption: Resumption) -> bool:
    stopping = [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, transformers.EarlyStoppingCallback)
    ]
    for callback in stopping:
        callback.early_stopping_patience_counter = resumption.patience_used
    given_up = any(resumption.patience_used >= callback.early_stopping_patience for callback in stopping)
    return given_up or resumption.step >= trainer.args.max_steps


def _load_only(trainer: Any, resumption: Resumption) -> None:
    trainer._load_from_checkpoint(str(resumption.folder))
    trainer.state = transformers.TrainerState.load_from_json(str(resumption.folder / TRAINER_STATE))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
