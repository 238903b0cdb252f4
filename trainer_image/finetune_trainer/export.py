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

from finetune_trainer import storage, upstreams
from finetune_trainer.methods import adapters
from finetune_trainer.preflight import Checked
from finetune_trainer.runfile import MethodType, Objective, RunFile

HISTORY = "history.jsonl"
CARD = "README.md"
ROWS = {
    Objective.SFT: "demonstrations",
    Objective.DPO: "preferences",
    Objective.REWARD_MODEL: "preferences",
    Objective.RLOO: "prompts",
    Objective.GRPO: "prompts",
}
_ACCURACY = (
    "`accuracy` is the share of pairs in which the chosen answer is ahead, `margin` by how much on average."
)
_REWARD = (
    "`reward` is the mean reward of sampled answers, `kl` how far a token is from the reference on average (nats), "
    "`completionLength` the mean length of answers in tokens."
)
UNITS = {
    Objective.SFT: "`loss` and `evalLoss` are mean negative log-likelihoods per learnt token, in nats.",
    Objective.DPO: _ACCURACY,
    Objective.REWARD_MODEL: _ACCURACY,
    Objective.RLOO: _REWARD,
    Objective.GRPO: _REWARD,
}


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
    if checked.lora is not None:
        manifest["rank"] = checked.lora.r
        manifest["lora"] = checked.lora.model_dump(by_alias=True)
    if run.method.quantization is not None:
        manifest["quantization"] = run.method.quantization.model_dump(by_alias=True, exclude_none=True)
    return {
        **manifest,
        **_lineage(run, checked),
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


def _lineage(run: RunFile, checked: Checked) -> dict[str, Any]:
    """What of other jobs, and of the user's own code, is in the artifact."""
    lineage: dict[str, Any] = {}
    if checked.adapter is not None:
        lineage["continues"] = _name_artifact(checked.adapter)
    if run.reward is not None:
        reward: dict[str, Any] = {}
        if checked.reward_model is not None:
            reward["model"] = _name_artifact(checked.reward_model.artifact)
        if checked.reward_functions:
            reward["functions"] = [
                {"entry": source.entry, "file": source.file, "digest": source.digest}
                for source in checked.reward_functions
            ]
        if run.reward.weights is not None:
            reward["weights"] = run.reward.weights
        lineage["reward"] = reward
    return lineage


def _name_artifact(artifact: upstreams.Artifact) -> dict[str, Any]:
    named: dict[str, Any] = {"uri": artifact.uri}
    if artifact.digest is not None:
        named["digest"] = artifact.digest
    if artifact.manifest.get("job"):
        named["job"] = artifact.manifest["job"]
    return named


def write_files(
    trainer: Any, tokenizer: Any, *, run: RunFile, manifest: dict[str, Any], folder: Path
) -> None:
    """Writes the weights (safetensors), the tokenizer, the history and the card into a local folder."""
    folder.mkdir(parents=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if run.method.type is not MethodType.FULL:
        # What the base model is called outside: a path in this process' work folder or pod means nothing there.
        config = model.peft_config[adapters.NAME]
        config.base_model_name_or_path = _name_base(run.model.uri)
        config.revision = manifest["baseModel"].get("revision")
        # PEFT would ask the hub whether the vocabulary changed; adapters here never touch the embeddings.
        # A frozen copy of the adapter, which some objectives compare with, is not part of the artifact.
        model.save_pretrained(folder, selected_adapters=[adapters.NAME], save_embedding_layers=False)
    else:
        if run.objective is not Objective.REWARD_MODEL:  # which generates nothing
            model.generation_config.eos_token_id = _end_tokens(model, tokenizer)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps(entry, ensure_ascii=False) for entry in trainer.state.log_history]
    (folder / HISTORY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / CARD).write_text(build_card(run, manifest), encoding="utf-8")


def _name_base(uri: str) -> str:
    return uri.removeprefix("hf://").removeprefix("file://")


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    known = model.generation_config.eos_token_id
    tokens = known if isinstance(known, list) else [] if known is None else [known]
    return tokens if tokenizer.eos_token_id in tokens else [tokenizer.eos_token_id, *tokens]


def build_card(run: RunFile, manifest: dict[str, Any]) -> str:
    """Returns the model card: the hub's metadata block and a page that says how the artifact was made and is used."""
    adapter, scores = run.method.type is not MethodType.FULL, run.objective is Objective.REWARD_MODEL
    data = huggingface_hub.ModelCardData(
        base_model=_name_base(run.model.uri) if storage.is_hub(run.model.uri) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=[run.objective.lower(), run.method.type.lower(), "finetune-operator"],
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
by FineTuneJob `{run.job.namespace}/{run.job.name}`
on {rows["trainRows"]} rows of {ROWS[run.objective]} ({run.objective}).
`manifest.json` lists every file with its SHA-256.

## Use

```python
{_usage(run.model.uri, adapter=adapter, scores=scores)}
```

## Data

{chr(10).join(f"* `{uri}`" for uri in rows["sources"])}

Digest `{rows["digest"]}`,
{rows["trainRows"]} rows trained on, {rows["evalRows"]} held out (seed {rows["split"]["seed"]}).

## Results

| metric | value |
|---|---|
{results}

{UNITS[run.objective]} The whole course is in `{HISTORY}`.

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


def _usage(uri: str, *, adapter: bool, scores: bool) -> str:
    kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    if not adapter:
        return (
            f"from transformers import {kind}, AutoTokenizer\n\n"
            f'model = {kind}.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
        )
    labels = ", num_labels=1" if scores else ""
    base, note = _name_base(uri), ""
    if "://" in base:  # which transformers cannot read
        base, note = "path/to/the/base/model", f"  # a copy of {base}"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'base = {kind}.from_pretrained("{base}"{labels}){note}\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
