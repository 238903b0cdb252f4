"""Words and claims about attempts that several decisions share."""

from __future__ import annotations

from finetune_fit import verdicts
from finetune_operator.api.finetunejob import Attempt, ErrorClass, Phase, ResumePolicy
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Observed
from finetune_operator.core.policies import CHECK


def told(attempt: Attempt) -> str:
    """How an attempt ended, as the beginning of a sentence."""
    if attempt.error_class is ErrorClass.CHECKED:
        return f"checked: {(attempt.message or '').rstrip('.')}"
    which = "the check" if attempt.number == CHECK else f"attempt {attempt.number}"
    return f"{which} ended: {(attempt.message or '').rstrip('.')}"


def reason_after(attempt: Attempt) -> str:
    """The job's reason between this attempt and the next one."""
    checked = attempt.error_class is ErrorClass.CHECKED
    if checked and (attempt.message or "").startswith(verdicts.MAY_RUN_OUT):
        return "MayRunOutOfMemory"
    return str(attempt.error_class or ErrorClass.LOST)


def phase_after(attempt: Attempt) -> Phase:
    """The job's phase between this attempt and the next one."""
    return Phase.PROVISIONING if attempt.error_class is ErrorClass.CHECKED else Phase.RETRYING


def from_where(seen: Observed) -> str:
    """Where the next attempt goes on, as the end of a sentence; empty where it begins at the beginning."""
    checkpoint, spec = seen.job.status.checkpoint, seen.job.spec
    never = spec is not None and spec.checkpoint.resume is ResumePolicy.NEVER
    if never or checkpoint is None:
        return ""
    return f", from the checkpoint of step {checkpoint.step}"


def checkpoint_claim(seen: Observed) -> Claim:
    """Whether another attempt could go on from somewhere."""
    checkpoint = seen.job.status.checkpoint
    if checkpoint is None:
        message = "no checkpoint was reported yet"
        return Claim(ConditionType.CHECKPOINT_AVAILABLE, False, "NoCheckpoint", message)
    message = f"checkpoint of step {checkpoint.step} is at {checkpoint.uri}"
    return Claim(ConditionType.CHECKPOINT_AVAILABLE, True, "CheckpointSaved", message)
