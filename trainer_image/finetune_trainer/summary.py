"""What a run came to: the metrics of its manifest."""

from __future__ import annotations

from typing import Any

from finetune_trainer.callbacks import ProgressCallback
from finetune_trainer.runfile import RunFile

# Of TRL's metrics, those that tell how far an objective is: names there, names in the manifest.
MEASURED = {
    "loss": "loss",
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "completionLength",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "margin": "margin",
    "rewards/margins": "margin",
}
RECENT = 10  # logged steps that an average of noisy metrics goes over


def evaluate(run: RunFile, trainer: Any) -> dict[str, float]:
    """Returns the metrics of the held-out rows, without their prefix, for the weights that are exported."""
    latest = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if run.early_stopping is not None or latest is None or latest["step"] != trainer.state.global_step:
        latest = trainer.evaluate()  # else these very weights were just evaluated
    return {name.removeprefix("eval_"): value for name, value in latest.items() if name.startswith("eval_")}


def summarize(trainer: Any, callback: ProgressCallback, evaluation: dict[str, float]) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, Any] = {
        "step": trainer.state.global_step,
        "epoch": round(trainer.state.epoch or 0.0, 4),
        "loss": logs[-1]["loss"],
        "trainSeconds": round(callback.train_seconds, 2),
        "tokensPerSecond": round(callback.tokens / callback.train_seconds, 1),
    }
    for theirs, ours in MEASURED.items():
        recent = [entry[theirs] for entry in logs[-RECENT:] if entry.get(theirs) is not None]
        if recent and ours not in metrics:
            metrics[ours] = sum(recent) / len(recent)
        # The loss of sampled answers weighs them by their rewards: its value says nothing.
        if evaluation.get(theirs) is not None and not (theirs == "loss" and "reward" in evaluation):
            metrics[f"eval{ours[0].upper()}{ours[1:]}"] = float(evaluation[theirs])
    return metrics
