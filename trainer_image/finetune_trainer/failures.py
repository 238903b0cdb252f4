"""Why a run can end, and the exit code of each class; docs/exit-codes.md is the same table for people."""

from __future__ import annotations

import errno
import re
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum


class ErrorClass(StrEnum):
    SUCCEEDED = "Succeeded"
    CHECKED = "Checked"  # by finetune-trainer check: nothing speaks against training
    BAD_CONFIG = "BadConfig"  # the run file contradicts itself, the model or the output folder
    BAD_DATA = "BadData"  # a data file is missing, unreadable or does not say what its format asks for
    MODEL_NOT_FOUND = (
        "ModelNotFound"  # the base model is not where model.uri says, or cannot be used as it is
    )
    STORAGE = "Storage"  # a disk or an object store failed or is full, also after a few tries
    PREEMPTED = "Preempted"  # asked to stop (SIGTERM) before training was over
    GPU_OUT_OF_MEMORY = "GpuOutOfMemory"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    NOT_FINITE = "NotFinite"  # loss or gradient became NaN or infinite
    COLLECTIVE = "Collective"  # NCCL or gloo: processes lost one another
    CHECKPOINT_CORRUPT = "CheckpointCorrupt"  # a checkpoint could not be loaded and is not used again
    INTERNAL = "Internal"  # everything else: a defect, or the machine


EXIT_CODES = {
    ErrorClass.SUCCEEDED: 0,
    ErrorClass.CHECKED: 0,
    ErrorClass.BAD_CONFIG: 64,
    ErrorClass.BAD_DATA: 65,
    ErrorClass.MODEL_NOT_FOUND: 66,
    ErrorClass.STORAGE: 74,
    ErrorClass.PREEMPTED: 75,
    ErrorClass.GPU_OUT_OF_MEMORY: 80,
    ErrorClass.HOST_OUT_OF_MEMORY: 81,
    ErrorClass.NOT_FINITE: 82,
    ErrorClass.COLLECTIVE: 83,
    ErrorClass.CHECKPOINT_CORRUPT: 84,
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


class StorageFailed(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.STORAGE


class Preempted(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.PREEMPTED


class CheckpointCorrupt(TrainerError):  # noqa: N818  named as users read it
    error_class = ErrorClass.CHECKPOINT_CORRUPT


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception, so that no library handler swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


# ---------------------------------------------------------------- classes of other people's errors

GPU_MEMORY = re.compile(r"(CUDA|HIP|XPU)( error:)? out of memory|CU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED")
HOST_MEMORY = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory")
# torch and safetensors raise their own types when a local disk is full.
FULL_TEXT = re.compile(
    r"No space left on device|os error (27|28|122)\b|PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error"
)
FULL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
STORAGE_TEXT = re.compile(r"os error (5|116)\b")
COLLECTIVE_TEXT = re.compile(r"\bNCCL\b|ncclRemoteError|\bgloo\b|Connection closed by peer")
STORAGE_NUMBERS = {
    *FULL_NUMBERS,
    errno.EIO,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: InternalError, the 500 of S3
    errno.ESTALE,
    errno.EROFS,
    errno.ETIMEDOUT,
    errno.EBUSY,
}
STORAGE_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs"}


def classify(error: Exception) -> tuple[ErrorClass, str]:
    """Returns class and message of an error.

    A cause that we raised ourselves wins over what a library made of it; lack of memory wins over what it broke; lost
    connections between processes come last, because they are only what the others see of a cause elsewhere.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, TrainerError):
            return cause.error_class, shorten(str(cause))
    for error_class, matches in (
        (ErrorClass.GPU_OUT_OF_MEMORY, _lacks_gpu_memory),
        (ErrorClass.HOST_OUT_OF_MEMORY, _lacks_host_memory),
        (ErrorClass.STORAGE, is_storage_trouble),
        (ErrorClass.COLLECTIVE, _lost_a_process),
    ):
        for cause in causes:
            if matches(cause):
                return error_class, shorten(f"{type(cause).__name__}: {cause}")
    return ErrorClass.INTERNAL, shorten(f"{type(error).__name__}: {error}")


def is_storage_trouble(error: BaseException) -> bool:
    """Whether a disk or store failed in a way that may pass; a wrong path or missing rights are not of that kind."""
    if type(error).__module__.partition(".")[0] in STORAGE_LIBRARIES:  # first: some of aiohttp's are OSErrors
        return True
    if isinstance(error, OSError):
        return error.errno in STORAGE_NUMBERS or isinstance(error, (ConnectionError, TimeoutError))
    return is_full(error) or STORAGE_TEXT.search(str(error)) is not None


def is_full(error: BaseException) -> bool:
    """Whether a local disk did not take what was written."""
    if isinstance(error, OSError):
        return error.errno in FULL_NUMBERS
    return FULL_TEXT.search(str(error)) is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__


def _lacks_gpu_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: it takes seconds
    return (torch is not None and isinstance(error, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and GPU_MEMORY.search(str(error)) is not None
    )


def _lacks_host_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and HOST_MEMORY.search(str(error)) is not None


def _lost_a_process(error: BaseException) -> bool:
    return type(error).__name__ == "DistBackendError" or (
        isinstance(error, RuntimeError) and COLLECTIVE_TEXT.search(str(error)) is not None
    )


def shorten(text: str, *, limit: int = MAX_MESSAGE) -> str:
    text = text.encode(errors="backslashreplace").decode()  # names of files may hold what UTF-8 has not
    return text if len(text) <= limit else text[: limit - 1] + "…"
