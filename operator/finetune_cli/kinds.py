"""The kinds of objects that the commands deal with, and what messages call them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from finetune_operator.api import adapterdeployment, finetunejob


@dataclass(frozen=True)
class Kind:
    """`noun` is for sentences (the job goes on); `listing` is the command that shows what there is."""

    name: str
    plural: str
    noun: str
    listing: str
    spec: type[BaseModel]


JOB = Kind(finetunejob.KIND, finetunejob.PLURAL, "job", "finetune jobs list -A", finetunejob.FineTuneJobSpec)
DEPLOYMENT = Kind(
    adapterdeployment.KIND,
    adapterdeployment.PLURAL,
    "rollout",
    "finetune rollout list -A",
    adapterdeployment.AdapterDeploymentSpec,
)
