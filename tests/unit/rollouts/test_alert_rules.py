"""The shipped alerts, judged by promtool: each fires when it should, says a command that exists, and is quiet else."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from finetune_cli.__main__ import app
from finetune_operator.adapters.rollout_telemetry import RolloutTelemetry
from finetune_operator.api.adapterdeployment_status import (
    AbortReason,
    AdapterDeploymentStatus,
    Check,
    CheckKind,
    CheckPhase,
    CompletionStatus,
    HistoryEntry,
    LoadedAdapter,
)
from tests.prometheus_program import find_promtool
from tests.unit.rollouts.world import revision, serving

RULES = Path(__file__).parents[3] / "helm" / "finetune-operator" / "files" / "alerts.yaml"
BOT = 'namespace="team",name="bot"'
ABORTED = f'adapterdeployment_completions_total{{{BOT},status="Aborted",reason="GuardrailBreached"}}'
NOW = datetime(2026, 1, 1, tzinfo=UTC)
# Alert, its series from minute to minute, when it fires and when it does not yet (minutes).
CASES: dict[str, tuple[dict[str, str], int, int]] = {
    "FineTuneOperatorAbsent": ({'finetune_queue_depth{kind="FineTuneJob"}': "0x10 _x60"}, 25, 15),
    "FineTuneApiServerAway": (
        {
            'finetune_api_requests_total{method="GET",code="200",pod="a"}': "0+50x10 500x60",
            'finetune_api_requests_total{method="GET",code="0",pod="a"}': "0x10 0+50x60",
        },
        30,
        10,
    ),
    "FineTuneReconcileErrors": (  # one object, tried again after a minute
        {'finetune_reconcile_errors_total{kind="AdapterDeployment"}': "0x10 0+1.3x60"},
        40,
        20,
    ),
    "FineTuneQueueBacklog": ({'finetune_queue_depth{kind="FineTuneJob"}': "0x10 900x60"}, 30, 20),
    "FineTuneReportsRefused": (
        {
            'finetune_reports_total{code="200"}': "0+10x70",
            'finetune_reports_total{code="401"}': "0x10 0+10x60",
        },
        40,
        20,
    ),
    "FineTuneInfrastructureFailures": (
        {'finetune_jobs_finished_total{namespace="team",class="Storage"}': "0x10 6x60"},
        15,
        9,
    ),
    "FineTuneJobsStuck": (
        {'finetune_job_phase{namespace="team",finetunejob="a",phase="Provisioning"}': "_x10 1x120"},
        95,
        75,
    ),
    "AdapterUnavailable": ({f"adapterdeployment_available{{{BOT}}}": "1x10 0x60"}, 20, 12),
    "AdapterRequestsFailing": (
        {
            'adapter_router_requests_total{alias="bot",arm="Stable",code="200",pod="r1"}': "0+90x60",
            'adapter_router_requests_total{alias="bot",arm="Stable",code="502",pod="r1"}': "0x10 0+10x50",
        },
        40,
        10,
    ),
    "AdapterRolledBack": ({ABORTED: "0x10 1x60"}, 15, 9),
    "AdapterRolloutBlind": ({f"adapterdeployment_metrics_source_up{{{BOT}}}": "1x5 0x60"}, 20, 10),
    "AdapterRolloutStuckInStage": (
        {
            f'adapterdeployment_info{{{BOT},phase="Progressing",stage="Loading"}}': "1x30 _x90",
            f'adapterdeployment_info{{{BOT},phase="Paused",stage="Loading"}}': "_x30 1x90",
        },
        70,
        50,
    ),
    "AdapterRolloutPausedTooLong": (
        {f"adapterdeployment_paused{{{BOT}}}": "1x500"},
        400,
        300,
    ),
    "AdapterSampleRatioMismatch": (
        {  # spec.analysis.sampleRatio.alpha: 0.01
            f"adapterdeployment_sample_ratio_evalue{{{BOT}}}": "3x10 100x10",
            f"adapterdeployment_sample_ratio_threshold{{{BOT}}}": "100x20",
        },
        15,
        5,
    ),
    "AdapterMissing": (
        {f'adapterdeployment_adapter_loaded{{{BOT},revision="ab",replica="http://e1"}}': "1x5 0x60"},
        25,
        15,
    ),
    "AdapterFallbackRateHigh": (
        {
            'adapter_router_fallback_total{alias="bot",pod="r1"}': "0+10x60",
            'adapter_router_requests_total{alias="bot",arm="Candidate",code="200",pod="r1"}': "0+100x60",
            'adapter_router_requests_total{alias="bot",arm="Stable",code="200",pod="r1"}': "0+9000x60",
        },
        30,
        5,
    ),
}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = find_promtool()
    if found is None:
        pytest.skip("needs promtool in PATH, or Debian's package tools to fetch it")
    return found


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_in_its_time(alert: str, promtool: str, tmp_path: Path) -> None:
    series, fires, quiet = CASES[alert]
    try_rules(promtool, tmp_path, alert, series, firing={quiet: 0, fires: 1})


def test_a_rollback_is_no_alert_any_more_once_its_deployment_is_deleted(
    promtool: str, tmp_path: Path
) -> None:
    try_rules(promtool, tmp_path, "AdapterRolledBack", {ABORTED: "0x10 1x10 _x60"}, firing={15: 1, 30: 0})


def try_rules(
    promtool: str, folder: Path, alert: str, series: dict[str, str], *, firing: dict[int, int]
) -> None:
    """`firing`: minute -> how many alerts of that name fire then."""
    rules = folder / "alerts.yaml"
    rules.write_text(RULES.read_text())
    test: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": "{}", "value": value}],
            }
            for minute, value in firing.items()
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_rules(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_and_names_a_command_that_exists() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} == set(CASES)
    commands = re.findall(r"`finetune ([a-z ]+?) \{\{", RULES.read_text())
    assert commands
    for command in commands:
        done = CliRunner().invoke(app, [*command.split(), "--help"])
        assert done.exit_code == 0, done.output


def test_the_first_rollback_is_an_increase() -> None:
    registry = CollectorRegistry()
    telemetry = RolloutTelemetry(registry)
    before = AdapterDeploymentStatus()
    telemetry.show("team", "bot", before=before, status=before)
    seen = _aborted(registry)
    assert set(seen.values()) == {0.0}
    assert set(seen) == {str(reason) for reason in AbortReason}
    entry = HistoryEntry(
        revision="ab", digest="sha256:x", uri="u", completion_status=CompletionStatus.ABORTED,
        reason=AbortReason.USER_ABORT, start_time=NOW, end_time=NOW,
    )  # fmt: skip
    telemetry.show("team", "bot", before=before, status=AdapterDeploymentStatus(history=[entry]))
    assert _aborted(registry)["UserAbort"] == 1.0
    telemetry.forget("team", "bot")
    assert _aborted(registry) == {}


def test_a_rollback_counts_though_the_answer_to_its_write_was_lost() -> None:
    """The pass that made it saw an API server that does not answer; the next one reads what it wrote."""
    registry = CollectorRegistry()
    telemetry = RolloutTelemetry(registry)
    before = AdapterDeploymentStatus()
    telemetry.show("team", "bot", before=before, status=before)
    entry = HistoryEntry(
        revision="ab", digest="sha256:x", uri="u", completion_status=CompletionStatus.ABORTED,
        reason=AbortReason.USER_ABORT, start_time=NOW, end_time=NOW,
    )  # fmt: skip
    stored = AdapterDeploymentStatus(history=[entry])
    for _ in range(2):
        telemetry.show("team", "bot", before=stored, status=stored)
    assert _aborted(registry)["UserAbort"] == 1.0
    telemetry.forget("team", "bot")
    telemetry.show("team", "bot", before=stored, status=stored)
    assert _aborted(registry)["UserAbort"] == 0.0, "after a restart what had ended before is old"


def _aborted(registry: CollectorRegistry) -> dict[str, float]:
    text = generate_latest(registry).decode()
    found = re.findall(
        r'^adapterdeployment_completions_total\{.*reason="(\w+)",status="Aborted"\} (\S+)$', text, re.M
    )
    return {reason: float(value) for reason, value in found}


@pytest.mark.parametrize("limit", [0, 1, 10])
def test_endings_are_told_and_counted_though_no_history_is_kept(limit: int) -> None:
    registry = CollectorRegistry()
    telemetry = RolloutTelemetry(registry)
    world = serving(steps=[{"setWeight": 5}, {"pause": {"duration": "10s"}}], revisionHistoryLimit=limit)
    world.announced.clear()
    telemetry.show("team", "bot", before=world.status, status=world.status)
    world.evidence.bad = {revision("c")}
    for letter in "bc":
        world.deploy(letter)
        for _ in range(60):
            before = world.status
            world.step()
            telemetry.show("team", "bot", before=before, status=world.status)
            world.advance(1)
    text = generate_latest(registry).decode()
    counted = re.findall(
        r'^adapterdeployment_completions_total\{.*reason="(\w*)",status="(\w+)"\} 1.0$', text, re.M
    )
    assert sorted(counted) == [("", "Promoted"), ("GuardrailBreached", "Aborted")]
    told = [item.reason for item in world.announced]
    assert [told.count(reason) for reason in ("Promoted", "GuardrailBreached")] == [1, 1]


def test_nobody_is_alarmed_of_a_comparison_that_is_not_made() -> None:
    registry = CollectorRegistry()
    telemetry = RolloutTelemetry(registry)
    world = serving(steps=[{"setWeight": 5}, {"pause": {}}])

    def shown() -> dict[str, str]:
        telemetry.show("team", "bot", before=world.status, status=world.status)
        text = generate_latest(registry).decode()
        names = "metrics_source_up|sample_ratio_evalue|sample_ratio_threshold"
        return dict(re.findall(rf"^adapterdeployment_({names})\{{.*\}} (\S+)$", text, re.M))

    assert shown() == {}
    world.deploy("b").run(30)
    check = Check(
        name="sample-ratio",
        kind=CheckKind.SAMPLE_RATIO,
        phase=CheckPhase.FAILED,
        e_value=5000.0,
        threshold=1000.0,
    )
    world.stored = world.status.model_copy(update={"analysis": [check]}).model_dump_json(by_alias=True)
    alarm = {"sample_ratio_evalue": "5000.0", "sample_ratio_threshold": "1000.0"}
    assert shown() == {"metrics_source_up": "1.0", **alarm}
    world.evidence.mode, world.evidence.heard = "missing", None
    world.run(30)
    assert shown()["metrics_source_up"] == "0.0"
    world.say("abort").run(20)
    assert [c.kind for c in world.status.analysis if c.kind is CheckKind.SAMPLE_RATIO], "kept to be read"
    assert shown() == {}


@pytest.mark.parametrize(
    ("steps", "spec", "waits"),
    [
        ([{"setWeight": 5}, {"pause": {"duration": "24h"}}], {}, "0.0"),
        ([{"setWeight": 5}, {"pause": {}}], {}, "1.0"),
        ([{"setWeight": 5}, {"pause": {"duration": "24h"}}], {"paused": True}, "1.0"),
    ],
    ids=["planned", "for-somebody", "by-hand"],
)
def test_a_pause_that_is_planned_waits_for_nobody(
    steps: list[dict[str, Any]], spec: dict[str, Any], waits: str
) -> None:
    world = serving(steps=steps)
    world.deploy("b", **spec).run(30)
    assert world.status.phase == "Paused"
    assert _gauge(world.status, "paused") == waits


def test_a_deployment_is_available_while_engines_are_known_to_have_what_serves() -> None:
    world = serving(steps=[{"setWeight": 5}])
    assert _gauge(world.status, "available") == "1.0"
    for condition, shown in (("Unknown", "0.0"), ("False", "0.0")):
        conditions = [
            c.model_copy(update={"status": condition}) if c.type == "Available" else c
            for c in world.status.conditions
        ]
        status = world.status.model_copy(update={"conditions": conditions})
        assert _gauge(status, "available") == shown
        assert _gauge(status.model_copy(update={"stable_revision": None}), "available") is None


def _gauge(status: AdapterDeploymentStatus, name: str) -> str | None:
    registry = CollectorRegistry()
    RolloutTelemetry(registry).show("team", "bot", before=status, status=status)
    found = re.search(
        rf"^adapterdeployment_{name}\{{.*\}} (\S+)$", generate_latest(registry).decode(), re.MULTILINE
    )
    return found[1] if found else None


def test_a_revision_that_waits_for_its_unloading_is_nowhere_missing() -> None:
    registry = CollectorRegistry()
    telemetry = RolloutTelemetry(registry)
    common = {"digest": "sha256:x", "uri": "u"}
    adapters = [
        LoadedAdapter(revision="new", served_name="bot--new", **common),
        LoadedAdapter(revision="old", served_name="bot--old", unload_at=NOW, **common),
    ]
    telemetry.show_engines(
        "team", "bot", adapters=adapters, engines={"http://e1": set(), "http://e2": {"bot--old"}}
    )
    text = generate_latest(registry).decode()
    found = dict(re.findall(r'replica="http://(e\d)",revision="(\w+)"\} 0.0', text))
    assert set(found.values()) == {"new"}
    assert 'replica="http://e2",revision="old"} 1.0' in text
