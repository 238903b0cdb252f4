"""What is read out of KubeRay's message where the trainer's own report never arrived. The texts are recorded ones."""

from __future__ import annotations

import json

import pytest

from finetune_operator.api.finetunejob import ErrorClass
from finetune_operator.core import failures
from tests.unit.operator.stories import rayjob

LOGS = ", last available logs (truncated to 20,000 chars):\n"
SAID = "stopped by SIGTERM after step 85; file:///c/checkpoint-85 is complete"


def told(code: str, log: str) -> tuple[int | None, ErrorClass, str]:
    message = f"Job entrypoint command failed with exit code {code}{LOGS}{log}"
    exit_code = failures.exit_code_of(message)
    job = rayjob("Failed", "FAILED", reason="AppFailed", message=message)
    return exit_code, failures.class_of(exit_code), failures.message_of(job)


@pytest.mark.parametrize(
    ("code", "number", "name"), [("-9", 137, "SIGKILL"), ("137", 137, "SIGKILL"), ("-70", 198, "signal 70")]
)
def test_a_process_that_was_killed(code: str, number: int, name: str) -> None:
    assert told(code, "loss 2.3\nloss 2.2") == (number, ErrorClass.LOST, f"the trainer was killed by {name}")


OUR_WORDS = {"Cancelled", "Suspended", "DeadlineExceeded", "Stalled", "Lost"}


@pytest.mark.parametrize("error_class", list(ErrorClass))
@pytest.mark.parametrize("checks", [True, False])
def test_a_trainer_says_no_more_of_itself_than_its_exit_code_does(
    error_class: ErrorClass, checks: bool
) -> None:
    believed = error_class not in OUR_WORDS and (checks or error_class is not ErrorClass.CHECKED)
    assert failures.is_a_trainers(error_class, checks=checks) is believed


def test_what_the_trainer_wanted_to_report_is_in_its_log() -> None:
    result = json.dumps({"class": "Preempted", "exitCode": 75, "message": SAID})
    log = f"checked: 320 rows\nTRAINER_RESULT {result}\nresult could not be reported (connection refused)\n"
    assert told("75", log) == (75, ErrorClass.PREEMPTED, f"the trainer ended with exit code 75: {SAID}")


@pytest.mark.parametrize(
    "line",
    [
        'TRAINER_RESULT {"exitCode": 0, "message": "all is well"}',
        'TRAINER_RESULT {"exitCode": 75, "mess',
        "TRAINER_RESULT [75]",
        'TRAINER_RESULT {"exitCode": 75}',
    ],
)
def test_a_result_that_does_not_fit_the_exit_code_is_not_believed(line: str) -> None:
    assert told("75", f"{line}\nthe end")[2] == "the trainer ended with exit code 75: the end"


def test_the_colours_of_rays_log_are_not_told() -> None:
    said = told("74", "\x1b[36m(train pid=7)\x1b[0m out of\tdisk\n")[2]
    assert said == "the trainer ended with exit code 74: (train pid=7) out of disk"


def test_a_log_without_a_last_word_and_a_failure_without_a_message() -> None:
    assert told("74", "out of disk\n  \n")[2] == "the trainer ended with exit code 74: out of disk"
    assert told("74", "")[2] == "the trainer ended with exit code 74"
    assert failures.message_of(rayjob("Failed")) == "failed: no message"
    assert failures.message_of(rayjob("Failed", reason="AppFailed", message="a\nb")) == "AppFailed: a"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no disk", "no disk. Raise the deadline and create the job again."),
        ("no disk. ", "no disk. Raise the deadline and create the job again."),
        ("late. Raise the deadline and create the job again.", "late. Raise the deadline and create the job again."),
        ("too late: create the job again.", "too late: create the job again."),
    ],
)  # fmt: skip
def test_advice_is_given_once(message: str, told: str) -> None:
    assert failures.with_advice(ErrorClass.DEADLINE_EXCEEDED, message) == told
    assert failures.with_advice(ErrorClass.SUSPENDED, message) == message


def cause(message: str) -> object:
    return failures.cause(rayjob("Failed", "FAILED", reason="AppFailed", message=message), pods=[])


@pytest.mark.parametrize("who", ["1 worker(s) were", "Task was"])
def test_ray_kills_before_the_kernel_does(who: str) -> None:
    message = (
        f"Unexpected error occurred: {who} killed due to the node running low on memory. Memory on the node"
    )
    assert cause(message) == (
        ErrorClass.HOST_OUT_OF_MEMORY,
        "the pod had too little memory, and Ray killed the trainer",
    )


def test_what_a_log_tells_of_memory_is_not_rays_word() -> None:
    log = "Unexpected error occurred: Task was killed due to the node running low on memory"
    assert cause(f"Ray head pod not found.{LOGS}{log}") is None
