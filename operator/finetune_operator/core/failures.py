"""Why an attempt failed: exit codes of the trainer, and what KubeRay's message tells where no report arrived."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence

from finetune_operator.api.finetunejob import ErrorClass
from finetune_operator.core import texts
from finetune_operator.core.facts import PodFacts, RayJobFacts

CLASS_OF_EXIT_CODE = {
    0: ErrorClass.SUCCEEDED,
    1: ErrorClass.INTERNAL,
    64: ErrorClass.BAD_CONFIG,
    65: ErrorClass.BAD_DATA,
    66: ErrorClass.MODEL_NOT_FOUND,
    74: ErrorClass.STORAGE,
    75: ErrorClass.PREEMPTED,
    80: ErrorClass.GPU_OUT_OF_MEMORY,
    81: ErrorClass.HOST_OUT_OF_MEMORY,
    82: ErrorClass.NOT_FINITE,
    83: ErrorClass.COLLECTIVE,
    84: ErrorClass.CHECKPOINT_CORRUPT,
    85: ErrorClass.EVALUATION_GATE,
}

# What the user does once the job has failed for good.
ADVICE = {
    ErrorClass.BAD_CONFIG: "Correct the spec and create the job again.",
    ErrorClass.BAD_DATA: "Correct the data and create the job again.",
    ErrorClass.MODEL_NOT_FOUND: "Correct spec.model.uri (or its secretRef) and create the job again.",
    ErrorClass.STORAGE: "See that the storage answers and that the credentials may read and write it, "
    "and create the job again.",
    ErrorClass.PREEMPTED: "Raise spec.retry.preemptions or use capacity that is not taken away, "
    "and create the job again.",
    ErrorClass.GPU_OUT_OF_MEMORY: "Lower spec.hyperparameters.maxLength, set gradientCheckpointing, use QLoRA or a "
    "GPU with more memory, and create the job again.",
    ErrorClass.HOST_OUT_OF_MEMORY: "Raise spec.resources.memory and create the job again.",
    ErrorClass.NOT_FINITE: "Halve spec.hyperparameters.learningRate and create the job again.",
    ErrorClass.COLLECTIVE: "See the nodes and their network, and create the job again.",
    ErrorClass.CHECKPOINT_CORRUPT: "See the storage of spec.checkpoint.uri, and create the job again.",
    ErrorClass.EVALUATION_GATE: "The artifact is kept but must not be deployed; see its evaluation.",
    ErrorClass.INTERNAL: "See the trainer's log (kubectl logs job/ and the attempt's rayJob); if it looks like a "
    "fault of the trainer, report it.",
    ErrorClass.LOST: "The training process or its cluster went away; create the job again.",
    ErrorClass.STALLED: "See the trainer's log (kubectl logs job/ and the attempt's rayJob), raise "
    "spec.deadlines.stallSeconds where silence of that length is normal, and create the job again.",
    ErrorClass.DEADLINE_EXCEEDED: "Raise the deadline and create the job again.",
    ErrorClass.CANCELLED: "Create the job again to start anew.",
}

# Anchored: the rest of the message quotes the program's own output, which may say anything.
_EXIT_CODE = re.compile(r"^Job entrypoint command failed with exit code (-?\d{1,3})\b")
# Ray's memory monitor, which is quicker than the kernel: it kills what started the trainer, and the trainer with it.
_OUT_OF_MEMORY = re.compile(r"^Unexpected error occurred: .*killed due to the node running low on memory")
_RESULT = re.compile(r"^TRAINER_RESULT (\{.*\})$", re.MULTILINE)  # the trainer's last line on standard output
_LOG_TAIL = re.compile(r"last available logs[^:]*:\s*(.*)", re.DOTALL)
MOST_QUOTED = 500  # characters of a line of the trainer


def exit_code_of(message: str) -> int | None:
    """The entrypoint's exit code in a RayJob's status.message, or None where it does not start with one. A process
    that a signal killed has 128 and the signal's number, as in a shell; Ray says -9 for 137."""
    match = _EXIT_CODE.match(message)
    code = int(match.group(1)) if match else None
    return 128 - code if code is not None and code < 0 else code


def class_of(exit_code: int | None) -> ErrorClass:
    """The class of an attempt that ended without a report: Lost where there was no exit code or a signal."""
    if exit_code is None or exit_code >= 128:
        return ErrorClass.LOST
    return CLASS_OF_EXIT_CODE.get(exit_code, ErrorClass.INTERNAL)


def is_a_trainers(error_class: ErrorClass, *, checks: bool) -> bool:
    """Whether a trainer may report this class of itself: one that has an exit code, and Checked where it only `checks`.
    The others are the operator's to say."""
    return checks if error_class is ErrorClass.CHECKED else error_class in CLASS_OF_EXIT_CODE.values()


def cause(rayjob: RayJobFacts, pods: Sequence[PodFacts]) -> tuple[ErrorClass, str] | None:
    """Why a process went away that could not say so itself, as far as Ray and its pods tell."""
    if _OUT_OF_MEMORY.match(rayjob.message):
        return ErrorClass.HOST_OUT_OF_MEMORY, "the pod had too little memory, and Ray killed the trainer"
    for pod in pods:
        if pod.out_of_memory:
            return (
                ErrorClass.HOST_OUT_OF_MEMORY,
                f"pod {pod.name} used more memory than it may and was killed",
            )
    for pod in pods:
        if pod.disruption:
            return ErrorClass.PREEMPTED, f"pod {pod.name} was taken away: {pod.disruption}"
    for pod in pods:
        # Where Ray lived to tell the exit code, the container ended before: as Ray started, for example.
        if pod.restarted and exit_code_of(rayjob.message) is None:
            return ErrorClass.LOST, f"the container of pod {pod.name} ended: {pod.restarted}"
    return None


def message_of(rayjob: RayJobFacts) -> str:
    """What KubeRay tells of a RayJob that failed, in one line. Ray colours its log."""
    return texts.one_line(_message_of(rayjob))


def _message_of(rayjob: RayJobFacts) -> str:
    exit_code = exit_code_of(rayjob.message)
    if exit_code is None:
        first = rayjob.message.splitlines()[0] if rayjob.message else "no message"
        return f"{rayjob.reason or 'failed'}: {first}"
    if exit_code > 128:
        return f"the trainer was killed by {_signal_name(exit_code - 128)}"
    line = _told_by_result(rayjob.message, exit_code) or _last_log_line(rayjob.message)
    return f"the trainer ended with exit code {exit_code}" + (f": {line}" if line else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _told_by_result(message: str, exit_code: int) -> str | None:
    """What the trainer said last of itself, where it could not report; believed only where it fits the exit code."""
    for found in reversed(_RESULT.findall(message)):
        try:
            result = json.loads(found)
        except ValueError:  # cut off, or somebody else's line
            continue
        if isinstance(result, dict) and result.get("exitCode") == exit_code and result.get("message"):
            return str(result["message"]).splitlines()[0][:MOST_QUOTED]
    return None


def _last_log_line(message: str) -> str | None:
    """The last line of the program's output that KubeRay quotes."""
    match = _LOG_TAIL.search(message)
    lines = [line.strip() for line in match.group(1).splitlines() if line.strip()] if match else []
    return lines[-1][:MOST_QUOTED] if lines else None


def with_advice(error_class: ErrorClass, message: str) -> str:
    """The message followed by what the user should do, unless it says that itself."""
    advice = ADVICE.get(error_class)
    text = message.strip().rstrip(".")
    told = not advice or advice in message or text.endswith("create the job again")
    return message if told else f"{text}. {advice}"
