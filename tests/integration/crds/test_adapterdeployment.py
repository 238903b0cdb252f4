"""The CRD of AdapterDeployment on a real API server: what is taken, what is refused and with which words, what kubectl
shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_cli.kinds import DEPLOYMENT
from finetune_operator.api import adapterdeployment
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.base import GROUP, VERSION
from tests.clients import Json, Kubectl, KubectlError
from tests.integration.bad_deployments import BAD_DEPLOYMENTS, DIGEST, GOOD, METRIC, BadDeployment
from tests.integration.crds import offline
from tests.integration.good_deployments import PROMISED
from tests.patches import merged

pytestmark = pytest.mark.integration

NOW = "2026-01-01T00:00:00Z"
Create = Callable[..., Json]
STEPS = [
    {"setWeight": 5},
    {"pause": {"duration": "5m"}},
    {"setWeight": 25},
    {"pause": {"duration": "5m"}},
    {"setWeight": 50},
    {"pause": {"duration": "5m"}},
]


@pytest.fixture
def create(api: client.CustomObjectsApi, namespace: str) -> Create:
    def create_one(body: Json, *, dry_run: bool = True) -> Json:
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        created: Json = api.create_namespaced_custom_object(
            GROUP,
            VERSION,
            namespace,
            adapterdeployment.PLURAL,
            body,
            field_validation="Strict",
            **options,
        )
        return created

    return create_one


def good(**spec: Any) -> Json:
    result: Json = merged(GOOD, {"spec": spec})
    return result


@pytest.mark.parametrize("bad", BAD_DEPLOYMENTS, ids=[bad.name for bad in BAD_DEPLOYMENTS])
def test_bad_deployment_is_refused_with_words_that_help(create: Create, bad: BadDeployment) -> None:
    offline.assert_refused(create, DEPLOYMENT, merged(GOOD, bad.change), bad.expected)


def test_least_deployment_gets_every_default(create: Create) -> None:
    assert create(GOOD)["spec"] == {
        **GOOD["spec"],
        "serving": {"port": 8000, "agentPort": 8001},
        "traffic": {
            "stickiness": {"type": "Hash", "keys": ["header:x-adapter-key", "body:user", "apiKey"]},
            "match": [],
            "fallback": {"onCandidateError": "RetryStable"},
        },
        "strategy": {
            "canary": {
                "steps": STEPS,
                "maxStepDuration": "24h",
                "scaleDownDelaySeconds": 600,
                "abortScaleDownDelaySeconds": 30,
            }
        },
        "analysis": {
            "interval": "5s",
            "guardrails": [{"name": "errors", "event": "error", "alpha": 0.01}],
            "objectives": [],
            "metrics": [],
            "sampleRatio": {"alpha": 0.001},
            "onMetricsUnavailable": "Hold",
            "dryRun": [],
        },
        "paused": False,
        "progressDeadlineSeconds": 1800,
        "rollbackWindow": {"revisions": 3},
        "revisionHistoryLimit": 10,
    }


EVERYTHING: Json = {
    "alias": "support.bot-2",
    "baseModelRef": {"name": "organization/Base_Model"},
    "serving": {"podSelector": {"matchLabels": {"app": "vllm"}}, "port": 9000, "agentPort": 9001},
    "traffic": {
        "stickiness": {"keys": ["header:x-user-id", "body:user", "apiKey"], "salt": "2026"},
        "match": [{"headers": [{"name": "x-tenant", "exact": "acme"}], "arm": "Candidate"}],
        "fallback": {"onCandidateError": "Fail"},
        "outputSchema": {"type": "object", "properties": {"a": {"enum": ["x", 1, None]}}, "required": ["a"]},
    },
    "strategy": {
        "canary": {
            "steps": [
                {"evalGate": {"evalRef": "golden", "minScore": 0.8, "maxRegression": 0.02}},
                {"setMirror": {"percent": 20, "duration": "10m"}},
                {"setWeight": 5},
                {"pause": {}},
                {"analysis": {}},
                {"approval": {"timeout": "24h", "onTimeout": "Promote"}},
                {"setWeight": 100},
            ]
        }
    },
    "evaluations": [
        {"name": "golden", "uri": "pvc://files/a.jsonl", "scorer": "JsonFields", "fields": ["category"]},
        {"name": "form", "uri": "https://host/b.jsonl", "scorer": "JsonValid", "maxRows": 50},
    ],
    "analysis": {
        "interval": "30s",
        "guardrails": [
            {"name": "errors", "event": "error"},
            {"name": "slow", "event": "ttft_over", "threshold": "800ms", "alpha": 0.05},
        ],
        "objectives": [
            {"name": "thumbs-up", "metric": "helpful", "test": "Superiority", "minSamplesPerArm": 40},
            {"name": "time", "source": "router", "metric": "seconds", "direction": "Decrease"},
        ],
        "metrics": [{**METRIC, "failureCondition": "result > 2 || result < 0"}],
        "drift": {},
        "onMetricsUnavailable": "Pause",
        "dryRun": ["slow", "p95"],
    },
    "webhooks": [{"name": "gate", "type": "confirm-promotion", "url": "https://gate/ask"}],
    "alerts": [{"severity": "error", "providerRef": {"name": "slack"}}],
}
GOOD_SPECS: dict[str, Json] = {
    "least": {},
    "everything": EVERYTHING,
    "promised": PROMISED["spec"],
    "unnamed-webhooks": {
        "webhooks": [
            {"type": "event", "url": "http://log/all", "timeoutSeconds": 60},
            {"type": "rollback", "url": "http://gate/stop", "timeout": "1m"},
        ]
    },
    "source": {
        "adapter": {"fineTuneJobRef": None, "source": {"uri": "hf://organization/a", "digest": DIGEST}}
    },
    "claim": {"adapter": {"fineTuneJobRef": None, "source": {"uri": "pvc://claim/a b", "digest": DIGEST}}},
    "endpoint": {"serving": {"endpoint": "http://engine:9000", "agentPort": 9001}},
    "address": {"serving": {"endpoint": "http://[::1]:8000/"}},
    "no-steps": {"strategy": {"canary": {"steps": []}}},
    "at-random": {"traffic": {"stickiness": {"type": "None"}}},
    "no-guardrails": {"analysis": {"guardrails": []}},
    "look-only": {
        "strategy": {"canary": {"steps": [{"setWeight": 50}, {"analysis": {"duration": "1h30m"}}]}}
    },
    "longest-times": {
        "strategy": {"canary": {"maxStepDuration": "9999h99999m9999999s"}},
        "analysis": {"interval": "1h"},
    },
}


def differing(taken: Any, read: Any, path: str = "spec") -> list[str]:
    """Paths where the API server and the models disagree. Items of lists get their defaults from the models alone."""
    match taken, read:
        case dict(), dict():
            return [found for key in taken for found in differing(taken[key], read.get(key), f"{path}.{key}")]
        case list(), list() if len(taken) == len(read):
            pairs = enumerate(zip(taken, read, strict=True))
            return [found for i, (one, other) in pairs for found in differing(one, other, f"{path}[{i}]")]
        case _:
            return [] if taken == read else [f"{path}: {taken!r} and {read!r}"]


@pytest.mark.parametrize("spec", GOOD_SPECS.values(), ids=GOOD_SPECS)
def test_good_deployment_is_taken_and_read_back_by_the_models(create: Create, spec: Json) -> None:
    taken = create(good(**spec))["spec"]
    read = adapterdeployment.AdapterDeploymentSpec.model_validate(taken)
    written = read.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert differing(taken, written) == []


@pytest.mark.parametrize("name", ["a", "a" * 63, "support.bot", "1st"])
def test_names_at_the_limits(create: Create, name: str) -> None:
    create(merged(GOOD, {"metadata": {"name": name}}))


def test_alias_stays_and_the_rest_may_change(kubectl: Kubectl) -> None:
    kubectl.apply(good(alias="bot"))
    for alias in ("other", None):
        with pytest.raises(
            KubectlError, match=r"spec\.alias: Forbidden: clients use the alias, so it cannot"
        ):
            kubectl.apply(good(alias=alias))
    kubectl.apply(good(alias="bot", paused=True, adapter={"fineTuneJobRef": {"name": "second"}}))
    kubectl.apply(merged(GOOD, {"metadata": {"name": "bot-2"}}))
    kubectl.apply(merged(GOOD, {"metadata": {"name": "bot-2"}, "spec": {"alias": "bot-2"}}))  # the same one


def full_status() -> Json:
    return {
        "observedGeneration": 1,
        "phase": "Paused",
        "stage": "Canary",
        "reason": "CanaryPauseStep",
        "message": "waits for `finetune rollout promote good`",
        "stableRevision": "0a1b2c3d",
        "candidateRevision": "4e5f6071",
        "currentStepIndex": 2,
        "step": "3/6 pause",
        "weights": {"stable": 75, "candidate": 25, "mirror": 0, "version": 7, "verified": True},
        "pauseConditions": [{"reason": "CanaryPauseStep", "message": "wait", "startTime": NOW}],
        "adapters": [
            {
                "revision": "4e5f6071",
                "servedName": "good--4e5f6071",
                "digest": DIGEST,
                "uri": "s3://bucket/a",
                "loadedReplicas": 1,
                "desiredReplicas": 2,
            }
        ],
        "analysis": [
            {
                "name": "errors",
                "kind": "Guardrail",
                "phase": "Inconclusive",
                "n": {"stable": 120, "candidate": 40},
                "failures": {"stable": 1, "candidate": 0},
                "eValue": 0.8,
                "threshold": 100,
            },
            {
                "name": "sample-ratio",
                "kind": "SampleRatio",
                "phase": "Successful",
                "estimate": 0.24,
                "expected": 0.25,
                "eValue": 0.6,
            },
        ],
        "sampleRatio": {"expected": 0.25, "observed": 0.24, "eValue": 0.6},
        "rolloutStartTime": NOW,
        "conditions": [
            {
                "type": "Paused",
                "status": "True",
                "reason": "CanaryPauseStep",
                "message": "waits",
                "lastTransitionTime": NOW,
            },
            {
                "type": "Promoted",
                "status": "True",
                "reason": "Promoted",
                "message": "done",
                "lastTransitionTime": NOW,
            },
        ],
    }


def write_status(kubectl: Kubectl, status: Json) -> Json:
    patch = json.dumps({"status": status})
    done: Json = json.loads(
        kubectl("patch", "adep", "good", "--subresource=status", "--type=merge", "-p", patch, "-o", "json")
    )
    return done


def test_status_is_kept_as_written(kubectl: Kubectl) -> None:
    kubectl.apply(GOOD)
    answer = write_status(kubectl, full_status())
    assert answer["status"] == full_status()  # nothing pruned, no defaults that nobody wrote
    assert answer["metadata"]["generation"] == 1
    read = AdapterDeploymentStatus.model_validate(answer["status"])
    assert read.weights is not None
    assert read.weights.candidate == 25


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Sleeping"},
        {"stage": "Waiting"},
        {"pauseConditions": full_status()["pauseConditions"] * 2},
        {"analysis": full_status()["analysis"] * 2},
        {"conditions": full_status()["conditions"][:1] * 2},
    ],
    ids=["phase", "stage", "pause-twice", "check-twice", "condition-twice"],
)
def test_status_that_breaks_the_schema_is_refused(kubectl: Kubectl, status: Json) -> None:
    kubectl.apply(GOOD)
    with pytest.raises(KubectlError, match=r"Unsupported value|Duplicate value"):
        write_status(kubectl, status)


def test_kubectl_shows_columns_category_and_conditions(kubectl: Kubectl) -> None:
    kubectl.apply(GOOD)
    write_status(kubectl, full_status())
    narrow = kubectl("get", "adep").splitlines()
    assert narrow[0].split() == ["NAME", "PHASE", "STAGE", "STEP", "WEIGHT", "STABLE", "CANDIDATE", "AGE"]
    assert narrow[1].split()[:-1] == [
        "good",
        "Paused",
        "Canary",
        "3/6",
        "pause",
        "25",
        "0a1b2c3d",
        "4e5f6071",
    ]
    wide = kubectl("get", "adapterdeployments", "-o", "wide").splitlines()
    assert wide[0].split()[8:] == ["REASON", "MESSAGE"]
    assert wide[1].split()[9:] == ["CanaryPauseStep", *full_status()["message"].split()]
    assert "good" in kubectl("get", "finetune")
    assert kubectl("get", "adep", "--field-selector", "status.phase=Paused", "-o", "name").split()
    assert not kubectl("get", "adep", "--field-selector", "status.phase=Healthy", "-o", "name").split()
    assert "condition met" in kubectl("wait", "--for=condition=Promoted", "adep/good", "--timeout=10s")


def test_explain_is_enough_to_write_a_deployment(kubectl: Kubectl, create: Create) -> None:
    top = kubectl("explain", "adep")
    start = top.index("apiVersion: finetune.dev")
    create(yaml.safe_load(top[top.rindex("\n", 0, start) + 1 : top.index("Clients then ask")]))
    steps = " ".join(kubectl("explain", "adep.spec.strategy.canary.steps").split())
    assert "exactly one of evalGate, setMirror, setWeight, pause, analysis and approval" in steps
    guardrails = " ".join(kubectl("explain", "adep.spec.analysis.guardrails").split())
    assert "enum: error, ttft_over, latency_over, schema_invalid" in guardrails
    assert "-required-" in guardrails
    assert "pauseConditions" in kubectl("explain", "adep", "--recursive")


def test_kubectl_apply_says_all_problems_at_once(kubectl: Kubectl) -> None:
    wrong = good(
        alias="A",
        strategy={"canary": {"steps": [{"setWeight": 101}]}},
        progressDeadlineSeconds=1,
    )
    with pytest.raises(KubectlError) as caught:
        kubectl.apply(wrong)
    for part in ("spec.alias", "spec.strategy.canary.steps[0].setWeight", "spec.progressDeadlineSeconds"):
        assert part in str(caught.value)


def test_kubectl_refuses_unknown_fields_by_itself(kubectl: Kubectl) -> None:
    with pytest.raises(KubectlError, match=r'unknown field "spec\.rollout"'):
        kubectl("apply", "--validate=strict", "-f", "-", body=good(rollout={}))


@pytest.mark.parametrize("spec", [{}, EVERYTHING, PROMISED["spec"]], ids=["least", "everything", "promised"])
def test_applying_the_same_file_again_changes_nothing(kubectl: Kubectl, spec: Json) -> None:
    assert "created" in kubectl("apply", "-f", "-", body=good(**spec))
    assert "unchanged" in kubectl("apply", "-f", "-", body=good(**spec))
    server_side = ("apply", "--server-side", "--force-conflicts", "-f", "-")
    assert "serverside-applied" in kubectl(*server_side, body=good(**spec))
    assert json.loads(kubectl("get", "adep", "good", "-o", "json"))["metadata"]["generation"] == 1


@pytest.mark.parametrize("how", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_named_guardrails_replace_the_default_one(kubectl: Kubectl, how: tuple[str, ...]) -> None:
    kubectl("apply", *how, "-f", "-", body=GOOD)
    own = {"guardrails": [{"name": "invalid", "event": "schema_invalid"}]}
    kubectl("apply", *how, "-f", "-", body=good(analysis=own))
    found = json.loads(kubectl("get", "adep", "good", "-o", "json"))
    assert found["spec"]["analysis"]["guardrails"] == own["guardrails"]
