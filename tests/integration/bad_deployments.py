"""AdapterDeployments that must be refused: id, what is changed in a good one, and what the message must say.

The change is a JSON merge patch on GOOD (None removes a field; lists are replaced).
Every message names the field and the remedy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

DIGEST = "sha256:" + "0123456789abcdef" * 4
GOOD: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "AdapterDeployment",
    "metadata": {"name": "good"},
    "spec": {
        "baseModelRef": {"name": "base-model"},
        "adapter": {"fineTuneJobRef": {"name": "my-first"}},
    },
}


class BadDeployment(NamedTuple):
    name: str
    change: dict[str, Any]
    expected: tuple[str, ...]


def _spec(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    return BadDeployment(name, {"spec": change}, expected)


def _source(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    source = {"uri": "s3://bucket/adapter", "digest": DIGEST, **change}
    return _spec(
        name, {"adapter": {"fineTuneJobRef": None, "source": source}}, "spec.adapter.source", *expected
    )


def _serving(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    return _spec(name, {"serving": change}, "spec.serving", *expected)


def _traffic(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    return _spec(name, {"traffic": change}, "spec.traffic", *expected)


def _steps(name: str, steps: list[Any], *expected: str) -> BadDeployment:
    return _spec(name, {"strategy": {"canary": {"steps": steps}}}, "spec.strategy.canary.steps", *expected)


def _step(name: str, step: dict[str, Any], *expected: str) -> BadDeployment:
    return _steps(name, [step], "steps[0]", *expected)


def _evaluation(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    evaluation = {"name": "golden", "uri": "pvc://files/golden.jsonl", **change}
    return _spec(name, {"evaluations": [evaluation]}, "spec.evaluations[0]", *expected)


def _analysis(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    return _spec(name, {"analysis": change}, "spec.analysis", *expected)


def _guardrail(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    guardrail = {"name": "invalid", "event": "schema_invalid", **change}
    return _analysis(name, {"guardrails": [guardrail]}, "guardrails[0]", *expected)


def _objective(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    objective = {"name": "thumbs-up", "metric": "helpful", **change}
    return _analysis(name, {"objectives": [objective]}, "objectives[0]", *expected)


METRIC = {
    "name": "p95",
    "prometheus": {"address": "http://prometheus:9090", "query": "up"},
    "successCondition": "result <= 1.2",
}


def _metric(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    return _analysis(name, {"metrics": [{**METRIC, **change}]}, "metrics[0]", *expected)


def _webhook(name: str, change: dict[str, Any], *expected: str) -> BadDeployment:
    webhook = {"name": "gate", "type": "confirm-rollout", "url": "http://gate:8080/ask", **change}
    return _spec(name, {"webhooks": [webhook]}, "spec.webhooks[0]", *expected)


URL = "http://gate:8080/ask"
OBJECTIVE = {"name": "same", "metric": "helpful"}
GUARDRAIL = {"name": "same", "event": "error"}

BAD_DEPLOYMENTS = [
    # names and aliases
    BadDeployment(
        "name-too-long",
        {"metadata": {"name": "a" * 64}},
        ("metadata.name", "a" * 64, "at most 63 characters"),
    ),
    BadDeployment(
        "name-with-two-dashes",
        {"metadata": {"name": "support--bot"}},
        ("metadata.name", "support--bot", "no '--'", "set spec.alias"),
    ),
    BadDeployment("no-spec", {"spec": None}, ("spec", "Required value")),
    _spec("alias-capitals", {"alias": "Support-Bot"}, "spec.alias", "Support-Bot", "lower-case letters"),
    _spec("alias-two-dashes", {"alias": "a--b"}, "spec.alias", "a--b", "no '--'"),
    _spec("alias-empty", {"alias": ""}, "spec.alias", "at least 1"),
    _spec("alias-too-long", {"alias": "a" * 64}, "spec.alias", "63"),
    _spec("alias-is-the-base-model", {"alias": "base-model"}, "spec.alias", "name of the base model"),
    BadDeployment(
        "name-is-the-base-model",
        {"metadata": {"name": "base-model"}},
        ("spec.alias", "by default metadata.name", "set another alias"),
    ),
    # base model and adapter
    _spec("no-base-model", {"baseModelRef": None}, "spec.baseModelRef", "Required value"),
    _spec("base-model-uri", {"baseModelRef": {"name": "hf://a/b"}}, "baseModelRef.name", "hf://a/b", "serve"),
    _spec("no-adapter", {"adapter": None}, "spec.adapter", "Required value"),
    _spec("adapter-empty", {"adapter": {"fineTuneJobRef": None}}, "spec.adapter", "exactly one of"),
    _spec(
        "adapter-twice",
        {"adapter": {"source": {"uri": "s3://bucket/adapter", "digest": DIGEST}}},
        "spec.adapter",
        "exactly one of fineTuneJobRef and source",
    ),
    _spec("job-as-text", {"adapter": {"fineTuneJobRef": "my-first"}}, "fineTuneJobRef", "type object"),
    _source("source-without-digest", {"digest": None}, "digest"),
    _source("digest-without-algorithm", {"digest": "a" * 64}, "digest", "sha256: and 64", "manifest.json"),
    _source("digest-short", {"digest": "sha256:0123"}, "digest", "sha256:0123", "64 hexadecimal digits"),
    _source("source-path", {"uri": "/adapters/one"}, "write file:///adapters/one"),
    _source("source-over-http", {"uri": "https://host/adapter"}, "s3://, gs://, pvc://, file://, hf://"),
    _source("source-hub-name", {"uri": "hf://adapter"}, "hf://organization/adapter"),
    _source("source-credentials", {"uri": "s3://key:secret@bucket/a"}, "credentials", "to the agent"),
    _source("source-parent-folder", {"uri": "pvc://files/../a"}, "'..'"),
    # serving
    _serving(
        "endpoint-and-selector",
        {"endpoint": "http://engine:8000", "podSelector": {"matchLabels": {"app": "vllm"}}},
        "podSelector",
        "not by both",
    ),
    _serving("endpoint-without-scheme", {"endpoint": "engine:8000"}, "endpoint", "http://engine:8000"),
    _serving("endpoint-with-password", {"endpoint": "http://me:pw@engine"}, "endpoint", "without user"),
    _serving("selector-empty", {"podSelector": {"matchLabels": {}}}, "matchLabels", "at least 1"),
    _serving("port-for-endpoint", {"endpoint": "http://engine:9000", "port": 9000}, "port", "remove it"),
    _serving("agent-port-of-nothing", {"agentPort": 9001}, "agentPort", "endpoint or podSelector"),
    _serving("port-zero", {"podSelector": {"matchLabels": {"a": "b"}}, "port": 0}, "port", "equal to 1"),
    # traffic
    _traffic("key-unknown", {"stickiness": {"keys": ["cookie:id"]}}, "keys[0]", "cookie:id", "header:<name>"),
    _traffic("keys-empty", {"stickiness": {"keys": []}}, "stickiness.keys", "at least 1"),
    _traffic("sticky-lower-case", {"stickiness": {"type": "hash"}}, "stickiness.type", '"hash"', '"Hash"'),
    _traffic(
        "salt-without-hash", {"stickiness": {"type": "None", "salt": "a"}}, "stickiness.salt", "remove salt"
    ),
    _traffic("match-without-headers", {"match": [{"headers": [], "arm": "Stable"}]}, "headers", "at least 1"),
    _traffic(
        "match-header-name",
        {"match": [{"headers": [{"name": "x tenant", "exact": "a"}], "arm": "Stable"}]},
        "match[0].headers[0].name",
        "for example x-tenant",
    ),
    _traffic(
        "match-arm",
        {"match": [{"headers": [{"name": "x-tenant", "exact": "a"}], "arm": "Canary"}]},
        "match[0].arm",
        '"Canary"',
        '"Candidate"',
    ),
    _traffic("fallback", {"fallback": {"onCandidateError": "Retry"}}, "onCandidateError", '"RetryStable"'),
    _traffic("schema-as-text", {"outputSchema": "{}"}, "outputSchema", "must be of type object"),
    # steps
    _step("step-empty", {}, "exactly one of evalGate, setMirror, setWeight, pause, analysis, approval"),
    _step("step-with-two", {"setWeight": 5, "pause": {"duration": "5m"}}, "exactly one of evalGate"),
    _step("weight-too-high", {"setWeight": 150}, "setWeight", "150", "less than or equal to 100"),
    _step("weight-fraction", {"setWeight": 0.5}, "setWeight", "integer"),
    _step("pause-without-unit", {"pause": {"duration": "300"}}, "pause.duration", "300", "such as 30s"),
    _step("pause-as-number", {"pause": {"duration": 300}}, "pause.duration", "must be of type string"),
    _step("pause-of-nothing", {"pause": {"duration": "0s"}}, "pause.duration", "at least a second"),
    _step("pause-days", {"pause": {"duration": "2d"}}, "pause.duration", "2d", "1h30m"),
    _step("mirror-zero", {"setMirror": {"percent": 0, "duration": "5m"}}, "setMirror.percent", "equal to 1"),
    _step("mirror-endless", {"setMirror": {"percent": 5}}, "setMirror.duration", "Required value"),
    _step("gate-without-bar", {"evalGate": {"evalRef": "golden"}}, "evalGate", "minScore, maxRegression"),
    _step(
        "gate-score", {"evalGate": {"evalRef": "a", "minScore": 80}}, "minScore", "less than or equal to 1"
    ),
    _steps("gate-unknown", [{"evalGate": {"evalRef": "gold", "minScore": 0.8}}], "none of spec.evaluations"),
    _steps("analysis-of-nothing", [{"analysis": {}}], "objectives and metrics", "give the step a duration"),
    _step("approval-without-timeout", {"approval": {"onTimeout": "Promote"}}, "onTimeout", "set timeout"),
    _step("approval-on-timeout", {"approval": {"timeout": "1h", "onTimeout": "Go"}}, '"Go"', '"Promote"'),
    _steps("too-many-steps", [{"setWeight": 5}] * 33, "at most 32"),
    _spec(
        "scale-down-delay",
        {"strategy": {"canary": {"scaleDownDelaySeconds": -1}}},
        "scaleDownDelaySeconds",
        "greater than or equal to 0",
    ),
    # evaluations
    _evaluation("evaluation-folder", {"uri": "pvc://files/golden/"}, "uri", "ends in .jsonl"),
    _evaluation("evaluation-scorer", {"scorer": "exact"}, "scorer", '"exact"', '"ExactMatch"'),
    _evaluation("fields-missing", {"scorer": "JsonFields"}, "fields", "for example fields: [category]"),
    _evaluation("fields-of-nothing", {"fields": ["category"]}, "fields", "set scorer: JsonFields"),
    _evaluation("evaluation-name", {"name": "Golden Set"}, "name", "Golden Set", "lower-case letters"),
    _spec(
        "evaluation-twice",
        {"evaluations": [{"name": "a", "uri": "pvc://files/a.jsonl"}] * 2},
        "spec.evaluations[1]",
        "Duplicate value",
    ),
    # analysis
    _analysis("interval-too-long", {"interval": "2h"}, "interval", "2h", "an hour at most"),
    _analysis("interval-zero", {"interval": "0s"}, "interval", "at least a second"),
    _guardrail("event-unknown", {"event": "latency"}, "event", '"latency"', '"latency_over"'),
    _guardrail("threshold-missing", {"event": "ttft_over"}, "threshold", "for example 2s"),
    _guardrail("threshold-of-nothing", {"threshold": "2s"}, "threshold", "only ttft_over and latency_over"),
    _guardrail("threshold-unit", {"event": "ttft_over", "threshold": "2"}, "threshold", "800ms or 2s"),
    _guardrail("threshold-zero", {"event": "ttft_over", "threshold": "0s"}, "threshold", "above zero"),
    _guardrail("alpha-as-percent", {"alpha": 5}, "alpha", "5", "for example 0.01 (one in a hundred)"),
    _guardrail("alpha-zero", {"alpha": 0}, "alpha", "greater than 0"),
    _guardrail("guardrail-name", {"name": "drift"}, "name", "built-in alarms", "choose another one"),
    _analysis("guardrails-twice", {"guardrails": [GUARDRAIL] * 2}, "guardrails", "same name; rename one"),
    _analysis(
        "objective-like-guardrail",
        {"guardrails": [GUARDRAIL], "objectives": [OBJECTIVE]},
        "objectives",
        "name of a guardrail",
    ),
    _analysis(
        "metric-like-objective",
        {"objectives": [OBJECTIVE], "metrics": [{**METRIC, "name": "same"}]},
        "metrics",
        "of an objective",
    ),
    _objective("router-metric", {"source": "router", "metric": "helpful"}, "metric", "ttft_seconds"),
    _objective("more-seconds", {"source": "router", "metric": "seconds"}, "direction", "direction: Decrease"),
    _objective("margin-negative", {"margin": -0.1}, "margin", "greater than or equal to 0"),
    _objective("few-samples", {"minSamplesPerArm": 5}, "minSamplesPerArm", "greater than or equal to 20"),
    _objective("test-unknown", {"test": "TTest"}, "test", '"TTest"', '"NonInferiority"'),
    _metric("condition-without-result", {"successCondition": "p95 < 2"}, "result <= 1.2"),
    _metric("condition-expression", {"successCondition": "isNaN(result)"}, "successCondition", "compare"),
    _metric("prometheus-without-scheme", {"prometheus": {"address": "prom:9090", "query": "up"}}, "http"),
    _metric("query-missing", {"prometheus": {"address": "http://prom:9090"}}, "query", "Required value"),
    _analysis("dry-run-unknown", {"dryRun": ["latency"]}, "dryRun", "neither a guardrail"),
    _analysis("missing-evidence", {"onMetricsUnavailable": "hold"}, "onMetricsUnavailable", '"Hold"'),
    _analysis("drift-bar", {"drift": {"maxPsi": 0}}, "drift.maxPsi", "greater than 0"),
    # the rest
    _spec(
        "deadline", {"progressDeadlineSeconds": 1}, "progressDeadlineSeconds", "greater than or equal to 10"
    ),
    _webhook("webhook-type", {"type": "pre-rollout"}, "type", '"pre-rollout"', '"confirm-rollout"'),
    _webhook("webhook-url", {"url": "gate/ask"}, "url", "gate/ask", "http or https"),
    _webhook("webhook-timeout", {"timeoutSeconds": 600}, "timeoutSeconds", "less than or equal to 60"),
    _webhook("webhook-long-timeout", {"timeout": "2m"}, "timeout", "2m", "must be a minute at most"),
    _webhook("webhook-no-timeout", {"timeout": "10"}, "timeout", "10", "must be a duration"),
    _webhook(
        "webhook-timeout-twice", {"timeout": "5s", "timeoutSeconds": 5}, "timeoutSeconds", "says the same"
    ),
    _spec(
        "webhooks-of-one-name",
        {"webhooks": [{"type": "event", "url": URL}, {"name": "event", "type": "rollback", "url": URL}]},
        "spec.webhooks",
        "two webhooks have the same name",
    ),
    _spec("alert-severity", {"alerts": [{"severity": "high", "providerRef": {"name": "a"}}]}, '"warn"'),
    _spec("alert-without-provider", {"alerts": [{"severity": "warn"}]}, "alerts[0].providerRef", "Required"),
    # spelling; kubectl's default (strict) field validation
    _spec("snake-case", {"base_model_ref": {}}, 'unknown field "spec.base_model_ref"'),
    _spec(
        "step-spelling", {"strategy": {"canary": {"stepz": []}}}, 'unknown field "spec.strategy.canary.stepz"'
    ),
    # names with one value
    _spec(
        "provider", {"traffic": {"provider": "HTTPRoute"}}, "spec.traffic.provider", '"HTTPRoute"', '"Router"'
    ),
    _spec("replicas", {"serving": {"replicas": "Most"}}, "spec.serving.replicas", '"Most"', '"All"'),
    _guardrail("guardrail-source", {"source": "feedback"}, "source", '"feedback"', '"router"'),
    _spec(
        "answers-that-have-begun",
        {"traffic": {"fallback": {"beforeFirstByteOnly": False}}},
        "fallback.beforeFirstByteOnly",
        "Unsupported value: false",
    ),
]
