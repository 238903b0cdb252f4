"""Base model against artifact on rows that neither has seen: answers, right fields, loss of the right answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune_trainer import artifacts, model_files
from finetune_trainer.data import shapes, tokens
from finetune_trainer.evaluation import generation
from finetune_trainer.evaluation.metrics import Scores, score_answers
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.methods import choices, models
from finetune_trainer.runfile import ApplyChatTemplate


@dataclass(frozen=True)
class Question:
    prompt_ids: list[int]
    prompt: str
    expected: str
    row: tokens.TokenRow  # prompt and expected answer, for the loss


@dataclass(frozen=True)
class Side:
    scores: Scores
    eval_loss: float
    tokens_per_second: float
    answers: list[str]


@dataclass(frozen=True)
class Comparison:
    rows: int
    base: Side
    adapter: Side
    questions: list[Question]
    artifact: dict[str, Any]


@dataclass(frozen=True)
class Options:
    keys: tuple[str, ...]
    fields: tuple[str, ...]
    max_new_tokens: int
    batch_size: int
    on_answers: Callable[[int], None] = lambda count: None
    """Called after each batch, for base and artifact alike, with the number of its answers."""


def compare(
    base: Path, adapter: Path, examples: Sequence[shapes.Example], *, base_uri: str, options: Options
) -> Comparison:
    """Answers every example twice and scores both sides. Raises BadConfig, BadData or ModelNotFound."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(choices.choose_threads().value)
    tokenizer = models.load_tokenizer(adapter if _has_tokenizer(adapter) else base, uri=base_uri)
    questions = [build_question(example, tokenizer) for example in examples]
    device = models.find_device(threads=torch.get_num_threads())
    model = _load(base, device)
    tuned = _load_tuned(model, adapter, device)
    with _without_adapter(tuned):
        base_side = _ask(tuned if _is_adapter(adapter) else model, tokenizer, questions, options)
    tuned_side = _ask(tuned, tokenizer, questions, options)
    return Comparison(len(questions), base_side, tuned_side, questions, describe_artifact(adapter))


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _load(path: Path, device: models.Device) -> Any:
    dtype = torch.bfloat16 if device.has_bfloat16 else torch.float32
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        device_map={"": device.name},
        ignore_mismatched_sizes=True,  # told below
        output_loading_info=True,
    )
    model_files.check_loaded(found, field="model.uri", uri=str(path))
    return model.eval()


def _load_tuned(model: Any, adapter: Path, device: models.Device) -> Any:
    if _is_adapter(adapter):
        import peft

        if peft.PeftConfig.from_pretrained(str(adapter)).task_type != "CAUSAL_LM":
            raise BadConfig(f"--adapter {adapter} is a reward model, which writes no answers to compare")
        try:
            return peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        except (RuntimeError, ValueError) as error:  # torch reports shapes that do not fit as RuntimeError
            raise BadConfig(
                f"--adapter {adapter} does not fit the base model: {str(error).splitlines()[0]}"
            ) from error
    if (adapter / "config.json").is_file():
        return _load(adapter, device)
    raise BadConfig(
        f"--adapter {adapter} holds neither adapter_config.json nor config.json; name an artifact's folder"
    )


def _without_adapter(model: Any) -> Any:
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def build_question(example: shapes.Example, tokenizer: Any) -> Question:
    """Splits an example before its last answer. Raises BadData for plain text, which asks nothing."""
    choice = ApplyChatTemplate.AUTO
    if isinstance(example, shapes.Pair):
        if example.chat_prompt is None:
            raise BadData(
                f"{example.where}: format Text has no question; "
                "compare needs messages, prompt/completion or instruction/output"
            )
        if not shapes.as_chat(example, choice=choice, has_template=tokenizer.chat_template is not None):
            row = tokens.encode_example(example, tokenizer, choice=choice)
            ids = tokenizer(example.prompt)["input_ids"]
            return Question(ids, example.prompt, example.completion, row)
        example = tokens.pair_turns(example)
    last = max(index for index, turn in enumerate(example.turns) if turn["role"] == "assistant")
    turns = example.turns[: last + 1]
    text = tokens.render(turns[:-1], tokenizer, prompt=True, where=example.where)
    row = tokens.encode_example(
        shapes.Chat(turns=turns, context=last, where=example.where), tokenizer, choice=choice
    )
    return Question(
        tokenizer(text, add_special_tokens=False)["input_ids"],
        turns[-2]["content"],
        turns[-1]["content"],
        row,
    )


def _ask(model: Any, tokenizer: Any, questions: Sequence[Question], options: Options) -> Side:
    answers = generation.generate(
        model,
        tokenizer,
        [question.prompt_ids for question in questions],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        on_answers=options.on_answers,
    )
    return Side(
        scores=score_answers(
            answers.texts,
            [question.expected for question in questions],
            keys=options.keys,
            fields=options.fields,
        ),
        eval_loss=generation.measure_loss(
            model,
            [question.row for question in questions],
            pad=tokenizer.pad_token_id,
            batch_size=options.batch_size,
        ),
        tokens_per_second=answers.tokens_per_second,
        answers=answers.texts,
    )


def describe_artifact(folder: Path) -> dict[str, Any]:
    """Returns path, method, size and digest of an artifact's folder; only the path when it has no manifest."""
    manifest = folder / artifacts.MANIFEST
    if not manifest.is_file():
        return {"path": str(folder)}
    content = manifest.read_bytes()
    facts = artifacts.describe(str(folder), content)
    return {
        "path": str(folder),
        "method": json.loads(content)["method"],
        "sizeBytes": facts.size_bytes,
        "digest": facts.digest,
        "trainSeconds": facts.metrics.get("trainSeconds"),
    }
