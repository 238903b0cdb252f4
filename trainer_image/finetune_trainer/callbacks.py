"""What happens at each step: the log line, the report, the time estimate, the stop on a NaN."""

from __future__ import annotations

import math
import time
from typing import Any

import transformers

from finetune_trainer.failures import NotFinite
from finetune_trainer.progress import Clock, Phase, Reporter, format_duration, say

# Names of TRL's trainers, and those of reports.
REPORTED = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "reward": "reward",
    "eval_reward": "eval_reward",
    "kl": "kl",
    "accuracy": "accuracy",
    "eval_accuracy": "eval_accuracy",
    "rewards/accuracies": "accuracy",
    "eval_rewards/accuracies": "eval_accuracy",
    "completions/mean_length": "completion_length",
}
SHOWN = {"reward": "reward", "kl": "KL", "accuracy": "accuracy", "completion_length": "tokens an answer"}


class ProgressCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports every logged step and raises NotFinite instead of letting a broken run look like a success."""

    def __init__(
        self,
        reporter: Reporter,
        *,
        eval_steps: int | None,
        learning_rate: float,
        before: dict[str, Any],
        counts_on: bool = False,
    ) -> None:
        self.reporter = reporter
        self.eval_steps = eval_steps  # None: no held-out rows
        self.learning_rate = learning_rate
        self.clock = Clock()
        # Of the whole job: what earlier attempts did up to the checkpoint counts.
        self.train_seconds = float(before.get("trainSeconds", 0.0))
        self.tokens = float(before.get("trainTokens", 0.0))
        self._tokens_before = (
            0.0 if counts_on else self.tokens
        )  # the trainer goes on with its count, or begins anew
        self._step_started = 0.0
        self._step_ended = 0.0
        self._steps_at_log = 0
        self._tokens_per_step: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps_at_log = state.global_step
        self.reporter.update(phase=Phase.TRAINING, total_steps=state.max_steps, step=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_started = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reporter.beat()  # a step of many micro batches, or an evaluation of many, may take longer than a stall

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reporter.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_ended = time.monotonic()
        seconds = self._step_ended - self._step_started
        self.train_seconds += seconds
        self.clock.add_step(seconds)
        self.reporter.update(
            step=state.global_step, epoch=state.epoch or 0.0, remaining_seconds=self._remaining(state)
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate or self._step_ended:
            self.clock.add_evaluation(time.monotonic() - self._step_ended)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        self._check_finite(logs, step=state.global_step)
        if "loss" in logs:
            self._count_tokens(logs, state)
        if "loss" not in logs and "eval_loss" not in logs:
            return
        metrics = {ours: float(logs[name]) for name, ours in REPORTED.items() if logs.get(name) is not None}
        if (
            "eval_reward" in metrics
        ):  # the loss of sampled answers weighs them by their rewards: its value says nothing
            del metrics["eval_loss"]
        self.reporter.update(
            metrics=metrics,
            step=state.global_step,
            epoch=state.epoch or 0.0,
            tokens_per_second=self.tokens_per_second,
            remaining_seconds=self._remaining(state),
        )
        say(self._describe(metrics, state))

    def to_facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of this run, for `before` of the next one."""
        return {"trainSeconds": round(self.train_seconds, 2), "trainTokens": self.tokens}

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of training rows, padding not counted, per second of training, lately."""
        if self._tokens_per_step is None or not self.clock.step_seconds:
            return None
        return self._tokens_per_step / self.clock.step_seconds

    def _count_tokens(self, logs: dict[str, Any], state: Any) -> None:
        steps = state.global_step - self._steps_at_log
        if "num_tokens" in logs and steps > 0:
            tokens = self._tokens_before + logs["num_tokens"]
            latest = (tokens - self.tokens) / steps
            previous = latest if self._tokens_per_step is None else self._tokens_per_step
            self._tokens_per_step = previous + Clock.SMOOTHING * (latest - previous)
            self.tokens, self._steps_at_log = tokens, state.global_step

    def _remaining(self, state: Any) -> int | None:
        evaluations = 0
        if self.eval_steps is not None:
            evaluations = state.max_steps // self.eval_steps - state.global_step // self.eval_steps
        return self.clock.remaining(steps=state.max_steps - state.global_step, evaluations=evaluations)

    def _check_finite(self, logs: dict[str, Any], *, step: int) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise NotFinite(
                    f"{name} is {float(logs[name])} at step {step} with learning rate {self.learning_rate:g}; "
                    f"set hyperparameters.learningRate to {self.learning_rate / 2:g} or less, or raise warmupRatio. "
                    "Nothing was exported"
                )

    def _describe(self, metrics: dict[str, float], state: Any) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch or 0:.2f}"]
        if "eval_loss" in metrics or "eval_reward" in metrics:
            return " · ".join([*parts, *_describe_evaluation(metrics)])
        parts.append(f"loss {metrics['loss']:.4f}")
        parts += [f"{word} {metrics[name]:.4g}" for name, word in SHOWN.items() if name in metrics]
        if "learning_rate" in metrics:
            parts.append(f"lr {metrics['learning_rate']:.2e}")
        if "grad_norm" in metrics:
            parts.append(f"grad {metrics['grad_norm']:.3f}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        remaining = self._remaining(state)
        if remaining is not None:
            parts.append(f"ETA {format_duration(remaining)}")
        return " · ".join(parts)


def _describe_evaluation(metrics: dict[str, float]) -> list[str]:
    if "eval_reward" in metrics:
        return [f"eval reward {metrics['eval_reward']:.4g}"]
    accuracy = [f"eval accuracy {metrics['eval_accuracy']:.4g}"] if "eval_accuracy" in metrics else []
    return [f"eval loss {metrics['eval_loss']:.4f}", *accuracy]
