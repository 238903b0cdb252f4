"""Status of a FineTuneJob: what happened so far, as the operator reports it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_operator.api.base import Condition, Message, StatusModel
from finetune_operator.api.rules import keyed_list

Count = Annotated[int, Field(ge=0, le=2**53)]  # as far as every JSON reader counts exactly


class Phase(StrEnum):
    """Printable summary of the conditions; never the source of a decision."""

    PENDING = "Pending"  # accepted, or refused with condition Accepted=False; nothing runs
    QUEUED = "Queued"  # the RayJob is held back, by Kueue or by whoever suspended it
    PROVISIONING = "Provisioning"  # the RayJob exists, its pods do not run yet
    VALIDATING = "Validating"  # the trainer checks configuration, model and data
    RUNNING = "Running"  # optimizer steps are taken
    EVALUATING = "Evaluating"  # last evaluation and export of the artifact
    RETRYING = "Retrying"  # an attempt has ended; another one follows
    SUSPENDED = "Suspended"  # spec.suspend is true
    SUCCEEDED = "Succeeded"  # the artifact is committed
    FAILED = "Failed"
    CANCELLED = "Cancelled"  # by the annotation finetune.dev/action, or by stopping the Ray job


class ErrorClass(StrEnum):
    """Why an attempt ended; the exit codes are in docs/exit-codes.md."""

    SUCCEEDED = "Succeeded"
    CHECKED = "Checked"  # attempt 0 found nothing wrong
    BAD_CONFIG = "BadConfig"
    BAD_DATA = "BadData"
    MODEL_NOT_FOUND = "ModelNotFound"
    STORAGE = "Storage"
    PREEMPTED = "Preempted"
    GPU_OUT_OF_MEMORY = "GpuOutOfMemory"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    NOT_FINITE = "NotFinite"
    COLLECTIVE = "Collective"  # processes of one attempt lost one another
    CHECKPOINT_CORRUPT = "CheckpointCorrupt"
    EVALUATION_GATE = "EvaluationGate"
    CANCELLED = "Cancelled"
    SUSPENDED = "Suspended"  # spec.suspend became true
    DEADLINE_EXCEEDED = "DeadlineExceeded"  # one of spec.deadlines
    STALLED = "Stalled"  # the trainer no longer reports
    LOST = "Lost"  # the process went away and did not say why
    INTERNAL = "Internal"


INFRASTRUCTURE = (
    ErrorClass.STORAGE,
    ErrorClass.COLLECTIVE,
    ErrorClass.CHECKPOINT_CORRUPT,
    ErrorClass.LOST,
    ErrorClass.STALLED,
    ErrorClass.INTERNAL,
)
"""Nobody's mistake: they have retries of their own, and a number of jobs that failed so is an alarm."""


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
    reward: float | None = None
    """Mean reward of the latest sampled answers (RLOO, GRPO)."""
    eval_reward: float | None = None
    """Mean reward of answers to the held-out prompts (RLOO, GRPO)."""
    kl: float | None = None
    """How far a token is from the reference on average, in nats (RLOO, GRPO with beta above 0)."""
    accuracy: float | None = None
    """Share of preferences in which the chosen answer is ahead, 0 to 1 (DPO, RewardModel)."""
    eval_accuracy: float | None = None
    """The same for the held-out rows."""
    completion_length: float | None = None
    """Mean length of the latest sampled answers, in tokens (RLOO, GRPO)."""


class Overrides(StatusModel):
    """What an attempt was given instead of what the spec says, after one that ran out of memory."""

    micro_batch_size: int | None = None
    """Rows per forward pass; rows per optimizer step stay as they are."""
    memory: Annotated[str, Field(max_length=32)] | None = None
    """Memory of the training pod."""


class Attempt(StatusModel):
    """One RayJob that was started for the job."""

    number: int
    """1 for the first attempt. 0 is the check before it, which has no GPU (spec.resources.fitCheck)."""
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
    resumed_from_step: int | None = None
    """Step of the checkpoint that the attempt went on from; 0 or absent: it began at the beginning."""
    last_step: int | None = None
    """Last optimizer step that was reported."""
    lost_steps: int | None = None
    """Steps that were done and not saved, so that they have to be done again."""
    gpu_seconds: int | None = None
    """GPUs of the attempt times the seconds in which its pod ran."""
    overrides: Overrides | None = None
    """What this attempt was given instead of what the spec says."""
    inspection: Annotated[str, Field(max_length=63)] | None = None
    """Name of the RayJob that looks for a committed artifact because the attempt's own report never arrived."""


class Retries(StatusModel):
    """How many attempts followed on a failure, by kind; each kind has a budget of its own in spec.retry."""

    user: int = 0
    """After BadConfig, BadData, ModelNotFound and NotFinite."""
    infrastructure: int = 0
    """After Storage, Collective, CheckpointCorrupt, Lost, Stalled and Internal."""
    preemption: int = 0
    """After Preempted, and times that a queue took the room away."""


class Checkpoint(StatusModel):
    """The newest checkpoint that the trainer reported."""

    step: int
    """Optimizer step after which it was saved."""
    uri: Annotated[str, Field(max_length=1200)]
    """Its folder."""
    time: datetime
    """When the operator learnt of it."""


class Queue(StatusModel):
    """The job's place in a queue of Kueue; present while it waits there."""

    name: Annotated[str, Field(max_length=63)]
    """LocalQueue in the job's namespace."""
    position: int | None = None
    """How many Workloads of that queue come first, plus one; absent where Kueue does not tell."""
    workload: Annotated[str, Field(max_length=253)] | None = None
    """Name of Kueue's Workload for the attempt; absent until Kueue has made it."""
    reason: Annotated[str, Field(max_length=64)]
    """One word for why it waits, for example Pending, Preempted or QueueMissing."""
    message: Message = ""
    """What Kueue says."""


class Cost(StatusModel):
    """What the job has used, over all attempts."""

    gpu_seconds: int = 0
    """GPUs times the seconds in which the training pod ran."""
    lost_gpu_seconds: int = 0
    """Part of gpuSeconds whose work no checkpoint and no artifact holds."""
    estimated: float | None = None
    """gpuSeconds by the operator's price table; absent where that has no price for the GPU."""
    currency: Annotated[str, Field(max_length=8)] | None = None
    """Currency of estimated."""


class LastAction(StatusModel):
    """What became of the annotation finetune.dev/action."""

    value: Annotated[str, Field(max_length=128)]
    """The annotation's value."""
    refused: bool = False
    """Whether it could not be obeyed."""
    message: Message = ""
    """What was done, or why nothing was done."""


class Upstream(StatusModel):
    """Another job's artifact that this job is built on."""

    uri: Annotated[str, Field(max_length=1200)]
    """Folder of the artifact."""
    digest: Annotated[str, Field(max_length=71)]
    """SHA-256 of its manifest.json; the trainer refuses any other."""
    base_model: Annotated[str, Field(max_length=1024)] | None = None
    """URI of the base model that it is an adapter of; absent: it is a whole model."""


class Effective(StatusModel):
    """What was really used where the spec left a choice."""

    model_uri: Annotated[str, Field(max_length=1200)] | None = None
    """Folder of the base model, where another job's artifact is the model or is an adapter of it."""
    adapter: Upstream | None = None
    """Adapter of another job that is trained further."""
    reward: Upstream | None = None
    """Reward model of another job."""
    checkpoint_uri: Annotated[str, Field(max_length=1300)] | None = None
    """Folder that the checkpoints are written to."""

    output_uri: Annotated[str, Field(max_length=1200)] | None = None
    """Folder that the artifact is written to."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Training image."""
    model_revision: Annotated[str, Field(max_length=128)] | None = None
    """Commit of the base model (hf://)."""
    dataset_digest: Annotated[str, Field(max_length=71)] | None = None
    """SHA-256 over the data files."""
    train_rows: Count | None = None
    """Rows that were trained on."""
    eval_rows: Count | None = None
    """Rows that were held out."""
    learning_rate: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Peak learning rate."""
    micro_batch_size: Count | None = None
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
    size_bytes: Count
    """Size of all files, in bytes."""
    base_model: Annotated[str, Field(max_length=1024)]
    """URI of the base model that the adapter fits."""
    rank: Count | None = None
    """LoRA rank; absent for Full."""


class FineTuneJobStatus(StatusModel):
    """What happened so far. Written by the operator."""

    observed_generation: int | None = None
    """Generation of the spec that this status is about; -1 until the operator has seen the object."""
    phase: Phase | None = None
    """Summary for people. Programs read the conditions."""
    reason: Annotated[str, Field(max_length=64)] | None = None
    """One word for why the job is in this phase."""
    message: Message | None = None
    """One sentence: what happens now, or what to do."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=keyed_list("type"))] = (
        Field(default_factory=list)
    )
    """Accepted, QuotaReserved (with a queue), ResourcesReady, Training, CheckpointAvailable, Suspended,
    ArtifactPublished, Reconciling and Stalled (kstatus), and at the end Complete or Failed."""
    progress: Progress | None = None
    """How far training is; at most one write in 10 seconds."""
    metrics: Metrics | None = None
    """The latest loss, evaluation loss, learning rate and gradient norm."""
    attempts: Annotated[list[Attempt], Field(max_length=10, json_schema_extra=keyed_list("number"))] = Field(
        default_factory=list
    )
    """The last ten attempts."""
    retries: Retries | None = None
    """How many attempts followed on a failure, by kind."""
    next_attempt_time: datetime | None = None
    """When the next attempt may start; present while one is due."""
    next_overrides: Overrides | None = None
    """What the next attempt is given instead of what the spec says."""
    checkpoint: Checkpoint | None = None
    """The newest checkpoint."""
    queue: Queue | None = None
    """The job's place in a queue of Kueue; present while it waits there."""
    cost: Cost | None = None
    """What the job has used, over all attempts; absent where it used no GPU."""
    last_action: LastAction | None = None
    """What became of the annotation finetune.dev/action."""
    suspended_seconds: int | None = None
    """Seconds in which the job was suspended so far, without the present suspension."""
    effective: Effective | None = None
    """What was really used where the spec left a choice."""
    artifact: Artifact | None = None
    """The committed result; present once the job succeeded."""
    start_time: datetime | None = None
    """When the first attempt was recorded."""
    completion_time: datetime | None = None
    """When the job ended."""
