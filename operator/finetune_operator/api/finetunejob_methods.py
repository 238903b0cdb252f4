"""Base model and method of a FineTuneJob: what is trained."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.base import ApiModel, SecretReference
from finetune_operator.api.rules import FORBIDDEN, REQUIRED, DnsName, rule, rules
from finetune_operator.api.uris import ModelUri


class MethodType(StrEnum):
    LORA = "LoRA"
    QLORA = "QLoRA"
    FULL = "Full"


class QuantizationType(StrEnum):
    NF4 = "nf4"
    FP4 = "fp4"


class ComputeDtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class JobReference(ApiModel):
    """A FineTuneJob in the same namespace."""

    name: DnsName
    """Name of the FineTuneJob."""


class ModelSpec(ApiModel):
    """The base model: exactly one of uri and fineTuneJobRef."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.uri) != has(self.fineTuneJobRef)",
                "name exactly one of uri and fineTuneJobRef: where the model is, or the job that makes it",
                reason=REQUIRED,
            ),
            rule(
                "!has(self.revision) || (has(self.uri) && self.uri.startsWith('hf://'))",
                "only a model of the Hugging Face Hub (hf://) has revisions; "
                "remove revision, or put the version into the path of uri",
                fieldPath=".revision",
                reason=FORBIDDEN,
            ),
        )
    )

    uri: ModelUri | None = None
    """Where the base model is: hf://organization/model (Hugging Face Hub), s3://bucket/path, gs://bucket/path,
    pvc://claim/path (a PersistentVolumeClaim in the job's namespace) or file:///absolute/path (a path in the
    training container). The folder holds config.json, the tokenizer and safetensors weights. Example:
    hf://HuggingFaceTB/SmolLM2-135M-Instruct. Absent: the model comes from fineTuneJobRef."""
    fine_tune_job_ref: JobReference | None = None
    """FineTuneJob of the same namespace whose artifact is trained further. This job waits until that one has
    succeeded, and fails when that one fails. A model (method Full) becomes the base model. An adapter (LoRA, QLoRA) is
    put on the base model that it was trained on and trained further, so that the result fits that same base model;
    leave method.lora out then. Absent: the model comes from uri."""
    revision: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=128,
                json_schema_extra=rules(
                    rule(
                        "self.matches('^[A-Za-z0-9][A-Za-z0-9._/-]*$')",
                        "must be a branch, tag or commit, for example main or v1.0",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """Branch, tag or commit of the model; only for hf://. Absent: the default branch. The commit that was used
    is recorded in status.effective.modelRevision and in the artifact's manifest."""
    chat_template: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=65536,
                json_schema_extra=rules(
                    rule(
                        "self == 'ChatML' || (self.contains('{') && self.contains('messages'))",
                        "must be ChatML or the text of a Jinja template that goes over messages (not a file name)",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """Jinja chat template that replaces the model's own, as text; ChatML is a short name for that template.
    Absent: the model's own."""
    secret_ref: SecretReference | None = None
    """Secret with credentials for the model's storage, for example one with the key HF_TOKEN."""


class LoraSpec(ApiModel):
    """Settings of a low-rank adapter."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices, 1 to 1024. More rank means more capacity, memory and size. Default 16."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scaling: the update is multiplied by alpha / r. Default 32."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout probability of the adapter's input during training, 0 or more and below 1. Default 0.05."""
    target_modules: Annotated[
        list[
            Annotated[
                str,
                Field(
                    min_length=1,
                    max_length=128,
                    json_schema_extra=rules(
                        rule(
                            "self.matches('^[A-Za-z0-9_.-]+$')",
                            "must be the name of a module, for example q_proj; regular expressions are not supported",
                        )
                    ),
                ),
            ]
        ],
        Field(
            min_length=1,
            max_length=64,
            json_schema_extra=rules(
                rule(
                    "size(self) == 1 || !('all-linear' in self)",
                    "all-linear stands for every linear layer; use it alone, or list names of modules without it",
                ),
                rule(
                    "self.all(a, self.exists_one(b, a == b))", "names the same module twice; list each once"
                ),
            )
            | {"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default=["all-linear"])
    """Names of the modules that get an adapter, for example [q_proj, v_proj]. Default [all-linear]: every linear
    layer but the head."""


class QuantizationSpec(ApiModel):
    """Settings of the 4-bit base model."""

    type: QuantizationType = QuantizationType.NF4
    """Four-bit data type of the frozen base model: nf4 (NormalFloat, as in the QLoRA paper; default) or fp4."""
    double_quant: bool = True
    """Also quantize the quantization constants, which saves about 0.4 bit per parameter. Default true."""
    compute_dtype: ComputeDtype | None = None
    """Type that the 4-bit weights are computed in: bfloat16, float16 or float32. Absent: bfloat16 on a GPU,
    float32 on a CPU."""


class MethodSpec(ApiModel):
    """Which weights are trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.type != 'QLoRA' || has(self.quantization)",
                "method QLoRA trains over a quantized base model and needs quantization; "
                "write quantization: {} for 4-bit nf4, or use method LoRA to train without quantization",
                fieldPath=".quantization",
                reason=REQUIRED,
            ),
            rule(
                "self.type == 'QLoRA' || !has(self.quantization)",
                "only method QLoRA quantizes the base model; set type to QLoRA or remove quantization",
                messageExpression="'method ' + self.type + ' does not quantize the base model; "
                "set type to QLoRA or remove quantization'",
                fieldPath=".quantization",
                reason=FORBIDDEN,
            ),
            rule(
                "self.type != 'Full' || !has(self.lora)",
                "method Full trains all weights and has no adapter; remove lora, or set type to LoRA",
                fieldPath=".lora",
                reason=FORBIDDEN,
            ),
        )
    )

    type: MethodType = MethodType.LORA
    """LoRA (default) trains a low-rank adapter beside the frozen base model; QLoRA the same over a 4-bit base
    model, which saves memory; Full trains all weights."""
    lora: LoraSpec | None = None
    """Settings of the adapter, for LoRA and QLoRA. Absent: r 16, alpha 32, dropout 0.05, all linear layers."""
    quantization: QuantizationSpec | None = None
    """Quantization of the base model. Required by QLoRA, refused for the others; {} is nf4 with double
    quantization."""
