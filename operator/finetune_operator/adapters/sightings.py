"""What the watches told of, and what reads and writes answered: the newest known version of each object.

Nothing of it is believed for long without being heard of again, so that a watch that missed something does no harm.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pydantic_core

from finetune_operator.adapters import elapsed
from finetune_operator.adapters.kube import Json

BELIEF_SECONDS = 120.0  # for which an object of which nothing is heard is believed to be as it was
LONGEST_BELIEF_SECONDS = 300.0  # the same where the watch tells of others: it may have missed a deletion
PODS_SECONDS = 60.0  # the same for the pods of a job that does not run yet
LISTING_SECONDS = 5.0  # after which what a new list lacks is looked up
SURE_SECONDS = 1.0  # for which the answer to a write of ours is as good as what a read would tell
DEPARTED_SECONDS = 300.0  # for which a pod that the cluster took away is remembered with the reason
JOB_LABEL = "finetune.dev/job"
_NOT_ASKED_FOR = ("managedFields", "generateName", "selfLink")

Name = tuple[str, str, str, str]
"""API version, kind, namespace, name."""


@dataclass(frozen=True)
class _Known:
    uid: str
    version: int
    """-1 where versions cannot be compared."""
    text: bytes
    """JSON, deflated: a thirtieth of the memory of the parsed object."""
    heard: float
    sure: float = float("-inf")
    """When the API server answered a write of ours with this version, or one before it."""
    read: bool = False
    """Whether a read alone has told of this version. Whoever read it may have asked for another object's sake, so the
    watch event that follows is still news to the object's own pass."""

    def body(self) -> Json:
        parsed: Json = pydantic_core.from_json(zlib.decompress(self.text))
        return parsed


@dataclass(frozen=True)
class _Watch:
    told: float = float("-inf")
    """When it last told of anything."""
    listed: float = float("-inf")
    """When it last began with a list, which tells what is there and not what is gone."""


class Sightings:
    """The newest known version of each watched object, without what nobody here asks about. What is believed no more
    is dropped, so memory follows what happens and not what has ever been."""

    def __init__(self, *, clock: Callable[[], float] = elapsed.seconds) -> None:
        """`clock` counts sleep too: after that nothing is believed."""
        self._clock = clock
        self._known: OrderedDict[Name, _Known] = OrderedDict()  # what was heard of last is at the end
        self._watches: OrderedDict[tuple[str, str, str], _Watch] = OrderedDict()
        """By API version, kind and namespace; the latest that told of anything is at the end."""
        self._pods: dict[tuple[str, str], dict[Name, _Known]] = {}
        """By namespace and job; until they are deleted."""
        self._departed: OrderedDict[Name, _Known] = OrderedDict()  # pods that were taken away; oldest first

    def now(self) -> float:
        """Seconds of the clock that `asked` is by."""
        return self._clock()

    def __len__(self) -> int:
        return len(self._known) + sum(len(pods) for pods in self._pods.values())

    def notice(self, event_type: str | None, body: Mapping[str, Any]) -> bool:
        """Take note of a watch event; whether it says anything new. Of two versions the newer one counts, in whichever
        order they come: what we wrote ourselves is known from its answer."""
        key, now = name_of(body)[:3], self._clock()
        listed = now if event_type is None else self._watches.get(key, _Watch()).listed
        self._watches[key] = _Watch(told=now, listed=listed)
        self._watches.move_to_end(key)
        return self._take(event_type, body)

    def note(self, body: Mapping[str, Any], *, written: bool) -> None:
        """Take note of what the API server answered to a read, or to a write of ours."""
        self._take("MODIFIED", body, sure=self._clock() if written else float("-inf"), read=not written)

    def _take(
        self,
        event_type: str | None,
        body: Mapping[str, Any],
        *,
        sure: float = float("-inf"),
        read: bool = False,
    ) -> bool:
        self._drop_old()
        name, uid = name_of(body), body["metadata"]["uid"]
        place = self._place(body)
        known = place.get(name)
        if event_type == "DELETED":
            if _was_taken_away(body):
                self._departed[name] = _Known(uid, 0, _text(body), self._clock())
            if known is not None and known.uid == uid:
                del place[name]
            if place is not self._known and not place:
                del self._pods[_job_of(body)]
            return True
        version = _version(body)
        is_newer = known is None or known.uid != uid or not 0 <= version <= known.version
        if known is not None and known.uid == uid:
            sure = max(sure, known.sure)
        if is_newer or known is None:
            place[name] = _Known(uid, version, _text(body), self._clock(), sure, read)
        elif version == known.version:
            place[name] = replace(known, heard=self._clock(), sure=sure, read=known.read and read)
        if place is self._known:
            self._known.move_to_end(name)
        return is_newer or (known is not None and known.read)

    def forget(self, name: Name) -> None:
        self._known.pop(name, None)

    def get(self, name: Name, *, fresh: bool = False) -> Json | None:
        """What is believed; `fresh`: only what was certain a moment ago."""
        known = self._known.get(name)
        if known is None:
            return None
        now = self._clock()
        if fresh:
            return known.body() if now - known.sure <= SURE_SECONDS else None
        watch = self._watches.get(name[:3], _Watch())
        if known.heard < watch.listed < now - LISTING_SECONDS:  # it was not in the list
            return None
        told = max(known.heard, min(watch.told, known.heard + LONGEST_BELIEF_SECONDS - BELIEF_SECONDS))
        return known.body() if now - told <= BELIEF_SECONDS else None

    def knows(self, name: Name) -> bool:
        return name in self._known

    def pods(self, namespace: str, labels: Mapping[str, str]) -> list[Json]:
        """Pods of one of our jobs by its labels."""
        known = self._pods.get((namespace, labels[JOB_LABEL]), {})
        bodies = [known[name].body() for name in sorted(known)]
        return [body for body in bodies if labels.items() <= _labels(body).items()]

    def knows_pods(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether the pods of one of our jobs are believed to be those that are known: of each one was heard lately."""
        oldest = self._clock() - PODS_SECONDS
        return all(pod.heard >= oldest for pod in self._pods.get((namespace, labels[JOB_LABEL]), {}).values())

    def departed(self, namespace: str, labels: Mapping[str, str]) -> list[Json]:
        """Pods of one of our jobs that are gone because the cluster took them away, as they were in the end."""
        bodies = [known.body() for name, known in self._departed.items() if name[2] == namespace]
        return [body for body in bodies if labels.items() <= _labels(body).items()]

    def replace_pods(
        self, namespace: str, labels: Mapping[str, str], found: Sequence[Json], *, asked: float
    ) -> None:
        """What the API server lists for these labels is all that there is: an end that no watch told is heeded. What
        was heard of since the list was asked for, at `asked`, may be younger than the list."""
        known = self._pods.get((namespace, labels[JOB_LABEL]), {})
        there = {body["metadata"]["uid"] for body in found}
        for name, one in list(known.items()):
            old = one.uid not in there and one.heard < asked
            if old and labels.items() <= _labels(one.body()).items():
                del known[name]
        if not known:
            self._pods.pop((namespace, labels[JOB_LABEL]), None)
        for body in found:
            self.note({"apiVersion": "v1", "kind": "Pod", **body}, written=False)

    def _place(self, body: Mapping[str, Any]) -> MutableMapping[Name, _Known]:
        if body["kind"] != "Pod":
            return self._known
        return self._pods.setdefault(_job_of(body), {})

    def _drop_old(self) -> None:
        oldest = self._clock() - BELIEF_SECONDS
        while self._watches and next(iter(self._watches.values())).told < oldest:
            self._watches.popitem(last=False)
        oldest = self._clock() - LONGEST_BELIEF_SECONDS
        while self._known and next(iter(self._known.values())).heard < oldest:
            self._known.popitem(last=False)
        oldest = self._clock() - DEPARTED_SECONDS
        while self._departed and next(iter(self._departed.values())).heard < oldest:
            self._departed.popitem(last=False)


def name_of(body: Mapping[str, Any]) -> Name:
    metadata = body["metadata"]
    return (body["apiVersion"], body["kind"], metadata.get("namespace", ""), metadata.get("name", ""))


def _version(body: Mapping[str, Any]) -> int:
    """A resourceVersion as a number, by which versions of one kind may be compared (Kubernetes 1.35 says so, and it
    was never different); -1 where it is none."""
    text = str(body["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdecimal() else -1


def _labels(body: Mapping[str, Any]) -> dict[str, str]:
    return dict(body["metadata"].get("labels") or {})


def _was_taken_away(body: Mapping[str, Any]) -> bool:
    """Whether a pod's end is somebody else's doing: a disruption, or the kernel for want of memory."""
    if body["kind"] != "Pod":
        return False
    status = body.get("status") or {}
    disrupted = any(
        (one.get("type"), one.get("status")) == ("DisruptionTarget", "True")
        for one in status.get("conditions") or []
    )
    return disrupted or any(
        (one.get("state") or {}).get("terminated", {}).get("reason") == "OOMKilled"
        for one in status.get("containerStatuses") or []
    )


def _text(body: Mapping[str, Any]) -> bytes:
    return zlib.compress(pydantic_core.to_json(_trimmed(body)), 1)


def _job_of(body: Mapping[str, Any]) -> tuple[str, str]:
    return body["metadata"]["namespace"], _labels(body).get(JOB_LABEL, "")


def _trimmed(body: Mapping[str, Any]) -> Json:
    metadata = {k: v for k, v in body["metadata"].items() if k not in _NOT_ASKED_FOR}
    rest = {k: v for k, v in body.items() if k != "metadata"}
    if body["kind"] == "RayJob":
        rest["spec"] = {k: v for k, v in body.get("spec", {}).items() if k in ("suspend", "managedBy")}
    if body["kind"] == "Pod":
        rest["spec"] = _placement(body.get("spec", {}))
    return {"metadata": metadata, **rest}


def _placement(spec: Mapping[str, Any]) -> Json:
    """The node of a pod, or what it asks for while it has none."""
    if spec.get("nodeName"):
        return {"nodeName": spec["nodeName"]}
    asked = ("name", "resources", "restartPolicy")
    return {
        kind: [{k: v for k, v in one.items() if k in asked} for one in spec[kind]]
        for kind in ("containers", "initContainers")
        if kind in spec
    }
