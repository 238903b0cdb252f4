"""FineTuneJob: the fine-tuning of one model on one data set, from base model to committed artifact.

This is the module that others import; the parts of the spec and the status have files of their own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.base import ApiModel
from finetune_operator.api.finetunejob_attempts import (
    UNLIMITED,
    BackoffSpec,
    CheckpointSpec,
    DeadlineSpec,
    OutOfMemoryPolicy,
    ResumePolicy,
    RetrySpec,
)
from finetune_operator.api.finetunejob_datasets import (
    ApplyChatTemplate,
    DataFormat,
    DatasetSpec,
    SourceSpec,
    SplitSpec,
)
from finetune_operator.api.finetunejob_methods import (
    ComputeDtype,
    JobReference,
    LoraSpec,
    MethodSpec,
    MethodType,
    ModelSpec,
    QuantizationSpec,
    QuantizationType,
)
from finetune_operator.api.finetunejob_objectives import (
    OBJECTIVE_RULE,
    SAMPLING,
    ConfigMapKeyReference,
    GenerationSpec,
    Objective,
    PreferenceSpec,
    RewardFunctionSpec,
    RewardSpec,
    objective_rules,
)
from finetune_operator.api.finetunejob_status import (
    INFRASTRUCTURE,
    Artifact,
    Attempt,
    Checkpoint,
    Cost,
    Count,
    Effective,
    ErrorClass,
    FineTuneJobStatus,
    LastAction,
    Metrics,
    Overrides,
    Phase,
    Progress,
    Queue,
    Retries,
    Upstream,
)
from finetune_operator.api.finetunejob_training import (
    EarlyStoppingSpec,
    FitCheck,
    HyperparameterSpec,
    Optimizer,
    OutputSpec,
    Precision,
    ResourcesSpec,
    Scheduler,
    SchedulingSpec,
)
from finetune_operator.api.rules import FORBIDDEN, rule, rules

__all__ = [
    "DESCRIPTION",
    "INFRASTRUCTURE",
    "KIND",
    "MAX_NAME_LENGTH",
    "PLURAL",
    "SAMPLING",
    "UNLIMITED",
    "ApplyChatTemplate",
    "Artifact",
    "Attempt",
    "BackoffSpec",
    "Checkpoint",
    "CheckpointSpec",
    "ComputeDtype",
    "ConfigMapKeyReference",
    "Cost",
    "Count",
    "DataFormat",
    "DatasetSpec",
    "DeadlineSpec",
    "EarlyStoppingSpec",
    "Effective",
    "ErrorClass",
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "FitCheck",
    "GenerationSpec",
    "HyperparameterSpec",
    "JobReference",
    "LastAction",
    "LoraSpec",
    "MethodSpec",
    "MethodType",
    "Metrics",
    "ModelSpec",
    "Objective",
    "Optimizer",
    "OutOfMemoryPolicy",
    "OutputSpec",
    "Overrides",
    "Phase",
    "Precision",
    "PreferenceSpec",
    "Progress",
    "QuantizationSpec",
    "QuantizationType",
    "Queue",
    "ResourcesSpec",
    "ResumePolicy",
    "Retries",
    "RetrySpec",
    "RewardFunctionSpec",
    "RewardSpec",
    "Scheduler",
    "SchedulingSpec",
    "SourceSpec",
    "SplitSpec",
    "Upstream",
]

KIND = "FineTuneJob"
PLURAL = "finetunejobs"
# The RayJob's name gets a suffix, and KubeRay makes Service names (63 characters at most) of that.
MAX_NAME_LENGTH = 40


# Top of `kubectl explain finetunejob`: enough to write the first job.
DESCRIPTION = """\
FineTuneJob fine-tunes a language model on your data and leaves an adapter (or a model) in storage.
The least that it needs:

  apiVersion: finetune.dev/v1alpha1
  kind: FineTuneJob
  metadata:
    name: my-first
  spec:
    model:
      uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct
    dataset:
      sources:
        - uri: pvc://files/train.jsonl

Follow it with `finetune jobs watch my-first` or `kubectl get ftj my-first --watch`.
Wait for it with `kubectl wait --for=condition=Complete ftj/my-first`.
Stop it and go on later with `kubectl patch ftj my-first --type=merge -p '{"spec":{"suspend":true}}'` (then false);
end it for good with `kubectl annotate ftj my-first finetune.dev/action=cancel`.
The name has at most 40 characters. Once the first attempt was started, only suspend, retry, deadlines and
ttlSecondsAfterFinished may be changed."""

# Of the spec's fields, those that an operator may still want to change while the job runs.
MUTABLE = frozenset({"suspend", "retry", "deadlines", "ttl_seconds_after_finished"})


class FineTuneJobSpec(ApiModel):
    """What to train. Required: model.uri and dataset.sources[].uri; everything else has a default."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.earlyStopping) || self.dataset.split.eval > 0.0",
                "early stopping watches eval_loss, and dataset.split.eval 0 turns evaluation off; "
                "set dataset.split.eval above 0 (for example 0.05) or remove earlyStopping",
                fieldPath=".earlyStopping",
                reason=FORBIDDEN,
            ),
            rule(
                "!has(self.hyperparameters.evalSteps) || self.dataset.split.eval > 0.0",
                "dataset.split.eval 0 turns evaluation off; set it above 0 (for example 0.05) or remove evalSteps",
                fieldPath=".hyperparameters.evalSteps",
                reason=FORBIDDEN,
            ),
            rule(
                "!has(self.method.quantization) || !has(self.method.quantization.computeDtype) || "
                "self.hyperparameters.precision == 'Auto' || "
                "self.hyperparameters.precision.lowerAscii() == self.method.quantization.computeDtype",
                "computeDtype and hyperparameters.precision name different types; "
                "use the same type for both, or leave computeDtype out",
                messageExpression="'computeDtype ' + self.method.quantization.computeDtype + "
                "' and hyperparameters.precision ' + self.hyperparameters.precision + "
                "' are different types; use the same type for both, or leave computeDtype out'",
                fieldPath=".method.quantization.computeDtype",
                reason=FORBIDDEN,
            ),
            rule(
                "!has(self.output.uri) || !has(self.model.uri) || self.output.uri != self.model.uri",
                "output.uri is the folder of the base model, which would be overwritten; name a new folder",
                fieldPath=".output.uri",
                reason=FORBIDDEN,
            ),
            rule(
                "!has(self.checkpoint.uri) || !has(self.output.uri) || (self.checkpoint.uri != self.output.uri && "
                "!self.checkpoint.uri.startsWith(self.output.uri + '/') && "
                "!self.output.uri.startsWith(self.checkpoint.uri + '/'))",
                "checkpoint.uri and output.uri are the same folder, or lie in one another; name another one, or leave "
                "it out to use <output.uri>-checkpoints",
                fieldPath=".checkpoint.uri",
                reason=FORBIDDEN,
            ),
            *objective_rules(),
        )
    )

    objective: Annotated[str, Field(min_length=1, max_length=64, json_schema_extra=rules(OBJECTIVE_RULE))] = (
        Objective.SFT.value
    )
    """What is learnt. SFT (default): demonstrations. DPO: preferences between answers. RewardModel: a model that scores
    answers, from preferences. RLOO and GRPO: sampled answers are reinforced by their rewards."""
    model: ModelSpec
    """The base model."""
    method: MethodSpec = MethodSpec()
    """Which weights are trained. Default: LoRA."""
    dataset: DatasetSpec
    """What is trained on."""
    preference: PreferenceSpec | None = None
    """How preferences are learnt; only for DPO. Absent: beta 0.1."""
    reward: RewardSpec | None = None
    """What answers are worth. Required by RLOO and GRPO, refused for the others. Absent: the objective needs none."""
    generation: GenerationSpec | None = None
    """How answers are sampled; only for RLOO and GRPO. Absent: 4 answers to each prompt, at most 128 tokens each."""
    hyperparameters: HyperparameterSpec = HyperparameterSpec()
    """How it is trained. Default: 3 epochs, 16 rows per step, cosine schedule."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop when eval_loss no longer improves; needs dataset.split.eval above 0. Absent: train to the end; {} is
    patience 3."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the training pod gets. Default: 1 CPU, 4Gi memory, no GPU."""
    scheduling: SchedulingSpec = SchedulingSpec()
    """Who decides when there is room. Default: nobody but the cluster's scheduler."""
    output: OutputSpec = OutputSpec()
    """Where the artifact goes. Default: a folder of its own below the operator's output folder."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Where and how often training is saved. Default: every 10 minutes, beside the output."""
    retry: RetrySpec = RetrySpec()
    """How many attempts there may be. Default: 5 retries after failures of the infrastructure, any number after
    preemptions, none after a mistake in spec or data."""
    deadlines: DeadlineSpec = DeadlineSpec()
    """Times after which the operator steps in. Default: an attempt that says nothing for half an hour is replaced."""
    suspend: bool = False
    """Stop training and give its resources back; false goes on from the newest checkpoint, as another attempt that
    costs no retry. Default false."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """Seconds after its end at which the job object is deleted, with what it owns in the cluster; the artifact stays in
    its storage. Absent: it is kept."""


def _unchanged() -> str:
    """CEL: no field of the spec has changed but the mutable ones."""
    parts = []
    for name, field in FineTuneJobSpec.model_fields.items():
        if name in MUTABLE:
            continue
        new, old = f"self.spec.{field.alias}", f"oldSelf.spec.{field.alias}"
        same = f"{new} == {old}"
        parts.append(same if field.is_required() else f"has({new}) == has({old}) && (!has({new}) || {same})")
    return " && ".join(parts)


class FineTuneJob(ApiModel):
    """Fine-tunes a language model on your data and leaves an adapter (or a model) in storage."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
                f"metadata.name must have at most {MAX_NAME_LENGTH} characters",
                messageExpression="self.metadata.name + ' is too long: at most "
                f"{MAX_NAME_LENGTH} characters are allowed, because names of Services are made from it'",
                fieldPath=".metadata.name",
            ),
            rule(
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "must begin with a letter, hold only lower-case letters, digits and '-', and not end with '-', "
                "because names of Services are made from it",
                fieldPath=".metadata.name",
            ),
            rule(
                "!has(self.spec.model.fineTuneJobRef) || self.spec.model.fineTuneJobRef.name != self.metadata.name",
                "is this job itself, so it would wait for ever; name the job that makes the base model",
                fieldPath=".spec.model.fineTuneJobRef",
            ),
            rule(
                "!has(self.spec.reward) || !has(self.spec.reward.fineTuneJobRef) || "
                "self.spec.reward.fineTuneJobRef.name != self.metadata.name",
                "is this job itself, so it would wait for ever; name the job that makes the reward model",
                fieldPath=".spec.reward.fineTuneJobRef",
            ),
            rule(
                "!has(oldSelf.status) || !has(oldSelf.status.attempts) || size(oldSelf.status.attempts) == 0 "
                # First, for cost: what changes status is a write of status, and the API server keeps spec out of that.
                f"|| !has(self.status) || self.status != oldSelf.status || ({_unchanged()})",
                "the spec cannot be changed once the first attempt was started (but for suspend, retry, deadlines and "
                "ttlSecondsAfterFinished); apply the new spec under another name, or delete this job first",
                fieldPath=".spec",
                reason=FORBIDDEN,
            ),
        )
    )

    spec: FineTuneJobSpec
    """What to train. Required: model.uri and dataset.sources[].uri; everything else has a default."""
    status: FineTuneJobStatus | None = None
    """What happened so far. Written by the operator."""
