"""Conditions as in metav1.Condition: one entry per type, a transition time that moves only with the status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_operator.api.base import Condition
from finetune_operator.core import texts


class ConditionType(StrEnum):
    ACCEPTED = "Accepted"  # the operator understands the spec and can act on it
    QUOTA_RESERVED = "QuotaReserved"  # the queue has let the job in
    RESOURCES_READY = "ResourcesReady"  # the training pod runs
    TRAINING = "Training"  # optimizer steps are being taken
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"  # another attempt would not begin at step 0
    SUSPENDED = "Suspended"  # spec.suspend is true and nothing runs
    ARTIFACT_PUBLISHED = "ArtifactPublished"  # the manifest is committed
    COMPLETE = "Complete"  # as batch/v1 Job and TrainJob: ended well
    FAILED = "Failed"  # as batch/v1 Job and TrainJob: ended badly


class KStatus(StrEnum):
    """What Flux, Helm and kpt wait for (kstatus): neither is the case once an object is as its spec wants it."""

    RECONCILING = "Reconciling"
    STALLED = "Stalled"


@dataclass(frozen=True)
class Claim:
    """What is to be said of one condition now."""

    type: str
    """A ConditionType, or a condition of another kind of object."""
    holds: bool | None
    """None is Unknown."""
    reason: str
    message: str


SPEC_IS_COMPLETE = Claim(ConditionType.ACCEPTED, True, "Accepted", "the spec is complete")


def kstatus(*, reconciling: bool, stalled: bool, reason: str, message: str) -> list[Claim]:
    """Both conditions, by what the phase says."""
    held = {KStatus.RECONCILING: reconciling, KStatus.STALLED: stalled}
    return [Claim(kind, holds, reason, message) for kind, holds in held.items()]


STATUS_WORDS = {True: "True", False: "False", None: "Unknown"}


def merge(
    conditions: Sequence[Condition], claims: Sequence[Claim], *, now: datetime, generation: int | None
) -> list[Condition]:
    """The conditions after the claims; those of other types stay as they are, in their order."""
    merged = {condition.type: condition for condition in conditions}
    for claim in claims:
        old = merged.get(claim.type)
        status = STATUS_WORDS[claim.holds]
        merged[claim.type] = Condition(
            type=claim.type,
            status=status,
            reason=claim.reason,
            message=claim.message[: texts.LONGEST],
            last_transition_time=old.last_transition_time if old and old.status == status else now,
            observed_generation=generation,
        )
    return list(merged.values())
