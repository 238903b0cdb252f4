"""Eyes on a running cluster: every stored status of every job, every pod and process, and what must always hold.

Used around the whole course of a test. What it reads are watches, so no state that was stored is missed, however short.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from finetune_local import kubeaio, kubeapi
from finetune_local.cluster import Cluster
from finetune_operator.manifests import naming
from tests import trainers
from tests.clients import FINAL

Json = dict[str, Any]
JOBS = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
PODS = "/api/v1/namespaces/{}/pods?labelSelector=" + naming.LABEL_JOB.replace("/", "%2F")
LOOK_SECONDS = 0.5  # between two looks at the processes


@dataclass
class Observer:
    """`histories`: all stored statuses of a job, in order. `wrong`: what must not be, as sentences."""

    namespace: str
    histories: dict[str, list[Json]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    most_alive: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Pods of a job that were alive at once."""

    def __post_init__(self) -> None:
        self._jobs: dict[str, Json] = {}
        self._pods: dict[str, tuple[str, str]] = {}
        self._processes: dict[tuple[int, float], trainers.Work | None] = {}

    def phases(self, job: str) -> list[str]:
        """The phases that the job went through, without repetitions."""
        return _without_repetitions([status.get("phase", "") for status in self.histories[job]])

    def reasons(self, job: str) -> list[str]:
        return _without_repetitions([status.get("reason", "") for status in self.histories[job]])

    def note_job(self, event: str, body: Json) -> None:
        name, status = body["metadata"]["name"], body.get("status", {})
        before = self._jobs.get(name)
        if event == "DELETED":
            self._jobs.pop(name, None)
            return
        self._jobs[name] = body
        if before is not None and before["metadata"]["uid"] == body["metadata"]["uid"]:
            found = wrong_step(before.get("status", {}), status, spec=body["spec"])
            self.wrong += [f"{name}: {text}" for text in found]
        if status and (not self.histories[name] or self.histories[name][-1] != status):
            self.histories[name].append(status)

    def note_pod(self, event: str, body: Json) -> None:
        """Only one attempt of a job may have pods: such a pod may still write."""
        metadata = body["metadata"]
        job, attempt = metadata["labels"][naming.LABEL_JOB], metadata["labels"][naming.LABEL_ATTEMPT]
        over = body.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if event == "DELETED" or over:
            self._pods.pop(metadata["uid"], None)
            return
        self._pods[metadata["uid"]] = (job, attempt)
        alive = [number for other, number in self._pods.values() if other == job]
        self.most_alive[job] = max(self.most_alive[job], len(alive))
        if len(set(alive)) > 1:
            self.wrong.append(f"{job}: pods of attempts {sorted(set(alive))} at once")

    def look_at_processes(self) -> None:
        """Only one attempt of a job may have processes."""
        found: dict[str, set[int]] = defaultdict(set)
        known = self._processes
        self._processes = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                identity = (process.pid, process.create_time())
                # A process that has just been forked has its parent's environment until it becomes the trainer.
                work = known.get(identity) or trainers.work_of(process)
                self._processes[identity] = work
                if work and work[0] == self.namespace and process.status() != psutil.STATUS_ZOMBIE:
                    found[work[1]].add(work[2])
        self.wrong += [f"{job}: processes of attempts {n} at once" for job, n in found.items() if len(n) > 1]


def wrong_step(old: Json, new: Json, *, spec: Json) -> list[str]:
    """What must not be, between two stored statuses of one job that follow on one another."""
    return [
        *_wrong_end(old, new),
        *_wrong_attempts(old.get("attempts", []), new.get("attempts", [])),
        *_wrong_budgets(old, new, spec.get("retry", {})),
        *_wrong_words(new),
    ]


def _wrong_end(old: Json, new: Json) -> Iterator[str]:
    if old.get("phase") in FINAL:
        for name in ("phase", "reason", "message", "completionTime", "artifact", "attempts"):
            if old.get(name) != new.get(name):
                yield f"{name} changed after the end: {old.get(name)} -> {new.get(name)}"
    if old and not new:
        yield "the status was removed"
    for name in ("startTime", "observedGeneration"):
        if name in old and (name not in new or new[name] < old[name]):
            yield f"{name} went back: {old[name]} -> {new.get(name)}"
    if new.get("suspendedSeconds", 0) < old.get("suspendedSeconds", 0):
        yield "suspendedSeconds went back"


def _wrong_attempts(old: list[Json], new: list[Json]) -> Iterator[str]:
    before = {attempt["number"]: attempt for attempt in old}
    after = {attempt["number"]: attempt for attempt in new}
    first, last = max(before, default=0), max(after, default=0)
    if last not in (first, first + 1):
        yield f"from attempt {first} to attempt {last}"
    if last > first > 0 and "endTime" not in before[first]:
        yield f"attempt {last} was recorded before attempt {first} had ended"
    for number in before.keys() & after.keys():
        for name in ("startTime", "rayJob", "uid", "endTime"):
            if name in before[number] and before[number][name] != after[number].get(name):
                yield f"{name} of attempt {number} changed"
        then, now = before[number].get("class"), after[number].get("class")
        if then is not None and then != now and now not in ("Succeeded", "Cancelled"):
            yield f"attempt {number} ended {then} and now {now}"
        if "endTime" in after[number] and after[number]["endTime"] < after[number]["startTime"]:
            yield f"attempt {number} ended before it began"


def _wrong_budgets(old: Json, new: Json, retry: Json) -> Iterator[str]:
    limits = {
        "user": retry["maxUserRetries"],
        "infrastructure": retry["maxInfraRetries"],
        "preemption": retry["preemptions"],
    }
    for name, limit in limits.items():
        before, after = old.get("retries", {}).get(name, 0), new.get("retries", {}).get(name, 0)
        if after not in (before, before + 1):
            yield f"{name} retries: from {before} to {after}"
        if after > before and limit != "Unlimited" and after > int(limit):
            yield f"{name} retries: {after} of {limit}"


def _wrong_words(new: Json) -> Iterator[str]:
    if not new:
        return
    if not new.get("message") or not new.get("reason"):
        yield f"no word on why it is {new.get('phase')}"
    true = {condition["type"] for condition in new.get("conditions", []) if condition["status"] == "True"}
    final = {"Succeeded": {"Complete"}, "Failed": {"Failed"}, "Cancelled": {"Failed"}}
    if true & {"Complete", "Failed"} != final.get(new.get("phase", ""), set()):
        yield f"phase {new.get('phase')} with conditions {sorted(true)}"
    if (new.get("phase") == "Succeeded") != ("artifact" in new):
        yield f"phase {new.get('phase')} and artifact {new.get('artifact')}"


def _without_repetitions(words: list[str]) -> list[str]:
    return [word for number, word in enumerate(words) if number == 0 or words[number - 1] != word]


# ---------------------------------------------------------------- the watches


@contextlib.contextmanager
def observe(cluster: Cluster, namespace: str, *, processes: bool = True) -> Iterator[Observer]:
    """Watch the namespace until the end of the block, and fail there if anything was wrong."""
    observer, stop, ready = Observer(namespace), threading.Event(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_watch(observer, cluster, stop, ready, processes=processes)), daemon=True
    )
    thread.start()
    assert ready.wait(20), "the watches do not start"
    try:
        yield observer
    finally:
        stop.set()
        thread.join(timeout=20)
    assert not observer.wrong, "\n".join(dict.fromkeys(observer.wrong))


async def _watch(
    observer: Observer, cluster: Cluster, stop: threading.Event, ready: threading.Event, *, processes: bool
) -> None:
    server = f"https://127.0.0.1:{cluster.ports['kube-apiserver']}"
    async with kubeaio.AsyncApi(server, kubeapi.client_context(cluster.layout.pki, "admin")) as api:
        listed = [asyncio.Event(), asyncio.Event()]
        tasks = [
            asyncio.create_task(_follow(api, JOBS.format(observer.namespace), observer.note_job, listed[0])),
            asyncio.create_task(_follow(api, PODS.format(observer.namespace), observer.note_pod, listed[1])),
        ]
        try:
            for event in listed:
                await asyncio.wait_for(event.wait(), 20)
            ready.set()
            while not stop.is_set():
                if processes:
                    await asyncio.to_thread(observer.look_at_processes)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in tasks:
                task.cancel()


async def _follow(api: kubeaio.AsyncApi, path: str, note: Any, listed: asyncio.Event) -> None:
    """Every object of a collection, now and at each change; after a break the list is read again."""
    known: dict[str, Json] = {}
    while True:
        try:
            found = await api.call("GET", path)
            present = {body["metadata"]["uid"] for body in found["items"]}
            for uid in known.keys() - present:
                note("DELETED", known.pop(uid))
            for body in found["items"]:
                known[body["metadata"]["uid"]] = body
                note("MODIFIED", body)
            listed.set()
            async for event in api.watch(path, version=found["metadata"]["resourceVersion"]):
                if event["type"] == "ERROR":
                    break
                known[event["object"]["metadata"]["uid"]] = event["object"]
                note(event["type"], event["object"])
        except kubeapi.ApiError:  # the API server is being restarted
            await asyncio.sleep(0.3)
