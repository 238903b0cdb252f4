"""What is really used, after every automatic choice, and the same in the words of TRL's trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl

from finetune_trainer.methods import choices, models
from finetune_trainer.runfile import Objective, Optimizer, Precision, Preference, RunFile, Scheduler

CHECKPOINTS = "checkpoints"  # in the work folder: where the trainer saves before anything is uploaded

SCHEDULERS = {
    Scheduler.LINEAR: "linear",
    Scheduler.COSINE: "cosine",
    Scheduler.CONSTANT: "constant_with_warmup",
}
OPTIMIZERS = {Optimizer.ADAMW: "adamw_torch", Optimizer.ADAMW_8BIT: "adamw_8bit", Optimizer.SGD: "sgd"}


@dataclass(frozen=True)
class Settings:
    learning_rate: float
    micro_batch: int
    precision: Precision
    max_length: int
    total_steps: int
    eval_steps: int | None  # None: no held-out rows
    device: models.Device
    beta: float | None = None  # how much leaving the reference costs; None: the objective has none

    def to_report(self) -> dict[str, Any]:
        """What the job's status shows of them."""
        return {
            "learningRate": self.learning_rate,
            "microBatchSize": self.micro_batch,
            "precision": self.precision,
            "device": self.device.description,
        }


def prompts_per_step(run: RunFile) -> int | None:
    """Rows of an optimizer step where each row is answered several times, None elsewhere."""
    if not run.objective.samples:
        return None
    return run.hyperparameters.global_batch_size // run.sampling.num_generations


def choose(
    run: RunFile, precision: Precision, max_length: int, device: models.Device, *, rows: int, evaluate: bool
) -> Settings:
    """Chooses what the run file leaves open and prints the reasons. Of packed `rows` each sequence counts as one."""
    hyper = run.hyperparameters
    learning_rate = choices.choose_learning_rate(hyper, run.method.type, run.objective)
    micro_batch = choices.choose_micro_batch(hyper, override=run.overrides.micro_batch_size)
    total_steps = choices.choose_total_steps(hyper, rows=rows, rows_per_step=prompts_per_step(run))
    eval_steps = choices.choose_eval_steps(hyper, total_steps=total_steps.value)
    choices.explain("learningRate", learning_rate)
    choices.explain("microBatchSize", micro_batch)
    choices.explain("steps", total_steps)
    if evaluate:
        choices.explain("evalSteps", eval_steps)
    return Settings(
        learning_rate=learning_rate.value,
        micro_batch=micro_batch.value,
        precision=precision,
        max_length=max_length,
        total_steps=total_steps.value,
        eval_steps=eval_steps.value if evaluate else None,
        device=device,
        beta=_choose_beta(run),
    )


def _choose_beta(run: RunFile) -> float | None:
    if run.objective.samples:
        penalty = choices.choose_kl_penalty(run.reward, run.objective)
        choices.explain("reward.beta", penalty)
        return penalty.value
    if run.objective is Objective.DPO:
        return (run.preference or Preference()).beta
    return None


CONFIGS = {
    Objective.SFT: trl.SFTConfig,
    Objective.DPO: trl.DPOConfig,
    Objective.REWARD_MODEL: trl.RewardConfig,
    Objective.RLOO: trl.RLOOConfig,
    Objective.GRPO: trl.GRPOConfig,
}


def build_arguments(run: RunFile, settings: Settings, work: Path) -> Any:
    """The settings and the rest of the run file as TRL's configuration for the objective."""
    hyper = run.hyperparameters
    on_cpu = settings.device.name == "cpu"
    keep_best = run.early_stopping is not None
    return CONFIGS[run.objective](
        output_dir=str(work / CHECKPOINTS),
        max_steps=settings.total_steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=hyper.global_batch_size
        // settings.micro_batch,  # the global batch is kept
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
        save_only_model=True,  # for the best weights; Saver wants more, and says so when it saves
        load_best_model_at_end=keep_best,
        metric_for_best_model=watched(run.objective) if keep_best else None,
        greater_is_better=run.objective.samples if keep_best else None,
        logging_steps=choices.choose_logging_steps(settings.total_steps),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # with the filter a NaN is logged as 0 and the run counts as a success
        report_to="none",
        disable_tqdm=True,
        seed=hyper.seed,
        data_seed=hyper.seed,
        **_own_arguments(run, settings),
    )


def watched(objective: Objective) -> str:
    """The metric of an evaluation that tells whether training gets anywhere."""
    return "eval_reward" if objective.samples else "eval_loss"


def _own_arguments(run: RunFile, settings: Settings) -> dict[str, Any]:
    """What only the objective's configuration knows. Rows are tokens and cut already."""
    hyper, sampling, reward = run.hyperparameters, run.sampling, run.reward
    match run.objective:
        case Objective.SFT:
            return {
                "packing": hyper.packing,
                "eval_packing": False,
                "max_length": settings.max_length,
                "dataset_kwargs": {"skip_prepare_dataset": True},
            }
        case Objective.DPO:
            return {"beta": settings.beta, "max_length": None, "remove_unused_columns": False}
        case Objective.REWARD_MODEL:
            return {"max_length": None}
        case _:
            return {
                "beta": settings.beta,
                "reward_weights": None if reward is None else reward.weights,
                "num_generations": sampling.num_generations,
                "num_generations_eval": 1,
                "max_completion_length": sampling.max_completion_length,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
                "disable_dropout": True,  # the answer's probabilities must be those of the model that is served
            }


def describe(run: RunFile, settings: Settings) -> dict[str, Any]:
    """Every hyperparameter with the value that was used, under the names of the spec."""
    given = run.hyperparameters.model_dump(by_alias=True, exclude_none=True, mode="json")
    if run.objective.samples:
        given |= run.sampling.model_dump(by_alias=True, mode="json")
    if settings.beta is not None:
        given["beta"] = settings.beta
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
