"""Data of a FineTuneJob: files, formats and the rows that are held out."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.base import ApiModel, SecretReference
from finetune_operator.api.rules import one_of, rule, rules
from finetune_operator.api.uris import DataUri


class DataFormat(StrEnum):
    AUTO = "Auto"  # recognized by the columns of the first row
    MESSAGES = "Messages"  # {"messages": [{"role", "content"}, ...]}
    PROMPT_COMPLETION = "PromptCompletion"  # {"prompt", "completion"}
    ALPACA = "Alpaca"  # {"instruction", "input", "output"}
    TEXT = "Text"  # {"text"}
    PREFERENCE = "Preference"  # {"prompt", "chosen", "rejected"}
    PROMPT_ONLY = "PromptOnly"  # {"prompt"}


# What each format reads; the keys of `columns` are among these.
COLUMNS = {
    DataFormat.MESSAGES: ["messages"],
    DataFormat.PROMPT_COMPLETION: ["prompt", "completion"],
    DataFormat.ALPACA: ["instruction", "input", "output"],
    DataFormat.TEXT: ["text"],
    DataFormat.PREFERENCE: ["prompt", "chosen", "rejected"],
    DataFormat.PROMPT_ONLY: ["prompt"],
}


class ApplyChatTemplate(StrEnum):
    AUTO = "Auto"  # when the model has one, except for Text
    ALWAYS = "Always"
    NEVER = "Never"


class SourceSpec(ApiModel):
    """One data file."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(has(self.format) && self.format != 'Auto') || !has(self.columns) || self.columns.all(key, key in "
                + one_of(list(dict.fromkeys(name for names in COLUMNS.values() for name in names)))
                + ")",
                "the keys of columns are the names that the format reads (messages; prompt, completion; instruction, "
                "input, output; text; prompt, chosen, rejected), the values are the columns of your file, "
                "for example columns: {prompt: question, completion: answer}",
                fieldPath=".columns",
            ),
            *(
                rule(
                    f"!has(self.format) || self.format != '{data_format}' || !has(self.columns) || "
                    f"self.columns.all(key, key in {one_of(names)})",
                    f"format {data_format} reads only {', '.join(names)}; remove the other keys or change format",
                    fieldPath=".columns",
                )
                for data_format, names in COLUMNS.items()
            ),
        )
    )

    uri: DataUri
    """A .jsonl, .json, .csv (each also with .gz) or .parquet file: pvc://claim/path (a PersistentVolumeClaim in
    the job's namespace), s3://bucket/path, gs://bucket/path, hf://datasets/organization/name/path,
    http(s)://host/path or file:///absolute/path (a path in the training container). Example:
    pvc://files/examples/quickstart/train.jsonl."""
    format: DataFormat = DataFormat.AUTO
    """Shape of the rows. Messages: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
    "content": "..."}]}. PromptCompletion: {"prompt": "...", "completion": "..."}. Alpaca: {"instruction":
    "...", "input": "...", "output": "..."} where input may be absent. Text: {"text": "..."}. These are for SFT. For
    DPO and RewardModel, Preference: {"prompt": "...", "chosen": "...", "rejected": "..."}, each also as messages. For
    RLOO and GRPO, PromptOnly: {"prompt": "..."}; other columns go to the reward functions. Absent: Auto, recognized by
    objective and columns."""
    columns: (
        Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=8)] | None
    ) = None
    """Maps the names that the format reads to the names in the file, for example {prompt: question, completion:
    answer} for a file with the columns question and answer. Absent: the file has the format's own names."""


class SplitSpec(ApiModel):
    """How rows are held out."""

    eval: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Fraction of the rows that is held out for evaluation, 0 to 0.5; 0 turns evaluation off. With more than 0
    at least one row is held out. Default 0.05."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the split: the same seed and files hold out the same rows. Default 42."""


class DatasetSpec(ApiModel):
    """What is trained on."""

    sources: Annotated[
        list[SourceSpec],
        Field(
            min_length=1,
            max_length=16,
            json_schema_extra=rules(
                rule(
                    "self.all(a, self.exists_one(b, a.uri == b.uri))",
                    "lists the same file twice; list each file once",
                )
            )
            | {"x-kubernetes-list-type": "atomic"},
        ),
    ]
    """Files to train on, 1 to 16; they are concatenated and shuffled. Example: [{uri:
    "pvc://files/train.jsonl"}]."""
    split: SplitSpec = SplitSpec()
    """How rows are held out for evaluation. Default: 5 %."""
    apply_chat_template: ApplyChatTemplate = ApplyChatTemplate.AUTO
    """Whether PromptCompletion and Alpaca rows are written as chat turns: Auto (default) does so when the model
    has a chat template; Always fails when there is none; Never leaves prompts as they are."""
    secret_ref: SecretReference | None = None
    """Secret with credentials for the data's storage, for example with the keys AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY."""
