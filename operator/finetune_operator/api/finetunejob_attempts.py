"""Checkpoints, retries and deadlines of a FineTuneJob: what happens when an attempt ends before the job is done."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from finetune_operator.api.base import ApiModel
from finetune_operator.api.rules import FORBIDDEN, rule, rules
from finetune_operator.api.uris import OutputUri

UNLIMITED = "Unlimited"
MAX_RETRIES = 1000


class ResumePolicy(StrEnum):
    AUTO = "Auto"
    NEVER = "Never"


class OutOfMemoryPolicy(StrEnum):
    REDUCE_BATCH = "ReduceBatch"
    FAIL = "Fail"


class CheckpointSpec(ApiModel):
    """Where and how often the state of training is saved, so that another attempt goes on from there."""

    uri: OutputUri | None = None
    """Folder of the checkpoints: s3://bucket/path, gs://bucket/path, pvc://claim/path or file:///absolute/path. The
    credentials are those of output.secretRef. Absent: the output's folder with -checkpoints behind its name. The
    checkpoints are removed once the artifact is committed."""
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps between two checkpoints. Absent: everyMinutes alone decides."""
    every_minutes: Annotated[float, Field(ge=0.1, le=10_080)] | None = None
    """Minutes between two checkpoints; with everySteps too, whichever comes first. Absent: 10, or never where
    everySteps is set."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Checkpoints that are kept, the newest ones. With 2 or more, a broken one costs the work since the one before.
    Default 2."""
    resume: ResumePolicy = ResumePolicy.AUTO
    """Auto (default): an attempt goes on from the newest complete checkpoint of this job. Never: every attempt begins
    at step 0."""


def _count(value: object) -> object:
    """A number that was written as text: an int-or-string may be either."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


CountOrUnlimited = Annotated[
    Annotated[int, Field(strict=True, ge=0, le=MAX_RETRIES)]  # `true` is no count
    | Annotated[str, Field(pattern=f"^{UNLIMITED}$")],
    BeforeValidator(_count),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 16,
            **rules(
                rule(
                    f"string(self) == '{UNLIMITED}' || string(self).matches('^([0-9]{{1,3}}|{MAX_RETRIES})$')",
                    f"must be {UNLIMITED} or a number from 0 to {MAX_RETRIES}",
                )
            ),
        }
    ),
]


class BackoffSpec(ApiModel):
    """How long is waited before another attempt, in seconds."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.min <= self.max",
                "min is more than max; lower min or raise max",
                fieldPath=".min",
                reason=FORBIDDEN,
            )
        )
    )

    min: Annotated[int, Field(ge=0, le=86_400)] = 10
    """Seconds before the first retry of a kind; each further one waits twice as long. Default 10."""
    max: Annotated[int, Field(ge=0, le=86_400)] = 600
    """Most seconds before a retry. Default 600."""


class RetrySpec(ApiModel):
    """How many attempts there may be, for each kind of failure apart. May be changed while the job runs."""

    max_user_retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 0
    """Retries after BadConfig, BadData, ModelNotFound and NotFinite, which only a correction heals. Default 0."""
    max_infra_retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 5
    """Retries after failures of the infrastructure (Storage, Collective, CheckpointCorrupt, Lost, Stalled) and after
    Internal. Default 5."""
    preemptions: CountOrUnlimited = UNLIMITED
    """Times that the job may be preempted and goes on elsewhere: a number from 0 to 1000, or Unlimited. Default
    Unlimited."""
    on_out_of_memory: OutOfMemoryPolicy = OutOfMemoryPolicy.REDUCE_BATCH
    """ReduceBatch (default): when the GPU's memory is not enough, the next attempt uses half the rows per forward pass
    and the same globalBatchSize, and when the pod's memory is not enough, one attempt more gets twice as much of it.
    Fail: the job fails."""
    backoff_seconds: BackoffSpec = BackoffSpec()
    """Wait before another attempt. Default: 10 seconds, doubled by each retry of the same kind up to 600; less up to a
    half, at random, so that jobs that failed together do not come back together."""


class DeadlineSpec(ApiModel):
    """Times after which the operator steps in. May be changed while the job runs."""

    start_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Seconds from the start of an attempt to the trainer's first report, with the time in which it waits for room.
    When they are over, the job fails. Absent: no limit."""
    total_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Seconds for the whole job, over all attempts and the waits between them; the time in which it is suspended does
    not count. When they are over, the job fails. Absent: no limit."""
    stall_seconds: Annotated[int, Field(ge=10, le=31_536_000)] = 1800
    """Seconds without a report of the trainer, while its pod runs, after which the attempt counts as stalled: it is
    stopped and another one goes on. Default 1800."""
