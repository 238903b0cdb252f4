"""The artifact's files: weights, tokenizer, history, model card, and the manifest's content."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import torch
import transformers
import trl

from finetune_trainer import storage
from finetune_trainer.preflight import Checked
from finetune_trainer.runfile import MethodType, RunFile

HISTORY = "history.jsonl"
CARD = "README.md"


def build_manifest(
    run: RunFile, checked: Checked, *, hyperparameters: dict[str, Any], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Returns everything of manifest.json but the list of files."""
    base = (
        {"uri": run.model.uri}
        if checked.revision is None
        else {"uri": run.model.uri, "revision": checked.revision}
    )
    manifest: dict[str, Any] = {
        "apiVersion": "artifact/v1",
        "job": run.job.model_dump(),
        "objective": run.objective,
        "method": run.method.type,
        "baseModel": base,
    }
    if run.method.type is not MethodType.FULL:
        manifest["rank"] = run.lora.r
        manifest["lora"] = run.lora.model_dump(by_alias=True)
    if run.method.quantization is not None:
        manifest["quantization"] = run.method.quantization.model_dump(by_alias=True, exclude_none=True)
    return {
        **manifest,
        "dataset": {
            "digest": checked.dataset_digest,
            "trainRows": len(checked.train),
            "evalRows": len(checked.held_out),
            "sources": [source.uri for source in run.dataset.sources],
            "split": run.dataset.split.model_dump(),
        },
        "hyperparameters": hyperparameters,
        "metrics": metrics,
        "versions": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "peft": peft.__version__,
        },
        "createdAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_files(
    trainer: trl.SFTTrainer, tokenizer: Any, *, run: RunFile, manifest: dict[str, Any], folder: Path
) -> None:
    """Writes the weights (safetensors), the tokenizer, the history and the card into a local folder."""
    folder.mkdir(parents=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if run.method.type is not MethodType.FULL:
        # Where serving finds the base model; a path in this process' work folder would mean nothing to it.
        config = model.peft_config["default"]
        config.base_model_name_or_path = _name_base(run.model.uri)
        config.revision = manifest["baseModel"].get("revision")
        # PEFT would ask the hub whether the vocabulary changed; adapters here never touch the embeddings.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.generation_config.eos_token_id = _end_tokens(model, tokenizer)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps(entry, ensure_ascii=False) for entry in trainer.state.log_history]
    (folder / HISTORY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / CARD).write_text(build_card(run, manifest), encoding="utf-8")


def _name_base(uri: str) -> str:
    path = None if storage.is_hub(uri) else storage.local_path(uri)
    return uri.removeprefix("hf://") if path is None else str(path)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    known = model.generation_config.eos_token_id
    tokens = known if isinstance(known, list) else [] if known is None else [known]
    return tokens if tokenizer.eos_token_id in tokens else [tokenizer.eos_token_id, *tokens]


def build_card(run: RunFile, manifest: dict[str, Any]) -> str:
    """Returns the model card: the hub's metadata block and a page that says how the artifact was made and is used."""
    base = _name_base(run.model.uri)
    adapter = run.method.type is not MethodType.FULL
    data = huggingface_hub.ModelCardData(
        base_model=base if storage.is_hub(run.model.uri) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", run.method.type.lower(), "finetune-operator"],
    )
    metrics, rows = manifest["metrics"], manifest["dataset"]
    table = "\n".join(f"| {name} | {value} |" for name, value in sorted(manifest["hyperparameters"].items()))
    results = "\n".join(f"| {name} | {value} |" for name, value in metrics.items())
    return str(
        huggingface_hub.ModelCard(
            f"""---
{data.to_yaml()}
---

# {run.job.name}

{run.method.type} fine-tuning of `{run.model.uri}`{_revision(manifest)}
by FineTuneJob `{run.job.namespace}/{run.job.name}` on {rows["trainRows"]} rows of demonstrations ({run.objective}).
`manifest.json` lists every file with its SHA-256.

## Use

```python
{_usage(base, adapter=adapter)}
```

## Data

{chr(10).join(f"* `{uri}`" for uri in rows["sources"])}

Digest `{rows["digest"]}`,
{rows["trainRows"]} rows trained on, {rows["evalRows"]} held out (seed {rows["split"]["seed"]}).

## Results

| metric | value |
|---|---|
{results}

`loss` and `evalLoss` are mean negative log-likelihoods per learnt token, in nats. The whole course is in `{HISTORY}`.

## Settings

| setting | value |
|---|---|
{table}
"""
        )
    )


def _revision(manifest: dict[str, Any]) -> str:
    revision = manifest["baseModel"].get("revision")
    return f" at `{revision}`" if revision else ""


def _usage(base: str, *, adapter: bool) -> str:
    if not adapter:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
        )
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
