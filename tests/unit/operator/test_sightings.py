"""What the watches told: the newest version counts, and what may be behind is looked up."""

from __future__ import annotations

from typing import Any

from finetune_operator.adapters.sightings import (
    BELIEF_SECONDS,
    LISTING_SECONDS,
    LONGEST_BELIEF_SECONDS,
    PODS_SECONDS,
    SURE_SECONDS,
    Sightings,
)

JOB = ("finetune.dev/v1alpha1", "FineTuneJob", "ns", "a")


def job(version: int | str, *, uid: str = "u", **parts: Any) -> dict[str, Any]:
    metadata = {
        "namespace": "ns",
        "name": "a",
        "uid": uid,
        "resourceVersion": str(version),
        "managedFields": [{}],
    }
    return {"apiVersion": JOB[0], "kind": JOB[1], "metadata": metadata, **parts}


def pod(name: str, *, attempt: int) -> dict[str, Any]:
    labels = {"finetune.dev/job": "a", "finetune.dev/attempt": str(attempt)}
    metadata = {"namespace": "ns", "name": name, "uid": name, "resourceVersion": "1", "labels": labels}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"nodeName": "n", "containers": [1]},
    }


def test_of_a_pod_without_a_node_it_is_known_what_its_containers_ask_for() -> None:
    """Why no node has room for it is told by that; thousands that run are kept without."""
    seen, waiting = Sightings(), pod("x", attempt=1)
    asked = {"name": "ray-head", "resources": {"requests": {"cpu": "1"}}}
    waiting["spec"] = {"containers": [{**asked, "env": [1]}], "initContainers": [], "volumes": [1]}
    seen.notice("ADDED", waiting)
    labels = {"finetune.dev/job": "a"}
    assert seen.pods("ns", labels)[0]["spec"] == {"containers": [asked], "initContainers": []}


def test_our_own_write_is_no_news_when_it_comes_back() -> None:
    seen = Sightings()
    assert seen.notice(None, job(5))
    assert seen.notice("MODIFIED", job(7, status={"phase": "Running"}))  # the answer to a write
    assert not seen.notice("MODIFIED", job(7, status={"phase": "Running"}))
    assert not seen.notice("MODIFIED", job(6)), "it was overtaken"
    found = seen.get(JOB)
    assert found is not None
    assert found["status"] == {"phase": "Running"}
    assert "managedFields" not in found["metadata"]


def test_what_somebody_has_read_is_news_when_the_watch_tells_it() -> None:
    """A deployment or another job that reads a job says nothing to the job's own pass."""
    seen = Sightings()
    seen.note(job(5), written=False)
    assert seen.notice("ADDED", job(5))
    assert not seen.notice("ADDED", job(5))
    seen.note(job(5), written=False)
    assert not seen.notice(None, job(5)), "it has been told"
    seen.note(job(7, spec={"suspend": False}), written=False)
    assert seen.notice("MODIFIED", job(6))
    assert seen.get(JOB) == job(7, spec={"suspend": False}) | {
        "metadata": {"namespace": "ns", "name": "a", "uid": "u", "resourceVersion": "7"}
    }
    assert seen.notice("MODIFIED", job(7))
    seen.note(job(8), written=True)
    seen.note(job(8), written=False)
    assert not seen.notice("MODIFIED", job(8))


def test_another_object_of_the_name_is_news_whatever_its_version() -> None:
    seen = Sightings()
    seen.notice(None, job(9))
    assert seen.notice("ADDED", job(3, uid="other"))
    assert seen.notice("DELETED", job(9))
    assert seen.knows(JOB), "the former one's end is not the present one's"
    assert seen.notice("DELETED", job(4, uid="other"))
    assert not seen.knows(JOB)


def test_versions_that_are_no_numbers_are_always_news() -> None:
    seen = Sightings()
    assert all(seen.notice("MODIFIED", job(version)) for version in ("b", "a", "b"))


def test_what_was_not_heard_of_for_long_is_looked_up() -> None:
    now = 0.0
    seen = Sightings(clock=lambda: now)
    seen.notice(None, job(1))
    now = BELIEF_SECONDS - 1
    assert seen.get(JOB)
    seen.notice("MODIFIED", job(1))  # heard again, be it the same
    now += BELIEF_SECONDS - 1
    assert seen.get(JOB)
    now += 2
    assert seen.get(JOB) is None
    seen.notice("ADDED", pod("x", attempt=1))
    now += LONGEST_BELIEF_SECONDS + 1
    seen.notice("MODIFIED", pod("x", attempt=1))
    assert len(seen) == 1, "what is believed no more takes no memory; a pod stays until it is deleted"


def test_a_silent_object_is_believed_for_longer_while_its_watch_tells_of_others() -> None:
    now = 0.0
    seen = Sightings(clock=lambda: now)
    seen.notice(None, job(1))
    other = job(2) | {"metadata": job(2, uid="v")["metadata"] | {"name": "b"}}
    elsewhere = other | {"metadata": other["metadata"] | {"namespace": "other"}}
    now = BELIEF_SECONDS + 1
    seen.notice("MODIFIED", elsewhere)
    seen.note(other, written=True)
    assert seen.get(JOB) is None, "that namespace may have a watch of its own, and an answer is no watch"
    seen.notice("MODIFIED", other)
    assert seen.get(JOB)
    now = LONGEST_BELIEF_SECONDS + 1
    seen.notice("MODIFIED", other)
    assert seen.get(JOB) is None, "a deletion while no watch listened is told by none"
    assert len(seen._watches) == 1, "watches that tell nothing take no memory"


def test_an_object_that_a_new_list_lacks_is_looked_up() -> None:
    now = 0.0
    seen = Sightings(clock=lambda: now)
    seen.notice(None, job(1))
    other = job(2) | {"metadata": job(2, uid="v")["metadata"] | {"name": "b"}}
    now = 1.0
    seen.notice(None, other)  # the watch has begun anew, and its list may be long
    now += LISTING_SECONDS
    assert seen.get(JOB)
    now += 0.1
    assert seen.get(JOB) is None, "nobody told that it was deleted"


def test_pods_of_which_nothing_was_heard_are_listed_again() -> None:
    now = 0.0
    seen = Sightings(clock=lambda: now)
    of_job = {"finetune.dev/job": "a"}
    assert seen.knows_pods("ns", of_job), "none is known, and a watch tells of new ones"
    for name in ("x", "y"):
        seen.notice("ADDED", pod(name, attempt=1))
    now = PODS_SECONDS
    assert seen.knows_pods("ns", of_job)
    now += 1
    assert not seen.knows_pods("ns", of_job)
    seen.replace_pods("ns", of_job, [pod("x", attempt=1)], asked=now)
    assert seen.knows_pods("ns", of_job)
    assert [body["metadata"]["name"] for body in seen.pods("ns", of_job)] == ["x"]


def test_the_answer_to_a_write_is_certain_for_a_moment() -> None:
    now = 0.0
    seen = Sightings(clock=lambda: now)
    seen.notice("MODIFIED", job(1))
    seen.note(job(1), written=False)
    assert seen.get(JOB, fresh=True) is None, "neither a watch nor what was read before is"
    seen.note(job(2), written=True)
    seen.notice("MODIFIED", job(3, status={"phase": "Running"}))
    now = SURE_SECONDS
    found = seen.get(JOB, fresh=True)
    assert found is not None
    assert found["status"] == {"phase": "Running"}, "what a watch told after it is not older"
    now += 0.1
    assert seen.get(JOB, fresh=True) is None
    assert seen.get(JOB)
    seen.note(job(4, uid="other"), written=False)
    now = 0.0
    assert seen.get(JOB, fresh=True) is None, "that was about another object of the name"


def test_pods_are_found_by_the_labels_of_their_attempt() -> None:
    seen = Sightings()
    for name, attempt in (("x", 1), ("y", 2), ("z", 2)):
        seen.notice("ADDED", pod(name, attempt=attempt))
    second = {"finetune.dev/job": "a", "finetune.dev/attempt": "2"}
    assert [body["metadata"]["name"] for body in seen.pods("ns", second)] == ["y", "z"]
    assert seen.pods("ns", second)[0]["spec"] == {"nodeName": "n"}
    seen.notice("DELETED", pod("y", attempt=2))
    assert [body["metadata"]["name"] for body in seen.pods("ns", {"finetune.dev/job": "a"})] == ["x", "z"]
    for name, attempt in (("x", 1), ("z", 2)):
        seen.notice("DELETED", pod(name, attempt=attempt))
    assert (len(seen), seen._pods) == (0, {})
