"""Why an attempt failed: exit codes of the trainer, and what KubeRay's message tells where no report arrived."""

from __future__ import annotations

import re

from finetune_operator.api.finetunejob import ErrorClass

CLASS_OF_EXIT_CODE = {
    0: ErrorClass.SUCCEEDED,
    1: ErrorClass.INTERNAL,
    64: ErrorClass.BAD_CONFIG,
    65: ErrorClass.BAD_DATA,
    66: ErrorClass.MODEL_NOT_FOUND,
    82: ErrorClass.NOT_FINITE,
}

ADVICE = {
    ErrorClass.BAD_CONFIG: "Correct the spec and create the job again.",
    ErrorClass.BAD_DATA: "Correct the data and create the job again.",
    ErrorClass.MODEL_NOT_FOUND: "Correct spec.model.uri (or its secretRef) and create the job again.",
    ErrorClass.NOT_FINITE: "Halve spec.hyperparameters.learningRate and create the job again.",
    ErrorClass.INTERNAL: "See the log of the training pod; if it looks like a fault of the trainer, report it.",
    ErrorClass.LOST: "The training process or its cluster went away; create the job again.",
    ErrorClass.CANCELLED: "Create the job again to start anew.",
}

# Anchored: the rest of the message quotes the program's own output, which may say anything.
_EXIT_CODE = re.compile(r"^Job entrypoint command failed with exit code (\d{1,3})\b")
_LOG_TAIL = re.compile(r"last available logs[^:]*:\s*(.*)", re.DOTALL)


def exit_code_of(message: str | None) -> int | None:
    """The entrypoint's exit code in a RayJob's status.message, or None where it does not start with one."""
    match = _EXIT_CODE.match(message or "")
    return int(match.group(1)) if match else None


def class_of(exit_code: int | None) -> ErrorClass:
    """The class of an attempt that ended without a report: Lost where there was no exit code or a signal."""
    if exit_code is None or exit_code >= 128:
        return ErrorClass.LOST
    return CLASS_OF_EXIT_CODE.get(exit_code, ErrorClass.INTERNAL)


def last_log_line(message: str | None, *, limit: int = 500) -> str | None:
    """The last line of the program's output that KubeRay quotes, cut to `limit` characters."""
    match = _LOG_TAIL.search(message or "")
    lines = [line.strip() for line in match.group(1).splitlines() if line.strip()] if match else []
    return lines[-1][:limit] if lines else None


def with_advice(error_class: ErrorClass, message: str) -> str:
    """The message followed by what the user should do."""
    advice = ADVICE.get(error_class)
    text = message.strip().rstrip(".")
    return f"{text}. {advice}" if advice and advice not in message else message
