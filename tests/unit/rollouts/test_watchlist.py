"""What wakes a deployment: a poll of the routers at its interval, or at once where it is harmed, and its job."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from finetune_operator.reconcile.fleet import Fleet
from finetune_operator.reconcile.queue import Key
from finetune_operator.reconcile.watchlist import Watchlist

SLOW, QUICK = ("team", "slow"), ("team", "quick")


class Polls:
    hurry = False

    def __init__(self) -> None:
        self.on_poll: Callable[[], None] = lambda: None

    def poll_soon(self) -> None:
        return


async def test_a_harmed_deployment_does_not_wait_for_its_interval() -> None:
    polls, woken = Polls(), list[Key]()
    watchlist = Watchlist(fleet=cast("Fleet", polls), wake=woken.append)
    harmed: set[Key] = set()
    watchlist.is_harmed = harmed.__contains__
    watchlist.collect(SLOW, 3600)
    watchlist.collect(QUICK, 0.05)
    polls.on_poll()
    assert woken == [QUICK]
    harmed.add(SLOW)
    polls.on_poll()
    polls.on_poll()
    assert woken.count(SLOW) == 2
    watchlist.forget(SLOW)
    polls.on_poll()
    assert woken.count(SLOW) == 2


async def test_a_deployment_is_woken_by_its_job_and_by_no_former_one() -> None:
    woken: list[Key] = []
    watchlist = Watchlist(fleet=cast("Fleet", Polls()), wake=woken.append)
    former, job = ("team", "former"), ("team", "job")
    watchlist.refer(SLOW, former)
    watchlist.refer(SLOW, job)
    watchlist.refer(QUICK, job)
    watchlist.job_changed(former)
    assert woken == []
    watchlist.job_changed(job)
    assert sorted(woken) == [QUICK, SLOW]
    watchlist.forget(SLOW)
    watchlist.job_changed(job)
    assert woken.count(SLOW) == 1
