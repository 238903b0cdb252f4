"""A deployment that says what can be said, with the names that users were promised."""

from __future__ import annotations

from typing import Any

import yaml

# As it was first written down; what docs/design.md lists among its departures is left out, and spec.evaluations is new.
PROMISED: dict[str, Any] = yaml.safe_load("""
apiVersion: finetune.dev/v1alpha1
kind: AdapterDeployment
metadata: {name: promised}
spec:
  alias: support-bot
  baseModelRef: {name: qwen2-7b}
  adapter:
    fineTuneJobRef: {name: ft-42}
  serving: {podSelector: {matchLabels: {app: vllm}}, replicas: All}
  traffic:
    provider: Router
    stickiness: {type: Hash, keys: ["header:x-adapter-key", "body:user", apiKey], salt: ""}
    match: [{headers: [{name: x-tenant, exact: acme}], arm: Candidate}]
    fallback: {onCandidateError: RetryStable, beforeFirstByteOnly: true}
  strategy:
    canary:
      steps:
      - evalGate: {evalRef: golden-set, minScore: 0.8, maxRegression: 0.02}
      - setMirror: {percent: 20, duration: 10m}
      - setWeight: 5
      - pause: {duration: 10m}
      - analysis: {}
      - setWeight: 25
      - setWeight: 50
      - approval: {timeout: 24h, onTimeout: Abort}
      maxStepDuration: 2h
      scaleDownDelaySeconds: 600
      abortScaleDownDelaySeconds: 30
  evaluations: [{name: golden-set, uri: "s3://bucket/golden.jsonl"}]
  analysis:
    interval: 30s
    guardrails:
    - {name: errors, source: router, event: error, alpha: 0.01}
    - {name: slow-ttft, source: router, event: ttft_over, threshold: 2s, alpha: 0.01}
    - {name: invalid-output, source: router, event: schema_invalid}
    objectives:
    - {name: thumbs-up, source: feedback, metric: helpful, direction: Increase,
       test: NonInferiority, margin: 0.02, alpha: 0.05, minSamplesPerArm: 200}
    metrics:
    - name: p95
      prometheus: {address: "http://prometheus:9090", query: up}
      successCondition: result <= 1.2
      failureCondition: result > 2
      failureLimit: 3
      inconclusiveLimit: 10
      consecutiveErrorLimit: 4
    sampleRatio: {alpha: 0.001}
    onMetricsUnavailable: Hold
    dryRun: []
  paused: false
  progressDeadlineSeconds: 1800
  rollbackWindow: {revisions: 3}
  revisionHistoryLimit: 10
  webhooks: [{type: confirm-promotion, url: "http://gate:8080/promote", timeout: 10s}]
  alerts: [{severity: warn, providerRef: {name: slack}}]
""")
