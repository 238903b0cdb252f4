"""Who is woken when a job changes."""

from __future__ import annotations

from finetune_operator.reconcile.followers import Followers
from finetune_operator.reconcile.queue import Key

BASE, REWARD, POLICY, OTHER = (("team", name) for name in ("base", "reward", "policy", "other"))


def told(followers: Followers, upstream: Key) -> list[Key]:
    woken: list[Key] = []
    followers.wake = woken.append
    followers.changed(upstream)
    return sorted(woken)


def test_only_those_who_wait_are_woken() -> None:
    followers = Followers()
    followers.follow(POLICY, {BASE, REWARD})
    followers.follow(OTHER, {BASE})
    assert told(followers, BASE) == [OTHER, POLICY]
    assert told(followers, REWARD) == [POLICY]
    assert told(followers, ("elsewhere", "base")) == []


def test_who_waits_no_more_is_not_woken_and_not_remembered() -> None:
    followers = Followers()
    followers.follow(POLICY, {BASE, REWARD})
    followers.follow(POLICY, {REWARD})
    assert (told(followers, BASE), told(followers, REWARD)) == ([], [POLICY])
    followers.follow(POLICY, ())
    assert told(followers, REWARD) == []
    assert (followers._wanted, followers._followers) == ({}, {})


def test_a_job_may_stop_waiting_while_it_is_told() -> None:
    followers, woken = Followers(), []

    def wake(key: Key) -> None:
        woken.append(key)
        followers.follow(key, ())

    followers.wake = wake
    followers.follow(POLICY, {BASE})
    followers.follow(OTHER, {BASE})
    followers.changed(BASE)
    followers.changed(BASE)
    assert sorted(woken) == [OTHER, POLICY]
