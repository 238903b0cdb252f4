"""The examples are applied as they lie there, over the tiny model, and each ends with an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_local.cluster import Cluster
from tests import tiny
from tests.clients import Json, Kubectl

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a file needs besides the tiny model: its byte-level tokenizer makes about four times as many tokens.
CHANGES: dict[str, dict[str, Any]] = {
    "formats/messages.yaml": {},
    "formats/prompt-completion.yaml": {},
    "formats/alpaca.yaml": {},
    "formats/text.yaml": {},
    "quickstart/finetunejob-qlora.yaml": {"maxLength": 512, "maxSteps": 4, "evalSteps": 4},
}


# The three of examples/rlhf, over a model that knows the shop's sentences. It is a thousand times smaller than the one
# that the files name, and needs longer steps; everything else is as it lies there.
RLHF: dict[str, dict[str, Any]] = {
    "rlhf/1-sft.yaml": {},
    "rlhf/2-reward-model.yaml": {"learningRate": 0.005},
    "rlhf/3-rloo.yaml": {"learningRate": 0.005},
}


def read_job(name: str, model: Path) -> Json:
    job: Json = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    if "uri" in job["spec"]["model"]:
        job["spec"]["model"]["uri"] = f"file://{model}"
    job["spec"]["hyperparameters"] |= {**CHANGES, **RLHF}[name]
    return job


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster, tiny_model: Path) -> Iterator[Callable[[str], Json]]:
    """All examples are applied at once, in the namespace whose claims they name: each is mostly start-up."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    jobs = {name: read_job(name, tiny_model) for name in CHANGES}
    for job in jobs.values():
        kubectl.apply(job)
    yield lambda name: kubectl.finished(jobs[name]["metadata"]["name"], seconds=300)
    for job in jobs.values():
        kubectl("delete", "ftj", job["metadata"]["name"])


@pytest.mark.parametrize("name", CHANGES)
def test_an_example_ends_with_an_artifact(name: str, outcomes: Callable[[str], Json]) -> None:
    status = outcomes(name)
    assert status["phase"] == "Succeeded", status["message"]
    assert status["progress"]["step"] == status["progress"]["totalSteps"]
    folder = Path(status["artifact"]["uri"].removeprefix("file://"))
    manifest = (folder / "manifest.json").read_bytes()
    assert status["artifact"]["digest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    listed = {file["path"] for file in json.loads(manifest)["files"]}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= listed


def build_shop_model(folder: Path) -> Path:
    """A random model of 0.1 M parameters whose tokens are words and syllables of the shop, so that the files' lengths
    suffice."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [
        text
        for file in sorted((EXAMPLES / "rlhf").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
        for text in json.loads(line).values()
    ]
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def shop_model(tmp_path: Path) -> Path:
    """The same after it has read the demonstrations: it stands for a model that can write."""
    from finetune_trainer import lifecycle  # a slow import, and most tests need no trainer

    data = EXAMPLES / "rlhf/demonstrations.jsonl"
    document = tiny.run_document(
        build_shop_model(tmp_path / "random"),
        data,
        tmp_path / "shop",
        method={"type": "Full"},
        dataset={"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0, "seed": 1}},
        hyperparameters={
            "maxSteps": 250,
            "globalBatchSize": 16,
            "microBatchSize": 16,
            "maxLength": 128,
            "learningRate": 3e-3,
        },
    )
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert lifecycle.run_job(tmp_path / "run.json") == 0
    return tmp_path / "shop"


@pytest.mark.faults
def test_the_three_jobs_of_rlhf_raise_the_reward(cluster: Cluster, shop_model: Path) -> None:
    """Three runs after one another: too long for `make test`, where test_objective_chain.py has a shorter chain."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    jobs = [read_job(name, shop_model) for name in RLHF]
    names = [job["metadata"]["name"] for job in jobs]
    try:
        for job in reversed(jobs):  # each waits for those that it refers to
            kubectl.apply(job)
        sft, judge, rloo = (kubectl.finished(name, seconds=900) for name in names)
    finally:
        kubectl("delete", "ftj", *names, "--ignore-not-found")
    for status in (sft, judge, rloo):
        assert status["phase"] == "Succeeded", status["message"]
        assert status["artifact"]["baseModel"] == f"file://{shop_model}"
    assert judge["metrics"]["evalAccuracy"] > 0.9
    assert rloo["effective"]["reward"]["digest"] == judge["artifact"]["digest"]
    history = Path(rloo["artifact"]["uri"].removeprefix("file://")) / "history.jsonl"
    entries = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    rewards = [entry["reward"] for entry in entries if "reward" in entry]
    assert len(rewards) == 30
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.5, rewards
