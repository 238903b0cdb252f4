"""Hyperparameters, resources and output of a FineTuneJob: how it is trained and where the result goes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.base import ApiModel, SecretReference
from finetune_operator.api.rules import FORBIDDEN, CpuQuantity, MemoryQuantity, rule, rules
from finetune_operator.api.uris import OutputUri


class Scheduler(StrEnum):
    LINEAR = "Linear"
    COSINE = "Cosine"
    CONSTANT = "Constant"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    SGD = "SGD"


class Precision(StrEnum):
    AUTO = "Auto"  # BFloat16 on a GPU that has it, else Float32
    BFLOAT16 = "BFloat16"
    FLOAT32 = "Float32"


class HyperparameterSpec(ApiModel):
    """How it is trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.microBatchSize) || self.globalBatchSize % self.microBatchSize == 0",
                "microBatchSize must divide globalBatchSize without a rest (for example 4 of 16); "
                "change one of them, or leave microBatchSize out to have it chosen",
                fieldPath=".microBatchSize",
                reason=FORBIDDEN,
            ),
            rule(
                "!has(self.evalSteps) || !has(self.maxSteps) || self.evalSteps <= self.maxSteps",
                "evalSteps is more than maxSteps, so no evaluation would take place; lower evalSteps or leave it out",
                fieldPath=".evalSteps",
                reason=FORBIDDEN,
            ),
        )
    )

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate, above 0 and at most 1. Absent: 2e-4 for LoRA and QLoRA, 2e-5 for Full."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    """Passes over the data, also parts such as 0.5; ignored when maxSteps is set. Default 3."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Number of optimizer steps; overrides epochs. Absent: epochs decides."""
    global_batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rows per optimizer step. Default 16."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows per forward pass; must divide globalBatchSize. Less needs less memory. Absent: the largest divisor up
    to 8."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Tokens per row; longer rows are cut at the end. Default 1024."""
    packing: bool = False
    """Pack several short rows into one sequence of maxLength tokens. Default false."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps in which the learning rate rises from 0, below 1. Default 0.03."""
    scheduler: Scheduler = Scheduler.COSINE
    """How the learning rate falls after the warm-up: Linear, Cosine (default) or Constant (it does not fall)."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay, 0 to 1. Default 0."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Gradients are clipped to this norm. Default 1."""
    neftune_alpha: Annotated[float, Field(gt=0, le=100)] | None = None
    """Noise on the embeddings (NEFTune), usually 5 to 15. Absent: none."""
    optimizer: Optimizer = Optimizer.ADAMW
    """AdamW (default), AdamW8bit (keeps its state in 8 bits, bitsandbytes) or SGD."""
    precision: Precision = Precision.AUTO
    """Type of the forward and backward pass: BFloat16 or Float32; Auto (default) is BFloat16 on a GPU that has
    it and Float32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. Default false."""
    eval_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps between evaluations. Absent: ten evaluations per run."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of initialization, shuffling and dropout. Default 42."""


class EarlyStoppingSpec(ApiModel):
    """When to stop before the last step."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement of eval_loss after which training stops; the best weights are kept.
    Default 3."""
    min_delta: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Smallest decrease of eval_loss that counts as an improvement. Default 0."""


class FitCheck(StrEnum):
    AUTO = "Auto"
    SKIP = "Skip"


class ResourcesSpec(ApiModel):
    """What the training pod gets."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.acceleratorType) || self.gpusPerWorker > 0",
                "the training pod has no GPU; set gpusPerWorker to 1, or remove acceleratorType",
                fieldPath=".acceleratorType",
                reason=FORBIDDEN,
            )
        )
    )

    image: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=512,
                json_schema_extra=rules(
                    rule(
                        "self.matches('^[A-Za-z0-9][A-Za-z0-9._:/@-]*$')",
                        "must be the reference of a container image, for example registry.example.com/team/trainer:1.0",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """Training image; it holds finetune-trainer and Ray. Absent: the operator's default."""
    cpu: CpuQuantity = "1"
    """CPU request and limit of the training pod as a Kubernetes quantity: 4 (cores) or 500m (half a core); one
    and a half are 1500m, or "1.5" in quotes. Default 1."""
    memory: MemoryQuantity = "4Gi"
    """Memory request and limit of the training pod as a Kubernetes quantity, for example 16Gi. Default 4Gi."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of the training pod, 0 or 1. Default 0: training runs on the CPU."""
    accelerator_type: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=63,
                json_schema_extra=rules(
                    rule(
                        "self.matches('^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')",
                        "must be the value of a node's label, for example NVIDIA-L4 or NVIDIA-A100-SXM4-80GB",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """Kind of GPU, as the nodes' label nvidia.com/gpu.product names it (the operator may be configured for another
    label), for example NVIDIA-L4 or NVIDIA-H100-80GB-HBM3. The training pod runs only on such nodes, and
    `finetune plan` compares the job with this GPU's memory. Absent: any GPU."""
    fit_check: FitCheck = FitCheck.AUTO
    """Auto (default): where acceleratorType is named, attempt 0 runs without a GPU; it checks configuration, model and
    data, and compares the memory that training needs with that of the GPU. Skip: the first attempt asks for the
    GPU at once, and checks there."""


class SchedulingSpec(ApiModel):
    """Who decides when there is room for the job."""

    queue_name: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=63,
                json_schema_extra=rules(
                    rule(
                        "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                        "must be the name of a LocalQueue of Kueue in the job's namespace: lower-case letters, digits "
                        "and '-', for example team-a",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """LocalQueue of Kueue in the job's namespace. The job then starts when the queue has quota for it, and may be
    preempted by the queue; it goes on from its newest checkpoint. Absent: the job starts at once."""


class OutputSpec(ApiModel):
    """Where the artifact goes."""

    uri: OutputUri | None = None
    """Folder of the artifact: s3://bucket/path, gs://bucket/path, pvc://claim/path or file:///absolute/path. It
    must be empty or new. Absent: <the operator's output folder>/<namespace>/<name>-<uid>."""
    secret_ref: SecretReference | None = None
    """Secret with credentials for the output's storage."""
