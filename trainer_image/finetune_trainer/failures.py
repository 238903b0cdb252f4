"""Why a run can end, and the exit code of each class; docs/exit-codes.md is the same table for people."""

from __future__ import annotations

import signal
from enum import StrEnum


class ErrorClass(StrEnum):
    SUCCEEDED = "Succeeded"
    BAD_CONFIG = "BadConfig"  # the run file contradicts itself, the model or the output folder
    BAD_DATA = "BadData"  # a data file is missing, unreadable or does not say what its format asks for
    MODEL_NOT_FOUND = (
        "ModelNotFound"  # the base model is not where model.uri says, or cannot be used as it is
    )
    NOT_FINITE = "NotFinite"  # loss or gradient became NaN or infinite
    INTERNAL = "Internal"  # everything else: a defect, or the machine


EXIT_CODES = {
    ErrorClass.SUCCEEDED: 0,
    ErrorClass.BAD_CONFIG: 64,
    ErrorClass.BAD_DATA: 65,
    ErrorClass.MODEL_NOT_FOUND: 66,
    ErrorClass.NOT_FINITE: 82,
    ErrorClass.INTERNAL: 1,
}

MAX_MESSAGE = 4000  # characters; the operator's status takes 4096


class TrainerError(Exception):
    """A known way to fail. The message names the field, the value and the remedy; it is shown to the user as it is."""

    error_class = ErrorClass.INTERNAL


class BadConfig(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.BAD_CONFIG


class BadData(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.BAD_DATA


class ModelNotFound(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.MODEL_NOT_FOUND


class NotFinite(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.NOT_FINITE


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception, so that no library handler swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


def classify(error: Exception) -> tuple[ErrorClass, str]:
    """Returns class and message of an error. A cause that we raised ourselves wins over what a library made of it."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, TrainerError):
            return cause.error_class, shorten(str(cause))
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return ErrorClass.INTERNAL, shorten(f"{type(error).__name__}: {error}")


def shorten(text: str, *, limit: int = MAX_MESSAGE) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
