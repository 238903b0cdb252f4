"""The run file: what the operator asks of one attempt. The same names and enums as the FineTuneJob's spec.

The operator has its own models; a test proves that every run file that it builds is accepted here.
"""

from __future__ import annotations

import contextlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from finetune_trainer.contradictions import find_contradictions
from finetune_trainer.failures import BadConfig
from finetune_trainer.runparts import (
    Adapter,
    DataFormat,
    Generation,
    MethodType,
    Objective,
    OutputUri,
    Part,
    Preference,
    Reward,
    Uri,
)

__all__ = [
    "API_VERSION",
    "Adapter",
    "ApplyChatTemplate",
    "Checkpoint",
    "DataFormat",
    "Dataset",
    "EarlyStopping",
    "Generation",
    "Hyperparameters",
    "Job",
    "Lora",
    "Method",
    "MethodType",
    "Model",
    "Objective",
    "Optimizer",
    "Output",
    "Overrides",
    "Part",
    "Precision",
    "Preference",
    "Quantization",
    "Resume",
    "Reward",
    "RunFile",
    "Scheduler",
    "Source",
    "Split",
    "find_contradictions",
    "load",
    "parse",
]

API_VERSION = "trainer/v1"


class ApplyChatTemplate(StrEnum):
    AUTO = "Auto"  # when the model has a template
    ALWAYS = "Always"
    NEVER = "Never"


class Scheduler(StrEnum):
    LINEAR = "Linear"
    COSINE = "Cosine"
    CONSTANT = "Constant"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    SGD = "SGD"


class Precision(StrEnum):
    AUTO = "Auto"
    BFLOAT16 = "BFloat16"
    FLOAT32 = "Float32"


class Job(Part):
    namespace: str
    name: str
    uid: Annotated[str, Field(min_length=1)]
    attempt: Annotated[int, Field(ge=0)]  # 0 is the check before the first one


class Model(Part):
    uri: Uri
    revision: str | None = None
    chat_template: str | None = None
    adapter: Adapter | None = None


class Lora(Part):
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[list[str], Field(min_length=1)] = Field(default=["all-linear"])


class Quantization(Part):
    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None


class Method(Part):
    type: MethodType = MethodType.LORA
    lora: Lora | None = None
    quantization: Quantization | None = None


class Source(Part):
    uri: Uri
    format: DataFormat = DataFormat.AUTO
    columns: dict[str, str] | None = None


class Split(Part):
    eval: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42


class Dataset(Part):
    sources: Annotated[list[Source], Field(min_length=1)]
    split: Split = Split()
    apply_chat_template: ApplyChatTemplate = ApplyChatTemplate.AUTO


class Hyperparameters(Part):
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: Annotated[int, Field(ge=1)] | None = None
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=8)] = 1024
    packing: bool = False
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    scheduler: Scheduler = Scheduler.COSINE
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    optimizer: Optimizer = Optimizer.ADAMW
    precision: Precision = Precision.AUTO
    gradient_checkpointing: bool = False
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42


class EarlyStopping(Part):
    patience: Annotated[int, Field(ge=1)] = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class Output(Part):
    uri: OutputUri


class Resume(StrEnum):
    AUTO = "Auto"  # from the newest checkpoint that is whole and this job's own
    NEVER = "Never"


class Checkpoint(Part):
    """Without both intervals only a stop (SIGTERM) makes a checkpoint."""

    uri: OutputUri
    every_steps: Annotated[int, Field(ge=1)] | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Annotated[int, Field(ge=1)] = 2
    resume: Resume = Resume.AUTO


class Overrides(Part):
    """What the operator changed after a failed attempt; the spec's values stay as the user wrote them."""

    micro_batch_size: Annotated[int, Field(ge=1)] | None = None


def _read_objective(value: Any) -> Any:
    if isinstance(value, str) and value.upper() == "PPO":
        raise ValueError(
            "PPO is not offered, because TRL removed its PPO trainer; use its successors RLOO or GRPO"
        )
    return value


class RunFile(Part):
    api_version: Literal["trainer/v1"]
    job: Job
    objective: Annotated[Objective, BeforeValidator(_read_objective)] = Objective.SFT
    model: Model
    method: Method = Method()
    dataset: Dataset
    preference: Preference | None = None
    reward: Reward | None = None
    generation: Generation | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    early_stopping: EarlyStopping | None = None
    output: Output
    checkpoint: Checkpoint | None = None
    overrides: Overrides = Overrides()
    accelerator: str | None = None
    """Kind of GPU that training will have, where the spec names one."""

    @property
    def lora(self) -> Lora:
        """Settings of a new adapter; only meaningful for LoRA and QLoRA without model.adapter."""
        return self.method.lora or Lora()

    @property
    def sampling(self) -> Generation:
        """How answers are sampled; only meaningful for RLOO and GRPO."""
        return self.generation or Generation()

    def uris(self) -> list[str]:
        uris = [self.model.uri, *(source.uri for source in self.dataset.sources), self.output.uri]
        further = (
            self.checkpoint and self.checkpoint.uri,
            self.model.adapter and self.model.adapter.uri,
            self.reward and self.reward.uri,
        )
        return [*uris, *(uri for uri in further if uri)]


def load(path: Path) -> RunFile:
    """Reads and checks a run file. Raises BadConfig, which lists every wrong field."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadConfig(
            f"run file {path} cannot be read ({error.strerror}); set FINETUNE_RUN_FILE to it"
        ) from error
    except UnicodeDecodeError as error:
        raise BadConfig(f"run file {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return parse(text)


def parse(text: str) -> RunFile:
    """Parses the JSON text of a run file. Raises BadConfig."""
    with contextlib.suppress(ValueError, RecursionError):  # told below, as what it is
        json.loads(text, object_pairs_hook=_refuse_repetition)
    try:
        run = RunFile.model_validate_json(text)
    except ValidationError as error:
        raise BadConfig("run file: " + "; ".join(_describe(dict(item)) for item in error.errors())) from error
    problems = find_contradictions(run)
    if problems:
        raise BadConfig("; ".join(problems))
    return run


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Pydantic takes the last value of a field that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        beside = ", ".join(name for name in found if name != twice) or "nothing else"
        raise BadConfig(f"run file: {twice} is there twice in one object (beside {beside}); remove one")
    return found


def _describe(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "(document)"
    shown = "" if item["type"] in ("missing", "json_invalid") else f" (got {str(item['input'])[:100]!r})"
    unknown = item["type"] == "extra_forbidden"
    remedy = "; remove it, or use the training image of the operator's version" if unknown else ""
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{shown}{remedy}"
