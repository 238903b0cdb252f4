"""What is learnt, and what the objectives beside SFT need: rewards, sampled answers, preferences."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.base import ApiModel, SecretReference
from finetune_operator.api.finetunejob_datasets import DataFormat
from finetune_operator.api.finetunejob_methods import JobReference
from finetune_operator.api.rules import FORBIDDEN, REQUIRED, DnsName, one_of, rule, rules
from finetune_operator.api.uris import ModelUri


class Objective(StrEnum):
    SFT = "SFT"  # supervised fine-tuning on demonstrations
    DPO = "DPO"  # direct preference optimization
    REWARD_MODEL = "RewardModel"  # a model that scores answers, from preferences
    RLOO = "RLOO"  # sampled answers and rewards: REINFORCE, leave one out
    GRPO = "GRPO"  # the same with advantages relative to the group


SAMPLING = (Objective.RLOO, Objective.GRPO)  # the model's own answers are what it is trained on
FORMATS = {
    Objective.SFT: (DataFormat.MESSAGES, DataFormat.PROMPT_COMPLETION, DataFormat.ALPACA, DataFormat.TEXT),
    Objective.DPO: (DataFormat.PREFERENCE,),
    Objective.REWARD_MODEL: (DataFormat.PREFERENCE,),
    Objective.RLOO: (DataFormat.PROMPT_ONLY,),
    Objective.GRPO: (DataFormat.PROMPT_ONLY,),
}
GENERATIONS = 4  # default of generation.numGenerations, which a rule of the spec needs as well

_KNOWN = one_of([str(one) for one in Objective])
_LISTED = ", ".join(Objective)
OBJECTIVE_RULE = rule(
    f"self in {_KNOWN}",
    f"is not an objective of this version; use one of {_LISTED}",
    messageExpression="self.lowerAscii() == 'ppo' ? "
    "'PPO was removed from TRL; use its successors RLOO or GRPO' "
    f": {_KNOWN}.exists(known, known.lowerAscii() == self.lowerAscii()) ? "
    f"'must be written as one of {_LISTED}' "
    f": self + ' is not an objective of this version; use one of {_LISTED}'",
)


class ConfigMapKeyReference(ApiModel):
    """A key of a ConfigMap in the job's namespace."""

    name: DnsName
    """Name of the ConfigMap."""
    key: Annotated[
        str,
        Field(
            min_length=1,
            max_length=253,
            json_schema_extra=rules(
                rule(
                    "self.matches('^[A-Za-z0-9_-][-._A-Za-z0-9]*$')",
                    "must be a key of a ConfigMap: letters, digits, '-', '_' and '.', for example reward.py",
                )
            ),
        ),
    ]
    """Key whose value is the Python file, for example reward.py."""


class RewardFunctionSpec(ApiModel):
    """A Python function that says what answers are worth."""

    config_map_ref: ConfigMapKeyReference
    """ConfigMap of the same namespace that holds the file. It is mounted into the training pod and runs there, with
    what the training process may see; the pod holds no token of the cluster."""
    entry: Annotated[
        str,
        Field(
            min_length=1,
            max_length=128,
            json_schema_extra=rules(
                rule(
                    "self.matches('^[A-Za-z_][A-Za-z0-9_]*$')",
                    "must be the name of a Python function in the file",
                )
            ),
        ),
    ]
    """Name of the function in it: f(prompts, completions, **columns) returns a list with one number per completion.
    Columns are those of the data set, as lists."""


class RewardSpec(ApiModel):
    """What answers are worth, for RLOO and GRPO: a reward model, functions, or both."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.uri) || has(self.fineTuneJobRef) || (has(self.functions) && size(self.functions) > 0)",
                "names nothing that could judge an answer; add fineTuneJobRef or uri (a reward model), or functions",
                reason=REQUIRED,
            ),
            rule(
                "!(has(self.uri) && has(self.fineTuneJobRef))",
                "name one reward model: either fineTuneJobRef or uri",
                fieldPath=".uri",
                reason=FORBIDDEN,
            ),
            rule(
                "!has(self.weights) || size(self.weights) == "
                "(has(self.functions) ? size(self.functions) : 0) + "
                "(has(self.uri) || has(self.fineTuneJobRef) ? 1 : 0)",
                "needs one weight for each reward: the reward model first, then the functions in their order",
                fieldPath=".weights",
            ),
        )
    )

    uri: ModelUri | None = None
    """Reward model: folder of an artifact of objective RewardModel, or of a sequence classification model with one
    output. Absent: fineTuneJobRef names it, or functions alone judge."""
    fine_tune_job_ref: JobReference | None = None
    """FineTuneJob of the same namespace with objective RewardModel whose artifact is the reward model. This job waits
    until that one has succeeded, and fails when that one fails. Absent: uri names it, or functions alone judge."""
    functions: Annotated[
        list[RewardFunctionSpec], Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field(default_factory=list)
    """Python functions, at most 8; all rewards of an answer are added up. Absent: none."""
    weights: (
        Annotated[
            list[Annotated[float, Field(ge=-1000, le=1000)]],
            Field(min_length=1, max_length=9, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
        ]
        | None
    ) = None
    """Factors of the rewards: the reward model first, then the functions in their order. Absent: 1 for each."""
    beta: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Price of leaving the reference, per nat of divergence (KL); the reference is the model as training began. 0
    leaves the model free, and it may learn to please the rewards only. Absent: 0.05 for RLOO, 0 for GRPO."""
    secret_ref: SecretReference | None = None
    """Secret with credentials for the reward model's storage."""


class PreferenceSpec(ApiModel):
    """How preferences are learnt, for DPO."""

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """How closely the model stays to the reference, the model as training began: more is closer. Default 0.1."""


class GenerationSpec(ApiModel):
    """How answers are sampled, for RLOO and GRPO."""

    num_generations: Annotated[int, Field(ge=2, le=256)] = GENERATIONS
    """Answers to each prompt, which are compared with one another; must divide globalBatchSize, which counts answers.
    Default 4."""
    max_completion_length: Annotated[int, Field(ge=1, le=65536)] = 128
    """Longest answer in tokens; prompts may have as many as maxLength leaves. Default 128."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How freely tokens are drawn, above 0. Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest that have this much probability together. Default 1: from all."""


def objective_rules() -> tuple[dict[str, str], ...]:
    """Rules of the whole spec: which parts an objective needs, and which it has no use for."""
    sampling = one_of([str(one) for one in SAMPLING])
    return (
        rule(
            f"!(self.objective in {sampling}) || has(self.reward)",
            "RLOO and GRPO learn from rewards; name a reward model (fineTuneJobRef or uri) or functions",
            fieldPath=".reward",
            reason=REQUIRED,
        ),
        *(
            rule(
                f"!has(self.{field}) || self.objective in {sampling}",
                f"only RLOO and GRPO {purpose}; remove {field}, or choose one of these objectives",
                fieldPath=f".{field}",
                reason=FORBIDDEN,
            )
            for field, purpose in (("reward", "learn from rewards"), ("generation", "sample answers"))
        ),
        rule(
            "!has(self.preference) || self.objective == 'DPO'",
            "only DPO reads preference; remove it, or choose objective DPO",
            fieldPath=".preference",
            reason=FORBIDDEN,
        ),
        *(
            rule(
                f"self.objective == 'SFT' || {absent}",
                f"only SFT has {field}; remove it",
                fieldPath=f".hyperparameters.{field}",
                reason=FORBIDDEN,
            )
            for field, absent in (
                ("packing", "!self.hyperparameters.packing"),
                ("neftuneAlpha", "!has(self.hyperparameters.neftuneAlpha)"),
            )
        ),
        rule(
            f"!(self.objective in {sampling}) || self.hyperparameters.globalBatchSize % "
            f"(has(self.generation) ? self.generation.numGenerations : {GENERATIONS}) == 0",
            "globalBatchSize counts answers and must be a multiple of generation.numGenerations "
            f"({GENERATIONS} where it is absent), for example 16 of 4",
            fieldPath=".hyperparameters.globalBatchSize",
        ),
        rule(
            f"!(self.objective in {sampling}) || self.hyperparameters.maxLength > "
            "(has(self.generation) ? self.generation.maxCompletionLength : 128)",
            "maxLength counts prompt and answer; it must be more than generation.maxCompletionLength (128 where it is "
            "absent)",
            fieldPath=".hyperparameters.maxLength",
        ),
        *(
            rule(
                f"self.objective != '{objective}' || self.dataset.sources.all(s, !has(s.format) || s.format in "
                f"{one_of(['Auto', *(str(one) for one in formats)])})",
                f"{objective} reads the format {' or '.join(formats)}; change format, or leave it out",
                fieldPath=".dataset.sources",
            )
            for objective, formats in FORMATS.items()
        ),
    )
