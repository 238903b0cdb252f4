"""Eyes on a running cluster: every stored status of every job, every pod and process, and what must always hold.

Used around the whole course of a test. What it reads are watches, so no state that was stored is missed, however short,
but for those of the moment in which an API server is restarted.
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
AUDIENCE = naming.audience("")
UNSEEN = {"observedGeneration": -1}  # the status that the CRD gives to what the operator has not seen
Pod = tuple[str, str | None, str]
"""Job, its UID where the pod tells it, and attempt."""


@dataclass
class Observer:
    """`histories`: all stored statuses of a job, in order. `wrong`: what must not be, as sentences. `interval`: steps
    between two checkpoints; no more may be lost at once."""

    namespace: str
    interval: int | None = None
    histories: dict[str, list[Json]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    most_alive: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Pods of a job that were alive at once."""
    begun_anew: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    """UID of a job and attempt -> how often its status says that the process began again within the attempt."""
    last_seen: dict[str, Json] = field(default_factory=dict)
    """UID -> each job as it was last, also when it is deleted."""

    def __post_init__(self) -> None:
        self._jobs: dict[str, Json] = {}
        self._pods: dict[str, Pod] = {}
        self._processes: dict[tuple[int, float], trainers.Work | None] = {}

    def phases(self, job: str) -> list[str]:
        """The phases that the job went through, without repetitions."""
        return _without_repetitions([status.get("phase", "") for status in self.histories[job]])

    def reasons(self, job: str) -> list[str]:
        return _without_repetitions([status.get("reason", "") for status in self.histories[job]])

    def note_job(self, event: str, body: Json) -> None:
        name = body["metadata"]["name"]
        before = self._jobs.get(name)
        if event == "DELETED":
            self._jobs.pop(name, None)
            return
        if body.get("status") == UNSEEN:
            body = {key: part for key, part in body.items() if key != "status"}
        status = body.get("status", {})
        uid = body["metadata"]["uid"]
        self._jobs[name] = self.last_seen[uid] = body
        known = before is not None and before["metadata"]["uid"] == uid
        old = before.get("status", {}) if before is not None and known else {}
        found = wrong_step(old, status, spec=body["spec"], missed=not known or event == "LISTED")
        self.wrong += [f"{name}: {text}" for text in [*found, *self._wrong_losses(uid, old, status)]]
        if status and (not self.histories[name] or self.histories[name][-1] != status):
            self.histories[name].append(status)

    def _wrong_losses(self, uid: str, old: Json, new: Json) -> Iterator[str]:
        """No process loses more than what it did since a checkpoint."""
        if began_anew(old, new) and "endTime" not in _last(new):
            self.begun_anew[uid, _last(new)["number"]] += 1
        for attempt in new.get("attempts", []) if self.interval else ():
            processes = 1 + self.begun_anew.get((uid, attempt["number"]), 0)
            if self.interval and attempt.get("lostSteps", 0) > self.interval * processes:
                yield f"attempt {attempt['number']} lost {attempt['lostSteps']} steps with {processes} processes"

    def note_pod(self, event: str, body: Json) -> None:
        """Only one attempt of a job may have pods, also where another job had its name before: they may still write."""
        metadata = body["metadata"]
        job, attempt = metadata["labels"][naming.LABEL_JOB], metadata["labels"][naming.LABEL_ATTEMPT]
        over = body.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if event == "DELETED" or over:
            self._pods.pop(metadata["uid"], None)
            return
        self._pods[metadata["uid"]] = (job, job_uid(body), attempt)
        alive = [(uid, number) for other, uid, number in self._pods.values() if other == job]
        self.most_alive[job] = max(self.most_alive[job], len(alive))
        if len({number for _, number in alive}) > 1 or len({uid for uid, _ in alive if uid}) > 1:
            self.wrong.append(f"{job}: pods of attempts {sorted(set(map(str, alive)))} at once")

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


def job_uid(pod: Json) -> str | None:
    """Of the FineTuneJob for which a pod may report: the audience of its token."""
    for volume in pod["spec"].get("volumes", []):
        for source in volume.get("projected", {}).get("sources", []):
            audience = source.get("serviceAccountToken", {}).get("audience", "")
            if audience.startswith(AUDIENCE):
                return str(audience.removeprefix(AUDIENCE))
    return None


def wrong_step(old: Json, new: Json, *, spec: Json, missed: bool = False) -> list[str]:
    """What must not be, between two stored statuses of one job that follow on one another; `missed`: there may have
    been others between them."""
    found = [*_wrong_end(old, new), *_wrong_words(new)]
    if not missed:
        found += [*_wrong_attempts(old, new), *_wrong_steps(old, new)]
    return [*found, *_wrong_budgets(old, new, spec.get("retry", {}), missed=missed)]


def _wrong_end(old: Json, new: Json) -> Iterator[str]:
    if old.get("phase") in FINAL:
        for name in sorted((old.keys() | new.keys()) - {"observedGeneration", "lastAction"}):
            if old.get(name) != new.get(name):
                yield f"{name} changed after the end: {old.get(name)} -> {new.get(name)}"
    if old and not new:
        yield "the status was removed"
    for name in ("startTime", "observedGeneration"):
        if name in old and (name not in new or new[name] < old[name]):
            yield f"{name} went back: {old[name]} -> {new.get(name)}"
    if new.get("suspendedSeconds", 0) < old.get("suspendedSeconds", 0):
        yield "suspendedSeconds went back"


def _wrong_attempts(old: Json, new: Json) -> Iterator[str]:
    before = {attempt["number"]: attempt for attempt in old.get("attempts", [])}
    after = {attempt["number"]: attempt for attempt in new.get("attempts", [])}
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
        # While an inspection looks for what an attempt left, its trainer may still be heard.
        open_ended = number == first and "inspection" in before[number] and "nextAttemptTime" not in old
        if then not in (None, now) and now not in ("Succeeded", "Cancelled") and not open_ended:
            yield f"attempt {number} ended {then} and now {now}"
        if "endTime" in after[number] and after[number]["endTime"] < after[number]["startTime"]:
            yield f"attempt {number} ended before it began"


def began_anew(old: Json, new: Json) -> bool:
    """Whether a process of the same attempt says that it began behind where the one before it was."""
    before, after = _last(old), _last(new)
    if not before or before["number"] != after.get("number"):
        return False
    return bool(after.get("lostSteps", 0) > before.get("lostSteps", 0))


def _wrong_steps(old: Json, new: Json) -> Iterator[str]:
    """Steps go back only when a process says where it goes on."""
    before, after = _last(old), _last(new)
    same = bool(before) and before["number"] == after.get("number")
    if began_anew(old, new) or (same and before.get("resumedFromStep") != after.get("resumedFromStep")):
        return
    for name in ("progress", "checkpoint"):
        then, now = old.get(name, {}).get("step", 0), new.get(name, {}).get("step", 0)
        if now < then and not (name == "checkpoint" and new.get("phase") == "Succeeded"):
            yield f"{name}.step went back: {then} -> {now} in attempt {after.get('number')}"


def _last(status: Json) -> Json:
    attempts: list[Json] = status.get("attempts", [])
    return attempts[-1] if attempts else {}


def _wrong_budgets(old: Json, new: Json, retry: Json, *, missed: bool) -> Iterator[str]:
    limits = {
        "user": retry["maxUserRetries"],
        "infrastructure": retry["maxInfraRetries"],
        "preemption": retry["preemptions"],
    }
    for name, limit in limits.items():
        before, after = old.get("retries", {}).get(name, 0), new.get("retries", {}).get(name, 0)
        if after not in (before, before + 1) and not (missed and after > before):
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
def observe(
    cluster: Cluster, namespace: str, *, processes: bool = True, interval: int | None = None
) -> Iterator[Observer]:
    """Watch the namespace until the end of the block, and fail there if anything was wrong."""
    observer, stop, ready = Observer(namespace, interval), threading.Event(), threading.Event()
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
                note("LISTED", body)
            listed.set()
            async for event in api.watch(path, version=found["metadata"]["resourceVersion"]):
                if event["type"] == "ERROR":
                    break
                known[event["object"]["metadata"]["uid"]] = event["object"]
                note(event["type"], event["object"])
        except kubeapi.ApiError:  # the API server is being restarted
            await asyncio.sleep(0.3)
