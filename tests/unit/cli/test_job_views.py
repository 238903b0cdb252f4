"""Lines, tables and pages about jobs, from their dicts."""

from __future__ import annotations

import io
import sys
from datetime import timedelta
from typing import Any

import pytest
import typer
from rich.console import Console

from finetune_cli import __main__, job_pages, job_screens, job_views, screens, shared
from finetune_operator.api.finetunejob import ErrorClass, Phase
from tests.unit.cli.jobs import NOW, failed, job, running, succeeded


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (1500, "1.5 kB"), (9_812_345, "9.8 MB"), (2.5e13, "25.0 TB")]
)
def test_sizes(size: float, text: str) -> None:
    assert job_views.format_size(size) == text


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_timeouts(text: str, seconds: float) -> None:
    assert shared.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "soon", "10d", "inf", "nan", "m"])
def test_timeouts_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a time"):
        shared.parse_seconds(text)


def test_streams_that_are_closed_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr(
        __main__, "app", lambda: seen.append(sys.stdin.read() + str(sys.stdout.write("said")))
    )
    __main__.main()
    assert seen == ["4"]


def test_every_phase_is_either_over_or_goes_on() -> None:
    over = {phase for phase in Phase if job_views.exit_code(job(phase=phase.value)) is not None}
    assert over == {Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED}
    assert job_views.exit_code(job(phase="Succeeded")) == 0
    assert job_views.exit_code(job(phase="Failed")) == 1
    assert job_views.exit_code(job(phase="Cancelled")) == 1
    assert job_views.exit_code(job()) is None


def test_line_of_a_running_job() -> None:
    line = job_views.progress_line(running(), NOW)
    assert line == "Running  45/100 45%  loss 1.235  eval loss 1.3  812 tokens/s  ETA 3m20s"


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({}, "Pending  waits for the operator"),
        ({"phase": "Pending", "message": "KubeRay is not installed"}, "Pending  KubeRay is not installed"),
        ({"phase": "Validating", "message": "checks"}, "Validating  checks"),
        ({"phase": "Succeeded", "message": "at s3://"}, "Succeeded"),
    ],
)
def test_line_without_steps(status: dict[str, Any], line: str) -> None:
    assert job_views.progress_line(job(**status), NOW) == line


def test_time_left_runs_on_between_reports_and_stops_at_zero() -> None:
    assert job_views.remaining(running(), NOW) == 200
    assert job_views.remaining(running(), NOW + timedelta(seconds=30)) == 170
    assert job_views.remaining(running(), NOW + timedelta(hours=1)) == 0
    assert job_views.remaining(succeeded(), NOW) is None


def test_clock_of_this_machine_may_be_behind_the_cluster() -> None:
    assert job_views.remaining(running(), NOW - timedelta(minutes=5)) == 210


def test_table_of_jobs_is_sorted_by_age() -> None:
    young = job("young")
    young["metadata"]["creationTimestamp"] = "2026-01-01T12:09:00Z"
    rows = job_views.list_rows([young, running()], NOW, namespaces=True)
    assert rows[0] == ["NAMESPACE", *job_views.HEADER]
    assert rows[1] == [
        "default", "tickets", "Running", "LoRA", "hf://organization/model", "45%", "1.235", "3m20s", "10m0s",
    ]  # fmt: skip
    assert rows[2] == ["default", "young", "Pending", "LoRA", "hf://organization/model", "", "", "", "1m0s"]


def test_end_of_a_job_that_succeeded() -> None:
    assert job_views.final_lines(succeeded()) == [
        "tickets: Succeeded after 1m55s",
        "artifact  s3://bucket/tickets",
        "          adapter of rank 16, 9.8 MB, sha256:abc",
        "base      hf://organization/model",
        "measured  loss 1.235, eval loss 1.3",
    ]


def test_end_of_a_job_that_failed() -> None:
    assert job_views.final_lines(failed()) == [
        "tickets: Failed (BadData, exit code 65) after 12s",
        "pvc://files/train.jsonl line 17: broken JSON. Correct the data and create the job again.",
        "more: finetune jobs describe tickets -n default",
    ]


def test_end_of_a_job_without_exit_code() -> None:
    assert job_views.final_lines(failed("Cancelled", None))[0] == "tickets: Cancelled (Cancelled) after 12s"


EVENTS = [
    {
        "metadata": {"creationTimestamp": f"2026-01-01T12:0{minute}:00Z"},
        "type": "Warning",
        "reason": f"Reason{minute}",
        "message": "text",
        "lastTimestamp": None,
        "eventTime": None,
    }
    for minute in (3, 1, 2, 4, 5, 6)
]


def test_page_of_a_job_that_failed_says_what_why_and_what_to_do() -> None:
    page = job_pages.describe(failed(), EVENTS, NOW)
    assert page.startswith("FineTuneJob default/tickets: Failed (BadData), took 12s\n")
    assert "  SFT with LoRA of hf://organization/model\n  on pvc://files/train.jsonl\n" in page
    assert "for 3 epochs of 16 rows, at most 1024 tokens a row; 5% of the rows held out" in page
    assert "Why\n  pvc://files/train.jsonl line 17: broken JSON." in page
    assert "Do\n  Correct the file that the message names, then delete the job" in page
    assert "kubectl delete ftj tickets -n default" in page
    assert "  1: RayJob tickets-a1, BadData, exit code 65, 12s" in page
    assert "Reason1" not in page, "only the last five events"
    assert page.index("Reason2") < page.index("Reason6")
    assert "Result" not in page


def test_page_of_a_job_that_succeeded() -> None:
    page = job_pages.describe(succeeded(), [], NOW)
    assert "Succeeded (ArtifactPublished), took 1m55s" in page
    assert "Use the adapter" in page
    assert "model revision: c0ffee" in page
    assert "rows trained on: 380" in page
    assert "artifact  s3://bucket/tickets" in page
    assert "last report" not in page


def test_page_of_a_running_job() -> None:
    page = job_pages.describe(running(), [], NOW)
    assert "Running (Training), for 2m0s" in page
    assert "  step 45/100 45%, epoch 1.35\n  loss 1.235, eval loss 1.3, 812 tokens/s, ETA 3m20s\n" in page
    assert "last report 10s ago" in page
    assert "finetune jobs watch tickets -n default" in page
    assert "Training True for 1m30s (Training): optimizer steps" in page


def test_page_of_a_job_that_nobody_has_seen() -> None:
    page = job_pages.describe(job(), [], NOW)
    assert "Pending, for 10m0s" in page
    assert "The operator has not looked at the job yet." in page
    assert "is the operator up" in page


def test_page_of_a_job_that_waits_for_its_user() -> None:
    refused = {
        "type": "Accepted",
        "status": "False",
        "reason": "OutputRequired",
        "message": "set output.uri",
        "lastTransitionTime": "2026-01-01T12:00:00Z",
    }
    page = job_pages.describe(
        job(phase="Pending", reason="OutputRequired", message="set output.uri", conditions=[refused]), [], NOW
    )
    assert "Do\n  Do what the message says" in page


def test_long_lists_and_other_lengths_are_summed_up() -> None:
    one = job()
    one["spec"]["dataset"]["sources"] = [{"uri": f"s3://b/{n}.csv"} for n in range(5)]
    one["spec"]["hyperparameters"]["maxSteps"] = 60
    one["spec"]["earlyStopping"] = {"patience": 2, "minDelta": 0}
    text = "\n".join(job_pages.what(one))
    assert "on s3://b/0.csv, s3://b/1.csv, s3://b/2.csv and 2 more" in text
    assert "for 60 steps of 16 rows" in text
    assert "after 2 evaluations" in text


NO_FAILURES = (ErrorClass.SUCCEEDED, ErrorClass.SUSPENDED, ErrorClass.CHECKED)  # no job ends with the latter


@pytest.mark.parametrize("reason", [one.value for one in ErrorClass if one not in NO_FAILURES])
def test_every_way_to_fail_has_a_remedy_of_its_own(reason: str) -> None:
    assert reason in job_pages.REMEDIES
    text = job_pages.next_step(failed(reason, None))
    assert "{" not in text
    assert "default" in text


@pytest.mark.parametrize("reason", ["Internal", "Stalled"])
def test_the_log_that_is_named_is_that_of_the_pod_which_follows_the_trainer(reason: str) -> None:
    """The head pod's has Ray's own words alone, and is gone with the cluster."""
    again = job(phase="Failed", reason=reason, attempts=[{"rayJob": "tickets-a1"}, {"rayJob": "tickets-a2"}])
    assert "kubectl logs -n default job/tickets-a2" in job_pages.next_step(again)


def test_a_trainer_that_is_not_heard_of_is_worth_a_look() -> None:
    assert "what the message names" in job_pages.next_step(running(reason="TrainerSilent"))


def rendered(one: dict[str, Any], **options: Any) -> str:
    console = Console(width=120, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(job_screens.render_live(one, NOW, **options))
    return capture.get()


def test_live_view_of_a_running_job() -> None:
    text = rendered(running(), trouble="the API server does not answer")
    assert "tickets  LoRA of hf://organization/model" in text
    assert "Running  optimizer steps are being taken  2m0s" in text
    assert "━" in text
    assert "45/100 45%" in text
    assert "epoch 1.35" in text
    assert "loss 1.235   eval loss 1.3   812 tokens/s   ETA 3m20s" in text
    assert "the API server does not answer" in text


def test_live_view_before_anything_is_known() -> None:
    text = rendered(job())
    assert "Pending  waits for the operator  10m0s" in text
    assert "━" not in text


def test_messages_are_not_read_as_markup() -> None:
    assert "[red]x[/red] [all-linear]" in rendered(job(phase="Pending", message="[red]x[/red] [all-linear]"))


def test_plain_screen_prints_each_change_once() -> None:
    stream = io.StringIO()
    with screens.open_screen(stream, job_screens.VIEW) as screen:
        screen.show(job(phase="Pending", message="waits"))
        screen.show(job(phase="Pending", message="waits"))
        screen.trouble("the API server does not answer")
        screen.trouble("the API server does not answer")
        screen.trouble(None)
        screen.show(job(phase="Provisioning", message="starts"))
    lines = [line[10:] for line in stream.getvalue().splitlines()]
    assert lines == [
        "Pending  waits",
        "the API server does not answer",
        "the API server answers again",
        "Provisioning  starts",
    ]


def test_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = running()
    long["spec"]["model"]["uri"] = "s3://" + "a" * 300
    screens.print_table(job_views.list_rows([long], NOW, namespaces=False), colours=job_screens.COLOURS)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == list(job_views.HEADER)
    assert "s3://" + "a" * 300 in row


def test_a_name_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what the next command is given."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "50")
    one = job(name="a-name-of-thirty-characters-xx")
    screens.print_table(job_views.list_rows([one], NOW, namespaces=False), colours={})
    assert "a-name-of-thirty-characters-xx" in capsys.readouterr().out
