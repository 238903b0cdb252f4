"""What a poll of the routers wakes: each deployment at its interval, and a harmed one at once."""

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
