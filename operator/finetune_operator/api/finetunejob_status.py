"""Status of a FineTuneJob: what happened so far, as the operator reports it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_operator.api.base import Condition, Message, StatusModel
from finetune_operator.api.rules import keyed_list


class Phase(StrEnum):
    """Printable summary of the conditions; never the source of a decision."""

    PENDING = "Pending"  # accepted, or refused with condition Accepted=False; nothing runs
    PROVISIONING = "Provisioning"  # the RayJob exists, its pods do not run yet
    VALIDATING = "Validating"  # the trainer checks configuration, model and data
    RUNNING = "Running"  # optimizer steps are taken
    EVALUATING = "Evaluating"  # last evaluation and export of the artifact
    SUCCEEDED = "Succeeded"  # the artifact is committed
    FAILED = "Failed"
    CANCELLED = "Cancelled"  # someone stopped the Ray job, for example in Ray's dashboard


class ErrorClass(StrEnum):
    """Why an attempt ended; the exit codes are in docs/exit-codes.md."""

    SUCCEEDED = "Succeeded"
    BAD_CONFIG = "BadConfig"
    BAD_DATA = "BadData"
    MODEL_NOT_FOUND = "ModelNotFound"
    NOT_FINITE = "NotFinite"
    CANCELLED = "Cancelled"
    LOST = "Lost"
    INTERNAL = "Internal"


class Progress(StatusModel):
    """How far training is."""

    percent: int = 0
    """Share of the optimizer steps that is done, 0 to 100."""
    summary: Annotated[str, Field(max_length=16)] = ""
    """The same for printing, for example 45%."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps planned."""
    epoch: float | None = None
    """Passes over the data so far."""
    tokens_per_second: float | None = None
    """Training tokens per second since the last report."""
    estimated_remaining_seconds: int | None = None
    """Estimated time to the end of training, in seconds."""
    eta: Annotated[str, Field(max_length=32)] | None = None
    """The same for printing, for example 3m20s."""
    last_report_time: datetime | None = None
    """When the trainer last reported."""


class Metrics(StatusModel):
    """The latest numbers."""

    loss: float | None = None
    """Latest training loss (mean negative log-likelihood per supervised token, in nats)."""
    eval_loss: float | None = None
    """Latest loss on the held-out rows."""
    learning_rate: float | None = None
    """Current learning rate."""
    grad_norm: float | None = None
    """Norm of the gradient before clipping."""


class Attempt(StatusModel):
    """One RayJob that was started for the job."""

    number: int
    """1 for the first attempt."""
    ray_job: Annotated[str, Field(max_length=63)]
    """Name of the RayJob."""
    uid: Annotated[str, Field(max_length=64)] | None = None
    """UID of the RayJob; absent until it was created."""
    start_time: datetime
    """When the attempt was recorded, before its RayJob was created."""
    end_time: datetime | None = None
    """When the attempt ended; absent while it runs."""
    error_class: ErrorClass | None = Field(default=None, alias="class")
    """Why the attempt ended."""
    exit_code: int | None = None
    """Exit code of the trainer."""
    message: Message | None = None
    """What happened and what to do."""
    last_step: int | None = None
    """Last optimizer step that was reported."""
    inspection: Annotated[str, Field(max_length=63)] | None = None
    """Name of the RayJob that looks for a committed artifact because the attempt's own report never arrived."""


class Effective(StatusModel):
    """What was really used where the spec left a choice."""

    output_uri: Annotated[str, Field(max_length=1200)] | None = None
    """Folder that the artifact is written to."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Training image."""
    model_revision: Annotated[str, Field(max_length=128)] | None = None
    """Commit of the base model (hf://)."""
    dataset_digest: Annotated[str, Field(max_length=71)] | None = None
    """SHA-256 over the data files."""
    train_rows: int | None = None
    """Rows that were trained on."""
    eval_rows: int | None = None
    """Rows that were held out."""
    learning_rate: float | None = None
    """Peak learning rate."""
    micro_batch_size: int | None = None
    """Rows per forward pass."""
    precision: Annotated[str, Field(max_length=16)] | None = None
    """Type of the forward and backward pass."""
    device: Annotated[str, Field(max_length=64)] | None = None
    """Device that trained, for example cpu or the name of the GPU."""


class Artifact(StatusModel):
    """The committed result."""

    uri: Annotated[str, Field(max_length=1200)]
    """Folder of the artifact; its manifest.json lists every file with its SHA-256."""
    digest: Annotated[str, Field(max_length=71)]
    """SHA-256 of manifest.json: the identity of the artifact."""
    size_bytes: int
    """Size of all files, in bytes."""
    base_model: Annotated[str, Field(max_length=1024)]
    """URI of the base model that the adapter fits."""
    rank: int | None = None
    """LoRA rank; absent for Full."""


class FineTuneJobStatus(StatusModel):
    """What happened so far. Written by the operator."""

    observed_generation: int | None = None
    """Generation of the spec that this status is about."""
    phase: Phase | None = None
    """Summary for people. Programs read the conditions."""
    reason: Annotated[str, Field(max_length=64)] | None = None
    """One word for why the job is in this phase."""
    message: Message | None = None
    """One sentence: what happens now, or what to do."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=keyed_list("type"))] = (
        Field(default_factory=list)
    )
    """Accepted, ResourcesReady, Training, ArtifactPublished, and at the end Complete or Failed."""
    progress: Progress | None = None
    """How far training is; at most one write in 10 seconds."""
    metrics: Metrics | None = None
    """The latest loss, evaluation loss, learning rate and gradient norm."""
    attempts: Annotated[list[Attempt], Field(max_length=10, json_schema_extra=keyed_list("number"))] = Field(
        default_factory=list
    )
    """The last ten attempts."""
    effective: Effective | None = None
    """What was really used where the spec left a choice."""
    artifact: Artifact | None = None
    """The committed result; present once the job succeeded."""
    start_time: datetime | None = None
    """When the first attempt was recorded."""
    completion_time: datetime | None = None
    """When the job ended."""
