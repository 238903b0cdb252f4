"""The run file: what the operator asks of one attempt. The same names and enums as the FineTuneJob's spec.

The operator has its own models; a test proves that every run file that it builds is accepted here.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_trainer.failures import BadConfig

API_VERSION = "trainer/v1"
OBJECTIVES = ("SFT",)


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


class Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Job(Part):
    namespace: str
    name: str
    uid: Annotated[str, Field(min_length=1)]
    attempt: Annotated[int, Field(ge=1)]


class Model(Part):
    uri: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    chat_template: str | None = None


class Lora(Part):
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[list[str], Field(min_length=1)] = ["all-linear"]


class Quantization(Part):
    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None


class Method(Part):
    type: MethodType = MethodType.LORA
    lora: Lora | None = None
    quantization: Quantization | None = None


class Source(Part):
    uri: Annotated[str, Field(min_length=1)]
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
    uri: Annotated[str, Field(min_length=1)]


class Resume(StrEnum):
    AUTO = "Auto"  # from the newest checkpoint that is whole and this job's own
    NEVER = "Never"


class Checkpoint(Part):
    """Without both intervals only a stop (SIGTERM) makes a checkpoint."""

    uri: Annotated[str, Field(min_length=1)]
    every_steps: Annotated[int, Field(ge=1)] | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Annotated[int, Field(ge=1)] = 2
    resume: Resume = Resume.AUTO


class Overrides(Part):
    """What the operator changed after a failed attempt; the spec's values stay as the user wrote them."""

    micro_batch_size: Annotated[int, Field(ge=1)] | None = None


class RunFile(Part):
    api_version: Literal["trainer/v1"]
    job: Job
    objective: str = "SFT"
    model: Model
    method: Method = Method()
    dataset: Dataset
    hyperparameters: Hyperparameters = Hyperparameters()
    early_stopping: EarlyStopping | None = None
    output: Output
    checkpoint: Checkpoint | None = None
    overrides: Overrides = Overrides()

    @property
    def lora(self) -> Lora:
        """The adapter's settings; only meaningful for LoRA and QLoRA."""
        return self.method.lora or Lora()

    def uris(self) -> list[str]:
        uris = [self.model.uri, *(source.uri for source in self.dataset.sources), self.output.uri]
        return uris if self.checkpoint is None else [*uris, self.checkpoint.uri]


def load(path: Path) -> RunFile:
    """Reads and checks a run file. Raises BadConfig, which lists every wrong field."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadConfig(
            f"run file {path} cannot be read ({error.strerror}); set FINETUNE_RUN_FILE to it"
        ) from error
    return parse(text)


def parse(text: str) -> RunFile:
    """Parses the JSON text of a run file. Raises BadConfig."""
    try:
        run = RunFile.model_validate_json(text)
    except ValidationError as error:
        raise BadConfig("run file: " + "; ".join(_describe(dict(item)) for item in error.errors())) from error
    problems = find_contradictions(run)
    if problems:
        raise BadConfig("; ".join(problems))
    return run


def find_contradictions(run: RunFile) -> list[str]:
    """Returns what cannot hold together although every field alone is right: field, value and remedy of each."""
    problems = []
    if run.objective not in OBJECTIVES:
        problems.append(_describe_objective(run.objective))
    problems += _check_method(run.method)
    hyper = run.hyperparameters
    if hyper.micro_batch_size is not None and hyper.global_batch_size % hyper.micro_batch_size:
        problems.append(
            f"hyperparameters.microBatchSize: {hyper.micro_batch_size} does not divide globalBatchSize "
            f"{hyper.global_batch_size}; use a divisor of it, or leave microBatchSize out"
        )
    if run.early_stopping is not None and run.dataset.split.eval == 0:
        problems.append("earlyStopping needs held-out rows: set dataset.split.eval above 0 (it is 0)")
    if run.model.revision is not None and not run.model.uri.startswith("hf://"):
        problems.append(
            f"model.revision: {run.model.revision!r} has a meaning only for hf:// (model.uri is {run.model.uri})"
        )
    if run.checkpoint is not None and _overlap(run.checkpoint.uri, run.output.uri):
        problems.append(
            f"checkpoint.uri: {run.checkpoint.uri} and output.uri {run.output.uri} lie in one another; "
            "choose folders that are apart, such as output.uri with -checkpoints at its end"
        )
    return problems


def _overlap(one: str, other: str) -> bool:
    first, second = (uri.rstrip("/") + "/" for uri in (one, other))
    return first.startswith(second) or second.startswith(first)


def _check_method(method: Method) -> list[str]:
    problems = []
    if method.type is MethodType.QLORA and method.quantization is None:
        problems.append(
            "method.quantization is required for QLoRA; set it to {} for nf4 with double quantization"
        )
    if method.type is not MethodType.QLORA and method.quantization is not None:
        problems.append(
            f"method.quantization is only for QLoRA (method.type is {method.type}); use QLoRA or remove it"
        )
    if method.type is MethodType.FULL and method.lora is not None:
        problems.append("method.lora is only for LoRA and QLoRA (method.type is Full); remove it")
    if (
        method.lora is not None
        and "all-linear" in method.lora.target_modules
        and len(method.lora.target_modules) > 1
    ):
        problems.append(
            "method.lora.targetModules: all-linear stands alone; remove the other names or all-linear"
        )
    return problems


def _describe_objective(objective: str) -> str:
    if objective.upper() == "PPO":
        return (
            "objective: PPO is not offered, because TRL removed its PPO trainer; "
            "its successors are RLOO and GRPO, which this version does not run yet; use SFT"
        )
    return f"objective: {objective!r} is not known; use one of {', '.join(OBJECTIVES)}"


def _describe(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "(document)"
    shown = "" if item["type"] in ("missing", "json_invalid") else f" (got {str(item['input'])[:100]!r})"
    return f"{where}: {item['msg']}{shown}"
