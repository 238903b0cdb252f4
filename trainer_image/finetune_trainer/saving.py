"""When a checkpoint is made: by steps, by minutes, and when the process is asked to stop."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from finetune_trainer import finite, randomness, signals, storage
from finetune_trainer.checkpoints import Checkpoint, Store
from finetune_trainer.failures import Preempted
from finetune_trainer.progress import Reporter, format_duration, say
from finetune_trainer.runfile import Checkpoint as Schedule

# What a resumed run reads; everything else (a pickle of the arguments, a card, the tokenizer) is made anew.
STATE_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "trainer_state.json")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json")
BEST = "best"  # the weights that early stopping would export, where they are of an earlier step
LONG_REST = 5.0  # seconds; a stop waits for the rest of a step that takes no longer than that


class Saver(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes the trainer save at the end of a step and copies what it saved into the store.

    After a request to stop it saves after the current step and raises Preempted; where the rest of the step would take
    long, it gives the step up and saves what was before it.
    """

    def __init__(
        self,
        store: Store,
        schedule: Schedule,
        *,
        config_digest: str,
        reporter: Reporter,
        facts: Callable[[], dict[str, Any]],
        keep_best: bool,
    ) -> None:
        self.store = store
        self.schedule = schedule
        self.config_digest = config_digest
        self.reporter = reporter
        self.facts = facts  # what the manifest tells beside files and step
        self.keep_best = keep_best
        self.trainer: Any = None  # set by attach
        self.saved_step = 0
        self._saved_at = 0.0  # monotonic seconds
        self._step_began = 0.0
        self._substeps = 0  # micro batches of the current step that are done
        self._randomness: Any = None  # as it was when the current step began
        self._reason: str | None = None

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.give_up_step = self.give_up_step
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved_step, self._saved_at = state.global_step, time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began, self._substeps = time.monotonic(), 0
        self._randomness = randomness.capture()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._substeps += 1
        if signals.stop_requested() and self._rest(args) > LONG_REST:
            self.give_up_step()

    def give_up_step(self) -> None:
        """Saves what was before the current step and raises Preempted.

        No weight has changed since the last step; with the same random numbers the step is done again.
        """
        args, state = self.trainer.args, self.trainer.state
        say(f"step {state.global_step + 1} is given up: its rest takes too long")
        randomness.restore(self._randomness)
        self._save_now(args, state)

    def _rest(self, args: Any) -> float:
        """Seconds that the current step will still take."""
        each = (time.monotonic() - self._step_began) / self._substeps
        return float(each * (args.gradient_accumulation_steps - self._substeps))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._reason = self._due(state.global_step)
        # Best weights alone are saved without optimizer, which would triple them.
        args.save_only_model = self._reason is None
        if self._reason is None:
            return
        control.should_save = True
        if signals.stop_requested() and not self.keep_best:
            control.should_evaluate = False  # the grace time is short; the loss decides nothing

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation may take longer than the grace time: it is broken off, unless early stopping counts on it."""
        if signals.stop_requested() and self.trainer.is_in_train and not self.keep_best:
            self._save_now(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._reason is not None:
            self._upload(args, state)
        if signals.stop_requested() and self.saved_step == state.global_step:
            self._stop(state.global_step)

    def _save_now(self, args: Any, state: Any) -> None:
        """Saves the state after the last whole step, unless that is done. Raises Preempted."""
        if self.saved_step < state.global_step:
            self._reason, args.save_only_model = "Preempted", False
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self._upload(args, state)
        self._stop(state.global_step)

    def _due(self, step: int) -> str | None:
        """Why a checkpoint is to be made after this step, None when it is not."""
        if signals.stop_requested():
            return "Preempted"
        if self.schedule.every_steps is not None and step % self.schedule.every_steps == 0:
            return "Steps"
        minutes = (time.monotonic() - self._saved_at) / 60
        if self.schedule.every_minutes is not None and minutes >= self.schedule.every_minutes:
            return "Minutes"
        return None

    def _upload(self, args: Any, state: Any) -> None:
        """Copies what the trainer saved into the store. Raises NotFinite instead of replacing what is finite."""
        started, step = time.monotonic(), state.global_step
        finite.check_weights(self.trainer.model, step=step)
        finite.check_optimizer(self.trainer.optimizer, step=step)
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        files = collect(folder, best=_best_folder(state) if self.keep_best else None)
        saved = self.store.save(
            files,
            step=step,
            config_digest=self.config_digest,
            facts={"totalSteps": state.max_steps, "reason": self._reason, **self.facts()},
        )
        self.saved_step, self._saved_at, self._reason = step, time.monotonic(), None
        self.reporter.update(checkpoint=saved.to_report())
        say(f"{_describe(saved)} saved in {format_duration(self._saved_at - started)}")
        if not signals.stop_requested():
            self._prune(step)
        if not self.keep_best:
            shutil.rmtree(folder)  # nothing here reads it again

    def _prune(self, step: int) -> None:
        try:
            self.store.prune(step, keep=self.schedule.keep)
        except Exception as error:  # what was to be saved is saved, and the next save removes them
            if not storage.is_failure(error):
                raise
            text = f"older checkpoints in {self.store.folder.uri} could not be removed"
            say(f"{text} ({storage.describe_error(error)}); training goes on")

    def _stop(self, step: int) -> None:
        if self.saved_step == 0:
            raise Preempted(f"stopped by SIGTERM after step {step}; there was nothing to save yet")
        uri = f"{self.store.folder.uri.rstrip('/')}/checkpoint-{self.saved_step}"
        raise Preempted(f"stopped by SIGTERM after step {step}; {uri} is complete")


def collect(folder: Path, *, best: Path | None) -> dict[str, Path]:
    """The files of a checkpoint, by their names in it; `best` is the folder of the best weights so far."""
    files = {name: folder / name for name in STATE_FILES if (folder / name).is_file()}
    files.update(_weights(folder))
    if best is not None and best != folder:
        files.update({f"{BEST}/{name}": path for name, path in _weights(best).items()})
    return files


def _weights(folder: Path) -> dict[str, Path]:
    return {path.name: path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}


def _best_folder(state: Any) -> Path | None:
    return None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint)


def _describe(saved: Checkpoint) -> str:
    size = sum(file["size"] for file in saved.manifest["files"])
    return f"{saved.uri} ({len(saved.manifest['files'])} files, {size} bytes)"
