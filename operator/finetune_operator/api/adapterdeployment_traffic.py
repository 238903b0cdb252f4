"""What is served, by which engines, and how requests are assigned."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_operator.api.base import ApiModel
from finetune_operator.api.rules import FORBIDDEN, REQUIRED, DnsName, rule, rules
from finetune_operator.api.uris import BY_AGENT, SHAPES, uri_rules

ADAPTER_SHAPES = {
    **SHAPES,
    "hf": ("hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", "hf://organization/adapter"),
}

AdapterUri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(*uri_rules(ADAPTER_SHAPES, what="an adapter", credentials=BY_AGENT)),
    ),
]
Url = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(
            rule(
                "self.matches('^https?://[^/?#@ ]+(/[^?# ]*)?$')",
                "must be a URL with http or https, without user, query and fragment, for example http://engine:8000",
            )
        ),
    ),
]
ENGINE_PORT = 8000
AGENT_PORT = 8001
Port = Annotated[int, Field(ge=1, le=65535)]
HeaderName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        json_schema_extra=rules(
            rule("self.matches('^[A-Za-z0-9-]+$')", "must be the name of a header, for example x-tenant")
        ),
    ),
]


class BaseModelReference(ApiModel):
    """The model that the adapter was trained for."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            max_length=253,
            json_schema_extra=rules(
                rule(
                    "self.matches('^[A-Za-z0-9][A-Za-z0-9._/-]*$')",
                    "must be the name under which the engines serve the base model, for example smollm2-135m-instruct",
                )
            ),
        ),
    ]
    """Name under which the engines serve the base model (GET /v1/models of an engine lists it). Clients may ask for it
    by this name beside the alias."""


class FineTuneJobReference(ApiModel):
    """A FineTuneJob in the same namespace."""

    name: DnsName
    """Name of the FineTuneJob. Its artifact is deployed once the job has succeeded."""


class SourceReference(ApiModel):
    """An adapter in storage."""

    uri: AdapterUri
    """Folder with the adapter and its manifest.json: s3://, gs://, pvc://, file:// or hf://."""
    digest: Annotated[
        str,
        Field(
            max_length=71,
            json_schema_extra=rules(
                rule(
                    "self.matches('^sha256:[0-9a-f]{64}$')",
                    "must be sha256: and 64 hexadecimal digits, the SHA-256 of the adapter's manifest.json "
                    "(status.artifact.digest of a FineTuneJob)",
                )
            ),
        ),
    ]
    """SHA-256 of manifest.json. Engines load nothing else under this name."""


class AdapterReference(ApiModel):
    """The adapter to deploy: exactly one of fineTuneJobRef and source. Changing it starts a rollout."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.fineTuneJobRef) != has(self.source)",
                "name exactly one of fineTuneJobRef and source",
                reason=REQUIRED,
            )
        )
    )

    fine_tune_job_ref: FineTuneJobReference | None = None
    """The FineTuneJob whose artifact is deployed."""
    source: SourceReference | None = None
    """An adapter in storage, with its digest."""


class PodSelector(ApiModel):
    """Pods by their labels."""

    match_labels: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]], Field(min_length=1, max_length=16)
    ]
    """Labels that a pod must have, all of them."""


class Replicas(StrEnum):
    ALL = "All"


class ServingSpec(ApiModel):
    """The engines that load the adapter. Beside each engine runs an agent (built into finetune-server; a sidecar of a
    vLLM pod) that downloads and verifies adapters. Nothing set: the operator's own default engine."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.endpoint) && has(self.podSelector))",
                "name the engines by endpoint or by podSelector, not by both",
                fieldPath=".podSelector",
                reason=FORBIDDEN,
            ),
            rule(
                f"has(self.podSelector) || self.port == {ENGINE_PORT}",
                "is the port of selected pods; without podSelector remove it (the URL in endpoint has its own)",
                fieldPath=".port",
            ),
            rule(
                f"has(self.podSelector) || has(self.endpoint) || self.agentPort == {AGENT_PORT}",
                "is the agent's port on the engines of endpoint or podSelector; set one of them, or remove it",
                fieldPath=".agentPort",
            ),
        )
    )

    endpoint: Url | None = None
    """URL of the engines, for example http://engine.team-a.svc:8000; FINETUNE_ENGINE_ENDPOINTS of the operator must
    allow it. A name with several addresses (a headless Service) means all of them. Absent, like podSelector: the
    operator's default engine."""
    pod_selector: PodSelector | None = None
    """Pods of this namespace that are engines; those that are Ready count. Absent: see endpoint."""
    port: Port = ENGINE_PORT
    """Port of the engine in a pod of podSelector. Default: 8000."""
    agent_port: Port = AGENT_PORT
    """Port of the agent, in a pod of podSelector or on the host of endpoint. Default: 8001."""
    replicas: Replicas | None = None
    """Engines that load the adapter: All of them. Absent: the same."""


class StickinessType(StrEnum):
    HASH = "Hash"
    NONE = "None"


class StickinessSpec(ApiModel):
    """How a user stays on one side of the comparison."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.type == 'Hash' || !has(self.salt)",
                "is part of the hash, and type None uses no hash; remove salt",
                fieldPath=".salt",
                reason=FORBIDDEN,
            )
        )
    )

    type: StickinessType = StickinessType.HASH
    """Hash (default): the same key always gets the same side, on every replica. None: each request at random."""
    keys: Annotated[
        list[
            Annotated[
                str,
                Field(
                    max_length=160,
                    json_schema_extra=rules(
                        rule(
                            "self.matches('^(header:[A-Za-z0-9-]+|body:user|apiKey)$')",
                            "must be header:<name>, body:user or apiKey",
                        )
                    ),
                ),
            ]
        ],
        Field(min_length=1, max_length=8),
    ] = Field(default=["header:x-adapter-key", "body:user", "apiKey"])
    """Where the key of a request is looked for: header:<name>, body:user (the field `user` of the request) and apiKey.
    The first one found counts; a request without any key is assigned at random. Default: the header x-adapter-key,
    body:user, apiKey."""
    salt: Annotated[str, Field(max_length=128)] | None = None
    """Part of the hash. Absent: every rollout draws its users anew. A fixed one keeps the same users in front."""


class HeaderMatchSpec(ApiModel):
    """A header with exactly this value."""

    name: HeaderName
    """Name of the header, in any case of letters."""
    exact: Annotated[str, Field(min_length=1, max_length=512)]
    """Its value."""


class PinnedArm(StrEnum):
    STABLE = "Stable"
    CANDIDATE = "Candidate"


class MatchSpec(ApiModel):
    """Requests that always go to one side, for example those of one tenant."""

    headers: Annotated[list[HeaderMatchSpec], Field(min_length=1, max_length=8)]
    """All of these headers."""
    arm: PinnedArm
    """Side: Stable or Candidate. Without a candidate everything goes to the stable revision."""


class OnCandidateError(StrEnum):
    RETRY_STABLE = "RetryStable"
    FAIL = "Fail"


class FallbackSpec(ApiModel):
    """What the user gets when the candidate fails."""

    on_candidate_error: OnCandidateError = OnCandidateError.RETRY_STABLE
    """RetryStable (default): the stable revision answers, if no byte was sent yet; the failure still counts against the
    candidate. Fail: the user gets the error."""
    before_first_byte_only: Literal[True] | None = None
    """true: an answer that has begun is never replaced. Absent: the same."""


class TrafficProvider(StrEnum):
    ROUTER = "Router"


class TrafficSpec(ApiModel):
    """How requests for the alias are assigned to the stable revision and the candidate."""

    provider: TrafficProvider | None = None
    """Who splits the traffic: Router, the operator's own. Absent: the same."""
    stickiness: StickinessSpec = StickinessSpec()
    """How a user stays on one side."""
    match: Annotated[list[MatchSpec], Field(max_length=64)] = Field(default_factory=list)
    """Requests that always go to one side; the first match counts. They are not part of the comparison.
    Absent: none."""
    fallback: FallbackSpec = FallbackSpec()
    """What the user gets when the candidate fails."""
    output_schema: (
        Annotated[
            dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
        ]
        | None
    ) = None
    """JSON schema of the answers, for the guardrail event schema_invalid. Absent: an answer only has to be JSON. A
    request's own response_format with a json_schema goes first."""
