"""The automatic choices. Each returns its value together with the reason, which is printed and can be argued with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from finetune_fit import runs
from finetune_trainer import machine
from finetune_trainer.failures import BadConfig
from finetune_trainer.progress import say
from finetune_trainer.runfile import Hyperparameters, MethodType, Objective, Precision, Reward

# Of adapters, and of all weights: preferences and rewards are learnt in smaller steps than demonstrations.
LEARNING_RATES = {
    Objective.SFT: (2e-4, 2e-5),
    Objective.DPO: (5e-5, 1e-6),
    Objective.REWARD_MODEL: (1e-4, 1e-5),
    Objective.RLOO: (5e-5, 1e-6),
    Objective.GRPO: (5e-5, 1e-6),
}
KL_PENALTIES = {Objective.RLOO: 0.05, Objective.GRPO: 0.0}
EVALUATIONS = 10  # per run
LOGGED_STEPS = 400  # log lines of a run at most, so that a long run's log stays readable

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    value: T
    reason: str


def explain(name: str, choice: Choice[Any]) -> None:
    say(f"{name}: {choice.value} ({choice.reason})")


def choose_learning_rate(
    hyper: Hyperparameters, method: MethodType, objective: Objective = Objective.SFT
) -> Choice[float]:
    if hyper.learning_rate is not None:
        return Choice(hyper.learning_rate, "as given")
    adapter, whole = LEARNING_RATES[objective]
    return Choice(whole if method is MethodType.FULL else adapter, f"default for {objective} with {method}")


def choose_kl_penalty(reward: Reward | None, objective: Objective) -> Choice[float]:
    if reward is not None and reward.beta is not None:
        return Choice(reward.beta, "as given")
    return Choice(KL_PENALTIES[objective], f"default for {objective}")


def choose_micro_batch(hyper: Hyperparameters, *, override: int | None = None) -> Choice[int]:
    """Returns rows per forward pass, which always divide the global batch (the run file's check saw to a given one).

    An override comes from the operator after a GPU ran out of memory: fewer rows at once, the same global batch.
    """
    total = hyper.global_batch_size
    if override is not None:
        return Choice(runs.micro_batch_size(total, most=override), f"override, at most {override}")
    if hyper.micro_batch_size is not None:
        return Choice(hyper.micro_batch_size, "as given")
    return Choice(
        runs.micro_batch_size(total),
        f"largest divisor of globalBatchSize {total} up to {runs.MOST_AUTOMATIC_ROWS}",
    )


def choose_precision(asked: Precision, *, device: str, gpu_has_bfloat16: bool) -> Choice[Precision]:
    """Raises BadConfig for BFloat16 on a GPU that computes it only by emulation."""
    on_gpu = device.startswith("cuda")
    if asked is Precision.BFLOAT16 and on_gpu and not gpu_has_bfloat16:
        raise BadConfig(
            "hyperparameters.precision: BFloat16 is not supported by this GPU; use Auto or Float32"
        )
    if asked is not Precision.AUTO:
        return Choice(asked, "as given")
    if on_gpu and gpu_has_bfloat16:
        return Choice(Precision.BFLOAT16, "the GPU has bfloat16")
    return Choice(Precision.FLOAT32, "the GPU has no bfloat16" if on_gpu else "on a CPU bfloat16 is slower")


def choose_max_length(asked: int, *, model_limit: int | None) -> Choice[int]:
    if model_limit is not None and asked > model_limit:
        return Choice(model_limit, f"the model has {model_limit} positions, fewer than maxLength {asked}")
    return Choice(asked, "as given")


def choose_total_steps(hyper: Hyperparameters, *, rows: int, rows_per_step: int | None = None) -> Choice[int]:
    """`rows_per_step` is the global batch unless a row is answered several times."""
    if hyper.max_steps is not None:
        return Choice(hyper.max_steps, "maxSteps")
    each = rows_per_step or hyper.global_batch_size
    value = max(1, math.ceil(hyper.epochs * math.ceil(rows / each)))
    return Choice(value, f"{hyper.epochs:g} epochs of {rows} rows, {each} a step")


def choose_eval_steps(hyper: Hyperparameters, *, total_steps: int) -> Choice[int]:
    if hyper.eval_steps is not None:
        return Choice(hyper.eval_steps, "as given")
    return Choice(max(1, total_steps // EVALUATIONS), f"{EVALUATIONS} evaluations in {total_steps} steps")


def choose_logging_steps(total_steps: int) -> int:
    return max(1, total_steps // LOGGED_STEPS)


def choose_threads() -> Choice[int]:
    """Returns the CPU cores that this process may use. Ray sets OMP_NUM_THREADS to 1, which would waste the others."""
    granted = os.environ.get("FINETUNE_CPUS")
    if granted:
        try:
            return Choice(max(1, math.floor(float(granted))), "FINETUNE_CPUS")
        except ValueError:
            raise BadConfig(f"FINETUNE_CPUS: {granted!r} is not a number of cores") from None
    return Choice(*machine.count_cores())
