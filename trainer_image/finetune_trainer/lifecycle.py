"""The border of the process: environment in, exit code, report and last line out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from finetune_trainer import (
    artifacts,
    checkpoints,
    early_fit,
    machine,
    preflight,
    pulse,
    runfile,
    signals,
    storage,
)
from finetune_trainer.failures import (
    EXIT_CODES,
    BadConfig,
    ErrorClass,
    Preempted,
    Stopped,
    StorageFailed,
    TrainerError,
    classify,
    is_full,
)
from finetune_trainer.progress import RESULT_PATIENCE, Endpoint, Phase, Reporter, say

# manifest.json's names and those of reports
METRICS = {
    "loss": "loss",
    "evalLoss": "eval_loss",
    "reward": "reward",
    "evalReward": "eval_reward",
    "kl": "kl",
    "accuracy": "accuracy",
    "evalAccuracy": "eval_accuracy",
}
PREEMPTED_PATIENCE = 3.0  # seconds: the process is about to be killed, and its exit code says the same


Task: TypeAlias = Callable[[runfile.RunFile, Reporter], dict[str, Any]]
"""What is done with a run file. Returns the result that is reported; raises TrainerError."""


def run_job(run_file: Path, task: Task | None = None) -> int:
    """Runs what the run file says, or does another task with it, and returns the exit code; reports the result wherever
    it can."""
    reporter = Reporter(Endpoint.from_environment())
    if task is inspect:
        reporter.update(inspection=True)
    try:
        signals.check()
        run = runfile.load(run_file)
        with pulse.heard_by(reporter.beat):
            result = (task or train)(run, reporter)
    except Stopped as stopped:
        text = f"{stopped} at step {reporter.step}; nothing was committed"
        if stopped.signal_number != signal.SIGTERM:
            say(text, file=sys.stderr)
            return 128 + stopped.signal_number  # a person's Ctrl-C
        result = _failed(Preempted(text), reporter)
    except Exception as error:
        result = _failed(error, reporter)
    preempted = result["class"] is ErrorClass.PREEMPTED
    if preempted:
        signals.ignore_more()
    say(f"TRAINER_RESULT {json.dumps(result, ensure_ascii=False)}")
    # Asked to end while the operator is away: code and last line say the same.
    with contextlib.suppress(Stopped):
        reporter.finish(result, patience=PREEMPTED_PATIENCE if preempted else RESULT_PATIENCE)
    signals.ignore_more()
    return int(result["exitCode"])


def train(run: runfile.RunFile, reporter: Reporter) -> dict[str, Any]:
    """Trains and commits the artifact."""
    return _succeeded(_train(run, reporter))


def check(run: runfile.RunFile, reporter: Reporter) -> dict[str, Any]:
    """Looks for what would end the training early, without a GPU and without claiming a folder."""
    prepare_environment(run.uris())
    reporter.update(phase=Phase.VALIDATING)
    with _work_folder() as work:
        found = early_fit.check(run, work)
    say(found)
    return {"class": ErrorClass.CHECKED, "exitCode": 0, "message": found}


def inspect(run: runfile.RunFile, reporter: Reporter) -> dict[str, Any]:
    """Reports the artifact; where there is none, the newest checkpoint that is whole."""
    folder = storage.open_folder(run.output.uri)
    read = partial(storage.persist, what=f"output.uri {folder.uri} could not be read")
    if run.checkpoint is not None and read(lambda: folder.read(artifacts.MANIFEST)) is None:
        _tell_checkpoint(checkpoints.Store(storage.open_folder(run.checkpoint.uri), run.job), reporter)
    artifact = read(lambda: artifacts.inspect(folder, run.job))
    _tell_committed(reporter, artifact)
    return _succeeded(artifact)


def _tell_checkpoint(store: checkpoints.Store, reporter: Reporter) -> None:
    for checkpoint in store.find():
        try:
            store.verify(checkpoint)
        except checkpoints.Corrupt as finding:
            store.mark_corrupt(checkpoint.step, str(finding))
            continue
        say(f"{checkpoint.uri} is whole")
        reporter.update(checkpoint=checkpoint.to_report(), step=checkpoint.step)
        return


def _tell_committed(reporter: Reporter, artifact: artifacts.Artifact) -> None:
    """Reports training as it stood when the artifact was committed: this process took no step itself."""
    reporter.update(
        phase=Phase.EXPORTING,
        step=artifact.step,
        total_steps=artifact.step,
        epoch=artifact.metrics.get("epoch", 0.0),
        tokens_per_second=artifact.metrics.get("tokensPerSecond"),
        metrics={METRICS[name]: value for name, value in artifact.metrics.items() if name in METRICS},
    )


def _train(run: runfile.RunFile, reporter: Reporter) -> artifacts.Artifact:
    """Claims the output, checks, trains, commits. A claim that did not end in a commit is taken back."""
    prepare_environment(run.uris())
    folder = storage.open_folder(run.output.uri)
    store = None
    if run.checkpoint is not None:
        store = checkpoints.Store(storage.open_folder(run.checkpoint.uri), run.job)
    committed = artifacts.claim_folder(folder, run.job)
    if committed is not None:
        artifacts.inspect(folder, run.job)
        say(f"{folder.uri} holds the whole artifact of this job already")
        _tell_committed(reporter, committed)
        _clear(store)
        return committed
    try:
        if store is not None:
            store.claim()
        with _work_folder() as work:
            artifact = _train_into(folder, run, work, reporter, store)
    except BaseException:
        _release(folder, run.job)
        raise
    reporter.update(checkpoint=None)
    _clear(store)
    return artifact


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    """A folder for this process alone. Raises StorageFailed, which names it, when its disk is full; BadConfig where
    there can be none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="finetune-")
    except OSError as error:
        text = storage.NO_WORK_FOLDER.format(error)
        raise (StorageFailed if is_full(error) else BadConfig)(text) from error
    try:
        yield Path(folder.name)
    except Exception as error:
        if isinstance(error, TrainerError) or not is_full(error):
            raise
        place = getattr(error, "filename", None) or f"{folder.name} (TMPDIR)"
        text = f"{place} could not be written ({storage.describe_error(error)}); {storage.MORE_ROOM}"
        raise StorageFailed(text) from error
    finally:
        with signals.noted():  # a second SIGTERM would leave half of a downloaded model
            folder.cleanup()


def _train_into(
    folder: storage.Folder,
    run: runfile.RunFile,
    work: Path,
    reporter: Reporter,
    store: checkpoints.Store | None,
) -> artifacts.Artifact:
    reporter.update(phase=Phase.VALIDATING)
    checked = preflight.check(run, work)
    say(f"checked: {len(checked.train)} rows to train on, {len(checked.held_out)} held out")
    reporter.update(
        effective={
            "datasetDigest": checked.dataset_digest,
            "trainRows": len(checked.train),
            "evalRows": len(checked.held_out),
            **({} if checked.revision is None else {"modelRevision": checked.revision}),
        }
    )
    from finetune_trainer import train  # seconds of imports; everything cheap has been checked

    manifest = train.train(run, checked, work=work, reporter=reporter, store=store)
    artifact = artifacts.commit(folder, work / "artifact", manifest, run.job)
    say(f"committed {artifact.uri} ({artifact.size_bytes} bytes, {artifact.digest})")
    return artifact


def _clear(store: checkpoints.Store | None) -> None:
    """Removes the checkpoints of a committed artifact; the job has succeeded, whether that works or not."""
    if store is None:
        return
    try:
        store.clear()
    except Exception as error:  # any store's own types; nothing after the commit may fail the job
        say(f"{store.folder.uri} could not be removed: {error}", file=sys.stderr)


def _release(folder: storage.Folder, job: runfile.Job) -> None:
    try:
        artifacts.release_folder(folder, job)
    except Exception as error:  # any store's own types; the first error is the one to report
        say(f"{folder.uri} could not be cleaned up: {error}", file=sys.stderr)


def prepare_environment(uris: list[str]) -> None:
    """Sets what the libraries read when they are imported; must run before them."""
    machine.prepare_libraries()
    # transformers' own callback reports 100 % on an early stop; ours does not.
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process uses one GPU; TRL refuses to see more
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to 1; threads are set by choose_threads
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels at import
    # TRL uses names that transformers will drop; nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not any(storage.is_hub(uri) for uri in uris):
        os.environ["HF_HUB_OFFLINE"] = "1"


def _succeeded(artifact: artifacts.Artifact) -> dict[str, Any]:
    metrics = {name: artifact.metrics[name] for name in METRICS if name in artifact.metrics}
    return {
        "class": ErrorClass.SUCCEEDED,
        "exitCode": 0,
        "message": f"artifact committed to {artifact.uri}",
        "step": artifact.step,
        "artifact": artifact.to_report(),
        "metrics": metrics,
    }


def _failed(error: Exception, reporter: Reporter) -> dict[str, Any]:
    error_class, message = classify(error)
    if error_class is ErrorClass.INTERNAL and not isinstance(error, TrainerError):
        # Nothing that we know of: its place tells more than its message.
        say("".join(traceback.format_exception(error)), file=sys.stderr)
    last = reporter.checkpoint
    if error_class is ErrorClass.NOT_FINITE and last is not None:
        message = f"{message}. The last finite checkpoint is {last['uri']}"
    say(f"{error_class}: {message}", file=sys.stderr)
    return {
        "class": error_class,
        "exitCode": EXIT_CODES[error_class],
        "message": message,
        "step": reporter.step,
    }
