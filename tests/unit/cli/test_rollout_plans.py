"""What a rollout can find, from its spec and the expected traffic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from finetune_cli import rollout_plans
from finetune_cli.__main__ import app
from finetune_cli.rollout_plans import Assumptions
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec

EXAMPLES = Path(__file__).parents[3] / "examples" / "rollouts"
OBJECTIVE = {"name": "helpful", "metric": "helpful", "margin": 0.05}


def spec(steps: Sequence[dict[str, Any]], **analysis: Any) -> AdapterDeploymentSpec:
    return AdapterDeploymentSpec.model_validate(document(steps, **analysis)["spec"])


def document(steps: Sequence[dict[str, Any]], **analysis: Any) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "AdapterDeployment",
        "metadata": {"name": "bot"},
        "spec": {
            "baseModelRef": {"name": "smollm2"},
            "adapter": {"fineTuneJobRef": {"name": "tickets"}},
            "strategy": {"canary": {"steps": list(steps)}},
            "analysis": analysis,
        },
    }


def assume(**changes: Any) -> Assumptions:
    values: dict[str, Any] = {
        "requests_per_second": 10.0,
        "base_rates": {},
        "relative_risk": 2.0,
        "answered": 0.05,
        "deviations": {},
    }
    return Assumptions(**{**values, **changes})


def test_steps_of_one_weight_are_one_span() -> None:
    spans = rollout_plans.spans_of(
        spec(
            [
                {"pause": {"duration": "1m"}},
                {"setWeight": 5},
                {"pause": {"duration": "5m"}},
                {"analysis": {"duration": "10m"}},
                {"setWeight": 50},
                {"approval": {}},
            ]
        ).strategy.canary.steps
    )
    assert [(span.weight, span.seconds, span.by_evidence, span.by_person) for span in spans] == [
        (0.0, 60.0, False, False),
        (5.0, 900.0, True, False),
        (50.0, 0.0, False, True),
    ]
    assert spans[1].steps == ("setWeight 5%", "pause 5m", "analysis 10m")


def test_copies_are_a_share_of_the_answers_that_are_compared() -> None:
    spans = rollout_plans.spans_of(
        spec([{"setMirror": {"percent": 100, "duration": "10m"}}, {"setWeight": 20}]).strategy.canary.steps
    )
    assert [(span.weight, span.seconds) for span in spans] == [(50.0, 600.0), (20.0, 0.0)]


def test_a_step_that_is_too_short_is_told_with_the_time_that_it_needs() -> None:
    short = rollout_plans.plan_rollout(spec([{"setWeight": 50}, {"pause": {"duration": "1m"}}]), assume())
    (need,) = short.spans[0].power.needs
    assert short.spans[0].power.requests == 600
    assert need.requests_certain > 600
    assert short.warnings[0].startswith("setWeight 50%, pause 1m: less than 95% to catch a harm to errors")
    assert "all steps together catch a harm to errors with" in short.warnings[1]

    seconds = int(need.seconds_certain) + 1
    long = rollout_plans.plan_rollout(
        spec([{"setWeight": 50}, {"pause": {"duration": f"{seconds}s"}}]), assume()
    )
    assert long.warnings == ()


def test_more_traffic_needs_the_same_requests_in_less_time() -> None:
    steps: list[dict[str, Any]] = [{"setWeight": 50}, {"pause": {"duration": "10m"}}]
    slow, fast = (
        rollout_plans.plan_rollout(spec(steps), assume(requests_per_second=rate)).spans[0].power.needs[0]
        for rate in (20.0, 40.0)
    )
    assert fast.seconds_certain < 0.6 * slow.seconds_certain


def test_an_analysis_lasts_as_long_as_its_objectives_take() -> None:
    steps: list[dict[str, Any]] = [{"setWeight": 50}, {"analysis": {}}]
    bare = rollout_plans.plan_rollout(spec(steps), assume())
    assert bare.spans[0].seconds == 0
    (span,) = rollout_plans.plan_rollout(spec(steps, objectives=[OBJECTIVE]), assume()).spans
    assert span.seconds > 3600
    bounded = spec(steps, objectives=[OBJECTIVE])
    canary = bounded.strategy.canary.model_copy(update={"max_step_duration": "30m"})
    strategy = bounded.strategy.model_copy(update={"canary": canary})
    (span,) = rollout_plans.plan_rollout(bounded.model_copy(update={"strategy": strategy}), assume()).spans
    assert span.seconds == 1800


def test_assumptions_by_name_reach_the_guardrail_that_they_name() -> None:
    guardrails = [{"name": "errors", "event": "error"}, {"name": "empty", "event": "empty_output"}]
    one = spec([{"setWeight": 50}, {"pause": {"duration": "1h"}}], guardrails=guardrails)
    needs = {
        need.name: need.requests_certain
        for need in rollout_plans.plan_rollout(one, assume(base_rates={"errors": 0.001, "": 0.1}))
        .spans[0]
        .power.needs
    }
    assert needs["errors"] > 20 * needs["empty"]


def test_an_assumption_about_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no guardrail or objective eror; there are errors"):
        rollout_plans.plan_rollout(spec([{"setWeight": 5}]), assume(base_rates={"eror": 0.1}))


def run(path: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["rollout", "plan", "-f", str(path), *arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adep.yaml"
    steps: list[dict[str, Any]] = [
        {"setWeight": 5},
        {"pause": {"duration": "5m"}},
        {"setWeight": 50},
        {"analysis": {}},
    ]
    path.write_text(yaml.safe_dump(document(steps, objectives=[OBJECTIVE])), encoding="utf-8")
    return path


def test_plan_of_a_file(file: Path) -> None:
    text = run(file, "--requests-per-second", "5")
    assert "setWeight 5%, pause 5m" in text
    assert "1,500" in text
    assert "warning: setWeight 5%, pause 5m: less than 95%" in text
    assert "5 requests/s for the alias (--requests-per-second)" in text
    assert "of sticky users of whom a few ask most it is often less" in text


def test_a_plan_without_a_candidates_share_says_so(file: Path) -> None:
    steps: list[dict[str, Any]] = [{"analysis": {}}]
    file.write_text(yaml.safe_dump(document(steps, objectives=[OBJECTIVE])), encoding="utf-8")
    text = run(file)
    assert "bot: 0s in all, and no step gives the candidate requests to compare" in text
    assert "warning: helpful: no step has answers of both sides" in text


def test_steps_without_a_candidate_take_their_time_too() -> None:
    text = run(EXAMPLES / "per-tenant-pin.yaml")
    assert "triage-tenants: 1d8h in all, 8h0m of it with answers of both sides to compare" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("setWeight")]
    assert rows[0] == ["setWeight", "0%,", "pause", "24h", "0%", "1d0h", "864,000"]
    assert "warning" not in text, "nothing is to be caught at weight 0"
    text = run(EXAMPLES / "first-deployment.yaml")
    assert "triage-first: 20m0s in all" in text
    steps = [line.split("  ")[0] for line in text.splitlines()]
    assert steps.index("evalGate golden") < steps.index("setWeight 10%, pause 10m")
    assert "until the rows are scored" in text


def test_what_is_only_shown_catches_nothing_and_is_waited_for_by_nobody() -> None:
    steps: list[dict[str, Any]] = [{"setWeight": 50}, {"pause": {"duration": "1m"}}, {"analysis": {}}]
    one = spec(steps, objectives=[OBJECTIVE], dryRun=["errors", "helpful"])
    plan = rollout_plans.plan_rollout(one, assume())
    assert plan.warnings == ()
    assert plan.seconds == 60
    assert rollout_plans.span_rows(plan)[1][4] == "errors (dry run)"
    assert rollout_plans.objective_rows(plan)[1][0] == "helpful (dry run)"
    (span,) = rollout_plans.to_data(plan, assume())["spans"]
    assert [each["dryRun"] for each in span["guardrails"]] == [True]


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_plan_for_programs(file: Path, output: str) -> None:
    text = run(file, "-o", output, "--base-rate", "errors=0.01", "--base-rate", "0.03")
    (plan,) = json.loads(text) if output == "json" else yaml.safe_load(text)
    assert plan["assumptions"]["base_rates"] == {"errors": 0.01, "": 0.03}
    assert [span["candidatePercent"] for span in plan["spans"]] == [5.0, 50.0]
    assert plan["spans"][0]["guardrails"][0]["requestsCertain"] > 1000
    assert plan["objectives"][0]["name"] == "helpful"


def test_a_file_with_mistakes_is_not_planned(file: Path) -> None:
    bad = document([{"setWeight": 500}])
    bad["spec"]["trafic"] = {}
    bad["spec"]["progress_deadline_seconds"] = 60
    file.write_text(yaml.safe_dump(bad), encoding="utf-8")
    text = run(file, code=1)
    assert "spec.strategy.canary.steps[0].setWeight: 500: Input should be less than or equal to 100" in text
    assert "spec.trafic: unknown field; did you mean traffic?" in text
    assert "spec.progress_deadline_seconds: unknown field; did you mean progressDeadlineSeconds?" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base-rate", "errors=much"), "errors=0.01"),
        (("--base-rate", "2"), "must lie between 0 and 1"),
        (("--base-rate", "eror=0.1"), "no guardrail or objective eror"),
        (("--requests-per-second", "0"), "above 0 requests/s"),
        (
            ("--feedback-share", "5"),
            "share of the answers with feedback must be above 0 and at most 1, not 5",
        ),
        (("--deviation", "nan"), "helpful: the standard deviation must be above 0, not nan"),
    ],
)
def test_assumptions_that_make_no_sense(file: Path, arguments: tuple[str, ...], message: str) -> None:
    text = run(file, *arguments, code=2)
    assert message in " ".join(text.replace("│", " ").split())
