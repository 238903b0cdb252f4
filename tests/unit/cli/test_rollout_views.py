"""Lines, tables, pages and the live tree about rollouts, from their dicts."""

from __future__ import annotations

import io
from datetime import timedelta
from typing import Any

import pytest
from rich.console import Console

from finetune_cli import pages, rollout_pages, rollout_screens, rollout_views, screens
from finetune_operator.api.adapterdeployment_status import (
    AbortReason,
    AdapterDeploymentStatus,
    PauseReason,
    RolloutPhase,
    Stage,
)
from finetune_operator.api.adapterdeployment_strategy import STEP_KINDS
from tests.unit.cli.rollouts import EVENTS, NOW, aborted, adapter, canary, paused, promoted, rollout


@pytest.mark.parametrize("one", [canary(), paused("UserPause"), aborted(), promoted()])
def test_the_statuses_of_these_tests_are_those_of_the_api(one: dict[str, Any]) -> None:
    AdapterDeploymentStatus.model_validate(one["status"])


def test_a_rollout_is_over_when_the_wanted_revision_serves_or_was_rolled_back() -> None:
    assert rollout_views.exit_code(promoted()) == 0
    assert rollout_views.exit_code(aborted()) == 1
    for one in (rollout(), canary(), paused("UserPause")):
        assert rollout_views.exit_code(one) is None


def test_the_way_back_is_offered_where_there_is_one() -> None:
    one = promoted()
    assert "undo" not in rollout_pages.what_to_do(one)[0], "the first revision has none before it"
    one["status"]["history"].append(one["status"]["history"][0] | {"revision": "0a1b2c3d"})
    assert "finetune rollout undo bot -n default" in rollout_pages.what_to_do(one)[0]


def test_a_status_about_an_older_spec_ends_nothing() -> None:
    for one in (promoted(), aborted()):
        one["metadata"]["generation"] += 1
        assert rollout_views.exit_code(one) is None


def test_a_return_by_hand_is_an_end_and_an_abort_under_way_is_none() -> None:
    one = aborted("UserAbort")
    one["status"]["stage"] = "Finalising"
    assert rollout_views.exit_code(one) == 1
    one["status"]["stage"] = "Aborting"
    assert rollout_views.exit_code(one) is None


def test_an_engine_that_lacks_an_adapter_for_a_while_is_no_end() -> None:
    one = promoted()
    one["status"]["phase"] = "Degraded"
    assert rollout_views.exit_code(one) is None
    assert "An engine lacks" in rollout_pages.what_to_do(one)[0]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"setWeight": 5}, "setWeight 5%"),
        ({"setMirror": {"percent": 20, "duration": "10m"}}, "setMirror 20% 10m"),
        ({"evalGate": {"evalRef": "golden", "minScore": 0.8}}, "evalGate golden"),
        ({"pause": {"duration": "1h30m"}}, "pause 1h30m"),
        ({"pause": {}}, "pause"),
        ({"analysis": {}}, "analysis"),
        ({"approval": {"timeout": "24h", "onTimeout": "Abort"}}, "approval within 24h"),
        ({"approval": {}}, "approval"),
    ],
)
def test_steps_as_short_as_they_can_be_said(step: dict[str, Any], text: str) -> None:
    assert next(iter(step)) in STEP_KINDS
    assert rollout_views.step_text(step) == text


def test_time_left_of_a_step_runs_on_and_stops_at_zero() -> None:
    assert rollout_views.time_left(canary(), NOW) == 180
    assert rollout_views.time_left(canary(), NOW + timedelta(hours=1)) == 0
    assert rollout_views.time_left(canary(currentStepIndex=2), NOW) is None
    assert rollout_views.time_left(canary(currentStepIndex=3), NOW) == 24 * 3600 - 120
    assert rollout_views.time_left(canary(currentStepIndex=4), NOW) is None
    assert rollout_views.time_left(aborted(), NOW) is None


def test_table_of_rollouts() -> None:
    rows = rollout_views.list_rows([rollout("new"), canary()], NOW, namespaces=True)
    assert rows[0] == ["NAMESPACE", *rollout_views.HEADER]
    assert rows[1] == [
        "default", "bot", "Progressing", "Canary", "2/4 pause", "5%", "1a2b3c4d", "9f8e7d6c", "10m0s",
    ]  # fmt: skip
    assert rows[2] == ["default", "new", "Pending", "", "", "", "", "", "10m0s"]


def test_rows_of_checks_show_what_each_kind_measures() -> None:
    assert rollout_views.check_rows(canary()) == [
        ["errors", "Guardrail", "Successful", "38/1900", "4/100", "2 times as often", "1.38 of 100"],
        ["thumbs-up", "Objective", "Inconclusive", "400", "30", "-0.012 in [-0.11, +0.086]", ""],
        ["p95", "Metric", "Error", "", "", "1.1", "2 successful, 1 error"],
        ["drift", "Drift", "Successful", "", "", "0.031", "0.031 of 0.25"],
    ]


def test_rows_of_checks_that_know_nothing_yet() -> None:
    bare = {"name": "errors", "kind": "Guardrail", "phase": "Inconclusive", "dryRun": True}
    assert rollout_views.check_rows(canary(analysis=[bare])) == [
        ["errors (dry run)", "Guardrail", "Inconclusive", "", "", "", ""]
    ]


def test_lines_of_a_log_say_each_thing_once() -> None:
    stream = io.StringIO()
    with screens.open_screen(stream, rollout_screens.VIEW) as screen:
        screen.show(canary())
        for e_value, answers in ((1.4, 10), (1.9, 20), (2.5, 30)):
            moved = canary(message=f"5% of the users get 9f8e7d6c for {answers}m")
            moved["status"]["analysis"] = [{**moved["status"]["analysis"][0], "eValue": e_value}]
            screen.show(moved)
        screen.show({**paused("AwaitingApproval", "approve it"), "events": EVENTS[:1]})
        screen.show(promoted())
    lines = [line[10:] for line in stream.getvalue().splitlines()]
    assert lines == [
        "Progressing  Canary  2/4 pause  stable 1a2b3c4d 95%  candidate 9f8e7d6c 5%",
        "check errors: Successful",
        "check thumbs-up: Inconclusive",
        "check p95: Error, http://prometheus:9090 does not answer",
        "check drift: Successful",
        "5% of the users get 9f8e7d6c for 5m",
        "Paused  Canary  2/4 pause  stable 1a2b3c4d 95%  candidate 9f8e7d6c 5%",
        "paused AwaitingApproval: approve it",
        "check thumbs-up: Inconclusive",
        "check p95: Error, http://prometheus:9090 does not answer",
        "check drift: Successful",
        "event Normal Reason1: text",
        "approve it",
        "Healthy  Succeeded  stable 9f8e7d6c 100%",
    ]


def test_a_line_whose_numbers_move_is_printed_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 0.0, 10.0, 31.0, 31.0))
    monkeypatch.setattr("finetune_cli.screens.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with screens.PlainScreen(stream, rollout_screens.VIEW) as screen:
        for answers in (1, 2, 3):
            screen.show(rollout(phase="Progressing", message=f"{answers} answers"))
    assert [line[10:] for line in stream.getvalue().splitlines()] == ["Progressing", "1 answers", "3 answers"]


def test_events_of_one_second_keep_their_order() -> None:
    events = [
        {**EVENTS[0], "reason": word, "metadata": {**EVENTS[0]["metadata"], "resourceVersion": version}}
        for word, version in (("third", "1010"), ("first", "98"), ("second", "1009"))
    ]
    lines = pages.event_lines(events, NOW)
    assert [line.split()[3] for line in lines] == ["first:", "second:", "third:"]


def test_a_guardrail_without_an_event_has_no_estimate_yet() -> None:
    quiet = {
        **canary()["status"]["analysis"][0],
        "failures": {"stable": 0, "candidate": 0},
        "threshold": 1000,
    }
    (row,) = rollout_views.check_rows(canary(analysis=[quiet]))
    assert row[5:] == ["", "1.38 of 1,000"]


def test_weights_that_a_router_has_not_confirmed() -> None:
    one = canary()
    one["status"]["weights"]["verified"] = False
    assert rollout_views.weight_parts(one)[-1] == "not confirmed by all routers yet"
    assert rollout_views.weight_parts(rollout()) == []


def test_end_of_a_rollout() -> None:
    assert rollout_views.final_lines(promoted()) == ["bot: Promoted after 4m30s, 9f8e7d6c serves bot"]
    assert rollout_views.final_lines(aborted()) == [
        "bot: 9f8e7d6c was rolled back (GuardrailBreached) at 5% after 4m30s; 1a2b3c4d serves",
        "errors: 9 of 100 answers failed, 2 of 100 of the stable revision",
        "more: finetune rollout describe bot -n default",
    ]


def test_history_names_the_job_and_the_reason() -> None:
    rows = rollout_views.history_rows(aborted(), NOW)
    assert rows[0] == list(rollout_views.HISTORY_HEADER)
    assert rows[1] == ["9f8e7d6c", "30s ago", "4m30s", "Aborted", "GuardrailBreached", "tickets-2"]


def test_page_of_a_canary() -> None:
    page = rollout_pages.describe(canary(), EVENTS, NOW)
    assert page.startswith("AdapterDeployment default/bot: Progressing (Canary), for 3m0s\n")
    assert (
        "clients ask for the model bot\n  wanted is the adapter of FineTuneJob tickets-2 on smollm2" in page
    )
    assert "Do\n  Nothing; it goes on. To follow it: finetune rollout watch bot -n default" in page
    assert "Steps\n  ✔ setWeight 5%\n  ▶ pause 5m, 3m0s left\n  · analysis\n  · approval within 24h" in page
    assert "thumbs-up: 170 more values of the candidate are needed" in page
    assert "Reason2" not in page, "only the last five events"


def test_page_of_a_rollout_that_was_rolled_back_says_why_and_what_to_do() -> None:
    page = rollout_pages.describe(aborted(), [], NOW)
    assert "rolled back 30s ago, GuardrailBreached: errors: 9 of 100 answers failed" in page
    assert "finetune rollout retry bot -n default" in page


def test_page_of_a_deployment_that_nobody_has_seen() -> None:
    page = rollout_pages.describe(rollout(), [], NOW)
    assert page.startswith("AdapterDeployment default/bot: Pending\n")
    assert "The operator has not looked at the deployment yet." in page
    assert "is the operator up" in page


@pytest.mark.parametrize("reason", list(PauseReason))
def test_every_pause_has_a_remedy_of_its_own(reason: PauseReason) -> None:
    (text,) = rollout_pages.what_to_do(paused(reason.value))
    assert "bot -n default" in text
    assert "{" not in text


@pytest.mark.parametrize("reason", list(AbortReason))
def test_every_rollback_has_a_remedy_of_its_own(reason: AbortReason) -> None:
    assert reason.value in rollout_pages.ABORTS
    (text,) = rollout_pages.what_to_do(aborted(reason.value))
    assert "finetune rollout retry bot -n default" in text


@pytest.mark.parametrize("phase", list(RolloutPhase))
@pytest.mark.parametrize("stage", [*Stage, None])
def test_every_state_can_be_shown(phase: RolloutPhase, stage: Stage | None) -> None:
    one = rollout(phase=phase.value)
    if stage:
        one["status"]["stage"] = stage.value
    assert rollout_views.progress_lines(one, NOW)[0].startswith(phase.value)
    assert rollout_views.final_lines(one)
    assert phase.value in rollout_pages.describe(one, [], NOW)
    assert phase.value in rendered(one)
    assert phase.value in rollout_screens.COLOURS


def rendered(one: dict[str, Any], trouble: str | None = None) -> str:
    console = Console(width=140, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(rollout_screens.render_live(one, NOW, trouble))
    return capture.get()


def test_live_tree_of_a_canary() -> None:
    text = rendered({**canary(), "events": EVENTS}, trouble="the API server does not answer")
    assert "Progressing  Canary  step 2/4 pause  5% of the users get 9f8e7d6c for 5m  3m0s" in text
    assert "█" * 38 + "░░" in text
    assert "stable 1a2b3c4d 95%   candidate 9f8e7d6c 5%" in text
    assert "✔ setWeight 5%   ▶ pause 5m (3m0s left)   · analysis" in text
    assert "9f8e7d6c  candidate  loaded 1/1  job tickets-2" in text
    assert "38/1900" in text
    assert "3m0s ago Normal Reason7: text" in text
    assert "the API server does not answer" in text
    assert "Do\n" not in text, "nobody is needed"


def test_live_tree_tells_who_is_needed() -> None:
    text = rendered(paused("AwaitingApproval", "approve it"))
    assert "paused for 1m0s, AwaitingApproval: approve it" in text
    assert "finetune rollout promote bot -n default" in text


def test_a_small_weight_is_seen_and_a_large_one_is_not_whole() -> None:
    def bar(candidate: float) -> str:
        weights = {"stable": 100 - candidate, "candidate": candidate}
        return rendered(canary(weights=weights)).split("Traffic\n")[1].splitlines()[0].split("── ")[1]

    assert [bar(weight).count("░") for weight in (0, 0.1, 50, 99.9, 100)] == [0, 1, 20, 39, 40]


def test_adapters_that_are_missing_or_on_their_way_out() -> None:
    one = canary(
        adapters=[
            adapter("1a2b3c4d", "a", unloadAt="2026-01-01T12:12:00Z"),
            adapter("9f8e7d6c", "b", loaded=0, message="engine-0: CapacityFull"),
            adapter("00000000", "c"),
        ]
    )
    rows = rollout_views.adapter_rows(one, NOW)
    assert [row[1] for row in rows] == ["stable", "candidate", "former"]
    assert rows[0][4] == "unloaded in 2m0s"
    assert rows[1][2:] == ["loaded 0/1", "job b", "engine-0: CapacityFull"]


def test_messages_are_not_read_as_markup() -> None:
    assert "[red]x[/red] [all]" in rendered(canary(message="[red]x[/red] [all]"))


def test_time_left_stands_still_while_something_else_holds_the_step() -> None:
    held = paused("UserPause")  # a minute after the step began
    for later in (0, 3600):
        assert rollout_views.time_left(held, NOW + timedelta(seconds=later)) == 240
    behind = {
        "type": "TrafficRouted",
        "status": "False",
        "reason": "RoutersBehind",
        "message": "one is behind",
        "lastTransitionTime": "2026-01-01T12:08:30Z",
    }
    assert rollout_views.time_left(canary(conditions=[behind]), NOW) == 270
    assert rollout_views.time_left(paused("CanaryPauseStep"), NOW) == 180, "its own pause"
    assert rollout_views.time_left(paused("ReasonOfANewerOperator"), NOW) == 180


@pytest.mark.parametrize("reason", sorted(rollout_pages.HOLDS))
def test_what_holds_a_rollout_that_is_not_paused_is_told_what_to_do_about(reason: str) -> None:
    held = canary(reason=reason, message="it is held")
    page = rollout_pages.describe(held, (), NOW)
    assert "Nothing; it goes on" not in page
    assert rollout_pages.HOLDS[reason].format(where="bot -n default") in page
    assert "Do\n" in rendered(held)


def test_a_pause_by_the_spec_is_ended_in_the_spec() -> None:
    held = paused("UserPause")
    assert "finetune rollout resume bot" in rollout_pages.describe(held, (), NOW)
    held["spec"]["paused"] = True
    page = rollout_pages.describe(held, (), NOW)
    assert "spec.paused is true: set it to false" in page
    assert "resume bot" not in page


def test_a_spec_that_cannot_be_read_is_to_be_corrected_before_anything_is_promoted() -> None:
    held = paused("CanaryPauseStep")
    held["status"]["reason"] = "InvalidSpec"
    page = rollout_pages.describe(held, (), NOW)
    assert "Correct the field of the spec" in page
    assert "promote" not in page
