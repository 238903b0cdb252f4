"""Parts of the run file: what is learnt, and what the objectives beside SFT need."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


def _is_whole(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if separator and not rest:
        raise ValueError(f"there is nothing behind {scheme}://; name the bucket, host or path")
    return uri


def _can_be_written(uri: str) -> str:
    scheme = uri.partition("://")[0]
    if scheme in ("http", "https", "hf"):
        raise ValueError(f"nothing is written to {scheme}://; use s3://, gs://, pvc:// or file://")
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_is_whole)]
OutputUri = Annotated[Uri, AfterValidator(_can_be_written)]


class Objective(StrEnum):
    SFT = "SFT"  # demonstrations
    DPO = "DPO"  # preferences, directly
    REWARD_MODEL = "RewardModel"  # preferences, into a model that scores answers
    RLOO = "RLOO"  # sampled answers and their rewards: REINFORCE with a leave-one-out baseline
    GRPO = "GRPO"  # the same with advantages relative to the group

    @property
    def samples(self) -> bool:
        """Whether the model's own answers are what it is trained on."""
        return self in (Objective.RLOO, Objective.GRPO)

    @property
    def prefers(self) -> bool:
        """Whether rows are pairs of a better and a worse answer."""
        return self in (Objective.DPO, Objective.REWARD_MODEL)


class MethodType(StrEnum):
    LORA = "LoRA"
    QLORA = "QLoRA"
    FULL = "Full"


class DataFormat(StrEnum):
    AUTO = "Auto"
    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    ALPACA = "Alpaca"
    TEXT = "Text"
    PREFERENCE = "Preference"
    PROMPT_ONLY = "PromptOnly"


# In this order they are recognized: a file with messages and text columns is a chat file with a copy for reading.
FORMATS_OF: dict[Objective, tuple[DataFormat, ...]] = {
    Objective.SFT: (
        DataFormat.MESSAGES,
        DataFormat.PROMPT_COMPLETION,
        DataFormat.ALPACA,
        DataFormat.TEXT,
    ),
    Objective.DPO: (DataFormat.PREFERENCE,),
    Objective.REWARD_MODEL: (DataFormat.PREFERENCE,),
    Objective.RLOO: (DataFormat.PROMPT_ONLY,),
    Objective.GRPO: (DataFormat.PROMPT_ONLY,),
}


class Adapter(Part):
    """A LoRA adapter that training goes on with; what comes out fits the same base model."""

    uri: Uri
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")] | None = None


class ConfigMapKey(Part):
    name: Annotated[str, Field(min_length=1)]
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][-._A-Za-z0-9]*$")]


class RewardFunction(Part):
    config_map_ref: ConfigMapKey
    entry: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]


class Reward(Part):
    """What answers are worth: a reward model, functions, or both; `weights` in that order."""

    uri: Uri | None = None
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")] | None = None
    functions: list[RewardFunction] = []
    weights: list[float] | None = None
    beta: Annotated[float, Field(ge=0)] | None = None

    @property
    def count(self) -> int:
        return len(self.functions) + (self.uri is not None)


class Preference(Part):
    beta: Annotated[float, Field(gt=0)] = 0.1


class Generation(Part):
    num_generations: Annotated[int, Field(ge=2)] = 4
    max_completion_length: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
