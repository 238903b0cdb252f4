"""What all our resources share: the group, the base model and the standard parts of a status."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_operator.api.rules import DnsName

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "finetune"
ACTION_ANNOTATION = f"{GROUP}/action"  # what a person asks for: a verb, or verb/nonce

Name = Annotated[str, Field(min_length=1, max_length=253)]
Message = Annotated[str, Field(max_length=4096)]


class ApiModel(BaseModel):
    """A part of a resource: camelCase on the wire, unknown fields refused, fields documented by their
    docstrings."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )


class StatusModel(ApiModel):
    """A part of a status. An object that a newer operator wrote must stay readable, so unknown fields are
    ignored."""

    model_config = ConfigDict(extra="ignore")


class SecretReference(ApiModel):
    """A Secret by name."""

    name: DnsName
    """Name of a Secret in the job's namespace. Every key becomes an environment variable of the training
    process, so name the keys as the storage's own tools do: HF_TOKEN, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ..."""


class Condition(StatusModel):
    """One condition as in metav1.Condition (Kubernetes API conventions, "Typical status properties")."""

    type: Annotated[str, Field(max_length=316)]
    """What the condition is about, for example Complete."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(max_length=1024)]
    """CamelCase word for programs."""
    message: Annotated[str, Field(max_length=32768)]
    """Sentence for people: what happened and what to do."""
    last_transition_time: datetime
    """When the status last changed."""
    observed_generation: int | None = None
    """Generation of the resource that this was derived from."""
