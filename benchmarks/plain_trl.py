"""Supervised fine-tuning of a LoRA adapter as a plain TRL script: what the operator is measured against.

It is written as a user of TRL would write it, with the same settings as examples/quickstart/finetunejob.yaml, and
prints one JSON object with its timings as the last line:

    python benchmarks/plain_trl.py --model FOLDER --data examples/quickstart/train.jsonl --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import psutil


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--data", required=True, help="JSON Lines with chat messages")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows per forward pass")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-ratio", type=float, default=0.05)
    parser.add_argument("--scheduler", default="cosine")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"])
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    started = psutil.Process().create_time()  # seconds since the epoch: before Python read this file
    args = parse_arguments()

    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        """Notes when each optimizer step begins and ends."""

        def __init__(self) -> None:
            self.begun = 0.0
            self.first_step_ended: float | None = None
            self.steps: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps.append(round(time.time() - self.begun, 3))
            self.first_step_ended = self.first_step_ended or time.time()

    stopwatch = Stopwatch()
    trainer = build_trainer(args, stopwatch)
    trainer.train()
    trainer.save_model(args.output)

    ended = time.time()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "firstStepAt": stopwatch.first_step_ended,  # seconds since the epoch
        "firstStepSeconds": round((stopwatch.first_step_ended or ended) - started, 2),
        "wholeSeconds": round(ended - started, 2),
        "stepSeconds": stopwatch.steps,
        "cpuSeconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peakRssBytes": usage.ru_maxrss * 1024,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (Path(args.output) / "timings.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def build_trainer(args: argparse.Namespace, callback: Any) -> Any:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=args.data, split="train").map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=["messages"],
    )
    config = SFTConfig(
        output_dir=args.output,
        model_init_kwargs={"dtype": "float32"},
        max_steps=args.max_steps,
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_ratio,
        lr_scheduler_type=args.scheduler,
        max_length=args.max_length,
        logging_steps=1,
        save_strategy="no",
        seed=args.seed,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        report_to="none",
    )
    adapter = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        task_type="CAUSAL_LM",
    )
    return SFTTrainer(
        model=args.model, args=config, train_dataset=rows, peft_config=adapter, callbacks=[callback]
    )


if __name__ == "__main__":
    main()
