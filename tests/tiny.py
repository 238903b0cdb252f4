"""A tiny Llama with a byte-level tokenizer, built in seconds, and rows that it can learn: no download."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Before torch is imported. Shorter than finetune_trainer.machine has it: more processes share the cores here.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINGS = ("cup", "hat", "pen", "box")
COLOURS = ("red", "blue", "green", "black", "white")


def build_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Returns a fast tokenizer of a few hundred tokens with ChatML's special ones."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([turn["content"] for row in chat_rows() for turn in row["messages"]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, seed: int = 0) -> Path:
    """Writes a random Llama of 0.1 M parameters with its tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(chat_template=chat_template)
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
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def question(thing: str, number: int) -> str:
    return f"What colour is {thing} {number}?"


def answer(thing: str, number: int, *, shift: int = 0) -> str:
    return f"{thing} {number} is {COLOURS[(THINGS.index(thing) + number + shift) % len(COLOURS)]}."


def chat_rows(*, shift: int = 0) -> list[dict[str, Any]]:
    """Returns 40 rows that follow one rule; another shift is another, contradicting rule."""
    return [
        {
            "messages": [
                {"role": "user", "content": question(t, n)},
                {"role": "assistant", "content": answer(t, n, shift=shift)},
            ]
        }
        for t in THINGS
        for n in range(10)
    ]


def pair_rows(*, shift: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": question(t, n), "completion": answer(t, n, shift=shift)} for t in THINGS for n in range(10)
    ]


def alpaca_rows(*, shift: int = 0) -> list[dict[str, Any]]:
    return [
        {"instruction": "Say the colour.", "input": f"{t} {n}", "output": answer(t, n, shift=shift)}
        for t in THINGS
        for n in range(10)
    ]


def text_rows(*, shift: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{question(t, n)} {answer(t, n, shift=shift)}"} for t in THINGS for n in range(10)]


def preference_rows(*, liked: str = "red") -> list[dict[str, Any]]:
    """160 rows: an answer with the liked colour is preferred to the same answer with each other colour."""
    return [
        {
            "prompt": question(t, n),
            "chosen": f"{t} {n} is {liked}.",
            "rejected": f"{t} {n} is {other}.",
        }
        for t in THINGS
        for n in range(10)
        for other in COLOURS
        if other != liked
    ]


def prompt_rows() -> list[dict[str, Any]]:
    return [{"prompt": question(t, n), "thing": t, "number": n} for t in THINGS for n in range(10)]


def write_jsonl(path: Path, rows: list[dict[str, Any]], *, times: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * times), encoding="utf-8")
    return path


def run_document(model: Path, data: Path, output: Path, /, **parts: Any) -> dict[str, Any]:
    """Returns a run file for a LoRA run of a few steps; `parts` replace or add top-level keys."""
    document: dict[str, Any] = {
        "apiVersion": "trainer/v1",
        "job": {"namespace": "default", "name": "tiny", "uid": "uid-1", "attempt": 1},
        "objective": "SFT",
        "model": {"uri": f"file://{model}"},
        "method": {
            "type": "LoRA",
            "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targetModules": ["all-linear"]},
        },
        "dataset": {
            "sources": [{"uri": f"file://{data}", "format": "Auto"}],
            "split": {"eval": 0.1, "seed": 42},
        },
        "hyperparameters": {"maxSteps": 4, "globalBatchSize": 8, "maxLength": 64},
        "output": {"uri": f"file://{output}"},
    }
    return {**document, **parts}
