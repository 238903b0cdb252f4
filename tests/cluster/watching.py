"""Eyes on the cluster around every test: no attempt runs twice, and what has ended stays ended.

The watches go through `kubectl proxy`, which logs in as the kubeconfig says. Where the node is this machine, the
processes in its pods are looked at, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from finetune_local import binaries, kubeaio
from finetune_operator.manifests import naming
from tests import observers
from tests.clients import Json

RAYJOBS = "/apis/ray.io/v1/namespaces/{}/rayjobs?labelSelector=" + naming.LABEL_JOB.replace("/", "%2F")
JOB_NAME = "batch.kubernetes.io/job-name"
SUBMITTERS = "/api/v1/namespaces/{}/pods?labelSelector=" + JOB_NAME.replace("/", "%2F")
START_SECONDS = 20
# It only reads, so one that was lost before it told anything is made again under its name.
_INSPECTION = re.compile(r"-i[0-9]+(?: of |$)")


@dataclass
class Watcher(observers.Observer):
    """An observer that also knows what only real pods have, and counts how often each attempt was started.

    K8sJobMode submits from a pod of its own, and Ray starts the trainer as a process: both happen once.
    """

    started: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """What was seen of each attempt, by what it is: its RayJobs, its submitters, its trainers."""
    shown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What KubeRay has shown of each RayJob, in order: deployment status / job status, reason."""
    failure: BaseException | None = None
    """What made the watches end too soon."""

    def note_rayjob(self, event: str, body: Json) -> None:
        del event
        (owner,) = body["metadata"]["ownerReferences"]
        name = body["metadata"]["name"]
        self._count("RayJob", f"{name} of {owner['uid']}", body["metadata"]["uid"])
        status = body.get("status", {})
        words = [status.get(word, "") for word in ("jobDeploymentStatus", "jobStatus", "reason")]
        if (shown := "{} / {}, {}".format(*words)) not in self.shown[name][-1:]:
            self.shown[name].append(shown)

    def note_submitter(self, event: str, body: Json) -> None:
        del event
        self._count("submitter", body["metadata"]["labels"][JOB_NAME], body["metadata"]["uid"])

    def look_at_processes(self) -> None:
        super().look_at_processes()
        for (pid, birth), work in list(self._processes.items()):
            if work is not None and work[0] == self.namespace and _is_trainer(pid):
                self._count("trainer", f"{work[1]}-a{work[2]}", f"{pid} {birth}")

    def trainers(self, job: str, attempt: int) -> int:
        """How many trainers of an attempt were seen: one that lives for less than half a second may be missed."""
        return len(self.started[f"trainer {job}-a{attempt}"])

    def percents(self, job: str) -> list[int]:
        return [status["progress"]["percent"] for status in self.histories[job] if "progress" in status]

    def check(self) -> None:
        """Fails where something was wrong since the last check, or where nobody looked."""
        assert self.failure is None, f"the watches ended: {self.failure!r}"
        wrong, self.wrong = self.wrong, []
        assert not wrong, "\n".join(dict.fromkeys(wrong))

    def _count(self, what: str, attempt: str, identity: str) -> None:
        seen = self.started[f"{what} {attempt}"]
        if identity not in seen:
            seen.add(identity)
            if len(seen) > 1 and _INSPECTION.search(attempt) is None:
                self.wrong.append(f"{what} of {attempt}: {len(seen)} of them")


def _is_trainer(pid: int) -> bool:
    """Whether a process is the one that Ray started, rather than its shell or a helper that it forked."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return _runs_trainer(process) and not _runs_trainer(process.parent())
    return False


def _runs_trainer(process: psutil.Process | None) -> bool:
    words = process.cmdline() if process is not None else []
    return len(words) > 2 and words[1].endswith("/finetune-trainer") and words[2] == "run"


# ---------------------------------------------------------------- the watches


@contextlib.contextmanager
def watch(kubeconfig: Path, namespace: str, *, processes: bool) -> Iterator[Watcher]:
    """Watch the namespace until the end of the block."""
    watcher, stop, ready = Watcher(namespace), threading.Event(), threading.Event()
    program = binaries.find_kubectl(binaries.Sources.from_environment(), announce=print, detail=print)
    command = [str(program), f"--kubeconfig={kubeconfig}", "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        thread = threading.Thread(
            target=_run,
            args=(watcher, _address(proxy), stop, ready),
            kwargs={"processes": processes},
            daemon=True,
        )
        thread.start()
        try:
            assert ready.wait(START_SECONDS), f"the watches do not start: {watcher.failure!r}"
            yield watcher
        finally:
            stop.set()
            thread.join(timeout=START_SECONDS)
            proxy.terminate()


def _address(proxy: subprocess.Popen[str]) -> str:
    """Where the proxy listens: it says so in its first line."""
    assert proxy.stdout is not None
    line = proxy.stdout.readline()
    assert "Starting to serve on " in line, line
    return "http://" + line.split()[-1]


def _run(watcher: Watcher, *arguments: Any, **options: Any) -> None:
    try:
        asyncio.run(_watch(watcher, *arguments, **options))
    except BaseException as error:  # told by the next check
        watcher.failure = error


async def _watch(
    watcher: Watcher, server: str, stop: threading.Event, ready: threading.Event, *, processes: bool
) -> None:
    notes = {
        observers.JOBS: watcher.note_job,
        observers.PODS: watcher.note_pod,
        RAYJOBS: watcher.note_rayjob,
        SUBMITTERS: watcher.note_submitter,
    }
    async with kubeaio.AsyncApi(server, ssl.create_default_context()) as api, asyncio.TaskGroup() as tasks:
        listed = []
        following = []
        for path, note in notes.items():
            listed.append(asyncio.Event())
            following.append(
                tasks.create_task(observers._follow(api, path.format(watcher.namespace), note, listed[-1]))
            )
        for event in listed:
            await event.wait()
        ready.set()
        while not stop.is_set():
            if processes:
                await asyncio.to_thread(watcher.look_at_processes)
            await asyncio.sleep(observers.LOOK_SECONDS)
        for task in following:
            task.cancel()
