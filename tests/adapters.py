"""LoRA adapters over the tiny model, as PEFT writes them, and committed artifacts as the trainer leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer import artifacts, storage
from finetune_trainer.runfile import Job


def write_adapter(model: Path, folder: Path, *, seed: int, **settings: Any) -> Path:
    """Writes a random adapter that changes answers visibly; `settings` go to peft.LoraConfig."""
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    options: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    tuned = peft.get_peft_model(base, peft.LoraConfig(**{**options, **settings}))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:  # zero at the start, and then an adapter changes nothing
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    return folder


def commit_artifact(adapter: Path, folder: Path, *, base_uri: str, rank: int = 8, **more: Any) -> str:
    """Commits an adapter's files as the trainer does; returns the artifact's digest."""
    job = Job(namespace="default", name="tiny", uid=f"uid-{folder.name}", attempt=1)
    target = storage.open_folder(f"file://{folder}")
    artifacts.claim_folder(target, job)
    manifest = {
        "apiVersion": "artifact/v1",
        "job": job.model_dump(),
        "method": "LoRA",
        "baseModel": {"uri": base_uri},
        "rank": rank,
        "hyperparameters": {},
        "metrics": {"step": 1},
        **more,
    }
    return artifacts.commit(target, adapter, manifest, job).digest


def rewrite_config(adapter: Path, **changes: Any) -> None:
    """Changes settings in an adapter's adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
