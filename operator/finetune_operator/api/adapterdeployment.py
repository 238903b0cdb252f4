"""AdapterDeployment: one alias that clients ask for, the adapter behind it, and how the next one replaces it."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.adapterdeployment_analysis import AnalysisSpec
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.adapterdeployment_strategy import (
    AlertSpec,
    EvaluationSpec,
    RollbackWindowSpec,
    StrategySpec,
    WebhookSpec,
)
from finetune_operator.api.adapterdeployment_traffic import (
    AdapterReference,
    BaseModelReference,
    ServingSpec,
    TrafficSpec,
)
from finetune_operator.api.base import ApiModel
from finetune_operator.api.rules import FORBIDDEN, keyed_list, rule, rules

KIND = "AdapterDeployment"
PLURAL = "adapterdeployments"
SHORT_NAME = "adep"
MAX_ALIAS_LENGTH = 63
HOOK_NAME = "(has({0}.name) ? {0}.name : {0}.type)"

# Top of `kubectl explain adapterdeployment`: enough to write the first one.
DESCRIPTION = """\
AdapterDeployment brings an adapter to users step by step beside the one that serves now, compares both on live
traffic, and promotes it or rolls it back by itself. The least that it needs:

  apiVersion: finetune.dev/v1alpha1
  kind: AdapterDeployment
  metadata:
    name: support-bot
  spec:
    baseModelRef:
      name: smollm2-135m-instruct
    adapter:
      fineTuneJobRef:
        name: my-first

Clients then ask the router for the model `support-bot`. To deploy the next adapter, change spec.adapter.
Follow it with `finetune rollout watch support-bot` or `kubectl get adep support-bot --watch`.
Wait for it with `kubectl wait --for=condition=Promoted adep/support-bot`."""


class AdapterDeploymentSpec(ApiModel):
    """What is deployed and how. Required: baseModelRef.name and adapter; everything else has a default."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.strategy.canary.steps.all(s, !has(s.evalGate) || "
                "(has(self.evaluations) && self.evaluations.exists(e, e.name == s.evalGate.evalRef)))",
                "a step's evalGate.evalRef names none of spec.evaluations",
                fieldPath=".strategy.canary.steps",
            ),
            rule(
                "self.strategy.canary.steps.all(s, !has(s.analysis) || has(s.analysis.duration)) || "
                "(has(self.analysis.objectives) && size(self.analysis.objectives) > 0) || "
                "(has(self.analysis.metrics) && size(self.analysis.metrics) > 0)",
                "an analysis step waits for objectives and metrics, and there are none in spec.analysis; add one, or "
                "give the step a duration (guardrails are armed all the time)",
                fieldPath=".strategy.canary.steps",
            ),
        )
    )

    alias: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=MAX_ALIAS_LENGTH,
                json_schema_extra=rules(
                    rule(
                        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$') && !self.contains('--')",
                        "must have lower-case letters, digits, '-' and '.' only, and no '--', for example support-bot",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """`model` that clients ask for. Absent: the name of this object."""
    base_model_ref: BaseModelReference
    """The model that the adapter was trained for."""
    adapter: AdapterReference
    """The adapter to deploy. Changing it starts a rollout."""
    serving: ServingSpec = ServingSpec()
    """The engines that load it."""
    traffic: TrafficSpec = TrafficSpec()
    """How requests are assigned."""
    strategy: StrategySpec = StrategySpec()
    """How a new adapter reaches its users. Default: 5, 25 and 50 percent, five minutes each."""
    evaluations: Annotated[
        list[EvaluationSpec], Field(max_length=16, json_schema_extra=keyed_list("name"))
    ] = Field(default_factory=list)
    """Golden rows for evalGate steps. Absent: none."""
    analysis: AnalysisSpec = AnalysisSpec()
    """What counts as evidence. Default: roll back when the candidate fails more often."""
    paused: bool = False
    """Holds the rollout where it is; the guardrails stay armed. Default: false."""
    progress_deadline_seconds: Annotated[int, Field(ge=10, le=2592000)] = 1800
    """Longest time without progress while loading, validating or confirming, in seconds; then the candidate is rolled
    back. Pauses do not count. Default: 1800."""
    rollback_window: RollbackWindowSpec = RollbackWindowSpec()
    """Which former revisions come back without steps."""
    revision_history_limit: Annotated[int, Field(ge=0, le=100)] = 10
    """Rollouts that status.history keeps. Default: 10."""
    # Not a keyed list: a key has to be there, and the name may be left out.
    webhooks: Annotated[
        list[WebhookSpec],
        Field(
            max_length=16,
            json_schema_extra=rules(
                rule(
                    f"self.all(w, self.exists_one(v, {HOOK_NAME.format('v')} == {HOOK_NAME.format('w')}))",
                    "two webhooks have the same name (absent, it is the type); give each one its own",
                )
            ),
        ),
    ] = Field(default_factory=list)
    """Who is asked or told. Absent: nobody."""
    alerts: Annotated[list[AlertSpec], Field(max_length=16)] = Field(default_factory=list)
    """Who gets a message. Absent: nobody."""


ALIAS = "(has(self.spec.alias) ? self.spec.alias : self.metadata.name)"


class AdapterDeployment(ApiModel):
    """Brings an adapter to users step by step, compares it with the one that serves, promotes it or rolls it back."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"size(self.metadata.name) <= {MAX_ALIAS_LENGTH}",
                f"metadata.name must have at most {MAX_ALIAS_LENGTH} characters",
                fieldPath=".metadata.name",
            ),
            rule(
                "has(self.spec.alias) || !self.metadata.name.contains('--')",
                "the name is the alias, and an alias has no '--'; rename it or set spec.alias",
                fieldPath=".metadata.name",
            ),
            rule(
                f"{ALIAS} == {ALIAS.replace('self', 'oldSelf')}",
                "clients use the alias, so it cannot be changed; make a second AdapterDeployment with the new alias",
                fieldPath=".spec.alias",
                reason=FORBIDDEN,
            ),
            rule(
                f"{ALIAS} != self.spec.baseModelRef.name",
                "the alias (by default metadata.name) is the name of the base model too, and a request could mean "
                "both; set another alias",
                fieldPath=".spec.alias",
            ),
        )
    )

    spec: AdapterDeploymentSpec
    """What is deployed and how. Required: baseModelRef.name and adapter; everything else has a default."""
    status: AdapterDeploymentStatus | None = None
    """What serves, what is under way, and why. Written by the operator."""
