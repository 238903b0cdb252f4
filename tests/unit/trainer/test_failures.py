"""Classes of failure, found in the errors that the libraries really raise."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from finetune_trainer import folders, lifecycle, preflight, signals, storage
from finetune_trainer.failures import (
    BadConfig,
    ErrorClass,
    NotFinite,
    StorageFailed,
    classify,
    is_storage_trouble,
)
from finetune_trainer.methods import hub
from finetune_trainer.runfile import Source


def raised(action: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # which one is what the tests are about
        action()
    return caught.value


def test_a_message_can_be_printed_whatever_the_name_of_a_file() -> None:
    _, message = classify(StorageFailed(f"{os.fsdecode(bytes([0x61, 0xE9]))} cannot be written"))
    assert message == r"a\udce9 cannot be written"


def test_no_memory_on_the_host() -> None:
    import numpy as np
    import torch

    for action in (
        lambda: torch.empty(1 << 60),
        lambda: np.empty(1 << 50),
        lambda: bytearray(1 << 62),
    ):
        error_class, message = classify(raised(action))
        assert error_class is ErrorClass.HOST_OUT_OF_MEMORY, message


def test_no_memory_on_the_gpu() -> None:
    import torch

    # Texts of PyTorch 2.13 on a GPU; the first is what the allocator raises, the others come from its libraries.
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert classify(error)[0] is ErrorClass.GPU_OUT_OF_MEMORY


def test_a_full_disk() -> None:
    import safetensors.torch
    import torch

    def write_all() -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x" * 100_000)

    tensors = {"a": torch.zeros(100_000)}
    for action in (
        write_all,
        lambda: torch.save(tensors, "/dev/full"),
        lambda: torch.save(tensors, "/dev/full", _use_new_zipfile_serialization=False),
    ):
        error_class, message = classify(raised(action))
        assert error_class is ErrorClass.STORAGE, message
    # safetensors writes to a temporary file beside the target, so a full disk is not to be had here.
    for text in ("No space left on device (os error 28)", "File too large (os error 27)"):
        error = safetensors.SafetensorError(f"Error while serializing: I/O error: {text}")
        assert classify(error)[0] is ErrorClass.STORAGE
    assert classify(RuntimeError("basic_ios::clear: iostream error"))[0] is ErrorClass.STORAGE  # torch.save


def test_a_full_work_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device")
    message = rf"{tmp_path}.* \(TMPDIR\) could not be written \(No space left on device\); give the pod more"
    with pytest.raises(StorageFailed, match=message), lifecycle._work_folder():
        raise full
    assert re.search(rf"s3://b/x does not fit into {tmp_path} ", str(folders.unreadable("s3://b/x", full)))


def test_a_disk_without_any_place_for_temporary_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(BadConfig, match=r"no folder for temporary files .*none.* set TMPDIR"),
        signals.known_process(),
        lifecycle._work_folder(),
    ):
        pass
    assert "`finetune-trainer stop` will not find this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageFailed),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), StorageFailed),
        (PermissionError(errno.EACCES, "Permission denied"), BadConfig),
    ],
)
def test_a_cache_of_the_hub_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=r"model\.uri: hf://a/b cannot be written into the hub's cache /.*HF_HOME"):
        hub.fetch_model("hf://a/b", None)


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        errno.EFBIG,
        errno.EIO,
        errno.ESTALE,
        errno.EDQUOT,
        errno.EROFS,
        errno.ECONNRESET,
        errno.ETIMEDOUT,
    ],
)
def test_a_failing_disk_or_network(number: int) -> None:
    assert classify(OSError(number, os.strerror(number)))[0] is ErrorClass.STORAGE


@pytest.mark.parametrize("code", ["InternalError", "500", "SlowDown", "503", "RequestTimeout", "502"])
def test_an_answer_of_s3_that_may_be_another_next_time(code: str) -> None:
    from botocore.exceptions import ClientError  # type: ignore[import-untyped]
    from s3fs.errors import translate_boto_error

    answer = ClientError({"Error": {"Code": code, "Message": "Please try again."}}, "PutObject")
    assert is_storage_trouble(translate_boto_error(answer))


def test_a_missing_file_is_no_storage_trouble() -> None:
    assert classify(raised(lambda: Path("/nowhere/at/all").read_text()))[0] is ErrorClass.INTERNAL


def test_an_object_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    filesystem = fsspec.filesystem(
        "s3",
        key="a",
        secret="b",
        endpoint_url="http://127.0.0.1:9",
        skip_instance_cache=True,
        config_kwargs={"retries": {"max_attempts": 0}},  # botocore's own, beside those of s3fs
    )
    monkeypatch.setattr(filesystem, "retries", 1)
    assert classify(raised(lambda: filesystem.pipe_file("bucket/x", b"y")))[0] is ErrorClass.STORAGE


def test_a_store_that_aiohttp_cannot_reach() -> None:
    """Google's, and plain HTTP; some of these errors are OSErrors with a number that says nothing of storage."""
    import fsspec

    filesystem = fsspec.filesystem("http", skip_instance_cache=True)
    error = raised(lambda: filesystem.cat_file("http://127.0.0.1:9/rows.jsonl"))
    assert isinstance(error, OSError)
    assert is_storage_trouble(error)


def test_a_model_on_a_web_server_that_is_away_is_not_told_as_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"^model\.uri: http://127.0.0.1:9/tiny cannot be read \("):
        folders.fetch(
            "http://127.0.0.1:9/tiny", tmp_path, field="model.uri", credentials="in model.secretRef"
        )


def test_a_store_with_errors_of_its_own_is_told_with_the_field(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from botocore.exceptions import EndpointConnectionError

    def away(uri: str, folder: Path) -> Path:
        raise EndpointConnectionError(endpoint_url="http://s3.example")

    monkeypatch.setattr(storage, "fetch_folder", away)
    monkeypatch.setattr(storage, "fetch_file", away)
    with pytest.raises(StorageFailed, match=r"^model\.uri: s3://models/tiny cannot be read \(Endpoint"):
        folders.fetch("s3://models/tiny", tmp_path, field="model.uri", credentials="in model.secretRef")
    with pytest.raises(
        StorageFailed, match=r"^dataset\.sources: s3://data/rows\.jsonl cannot be read \(Endpoint"
    ):
        preflight.find_source(Source(uri="s3://data/rows.jsonl"), tmp_path)


def test_processes_that_lost_one_another(tmp_path: Path) -> None:
    import torch
    import torch.distributed as dist

    def join(rank: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{tmp_path}/rendezvous",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
        dist.all_reduce(torch.zeros(1))

    child = os.fork()
    if child == 0:
        join(1)
        os._exit(0)  # gone before the second exchange
    try:
        join(0)
        os.waitpid(child, 0)
        error_class, message = classify(raised(lambda: dist.all_reduce(torch.zeros(1 << 20))))
        assert error_class is ErrorClass.COLLECTIVE, message
    finally:
        dist.destroy_process_group()


def test_our_own_class_wins_over_what_a_library_made_of_it() -> None:
    def wrap() -> None:
        try:
            raise NotFinite("loss is nan")
        except NotFinite as error:
            raise RuntimeError("CUDA out of memory") from error

    assert classify(raised(wrap)) == (ErrorClass.NOT_FINITE, "loss is nan")
    assert classify(StorageFailed("disk"))[0] is ErrorClass.STORAGE


def test_memory_wins_over_the_connection_that_it_broke() -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:2345")
    assert classify(error)[0] is ErrorClass.COLLECTIVE
    error.__context__ = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    assert classify(error)[0] is ErrorClass.GPU_OUT_OF_MEMORY


def test_everything_else_is_internal() -> None:
    assert classify(KeyError("x")) == (ErrorClass.INTERNAL, "KeyError: 'x'")
